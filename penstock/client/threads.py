"""Threads for one piece of work: when it is over, or given up, so are they."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

T = TypeVar("T")


class Stopped(Exception):
    """The work was given up."""


class Threads:
    """An async context manager; on leaving, what runs is waited for. What runs long calls `check` now and then."""

    def __init__(self, count: int) -> None:
        self._pool = ThreadPoolExecutor(count, "penstock")
        self._running: set[Future[object]] = set()
        self._stop = threading.Event()

    async def __aenter__(self) -> "Threads":
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        waiting = [asyncio.wrap_future(future) for future in list(self._running) if not future.cancel()]
        try:
            if waiting:
                await asyncio.shield(asyncio.gather(*waiting, return_exceptions=True))
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def start(self, function: Callable[..., T], *arguments: object) -> "asyncio.Future[T]":
        """Its result, to be waited for."""
        future = self._pool.submit(function, *arguments)
        self._running.add(future)  # type: ignore[arg-type]
        future.add_done_callback(self._running.discard)
        waited = asyncio.wrap_future(future)
        waited.add_done_callback(_heard)
        return waited

    async def run(self, function: Callable[..., T], *arguments: object) -> T:
        return await self.start(function, *arguments)

    def check(self) -> None:
        """Raises Stopped when nobody waits for the result any more."""
        if self._stop.is_set():
            raise Stopped


def _heard(future: "asyncio.Future[T]") -> None:
    """A failure that nobody waits for any more is none to report."""
    if not future.cancelled():
        future.exception()
