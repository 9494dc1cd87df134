"""A worker that is registered, and says whatever a test wants: a bare connection with a worker's own rights."""

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from nacl.public import PrivateKey, SealedBox
from nats.aio.client import Client as NatsClient
from nats.aio.msg import Msg
from nats.errors import Error as NatsError

from libs.bus.accounts import inbox_prefix
from libs.tokens import public_key, sign, verify
from penstock.client.joining import Membership
from proto.messages import (
    Attempt,
    Availability,
    Control,
    Credit,
    Heartbeat,
    LogChunk,
    Offers,
    Package,
    ReportBody,
    Reports,
    ReportStageFinished,
    ReportStepFinished,
    ReportStepStarted,
    Running,
    Segment,
    Signed,
)
from tests.controls import eventually
from tests.faults.system import System
from tests.nats_fixture import bare_client

_encode = msgspec.msgpack.Encoder().encode


class Liar:
    """Boots, gives a credit and holds what it is leased, as an honest worker would; `say` is for the rest."""

    def __init__(self, member: Membership, bus: NatsClient, server_key: str, boot: str) -> None:
        self.member = member
        self.name = member.name
        self.bus = bus
        self.boot, self.since = boot, time.time_ns() // 1_000_000
        self.box = PrivateKey.generate()
        self.controls: list[Control] = []
        self.packages: list[Package] = []
        self.beats: list[bytes] = []
        self._server_key = public_key(server_key)
        self._number = 0

    async def listen(self) -> None:
        await self.bus.subscribe(f"control.{self.name}", cb=self._control)
        await self.bus.subscribe(f"execute_build_package.{self.name}", cb=self._package)
        await self.bus.flush()

    async def _control(self, message: Msg) -> None:
        signed = msgspec.msgpack.decode(message.data, type=Signed)
        self.controls.append(msgspec.msgpack.decode(verify(self._server_key, message.subject, signed), type=Control))

    async def _package(self, message: Msg) -> None:
        signed = msgspec.msgpack.decode(message.data, type=Signed)
        body = verify(self._server_key, message.subject, signed)
        self.packages.append(msgspec.msgpack.decode(SealedBox(self.box).decrypt(body), type=Package))

    async def say(self, subject: str, data: bytes) -> None:
        await self.bus.publish(subject, data)
        await self.bus.flush()

    async def beat(self, *, credits: int = 0, running: Sequence[Running] = (), seed: str = "", **more: Any) -> None:
        """A heartbeat. `seed` signs it, else its own key."""
        self._number += 1
        challenge = self.controls[-1].challenge if self.controls else b""
        offered = [Credit(secrets.token_urlsafe(12), bytes(self.box.public_key)) for _ in range(credits)]
        told = {"boot": self.boot, "since": self.since, "number": self._number, "slots": 4, "running": list(running), **more}
        heartbeat = Heartbeat(availability=Availability(challenge=challenge, offers=Offers(), credits=offered), **told)
        self.beats.append(_encode(sign(seed or self.member.key, "presence", _encode(heartbeat))))
        await self.say(f"presence.{self.name}", self.beats[-1])

    async def leased(self, timeout: float = 20) -> Package:
        """The next attempt that it is given."""
        before = len(self.packages)

        async def given() -> Package | None:
            if len(self.packages) == before:
                await self.beat(credits=1)
            return self.packages[before] if len(self.packages) > before else None

        found = await eventually(given, timeout=timeout)
        assert found is not None
        await self.hold(found)
        return found

    async def hold(self, package: Package, reported: int = 0) -> None:
        await self.beat(running=[Running(package.attempt, reported)])

    async def report(self, attempt: Attempt, first: int, *bodies: ReportBody, build: str = "") -> None:
        await self.say(f"reports.{self.name}.{build or attempt.build}", _encode(Reports(attempt=attempt, first=first, bodies=list(bodies))))

    async def end(self, attempt: Attempt, line: bytes = b"honest\n") -> None:
        """The whole of what an honest worker says of an attempt."""
        chunk = LogChunk(attempt=attempt, number=1, first_line=0, segments=[Segment("task", "stdout", 0, line)])
        await self.say(f"logs.{self.name}.{attempt.build}.{attempt.stage}.{attempt.number}", _encode(chunk))
        await self.report(attempt, 1, *honest(line))


def honest(line: bytes = b"honest\n") -> list[ReportBody]:
    end = ReportStageFinished(status="succeeded", chunks=1, lines=1, bytes=len(line))
    return [ReportStepStarted(step="task"), ReportStepFinished(step="task", status="succeeded", exit_code=0), end]


@asynccontextmanager
async def liar(system: System, member: Membership, before: Liar | None = None) -> AsyncIterator[Liar]:
    """Connected, and known to the scheduler; the same boot as `before`, if that is given."""
    bus = await eventually(lambda: _let_in(system, member), timeout=20)
    try:
        one = Liar(member, bus, system.data.secrets().server_key, before.boot if before else secrets.token_hex(8))
        if before is not None:
            one.box, one.since, one._number = before.box, before.since, before._number
        await one.listen()

        async def answered() -> bool:
            await one.beat()
            return bool(one.controls)

        await eventually(answered, timeout=20)
        yield one
    finally:
        await bus.close()


async def _let_in(system: System, member: Membership) -> NatsClient | None:
    """None while the scheduler has not heard yet that it is registered."""
    try:
        return await bare_client(system.bus_url(), member.key, member.name, inbox_prefix=inbox_prefix(member.name).encode())
    except NatsError as error:
        assert "Authorization Violation" in str(error), error
        return None
