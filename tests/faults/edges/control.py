"""How a test tells a watched process what to do: files in a folder, made and removed by rename, so that each is whole or not there."""

import os
import threading
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import msgspec

from penstock.up.processes import Identity, identify


class Order(NamedTuple):
    """Die at the n-th time that something of this name is crossed, counted from when the order came."""

    id: str
    nth: int
    name: str


class Control:
    """The test's side of one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: Counter[str] = Counter()

    def record(self, on: bool) -> None:
        path = self._folder / "record"
        path.touch() if on else path.unlink()

    def recorded(self, service: str) -> Counter[str]:
        """How often each name was crossed since the last call."""
        try:
            with (self._folder / f"{service}.seen").open("rb") as file:
                file.seek(self._read[service])
                lines, end, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:
            return Counter()
        self._read[service] += len(lines + end)
        return Counter(lines.decode().splitlines())

    def arm(self, service: str, order: Order) -> None:
        """The last order was carried out, or is withdrawn."""
        (self._folder / f"{service}.died").unlink(missing_ok=True)
        new = self._folder / f"{service}.new"
        new.write_text("\n".join((order.id, str(order.nth), order.name)))
        new.rename(self._folder / f"{service}.order")

    def died(self, service: str) -> Identity | None:
        """Who carried the order out, and is dead or about to be."""
        if not (self._folder / f"{service}.died").exists():
            return None
        return msgspec.json.decode((self._folder / f"{service}.who").read_bytes(), type=Identity)

    def disarm(self, service: str) -> bool:
        """False when it was carried out already."""
        try:
            (self._folder / f"{service}.order").unlink()
        except FileNotFoundError:
            return False
        return True


_open, _read, _write, _close, _rename, _getpid, _kill, _access = os.open, os.read, os.write, os.close, os.rename, os.getpid, os.kill, os.access


class Watched:
    """The process's side, made of the original calls, whatever they are wrapped into later. `service` is empty until the process knows who it is;
    what it forks afterwards is not meant."""

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
                self._put("seen", os.O_APPEND, f"{name}\n".encode())
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
        """By the order, which is carried out thereby: who comes after may pass. Lives on if it was withdrawn meanwhile."""
        self._put("who", os.O_TRUNC, msgspec.json.encode(identify(self._pid)))
        try:
            _rename(f"{self._folder}/{self._service}.order", f"{self._folder}/{self._service}.died")
        except FileNotFoundError:
            return
        _kill(self._pid, 9)

    def _put(self, name: str, how: int, content: bytes) -> None:
        file = _open(f"{self._folder}/{self._service}.{name}", os.O_WRONLY | os.O_CREAT | how, 0o600)
        _write(file, content)
        _close(file)
