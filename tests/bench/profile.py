"""Where each service's time goes during a throughput run: py-spy beside it."""

import re
import shutil
import signal
import subprocess
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tests.bench.system import System
from tests.bench.throughput import run_load

RATE = 200
PROFILED = ("gateway", "builds", "scheduler", "worker", "artifacts")
_EVERYWHERE = ("libs/runtime/service.py", "__main__.py", "penstock/up/supervisor.py", "penstock/up/service.py", "penstock/up/system.py")
_ROOT = Path(__file__).parents[2]
_FRAME = re.compile(r"^(?P<name>.*) \((?P<file>[^()]*?)(?::\d+)?\)$")


def profile(system: System, builds: int, clients: int, most: int = 22) -> str:
    """Functions by their own time, and ours by all that they call, as shares of the run."""
    spy = shutil.which("py-spy", path=sysconfig.get_path("scripts"))
    if spy is None:
        return "py-spy is not installed: no profile"
    with tempfile.TemporaryDirectory(prefix="penstock-bench-") as name:
        stacks = {part: Path(name, part) for part in PROFILED}
        began = time.monotonic()
        # Those who hold the interpreter: on a busy machine, a thread that waits for its turn in a system call would pass for one that works.
        options = ["--gil", "--rate", str(RATE), "--duration", "600", "--format", "raw", "--function", "--full-filenames"]
        recorders = [
            subprocess.Popen(
                [spy, "record", "--pid", str(system.pids[part]), *options, "--output", str(path)],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            for part, path in stacks.items()
        ]
        time.sleep(1.0)
        try:
            result = run_load(system, builds, clients)
        finally:
            for recorder in recorders:
                recorder.send_signal(signal.SIGINT)
            for recorder in recorders:
                recorder.wait()
        taken = (time.monotonic() - began) * RATE
        head = f"{builds} builds in {result.seconds:.1f} s while profiled ({builds / result.seconds:.0f}/s)"
        return "\n".join([head, *(_report(part, path.read_text().splitlines(), taken, most) for part, path in stacks.items() if path.exists())])


def _report(part: str, stacks: Iterable[str], taken: float, most: int) -> str:
    own: Counter[str] = Counter()
    within: Counter[str] = Counter()
    packages: Counter[str] = Counter()
    total = 0
    for line in stacks:
        stack, _, samples = line.rpartition(" ")
        count = int(samples)
        frames = [_named(frame) for frame in stack.split(";") if not frame.startswith(("process ", "thread "))]
        if not frames:
            continue
        total += count
        own[frames[-1]] += count
        packages[_package(frames[-1])] += count
        for frame in {frame for frame in frames if _is_ours(frame) and not frame.endswith(_EVERYWHERE)}:
            within[frame] += count
    lines = [f"\n== {part}: {total / taken:.0%} of a core inside the interpreter"]
    lines.append("  own time by package: " + ", ".join(f"{name} {count / max(total, 1):.0%}" for name, count in packages.most_common(9)))
    for title, counts in (("own time", own), ("with all that it calls (ours only)", within)):
        lines.append(f"  {title}:")
        lines += [f"    {count / total:6.1%}  {name}" for name, count in counts.most_common(most)]
    return "\n".join(lines)


def _named(frame: str) -> str:
    """`decide services/builds/decider.py`, whatever folders it is in."""
    match = _FRAME.match(frame)
    if match is None:
        return frame
    file = match["file"]
    for mark in ("/site-packages/", f"{_ROOT}/", "/lib/python3."):
        if mark in file:
            file = file.partition(mark)[2]
            break
    return f"{match['name']}  {file.partition('/')[2] if re.match(r'^[0-9]+/', file) else file}"


def _is_ours(frame: str) -> bool:
    return frame.partition("  ")[2].startswith(("services/", "libs/", "proto/", "penstock/"))


def _package(frame: str) -> str:
    file = frame.partition("  ")[2]
    return "/".join(file.split("/")[:2]) if _is_ours(frame) else file.split("/")[0]
