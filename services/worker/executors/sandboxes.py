"""What keeps a step's processes together, and apart from the rest. The network is the machine's own in all of them.

Each is the same three questions: what command line runs a step's, to whom SIGTERM goes, and what paths the step sees.
Killing the process group of what was spawned ends everything in the first two, because their pid namespace dies with it.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

import msgspec

from services.worker.executors.processes import descendants, send, send_group

Choice = Literal["auto", "bwrap", "unshare", "none"]


class Folders(msgspec.Struct, frozen=True):
    """An attempt's folders on this machine."""

    root: Path
    workspace: Path
    home: Path
    temp: Path

    @staticmethod
    def below(root: Path) -> "Folders":
        return Folders(root, root / "workspace", root / "home", root / "tmp")


class Sandbox(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def wraps(self) -> bool:
        """Whether a signal that ends the step comes back as exit code 128 + n of something around it."""

    @property
    def tells_on(self) -> Literal["", "stdin", "descriptor"]:
        """Where it is given a pipe's end to tell that it came up, which no step can take back; "" for what cannot fail."""

    def command(self, argv: Sequence[str], folders: Folders, directory: str, tell: tuple[int, int] = (-1, -1)) -> tuple[list[str], str]:
        """What to spawn, and where, to run `argv` in `directory` (relative to the workspace). `tell`: the pipe to tell on, if that is how: its
        read end and its write end."""

    def began(self, told: bytes) -> bool:
        """Whether `argv` was run, by all that was told."""

    def inside(self, folders: Folders) -> Folders:
        """The folders as the step sees them."""

    @property
    def mounted(self) -> Sequence[Path]:
        """The empty folders that it leaves below an attempt's: it has mounted something on them."""

    def sees(self, path: Path) -> bool:
        """Whether the step can see a path of this machine that is outside of its folders."""

    def terminate(self, pid: int) -> None:
        """SIGTERM to the step, when `pid` is what was spawned."""


class ProcessGroup:
    """A session and process group of its own, no more."""

    name = "none"
    wraps = False
    tells_on: Literal["", "stdin", "descriptor"] = ""
    mounted: Sequence[Path] = ()

    def command(self, argv: Sequence[str], folders: Folders, directory: str, tell: tuple[int, int] = (-1, -1)) -> tuple[list[str], str]:
        return list(argv), f"{folders.workspace}/{directory}"

    def began(self, told: bytes) -> bool:
        return True

    def inside(self, folders: Folders) -> Folders:
        return folders

    def sees(self, path: Path) -> bool:
        return True

    def terminate(self, pid: int) -> None:
        send_group(pid, signal.SIGTERM)


class Unshare(ProcessGroup):
    """A pid namespace. Its init is a shell that waits for the command and ends with its code, upon which the kernel ends the rest.

    SIGTERM to the whole group is right: `unshare` blocks it, and the shell as init has no handler for it, so only the step's processes hear it.
    The shell says nothing (it would name the signal that ended the command on the step's stderr) but, on stdin, that it is there. `setpriv` ties
    unshare to the worker's life.
    """

    name = "unshare"
    wraps = True
    tells_on = "stdin"
    _INIT = 'exec 3>&2 2>/dev/null; echo >&0; "$@" </dev/null 2>&3 3>&-; exit $?'

    def __init__(self, flags: Sequence[str]) -> None:
        self._prefix = [
            _found("setpriv"),
            "--pdeathsig",
            "KILL",
            _found("unshare"),
            *flags,
            "--pid",
            "--fork",
            "--kill-child",
            "--",
            "/bin/sh",
            "-c",
            self._INIT,
            "sh",
        ]

    def command(self, argv: Sequence[str], folders: Folders, directory: str, tell: tuple[int, int] = (-1, -1)) -> tuple[list[str], str]:
        return [*self._prefix, *argv], f"{folders.workspace}/{directory}"

    def began(self, told: bytes) -> bool:
        return bool(told)


class Bubblewrap:
    """bwrap: namespaces for users, pids, IPC and host name, a read-only system, no capabilities; the step sees its own folders only."""

    name = "bubblewrap"
    wraps = True
    tells_on: Literal["", "stdin", "descriptor"] = "descriptor"
    _INSIDE = Folders.below(Path("/"))
    _ETC_FILES = ("passwd", "group", "nsswitch.conf", "ld.so.cache", "ld.so.conf", "localtime", "services", "protocols", "mime.types", "os-release")
    _ETC_LIVE = ("alternatives", "ssl", "ca-certificates", "pki", "hosts", "resolv.conf")
    _BASE = ("--unshare-user", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--die-with-parent", "--cap-drop", "ALL")

    def __init__(self, etc: Path, shown: Sequence[Path]) -> None:
        """`etc` becomes a small /etc of copies; `shown` are further folders that steps may read."""
        self._shown = [path for path in dict.fromkeys(shown) if path.is_dir() and not path.is_relative_to("/usr")]
        flags = [*self._BASE, "--ro-bind", "/usr", "/usr"]
        for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
            link = Path("/", name)
            if link.is_symlink():
                flags += ["--symlink", str(link.readlink()), str(link)]
            elif link.is_dir():
                flags += ["--ro-bind", str(link), str(link)]
                self._shown.append(link)
        flags += ["--proc", "/proc", "--dev", "/dev", "--ro-bind", str(etc), "/etc"]
        for name in _make_etc(etc, self._ETC_FILES, self._ETC_LIVE):
            flags += ["--ro-bind", f"/etc/{name}", f"/etc/{name}"]
        self._flags = [_found("bwrap"), *flags]
        # After the step's own folders, which would otherwise hide an environment below /home or /tmp.
        self.mounted = [path.relative_to("/") for path in self._shown if path.is_relative_to("/home") or path.is_relative_to("/tmp")]  # noqa: S108
        self._show = [part for path in self._shown for part in ("--ro-bind", str(path), str(path))]

    def command(self, argv: Sequence[str], folders: Folders, directory: str, tell: tuple[int, int] = (-1, -1)) -> tuple[list[str], str]:
        read, write = tell
        # It keeps both ends: a bwrap that tells nobody, its worker being dead, would end before what it began has, which then waits for it for ever.
        told = ["--json-status-fd", str(write), "--sync-fd", str(read)] if write >= 0 else []
        binds = [
            part
            for host, seen in ((folders.workspace, "/workspace"), (folders.home, "/home"), (folders.temp, "/tmp"))  # noqa: S108
            for part in ("--bind", str(host), seen)
        ]
        return [*self._flags, *told, *binds, *self._show, "--chdir", f"/workspace/{directory}", "--", *argv], "/"

    def began(self, told: bytes) -> bool:
        return b'"exit-code"' in told  # which bwrap says of a command that it has run, and of nothing else

    def inside(self, folders: Folders) -> Folders:
        return self._INSIDE

    def sees(self, path: Path) -> bool:
        return any(path.is_relative_to(root) for root in (Path("/usr"), Path("/bin"), Path("/sbin"), Path("/lib"), *self._shown))

    def terminate(self, pid: int) -> None:
        # SIGTERM would end bwrap itself, and with it everything at once: it is for the step's own process group only, below bwrap's init.
        below = descendants([pid])
        init = [seen.pid for seen in below if seen.parent == pid]
        for seen in below:
            if seen.pid not in init and seen.group == pid:
                send(seen.pid, signal.SIGTERM)


def _found(tool: str) -> str:
    """Its path: a step's own PATH must have no say in it."""
    return shutil.which(tool) or tool


def _make_etc(etc: Path, files: Sequence[str], live: Sequence[str]) -> list[str]:
    """Copy the files, and make places to bind the others on (their names are given): few mounts, as each costs every step."""
    shutil.rmtree(etc, ignore_errors=True)
    etc.mkdir(parents=True)
    for name in files:
        source = Path("/etc", name)
        if source.is_file() and os.access(source, os.R_OK):
            shutil.copyfile(source, etc / name)
    found = [name for name in live if Path("/etc", name).exists()]
    for name in found:
        if Path("/etc", name).is_dir():
            (etc / name).mkdir()
        else:
            (etc / name).touch()
    return found


def first_that_works(choice: Choice, folder: Path, shown: Sequence[Path]) -> Sandbox:
    """Run `true` in each sandbox that the choice allows and take the first that works. Raises RuntimeError when the chosen one does not.

    `folder` is for the worker's own files. Being installed says nothing: where namespaces are refused, bwrap is there and fails.
    """
    for candidate in _candidates(choice, folder, shown):
        if _works(candidate, folder):
            return candidate
    raise RuntimeError(f"the sandbox `{choice}` does not work on this machine")


def interpreter_folders(path: str) -> list[Path]:
    """Folders outside /usr that a step's programs come from: this Python's, its base's, and those in PATH."""
    found = [Path(sys.prefix), Path(sys.base_prefix)]
    return found + [Path(entry) for entry in path.split(":") if entry.startswith("/") and Path(entry) != Path("/")]


def _candidates(choice: Choice, folder: Path, shown: Sequence[Path]) -> list[Sandbox]:
    found: list[Sandbox] = []
    if choice in ("auto", "bwrap") and shutil.which("bwrap"):
        found.append(Bubblewrap(folder / "etc", shown))
    if choice in ("auto", "unshare") and shutil.which("unshare") and shutil.which("setpriv"):
        user: Sequence[str] = () if os.geteuid() == 0 else ("--user", "--map-current-user")
        found += [Unshare((*user, "--mount-proc")), Unshare(("--user", "--map-current-user", "--mount-proc")), Unshare(user)]
    if choice in ("auto", "none"):
        found.append(ProcessGroup())
    return found


def _works(sandbox: Sandbox, folder: Path) -> bool:
    folders = Folders.below(folder / "trial")
    for path in (folders.workspace, folders.home, folders.temp):
        path.mkdir(parents=True, exist_ok=True)
    argv, cwd = sandbox.command(["/bin/sh", "-c", "exec true"], folders, "")
    try:
        return subprocess.run(argv, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, timeout=10, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False
    finally:
        shutil.rmtree(folders.root, ignore_errors=True)
