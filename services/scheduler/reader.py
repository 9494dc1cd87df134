"""The board at the head of the log: every instance keeps one, from a snapshot and by reading on."""

from collections.abc import Callable
from typing import Protocol

from libs.eventlog.log import EventLog, is_full
from libs.eventlog.projections import Unprojectable
from proto.catalogue import decode
from proto.envelope import Recorded, fact
from proto.events.build import BuildCreated
from proto.messages import Attempt
from proto.plan import Stage
from services.scheduler.board import CATEGORIES, CODE_VERSION, Board

SNAPSHOT_EVERY = 20_000
"""Facts between two snapshots."""
BATCH = 5_000
_NAME = "scheduler-board"


class Snapshots(Protocol):
    async def save(self, name: str, position: int, code_version: str, data: bytes) -> None: ...

    async def load(self, name: str, code_version: str) -> tuple[int, bytes] | None: ...


class Reader:
    """Set `unread` when there may be something to read; `board` is not `whole` until it is at the head of the log. `read_at`: as of when it was there
    last."""

    def __init__(self, log: EventLog, snapshots: Snapshots, clock: Callable[[], float]) -> None:
        self._log = log
        self._snapshots = snapshots
        self._clock = clock
        self._version = ""
        """Of snapshots: in another epoch of the log they would tell of what is not so any more. "" until it is known."""
        self._saved_at = 0
        self.board = Board()
        self.unread = True
        self.whole = False
        self.read_at = float("-inf")

    async def read(self) -> None:
        """Fold everything up to the head of the log. It is unread again when this fails, when somebody appends, and when we do.
        Raises LogUnavailable, and Unprojectable: the board stays before that event."""
        self.unread = False
        began = self._clock()
        try:
            await self._fold()
        except BaseException:
            self.unread = True
            raise
        self.whole, self.read_at = True, began

    async def _fold(self) -> None:
        if not self._version:
            version = f"{CODE_VERSION}.{await self._log.epoch()}"
            if stored := await self._snapshots.load(_NAME, version):
                self.board = Board.restore(*stored)
            self._saved_at, self._version = self.board.position, version
        while True:
            rows = await self._log.read(self.board.position, BATCH, CATEGORIES)
            for row in rows:
                self._apply(row)
            if not is_full(rows, BATCH):
                return

    def _apply(self, row: Recorded) -> None:
        before = self.board.position
        try:
            self.board.apply(fact(row))
        except Exception as error:
            self.board.position = before
            raise Unprojectable(row.position, row.stream, row.type, error) from error

    async def save(self) -> None:
        """Store a snapshot, if enough has happened since the last."""
        if self.board.position - self._saved_at >= SNAPSHOT_EVERY:
            self._saved_at = self.board.position
            await self._snapshots.save(_NAME, self.board.position, self._version, self.board.snapshot())

    async def stage(self, attempt: Attempt) -> Stage:
        """What the attempt runs: remembered, or from the build's stream."""
        plan = self.board.plans.get(attempt.build)
        if plan is None:
            history = (await self._log.read_streams([f"build-{attempt.build}"]))[f"build-{attempt.build}"]
            created = decode(history[0].type, history[0].data)
            assert isinstance(created, BuildCreated)
            plan = {stage.name: stage for stage in created.plan.stages}
        return plan[attempt.stage]
