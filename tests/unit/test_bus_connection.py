"""The life of a connection to NATS, where no server is needed."""

import asyncio
from collections.abc import Iterator

import pytest
import structlog

from libs.bus.connection import Connection, connect
from libs.bus.wire import SILENT, Login, Wire
from libs.tokens import new_seed


async def test_a_connection_ends_that_is_left_just_when_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.11's `wait_for`, under which nats-py connects, forgets a cancellation that comes in that turn of the event loop."""
    trying, refuse, leave = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def refused(*_: object, **__: object) -> None:
        trying.set()
        await refuse.wait()
        leave.set()
        raise ConnectionRefusedError

    monkeypatch.setattr("asyncio.open_connection", refused)

    async def visit() -> None:
        async with connect(Login("nats://127.0.0.1:1", new_seed(), "test"), "_INBOX", patience=0.0):
            await trying.wait()
            refuse.set()
            await leave.wait()

    visiting = asyncio.create_task(visit())
    done, _ = await asyncio.wait([visiting], timeout=5)
    assert done
    await visiting


@pytest.mark.parametrize("deaf", ["old", "new"])
async def test_a_wire_is_flushed_before_another_takes_its_place_whether_or_not_that_is_sound(deaf: str) -> None:
    did: list[str] = []

    class Noted(Wire):
        def __init__(self, name: str) -> None:
            super().__init__({}, structlog.get_logger())
            self.name = name

        async def flush(self, timeout: int = 10) -> None:
            if self.name == deaf:
                raise TimeoutError
            did.append(f"{self.name} is flushed")

        async def end(self) -> None:
            did.append(f"{self.name} ends")

    await Connection(Login("nats://127.0.0.1:1", "", "test"), "_INBOX")._succeed(Noted("old"), Noted("new"))
    assert did == {"new": ["old is flushed", "old ends"], "old": ["new is flushed", "old ends"]}[deaf]


class Watched(Wire):
    """A wire whose server says something, or not, before each look, and answers pings, or does not."""

    def __init__(self, words: Iterator[bool], answers: bool) -> None:
        super().__init__({}, structlog.get_logger())
        self.words, self.answers, self.pings = words, answers, 0

    async def look(self, _: float) -> None:
        if next(self.words):
            await self._process_msg(1, b"a", b"", b"", None)

    async def _send_ping(self, future: object = None) -> None:
        self.pings += 1
        if self.answers:
            await self._process_pong()


@pytest.mark.parametrize(
    ("words", "answers", "pings"),
    [
        pytest.param([True] * 10 + [False] * (SILENT + 1), False, SILENT - 1, id="one that speaks is never asked, one that does not is given up"),
        pytest.param([False] * 9 + [True], True, 4, id="one that has nothing to say is asked every other time, and stays"),
    ],
)
async def test_only_silence_is_pinged(monkeypatch: pytest.MonkeyPatch, words: list[bool], answers: bool, pings: int) -> None:
    wire = Watched(iter(words), answers)
    monkeypatch.setattr("libs.bus.wire.asyncio.sleep", wire.look)
    if answers:
        with pytest.raises(RuntimeError):  # nothing more is foreseen: it would go on
            await wire._ping_interval()
    else:
        await wire._ping_interval()
    assert wire.pings == pings
    assert wire.ended.is_set() is not answers
