"""The board at the head of the log: every instance keeps one, from a snapshot and by reading on."""

from collections.abc import Callable
from typing import Protocol

from libs.eventlog.log import EventLog, is_full
from proto.catalogue import decode
from proto.envelope import fact
from proto.events.build import BuildCreated
from proto.messages import Attempt
from proto.plan import Stage
from services.scheduler.board import CATEGORIES, CODE_VERSION, Board

SNAPSHOT_EVERY = 20_000
"""Facts between two snapshots."""
BATCH = 5_000
EPOCH_EVERY = 5.0
"""Seconds between two looks at the log's epoch: in another one, all that was read is read again."""
_NAME = "scheduler-board"


class Snapshots(Protocol):
    async def save(self, name: str, position: int, code_version: str, data: bytes) -> None: ...

    async def load(self, name: str, code_version: str) -> tuple[int, bytes] | None: ...


class Reader:
    """Set `unread` when there may be something to read; `board` is replaced when the log's epoch changes."""

    def __init__(self, log: EventLog, snapshots: Snapshots, clock: Callable[[], float]) -> None:
        self._log = log
        self._snapshots = snapshots
        self._clock = clock
        self._epoch: int | None = None
        self._epoch_checked = float("-inf")
        self._saved_at = 0
        self.board = Board()
        self.unread = True

    async def read(self) -> None:
        """Fold everything up to the head of the log. It is unread again when this fails, when somebody appends, and when we do."""
        self.unread = False
        try:
            await self._fold()
        except BaseException:
            self.unread = True
            raise

    async def _fold(self) -> None:
        if self._clock() - self._epoch_checked > EPOCH_EVERY:
            epoch = await self._log.epoch()
            self._epoch_checked = self._clock()
            if epoch != self._epoch:
                stored = await self._snapshots.load(_NAME, CODE_VERSION) if self._epoch is None else None
                self.board = Board.restore(*stored) if stored else Board()
                self._saved_at = self.board.position
                self._epoch = epoch
        while True:
            rows = await self._log.read(self.board.position, BATCH, CATEGORIES)
            for row in rows:
                self.board.apply(fact(row))
            if not is_full(rows, BATCH):
                return

    async def save(self) -> None:
        """Store a snapshot, if enough has happened since the last."""
        if self.board.position - self._saved_at >= SNAPSHOT_EVERY:
            self._saved_at = self.board.position
            await self._snapshots.save(_NAME, self.board.position, CODE_VERSION, self.board.snapshot())

    async def stage(self, attempt: Attempt) -> Stage:
        """What the attempt runs: remembered, or from the build's stream."""
        plan = self.board.plans.get(attempt.build)
        if plan is None:
            history = (await self._log.read_streams([f"build-{attempt.build}"]))[f"build-{attempt.build}"]
            created = decode(history[0].type, history[0].data)
            assert isinstance(created, BuildCreated)
            plan = {stage.name: stage for stage in created.plan.stages}
        return plan[attempt.stage]
