"""No-op builds a second, end to end over HTTP, and what each costs every process."""

import asyncio
import subprocess
import sys
import threading

import msgspec

from tests.bench.figures import Figure, Goal, at_most, percentile
from tests.bench.load import PATIENCE, Order, Result
from tests.bench.machine import Meter
from tests.bench.system import System


def throughput(system: System, label: str, builds: int, clients: int, goal: Goal | None) -> list[Figure]:
    """Figures of one run, after a short one that warms everything up."""
    run_load(system, max(builds // 20, 20), clients)
    transactions = asyncio.run(system.transactions())
    peaks: dict[str, float] = {}
    over = threading.Event()
    watching = threading.Thread(target=_watch_memory, args=(system, peaks, over))
    with Meter(system.parts) as meter:
        watching.start()
        result = run_load(system, builds, clients)
    over.set()
    watching.join()
    transactions = asyncio.run(system.transactions()) - transactions
    figures = [
        Figure(f"no-op builds/s over HTTP, {label}", builds / result.seconds, "/s", goal),
        Figure("  submissions answered", builds / result.submitting, "/s"),
        Figure("  POST answered, p50", percentile(result.answers, 0.5), "ms"),
        Figure("  POST answered, p95", percentile(result.answers, 0.95), "ms"),
        Figure("  log events a build", result.events / builds, "", at_most(8)),
        Figure("  Postgres transactions a build, reads included", transactions / builds, ""),
    ]
    spent = {**meter.cpu, "the load itself": result.cpu}
    figures += [Figure(f"  CPU a build: {name}", used / builds * 1e6, "µs") for name, used in sorted(spent.items(), key=lambda i: -i[1]) if used]
    figures.append(Figure("  CPU a build: all", sum(spent.values()) / builds * 1e6, "µs"))
    figures.append(Figure("  CPU in use", sum(spent.values()) / result.seconds, "cores"))
    figures += [Figure(f"  PSS under load: {name}", size, "MB") for name, size in peaks.items()]
    figures.append(Figure("  PSS under load: all", sum(peaks.values()), "MB"))
    return figures


def run_load(system: System, builds: int, clients: int) -> Result:
    """Raises AssertionError unless every build succeeded, and ended exactly once."""
    order = Order(system.url, system.token, system.team, builds, clients)
    said = subprocess.run(
        [sys.executable, "-m", "tests.bench.load"], input=msgspec.json.encode(order), stdout=subprocess.PIPE, check=True, timeout=PATIENCE + 30
    )
    result = msgspec.json.decode(said.stdout, type=Result)
    wrong = {build: ends for build, ends in result.ends.items() if ends != ["succeeded"]}
    assert not wrong, f"builds that did not succeed once: {wrong}"
    assert len(result.ends) == builds, f"{builds} builds were submitted and {len(result.ends)} ended"
    return result


def _watch_memory(system: System, peaks: dict[str, float], over: threading.Event) -> None:
    """Now and then only: reading it costs some milliseconds."""
    while not over.wait(0.8):
        for name, size in system.parts.pss().items():
            peaks[name] = max(peaks.get(name, 0.0), size)
