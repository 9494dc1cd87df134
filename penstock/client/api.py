"""The client: every thing a user does, as a method."""

import os
import secrets
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote

import aiohttp

from penstock.client.errors import Damaged, Unavailable
from penstock.client.events import build_events
from penstock.client.http import Http
from penstock.client.model import Artifact, ArtifactPage, Build, BuildEnded, BuildEvent, BuildPage, Info, LogPage
from penstock.client.packing import Progress, pack
from penstock.client.selection import Selection, select
from penstock.client.targets import find_target
from penstock.client.unpacking import unpack

CHUNK = 256 * 1024


class Client:
    """Talks to one Penstock for one team.

    `async with Client(url, token, team) as client:` or, with the command line's targets, `Client.from_target()`. Methods raise PenstockError and
    its kin. Calls that may be repeated are, for `patience` seconds, when the server goes away; making a build is one of them.
    """

    def __init__(self, url: str, token: str, team: str = "main", *, patience: float = 10.0) -> None:
        self.team = team
        self.patience = patience
        self._http = Http(url, token, patience)
        self._base = f"/api/v1/teams/{quote(team, safe='')}"

    @classmethod
    def from_target(cls, name: str | None = None, *, team: str | None = None, environ: Mapping[str, str] = os.environ) -> "Client":
        """The target of that name, or the current one; see penstock.client.targets. Raises NoTarget."""
        target = find_target(name, environ)
        return cls(target.url, target.token, team or target.team)

    @property
    def url(self) -> str:
        return self._http.url

    async def __aenter__(self) -> "Client":
        await self._http.__aenter__()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._http.__aexit__(kind, error, trace)

    async def info(self) -> Info:
        """The server's version, and whose token this is."""
        return await self._http.get("/api/v1/info", Info)

    # --- artifacts

    async def upload(self, source: Path | Selection | bytes | AsyncIterable[bytes], name: str = "", progress: Progress | None = None) -> Artifact:
        """Store a folder (what git shows of it, see `select`), or a tar, tgz or tzst as bytes or as a stream. `progress` is told the bytes read.
        A folder or bytes are sent again when the connection breaks; a stream can be read only once. Raises Unreadable for a folder's faults."""
        selection = select(source) if isinstance(source, Path) else source
        if isinstance(selection, AsyncIterable):
            return await self._upload(_told(selection, progress), name, "application/octet-stream")
        if isinstance(selection, bytes):
            data = selection
            return await self._http.repeated(lambda: self._upload(BytesIO(data), name, "application/octet-stream"))
        return await self._http.repeated(lambda: self._upload_folder(selection, name, progress))

    async def _upload_folder(self, selection: Selection, name: str, progress: Progress | None) -> Artifact:
        async with aclosing(pack(selection, progress)) as stream:
            return await self._upload(stream, name, "application/zstd")

    async def _upload(self, data: BytesIO | AsyncIterable[bytes], name: str, kind: str) -> Artifact:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=600)  # the answer comes when all is stored
        request: dict[str, Any] = {"data": data, "headers": {"Content-Type": kind}, "timeout": timeout, "params": {"name": name} if name else None}
        async with self._http.open("POST", f"{self._base}/user-artifacts", **request) as response:
            return self._http.decoded(await response.read(), Artifact)

    async def artifacts(self) -> AsyncIterator[Artifact]:
        """The team's artifacts, newest first."""
        cursor: str | None = ""
        while cursor is not None:
            page = await self._http.get(f"{self._base}/user-artifacts", ArtifactPage, {"cursor": cursor} if cursor else None)
            for artifact in page.items:
                yield artifact
            cursor = page.next

    async def download(self, artifact: Artifact | str, into: Path | Callable[[bytes], Awaitable[None]], progress: Progress | None = None) -> int:
        """Bring an artifact back: into a folder (made when absent, files replaced one by one, each whole), or as a tar, given piece by piece to a
        function. The number of files, or of bytes of the tar. Raises Damaged for what is cut short or must not be written, OSError for what the
        disk refuses."""
        path = f"{self._base}/user-artifacts/{quote(artifact if isinstance(artifact, str) else artifact.id, safe='')}"
        async with self._http.open("GET", path, params={"format": "tzst" if isinstance(into, Path) else "tar"}) as response:
            try:
                if isinstance(into, Path):
                    return await unpack(response.content.read, into, progress)
                done = 0
                async for piece in response.content.iter_chunked(CHUNK):
                    await into(piece)
                    done += len(piece)
                    if progress:
                        progress(done)
                return done
            except aiohttp.ClientPayloadError as error:
                raise Damaged("the download was cut short: try again") from error

    # --- builds

    async def create_build(
        self, plan: Mapping[str, Any], inputs: Mapping[str, Artifact | str] | None = None, key: str | None = None, *, name: str = "", wait: float = 0
    ) -> Build:
        """Start a build of the plan; `inputs` are artifacts by the name that the plan uses. The same `key` gives the same build, however often it
        is sent (a fresh one by default). With `wait`, the answer is kept back until the build has ended, for so many seconds at most."""
        ids = {input_name: artifact if isinstance(artifact, str) else artifact.id for input_name, artifact in (inputs or {}).items()}
        headers = {"Idempotency-Key": key or secrets.token_hex(16)}
        if wait:
            headers["Prefer"] = f"wait={wait:g}"
        return await self._http.send("POST", f"{self._base}/builds", Build, {"plan": plan, "inputs": ids, "name": name}, headers, wait)

    async def build(self, build: str | int) -> Build:
        """A build by number or id."""
        return await self._http.get(self._of(build), Build)

    async def builds(self, status: str = "", limit: int | None = None) -> AsyncIterator[Build]:
        """The team's builds, newest first, `limit` of them at most."""
        cursor: str | None = ""
        left = limit
        while cursor is not None and (left is None or left > 0):
            params: dict[str, str | int] = {"limit": min(left or 100, 100)}
            params |= {"cursor": cursor} if cursor else {}
            params |= {"status": status} if status else {}
            page = await self._http.get(f"{self._base}/builds", BuildPage, params)
            for build in page.items if left is None else page.items[:left]:
                yield build
            left = None if left is None else left - len(page.items)
            cursor = page.next

    async def abort(self, build: str | int) -> Build:
        """Ask for the build to end; watch it for when it has. Raises Conflict when it already did."""
        return await self._http.send("PUT", f"{self._of(build)}/abort", Build)

    def events(self, build: str | int, last_event_id: str = "") -> AsyncGenerator[BuildEvent, None]:
        """What happens to the build, from its start (or after `last_event_id`) to its end, the log included. A broken connection is taken up where
        it broke. Raises StreamBroken when that does not succeed for `patience` seconds; each event comes once."""
        return build_events(self._http, f"{self._of(build)}/events", last_event_id, max(self.patience, 30.0))

    async def wait(self, build: str | int) -> Build:
        """The build, when it has ended."""
        async with aclosing(self.events(build)) as events:
            async for event in events:
                if isinstance(event, BuildEnded):
                    return event.build
        raise Unavailable("the event stream ended early")  # build_events never ends otherwise; said for the type checker

    async def log(self, build: str | int, stage: str = "", attempt: int | None = None, start: int = 0, limit: int | None = None) -> LogPage:
        """Lines of an attempt of a stage, from line `start` (from 0); by default the last attempt of the first stage."""
        params: dict[str, str | int] = {"from": start}
        params |= {"stage": stage} if stage else {}
        params |= {"attempt": attempt} if attempt else {}
        params |= {"limit": limit} if limit else {}
        return await self._http.repeated(lambda: self._log(build, params))

    async def _log(self, build: str | int, params: Mapping[str, str | int]) -> LogPage:
        async with self._http.open("GET", f"{self._of(build)}/log", params=params, headers={"Accept": "application/json"}) as response:
            return self._http.decoded(await response.read(), LogPage)

    async def log_text(self, build: str | int, stage: str = "", attempt: int | None = None) -> AsyncIterator[bytes]:
        """The log as it was written, bytes unchanged, stdout and stderr as they came."""
        params: dict[str, str | int] = {"stage": stage} if stage else {}
        params |= {"attempt": attempt} if attempt else {}
        async with self._http.open("GET", f"{self._of(build)}/log", params=params, headers={"Accept": "text/plain"}) as response:
            async for piece in response.content.iter_chunked(CHUNK):
                yield piece

    def _of(self, build: str | int) -> str:
        return f"{self._base}/builds/{quote(str(build), safe='')}"


async def _told(stream: AsyncIterable[bytes], progress: Progress | None) -> AsyncIterator[bytes]:
    done = 0
    async for piece in stream:
        yield piece
        done += len(piece)
        if progress:
            progress(done)
