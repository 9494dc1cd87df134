"""Signals of a supervisor: counted, never acted upon in the middle of something, and a way to wait for the next one."""

import select
import signal
import socket
from types import FrameType, TracebackType
from typing import Self

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Signals:
    """While entered, SIGTERM, SIGINT and SIGHUP only count in `stops` (the first asks for an orderly end, the second forces it), and they and SIGCHLD
    end `wait`. Main thread only."""

    def __init__(self) -> None:
        self.stops = 0
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        for number in (*STOPS, signal.SIGCHLD):
            self._before[number] = signal.signal(number, self._arrived)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        signal.set_wakeup_fd(-1)
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal() gave, it takes
        self._close()

    def _arrived(self, number: int, _frame: FrameType | None) -> None:
        if number != signal.SIGCHLD:
            self.stops += 1

    def wait(self, timeout: float) -> None:
        """Return at the next signal (at once if one came since the last wait), or after `timeout` seconds."""
        if select.select([self._reader], [], [], max(timeout, 0.0))[0]:
            self._reader.recv(4096)

    def forget(self) -> None:
        """In a forked child: every signal as it is by default."""
        signal.set_wakeup_fd(-1)
        for number in (*STOPS, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        self._close()

    def _close(self) -> None:
        self._reader.close()
        self._writer.close()
