"""Trees of files in and out, by the artifacts service and an attempt's build token.

The service may be restarting: what fails by connection or 5xx is tried again for a minute, always as a whole, so nothing half-done is left.
"""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import aiohttp
import msgspec

from libs.archives.extract import extract
from libs.archives.rules import ArchiveRefused, Limits
from libs.archives.writer import FileChanged, pack
from proto.events.base import ArtifactRef
from proto.messages import Package

T = TypeVar("T")

PATIENCE_SECONDS = 60.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0
_CHUNK = 256 << 10


class Unobtainable(Exception):
    """A tree could not be had or stored; the text says why."""


class _Again(Exception):
    """Worth another try."""


class _Problem(msgspec.Struct):
    title: str = ""
    detail: str = ""


class Artifacts:
    """A client; it connects only when there is something to move."""

    def __init__(self, patience: float = PATIENCE_SECONDS) -> None:
        self._patience = patience
        self._session: aiohttp.ClientSession | None = None

    async def fetch(self, package: Package, name: str, into: Path) -> None:
        """Put the input's tree into folder `into`, which is absent or empty. Raises Unobtainable, OSError (disk)."""

        async def once() -> None:
            async with self._http().get(f"{package.artifacts_url}/inputs/{name}", headers=_bearer(package)) as answer:
                await _check(answer, 200)
                await extract(answer.content.iter_chunked(_CHUNK), into, Limits())

        await self._patiently(once)

    async def store(self, package: Package, step: str, name: str, folder: Path) -> ArtifactRef:
        """Keep a folder as the step's output. Raises Unobtainable, OSError (reading it)."""

        async def once() -> ArtifactRef:
            headers = {**_bearer(package), "Content-Type": "application/x-tar"}
            url = f"{package.artifacts_url}/outputs/{step}/{name}"
            async with self._http().post(url, data=pack(folder), headers=headers) as answer:
                await _check(answer, 201)
                return msgspec.json.decode(await answer.read(), type=ArtifactRef)

        return await self._patiently(once)

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    def _http(self) -> aiohttp.ClientSession:
        if self._session is None:
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=120)
            self._session = aiohttp.ClientSession(timeout=timeout, auto_decompress=False, trust_env=False)
        return self._session

    async def _patiently(self, once: Callable[[], Awaitable[T]]) -> T:
        clock = asyncio.get_running_loop().time
        deadline, pause = clock() + self._patience, _FIRST_PAUSE
        while True:
            try:
                return await once()
            except (ArchiveRefused, FileChanged, msgspec.DecodeError) as error:
                raise Unobtainable(str(error)) from error
            except (_Again, aiohttp.ClientError, TimeoutError) as error:
                if clock() + pause > deadline:
                    raise Unobtainable(
                        f"the artifacts service did not answer for {self._patience:.0f} s ({error or type(error).__name__})"
                    ) from error
            await asyncio.sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE)


def _bearer(package: Package) -> dict[str, str]:
    return {"Authorization": f"Bearer {package.token}"}


async def _check(answer: aiohttp.ClientResponse, expected: int) -> None:
    if answer.status == expected:
        return
    text = await answer.content.read(4096)
    try:
        problem = msgspec.json.decode(text, type=_Problem)
    except msgspec.DecodeError:
        problem = _Problem()
    words = f"{answer.status} {': '.join(part for part in (problem.title, problem.detail) if part) or answer.reason or ''}".strip()
    if answer.status >= 500 and answer.status != 507:
        raise _Again(words)
    raise Unobtainable(words)
