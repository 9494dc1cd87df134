"""`python -m tests.bench [--smoke] [--profile] [--only PART,…]`: measure, and print the table."""

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Iterable

import msgspec

from tests.bench.artifacts import artifacts
from tests.bench.docker import docker
from tests.bench.figures import Figure, at_least, at_most, table
from tests.bench.latency import latency
from tests.bench.lines import lines
from tests.bench.logs import show_errors_only
from tests.bench.masking import masking
from tests.bench.placement import placement
from tests.bench.profile import profile
from tests.bench.recovery import recovery
from tests.bench.rest import idle, starts
from tests.bench.spawns import spawn_rates
from tests.bench.storage import storage
from tests.bench.system import system
from tests.bench.throughput import throughput
from tests.bench.trees import trees

PARTS = (
    "spawns",
    "storage",
    "placement",
    "trees",
    "masking",
    "docker",
    "idle",
    "starts",
    "latency",
    "lines",
    "artifacts",
    "throughput",
    "recovery",
    "sandbox",
)
CLIENTS = 16


class Size(msgspec.Struct, frozen=True):
    """How much of everything is done. `settle` and `rest` in seconds."""

    spawns: int = 1000
    log_builds: int = 12_500
    singles: int = 2000
    settle: float = 10.0
    rest: float = 10.0
    starts: int = 3
    latency: int = 100
    lines: int = 1_000_000
    single_lines: int = 100
    masked_megabytes: int = 50
    containers: int = 30
    builds: int = 1000
    fleets: tuple[int, ...] = (1000, 10_000)
    queues: tuple[int, ...] = (0, 1000, 100_000)
    decisions: int = 1000
    files: int = 5000
    profiled: int = 3000
    large: int = 1 << 30
    kills: int = 3


SMOKE = Size(
    spawns=100,
    log_builds=1000,
    singles=200,
    settle=1.0,
    rest=2.0,
    starts=1,
    latency=10,
    lines=100_000,
    single_lines=20,
    masked_megabytes=5,
    containers=3,
    builds=100,
    fleets=(100,),
    queues=(0, 10, 1000),
    decisions=50,
    files=200,
    profiled=300,
    large=64 << 20,
    kills=1,
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="Measure the running system.")
    parser.add_argument("--smoke", action="store_true", help="a little of everything, in under a minute: the figures mean nothing")
    parser.add_argument("--profile", action="store_true", help="say where each process's time goes during a throughput run")
    parser.add_argument("--only", default=",".join(PARTS), metavar="PART,…", help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--slots", type=int, default=32, help="what the worker runs at once")
    parser.add_argument("--builds", type=int, help="no-op builds of the throughput runs")
    given = parser.parse_args()
    parts = {part for part in given.only.split(",") if part}
    if parts - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(parts - set(PARTS)))}")
    show_errors_only()
    size = SMOKE if given.smoke else Size()
    if given.builds:
        size = msgspec.structs.replace(size, builds=given.builds)
    figures = Collected()
    figures.add([Figure(f"load average before, on {os.cpu_count()} CPUs: what else this machine does", os.getloadavg()[0], "")])
    began = time.monotonic()
    measure(parts, size, given.slots, given.profile, figures)
    print(f"\n{table(figures.all)}\n\n{time.monotonic() - began:.0f} s", flush=True)
    return 0


class Collected:
    """Figures so far; each is also said at once, on stderr."""

    def __init__(self) -> None:
        self.all: list[Figure] = []

    def add(self, figures: Iterable[Figure]) -> None:
        for figure in figures:
            self.all.append(figure)
            print(f"{figure.name}: {figure.measured:,.2f} {figure.unit}", file=sys.stderr, flush=True)


def measure(parts: set[str], size: Size, slots: int, profiling: bool, figures: Collected) -> None:
    """In the order of PARTS; the bare rates come first, because goals hang on them."""
    bare: dict[str, float] = {}
    if parts & {"spawns", "sandbox"}:
        rates, bare = spawn_rates(size.spawns, slots)
        figures.add(rates)
    if "storage" in parts:
        figures.add(asyncio.run(storage(size.log_builds, size.singles)))
    if "placement" in parts:
        figures.add(placement(size.fleets, size.queues, size.decisions))
    if "trees" in parts:
        figures.add(trees(size.files))
    if "masking" in parts:
        figures.add(masking(size.masked_megabytes))
    if "docker" in parts:
        figures.add(docker(size.containers))
    if profiling or parts & {"idle", "starts", "latency", "lines", "artifacts", "throughput", "recovery"}:
        plain(parts, size, slots, profiling, figures)
    if "sandbox" in parts:
        with system("auto", slots) as running:
            goal = at_most(bare["auto ms"] + 8)
            figures.add(asyncio.run(latency(running, "idle, default sandbox", size.latency, goal, None)))
            label = f"default sandbox, {slots} slots"
            figures.add(throughput(running, label, size.builds, CLIENTS, at_least(max(150.0, bare["auto"] / 2))))


def plain(parts: set[str], size: Size, slots: int, profiling: bool, figures: Collected) -> None:
    """All that is measured on a system without a sandbox."""
    with system("none", slots) as running:
        if "idle" in parts:
            figures.add(idle(running, size.settle, size.rest))
        if "starts" in parts:
            figures.add(starts(running, size.starts))
        if "latency" in parts:
            figures.add(asyncio.run(latency(running, "idle", size.latency, at_most(10), at_most(15))))
        if "lines" in parts:
            figures.add(asyncio.run(lines(running, size.lines, size.single_lines)))
        if "artifacts" in parts:
            figures.add(asyncio.run(artifacts(running, size.large)))
        if "throughput" in parts:
            figures.add(throughput(running, f"no sandbox, {slots} slots, {CLIENTS} clients", size.builds, CLIENTS, at_least(400)))
        if "recovery" in parts:
            figures.add(asyncio.run(recovery(running, size.kills)))
        if profiling:
            print(profile(running, size.profiled, CLIENTS), flush=True)


if __name__ == "__main__":
    sys.exit(main())
