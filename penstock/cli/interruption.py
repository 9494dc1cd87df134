"""Ctrl-C and SIGTERM: the first does what the command is in a position to do, the second leaves at once without touching the network.

The handlers run between any two bytecodes, also while a write to a stopped pager blocks the event loop, so the second always works.
"""

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType, TracebackType

LEFT = 130


class Interruption:
    """A context manager that holds the two signals. `first` runs on the event loop once, at the first signal, or as soon as it is set when that has
    come already and nothing was done about it."""

    def __init__(self, farewell: str) -> None:
        self._farewell = farewell
        self._loop = asyncio.get_running_loop()
        self._previous: dict[int, object] = {}
        self._first: Callable[[], object] | None = None
        self._answered = False
        self.happened = False

    def __enter__(self) -> "Interruption":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._signalled)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def cancels(self) -> None:
        """The first signal cancels the task that this is called in."""
        current = asyncio.current_task()
        self.first(current.cancel if current else None)

    def first(self, act: Callable[[], object] | None, farewell: str | None = None) -> None:
        """What the first signal does from now on; None keeps it until there is something. `farewell`: what the second says."""
        self._first = act
        self._farewell = farewell or self._farewell
        if self.happened:
            self._act()

    def _act(self) -> None:
        if self._first and not self._answered:
            self._answered = True
            self._first()

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        if self.happened:
            show_cursor = b"\x1b[?25h" if sys.stderr.isatty() else b""
            try:
                os.write(2, show_cursor + f"\n{self._farewell}\n".encode())
            finally:
                os._exit(LEFT)
        self.happened = True
        self._loop.call_soon_threadsafe(self._act)
