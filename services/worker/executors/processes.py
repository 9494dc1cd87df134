"""What runs on this machine, as /proc tells it."""

import contextlib
import ctypes
import os
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

_PR_SET_CHILD_SUBREAPER = 36


class Seen(NamedTuple):
    """A process as it was found. `started` in clock ticks since the machine's boot: with the pid it names one process."""

    pid: int
    state: str
    parent: int
    group: int
    session: int
    started: int


def look(pid: int) -> Seen | None:
    """One process, or None when there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text[text.rindex(b")") + 2 :].split()
    return Seen(pid, fields[0].decode(), int(fields[1]), int(fields[2]), int(fields[3]), int(fields[19]))


def everything() -> Iterator[Seen]:
    """Every process there is, zombies included."""
    with os.scandir("/proc") as entries:
        pids = [int(entry.name) for entry in entries if entry.name.isdigit()]
    for pid in pids:
        if (seen := look(pid)) is not None:
            yield seen


def descendants(roots: Iterable[int]) -> list[Seen]:
    """All processes below `roots`, parents before children."""
    children: dict[int, list[Seen]] = {}
    for seen in everything():
        children.setdefault(seen.parent, []).append(seen)
    found: list[Seen] = []
    waiting = list(roots)
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += [seen.pid for seen in below]
    return found


def children_of_this_process() -> list[int]:
    """Children, those adopted as subreaper among them. Adopted ones are always the main thread's."""
    me = os.getpid()
    try:
        return [int(pid) for pid in Path(f"/proc/{me}/task/{me}/children").read_bytes().split()]
    except FileNotFoundError:
        return [seen.pid for seen in everything() if seen.parent == me]


def names_in_environment(pid: int, text: bytes) -> bool:
    """Whether the environment that a process began with holds `text`."""
    try:
        return text in Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False


def send(pid: int, number: signal.Signals) -> None:
    """Signal one process, if it is still there."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def send_group(group: int, number: signal.Signals) -> None:
    """Signal a process group, if anything of it is still there."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def adopt_orphans(yes: bool) -> None:
    """Become the parent of every descendant whose own parent dies, so that a daemon cannot slip away."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, int(yes), 0, 0, 0)
