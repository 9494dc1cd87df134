"""Images on the engine, fetched when they are not there."""

import asyncio
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from proto.image import BadImage, Reference, reference_of
from proto.plan import TaskConfig, image_type
from services.worker.executors.engine import Engine, EngineGone, Refused
from services.worker.executors.executor import CannotRun

TELL_SECONDS = 5.0
"""Between two lines on how far a pull is."""
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
_FINAL = (
    "auth credentials",
    "denied",
    "does not match",
    "invalid",
    "manifest unknown",
    "no matching manifest",
    "no such",
    "not found",
    "unauthorized",
    "unsupported",
)
"""Words of a registry that will say the same again."""


class Image(NamedTuple):
    """`exact` is for people, by the registry's digest where it came from one; `user` is whom the image wants its command run as."""

    id: str
    exact: str
    user: str


class Guarded:
    """Repositories that were pulled with a login, and the teams that the registry has let in since: what came for one of them lies there for all.
    Kept in a file, because the images stay, too."""

    def __init__(self, file: Path) -> None:
        """Raises OSError."""
        self._file = file
        self._teams: dict[str, list[str]] = msgspec.json.decode(file.read_bytes(), type=dict[str, list[str]]) if file.exists() else {}

    def admits(self, repository: str, team: str) -> bool:
        return repository not in self._teams or team in self._teams[repository]

    def guard(self, repository: str) -> None:
        """It is being pulled with a login. Raises OSError."""
        if repository not in self._teams:
            self._teams[repository] = []
            self._write()

    def admit(self, repository: str, team: str, login: bool) -> None:
        """The registry let it in; what it shows to anybody is nobody's secret. Raises OSError."""
        if not self.admits(repository, team):
            if login:
                self._teams[repository].append(team)
            else:
                del self._teams[repository]
            self._write()

    def _write(self) -> None:
        new = self._file.with_suffix(".new")
        with new.open("wb") as file:
            file.write(msgspec.json.encode(self._teams))
            file.flush()
            os.fsync(file.fileno())
        new.replace(self._file)


class Images:
    """`seconds` is for everything it takes to have an image here."""

    def __init__(self, engine: Engine, seconds: float, guarded: Guarded) -> None:
        self._engine = engine
        self._seconds = seconds
        self._guarded = guarded
        self._turns: dict[str, asyncio.Lock] = {}

    async def ready(self, config: TaskConfig, team: str, say: Callable[[str], None]) -> Image:
        """The image that a task names. One that is here is used as it is: who wants no older one names its digest. But if it took a login, each team
        must be let in by the registry once. Raises CannotRun, OSError."""
        resource = config.image_resource
        kind, source = (resource.type, resource.source) if resource else (image_type(config) or "", {"repository": config.image})
        try:
            reference = reference_of(kind, source, resource.version if resource else None)
        except BadImage as bad:
            raise CannotRun(str(bad)) from bad
        if self._guarded.admits(reference.name, team) and (found := await self._here(reference)):
            return found
        turn = self._turns.setdefault(str(reference), asyncio.Lock())
        try:
            async with asyncio.timeout(self._seconds):
                async with turn:
                    return await self._fetched(reference, team, _credentials(source), say)
        except TimeoutError as error:
            raise CannotRun(f"the image {reference} could not be pulled within {self._seconds:.0f} s") from error
        finally:
            if not turn.locked():
                self._turns.pop(str(reference), None)

    async def _here(self, reference: Reference) -> Image | None:
        try:
            with self._engine.translated():
                seen: dict[str, Any] = await self._engine.docker.images.inspect(str(reference))
        except Refused as refused:
            if refused.status == 404:
                return None
            raise
        digests = [each.partition("@")[2] for each in seen.get("RepoDigests") or ()]
        digest = reference.digest or next(iter(digests), "")
        return Image(seen["Id"], f"{reference.name}@{digest}" if digest else seen["Id"], (seen.get("Config") or {}).get("User") or "")

    async def _fetched(self, reference: Reference, team: str, auth: Mapping[str, str] | None, say: Callable[[str], None]) -> Image:
        pause, began = FIRST_PAUSE, time.monotonic()
        while True:
            try:
                if (found := await self._here(reference)) is None:
                    say(f"pulling {reference}")
                    if auth is not None:
                        self._guarded.guard(reference.name)
                    await self._pull(reference, auth, say)
                    if found := await self._here(reference):
                        say(f"pulled {found.exact} in {time.monotonic() - began:.1f} s")
                if found and not self._guarded.admits(reference.name, team):
                    # That it was pulled does not tell: what the engine has by its digest it asks nobody for.
                    await self._engine.ask_registry(str(reference), auth)
                    self._guarded.admit(reference.name, team, auth is not None)
                if found:
                    return found
                why = "the engine broke off"
            except EngineGone:
                raise
            except Refused as refused:
                why = str(refused).removeprefix("the container engine refused: ")
                if any(word in why.lower() for word in _FINAL):
                    raise CannotRun(f"the image {reference} cannot be pulled: {why}") from refused
            say(f"pulling {reference} failed: {why}; again in {pause:.0f} s")
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _pull(self, reference: Reference, auth: Mapping[str, str] | None, say: Callable[[str], None]) -> None:
        told, layers = time.monotonic(), dict[str, tuple[int, int]]()
        async for said in self._engine.pull(str(reference), auth):
            detail = said.get("progressDetail") or {}
            if said.get("status") == "Downloading" and "current" in detail:
                layers[said.get("id", "")] = int(detail["current"]), int(detail.get("total") or 0)
            if layers and time.monotonic() - told >= TELL_SECONDS:
                told = time.monotonic()
                here, total = (sum(each) for each in zip(*layers.values(), strict=True))
                say(f"pulling {reference}: {here / 1e6:.0f} of {total / 1e6:.0f} MB, {len(layers)} layers")


def _credentials(source: Mapping[str, Any]) -> dict[str, str] | None:
    username, password = source.get("username"), source.get("password")
    return {"username": str(username), "password": str(password)} if username or password else None
