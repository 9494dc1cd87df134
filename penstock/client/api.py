"""The client: every thing a user does, as a method."""

import os
import secrets
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from urllib.parse import quote, urlencode

import msgspec

from penstock.client.errors import Damaged, NotThere, Unavailable
from penstock.client.events import build_events
from penstock.client.fleet import BuildPreparation, Registration, Worker, WorkerPage
from penstock.client.http import DIRECT_CONNECT_SECONDS, Http, limits
from penstock.client.model import (
    Artifact,
    ArtifactKind,
    ArtifactPage,
    Build,
    BuildEnded,
    BuildEvent,
    BuildPage,
    Info,
    LogPage,
    PendingUpload,
    Policy,
    Progress,
    Secret,
    SecretKeys,
    SecretPage,
    Transfer,
    TreeEntry,
    TreePage,
    Usage,
)
from penstock.client.selection import Selection
from penstock.client.targets import find_target

if TYPE_CHECKING:
    from penstock.client.tree import Entry

CHUNK = 256 * 1024
P = TypeVar("P", ArtifactPage, SecretPage, TreePage, WorkerPage)


class Client:
    """Talks to one Penstock for one team.

    `async with Client(url, token, team) as client:` or, with the command line's targets, `Client.from_target()`. Methods raise PenstockError and
    its kin. Calls that may be repeated are, for `patience` seconds, when the server goes away; making a build is one of them. Uploads and downloads
    of folders go on for as long as something moves within `patience_upload` seconds.
    """

    def __init__(self, url: str, token: str, team: str = "main", *, patience: float = 10.0, patience_upload: float = 120.0) -> None:
        self.team = team
        self.patience = patience
        self.patience_upload = patience_upload
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

    async def upload(
        self,
        source: Path | Selection | bytes | AsyncIterable[bytes],
        name: str = "",
        progress: Progress | None = None,
        keep: int | Literal["forever"] | None = None,
    ) -> Artifact:
        """Store a folder (what git shows of it, see `select`), or a tar, tgz or tzst as bytes or as a stream. `keep`: for so many seconds, else as
        long as the team's policy says.

        Of a folder only what the server lacks is sent, and the sending goes on after a broken connection or a restart of the server, until nothing
        has moved for `patience_upload` seconds. A stream can be read only once. Raises Unreadable for a folder's faults, Changed when it does not
        hold still."""
        params = {**({"name": name} if name else {}), **({"keep": str(keep)} if keep is not None else {})}
        if isinstance(source, AsyncIterable):
            return await self._upload_stream(source, params)
        if isinstance(source, bytes):
            data = source
            key = secrets.token_hex(16)
            return await self._http.repeated(lambda: self._upload_tar(BytesIO(data), params, key), self.patience_upload)
        from penstock.client.upload import upload_folder

        return await upload_folder(self._http, self._base, source, params, progress, self.patience_upload)

    async def _upload_tar(self, data: BytesIO | AsyncIterable[bytes], params: Mapping[str, str], key: str = "") -> Artifact:
        timeout = limits(600)  # the answer comes when all is stored
        headers = {"Content-Type": "application/octet-stream", **({"Idempotency-Key": key} if key else {})}
        async with self._http.open("POST", f"{self._base}/user-artifacts", data=data, headers=headers, timeout=timeout, params=params) as response:
            return self._http.decoded(await response.read(), Artifact)

    async def _upload_stream(self, data: AsyncIterable[bytes], params: Mapping[str, str]) -> Artifact:
        """A tar past the gateway, if that can be: the stream is not touched before it is asked for there."""
        from penstock.client.upload import Stored

        path, headers = f"{self._base}/user-artifacts", {"Idempotency-Key": secrets.token_hex(16)}
        offered = await self._http.send("POST", f"{path}/direct?{urlencode(params)}", PendingUpload, headers=headers)
        if (at := self._http.direct(offered.direct)) is not None:
            timeout = limits(600, DIRECT_CONNECT_SECONDS)
            sent = {"Content-Type": "application/octet-stream"}
            begun = False

            async def noticed() -> AsyncIterator[bytes]:
                nonlocal begun
                begun = True
                async for piece in data:
                    yield piece

            try:
                async with self._http.open("POST", path, at=at, data=noticed(), headers=sent, timeout=timeout, expect100=True) as response:
                    digest = self._http.decoded(await response.read(), Stored).digest
            except NotThere:
                if begun:  # the rest of it would be taken for all
                    raise
            else:
                return await self._http.send("POST", f"{path}?{urlencode({**params, 'tree': digest})}", Artifact, headers=headers)
        return await self._upload_tar(data, params, headers["Idempotency-Key"])

    async def artifacts(self, kind: ArtifactKind | Literal[""] = "", build: int | str | None = None, name: str = "") -> AsyncIterator[Artifact]:
        """The team's artifacts, newest first: all but parts, or those of a kind, of a build (its number or id), of a name."""
        params: dict[str, str | int] = {"kind": kind, "build": "" if build is None else build, "name": name}
        params = {key: value for key, value in params.items() if value != ""}
        async for page in self._pages(f"{self._base}/user-artifacts", ArtifactPage, params):
            for artifact in page.items:
                yield artifact

    async def artifact(self, artifact: Artifact | str) -> Artifact:
        """What is known of an artifact now. Raises NotFound, or Expired when it is gone."""
        return await self._http.get(self._at(artifact), Artifact, headers={"Accept": "application/json"})

    async def tree(self, artifact: Artifact | str, path: str | bytes = "", recursive: bool = False) -> AsyncIterator[TreeEntry]:
        """The names in an artifact, or in a folder of it; with `recursive`, those below them, too, each folder before what lies in it."""
        params: dict[str, str | int] = {"recursive": "true"} if recursive else {}
        async for page in self._pages(f"{self._at(artifact)}/tree", TreePage, params, path):
            for entry in page.items:
                yield entry

    async def manifest(self, artifact: Artifact | str) -> "list[Entry]":
        """All that an artifact holds, in order. Raises Damaged when it is no tree that may be written to a disk."""
        from penstock.client.download import fetch_manifest

        return await self._http.repeated(lambda: fetch_manifest(self._http, self._at(artifact)))

    async def read_file(self, artifact: Artifact | str, path: str | bytes, start: int = 0, length: int | None = None) -> AsyncGenerator[bytes, None]:
        """The bytes of one file, or `length` of them from `start`, as they come. Taken up where it broke, while something comes within `patience`."""
        from penstock.client.download import read_file

        async with aclosing(read_file(self._http, self._at(artifact), path, start, length)) as pieces:
            async for piece in pieces:
                yield piece

    async def download(
        self,
        artifact: Artifact | str,
        into: Path | Callable[[bytes], Awaitable[None]],
        progress: Progress | None = None,
        path: str | bytes = "",
    ) -> int:
        """Bring an artifact back, or the folder or file `path` of it: into a folder (made when absent), or as a tar, given piece by piece to a
        function. The number of files, or of bytes of the tar.

        What the folder has already is not fetched. Each file is replaced in one step, others are left alone, no link that is there is followed. A
        broken connection is taken up until nothing has come for `patience_upload` seconds; called again, it goes on where it was. Raises Damaged
        for what must not be written, Unwritable for what the disk refuses."""
        if isinstance(into, Path):
            from penstock.client.download import download_folder

            return await download_folder(self._http, self._at(artifact), into, os.fsencode(path), progress, self.patience_upload)
        done = 0
        size = artifact.size if isinstance(artifact, Artifact) else 0
        params = {"format": "tar", **({"path": path} if path else {})}
        import aiohttp

        async with self._http.open("GET", self._at(artifact), params=params) as response:
            try:
                async for piece in response.content.iter_chunked(CHUNK):
                    await into(piece)
                    done += len(piece)
                    if progress:
                        progress(Transfer("receiving", done, max(size, done), 0))
            except aiohttp.ClientPayloadError as error:
                raise Damaged("the download was cut short: try again") from error
        return done

    async def pin(self, artifact: Artifact | str) -> Artifact:
        """Keep it until it is unpinned, whatever its expiry."""
        return await self._http.send("PATCH", self._at(artifact), Artifact, {"pinned": True})

    async def unpin(self, artifact: Artifact | str) -> Artifact:
        """Let its expiry count again."""
        return await self._http.send("PATCH", self._at(artifact), Artifact, {"pinned": False})

    async def touch(self, artifact: Artifact | str, seconds: int, shorten: bool = False) -> Artifact:
        """Let it expire so many seconds from now, unless it stays longer already; with `shorten` also then."""
        return await self._http.send("PATCH", self._at(artifact), Artifact, {"keep": seconds, **({"shorten": True} if shorten else {})})

    async def delete(self, artifact: Artifact | str) -> None:
        """Let it go now; a build that uses it can still read it until it ends. Raises NotFound, Expired when it is gone already."""
        await self._http.delete(self._at(artifact))

    async def usage(self) -> Usage:
        """What the team stores."""
        return await self._http.get(f"{self._base}/usage", Usage)

    async def policy(self) -> Policy:
        """How long the team's artifacts are kept, and how much it may store."""
        return await self._http.get(f"{self._base}/policy", Policy)

    async def set_policy(
        self,
        *,
        input_seconds: int | None = None,
        output_seconds: int | None = None,
        quota_bytes: int | None = None,
        privileged: bool | None = None,
    ) -> Policy:
        """Change what is given of the policy; an owner may (`privileged`: an owner of the first team). The policy as it is then."""
        changes = {"input_seconds": input_seconds, "output_seconds": output_seconds, "quota_bytes": quota_bytes, "privileged": privileged}
        policy = msgspec.structs.replace(await self.policy(), **{key: value for key, value in changes.items() if value is not None})
        return await self._http.send("PUT", f"{self._base}/policy", Policy, policy)

    async def _pages(self, path: str, answer: type[P], params: Mapping[str, str | int], inside: str | bytes = "") -> AsyncIterator[P]:
        cursor: str | None = ""
        while cursor is not None:
            page = await self._http.get(path, answer, {**params, **({"path": inside} if inside else {}), **({"cursor": cursor} if cursor else {})})
            yield page
            cursor = page.next

    def _at(self, artifact: Artifact | str) -> str:
        return f"{self._base}/user-artifacts/{quote(artifact if isinstance(artifact, str) else artifact.id, safe='')}"

    # --- secrets

    async def set_secret(self, name: str, value: str) -> Secret:
        """Set a secret of the team, or replace it; an owner may. `((name))` in plans stands for it. Nothing gives the value back."""
        return await self._http.send("PUT", self._secret(name), Secret, {"value": value})

    async def secrets(self) -> AsyncIterator[Secret]:
        """The team's secrets, by name, without their values."""
        async for page in self._pages(f"{self._base}/secrets", SecretPage, {}):
            for secret in page.items:
                yield secret

    async def remove_secret(self, name: str) -> None:
        """Remove it, and every value that it had. Raises NotFound."""
        await self._http.delete(self._secret(name))

    async def rotate_secret_keys(self) -> SecretKeys:
        """Have what secrets are sealed to made anew, and the master keys looked at; an owner of the first team may."""
        return await self._http.send("POST", "/api/v1/secret-keys", SecretKeys)

    def _secret(self, name: str) -> str:
        return f"{self._base}/secrets/{quote(name, safe='')}"

    # --- builds

    async def create_build(
        self,
        plan: Mapping[str, Any],
        inputs: Mapping[str, Artifact | str] | None = None,
        key: str | None = None,
        *,
        name: str = "",
        wait: float = 0,
        keep: int | Literal["forever"] = 0,
    ) -> Build:
        """Start a build of the plan; `inputs` are artifacts by the name that the plan uses: as they are, by id, or as `artifact:ID[/path]` or
        `build:N/output[/path]`. The same `key` gives the same build, however often it is sent (a fresh one by default). With `wait`, the answer is
        kept back until the build has ended, for so many seconds at most. `keep`: its outputs, for so many seconds (0: as the policy says)."""
        ids = {input_name: artifact if isinstance(artifact, str) else artifact.id for input_name, artifact in (inputs or {}).items()}
        headers = {"Idempotency-Key": key or secrets.token_hex(16)}
        if wait:
            headers["Prefer"] = f"wait={wait:g}"
        body = {"plan": plan, "inputs": ids, "name": name, **({"keep": keep} if keep else {})}
        return await self._http.send("POST", f"{self._base}/builds", Build, body, headers, wait)

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

    async def preparation(self, build: str | int) -> BuildPreparation:
        """Why the build waits and what is ahead of it, or why it is where it is."""
        return await self._http.get(f"{self._of(build)}/preparation", BuildPreparation)

    # --- workers

    async def workers(self) -> AsyncIterator[Worker]:
        """All workers, by name."""
        async for page in self._pages("/api/v1/workers", WorkerPage, {}):
            for worker in page.items:
                yield worker

    async def worker(self, name: str) -> Worker:
        """One worker. Raises NotFound."""
        return await self._http.get(f"/api/v1/workers/{quote(name, safe='')}", Worker)

    async def registration(self, *, minutes: int = 10, tags: Sequence[str] = (), description: str = "") -> Registration:
        """A new token that registers one worker, which then has these tags; owners of the first team may."""
        body = {"minutes": minutes, "tags": list(tags), "description": description}
        return await self._http.send("POST", "/api/v1/workers/tokens", Registration, body)

    async def change_worker(self, name: str, verb: Literal["drain", "resume", "revoke"], reason: str = "") -> None:
        """drain: it gets nothing new; resume: it does again; revoke: nothing of it counts any more. Raises NotFound, Conflict."""
        await self._http.tell("PUT", f"/api/v1/workers/{quote(name, safe='')}/{verb}", {"reason": reason})

    async def remove_worker(self, name: str) -> None:
        """Forget one that is revoked or lost. Raises NotFound, Conflict."""
        await self._http.delete(f"/api/v1/workers/{quote(name, safe='')}")

    def _of(self, build: str | int) -> str:
        return f"{self._base}/builds/{quote(str(build), safe='')}"
