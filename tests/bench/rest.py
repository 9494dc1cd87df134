"""What a system that does nothing costs, and how soon it serves."""

import subprocess
import sys
import time
from statistics import median

from tests.bench.figures import Figure, at_most
from tests.bench.machine import Meter
from tests.bench.system import System


def idle(system: System, settle: float, seconds: float) -> list[Figure]:
    """Memory `settle` seconds after the start, then CPU over `seconds`."""
    time.sleep(settle)
    sizes = system.parts.pss()
    with Meter(system.parts) as meter:
        time.sleep(seconds)
    figures = [Figure(f"PSS idle: {name}", size, "MB") for name, size in sizes.items()]
    figures.append(Figure("PSS idle: all", sum(sizes.values()), "MB", at_most(250)))
    figures += [Figure(f"CPU idle: {name}", used / meter.seconds * 100, "% of a core") for name, used in meter.cpu.items() if used]
    figures.append(Figure("CPU idle: all", sum(meter.cpu.values()) / meter.seconds * 100, "% of a core", at_most(2)))
    return figures


def starts(system: System, times: int) -> list[Figure]:
    """Stop and start the system anew, and ask the command line for help."""
    ups: list[float] = []
    for _ in range(times):
        system.down()
        ups.append(system.up())
    helps: list[float] = []
    for _ in range(2 * times + 1):
        began = time.monotonic()
        subprocess.run([sys.executable, "-m", "penstock", "--help"], check=True, capture_output=True)
        helps.append((time.monotonic() - began) * 1000)
    return [
        Figure(f"warm `penstock up` to serving (median of {times})", median(ups), "s", at_most(2.5)),
        Figure(f"`penstock --help` (median of {len(helps)})", median(helps), "ms", at_most(150)),
    ]
