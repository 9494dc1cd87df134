"""Write an archive out under a folder, trusting nothing in it (FAULTS.md, finding 5).

Every component of every path is opened with O_NOFOLLOW from the folder above; files and folders come first; links last, once all of them are known to
stay inside. Modes are 0644 or 0755. An archive is extracted whole or not at all.
"""

import hashlib
import os
import shutil
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from libs.archives.pump import in_thread, pump
from libs.archives.reader import ArchiveReader, Member
from libs.archives.rules import Limits
from libs.archives.tree import FILE_MODE, FOLDER_MODE, PROGRAM_MODE, Entry, TreeBuilder, TreeSummary

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_OPEN_FOLDERS = 32


async def extract(chunks: AsyncIterator[bytes], root: Path, limits: Limits) -> TreeSummary:
    """Extract the archive in `chunks` into `root`, which is made, or is an empty folder. All file work is done in threads.

    Raises ArchiveRefused, OSError (a full disk: ENOSPC) or what `chunks` raises; then everything written is gone again."""
    extraction = await in_thread(lambda: Extraction(root, limits))
    try:
        return await pump(chunks, extraction.feed, extraction.finish)
    except BaseException:
        await in_thread(extraction.undo)
        raise


class Extraction:
    """One archive on its way to disk; blocking. Bytes go in by `feed`; then `finish`, or, after any failure, `undo`."""

    def __init__(self, root: Path, limits: Limits) -> None:
        """Raises OSError when `root` can be neither made nor used; FileExistsError when it is not empty."""
        self._root = root
        self._made = not root.exists()
        root.mkdir(mode=FOLDER_MODE, exist_ok=True)
        self._folders = OpenFolders(root)
        with os.scandir(self._folders.at(b"")) as found:
            empty = not any(found)
        if not empty:
            self._folders.close()
            raise FileExistsError(f"{root} is not empty")
        self._reader = ArchiveReader(limits)
        self._tree = TreeBuilder(limits)
        self._member: Member | None = None
        self._remaining = 0
        self._file = -1
        self._digest = hashlib.sha256()

    def feed(self, data: bytes) -> None:
        for found in self._reader.feed(data):
            if isinstance(found, Member):
                self._begin(found)
            else:
                self._write(found)

    def finish(self) -> TreeSummary:
        self._reader.finish()
        tree = self._tree.finish()
        for entry in tree.entries:
            if entry.kind == "link":
                parent, _, name = entry.path.rpartition(b"/")
                os.symlink(entry.target, name, dir_fd=self._folders.at(parent))
        self._folders.close()
        return tree.summary

    def undo(self) -> None:
        """Remove everything written. Never follows a link."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        self._folders.close()
        if self._made:
            shutil.rmtree(self._root, ignore_errors=True)
            return
        for child in self._root.iterdir():
            if child.is_dir() and not child.is_symlink():
                shutil.rmtree(child, ignore_errors=True)
            else:
                child.unlink(missing_ok=True)

    def _begin(self, member: Member) -> None:
        self._make_folders(self._tree.claim(member))
        parent, _, name = member.path.rpartition(b"/")
        if member.kind == "folder":
            if member.path and not self._tree.implied(member.path):
                self._make_folders([member.path])
            self._tree.add_folder(member.path)
        elif member.kind == "file":
            mode = PROGRAM_MODE if member.executable else FILE_MODE
            self._file = os.open(name, _NEW_FILE, mode, dir_fd=self._folders.at(parent))
            os.fchmod(self._file, mode)
            self._member, self._remaining, self._digest = member, member.size, hashlib.sha256()
            if not member.size:
                self._end()
        else:
            entry = self._tree.link(member)
            if entry.kind == "file":
                from_parent, _, from_name = member.target.rpartition(b"/")
                source = self._folders.at(from_parent)
                os.link(from_name, name, src_dir_fd=source, dst_dir_fd=self._folders.at(parent, keep=from_parent), follow_symlinks=False)
            self._tree.add(entry)

    def _write(self, piece: bytes) -> None:
        self._digest.update(piece)
        self._remaining -= len(piece)
        written = os.write(self._file, piece)
        while written < len(piece):
            written += os.write(self._file, memoryview(piece)[written:])
        if not self._remaining:
            self._end()

    def _end(self) -> None:
        member = self._member
        assert member is not None
        os.close(self._file)
        self._file = -1
        mode = PROGRAM_MODE if member.executable else FILE_MODE
        self._tree.add(Entry(member.path, "file", mode, member.size, self._digest.digest()))

    def _make_folders(self, paths: Sequence[bytes]) -> None:
        for path in paths:
            parent, _, name = path.rpartition(b"/")
            os.mkdir(name, FOLDER_MODE, dir_fd=self._folders.at(parent))
            os.fchmod(self._folders.at(path), FOLDER_MODE)


class OpenFolders:
    """Descriptors of the folders used last, each opened component by component without following a link."""

    def __init__(self, root: Path) -> None:
        self._open: OrderedDict[bytes, int] = OrderedDict()
        self._root = os.open(root, _FOLDER)

    def at(self, path: bytes, keep: bytes | None = None) -> int:
        """The folder `path`, given from the root (b""); stays open until some 30 others were asked for, or `close`. `keep` is not closed for it."""
        if not path:
            return self._root
        if (there := self._open.get(path)) is not None:
            self._open.move_to_end(path)
            return there
        parent, _, name = path.rpartition(b"/")
        opened = os.open(name, _FOLDER, dir_fd=self.at(parent, keep))
        self._open[path] = opened
        while len(self._open) > _OPEN_FOLDERS:
            oldest = next(kept for kept in self._open if kept not in (keep, path))
            os.close(self._open.pop(oldest))
        return opened

    def close(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()
        if self._root >= 0:
            os.close(self._root)
            self._root = -1
