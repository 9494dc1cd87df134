"""What a task's `run` names: found and checked before anything is spawned, so that every sandbox says the same when it is not there."""

import os
import stat
from collections.abc import Mapping
from pathlib import Path

import msgspec

from proto.plan import Run
from services.worker.executors.sandboxes import Folders, Sandbox


class NotRunnable(Exception):
    """The command cannot be run; the text names the field of the task and the path."""


class Command(msgspec.Struct, frozen=True):
    """`argv` as the step's own side sees it, `directory` relative to the workspace."""

    argv: list[str]
    directory: str


class Commands:
    """Finds commands. Where PATH led before is remembered, and checked."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox
        self._found: dict[tuple[str, str], str] = {}

    def find(self, run: Run, environment: Mapping[str, str], folders: Folders) -> Command:
        """Look `run.path` up: in the step's PATH or, with a slash, relative to `run.dir`. Raises NotRunnable."""
        key = environment.get("PATH", ""), run.path
        known = self._found.get(key)
        if known is not None and not run.dir and os.access(known, os.X_OK) and "\0" not in "".join(run.args):
            return Command([known, *run.args], "")
        sides = _Sides(self._sandbox, folders)
        command = _find(run, environment, sides)
        if "/" not in run.path and sides.is_the_machines(Path(command.argv[0])):
            self._found[key] = command.argv[0]
        return command


def _find(run: Run, environment: Mapping[str, str], sides: "_Sides") -> Command:
    directory = run.dir or ""
    place = sides.workspace / directory
    if (here := sides.leads(place)) is not None and not here.is_dir():
        raise NotRunnable(f"run.dir: the folder `{directory}` does not exist")
    if "\0" in run.path or any("\0" in arg for arg in run.args):
        raise NotRunnable("run: a command line cannot hold a NUL")
    if "/" in run.path:
        why = _why_not(place / run.path, sides)
        if why:
            raise NotRunnable(f"run.path: `{run.path}` {why}")
        seen = run.path if run.path.startswith("/") else os.path.normpath(place) + f"/{run.path}"
        return Command([seen, *run.args], directory)
    path = environment.get("PATH", "")
    found = ""
    for entry in path.split(":"):
        if entry.startswith("/"):
            why = _why_not(Path(entry, run.path), sides)
            if not why:
                return Command([f"{entry.rstrip('/')}/{run.path}", *run.args], directory)
            if why not in (_ABSENT, _UNSEEN) and not found:
                found = f"run.path: `{entry}/{run.path}` {why}"
    raise NotRunnable(found or f"run.path: `{run.path}` does not exist in PATH ({path})")


_ABSENT = "does not exist"
_UNSEEN = "does not exist in the sandbox"
_MOST_LINKS = 40


class _Sides:
    """Translates between the step's paths and this machine's. What the step does not see is not looked at: it would be told what is there."""

    def __init__(self, sandbox: Sandbox, folders: Folders) -> None:
        inside = sandbox.inside(folders)
        self.workspace = inside.workspace
        self._pairs = [(inside.workspace, folders.workspace), (inside.home, folders.home), (inside.temp, folders.temp)]
        self._sandbox = sandbox
        self._sees_all = sandbox.sees(Path("/"))

    def leads(self, path: Path) -> Path | None:
        """Where a path of the step's is on this machine; links in the step's own folders lead where they lead the step. None: to nothing that it is
        known to see."""
        if self._sees_all:
            return path
        here, left, links = Path("/"), [*reversed(path.parts[1:])], 0
        while left:
            if (part := left.pop()) == "..":
                here = here.parent
                continue
            here /= part
            if (own := self._own(here)) is not None and _is_link(own):
                if (links := links + 1) > _MOST_LINKS:
                    return None
                target = own.readlink()
                here = Path("/") if target.is_absolute() else here.parent
                left += reversed(target.parts[1:] if target.is_absolute() else target.parts)
        return here if self._sandbox.sees(here) else self._own(here)

    def is_link(self, path: Path) -> bool:
        folder = self.leads(path.parent)
        return folder is not None and _is_link(folder / path.name)

    def is_the_machines(self, path: Path) -> bool:
        """Whether it is the same for every step."""
        return self.leads(path) == path and not any(path.is_relative_to(host) for _, host in self._pairs)

    def _own(self, path: Path) -> Path | None:
        """Of the step's own folders; but what it is shown of this machine may lie below /home and /tmp, too."""
        if not self._sandbox.sees(path):
            for inside, host in self._pairs:
                if path.is_relative_to(inside):
                    return host / path.relative_to(inside)
        return None


def _is_link(path: Path) -> bool:
    try:
        return path.is_symlink()
    except OSError:  # too long a name, or below a folder that its maker has shut
        return False


def _why_not(path: Path, sides: _Sides) -> str:
    """Why the step could not execute a file, or ""."""
    place = sides.leads(path)
    if place is None:
        # A link to a path that only the step sees is its own affair.
        return "" if sides.is_link(path) else _UNSEEN
    try:
        mode = place.stat().st_mode
    except OSError:
        return "" if _is_link(place) else _ABSENT
    if stat.S_ISDIR(mode):
        return "is a folder"
    if not stat.S_ISREG(mode) or not os.access(place, os.X_OK):
        return "is not executable"
    return _why_no_interpreter(place, sides)


def _why_no_interpreter(place: Path, sides: _Sides) -> str:
    try:
        with place.open("rb", buffering=0) as file:
            head = file.read(256)
    except OSError:
        return ""
    if not head.startswith(b"#!"):
        return ""
    words = head[2:].split(b"\n", 1)[0].split()
    if not words or not words[0].startswith(b"/"):
        return ""
    interpreter = Path(os.fsdecode(words[0]))
    at = sides.leads(interpreter)
    if (at is not None and at.exists()) or sides.is_link(interpreter):
        return ""
    return f"needs `{interpreter}`, which does not exist"
