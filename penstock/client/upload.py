"""Sending a folder: what it is like first, then what the server lacks of it, and again what it still lacks, until it has everything."""

import asyncio
import secrets
import sys
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import msgspec

from penstock.client.bodies import END_FRAME, Body, Stretch, frames
from penstock.client.chunks import Chunks
from penstock.client.errors import Changed, NotFound, NotThere, PenstockError, Refused, Unavailable
from penstock.client.http import CONNECT_SECONDS, DIRECT_CONNECT_SECONDS, Http, is_loopback
from penstock.client.index import is_known, note_known
from penstock.client.model import Artifact, Direct, PendingUpload, Progress, Transfer
from penstock.client.scan import hash_files, save
from penstock.client.selection import Selection, select
from penstock.client.threads import Threads
from penstock.client.tree import CHUNK, manifest_of

if sys.version_info >= (3, 14):
    from compression.zstd import ZstdCompressor
else:
    from backports.zstd import ZstdCompressor

T = TypeVar("T")

TREE_TYPE = "application/vnd.penstock.tree"
LED_TREE_TYPE = "application/vnd.penstock.blobs+tree"
BLOBS_TYPE = "application/vnd.penstock.blobs"
AT_ONCE = 2
"""Streams to the server."""
STREAM = 64 << 20
"""Bytes in one of them."""
LEAD = 256 << 10
"""Bytes of changed files that are sent with the manifest, without asking whether they are missing."""
DIRECT = 4 << 20
"""Bytes from which on they are sent past the gateway, which costs a request more."""


async def upload_folder(
    http: Http, base: str, source: Path | Selection, params: Mapping[str, str], progress: Progress | None, patience: float
) -> Artifact:
    """Store the selection below `base`, the team's URL. A file that changes meanwhile is noticed, and all is looked at once more."""
    selection = None if isinstance(source, Path) else source
    look = (
        partial(select, source)
        if isinstance(source, Path)
        else partial(select, source.root, include_ignored=source.include_ignored, include_git=source.include_git)
    )
    for last in (False, True):
        async with Threads(2) as threads:
            if selection is None:
                selection = await threads.run(look)
            try:
                return await _Upload(http, base, selection, params, progress, patience, threads).run()
            except Changed:
                if last:
                    raise
        selection = None
    raise AssertionError


class Stored(msgspec.Struct, frozen=True):
    """What a direct address says of an artifact."""

    digest: str


class _Upload:
    def __init__(
        self, http: Http, base: str, selection: Selection, params: Mapping[str, str], progress: Progress | None, patience: float, threads: Threads
    ) -> None:
        self._http = http
        self._path = f"{base}/user-artifacts"
        self._selection = selection
        self._chunks = Chunks(selection)
        self._params = params
        self._progress = progress
        self._patience = patience
        self._stalled = max(patience, CONNECT_SECONDS)
        self._threads = threads
        self._headers = {"Idempotency-Key": secrets.token_hex(16)}
        self._packed = not is_loopback(http.url)
        self._total: int | None = None
        self._sent = 0
        self._led = 0
        self._waiting = http.waiting(patience)

    async def run(self) -> Artifact:
        selection = self._selection
        unread, before = selection.unread, selection.index.tree
        total = sum(selection.entries[n].size for n in unread)
        skipped = selection.size - total
        tree = await hash_files(selection, self._threads, lambda done: self._tell("hashing", min(done, total), total, skipped))
        self._tell("hashing", total, total, skipped)
        saving = self._threads.start(save, selection)
        server = f"{self._http.url}{self._path}"
        changed = unread if total <= LEAD and before and is_known(selection.index, server, before) else []
        artifact = await self._store(tree, changed)
        await saving
        if not is_known(selection.index, server, tree):
            note_known(selection.index, server, tree)
        sent = self._led if self._total is None else self._total
        self._tell("sending", sent, sent, selection.size - sent)
        return artifact

    def _tell(self, phase: Any, done: int, total: int, skipped: int) -> None:
        if self._progress:
            self._progress(Transfer(phase, done, total, skipped))

    async def _store(self, tree: bytes, changed: Sequence[int]) -> Artifact:
        """`changed`: files that the server is likely to lack, and no others."""
        if is_known(self._selection.index, f"{self._http.url}{self._path}", tree):
            try:
                return await self._http.repeated(lambda: self._name(tree), self._patience)
            except NotFound:
                pass  # it has expired there since
        lacked = 1 << 63
        kept = True  # what was sent
        while True:
            try:
                answer = await self._offer(changed)
                changed = []
                if isinstance(answer, Artifact):
                    return answer
                if answer.missing_bytes < lacked:
                    self._waiting.moved()
                elif not kept:
                    await self._waiting.after(Unavailable(f"{self._http.url} does not keep what it is sent: look at its log"))
                lacked, kept = answer.missing_bytes, True
                stored = await self._send(answer)
                if stored is not None:
                    return stored
                kept = False
            except Unavailable as error:
                await self._waiting.after(error)

    async def _name(self, tree: bytes) -> Artifact:
        params = {**self._params, "tree": tree.hex()}
        async with self._http.open("POST", self._path, params=params, headers=self._headers) as response:
            return self._http.decoded(await response.read(), Artifact)

    async def _offer(self, changed: Sequence[int]) -> Artifact | PendingUpload:
        """Show the manifest, after these files' contents."""
        manifest: Iterable[bytes] = manifest_of(self._selection.entries)
        kind = TREE_TYPE
        if changed:
            manifest, kind = chain([await self._threads.run(self._lead, changed)], manifest), LED_TREE_TYPE
        try:
            headers = {**self._headers, "Content-Type": kind}
            answer = await self._asked("POST", self._path, self._offered(manifest), headers, Artifact, self._params)
        except Refused:
            if not changed:
                raise
            return await self._offer([])  # what was written to without a trace is found when it is asked for
        self._led += sum(self._selection.entries[n].size for n in changed)
        return answer

    def _lead(self, changed: Sequence[int]) -> bytes:
        contents = dict(self._chunks.read(n << 32) for n in changed if self._selection.entries[n].size <= CHUNK)
        return b"".join(part for digest, data in contents.items() if data for part in (digest, len(data).to_bytes(4, "big"), data)) + END_FRAME

    async def _asked(
        self,
        method: str,
        path: str,
        body: AsyncIterator[bytes | Stretch],
        headers: dict[str, str],
        stored: type[T],
        params: Mapping[str, str] | None = None,
        at: Direct | None = None,
    ) -> T | PendingUpload:
        """One request with a body that may take any time, while it moves. Raises Unavailable when it does not."""
        if self._packed:
            headers["Content-Encoding"] = "zstd"
        fault: list[PenstockError] = []
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=DIRECT_CONNECT_SECONDS if at else CONNECT_SECONDS)
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            async with asyncio.timeout(self._stalled) as limit:

                def moved() -> None:
                    nonlocal began
                    limit.reschedule(loop.time() + self._stalled)
                    self._waiting.excuse(loop.time() - began)
                    began = loop.time()

                data = Body(body, moved, fault)
                async with self._http.open(method, path, params=params, at=at, data=data, headers=headers, timeout=timeout) as response:
                    answer = await response.read()
                    return self._http.decoded(answer, stored) if response.status == 201 else self._http.decoded(answer, PendingUpload)
        except TimeoutError:
            if at:
                raise self._http.broken_off(at, f"nothing has moved for {self._stalled:g} s") from None
            raise Unavailable(f"nothing has moved to {self._http.url} for {self._stalled:g} s") from None
        except PenstockError as error:
            raise fault[0] if fault else error from None

    async def _offered(self, pieces: Iterable[bytes]) -> AsyncIterator[bytes]:
        compressor = ZstdCompressor(level=3) if self._packed else None
        for piece in pieces:
            yield compressor.compress(piece) if compressor else piece
        if compressor:
            yield compressor.flush(ZstdCompressor.FLUSH_FRAME)

    # --- what is missing

    async def _send(self, pending: PendingUpload) -> Artifact | None:
        """Send all of it, in a few streams; the artifact, if one of them was the last."""
        if self._total is None:
            self._total = self._led + pending.missing_bytes
        self._sent = self._total - pending.missing_bytes
        streams = iter(self._chunks.streams(self._chunks.located(pending.missing), STREAM))
        stored: list[Artifact | Stored] = []

        direct = pending.direct if pending.missing_bytes >= DIRECT else None

        async def sender() -> None:
            nonlocal direct
            for places in streams:
                try:
                    answer = await self._put(pending.id, places, self._http.direct(direct))
                except NotThere:
                    direct = None
                    answer = await self._put(pending.id, places, None)
                if isinstance(answer, PendingUpload):
                    direct = answer.direct or direct
                    self._waiting.moved()
                else:
                    stored.append(answer)

        senders = [asyncio.ensure_future(sender()) for _ in range(AT_ONCE)]
        try:
            await asyncio.gather(*senders)
        finally:
            for task in senders:
                task.cancel()
            await asyncio.wait(senders)
        if not stored:
            return None
        if isinstance(made := stored[0], Artifact):
            return made
        digest = bytes.fromhex(made.digest)
        return await self._http.repeated(lambda: self._name(digest), self._patience)

    async def _put(self, upload: str, places: Sequence[int], at: Direct | None) -> Artifact | PendingUpload | Stored:
        headers = {**self._headers, "Content-Type": BLOBS_TYPE}
        if not self._packed:  # a body without chunks of HTTP's own need not be put together again at each step
            headers["Content-Length"] = str(sum(len(END_FRAME) + self._chunks.size(place) for place in places) + len(END_FRAME))
        try:
            return await self._asked("PUT", f"{self._path}/{upload}/blobs", self._framed(places), headers, Stored if at else Artifact, at=at)
        except NotFound as error:  # it lapsed, or the server has made the artifact of it: to be offered again
            lapsed = Unavailable(str(error))
            raise lapsed from error
        except Refused as error:
            if error.problem and error.problem.status == 422:
                await self._threads.run(self._chunks.verify, places)
            raise

    async def _framed(self, places: Sequence[int]) -> AsyncIterator[bytes | Stretch]:
        drawn = frames(self._chunks, places, self._packed, self._threads.check)
        ahead = self._threads.start(next, drawn, None)
        while (ready := await ahead) is not None:
            ahead = self._threads.start(next, drawn, None)
            pieces, size = ready
            for piece in pieces:
                yield piece
            if self._total is not None:
                self._sent += size
                self._tell("sending", min(self._sent, self._total), self._total, self._selection.size - self._total)
