"""Memory that begins at a page: what lies there can go to a disk as it is, without passing through the kernel's own memory."""

import asyncio
import ctypes
import itertools
import mmap
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from functools import partial

PAGE = 4096
LARGE = 1 << 20
"""From so many bytes on that is worth it."""


def paged(size: int, before: int = 0, counted: Callable[[], None] | None = None) -> memoryview:
    """So much memory, a page beginning `before` bytes after its start. In the kernel's large pages, where it has any: filling, hashing and writing
    8 MiB then takes a fifth less time. `counted` is called when it is given back, from any thread."""
    memory = _Mapped(-1, size + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.counted = counted
    with suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    begin = -before % PAGE
    return memoryview(memory)[begin : begin + size]


class _Mapped(mmap.mmap):
    counted: Callable[[], None] | None = None

    def __del__(self) -> None:
        if self.counted is not None:
            self.counted()


Filling = Callable[[int, int], AbstractAsyncContextManager[memoryview]]
"""Memory as `paged(size, before)` gives it, to be filled in the `async with`."""


class Pages:
    """Paged memory of many, who have `most` bytes of it together: who finds that used up waits for its turn. It counts until nobody has it any more,
    or it was `kept`; not longer than `slow` seconds while it is filled, so that slow ones, who have one such piece each, keep nobody waiting."""

    def __init__(self, most: int, slow: float = 5.0) -> None:
        """No piece is larger than `most`."""
        self.free = most
        self._slow = slow
        self._numbers = itertools.count()
        self._taken: dict[int, int] = {}
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @contextmanager
    def share(self) -> Iterator[Filling]:
        """For one of them. In the end nothing of it counts: what an error still refers to would keep others waiting."""
        taken: set[int] = set()
        try:
            yield partial(self._filling, taken)
        finally:
            for number in taken:
                self._back(number)

    @asynccontextmanager
    async def _filling(self, taken: set[int], size: int, before: int) -> AsyncIterator[memoryview]:
        await self._turn(size)
        loop, number = asyncio.get_running_loop(), next(self._numbers)
        self._taken[number] = size
        taken.add(number)

        def back() -> None:
            with suppress(RuntimeError):  # the loop is over
                loop.call_soon_threadsafe(self._back, number, taken)

        lapse = loop.call_later(self._slow, self._back, number)
        try:
            yield paged(size, before, back)
        finally:
            lapse.cancel()

    async def _turn(self, size: int) -> None:
        if not self._waiting and size <= self.free:
            self.free -= size
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((size, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.free += size
            self._next()
            raise

    def _back(self, number: int, taken: set[int] | None = None) -> None:
        """Once, however often it is said."""
        if taken is not None:
            taken.discard(number)
        self.free += self._taken.pop(number, 0)
        self._next()

    def _next(self) -> None:
        while self._waiting and (self._waiting[0][1].done() or self._waiting[0][0] <= self.free):
            size, turn = self._waiting.popleft()
            if not turn.done():
                self.free -= size
                turn.set_result(None)


def keep(data: bytes | memoryview) -> None:
    """It is not counted any more: it stays for who knows how long, or is done with, whoever still refers to it."""
    if isinstance(data, memoryview) and isinstance(data.obj, _Mapped) and data.obj.counted is not None:
        data.obj.counted()


class Paged:
    """Memory to be filled from its start."""

    __slots__ = ("_at", "_view")

    def __init__(self, memory: memoryview) -> None:
        self._view = memory
        self._at = 0

    def add(self, data: bytes | memoryview) -> None:
        """Raises ValueError when it does not fit."""
        end = self._at + len(data)
        self._view[self._at : end] = data
        self._at = end

    def filled(self) -> memoryview:
        """What was added."""
        return self._view[: self._at]


def is_paged(data: bytes | memoryview) -> bool:
    """Whether it is memory that begins at a page, and worth knowing."""
    return isinstance(data, memoryview) and len(data) >= LARGE and not data.readonly and not _address(data) % PAGE


def _address(memory: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
