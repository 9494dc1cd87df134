"""The object store underneath, by URL (`file:///folder`, `s3://bucket/prefix`, `gs://…`, `az://…`), with its errors given names.
Objects are written once, whole, and never changed. Blocking: call it from threads."""

import errno
import fcntl
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import BaseError, NotFoundError
from obstore.store import from_url

from libs.archives.pages import PAGE, is_paged

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_REMOTE = re.compile(r"os error (28|122|27)\b|QuotaExceeded|InsufficientStorage|507 ")
_PAST_THE_END = re.compile(r"range was invalid|InvalidRange|416 Range|Requested Range Not Satisfiable", re.IGNORECASE)
_PART = ".part"
_MADE = ".store"
"""A folder that only the store's own file system has: where it is not seen, nothing is mounted."""
_BUFFERS = 512
"""So many at a time go to one `writev`."""


class StoreUnavailable(Exception):
    """The store cannot be reached or fails: nothing is known; try again."""


class StoreFull(StoreUnavailable):
    """The store has no room left."""


class ObjectMissing(Exception):
    """There is no such object."""


class Objects(ABC):
    """Whole objects under keys `<folder>/<name>`. All methods raise StoreUnavailable."""

    @abstractmethod
    def put(self, key: str, data: Sequence[bytes | memoryview]) -> None:
        """The buffers one after another, as one object that would survive a power cut. Raises StoreFull. After a failure it may yet appear."""

    @abstractmethod
    def get(self, key: str, start: int, length: int) -> memoryview:
        """Up to `length` bytes: fewer, or none, where the object ends. Raises ObjectMissing."""

    @abstractmethod
    def end(self, key: str, length: int) -> tuple[bytes, int]:
        """The last `length` bytes (or all), and the object's size. Raises ObjectMissing."""

    @abstractmethod
    def list(self) -> Iterator[str]:
        """Every key, in no order; also of what a crash left half written."""

    @abstractmethod
    def reachable(self, key: str) -> bool:
        """Whether what would hold this object is there, so that an object that is missing there is missing indeed."""

    @abstractmethod
    def delete(self, keys: Sequence[str]) -> None:
        """Nor is anything half written under these keys afterwards. What is not there is passed over."""


def open_objects(url: str) -> Objects:
    """A local folder is made when it is not there. Credentials for the others come from the environment. Raises StoreUnavailable."""
    parts = urlsplit(url)
    try:
        return Folder(Path(unquote(parts.path))) if parts.scheme == "file" else Bucket(url)
    except (BaseError, OSError, ValueError) as error:
        raise StoreUnavailable(f"cannot open the store: {error}") from None


class Folder(Objects):
    """A local folder. Not obstore's: that copies what it writes, and leaves a power cut to us."""

    def __init__(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        if next(root.iterdir(), None) is not None:
            (root / _MADE).mkdir(exist_ok=True)
        self._root = root

    def put(self, key: str, data: Sequence[bytes | memoryview]) -> None:
        path = self._root / key
        part = path.with_name(path.name + _PART)
        with _named(key):
            try:
                with self._created(part) as file:
                    _write(file, data)
                    part.rename(path)
                    # after the rename, so that one commit of the file system's journal has both, and the folder's costs nothing
                    os.fsync(file)
            except BaseException:
                with suppress(OSError):
                    part.unlink()
                raise
            _sync(path.parent)

    def get(self, key: str, start: int, length: int) -> memoryview:
        with _named(key), _opened(self._root / key) as file:
            return memoryview(os.pread(file, length, start))

    def end(self, key: str, length: int) -> tuple[bytes, int]:
        with _named(key), _opened(self._root / key) as file:
            size = os.fstat(file).st_size
            return os.pread(file, length, max(0, size - length)), size

    def list(self) -> Iterator[str]:
        for folder, _, files in os.walk(self._root):
            for name in files:
                yield (Path(folder) / name).relative_to(self._root).as_posix().removesuffix(_PART)

    def reachable(self, key: str) -> bool:
        with _named(key):
            return (self._root / _MADE).is_dir()

    def delete(self, keys: Sequence[str]) -> None:
        folders = {(self._root / key).parent for key in keys}
        for key in keys:
            for path in (self._root / (key + _PART), self._root / key):
                with _named(key), suppress(FileNotFoundError):
                    path.unlink()
        for folder in folders:
            with suppress(OSError):
                folder.rmdir()

    @contextmanager
    def _created(self, part: Path) -> Iterator[int]:
        """The folder may be removed, being empty, at any moment until there is something in it."""
        while True:
            if not part.parent.is_dir():
                part.parent.mkdir(exist_ok=True)
                (self._root / _MADE).mkdir(exist_ok=True)
                _sync(self._root)
            with suppress(FileNotFoundError):
                file = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                break
            if not self._root.is_dir():
                raise FileNotFoundError(errno.EIO, "the store's folder is gone", str(self._root))
        try:
            yield file
        finally:
            os.close(file)


class Bucket(Objects):
    """Whatever obstore reaches."""

    def __init__(self, url: str) -> None:
        self._store = from_url(url)

    def put(self, key: str, data: Sequence[bytes | memoryview]) -> None:
        with _named(key):
            obstore.put(self._store, key, b"".join(data), use_multipart=False)

    def get(self, key: str, start: int, length: int) -> memoryview:
        try:
            with _named(key):
                return memoryview(obstore.get_range(self._store, key, start=start, length=length))
        except StoreUnavailable as error:
            if _PAST_THE_END.search(str(error)):
                return memoryview(b"")
            raise

    def end(self, key: str, length: int) -> tuple[bytes, int]:
        with _named(key):
            found = obstore.get(self._store, key, options={"range": {"suffix": length}})
            return bytes(found.bytes()), found.meta["size"]

    def list(self) -> Iterator[str]:
        with _named("the list"):
            for page in obstore.list(self._store, chunk_size=1000):
                for found in page:
                    yield found["path"]

    def reachable(self, key: str) -> bool:
        try:
            with _named(key):
                next(iter(obstore.list(self._store, prefix=key.rpartition("/")[0], chunk_size=1)), None)
        except ObjectMissing:
            return False
        return True

    def delete(self, keys: Sequence[str]) -> None:
        for at in range(0, len(keys), 1000):
            with _named("deletion"), suppress(NotFoundError, FileNotFoundError):
                obstore.delete(self._store, list(keys[at : at + 1000]))


@contextmanager
def _named(key: str) -> Iterator[None]:
    try:
        yield
    except (NotFoundError, FileNotFoundError):
        raise ObjectMissing(key) from None
    except BaseError as error:
        text = str(error)
        raise StoreFull("no space left in the store") if _FULL_REMOTE.search(text) else StoreUnavailable(text.partition("\n")[0]) from None
    except OSError as error:
        raise StoreFull("no space left in the store") if error.errno in _FULL else StoreUnavailable(str(error)) from None


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield file
    finally:
        os.close(file)


def _write(file: int, data: Sequence[bytes | memoryview]) -> None:
    views = [memoryview(buffer) for buffer in data]
    if is_paged(views[0]):
        views[0] = views[0][_write_past_cache(file, views[0]) :]
    for at in range(0, len(views), _BUFFERS):
        waiting = views[at : at + _BUFFERS]
        while waiting:
            written = os.writev(file, waiting)
            while waiting and written >= len(waiting[0]):
                written -= len(waiting.pop(0))
            if waiting:
                waiting[0] = waiting[0][written:]


def _write_past_cache(file: int, data: memoryview) -> int:
    """The whole pages of it, as far as the file system takes them straight from this memory: a large file would be copied into the kernel's own
    page by page, for half of all that storing it costs, and push out what others read. How many bytes."""
    flags, done = fcntl.fcntl(file, fcntl.F_GETFL), 0
    end = len(data) - len(data) % PAGE
    try:
        fcntl.fcntl(file, fcntl.F_SETFL, flags | getattr(os, "O_DIRECT", 0))
        while done < end and not done % PAGE:
            done += os.write(file, data[done:end])
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
    finally:
        fcntl.fcntl(file, fcntl.F_SETFL, flags)
    return done


def _sync(path: Path) -> None:
    with _opened(path) as file:
        os.fsync(file)
