"""How a relay's checkpoints are saved: beside its work, one at a time, and not for each batch."""

import asyncio
from collections.abc import Callable
from typing import Protocol

from libs.eventlog.checkpoints import RelayCheckpoint

SAVE_EVERY = 0.1


class Checkpoints(Protocol):
    """libs.eventlog.checkpoints.RelayCheckpoints. `save` says False when a later leader has saved."""

    async def load(self) -> RelayCheckpoint | None: ...
    async def save(self, checkpoint: RelayCheckpoint) -> bool: ...


class Deposed(Exception):
    """Another leads."""


class Saving:
    """`saved` is what was loaded or saved last. All of it may raise LogUnavailable, and Deposed."""

    def __init__(self, checkpoints: Checkpoints, clock: Callable[[], float]) -> None:
        self.saved: RelayCheckpoint | None = None
        self._checkpoints = checkpoints
        self._clock = clock
        self._saving: asyncio.Task[bool] | None = None
        self._saved_at = float("-inf")

    async def load(self) -> RelayCheckpoint | None:
        self.saved = await self._checkpoints.load()
        return self.saved

    def lacks(self, checkpoint: RelayCheckpoint) -> bool:
        """Whether it says more than what was saved."""
        return self.saved is None or (self.saved.position, self.saved.left_out) != (checkpoint.position, checkpoint.left_out)

    async def save(self, checkpoint: RelayCheckpoint) -> None:
        """In the background, if it is time to."""
        if self._saving is not None:
            if not self._saving.done():
                return
            await self.finish()
        if self.lacks(checkpoint) and self._clock() >= self._saved_at + SAVE_EVERY:
            self._saved_at = self._clock()
            self._saving = asyncio.create_task(self._store(checkpoint), name="relay checkpoint")

    async def finish(self) -> None:
        """Wait for what is being saved."""
        if self._saving is not None:
            saving, self._saving = self._saving, None
            if not await saving:
                raise Deposed

    async def write(self, checkpoint: RelayCheckpoint) -> None:
        """At once."""
        await self.finish()
        if not await self._store(checkpoint):
            raise Deposed

    async def drop(self) -> None:
        """Give up what is being saved."""
        if self._saving is not None:
            saving, self._saving = self._saving, None
            saving.cancel()
            await asyncio.gather(saving, return_exceptions=True)

    async def _store(self, checkpoint: RelayCheckpoint) -> bool:
        kept = await self._checkpoints.save(checkpoint)
        if kept:
            self.saved = checkpoint
        return kept
