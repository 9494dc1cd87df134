"""What is written where: stdout carries a task's stdout (or JSON, or a list) and nothing else; its stderr, and all that Penstock has to say, go to
stderr. Colours and bars only on a terminal that wants them (NO_COLOR, TERM=dumb)."""

import codecs
import contextlib
import os
import select
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, BinaryIO

import click

from penstock.cli.harmless import Harmless

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from penstock.client import Transfer

UNWATCHED = 0.25  # seconds: what is over sooner gets no bar
STATUS_COLOURS = {"succeeded": "green", "failed": "red", "errored": "magenta", "aborted": "yellow", "started": "cyan"}


class Terminal:
    """The process's two streams. `reader_gone`: nobody reads stdout any more."""

    def __init__(self, environ: Mapping[str, str] = os.environ, *, log_to_stderr: bool = False) -> None:
        self._out: BinaryIO = sys.stderr.buffer if log_to_stderr else sys.stdout.buffer
        self._err: BinaryIO = sys.stderr.buffer
        self._fancy = sys.stderr.isatty() and environ.get("TERM", "") not in ("", "dumb")
        self._colour = self._fancy and not environ.get("NO_COLOR")
        self._redraws = sys.stdout.isatty() and environ.get("TERM", "") not in ("", "dumb")
        self._colour_out = sys.stdout.isatty() and not environ.get("NO_COLOR") and environ.get("TERM", "") not in ("", "dumb")
        self._shared = log_to_stderr or _same_file(sys.stdout.fileno(), sys.stderr.fileno())
        self._open = {"stdout": False, "stderr": False}  # whether the last line that was written there lacks its end
        onto = {"stdout": sys.stderr if log_to_stderr else sys.stdout, "stderr": sys.stderr}
        self._harmless = {stream: Harmless() for stream, file in onto.items() if file.isatty()}
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.reader_gone = False

    def styled(self, text: str, colour: str | None = None, *, dim: bool = False) -> str:
        """The text as stdout shows it: in colour on a terminal that wants it."""
        return click.style(text, fg=colour, dim=dim or None) if (colour or dim) and self._colour_out else text

    def say(self, text: str, colour: str | None = None) -> None:
        """A line of our own, or several."""
        self.end_line()
        if "stderr" in self._harmless:
            text = Harmless()(text)
        with contextlib.suppress(OSError):
            self._err.write((click.style(text, fg=colour) if colour and self._colour else text).encode("utf-8", "replace") + b"\n")
            self._err.flush()

    @property
    def can_redraw(self) -> bool:
        """Whether stdout is a terminal on which what was shown can be shown anew in its place."""
        return self._redraws

    @property
    def is_read_by_a_person(self) -> bool:
        """Whether stdout is a terminal."""
        return "stdout" in self._harmless

    @property
    def columns(self) -> int | None:
        """How wide the terminal is that stdout is."""
        return shutil.get_terminal_size().columns if self.is_read_by_a_person else None

    def clear(self) -> None:
        """Begin anew at the top; what was there before stays where one scrolls to."""
        self.write(b"\x1b[H\x1b[2J")

    def look_for_reader(self) -> None:
        """Notice that nobody reads stdout any more without writing to it."""
        poll = select.poll()
        poll.register(self._out.fileno(), 0)
        self.reader_gone = self.reader_gone or any(what & (select.POLLERR | select.POLLHUP) for _, what in poll.poll(0))

    def end_line(self) -> None:
        """End what a task left unended where our lines and bars go: its line and its colours."""
        self.restore()
        if self._open["stderr"] or (self._shared and self._open["stdout"]):
            self._open = {"stdout": self._open["stdout"] and not self._shared, "stderr": False}
            with contextlib.suppress(OSError):
                self._err.write(b"\n")
                self._err.flush()

    def restore(self) -> None:
        """Take back the colours that a task has left on."""
        styled = [harmless for stream, harmless in self._harmless.items() if harmless.styled and (self._shared or stream == "stderr")]
        for harmless in styled:
            harmless.styled = False
        if styled:
            with contextlib.suppress(OSError):
                self._err.write(b"\x1b[0m")
                self._err.flush()

    def log(self, stream: str, text: str) -> None:
        """What a task wrote, on the stream that it wrote it to; a terminal gets of it what cannot harm it."""
        if stream in self._harmless:
            text = self._harmless[stream](text)
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

    def log_bytes(self, data: bytes) -> None:
        """What a task wrote, byte for byte, on stdout; a terminal, again, gets what cannot harm it."""
        if "stdout" in self._harmless:
            self.log("stdout", self._decoder.decode(data))
        else:
            self.write(data)

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
    def bars(self) -> Iterator["Bars"]:
        """Progress of several transfers at once, drawn while they take long enough to be watched, and a line for each when it is done."""
        bars = Bars(self, drawn=self._fancy)
        try:
            yield bars
        finally:
            bars.close()


def _same_file(one: int, other: int) -> bool:
    """Whether both lead to one place: a terminal, or `2>&1`."""
    try:
        return os.path.sameopenfile(one, other)
    except OSError:
        return False


class Bars:
    """One bar for each transfer, for its phases one after another; what need not be moved is not counted in it."""

    def __init__(self, terminal: Terminal, *, drawn: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._terminal = terminal
        self._drawn = drawn
        self._clock = clock
        self._began = clock()
        self._progress: Progress | None = None
        self._bars: dict[str, tuple[TaskID, str]] = {}  # with the phase that it shows
        self._seen: dict[str, dict[str, Transfer]] = {}

    def add(self, name: str) -> Callable[["Transfer"], None]:
        """A transfer; call the result with how far it is."""
        self._seen[name] = {}

        def told(transfer: "Transfer") -> None:
            self._seen[name][transfer.phase] = transfer
            if self._drawn and (self._progress or self._clock() - self._began > UNWATCHED):
                self._draw(name, transfer)

        return told

    def moved(self, name: str, phase: str) -> int | None:
        """The bytes that the transfer moved in the phase; None when it did not come to it."""
        transfer = self._seen[name].get(phase)
        return transfer.done if transfer else None

    def done(self, name: str, line: str) -> None:
        """The transfer is complete, which the line says in place of its bar."""
        if self._progress is None:
            self._terminal.say(line)
            return
        if name in self._bars:
            self._progress.remove_task(self._bars.pop(name)[0])
        self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Take the bars away."""
        if self._progress:
            self._progress.stop()

    def _draw(self, name: str, transfer: "Transfer") -> None:
        progress = self._progress = self._progress or self._begun()
        bar, phase = self._bars.get(name) or (progress.add_task("", total=None), "")
        self._bars[name] = bar, transfer.phase
        if phase == transfer.phase:
            progress.update(bar, total=transfer.total, completed=transfer.done)
        else:
            progress.reset(bar, description=f"{transfer.phase} {name}", total=transfer.total, completed=transfer.done)  # its speed is its own

    def _begun(self) -> "Progress":
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

        self._terminal.end_line()  # a bar would be drawn over it
        text = TextColumn("{task.description}", markup=False)
        progress = Progress(
            text,
            BarColumn(bar_width=30),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        progress.start()
        return progress


def printable(text: str) -> str:
    """A name from elsewhere, in which nothing can move the cursor or end the line."""
    return text if text.isprintable() else "".join(char if char.isprintable() else _escaped(char) for char in text)


def _escaped(char: str) -> str:
    code = ord(char)
    return f"\\x{code & 0xFF:02x}" if code < 0x100 or 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"  # surrogates are the bytes that were no UTF-8
