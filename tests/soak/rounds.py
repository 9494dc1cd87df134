"""A part of the soak that is so many rounds of one thing: how it is run by itself."""

import argparse
import asyncio
import random
import secrets
from collections.abc import Awaitable, Callable

from tests.bench.figures import Figure, table
from tests.soak.options import say

Rounds = Callable[[int, random.Random, float], Awaitable[list[Figure]]]
"""(how many, what draws all that is random, until when in monotonic seconds): what came of them."""


def alone(name: str, about: str, rounds: int, go: Rounds) -> int:
    """`python -m tests.soak.NAME [--rounds N] [--seed S]`; the exit code."""
    parser = argparse.ArgumentParser(prog=f"python -m tests.soak.{name}", description=about)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--seed", type=int, default=secrets.randbits(32))
    given = parser.parse_args()
    say(f"seed {given.seed}")
    figures = asyncio.run(go(given.rounds, random.Random(f"{given.seed} {name}"), float("inf")))
    print(f"{table(figures)}\n\nseed {given.seed}", flush=True)
    return 0 if all(figure.goal is None or figure.goal.reached(figure.measured) for figure in figures) else 1
