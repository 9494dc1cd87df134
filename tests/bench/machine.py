"""What processes use, as /proc tells it."""

import os
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec

_TICK = os.sysconf("SC_CLK_TCK")


class Used(msgspec.Struct, frozen=True):
    """CPU seconds of a process, and of its children that have ended and were waited for."""

    own: float
    children: float


def cpu(pid: int) -> Used:
    """Raises FileNotFoundError or ProcessLookupError when there is no such process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    user, system, waited_user, waited_system = (int(field) for field in fields[11:15])
    return Used((user + system) / _TICK, (waited_user + waited_system) / _TICK)


def children(pid: int) -> list[int]:
    """Of all its threads."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        found += [int(word) for word in task.read_text().split()]
    return found


def pss(pid: int) -> float:
    """MB of memory, what is shared divided by its sharers; 0 when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def peak(pid: int) -> float:
    """MB of memory that it has had at most, what is shared included."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


class Parts:
    """The processes of a system by name. All of Postgres is one part; what the worker spawns is the part `steps`."""

    def __init__(self, pids: Mapping[str, int]) -> None:
        self._pids = dict(pids)

    def cpu(self) -> dict[str, float]:
        """CPU seconds so far."""
        found: dict[str, float] = {}
        for name, pid in self._pids.items():
            used = cpu(pid)
            found[name] = used.own
            if name == "postgres":
                found[name] += used.children + _sum_cpu(children(pid))
            elif name == "worker":
                found["steps"] = used.children
        return found

    def pss(self) -> dict[str, float]:
        """MB."""
        return {name: pss(pid) + (sum(map(pss, children(pid))) if name == "postgres" else 0.0) for name, pid in self._pids.items()}


def _sum_cpu(pids: list[int]) -> float:
    total = 0.0
    for pid in pids:
        try:
            total += cpu(pid).own
        except (FileNotFoundError, ProcessLookupError):
            continue
    return total


class Meter:
    """CPU seconds by part over a time, in a `with`."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self.cpu: dict[str, float] = {}
        self.seconds = 0.0

    def __enter__(self) -> "Meter":
        self._before, self._began = self._parts.cpu(), time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.monotonic() - self._began
        self.cpu = {name: used - self._before.get(name, 0.0) for name, used in self._parts.cpu().items()}
