"""The object store underneath, by URL (`file:///folder`, `s3://bucket/prefix`, …), with its errors given names. Blocking: call it from threads."""

import errno
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import BaseError, NotFoundError
from obstore.store import LocalStore, from_url

_FULL = re.compile(rf"os error ({errno.ENOSPC}|{errno.EDQUOT}|{errno.EFBIG})\b")
_PAST_THE_END = re.compile(r"range was invalid|InvalidRange|416 Range|Requested Range Not Satisfiable", re.IGNORECASE)
_UNFINISHED = re.compile(r"#\d+$")
"""How obstore names what it has not finished writing in a local folder."""


class StoreUnavailable(Exception):
    """The store cannot be reached or fails: nothing is known; try again."""


class StoreFull(StoreUnavailable):
    """The store has no room left."""


class ObjectMissing(Exception):
    """There is no such object."""


class Objects:
    """Whole objects under keys; each is visible only when whole."""

    def __init__(self, url: str) -> None:
        """A local folder is made when it is not there. Raises StoreUnavailable."""
        parts = urlsplit(url)
        self._folder = Path(unquote(parts.path)) if parts.scheme == "file" else None
        try:
            self._store = LocalStore(self._folder, mkdir=True) if self._folder is not None else from_url(url)
        except (BaseError, OSError, ValueError) as error:
            raise StoreUnavailable(f"cannot open the store: {error}") from None

    def put(self, key: str, data: bytes) -> None:
        """Raises StoreFull, StoreUnavailable; then nothing is visible under `key`."""
        try:
            obstore.put(self._store, key, data, use_multipart=False)
        except BaseError as error:
            raise _named(error) from None

    def get(self, key: str, start: int, length: int) -> bytes:
        """Up to `length` bytes: fewer, or none, where the object ends. Raises ObjectMissing, StoreUnavailable."""
        try:
            return bytes(obstore.get_range(self._store, key, start=start, length=length))
        except (NotFoundError, FileNotFoundError):
            raise ObjectMissing(key) from None
        except BaseError as error:
            if _PAST_THE_END.search(str(error)):
                return b""
            raise _named(error) from None

    def get_all(self, key: str) -> bytes:
        """Raises ObjectMissing, StoreUnavailable."""
        try:
            return bytes(obstore.get(self._store, key).bytes())
        except (NotFoundError, FileNotFoundError):
            raise ObjectMissing(key) from None
        except BaseError as error:
            raise _named(error) from None

    def list(self, prefix: str = "") -> Iterator[str]:
        """Every key below a prefix, in no order. Raises StoreUnavailable."""
        try:
            for page in obstore.list(self._store, prefix or None, chunk_size=1000):
                for found in page:
                    yield found["path"]
        except BaseError as error:
            raise _named(error) from None

    def delete(self, keys: Sequence[str]) -> None:
        """What is not there is passed over. Raises StoreUnavailable."""
        for key in keys:
            try:
                obstore.delete(self._store, key)
            except (NotFoundError, FileNotFoundError):
                continue
            except BaseError as error:
                raise _named(error) from None
        if self._folder is not None:
            for folder in {(self._folder / key).parent for key in keys}:
                _remove_if_empty(folder, self._folder)

    def settle(self, keys: Sequence[str]) -> None:
        """Make objects survive a power cut: in a local folder, obstore leaves that to us. Raises StoreFull, StoreUnavailable."""
        if self._folder is None:
            return
        paths = [self._folder / key for key in keys]
        folders = {parent for path in paths for parent in path.parents if parent == self._folder or self._folder in parent.parents}
        try:
            for path in (*paths, *folders):
                _sync(path)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StoreFull(str(error)) from None
            raise StoreUnavailable(str(error)) from None

    def unfinished(self) -> Iterator[tuple[str, Path]]:
        """What a crash left half written in a local folder: the key it was for, and the file."""
        if self._folder is None:
            return
        for folder, _, files in os.walk(self._folder):
            for name in files:
                if _UNFINISHED.search(name):
                    path = Path(folder) / name
                    yield _UNFINISHED.sub("", path.relative_to(self._folder).as_posix()), path


def _named(error: BaseError) -> StoreUnavailable:
    text = str(error)
    return StoreFull("no space left in the store") if _FULL.search(text) else StoreUnavailable(text.partition("\n")[0])


def _sync(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _remove_if_empty(folder: Path, root: Path) -> None:
    while folder != root:
        try:
            folder.rmdir()
        except OSError:
            return
        folder = folder.parent
