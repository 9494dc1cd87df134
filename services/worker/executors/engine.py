"""The container engine: one connection to it, and what it says when it refuses or is gone, in our words."""

import asyncio
import base64
import contextlib
import hashlib
import stat
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

import aiohttp
import msgspec
from aiodocker import Docker, DockerError
from aiodocker.containers import DockerContainer
from aiodocker.utils import compose_auth_header

from services.worker.executors.executor import CannotRun

SECONDS = 60.0
"""For a single answer: an engine that starts 40 containers at once on a slow disk needs some."""
_UNREACHABLE = 900
"""aiodocker's status for an engine that does not answer."""
_UNIX = "unix://"
_GO_FOLDER, _GO_LINK = 1 << 31, 1 << 27


class Refused(CannotRun):
    """The engine will not do it; `status` is its HTTP status (0: it said so in a stream)."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class EngineGone(CannotRun):
    """The engine does not answer, or does so no more."""


class Engine:
    """Only from within a running loop; `close` it. `trouble` is why it cannot be used, "" while it can."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.trouble = ""
        # Each running container has two connections for its whole life: there is no number that is enough for all.
        connector = aiohttp.UnixConnector(url.removeprefix(_UNIX), limit=0) if url.startswith(_UNIX) else None
        self._connector = connector
        self.docker = Docker(url="http://engine" if connector else url, connector=connector, timeout=aiohttp.ClientTimeout(total=SECONDS))

    async def close(self) -> None:
        await self.docker.close()
        if self._connector is not None:
            await self._connector.close()

    async def probe(self, seconds: float = 5.0) -> bool:
        """Whether it answers, now."""
        try:
            with self.translated():
                async with asyncio.timeout(seconds):
                    await self.docker.version()
        except CannotRun:
            return False
        return True

    @contextlib.contextmanager
    def translated(self) -> Iterator[None]:
        """Raises Refused or EngineGone for what goes wrong inside, and keeps `trouble`."""
        try:
            yield
        except DockerError as error:
            if error.status != _UNREACHABLE:
                raise Refused(error.status, f"the container engine refused: {error.message}") from error
            raise self._gone() from error
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise self._gone() from error
        else:
            self.trouble = ""

    def _gone(self) -> EngineGone:
        self.trouble = "the container engine does not answer"
        return EngineGone(f"{self.trouble} at {self.url}")

    async def containers(self, labels: Mapping[str, str]) -> list[DockerContainer]:
        """All with these labels, in whatever state. Raises CannotRun."""
        with self.translated():
            wanted = {"label": [f"{key}={value}" for key, value in labels.items()]}
            return await self.docker.containers.list(all=True, filters=wanted)

    async def labels(self, name: str) -> Mapping[str, str]:
        """Those of a container. Raises CannotRun."""
        with self.translated():
            shown: dict[str, Any] = await self.docker.containers.container(name).show()
            return shown["Config"].get("Labels") or {}

    async def mode(self, container: str, path: str) -> int | None:
        """As `lstat` gives it, of what lies there in a container, which need not run; None: nothing. Raises CannotRun."""
        url = self.docker._canonicalize_url(f"containers/{container}/archive", versioned_api=True)
        with self.translated():
            async with self.docker.session.head(url, params={"path": path}, timeout=self.docker._timeout) as answer:
                if answer.status == 404:
                    return None
                if answer.status != 200:
                    raise Refused(answer.status, f"the container engine refused to look for {path}")
                seen: int = msgspec.json.decode(base64.b64decode(answer.headers["X-Docker-Container-Path-Stat"]))["mode"]
        kind = stat.S_IFDIR if seen & _GO_FOLDER else stat.S_IFLNK if seen & _GO_LINK else stat.S_IFREG
        return kind | seen & 0o777

    async def remove(self, name: str) -> None:
        """Whatever state it is in, with what it ran; quietly when there is none. Raises CannotRun."""
        try:
            with self.translated():
                await self.docker.containers.container(name).delete(force=True, v=True)
        except Refused as refused:
            if refused.status not in (404, 409):  # 409: somebody removes it already
                raise

    async def signalled(self, labels: Mapping[str, str]) -> AsyncIterator[str]:
        """Ids of containers with these labels that are sent a signal from now on, until the engine is gone."""
        events: Any = self.docker.events
        heard = events.subscribe(filters={"label": [f"{key}={value}" for key, value in labels.items()], "event": ["kill"]})
        try:
            while (event := await heard.get()) is not None:
                yield event["Actor"]["ID"]
        finally:
            with contextlib.suppress(DockerError, aiohttp.ClientError, OSError):
                await events.stop()

    async def ask_registry(self, image: str, auth: Mapping[str, str] | None) -> str:
        """The digest that its registry knows the image by, if whoever has this login may have it. Raises CannotRun."""
        headers = {"X-Registry-Auth": compose_auth_header(dict(auth), image.partition("/")[0])} if auth is not None else {}
        with self.translated():
            said: dict[str, Any] = await self.docker._query_json(f"distribution/{image}/json", headers=headers)
            return str(said["Descriptor"]["digest"])

    async def mark(self, repository: str) -> None:
        """A note for everybody who uses this engine: an empty volume, as images can be given none. Raises CannotRun."""
        await self._volume("POST", "create", {"Name": _mark(repository), "Labels": {"penstock.guarded": repository}})

    async def is_marked(self, repository: str) -> bool:
        """Raises CannotRun."""
        return await self._volume("GET", _mark(repository))

    async def unmark(self, repository: str) -> None:
        """Raises CannotRun."""
        await self._volume("DELETE", _mark(repository))

    async def _volume(self, method: str, path: str, body: dict[str, Any] | None = None) -> bool:
        """False: there is none. Raises CannotRun."""
        try:
            with self.translated():
                headers = {"Content-Type": "application/json"}
                async with self.docker._query(f"volumes/{path}", method=method, data=msgspec.json.encode(body) if body else None, headers=headers):
                    return True
        except Refused as refused:
            if refused.status != 404:
                raise
            return False

    async def pull(self, image: str, auth: Mapping[str, str] | None) -> AsyncIterator[dict[str, Any]]:
        """The engine's words on how far it is. Raises CannotRun."""
        with self.translated():
            async for said in self.docker.images.pull(image, auth=auth, stream=True):
                yield said


def _mark(repository: str) -> str:
    return f"penstock-guarded-{hashlib.sha256(repository.encode()).hexdigest()[:32]}"
