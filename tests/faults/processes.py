"""What runs on this machine, as /proc tells it."""

import os
from collections.abc import Iterator
from pathlib import Path

import msgspec


class Process(msgspec.Struct, frozen=True):
    """A process that has not ended (a zombie has). `environ` and `cwd` are empty where they may not be read."""

    pid: int
    parent: int
    command: str
    environ: str
    cwd: str

    def __str__(self) -> str:
        return f"{self.pid} (child of {self.parent}): {self.command}"

    def mentions(self, words: str) -> bool:
        return any(words in text for text in (self.command, self.environ, self.cwd))


def processes() -> Iterator[Process]:
    """All but this one."""
    for folder in Path("/proc").glob("[0-9]*"):
        pid = int(folder.name)
        try:
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            command = _words(folder / "cmdline")
        except OSError:
            continue
        if state not in "ZX" and pid != os.getpid():
            yield Process(pid, int(parent), command, _words(folder / "environ"), _link(folder / "cwd"))


def concerned(words: str) -> list[Process]:
    """Those whose command, environment or working directory holds the words, and everything that descends from them."""
    known = {process.pid: process for process in processes()}
    return [known[pid] for pid in sorted(_family({pid for pid, process in known.items() if process.mentions(words)}, known))]


def descendants(pid: int) -> list[int]:
    """A process and all that descends from it."""
    return sorted(_family({pid}, {process.pid: process for process in processes()}))


def _family(first: set[int], known: dict[int, Process]) -> set[int]:
    found, before = set(first), 0
    while before != len(found):
        before = len(found)
        found |= {pid for pid, process in known.items() if process.parent in found}
    return found


def _words(path: Path) -> str:
    try:
        return path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def _link(path: Path) -> str:
    try:
        return str(path.readlink())
    except OSError:
        return ""
