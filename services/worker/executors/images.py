"""Images on the engine, fetched when they are not there."""

import asyncio
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import msgspec

from proto.image import BadImage, Reference, parse_image, reference_of
from proto.plan import TaskConfig, image_type
from services.worker.durable import write_durably
from services.worker.executors.engine import Engine, EngineGone, Refused
from services.worker.executors.executor import CannotRun

TELL_SECONDS = 5.0
"""Between two lines on how far a pull is."""
CHECK_SECONDS = 5.0
"""For a registry to say what a tag means, while an image is here that will do."""
REMEMBERED = 4096
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
    """`exact` is for people, by the registry's digest where it came from one (`digests`); `reference` is how its task names it; `user` is whom the
    image wants its command run as, `environment` what it gives it."""

    id: str
    exact: str
    reference: str
    digests: tuple[str, ...]
    user: str
    environment: tuple[str, ...]


class Guarded:
    """Repositories that were pulled with a login, and the teams that the registry has let in since: what came for one of them lies there for all.
    Kept in a file, because the images stay, too; and marked on the engine, for other workers that it has."""

    def __init__(self, engine: Engine, file: Path) -> None:
        """Raises OSError."""
        self._engine = engine
        self._file = file
        self._teams: dict[str, list[str]] = msgspec.json.decode(file.read_bytes(), type=dict[str, list[str]]) if file.exists() else {}

    async def admits(self, repository: str, team: str) -> bool:
        """Raises CannotRun."""
        if repository in self._teams:
            return team in self._teams[repository]
        return not await self._engine.is_marked(repository)

    async def guard(self, repository: str) -> None:
        """It is being pulled with a login. Raises CannotRun, OSError."""
        await self._engine.mark(repository)
        if repository not in self._teams:
            self._teams[repository] = []
            self._write()

    async def admit(self, repository: str, team: str, login: bool) -> None:
        """The registry let it in; what it shows to anybody is nobody's secret. Raises CannotRun, OSError."""
        if login:
            teams = self._teams.setdefault(repository, [])
            if team not in teams:
                teams.append(team)
        else:
            await self._engine.unmark(repository)
            self._teams.pop(repository, None)
        self._write()

    def _write(self) -> None:
        write_durably(self._file, msgspec.json.encode(self._teams))


class Images:
    """`seconds` is for everything it takes to have an image here."""

    def __init__(self, engine: Engine, seconds: float, guarded: Guarded) -> None:
        self._engine = engine
        self._seconds = seconds
        self._guarded = guarded
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        """By reference, for as long as anybody has a turn or waits for one."""
        self._chosen: dict[tuple[str, str], str] = {}
        """Image ids, by build and reference: within a build a tag means one image."""

    async def ready(self, config: TaskConfig, team: str, build: str, say: Callable[[str], None]) -> Image:
        """The image that a task names. For a tag the registry is asked once a build whether it still means the one that is here; when that cannot be
        told, the one that is here will do, and the log says so. If it took a login, each team must be let in by the registry once. Raises CannotRun,
        OSError."""
        reference, source = named_by(config)
        key = build, str(reference)
        if key in self._chosen and (found := await self._here(reference, self._chosen[key])):
            return found
        auth, found = _credentials(source), None
        if await self._guarded.admits(reference.name, team) and (found := await self._here(reference)):
            found = await self._if_current(reference, found, auth, say)
        found = found or await self._had(reference, team, auth, say)
        self._chosen[key] = found.id
        if len(self._chosen) > REMEMBERED:
            del self._chosen[next(iter(self._chosen))]
        return found

    async def _here(self, reference: Reference, name: str = "") -> Image | None:
        try:
            with self._engine.translated():
                seen: dict[str, Any] = await self._engine.docker.images.inspect(name or str(reference))
        except Refused as refused:
            if refused.status == 404:
                return None
            raise
        config = seen.get("Config") or {}
        named = [each.partition("@")[::2] for each in seen.get("RepoDigests") or ()]
        digests = tuple(digest for name, digest in named if parse_image(name).name == reference.name)
        digest = reference.digest or next(iter(digests), "")
        exact = f"{reference.name}@{digest}" if digest else seen["Id"]
        return Image(seen["Id"], exact, str(reference), digests, config.get("User") or "", tuple(config.get("Env") or ()))

    async def _if_current(self, reference: Reference, found: Image, auth: Mapping[str, str] | None, say: Callable[[str], None]) -> Image | None:
        """None when its tag means another by now. What came from no registry is what it is."""
        if reference.digest or not found.digests:
            return found
        try:
            async with asyncio.timeout(CHECK_SECONDS):
                digest = await self._engine.ask_registry(str(reference), auth)
        except Refused as refused:
            why = _words(refused)
        except TimeoutError:
            why = f"its registry does not answer within {CHECK_SECONDS:.0f} s"
        else:
            return found if digest in found.digests else None
        say(f"{reference} is used as it is here, {found.exact}: {why}")
        return found

    async def _had(self, reference: Reference, team: str, auth: Mapping[str, str] | None, say: Callable[[str], None]) -> Image:
        """Pulled, and the team let in. One at a time."""
        turn = self._turns.setdefault(str(reference), asyncio.Lock())
        try:
            async with asyncio.timeout(self._seconds):
                async with turn:
                    return await self._fetched(reference, team, auth, say)
        except TimeoutError as error:
            raise CannotRun(f"the image {reference} could not be pulled within {self._seconds:.0f} s") from error

    async def _fetched(self, reference: Reference, team: str, auth: Mapping[str, str] | None, say: Callable[[str], None]) -> Image:
        pause, began = FIRST_PAUSE, time.monotonic()
        while True:
            try:
                current = ""
                if (found := await self._here(reference)) and not reference.digest:
                    # By then somebody else may have pulled it.
                    current = await self._engine.ask_registry(str(reference), auth) if found.digests else ""
                if found is None or (current and current not in found.digests):
                    say(f"pulling {reference}")
                    if auth is not None:
                        await self._guarded.guard(reference.name)
                    await self._pull(reference, auth, say)
                    if found := await self._here(reference):
                        say(f"pulled {found.exact} in {time.monotonic() - began:.1f} s")
                if found and not await self._guarded.admits(reference.name, team):
                    # That it was pulled does not tell: what the engine has by its digest it asks nobody for.
                    await self._engine.ask_registry(str(reference), auth)
                    await self._guarded.admit(reference.name, team, auth is not None)
                if found:
                    return found
                why = "the engine broke off"
            except EngineGone:
                raise
            except Refused as refused:
                why = _words(refused)
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


def named_by(config: TaskConfig) -> tuple[Reference, Mapping[str, Any]]:
    """The image that a task names, and the source that says so. Raises CannotRun."""
    resource = config.image_resource
    kind, source = (resource.type, resource.source) if resource else (image_type(config) or "", {"repository": config.image})
    try:
        return reference_of(kind, source, resource.version if resource else None), source
    except BadImage as bad:
        raise CannotRun(str(bad)) from bad


def _words(refused: Refused) -> str:
    return str(refused).removeprefix("the container engine refused: ")


def _credentials(source: Mapping[str, Any]) -> dict[str, str] | None:
    username, password = source.get("username"), source.get("password")
    return {"username": str(username), "password": str(password)} if username or password else None
