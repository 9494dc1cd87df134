"""Writing a `tar` inside zstd into a folder, member by member, so that nothing is ever written outside it and no file is seen half.

The standard library reads the headers only. Every path is walked from the folder's descriptor, a component at a time, without following links; a
file is written under another name and renamed; links come last, relative and staying inside.
"""

# Everything is relative to a descriptor here, which pathlib does not know:
# ruff: noqa: PTH123

import asyncio
import io
import os
import secrets
import stat
import sys
import tarfile
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from penstock.client.errors import Damaged

if sys.version_info >= (3, 14):
    from compression.zstd import ZstdError, ZstdFile
else:
    from backports.zstd import ZstdError, ZstdFile

COPY = 256 * 1024
Read = Callable[[int], Coroutine[Any, Any, bytes]]
"""Gives at most so many bytes, b"" at the end."""


async def unpack(read: Read, folder: Path, progress: Callable[[int], None] | None = None) -> int:
    """Write the stream into the folder (made when absent; files that are there are replaced, others left alone); the number of files.
    Raises Damaged, or OSError for what the file system refuses. After a failure whole files may be there, never half ones."""
    loop = asyncio.get_running_loop()
    source = _Source(read, loop)
    thread = asyncio.ensure_future(asyncio.to_thread(_unpack, source, folder, progress))
    try:
        return await asyncio.shield(thread)
    except asyncio.CancelledError:
        source.stop()
        await asyncio.wait({thread})
        if not thread.cancelled():
            thread.exception()
        raise


class _Source(io.RawIOBase):
    """The stream as a file for the thread that unpacks it."""

    def __init__(self, read: Read, loop: asyncio.AbstractEventLoop) -> None:
        self._read = read
        self._loop = loop
        self._stopped = False
        self._waiting: asyncio.Task[bytes] | None = None

    def stop(self) -> None:
        """End the thread's current and later reads; call it on the loop."""
        self._stopped = True
        if self._waiting:
            self._waiting.cancel()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(cast(bytearray, buffer))
        data = asyncio.run_coroutine_threadsafe(self._next(len(view)), self._loop).result()
        view[: len(data)] = data
        return len(data)

    async def _next(self, size: int) -> bytes:
        if self._stopped:
            raise Damaged("the download was given up")
        self._waiting = asyncio.ensure_future(self._read(size))
        try:
            return await self._waiting
        except asyncio.CancelledError:
            raise Damaged("the download was given up") from None
        finally:
            self._waiting = None


def _unpack(source: _Source, folder: Path, progress: Callable[[int], None] | None) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    root = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    links: list[tuple[list[str], str]] = []
    files = done = 0
    try:
        # The decompressor asks for little at a time, and each asking crosses threads: so it asks a buffer.
        compressed = io.BufferedReader(source, COPY)
        with (
            ZstdFile(compressed, "rb") as plain,
            tarfile.open(mode="r|", fileobj=plain, bufsize=COPY, errorlevel=2, errors="surrogateescape") as archive,
        ):
            for member in archive:
                parts = _parts(member.name)
                if member.isdir():
                    _made(root, parts, member.mode)
                elif member.issym():
                    _check_link(member.name, parts, member.linkname)
                    links.append((parts, member.linkname))
                elif member.isreg():
                    content = archive.extractfile(member)
                    if content is None or not parts:
                        raise Damaged(f"the archive holds `{member.name}`, which is no file")
                    for count in _write_file(root, parts, member, content):
                        done += count
                        if progress:
                            progress(done)
                    files += 1
                else:
                    raise Damaged(f"the archive holds `{member.name}`, which is no file, folder or symbolic link: it is not written")
            while plain.read(COPY):  # to the end of the stream, where its checksum is
                pass
        for parts, target in links:
            _write_link(root, parts, target)
    except (tarfile.TarError, ZstdError, EOFError) as error:
        raise Damaged(f"the archive is damaged or cut short ({error})") from error
    finally:
        os.close(root)
    return files


def _parts(name: str) -> list[str]:
    """A member's path, component by component; [] is the folder itself."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or "\0" in name:
        raise Damaged(f"the archive holds `{name}`, which would be written outside the folder: it is not written")
    return parts


def _check_link(name: str, parts: list[str], target: str) -> None:
    steps = [step for step in target.split("/") if step not in ("", ".")]
    up = 0
    while up < len(steps) and steps[up] == "..":
        up += 1
    if not parts or target.startswith("/") or not target or up > len(parts) - 1 or ".." in steps[up:]:
        raise Damaged(f"the archive holds the link `{name}` → `{target}`, which leaves the folder: it is not written")


def _made(root: int, parts: list[str], mode: int = 0o755) -> None:
    with _folder(root, parts[:-1]) as parent:
        if parts:
            _make_folder(parent, parts[-1], mode)


@contextmanager
def _folder(root: int, parts: list[str]) -> Iterator[int]:
    """The descriptor of a folder below the root, made where absent; a link on the way is refused."""
    current = os.dup(root)
    try:
        for i, part in enumerate(parts):
            _make_folder(current, part, 0o755)
            try:
                inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=current)
            except OSError as error:
                where = "/".join(parts[: i + 1])
                raise Damaged(f"`{where}` is already there and is not a folder: nothing is written through it") from error
            os.close(current)
            current = inner
        yield current
    finally:
        os.close(current)


def _make_folder(parent: int, name: str, mode: int) -> None:
    try:
        os.mkdir(name, (mode & 0o777) | 0o700, dir_fd=parent)
    except FileExistsError:
        if not stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
            raise Damaged(f"`{name}` is already there and is not a folder: remove it first") from None


def _write_file(root: int, parts: list[str], member: tarfile.TarInfo, content: IO[bytes]) -> Iterator[int]:
    with _folder(root, parts[:-1]) as parent:
        name = f".penstock-{secrets.token_hex(8)}.part"
        handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600, dir_fd=parent)
        try:
            with open(handle, "wb", buffering=0) as file:
                written = 0
                while data := content.read(COPY):
                    view = memoryview(data)
                    while view:
                        view = view[file.write(view) :]
                    written += len(data)
                    yield len(data)
                if written != member.size:
                    raise Damaged(f"the archive is cut short in `{member.name}`")
                os.fchmod(file.fileno(), member.mode & 0o777)
            try:
                os.replace(name, parts[-1], src_dir_fd=parent, dst_dir_fd=parent)
            except IsADirectoryError:
                raise Damaged(f"`{member.name}` is a folder here and a file in the output: remove it first") from None
        except BaseException:
            os.unlink(name, dir_fd=parent)
            raise


def _write_link(root: int, parts: list[str], target: str) -> None:
    with _folder(root, parts[:-1]) as parent:
        name = f".penstock-{secrets.token_hex(8)}.part"
        os.symlink(target, name, dir_fd=parent)
        try:
            os.replace(name, parts[-1], src_dir_fd=parent, dst_dir_fd=parent)
        except OSError as error:
            os.unlink(name, dir_fd=parent)
            raise Damaged(f"`{'/'.join(parts)}` is a folder here and a link in the output: remove it first") from error
