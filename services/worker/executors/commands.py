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
        command = _find(run, environment, self._sandbox, folders)
        if "/" not in run.path and not Path(command.argv[0]).is_relative_to(self._sandbox.inside(folders).workspace):
            self._found[key] = command.argv[0]
        return command


def _find(run: Run, environment: Mapping[str, str], sandbox: Sandbox, folders: Folders) -> Command:
    directory = run.dir or ""
    place = folders.workspace / directory
    if not place.is_dir():
        raise NotRunnable(f"run.dir: the folder `{directory}` does not exist")
    if "\0" in run.path or any("\0" in arg for arg in run.args):
        raise NotRunnable("run: a command line cannot hold a NUL")
    sides = _Sides(sandbox, folders)
    if "/" in run.path:
        host = sides.host(Path(run.path)) if run.path.startswith("/") else place / run.path
        why = _why_not(host, sides)
        if why:
            raise NotRunnable(f"run.path: `{run.path}` {why}")
        seen = run.path if run.path.startswith("/") else os.path.normpath(sandbox.inside(folders).workspace / directory) + f"/{run.path}"
        return Command([seen, *run.args], directory)
    path = environment.get("PATH", "")
    found = ""
    for entry in path.split(":"):
        if entry.startswith("/"):
            why = _why_not(sides.host(Path(entry)) / run.path, sides)
            if not why:
                return Command([f"{entry.rstrip('/')}/{run.path}", *run.args], directory)
            if why != _ABSENT and not found:
                found = f"run.path: `{entry}/{run.path}` {why}"
    raise NotRunnable(found or f"run.path: `{run.path}` does not exist in PATH ({path})")


_ABSENT = "does not exist"


class _Sides:
    """Translates between the step's paths and this machine's."""

    def __init__(self, sandbox: Sandbox, folders: Folders) -> None:
        inside = sandbox.inside(folders)
        self._pairs = [(inside.workspace, folders.workspace), (inside.home, folders.home), (inside.temp, folders.temp)]
        self._sandbox = sandbox

    def host(self, path: Path) -> Path:
        if self._sandbox.sees(path):  # also below /home and /tmp, where the rest is the step's own
            return path
        for inside, host in self._pairs:
            if path.is_relative_to(inside):
                return host / path.relative_to(inside)
        return path

    def sees(self, path: Path) -> bool:
        return any(path.is_relative_to(host) for _, host in self._pairs) or self._sandbox.sees(path)


def _why_not(path: Path, sides: _Sides) -> str:
    """Why the step could not execute a file of this machine, or ""."""
    if not sides.sees(path):
        return "does not exist in the sandbox" if path.exists() else _ABSENT
    try:
        mode = path.stat().st_mode
    except OSError:
        # A link to a path that only the step sees is its own affair.
        return "" if path.is_symlink() else _ABSENT
    if stat.S_ISDIR(mode):
        return "is a folder"
    if not stat.S_ISREG(mode) or not os.access(path, os.X_OK):
        return "is not executable"
    return _why_no_interpreter(path, sides)


def _why_no_interpreter(path: Path, sides: _Sides) -> str:
    try:
        with path.open("rb", buffering=0) as file:
            head = file.read(256)
    except OSError:
        return ""
    if not head.startswith(b"#!"):
        return ""
    words = head[2:].split(b"\n", 1)[0].split()
    if not words:
        return ""
    interpreter = Path(os.fsdecode(words[0]))
    host = sides.host(interpreter)
    if host.exists() or host.is_symlink():
        return ""
    return f"needs `{interpreter}`, which does not exist"
