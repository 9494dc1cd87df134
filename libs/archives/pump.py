"""Between the event loop, which moves bytes, and threads, which work on them: a thread is held only while there is something to work on,
so that slow peers cost none."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterable
from concurrent.futures import Executor
from contextlib import AsyncExitStack
from typing import TypeVar

from libs.archives.pages import Filling

T = TypeVar("T")
P = TypeVar("P", bound=bytes | memoryview)

_ENOUGH = 64 << 10
_AT_MOST = 1 << 20
_GATHERED = 256 << 10
_QUICK = 1.0
"""Seconds in which who reads quickly takes a piece."""


async def in_thread(work: Callable[[], T], threads: Executor | None = None) -> T:
    """`work()` in a thread, and never left behind: a cancellation is passed on once the work has ended."""
    return await to_its_end(asyncio.get_running_loop().run_in_executor(threads, work))


async def to_its_end(work: asyncio.Future[T]) -> T:
    """What comes of it; a cancellation is passed on once it has ended."""
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await _settled(work)
        raise


Asking = Generator[int, memoryview, None]
"""Work that asks for memory, so many bytes at a time, and is sent it."""


async def pump(
    chunks: AsyncIterator[P],
    feed: Callable[[P], Asking | None],
    finish: Callable[[], T],
    threads: Executor | None = None,
    filling: Filling | None = None,
) -> T:
    """Call `feed` in threads, one call at a time, with each of `chunks`; a thread is taken for 64 KiB to about 1 MiB of them, and meanwhile more are
    read. Then `finish`, whose answer is the answer. When this returns or raises, no call is under way. The producer waits once so much is waiting:
    backpressure. What a feed asks for is `filling`'s, and is being filled until the next is asked for; no thread waits for it."""
    waiting: list[P] = []
    size = 0
    working: asyncio.Task[None] | None = None
    lending = AsyncExitStack()

    async def work(pieces: list[P]) -> None:
        feeding, lent = _feeding(feed, pieces), list[memoryview]()
        while wanted := await in_thread(lambda: _until_asked(feeding, lent), threads):
            assert filling is not None
            await lending.aclose()
            lent.append(await lending.enter_async_context(filling(wanted, 0)))

    try:
        async for chunk in chunks:
            waiting.append(chunk)
            size += len(chunk)
            del chunk  # that of large pieces none stays longer than it must
            if size < _ENOUGH or (working is not None and not working.done() and size < _AT_MOST):
                continue
            if working is not None:
                await working
            working = asyncio.create_task(work(waiting))
            await asyncio.sleep(0)  # it begins now, not when nothing is left to read
            waiting, size = [], 0
        if working is not None:
            await working
        await work(waiting)
        return await in_thread(finish, threads)
    finally:
        if working is not None:
            if filling is not None:
                working.cancel()  # it may wait for memory, which is wanted no more
            await _settled(working)
        await lending.aclose()


async def drawn(pieces: Generator[P, None, None], threads: Executor | None = None) -> AsyncGenerator[P, None]:
    """The pieces of a blocking generator, each drawn in a thread, one ahead of a reader who took the last one quickly: a slow one costs one piece.
    The generator is closed at the end."""
    clock = asyncio.get_running_loop().time
    quick = False

    def draw() -> P | None:
        return next(pieces, None)

    ahead: asyncio.Task[P | None] | None = None
    try:
        while True:
            ahead = ahead or asyncio.create_task(in_thread(draw, threads))
            if (piece := await ahead) is None:
                return
            ahead = asyncio.create_task(in_thread(draw, threads)) if quick else None
            given = clock()
            yield piece
            quick = clock() - given < _QUICK
    finally:
        if ahead is not None:
            await _settled(ahead)
        await in_thread(pieces.close, threads)


def gathered(pieces: Iterable[P]) -> Generator[P | bytes, None, None]:
    """The same bytes, small pieces gathered to some 256 KiB, so that each is worth a step to another thread; large ones, of 1 MiB or more, are
    given on as they are."""
    waiting: list[P] = []
    size = 0
    for piece in pieces:
        large = len(piece) >= _AT_MOST
        if not large:
            waiting.append(piece)
            size += len(piece)
        if size >= _GATHERED or (large and size):
            yield b"".join(waiting)
            waiting.clear()
            size = 0
        if large:
            yield piece
    if size:
        yield b"".join(waiting)


def _feeding(feed: Callable[[P], Asking | None], pieces: list[P]) -> Asking:
    """Each piece is let go once it was fed."""
    pieces.reverse()
    while pieces:
        yield from feed(pieces.pop()) or ()


def _until_asked(work: Asking, lent: list[memoryview]) -> int:
    """What it asks for next; 0: it is done. Nobody else has what was lent."""
    try:
        return work.send(lent.pop()) if lent else next(work)
    except StopIteration:
        return 0


async def _settled(future: asyncio.Future[T]) -> None:
    """Wait for the end of what runs, whatever comes of it; a cancellation of the waiter is raised only then."""
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError as error:
            cancelled = error
    if not future.cancelled():
        future.exception()
    if cancelled is not None:
        raise cancelled
