"""The board at the head of the log: every instance keeps one, from a snapshot and by reading on."""

from collections.abc import Callable
from typing import Protocol

import msgspec
import structlog

from libs.eventlog.log import EventLog, is_full
from libs.eventlog.projections import Unprojectable
from proto.catalogue import UnknownEvent, decode
from proto.envelope import Recorded, fact
from proto.events.build import BuildCreated
from proto.messages import Attempt
from proto.plan import Stage
from services.scheduler.board import CATEGORIES, CODE_VERSION, Board

logger = structlog.get_logger()

SNAPSHOT_EVERY = 20_000
"""Facts between two snapshots."""
BATCH = 5_000
MEMBERS = frozenset({"fleet"})
"""The categories that tell who may work here."""
_NAME = "scheduler-board"


class NoStage(Exception):
    """What an attempt runs cannot be read."""


class Snapshots(Protocol):
    async def save(self, name: str, position: int, code_version: str, data: bytes) -> None: ...

    async def load(self, name: str, code_version: str) -> tuple[int, bytes] | None: ...


class Reader:
    """Set `unread` when there may be something to read. `stuck`: the event that `board` stands before and cannot take; its roster goes on. `read_at`:
    as of when it was last known who may work here, which was never if it is not `whole`."""

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
        self.stuck: Unprojectable | None = None
        self._members_at = 0

    async def read(self) -> None:
        """Fold everything up to the head of the log, or to an event that cannot be folded. It is unread again when this fails, when somebody appends,
        and when we do. Raises LogUnavailable."""
        self.unread = False
        began = self._clock()
        try:
            await self._fold_or_stand_still()
            if self.stuck is None or await self._fold_members(self.stuck.position):
                self.whole, self.read_at = True, began
        except BaseException:
            self.unread = True
            raise

    async def _fold_or_stand_still(self) -> None:
        try:
            await self._fold()
            self.stuck, self._members_at = None, 0
        except Unprojectable as error:  # tried again when something is appended, or the next time that the log is looked at anyway
            if str(error) != str(self.stuck):
                logger.error("the board stands still: what is leased goes on, and nothing else is", why=str(error), exc_info=error.__cause__)
            if self.stuck is None or error.position != self.stuck.position:
                self._members_at = 0  # the board has folded some of them once more: those behind this event come after them
            self.stuck = error

    async def _fold_members(self, stuck: int) -> bool:
        """Who may work here, past an event that is about something else: what is leased goes on, and so do logins. What is folded twice, once the
        board gets on, comes to the same. Whether it is known."""
        while True:
            head, after = await self._log.head(), max(self._members_at, stuck - 1)
            rows = await self._log.read(after, BATCH, MEMBERS)
            for row in rows:
                try:
                    one = fact(row)
                    self.board.roster.apply(one.subject_id, one.event)
                except Exception:
                    return False
                self._members_at = row.position
            if not is_full(rows, BATCH):
                self._members_at = max(self._members_at, head)
                return True

    async def _fold(self) -> None:
        if not self._version:
            version = f"{CODE_VERSION}.{await self._log.epoch()}"
            if stored := await self._snapshots.load(_NAME, version):
                try:
                    self.board = Board.restore(*stored)
                except Exception as error:  # losing it costs time, never truth
                    logger.warning("a snapshot cannot be read, and the whole log is", exc_info=error)
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
        """What the attempt runs: remembered, or from the build's stream. Raises LogUnavailable, and NoStage."""
        plan, stream = self.board.plans.get(attempt.build), f"build-{attempt.build}"
        try:
            if plan is None:
                created = (await self._log.read_streams([stream]))[stream][0]
                event = decode(created.type, created.data)
                plan = {stage.name: stage for stage in event.plan.stages} if isinstance(event, BuildCreated) else {}
            return plan[attempt.stage]
        except (UnknownEvent, msgspec.MsgspecError, LookupError) as error:
            raise NoStage(f"{stream}: {type(error).__name__}: {error}") from error
