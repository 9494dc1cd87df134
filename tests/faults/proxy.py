"""A TCP proxy that breaks what goes through it: after so many bytes, or altogether."""

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from types import TracebackType

_PIECE = 64 << 10
_RESET = struct.pack("ii", 1, 0)


class Proxy:
    """A context manager. It listens on `port` and leads to a port of this machine. `budget` is asked for each connection: after so many bytes, either
    way, it is reset (None: never)."""

    def __init__(self, to: int, budget: Callable[[], int | None] = lambda: None) -> None:
        self._to = to
        self._budget = budget
        # It has the port while nobody listens, so that none else gets it.
        self._place = _reusable()
        self._place.bind(("127.0.0.1", 0))
        self.port: int = self._place.getsockname()[1]
        self.cut = 0
        """Connections that were reset."""
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listener: socket.socket | None = None
        self._refusals = 0

    def __enter__(self) -> "Proxy":
        self._listen()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._refuse()
        self._place.close()
        for thread in self._threads:
            thread.join()

    @contextlib.contextmanager
    def refusing(self) -> Iterator[None]:
        """Every connection is reset, and no new one made; by several at once until the last is over."""
        self._refusals += 1
        self._refuse()
        try:
            yield
        finally:
            self._refusals -= 1
            if not self._refusals:
                self._listen()

    def _listen(self) -> None:
        listener = _reusable()
        listener.bind(("127.0.0.1", self.port))
        listener.listen(128)
        self._listener = listener
        self._run(self._accept, listener)

    def _refuse(self) -> None:
        if self._listener is not None:
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes whoever accepts
            self._listener.close()
            self._listener = None
        with self._lock:
            for end in self._open:
                _hang_up(end)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self._to))
            except OSError:
                _hang_up(client)
                client.close()
                continue
            with self._lock:
                self._open |= {client, server}
            left, both = [self._budget()], threading.Barrier(2)
            self._run(self._pipe, client, server, left, both)
            self._run(self._pipe, server, client, left, both)

    def _pipe(self, source: socket.socket, target: socket.socket, left: list[int | None], both: threading.Barrier) -> None:
        try:
            while data := source.recv(_PIECE):
                with self._lock:
                    allowed = left[0]
                    if allowed is not None:
                        left[0] = max(allowed - len(data), 0)
                target.sendall(data if allowed is None else data[:allowed])
                if allowed is not None and allowed <= len(data):
                    with self._lock:
                        self.cut += 1
                    _hang_up(source)
                    _hang_up(target)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            _hang_up(source)
            _hang_up(target)
        both.wait()
        with self._lock:
            self._open -= {source}
        source.close()

    def _run(self, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments)
        self._threads.append(thread)
        thread.start()


def _reusable() -> socket.socket:
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    return made


def _hang_up(end: socket.socket) -> None:
    """Whoever waits for it is told; when it is closed, the other side is."""
    with contextlib.suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        end.shutdown(socket.SHUT_RDWR)
