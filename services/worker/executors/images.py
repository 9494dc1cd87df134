"""Images on the engine, fetched when they are not there."""

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

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


class Images:
    """`seconds` is for everything it takes to have an image here."""

    def __init__(self, engine: Engine, seconds: float) -> None:
        self._engine = engine
        self._seconds = seconds
        self._turns: dict[str, asyncio.Lock] = {}

    async def ready(self, config: TaskConfig, say: Callable[[str], None]) -> Image:
        """The image that a task names. One that is here is used as it is: who wants no older one names its digest. Raises CannotRun."""
        resource = config.image_resource
        kind, source = (resource.type, resource.source) if resource else (image_type(config) or "", {"repository": config.image})
        try:
            reference = reference_of(kind, source, resource.version if resource else None)
        except BadImage as bad:
            raise CannotRun(str(bad)) from bad
        if found := await self._here(reference):
            return found
        turn = self._turns.setdefault(str(reference), asyncio.Lock())
        try:
            async with asyncio.timeout(self._seconds):
                async with turn:
                    return await self._here(reference) or await self._pulled(reference, _credentials(source), say)
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

    async def _pulled(self, reference: Reference, auth: Mapping[str, str] | None, say: Callable[[str], None]) -> Image:
        pause, began = FIRST_PAUSE, time.monotonic()
        say(f"pulling {reference}")
        while True:
            try:
                await self._pull(reference, auth, say)
                if found := await self._here(reference):
                    say(f"pulled {found.exact} in {time.monotonic() - began:.1f} s")
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
