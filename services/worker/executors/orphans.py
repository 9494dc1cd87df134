"""Processes that outlive the step that made them: found and killed.

In a pid namespace the kernel does this. Without one, the worker is a subreaper: a daemon that forked itself free is the worker's
child, and is the step's whose folder its environment names or whose session it is in. One that names nothing is killed once no step that
could have made it runs.
Children that this process had before, and those in its own session, are none of it: a step has a session of its own, and cannot leave it for ours.

A worker that dies by SIGKILL leaves its steps running; `kill_left_behind` removes them at the next start by what `record` wrote down
(pid and start time, the session it leads, daemons that were adopted) and by the folder in their environment.
"""

import contextlib
import os
import signal
from pathlib import Path

from services.worker.executors.processes import (
    Seen,
    adopt_orphans,
    children_of_this_process,
    descendants,
    everything,
    look,
    names_in_environment,
    send,
)


class Orphans:
    """The steps of this worker that run, and what they leave behind. `notes` is the file in which running steps are noted."""

    def __init__(self, notes: Path, folders: Path) -> None:
        self._notes = notes
        self._folders = folders
        self._running: dict[int, tuple[bytes, int]] = {}
        self._others: frozenset[tuple[int, int]] = frozenset()
        self._file: int | None = None
        self._adopting = False
        self._noted: set[tuple[int, int]] = set()

    def start(self) -> int:
        """Kill what an earlier life left. Gives the number of processes killed."""
        killed = kill_left_behind(self._notes, self._folders)
        self._notes.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self._notes, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
        return killed

    def adopt(self) -> None:
        """Without a pid namespace: adopt what steps lose. In one the kernel ends it, and there is nothing to do here."""
        self._adopting = True
        self._others = frozenset((seen.pid, seen.started) for pid in children_of_this_process() if (seen := look(pid)) is not None)
        adopt_orphans(True)

    def close(self) -> None:
        if self._adopting:
            adopt_orphans(False)
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def on_started(self, pid: int, folder: Path) -> None:
        """Note a step's process. A full disk loses the note, not the step: the folder in its environment still tells."""
        seen = look(pid)
        started = seen.started if seen else 0
        self._running[pid] = (os.fsencode(folder) + b"/", started)
        self._note(pid, started)

    def on_ended(self, pid: int) -> None:
        """The step's process is reaped: kill what it left."""
        ended = self._running.pop(pid, None)
        if ended is not None and self._adopting:
            self._kill(ended[0], pid)
        if not self._running and self._file is not None:
            os.ftruncate(self._file, 0)
            self._noted.clear()

    def sweep(self) -> None:
        """Reap adopted zombies, and kill what belongs to no running step."""
        if self._adopting:
            self._kill(None, 0)

    def _kill(self, folder: bytes | None, session: int) -> None:
        for _ in range(100):
            strangers = [seen for pid in children_of_this_process() if pid not in self._running and (seen := look(pid)) is not None]
            doomed = [seen for seen in strangers if self._is_doomed(seen, folder, session)]
            if not doomed:
                self._note_adopted(strangers)
                return
            for seen in [*doomed, *descendants([seen.pid for seen in doomed])]:
                send(seen.pid, signal.SIGKILL)
            for seen in doomed:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(seen.pid, 0)

    def _note(self, pid: int, started: int) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.write(self._file, b"%d %d\n" % (pid, started))

    def _note_adopted(self, strangers: list[Seen]) -> None:
        """A running step's daemon that may name nothing: after a SIGKILL of the worker only the note tells whose it was."""
        for seen in strangers:
            key = (seen.pid, seen.started)
            if key not in self._noted and key not in self._others and seen.state != "Z":
                self._noted.add(key)
                self._note(*key)

    def _is_doomed(self, seen: Seen, folder: bytes | None, session: int) -> bool:
        if (seen.pid, seen.started) in self._others or seen.session == os.getsid(0):
            return False
        if seen.state == "Z":
            with contextlib.suppress(ChildProcessError):
                os.waitpid(seen.pid, os.WNOHANG)
            return False
        if session and seen.session == session:
            return True
        if folder is not None and names_in_environment(seen.pid, folder):
            return True
        return not any(
            seen.session == pid or names_in_environment(seen.pid, mark) or seen.started >= started for pid, (mark, started) in self._running.items()
        )


def kill_left_behind(notes: Path, folders: Path) -> int:
    """Kill every process of an earlier life of this worker, until none is left. Gives their number."""
    recorded: dict[int, int] = {}
    with contextlib.suppress(FileNotFoundError, ValueError):
        for line in notes.read_text().splitlines():
            number, started = line.split()
            recorded[int(number)] = int(started)
    mark = os.fsencode(folders) + b"/"
    killed: set[int] = set()
    for _ in range(100):
        alive = [seen for seen in everything() if seen.state != "Z" and seen.pid != os.getpid()]
        leaders = {seen.pid: seen.started for seen in alive}
        reused = {pid for pid, began in recorded.items() if leaders.get(pid, began) != began}
        roots = [seen.pid for seen in alive if (recorded.keys() - reused) & {seen.pid, seen.session} or names_in_environment(seen.pid, mark)]
        doomed = {*roots, *(seen.pid for seen in descendants(roots) if seen.state != "Z")}
        if not doomed:
            break
        for pid in doomed:
            send(pid, signal.SIGKILL)
        killed |= doomed
    return len(killed)
