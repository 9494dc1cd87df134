"""The life of a connection to NATS, where no server is needed."""

import asyncio

import pytest

from libs.bus.connection import Login, connect
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
