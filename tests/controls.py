"""What many tests need: waiting for what becomes true, and ready-made test data."""

import asyncio
import inspect
import itertools
import os
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from libs.eventlog.log import ANY, NewEvent, Write
from proto.catalogue import TAGS, encode
from proto.events.base import Event

T = TypeVar("T")


async def eventually(condition: Callable[[], T | Awaitable[T]], timeout: float = 10) -> T:
    """Ask until `condition()` is truthy (an AssertionError counts as not yet), and give what it said."""
    deadline = time.monotonic() + timeout
    while True:
        failure: AssertionError | None = None
        value: Any = None
        try:
            value = condition()
            if inspect.isawaitable(value):
                value = await value
        except AssertionError as error:
            failure = error
        if failure is None and value:
            return value
        if time.monotonic() > deadline:
            raise failure or AssertionError(f"not within {timeout} s: {inspect.getsource(condition).strip()}")
        await asyncio.sleep(0.01)


def files_in(folder: Path) -> dict[str, int]:
    """The files below a folder that others may be changing, by path from there, with their sizes: what goes meanwhile is passed over."""
    found: dict[str, int] = {}
    for within, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                path = Path(within, name)
                found[path.relative_to(folder).as_posix()] = path.stat().st_size
    return found


def counter(prefix: str = "id") -> Callable[[], str]:
    """Ids that are the same in every run: `id-1`, `id-2`, …"""
    numbers: Iterator[int] = itertools.count(1)
    return lambda: f"{prefix}-{next(numbers)}"


def write(stream: str, *events: Event | NewEvent, expected: int = ANY, ids: Callable[[], str] | None = None, team: str = "main") -> Write:
    """A write of events to a stream. Unless given, ids derive from stream and expected version, so that the same write again is a repeat;
    a write to ANY version is a new one each time."""
    make = ids or counter(f"{stream}@{uuid4() if expected == ANY else expected}")
    new: Sequence[NewEvent] = [e if isinstance(e, NewEvent) else NewEvent(make(), TAGS[type(e)], encode(e)) for e in events]
    return Write(stream=stream, expected=expected, events=new, team=team, correlation_id="correlation", causation_id="cause", actor="tester")
