"""Bringing an artifact back: what it holds first, then what the folder lacks of it, as it comes; and single files of it."""

import asyncio
import hashlib
import os
import sys
import threading
from collections import deque
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from pathlib import Path

import aiohttp

from penstock.client.errors import Damaged, NotFound, NotThere, Refused, Unavailable
from penstock.client.http import Http, Waiting, is_loopback
from penstock.client.model import Direct, Problem, Progress, Transfer
from penstock.client.placing import Parts, Place, refuse_git
from penstock.client.scan import TICK
from penstock.client.threads import Threads
from penstock.client.tree import DIGEST, ZERO_CHUNK, Entry, InvalidManifest, ManifestReader
from penstock.client.treecheck import Check, limits_of, part_of

if sys.version_info >= (3, 14):
    from compression.zstd import DecompressionParameter, ZstdDecompressor, ZstdError
else:
    from backports.zstd import DecompressionParameter, ZstdDecompressor, ZstdError

PIECE = 256 * 1024
_WINDOW_LOG = 25
"""The largest window a compressed manifest may ask for: 32 MiB of memory."""
ASKED = 16_384
"""Chunks asked for in one request."""
_HEADER = DIGEST + 4
_READ = 1 << 20
"""Bytes that one read of the connection may take."""
GATHERED = 4 << 20
"""Bytes that are handed to a thread together."""
LOOKED_AT = 256
"""Files that are compared together."""


async def fetch_manifest(http: Http, artifact: str) -> list[Entry]:
    """All that an artifact (the path of its URL) holds. Raises Damaged when it is no tree, or none that may be written."""
    return (await _manifest(http, artifact))[0]


async def _manifest(http: Http, artifact: str) -> tuple[list[Entry], Direct | None]:
    """The same, and where its chunks can be fetched past the gateway."""
    headers = {"Accept-Encoding": "identity" if is_loopback(http.url) else "zstd"}
    limits = limits_of(os.environ)
    reader, check = ManifestReader(), Check(limits)
    entries: list[Entry] = []
    left = limits.manifest
    async with http.open("GET", artifact, params={"format": "tree"}, headers=headers) as response:
        url, token = response.headers.get("Penstock-Direct-Url"), response.headers.get("Penstock-Direct-Token")
        unpacked = _unpacker() if response.headers.get("Content-Encoding") == "zstd" else None
        try:
            async for data in response.content.iter_chunked(PIECE):
                for piece in _unpack(unpacked, data) if unpacked else (data,):
                    left -= len(piece)
                    if left < 0:
                        raise InvalidManifest(f"it is larger than {limits.manifest} bytes")
                    for entry in reader.feed(piece):
                        check.add(entry)
                        entries.append(entry)
            if unpacked and not unpacked.eof:
                raise InvalidManifest("it is cut short")
            reader.finish()
        except (InvalidManifest, ZstdError, EOFError) as error:
            raise Damaged(f"{http.url} sent a manifest that cannot be read ({error}): try again, or look whether it is as new as this") from error
    check.finish()
    return entries, http.direct(Direct(url=url, token=token)) if url and token else None


def _unpacker() -> ZstdDecompressor:
    return ZstdDecompressor(options={DecompressionParameter.window_log_max: _WINDOW_LOG})


def _unpack(unpacker: ZstdDecompressor, data: bytes) -> Iterator[bytes]:
    """What the data unpacks to, in pieces: a little data may be much."""
    yield unpacker.decompress(data, PIECE)
    while not unpacker.eof and not unpacker.needs_input:
        yield unpacker.decompress(b"", PIECE)


async def read_file(http: Http, artifact: str, path: str | bytes, start: int, length: int | None) -> AsyncGenerator[bytes, None]:
    """A file's bytes from `start`; a broken connection is taken up where it broke."""
    waiting = http.waiting()
    at, end = start, None if length is None else start + length
    tag = ""
    while end is None or at < end:
        headers = {"Range": f"bytes={at}-{'' if end is None else end - 1}"} if at or end is not None else {}
        headers |= {"If-Range": tag} if tag else {}
        try:
            async with http.open("GET", artifact, params={"path": path}, headers=headers) as response:
                if headers and response.status != 206:
                    raise Damaged(f"{http.url} does not give a part of the file: it gave another, or all of it")
                tag = response.headers.get("ETag", "")
                async for data in response.content.iter_chunked(PIECE):
                    waiting.moved()
                    yield data
                    at += len(data)
            return
        except Refused as error:
            if tag and error.problem and error.problem.status == 416:  # it broke after the last byte
                return
            raise
        except Unavailable as error:
            await waiting.after(error)


async def download_folder(http: Http, artifact: str, into: Path, path: bytes, progress: Progress | None, patience: float) -> int:
    """Bring the tree, or the part of it at `path`, into the folder; the number of its files. Raises Damaged, Unwritable, NotFound."""
    waiting = http.waiting(patience)
    entries, direct = await http.repeated(lambda: _manifest(http, artifact), patience)
    if path.strip(b"/"):
        entries = _part(entries, path.strip(b"/"))
    refuse_git(into, entries)
    with Parts(into) as parts:  # left when no thread is at work any more
        await _fetch(http, artifact, direct, waiting, into, entries, parts, progress)
    return sum(entry.kind == "file" for entry in entries)


async def _fetch(
    http: Http,
    artifact: str,
    direct: Direct | None,
    waiting: Waiting,
    into: Path,
    entries: list[Entry],
    parts: Parts,
    progress: Progress | None,
) -> None:
    async with Threads(2) as threads:
        work = _Download(into, entries, parts, threads, progress)
        await work.prepare()
        while work.wanted:
            try:
                async with aclosing(_blobs(http, f"{artifact}/blobs", list(work.wanted)[:ASKED], work.sizes, direct)) as blobs:
                    async for came in blobs:
                        for digest, contents in came:
                            await work.take(digest, contents)
                        waiting.moved()
                await work.flush()
            except NotThere:
                await work.flush()
                direct = None
            except Unavailable as error:
                await work.flush()
                await waiting.after(error)
        await work.finish()


def _part(entries: list[Entry], path: bytes) -> list[Entry]:
    found = next((entry for entry in entries if entry.path == path), None)
    if found is None:
        raise NotFound(Problem(status=404, detail=f"the artifact has no `{os.fsdecode(path)}`: `penstock artifact ls` shows what it has"))
    part = list(part_of(entries, path))
    check = Check(limits_of(os.environ))
    for entry in part:  # a link that stays inside the whole may leave the part
        check.add(entry)
    check.finish()
    return part


Contents = bytes | bytearray


async def _blobs(
    http: Http, path: str, digests: Sequence[bytes], sizes: dict[bytes, int], at: Direct | None
) -> AsyncGenerator[list[tuple[bytes, Contents]], None]:
    """The chunks, some at a time, in the server's order, not yet verified. Raises Unavailable when it ends early, Damaged when it is not what was
    asked for."""
    reader = _Reader(digests, sizes)
    async with http.open("POST", path, at=at, data=b"".join(digests), headers={"Content-Type": "application/octet-stream"}) as response:
        if response.connection and hasattr(response.connection.transport, "max_size"):
            response.connection.transport.max_size = _READ  # type: ignore[union-attr]
        try:
            async for data in response.content.iter_any():
                if came := list(reader.feed(data)):
                    yield came
        except ValueError:
            raise Damaged(f"{http.url} sent a chunk that was not asked for: nothing of it is written") from None
        except aiohttp.ClientPayloadError as error:
            raise http.broken_off(at, "while it sent") from error
    if not reader.ended:
        raise http.broken_off(at, "while it sent")
    if reader.left:
        raise Unavailable(f"{http.url} left {len(reader.left)} chunks out")


class _Reader:
    """Takes a stream of chunks apart; `left` are those that have not begun to come."""

    def __init__(self, digests: Sequence[bytes], sizes: dict[bytes, int]) -> None:
        self._sizes = sizes
        self._header = b""
        self._digest = b""
        self._contents = bytearray()
        self._filled = 0
        self.left = set(digests)
        self.ended = False

    def feed(self, data: bytes) -> Iterator[tuple[bytes, Contents]]:
        """What this completes. Raises ValueError when it is not what was asked for."""
        at = 0
        while at < len(data):
            if self.ended:
                raise ValueError
            if not self._digest:
                part = data[at : at + _HEADER - len(self._header)]
                self._header += part
                at += len(part)
                if len(self._header) == _HEADER:
                    self._begin()
                continue
            size = self._sizes[self._digest]
            stretch = memoryview(data)[at : at + size - self._filled]
            at += len(stretch)
            if not self._filled and len(stretch) == size:
                yield self._digest, bytes(stretch)
                self._digest = b""
                continue
            if not self._filled:
                self._contents = bytearray(size)
            self._contents[self._filled : self._filled + len(stretch)] = stretch
            self._filled += len(stretch)
            if self._filled == size:
                yield self._digest, self._contents
                self._digest, self._contents, self._filled = b"", bytearray(), 0

    def _begin(self) -> None:
        digest, size = self._header[:DIGEST], int.from_bytes(self._header[DIGEST:], "big")
        self.ended = self._header == bytes(_HEADER)
        self._header = b""
        if self.ended:
            return
        if digest not in self.left or size != self._sizes[digest]:
            raise ValueError
        self.left.remove(digest)
        self._digest = digest


class _Download:
    """What is still wanted, and where it goes: `wanted` maps a chunk's digest to its places (file << 32 | chunk)."""

    def __init__(self, into: Path, entries: list[Entry], parts: Parts, threads: Threads, progress: Progress | None) -> None:
        self._into = into
        self._parts = parts
        self._entries = entries
        self._threads = threads
        self._progress = progress
        self._lock = threading.Lock()
        self._left: dict[int, int] = {}
        self._gathered: list[tuple[bytes, Contents]] = []
        self._size = 0
        self._writing: deque[tuple[asyncio.Future[None], list[bytes]]] = deque()
        self._done = self._total = 0
        self._all = sum(entry.size for entry in entries if entry.kind == "file" and not entry.target)
        self.wanted: dict[bytes, list[int]] = {}
        self.sizes: dict[bytes, int] = {}

    async def prepare(self) -> None:
        """Make the folders, and find out what is there."""
        await self._threads.run(self._make_folders)
        plain = [n for n, entry in enumerate(self._entries) if entry.kind == "file" and not entry.target]
        work = [self._threads.start(self._look, plain[at : at + LOOKED_AT]) for at in range(0, len(plain), LOOKED_AT)]
        left = set(work)
        while left:
            done, left = await asyncio.wait(left, timeout=TICK, return_when=asyncio.FIRST_EXCEPTION)
            for part in done:
                part.result()
        for looked in work:
            for n, had in looked.result():
                self._want(n, had)
        self._total = sum(self.sizes.values())
        self._tell()

    def _want(self, n: int, had: list[int]) -> None:
        there = set(had)
        count = 0
        for chunk, (digest, size) in enumerate(self._entries[n].chunks()):
            if chunk not in there and digest != ZERO_CHUNK:
                self.wanted.setdefault(digest, []).append(n << 32 | chunk)
                self.sizes[digest] = size
                count += 1
        if count:
            self._left[n] = count

    def _make_folders(self) -> None:
        with Place(self._into, self._threads.check, self._parts) as place:
            for entry in self._entries:
                if entry.kind == "folder":
                    place.folder(entry.path)

    def _look(self, part: Sequence[int]) -> list[tuple[int, list[int]]]:
        """The files that lack something, with what they have; those that need nothing sent are written."""
        lacking: list[tuple[int, list[int]]] = []
        with Place(self._into, self._threads.check, self._parts) as place:
            for n in part:
                self._threads.check()
                entry = self._entries[n]
                had = place.had(entry)
                if had is None:
                    continue
                if not entry.size or entry.digest == ZERO_CHUNK:
                    place.write(entry, bytes(entry.size))
                elif len(entry.digest) > DIGEST and len(had) * DIGEST == len(entry.digest):
                    place.complete(entry)
                else:
                    lacking.append((n, had))
        return lacking

    async def take(self, digest: bytes, contents: Contents) -> None:
        """A chunk that came."""
        self._gathered.append((digest, contents))
        self._size += len(contents)
        if self._size >= GATHERED or len(self._gathered) >= LOOKED_AT:
            self._hand_over()
            if len(self._writing) > 2:
                await self._written()

    def _hand_over(self) -> None:
        if self._gathered:
            future = self._threads.start(self._write, self._gathered)
            self._writing.append((future, [digest for digest, _ in self._gathered]))
            self._gathered, self._size = [], 0

    async def _written(self) -> None:
        future, digests = self._writing.popleft()
        await future
        for digest in digests:
            del self.wanted[digest]
            self._done += self.sizes[digest]
        self._tell()

    async def flush(self) -> None:
        """All that came is written."""
        self._hand_over()
        while self._writing:
            await self._written()

    def _write(self, blobs: Sequence[tuple[bytes, Contents]]) -> None:
        with Place(self._into, self._threads.check, self._parts) as place:
            for digest, contents in blobs:
                self._threads.check()
                if hashlib.sha256(contents).digest() != digest:
                    raise Damaged("a chunk that came does not match its digest: it is not written; try again")
                for where in self.wanted[digest]:
                    n, chunk = where >> 32, where & 0xFFFFFFFF
                    entry = self._entries[n]
                    if len(entry.digest) == DIGEST:
                        place.write(entry, contents)
                        continue
                    place.write_chunk(entry, chunk, contents)
                    with self._lock:
                        self._left[n] -= 1
                        last = not self._left[n]
                    if last:
                        place.complete(entry)

    async def finish(self) -> None:
        """What names something else: hard links, and then symbolic ones."""
        await self._threads.run(self._link)
        self._done = self._total
        self._tell()

    def _link(self) -> None:
        with Place(self._into, self._threads.check, self._parts) as place:
            for entry in self._entries:
                if entry.kind == "file" and entry.target:
                    place.hard_link(entry)
            for entry in self._entries:
                if entry.kind == "link":
                    place.link(entry)

    def _tell(self) -> None:
        if self._progress:
            self._progress(Transfer("receiving", self._done, self._total, self._all - self._total))
