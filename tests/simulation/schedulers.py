"""A scheduler as it is, between a log and a bus that are not: nothing is signed or sealed, and nothing waits."""

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from libs.eventlog.memory import MemoryLog
from proto.messages import Control, Credit, Package
from proto.plan import Stage
from services.scheduler.leader import Scheduler
from services.scheduler.queue import Queued
from tests.simulation.desk import Desk

LEASE_SECONDS = 15.0


class Instance:
    """One scheduler process. `term`: its leadership, while it has it."""

    def __init__(
        self,
        name: str,
        log: MemoryLog,
        desk: Desk[Any, Any],
        snapshots: dict[str, tuple[int, str, bytes]],
        clock: Callable[[], float],
        now: Callable[[], float],
        send: Callable[[str, Any], Awaitable[None]],
    ) -> None:
        self.name = name
        self.term: int | None = None
        self.scheduler = Scheduler(
            log=log,
            bus=_Bus(send),  # type: ignore[arg-type]
            commands=desk,  # type: ignore[arg-type]
            leadership=self,
            snapshots=_Snapshots(snapshots),
            packer=_Packer(),  # type: ignore[arg-type]
            vault=_Vault(),  # type: ignore[arg-type]
            door=_Door(),
            lease_seconds=LEASE_SECONDS,
            clock=clock,
            now=now,
        )


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
    def cut(self, worker: str, key: str) -> None: ...

    def sweep(self) -> None: ...
