"""`python -m tests.soak [--only PART,…] [--minutes M] [--seed S] [--smoke]`: break things for a long time, and prove that nothing came of it."""

import argparse
import asyncio
import importlib
import secrets
import signal
import sys
import time
import traceback

from tests.bench.figures import Figure, table
from tests.soak.options import Options, none, say

PARTS = {
    "simulation": "the pure core, with a scheduler, builds and workers that die, on a bus that loses, repeats and delays: 10⁷ steps",
    "stops": "200 workers stopped past their leases and resumed: no word of theirs counts",
    "kills": "kill -9 × 100 of the bus, and of the database in between: no build lost, none doubled",
    "powercut": "50 power cuts: no acknowledged fact lost",
    "exits": "10,000 steps that write a numbered tail and are gone at once: each log complete, or marked where it is cut",
    "masking": "a million fuzzed streams of what steps write, with secrets in them: none leaks in any listed encoding",
    "chaos": "1,000 random faults during 500 builds: none lost, none ended twice, nothing left",
}
"""Modules of this package, in the order in which they run. Each has `async def run(options: Options) -> list[Figure]`."""


def main() -> int:
    parts = "\n".join(f"  {name:<12}{what}" for name, what in PARTS.items())
    parser = argparse.ArgumentParser(
        prog="./just soak",
        description="Break a running system, and simulated ones, for as long as it takes; prints what was measured beside what must be reached.\n\n"
        f"parts:\n{parts}",
        epilog="Ends with 1 when a goal is missed. The seed is said first and last: the same seed draws the same faults, and a simulation's failure\n"
        "names a seed of its own, which replays it exactly. What a real system did is in its logs: PENSTOCK_FAULTS_KEEP=1 keeps its folder.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", default=",".join(PARTS), metavar="PART,…", help="some of the parts")
    parser.add_argument("--minutes", type=float, help="each part ends after so many; the counts that it must reach are then no goals")
    parser.add_argument("--seed", type=int, help="a number that draws all faults; a new one unless given")
    parser.add_argument("--smoke", action="store_true", help="a little of everything, in a minute or so")
    given = parser.parse_args()
    wanted = [part for part in given.only.split(",") if part]
    if set(wanted) - PARTS.keys():
        parser.error(f"no such part: {', '.join(sorted(set(wanted) - PARTS.keys()))}")
    options = Options(seed=secrets.randbits(32) if given.seed is None else given.seed, smoke=given.smoke, minutes=given.minutes)
    for number in (signal.SIGTERM, signal.SIGHUP):  # as by Ctrl-C: what was started is ended
        signal.signal(number, signal.default_int_handler)
    say(f"seed {options.seed}")
    figures = [figure for part in PARTS if part in wanted for figure in measured(part, options)]
    print(f"\n{table(figures)}\n\nseed {options.seed}", flush=True)
    return 0 if all(figure.goal is None or figure.goal.reached(figure.measured) for figure in figures) else 1


def measured(part: str, options: Options) -> list[Figure]:
    """A part's figures; that it broke down is one, too."""
    began = time.monotonic()
    say(f"--- {part}: {PARTS[part]}")
    try:
        figures: list[Figure] = asyncio.run(importlib.import_module(f"tests.soak.{part}").run(options))
    except Exception:
        traceback.print_exc()
        figures = [none(f"{part}: broke down", 1)]
    for figure in figures:
        say(f"{figure.name}: {figure.measured:,.0f} {figure.unit}".rstrip())
    return [*figures, Figure(f"{part}: all of it", time.monotonic() - began, "s")]


if __name__ == "__main__":
    sys.exit(main())
