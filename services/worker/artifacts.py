"""Trees of files in and out, by the artifacts service and an attempt's build token: manifests, and of the contents only what the other side lacks.

The service may be restarting: what fails by connection or 5xx is tried again for two minutes, counted from the last that went well. Every chunk that
has arrived has arrived, on either side, so that what is tried again is the rest.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack
from email.utils import parsedate_to_datetime
from itertools import chain, islice
from typing import TypeVar
from weakref import WeakValueDictionary

import aiohttp
import msgspec
import structlog
from yarl import URL

from libs.archives.blobstream import MEDIA_TYPE, BlobStreamReader, frames
from libs.archives.pump import drawn, in_thread, pump
from libs.archives.rules import ArchiveRefused
from libs.archives.tree import Entry, InvalidManifest
from libs.proofs import NOTHING, STREAM, WINDOW, proof_headers
from proto.api.artifacts import PendingUpload
from proto.events.base import ArtifactRef
from proto.messages import Package
from services.worker.cache import Cache
from services.worker.capture import Captured, Chunk, FileChanged
from services.worker.filling import Filling
from services.worker.newtree import NewTree
from services.worker.teamcache import TeamCache
from services.worker.trees import KnownTree

T = TypeVar("T")

logger = structlog.get_logger()

PATIENCE_SECONDS = 120.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0
_CHUNK = 256 << 10
_MAX_MANIFEST = 512 << 20
_AT_ONCE = 1 << 15
"""Files that are asked for together: what is kept in mind of them is bounded, whatever the tree."""

TREE_TYPE = "application/vnd.penstock.tree"


class Unobtainable(Exception):
    """A tree could not be had or stored; the text says why."""


class _Again(Exception):
    """Worth another try."""


class _Problem(msgspec.Struct):
    type: str = ""
    title: str = ""
    detail: str = ""


class Artifacts:
    """A client; it connects only when there is something to move. `identity` is the seed to sign with, `now` unix seconds."""

    def __init__(self, cache: Cache, identity: str, now: Callable[[], float], patience: float = PATIENCE_SECONDS) -> None:
        self._cache = cache
        self._identity = identity
        self._now = now
        self._ahead = 0.0
        """Seconds by which the service's clock is ahead of ours."""
        self._patience = patience
        self._session: aiohttp.ClientSession | None = None
        self._fetching: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()

    async def fetch(self, package: Package, name: str, pins: ExitStack, go_on: Callable[[], None] = lambda: None) -> KnownTree:
        """Bring an input's tree, which the caller has pinned, into its team's cache; its files are pinned there until `pins` are closed. `go_on` is
        asked in threads, and may raise. Raises Unobtainable, OSError (disk)."""
        digest = package.inputs[name].digest
        cache = self._cache.of(package.team)
        async with self._fetching.setdefault((package.team, digest), asyncio.Lock()):
            if (tree := await in_thread(lambda: cache.tree(digest))) is None:
                tree = await self._patiently(lambda _: self._manifest(cache, package, name, digest))
            pins.enter_context(cache.pinned(tree.names))
            lacking = cache.missing(tree, go_on)
            while some := await in_thread(lambda: dict(islice(lacking, _AT_ONCE))):
                await self._fill(cache, package, name, some.values())
            return tree

    async def store(self, package: Package, step: str, name: str, captured: Captured) -> ArtifactRef:
        """Keep a captured folder as the step's output. Raises Unobtainable, OSError (reading it)."""
        url = f"{package.artifacts_url}/outputs/{step}/{name}"
        least: int | None = None

        async def once(went_well: Callable[[], None]) -> ArtifactRef:
            nonlocal least
            answer = await self._send(package, "POST", url, TREE_TYPE, _sent(captured.manifest), await in_thread(lambda: _sha256(captured.manifest)))
            while isinstance(answer, PendingUpload):
                if least is not None and answer.missing_bytes >= least:
                    raise _Again("it asks again for what it was sent")
                least = answer.missing_bytes
                went_well()
                answer = await self._send(package, "PUT", f"{url}/blobs", MEDIA_TYPE, drawn(_frames(captured, answer.missing)), STREAM)
            return answer

        return await self._patiently(once)

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def _manifest(self, cache: TeamCache, package: Package, name: str, digest: str) -> KnownTree:
        url = f"{package.artifacts_url}/inputs/{name}"
        headers = {**self._proof(package, "GET", url, NOTHING), "Accept": TREE_TYPE}
        new = await in_thread(lambda: NewTree(cache, digest))
        left = _MAX_MANIFEST

        def feed(data: bytes) -> None:
            nonlocal left
            left -= len(data)
            if left < 0:
                raise Unobtainable(f"its manifest has more than {_MAX_MANIFEST} bytes")
            new.feed(data)

        try:
            async with self._http().get(url, headers=headers) as answer:
                await self._check(answer)
                return await pump(answer.content.iter_chunked(_CHUNK), feed, new.finish)
        except InvalidManifest as error:
            raise Unobtainable(f"its manifest is refused: {error}") from error
        finally:
            await in_thread(new.close)

    async def _fill(self, cache: TeamCache, package: Package, name: str, missing: Iterable[Entry]) -> None:
        filling = await in_thread(lambda: Filling(cache, missing))
        try:
            if filling.sizes:
                await self._patiently(lambda went_well: self._blobs(package, name, filling, went_well))
        finally:
            await in_thread(filling.close)

    async def _blobs(self, package: Package, name: str, filling: Filling, went_well: Callable[[], None]) -> None:
        lacking = filling.lacking
        wanted = set(lacking)
        reader = BlobStreamReader(lambda digest: filling.sizes[digest] if digest in wanted else None)

        def feed(data: bytes) -> None:
            for digest, contents in reader.feed(data):
                filling.put(digest, contents)
                went_well()

        def finish() -> None:
            try:
                reader.finish()
            except ArchiveRefused as error:
                raise _Again(str(error)) from None
            if filling.lacking:
                raise _Again("it sent less than it was asked for")

        url = f"{package.artifacts_url}/inputs/{name}/blobs"
        body = b"".join(lacking)
        async with self._http().post(url, data=_sent([body]), headers=self._proof(package, "POST", url, _sha256([body]))) as answer:
            await self._check(answer)
            await pump(answer.content.iter_chunked(_CHUNK), feed, finish)

    async def _send(
        self, package: Package, method: str, url: str, kind: str, body: AsyncIterator[bytes], content: str
    ) -> ArtifactRef | PendingUpload:
        failures: list[Exception] = []

        async def pieces() -> AsyncIterator[bytes]:
            try:
                async for piece in body:
                    yield piece
            except (FileChanged, OSError) as error:
                failures.append(error)  # the connection's failure would say nothing of it
                raise

        headers = {**self._proof(package, method, url, content), "Content-Type": kind}
        try:
            async with self._http().request(method, url, data=pieces(), headers=headers) as answer:
                await self._check(answer)
                text = await answer.read()
                return msgspec.json.decode(text, type=ArtifactRef) if answer.status == 201 else msgspec.json.decode(text, type=PendingUpload)
        except aiohttp.ClientError as error:
            raise failures[0] if failures else error from None

    def _proof(self, package: Package, method: str, url: str, content: str) -> dict[str, str]:
        path = URL(url.removeprefix(package.artifacts_url)).raw_path_qs
        return proof_headers(self._identity, package.token, method, path, content, self._now() + self._ahead)

    async def _check(self, answer: aiohttp.ClientResponse) -> None:
        if answer.status == 401 and (date := answer.headers.get("Date")):
            # Clocks may disagree: the service says what time it is there.
            ahead = parsedate_to_datetime(date).timestamp() - self._now()
            if abs(ahead - self._ahead) > WINDOW / 2:
                logger.warning("the clocks of worker and artifacts service disagree", seconds=round(ahead))
                self._ahead = ahead
                raise _Again("the clocks disagree")
        await _check(answer)

    def _http(self) -> aiohttp.ClientSession:
        if self._session is None:
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=120)
            plain = {"Accept-Encoding": "identity"}  # aiohttp would offer zstd by itself
            self._session = aiohttp.ClientSession(timeout=timeout, headers=plain, auto_decompress=False, trust_env=False)
        return self._session

    async def _patiently(self, once: Callable[[Callable[[], None]], Awaitable[T]]) -> T:
        """`once` until it succeeds; it says when something went well."""
        clock = asyncio.get_running_loop().time
        deadline, pause = clock() + self._patience, _FIRST_PAUSE

        def went_well() -> None:
            nonlocal deadline, pause
            deadline, pause = clock() + self._patience, _FIRST_PAUSE

        while True:
            try:
                return await once(went_well)
            except (ArchiveRefused, FileChanged, msgspec.DecodeError) as error:
                raise Unobtainable(str(error)) from error
            except (_Again, aiohttp.ClientError, TimeoutError) as error:
                if clock() + pause > deadline:
                    raise Unobtainable(
                        f"the artifacts service did not answer for {self._patience:.0f} s ({error or type(error).__name__})"
                    ) from error
            await asyncio.sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE)


async def _sent(pieces: Iterable[bytes]) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


def _frames(captured: Captured, runs: Sequence[tuple[int, int]]) -> Generator[bytes, None, None]:
    """The chunks in these runs, first to last, as they are counted."""
    wanted = chain.from_iterable(range(first, last + 1) for first, last in runs)
    yield from frames((chunk.digest, captured.read(chunk)) for chunk in _numbered(captured.chunks(), wanted))


def _numbered(chunks: Iterator[Chunk], numbers: Iterator[int]) -> Iterator[Chunk]:
    """Those with these numbers, which rise."""
    at = 0
    for number in numbers:
        yield from islice(chunks, number - at, number - at + 1)
        at = number + 1


def _sha256(pieces: Iterable[bytes]) -> str:
    whole = hashlib.sha256()
    for piece in pieces:
        whole.update(piece)
    return whole.hexdigest()


async def _check(answer: aiohttp.ClientResponse) -> None:
    if answer.status < 300:
        return
    text = await answer.content.read(4096)
    try:
        problem = msgspec.json.decode(text, type=_Problem)
    except msgspec.DecodeError:
        problem = _Problem()
    lasting = answer.status == 507 or problem.type.endswith(":damaged")
    words = f"{answer.status} {': '.join(part for part in (problem.title, problem.detail) if part) or answer.reason or ''}".strip()
    if (answer.status >= 500 and not lasting) or answer.status == 429 or problem.type.endswith(":upload-unknown"):
        raise _Again(words)
    raise Unobtainable(words)
