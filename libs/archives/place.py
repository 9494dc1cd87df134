"""Write a tree out under a folder, trusting nothing: the entries are checked before anything is written, every folder is opened with O_NOFOLLOW from
the one above, and symbolic links come last, so that nothing is ever written through one."""

import os
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from libs.archives.rules import Limits
from libs.archives.tree import FILE_MODE, FOLDER_MODE, PROGRAM_MODE, Entry, TreeCheck

Put = Callable[[Entry, int, bytes], None]
"""Makes a plain file: entry, descriptor of the folder that it lies in, its name there. It must make a new one (O_EXCL, or a link)."""

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_OPEN_FOLDERS = 32
_PAGE = 4096
_ZEROS = bytes(_PAGE)


def place(entries: Sequence[Entry], root: Path, put: Put, limits: Limits | None = None) -> None:
    """Write the tree with these entries, in canonical order, into `root`, which is made (0755), or is an empty folder; `put` makes its plain files.
    Blocking. Raises ArchiveRefused for what is no tree, FileExistsError for a root that is not empty, OSError (a full disk: ENOSPC) or what `put`
    raises; then everything written is gone again."""
    check = TreeCheck(limits)
    for entry in entries:
        check.add(entry)
    check.finish(b"")
    place_checked(entries, root, put)


def place_checked(entries: Iterable[Entry], root: Path, put: Put) -> None:
    """As `place`, with the entries of a tree that was checked before."""
    made = not root.exists()
    root.mkdir(mode=FOLDER_MODE, exist_ok=True)
    folders = OpenFolders(root)
    try:
        with os.scandir(folders.at(b"")) as found:
            if any(found):
                raise FileExistsError(f"{root} is not empty")
        try:
            _write(entries, folders, put)
        except BaseException:
            _undo(root, made)
            raise
    finally:
        folders.close()


def _write(entries: Iterable[Entry], folders: "OpenFolders", put: Put) -> None:
    last: list[Entry] = []
    parent, at = b"", folders.at(b"")
    for entry in entries:
        folder, _, name = entry.path.rpartition(b"/")
        if entry.kind == "link":
            last.append(entry)
            continue
        if folder != parent:
            parent, at = folder, folders.at(folder)
        if entry.kind == "folder":
            os.mkdir(name, FOLDER_MODE, dir_fd=at)
            # what lies in it comes next
            parent, at = entry.path, folders.at(entry.path)
            os.fchmod(at, FOLDER_MODE)
        elif entry.target:
            first_folder, _, first = entry.target.rpartition(b"/")
            source = folders.at(first_folder, keep=parent)
            os.link(first, name, src_dir_fd=source, dst_dir_fd=folders.at(parent, keep=first_folder), follow_symlinks=False)
        else:
            put(entry, at, name)
    for entry in last:
        folder, _, name = entry.path.rpartition(b"/")
        os.symlink(entry.target, name, dir_fd=folders.at(folder))


def _undo(root: Path, made: bool) -> None:
    """Remove everything written. Never follows a link."""
    if made:
        shutil.rmtree(root, ignore_errors=True)
        return
    for child in root.iterdir():
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child, ignore_errors=True)
        else:
            child.unlink(missing_ok=True)


def create_file(entry: Entry, parent: int, name: bytes, pieces: Iterable[bytes]) -> None:
    """A new file with the entry's mode and these contents; for `put`. Raises OSError."""
    opened = os.open(name, _NEW_FILE, FILE_MODE, dir_fd=parent)
    try:
        os.fchmod(opened, PROGRAM_MODE if entry.executable else FILE_MODE)
        write_file(opened, pieces)
    finally:
        os.close(opened)


def write_file(opened: int, pieces: Iterable[bytes]) -> int:
    """Write the pieces into an empty file from its start, leaving holes for pages of zeros; how many bytes it has then."""
    at = 0
    for piece in pieces:
        _write_piece(opened, piece, at)
        at += len(piece)
    if at and os.fstat(opened).st_size < at:
        os.truncate(opened, at)
    return at


def _write_piece(opened: int, piece: bytes, at: int) -> None:
    """`at` is where in the file the piece begins; pages are the file's."""
    size = len(piece)
    begun, page = 0, -at % _PAGE
    while page + _PAGE <= size:
        if not piece.startswith(_ZEROS, page):
            page += _PAGE
            continue
        _write_all(opened, memoryview(piece)[begun:page], at + begun)
        while piece.startswith(_ZEROS, page):
            page += _PAGE
        begun = page
    _write_all(opened, memoryview(piece)[begun:], at + begun)


def _write_all(opened: int, data: memoryview, at: int) -> None:
    while data:
        written = os.pwrite(opened, data, at)
        data, at = data[written:], at + written


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
        if name == b"..":
            raise ValueError("a path that leads up")
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
