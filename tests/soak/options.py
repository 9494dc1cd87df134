"""What a part of the soak is told: how much, how long, and by which seed."""

import random
import sys
import time

import msgspec

from tests.bench.figures import Figure, Goal, at_least, at_most


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """`seed` draws all that is random; a `smoke` run does a little of everything; `minutes`: how long each part may take (None: until it is done)."""

    seed: int
    smoke: bool = False
    minutes: float | None = None

    def many(self, full: int, smoke: int) -> int:
        """How many of something."""
        return smoke if self.smoke else full

    def chance(self, part: str) -> random.Random:
        """A part's own, so that it draws the same whichever others run."""
        return random.Random(f"{self.seed} {part}")

    def until(self) -> float:
        """When a part that begins now has to end what it does (monotonic seconds)."""
        return float("inf") if self.minutes is None else time.monotonic() + 60 * self.minutes

    def done(self, name: str, count: int, full: int) -> Figure:
        """How many there were. The goal is the full run's."""
        return Figure(name, count, "", at_least(full) if not self.smoke and self.minutes is None else None)


NONE: Goal = at_most(0)


def none(name: str, found: int) -> Figure:
    """What there must be none of."""
    return Figure(name, found, "", NONE)


def say(words: str) -> None:
    """A line of progress."""
    print(f"{time.strftime('%H:%M:%S')} {words}", file=sys.stderr, flush=True)
