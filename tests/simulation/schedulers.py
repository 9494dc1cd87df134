"""A scheduler as it is, between a log and a bus that are not: nothing is signed or sealed; whatever it waits for, it may be stopped there."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from libs.eventlog.leadership import Leadership
from libs.eventlog.memory import MemoryLog
from libs.runtime.decisions import Cause
from proto.envelope import Recorded
from proto.messages import Control, Credit, Package
from proto.plan import Stage
from services.scheduler.queue import Queued
from services.scheduler.scheduler import Scheduler
from tests.simulation.desk import Desk
from tests.simulation.office import Office

LEASE_SECONDS = 15.0
INBOX = 100
"""Messages that wait for a process that stands still."""


class Instance:
    """One scheduler process, which leads as `leadership` says. While it is `frozen` it does nothing, and hears nothing: `inbox` is what it was sent.
    It may be frozen in the middle of a turn, if it `halts`, and another's turn may come in between, while it `races`. `deaf`: it is not told that
    the log grows."""

    def __init__(
        self,
        name: str,
        holder: str,
        log: MemoryLog,
        office: Office,
        desk: Desk[Any, Any],
        snapshots: dict[str, tuple[int, str, bytes]],
        chance: random.Random,
        clock: Callable[[], float],
        now: Callable[[], float],
        send: Callable[[str, Any], Awaitable[None]],
    ) -> None:
        self.name = name
        self.leadership = Leadership(office, "placement", holder, clock=clock)  # type: ignore[arg-type]
        self.frozen = self.halts = self.races = self.deaf = False
        self.inbox: list[tuple[str, bytes]] = []
        self._chance = chance
        self._goes_on = asyncio.Event()
        self._dead = False
        self._turn: asyncio.Future[None] | None = None

        async def send_in_time(subject: str, message: Any) -> None:
            await self._pause()
            await send(subject, message)

        self.scheduler = Scheduler(
            log=_Log(log, self._pause),  # type: ignore[arg-type]
            bus=_Bus(send_in_time),  # type: ignore[arg-type]
            commands=_Commands(desk, self._pause),  # type: ignore[arg-type]
            leadership=self.leadership,
            snapshots=_Snapshots(snapshots),
            packer=_Packer(),  # type: ignore[arg-type]
            vault=_Vault(),  # type: ignore[arg-type]
            door=_Door(),
            lease_seconds=LEASE_SECONDS,
            clock=clock,
            now=now,
        )

    async def turn(self) -> bool:
        """A turn, or what was left of one; whether it is done. Raises LogUnavailable, BusUnavailable."""
        if self._turn is None:
            self._turn = asyncio.ensure_future(self.scheduler.turn())
        while not self._turn.done() and not self.frozen:
            await asyncio.sleep(0)
        if not self._turn.done():
            return False
        done, self._turn = self._turn, None
        done.result()
        return True

    def hear(self, subject: str, data: bytes) -> None:
        if not self.frozen:
            self.scheduler.hear(subject, data)
        elif len(self.inbox) < INBOX:
            self.inbox.append((subject, data))

    def thaw(self) -> None:
        """It goes on where it was."""
        self.frozen = self.halts = False
        self._goes_on.set()
        self._goes_on.clear()

    def kill(self) -> None:
        """It does nothing any more."""
        self._dead = True
        self.thaw()

    async def _pause(self) -> None:
        if self.races and self._chance.random() < 0.5:
            await asyncio.sleep(0)
        if self.halts and self._chance.random() < 0.3:
            self.frozen, self.halts = True, False
        if self.frozen:
            await self._goes_on.wait()
        if self._dead:
            raise asyncio.CancelledError


Pause = Callable[[], Awaitable[None]]


class _Log:
    """What a scheduler reads."""

    def __init__(self, log: MemoryLog, pause: Pause) -> None:
        self._log, self._pause = log, pause

    async def epoch(self) -> int:
        await self._pause()
        return await self._log.epoch()

    async def read(self, *which: Any) -> list[Recorded]:
        await self._pause()
        return await self._log.read(*which)

    async def read_streams(self, streams: list[str]) -> dict[str, list[Recorded]]:
        await self._pause()
        return await self._log.read_streams(streams)


class _Commands:
    def __init__(self, desk: Desk[Any, Any], pause: Pause) -> None:
        self._desk, self._pause = desk, pause

    def submit(self, command: Any, cause: Cause) -> asyncio.Future[Any]:
        return asyncio.ensure_future(self._execute(command, cause))

    async def _execute(self, command: Any, cause: Cause) -> Any:
        await self._pause()
        return self._desk.execute(command, cause)


class _Bus:
    connected, connections = True, 1

    def __init__(self, send: Callable[[str, Any], Awaitable[None]]) -> None:
        self.send = send


class _Snapshots:
    """In a dict that outlives the process."""

    def __init__(self, stored: dict[str, tuple[int, str, bytes]]) -> None:
        self._stored = stored

    async def save(self, name: str, position: int, code_version: str, data: bytes) -> None:
        self._stored[name] = position, code_version, data

    async def load(self, name: str, code_version: str) -> tuple[int, bytes] | None:
        position, version, data = self._stored.get(name, (0, "", b""))
        return (position, data) if version == code_version else None


class _Packer:
    """Messages as they are."""

    def package(self, queued: Queued, stage: Stage, given: object, worker: str, key: str, boot: str, credit: Credit) -> Package:
        return Package(
            attempt=queued.attempt,
            team=queued.team,
            worker=worker,
            boot=boot,
            credit=credit.nonce,
            lease_seconds=LEASE_SECONDS,
            stage=stage,
            inputs=queued.inputs,
            token="",
            artifacts_url="",
        )

    def control(self, worker: str, control: Control) -> Control:
        return control


class _Given(msgspec.Struct, frozen=True):
    values: dict[str, str] = {}


class _Vault:
    async def given(self, wanted: object) -> _Given:
        return _Given()


class _Door:
    def look(self) -> None: ...

    def cut(self, worker: str, key: str) -> None: ...

    def sweep(self) -> None: ...
