"""Memory that many share: nobody has more of it than there is, and whatever becomes of a piece, it comes back."""

import asyncio
import threading
from collections.abc import AsyncIterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest

from libs.archives.pages import LARGE, Filling, Pages, is_paged, keep
from libs.archives.pump import Asking, pump
from libs.archives.tree import CHUNK
from libs.blobstore.upload import Upload

TWO = 2 * LARGE


async def taken(filling: Filling, size: int = LARGE) -> memoryview:
    async with filling(size, 0) as memory:
        return memory


async def settled() -> None:
    """What was said to the loop has been heard."""
    for _ in range(3):
        await asyncio.sleep(0)


async def test_who_finds_it_used_up_waits_and_the_first_comes_first() -> None:
    pages = Pages(TWO)
    with pages.share() as mine, pages.share() as theirs:
        one, two = await taken(mine), await taken(mine)
        assert is_paged(one)
        large, small = (asyncio.create_task(taken(theirs, size)) for size in (TWO, LARGE))
        del one
        await settled()
        assert (large.done(), small.done(), pages.free) == (False, False, LARGE), "a small one does not pass by"
        part = two[:1]
        del two
        await settled()
        assert not large.done(), "somebody still has a part of it"
        del part
        await settled()
        assert (large.done(), small.done()) == (True, False)
        large.result()
        del large
        assert len(await small) == LARGE
        del small
        await settled()
        assert pages.free == TWO


async def test_what_is_kept_counts_no_more_and_not_twice_when_it_goes() -> None:
    pages = Pages(TWO)
    with pages.share() as filling:
        memory = await taken(filling, TWO)
        keep(memory[:5])
        await settled()
        assert pages.free == TWO
        keep(memory)
        del memory
        await settled()
        assert pages.free == TWO
    keep(b"anything")
    keep(memoryview(b"else"))


async def test_what_an_error_refers_to_counts_no_more_once_its_owner_is_through() -> None:
    pages = Pages(TWO)
    with pytest.raises(ValueError), pages.share() as filling:
        async with filling(TWO, 0) as memory:
            raise ValueError
    assert (len(memory), pages.free) == (TWO, TWO)
    del memory
    await settled()
    assert pages.free == TWO


async def test_who_fills_slowly_keeps_nobody_waiting() -> None:
    pages = Pages(TWO, slow=0.0)
    with pages.share() as slow, pages.share() as other:
        async with slow(TWO, 0):
            await asyncio.wait_for(taken(other, TWO), 10)
    await settled()
    assert pages.free == TWO


@pytest.mark.parametrize("granted", [False, True])
async def test_who_goes_away_while_it_waits_leaves_its_turn_to_others(granted: bool) -> None:
    pages = Pages(TWO)
    with pages.share() as filling:
        memory = await taken(filling, TWO)
        gone, next_one = asyncio.create_task(taken(filling, TWO)), asyncio.create_task(taken(filling))
        await settled()
        if granted:
            pages._back(0)
        gone.cancel()
        del memory
        with suppress(asyncio.CancelledError):
            await gone
        assert len(await asyncio.wait_for(next_one, 10)) == LARGE
        del next_one
    await settled()
    assert pages.free == TWO


@pytest.mark.parametrize(("size", "counted"), [(LARGE, False), (CHUNK, True)])
async def test_what_waits_to_be_a_pack_is_not_counted_or_many_who_gather_would_wait_for_each_other(size: int, counted: bool) -> None:
    pages, stored = Pages(CHUNK), asyncio.Event()

    async def hold(digests: object, sizes: object) -> list[int]:
        return [0]

    async def write(digests: object, contents: object) -> None:
        await stored.wait()

    upload = Upload(asyncio.get_running_loop(), hold, write, threading.Semaphore(1), None)
    with pages.share() as filling:
        memory = await taken(filling, size)
        await asyncio.to_thread(upload.add, memory)
        del memory
        await settled()
        assert pages.free == (CHUNK - size if counted else CHUNK)
        stored.set()
        await asyncio.to_thread(upload.flush)
        await asyncio.to_thread(upload.close)
        await settled()
        assert pages.free == CHUNK


async def body() -> AsyncIterator[bytes]:
    for _ in range(3):
        yield bytes(1 << 16)


def asking(data: bytes) -> Asking:
    memory = yield LARGE
    assert is_paged(memory)


async def test_who_is_fed_in_threads_waits_for_memory_without_one() -> None:
    pages = Pages(LARGE)
    with ThreadPoolExecutor(1) as threads, pages.share() as theirs, pages.share() as mine:
        memory = await taken(theirs)
        pumping = asyncio.create_task(pump(body(), asking, lambda: "done", threads, mine))
        while not pages._waiting:
            await asyncio.sleep(0)
        assert await asyncio.get_running_loop().run_in_executor(threads, lambda: "free") == "free"
        del memory
        assert await asyncio.wait_for(pumping, 10) == "done"
    await settled()
    assert pages.free == LARGE


async def test_a_body_that_breaks_off_while_memory_is_waited_for_does_not_wait_for_it() -> None:
    pages = Pages(LARGE)

    async def breaking() -> AsyncIterator[bytes]:
        async for piece in body():
            yield piece
        while not pages._waiting:
            await asyncio.sleep(0)
        raise ConnectionResetError

    with ThreadPoolExecutor(1) as threads, pages.share() as theirs, pages.share() as mine:
        memory = await taken(theirs)
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(pump(breaking(), asking, lambda: None, threads, mine), 10)
        del memory
    await settled()
    assert pages.free == LARGE


async def test_what_has_come_is_worked_on_while_more_is_read() -> None:
    order: list[str] = []

    class Noting(Executor):
        def submit(self, work: Any, /, *args: Any, **more: Any) -> Future[Any]:
            done = Future[Any]()
            done.set_result(work())
            order.append("worked")
            return done

    async def at_hand() -> AsyncIterator[bytes]:
        for _ in range(3):
            order.append("read")
            yield bytes(1 << 16)

    await pump(at_hand(), lambda data: None, lambda: None, Noting())
    assert order[:2] == ["read", "worked"]
