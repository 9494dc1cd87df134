"""How a test tells a watched process what to do: files in a folder, made and removed by rename, so that each is whole or not there."""

import os
import threading
from collections import Counter
from pathlib import Path
from typing import NamedTuple


class Order(NamedTuple):
    """Die at the n-th time that something of this name is crossed, counted from when the order came."""

    id: str
    nth: int
    name: str


class Control:
    """One folder. `read` is asked at each crossing, so it is made of the original calls, whatever they are wrapped into later."""

    def __init__(self, folder: Path) -> None:
        self._folder = str(folder)

    # --- the test's side

    def record(self, on: bool) -> None:
        path = Path(self._folder) / "record"
        path.touch() if on else path.unlink()

    def recorded(self, service: str) -> Counter[str]:
        """How often each name was crossed since the last call."""
        path = Path(self._folder) / f"{service}.seen"
        names = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return Counter(names)

    def arm(self, service: str, order: Order) -> None:
        path = Path(self._folder) / f"{service}.order"
        path.with_suffix(".new").write_text("\n".join((order.id, str(order.nth), order.name)))
        path.with_suffix(".new").rename(path)

    def armed(self, service: str) -> bool:
        """Whether the order was not carried out yet."""
        return (Path(self._folder) / f"{service}.order").exists()

    def disarm(self, service: str) -> bool:
        """False when it was carried out already."""
        try:
            (Path(self._folder) / f"{service}.order").unlink()
        except FileNotFoundError:
            return False
        return True


_open, _read, _write, _close, _unlink, _getpid, _kill, _access = os.open, os.read, os.write, os.close, os.unlink, os.getpid, os.kill, os.access


class Watched:
    """The process's side. `service` is empty until the process knows who it is; what it forks afterwards is not meant."""

    def __init__(self, folder: Path) -> None:
        self._folder = str(folder)
        self._service = ""
        self._pid = 0
        self._order = ""
        self._count = 0
        self._lock = threading.RLock()

    def begin(self, service: str) -> None:
        self._service, self._pid = service, _getpid()

    @property
    def on(self) -> bool:
        return bool(self._service) and self._pid == _getpid()

    def crossed(self, name: str) -> bool:
        """Whether to die here. Records it when that is asked for."""
        with self._lock:
            if _access(f"{self._folder}/record", os.F_OK):
                seen = _open(f"{self._folder}/{self._service}.seen", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
                _write(seen, f"{name}\n".encode())
                _close(seen)
            try:
                file = _open(f"{self._folder}/{self._service}.order", os.O_RDONLY)
            except FileNotFoundError:
                return False
            id, nth, wanted = _read(file, 4096).decode().split("\n")
            _close(file)
            if id != self._order:
                self._order, self._count = id, 0
            if name != wanted:
                return False
            self._count += 1
            return self._count == int(nth)

    def die(self) -> None:
        """By the order, which is carried out thereby: who comes after may pass."""
        _unlink(f"{self._folder}/{self._service}.order")
        _kill(self._pid, 9)
