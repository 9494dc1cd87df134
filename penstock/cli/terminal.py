"""What is written where: stdout carries a task's stdout (or JSON, or a list) and nothing else; its stderr, and all that Penstock has to say, go to
stderr. Colours and bars only on a terminal that wants them (NO_COLOR, TERM=dumb)."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, BinaryIO

import click

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

STATUS_COLOURS = {"succeeded": "green", "failed": "red", "errored": "magenta", "aborted": "yellow", "started": "cyan"}


class Terminal:
    """The process's two streams. `reader_gone`: nobody reads stdout any more."""

    def __init__(self, environ: Mapping[str, str] = os.environ, *, log_to_stderr: bool = False) -> None:
        self._out: BinaryIO = sys.stderr.buffer if log_to_stderr else sys.stdout.buffer
        self._err: BinaryIO = sys.stderr.buffer
        self._fancy = sys.stderr.isatty() and environ.get("TERM", "") not in ("", "dumb")
        self._colour = self._fancy and not environ.get("NO_COLOR")
        self.coloured = not environ.get("NO_COLOR") and environ.get("TERM", "") not in ("", "dumb")
        self._shared = log_to_stderr or _same_file(sys.stdout.fileno(), sys.stderr.fileno())
        self._open = {"stdout": False, "stderr": False}  # whether the last line that was written there lacks its end
        self.reader_gone = False

    def say(self, text: str, colour: str | None = None) -> None:
        """A line of our own."""
        self._end_line()
        with contextlib.suppress(OSError):
            self._err.write((click.style(text, fg=colour) if colour and self._colour else text).encode("utf-8", "replace") + b"\n")
            self._err.flush()

    def _end_line(self) -> None:
        """End what a task left unended where our lines and bars go."""
        if self._open["stderr"] or (self._shared and self._open["stdout"]):
            self._open = {"stdout": self._open["stdout"] and not self._shared, "stderr": False}
            with contextlib.suppress(OSError):
                self._err.write(b"\n")
                self._err.flush()

    def log(self, stream: str, text: str) -> None:
        """What a task wrote, on the stream that it wrote it to."""
        if not text:
            return
        stderr = stream == "stderr"
        self._open["stderr" if stderr else "stdout"] = not text.endswith("\n")
        if stderr:
            with contextlib.suppress(OSError):
                self._err.write(text.encode("utf-8", "replace"))
                self._err.flush()
        else:
            self.write(text.encode("utf-8", "replace"))

    def write(self, data: bytes) -> None:
        """Bytes on stdout."""
        if self.reader_gone:
            return
        try:
            self._out.write(data)
            self._out.flush()
        except BrokenPipeError:
            self.reader_gone = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._out.fileno())

    @contextlib.contextmanager
    def bars(self, verb: str) -> Iterator["Bars"]:
        """Progress of several transfers at once; without a terminal, one line for each when it is done."""
        if not self._fancy:
            yield Bars(verb, self, None)
            return
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

        self._end_line()  # a bar would be drawn over it
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), DownloadColumn(), TransferSpeedColumn())
        with Progress(*columns, console=Console(stderr=True), auto_refresh=True) as progress:
            yield Bars(verb, self, progress)


def _same_file(one: int, other: int) -> bool:
    """Whether both lead to one place: a terminal, or `2>&1`."""
    try:
        return os.path.sameopenfile(one, other)
    except OSError:
        return False


class Bars:
    """One bar for each transfer."""

    def __init__(self, verb: str, terminal: Terminal, progress: "Progress | None") -> None:
        self._verb = verb
        self._terminal = terminal
        self._progress = progress
        self._ids: dict[str, TaskID] = {}

    def add(self, name: str, size: int) -> Callable[[int], None]:
        """A transfer of so many bytes; call the result with the bytes done."""
        if self._progress is None:
            return lambda done: None
        progress = self._progress
        bar = self._ids[name] = progress.add_task(f"{self._verb} {name}", total=size)
        return lambda done: progress.update(bar, completed=done)

    def done(self, name: str, size: int, files: int) -> None:
        """The transfer is complete."""
        if self._progress is not None:
            self._progress.update(self._ids[name], completed=size, total=size)
        else:
            self._terminal.say(f"{self._verb} {name}: {files:,} file{'' if files == 1 else 's'}, {readable_size(size)}")


def readable_size(size: float) -> str:
    """Bytes for people, in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
