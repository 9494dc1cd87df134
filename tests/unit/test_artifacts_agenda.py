"""When there is something to tidy up."""

import asyncio

from services.artifacts.agenda import Agenda


class Clock:
    """Unix seconds, which a test may put back."""

    def __init__(self) -> None:
        self.back = 0.0

    def __call__(self) -> float:
        return asyncio.get_running_loop().time() - self.back


async def rested(agenda: Agenda, most: float) -> float:
    began = asyncio.get_running_loop().time()
    await asyncio.wait_for(agenda.rest(most), 10)
    return asyncio.get_running_loop().time() - began


async def test_it_rests_until_something_is_due_and_what_comes_up_before_that_ends_it_sooner() -> None:
    clock = Clock()
    agenda = Agenda(clock)
    agenda.expect(clock() + 3600)
    resting = asyncio.create_task(rested(agenda, 3600))
    await asyncio.sleep(0)
    agenda.expect(clock() + 7200)
    agenda.expect(clock() - 5)
    assert 1.0 <= await resting < 10
    assert await rested(agenda, 3600) < 10, "it is still to be seen to"
    agenda.begin()
    assert await rested(agenda, 0.01) >= 0.01


async def test_a_look_that_comes_before_it_is_due_forgets_nothing() -> None:
    """What a reader does not know yet, who looks then does not see: neither of two may be lost."""
    now = 0.0
    agenda = Agenda(lambda: now)
    for at in (20.0, 10.0):
        agenda.expect(at)
    agenda.begin()
    for now in (10.0, 20.0):  # noqa: B007
        await rested(agenda, 3600)
        agenda.begin()
        assert await rested(agenda, 0.01) >= 0.01


async def test_a_clock_that_is_put_back_keeps_nobody_from_looking() -> None:
    clock = Clock()
    agenda = Agenda(clock)
    agenda.expect(clock() + 0.01)
    clock.back = 3600
    assert await rested(agenda, 0.02) < 10
