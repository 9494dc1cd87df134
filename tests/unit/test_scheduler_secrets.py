"""What the scheduler says of a request about secrets that it cannot take: never what is in it."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs

from libs.bus.memory import MemoryBus
from libs.eventlog.log import NewEvent
from libs.eventlog.memory import MemoryLog
from libs.runtime.commands import CommandLoop
from libs.sealing import new_sealing_key, seal, sealing_public_key
from proto.messages import KeepForBuild, KeepSecret, SecretAnswer, SecretValues
from services.scheduler.commands import NOBODY, SEALING, secret_stream
from services.scheduler.decider import SchedulerDecider
from services.scheduler.sealing import SealingKeys
from services.scheduler.secret_index import Entry, SecretIndex
from services.scheduler.secrets import Secrets
from tests.controls import counter, write

VALUE = "hunter2-hunter2"
PRIVATE = new_sealing_key()
KEY = Entry("k", NOBODY, SEALING)


class Kept(dict[Entry, str]):
    """A vault, in memory."""

    async def create(self) -> None: ...

    async def store(self, values: dict[Entry, str]) -> None:
        self.update(values)

    async def read(self, entries: list[Entry]) -> dict[Entry, str]:
        return {entry: self[entry] for entry in entries if entry in self}


class Keeper:
    def __init__(self) -> None:
        self.log, self.bus, self.vault = MemoryLog(), MemoryBus(), Kept({KEY: PRIVATE})

    async def ask(self, question: bytes) -> SecretAnswer:
        with capture_logs() as said:
            answer = await self.bus.ask("secrets.main", question)
        assert VALUE not in f"{said}{answer!r}"
        return msgspec.msgpack.decode(answer, type=SecretAnswer)


@pytest.fixture
async def keeper() -> AsyncIterator[Keeper]:
    one = Keeper()
    commands: Any = CommandLoop(one.log, SchedulerDecider(), counter())
    vault: Any = one.vault
    secrets = Secrets(
        log=one.log,
        bus=one.bus,
        commands=commands,
        vault=vault,
        sealing=SealingKeys(vault, commands, counter("s"), lambda: 0.0),
        index=SecretIndex,
        leads=lambda: True,
        ids=counter("v"),
        clock=lambda: 0.0,
    )
    tasks = [asyncio.create_task(commands.run()), asyncio.create_task(secrets.serve())]
    await asyncio.sleep(0)
    yield one
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def sealed(content: object) -> bytes:
    return seal(sealing_public_key(PRIVATE), msgspec.msgpack.encode(content))


def asked(content: object) -> bytes:
    return msgspec.msgpack.encode(KeepSecret(key=KEY.entry, sealed=sealed(content), by="me"))


GOOD = SecretValues(team="main", values={"s": VALUE})
UNTAKEABLE: dict[str, Callable[[], bytes]] = {
    "no message": lambda: VALUE.encode(),
    "of no known kind": lambda: msgspec.msgpack.encode({"type": VALUE}),
    "a field of another type": lambda: msgspec.msgpack.encode({"type": "set", "key": {VALUE: VALUE}, "sealed": b"", "by": "me"}),
    "for a build of no name": lambda: msgspec.msgpack.encode(KeepForBuild(build=f"{VALUE}!", key=KEY.entry, sealed=sealed(GOOD))),
    "sealed to no key of ours": lambda: msgspec.msgpack.encode(KeepSecret(key=VALUE, sealed=sealed(GOOD), by="me")),
    "not sealed": lambda: msgspec.msgpack.encode(KeepSecret(key=KEY.entry, sealed=msgspec.msgpack.encode(GOOD), by="me")),
    "sealed, and no values": lambda: asked({"team": "main", "values": VALUE}),
    "a value that is no text": lambda: asked({"team": "main", "values": {"s": [VALUE]}}),
    "two values": lambda: asked(SecretValues(team="main", values={"s": VALUE, VALUE: "t"})),
    "another team's": lambda: asked(SecretValues(team=VALUE, values={"s": VALUE})),
}


@pytest.mark.parametrize("question", UNTAKEABLE.values(), ids=UNTAKEABLE.keys())
async def test_what_cannot_be_taken_is_refused_without_repeating_it(keeper: Keeper, question: Callable[[], bytes]) -> None:
    answer = await keeper.ask(question())
    assert answer.refused and not answer.position
    assert list(keeper.vault) == [KEY] and await keeper.log.head() == 0


async def test_what_can_be_taken_is(keeper: Keeper) -> None:
    answer = await keeper.ask(asked(GOOD))
    assert (answer.refused, answer.version) == ("", 1) and VALUE in keeper.vault.values()


@pytest.mark.parametrize("bad", [NewEvent("e1", "secret.of_tomorrow", b"{}"), NewEvent("e1", "secret.set", b"{}")], ids=["of tomorrow", "bad"])
async def test_a_secret_whose_history_cannot_be_read_is_refused_for_that(keeper: Keeper, bad: NewEvent) -> None:
    await keeper.log.append([write(secret_stream("main", "s"), bad)])
    assert f"event 1 ({bad.type} on secret-" in (await keeper.ask(asked(GOOD))).refused
