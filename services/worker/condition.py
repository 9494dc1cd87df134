"""How the worker's machine is, and what follows from it: whether it can take work and, in pull mode, whether it wants any. What decides is pure."""

import os
import socket
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from proto.messages import MAX_SHORT, About, Mode

DISK_NEEDED = 64 << 20
"""Bytes without which a step could not even write its log; of a small disk, a twentieth is enough."""
DISK_WANTED = 1 << 30
"""Bytes without which a worker that may choose takes nothing new."""


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """`load`: processes that run or wait to run, over the last minute; `disk_free`, `disk_size`: bytes."""

    load: float
    disk_free: int
    disk_size: int


class Condition(msgspec.Struct, frozen=True, kw_only=True):
    """What a heartbeat says of it. `trouble`: why no work can be taken; `no_images`: why none with an image, though it offers that else; `sated`: why
    none is wanted, by whoever may choose; `cache_*`: bytes."""

    trouble: str = ""
    no_images: str = ""
    sated: str = ""
    cache_used: int = 0
    cache_limit: int = 0


FINE = Condition()


def about(mode: Mode, version: str, bus: str) -> About:
    """What the worker says of itself; `bus` is the URL (or several, by commas) that it reaches the bus by."""
    return About(version=version, hostname=socket.gethostname()[:MAX_SHORT], address=_address(bus), mode=mode)


def _address(bus: str) -> str:
    """This machine's address on the way there; no packet is sent."""
    url = urlsplit(bus.partition(",")[0])
    try:
        family, kind, _, _, there = socket.getaddrinfo(url.hostname, url.port or 4222, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as way:
            way.connect(there)
            return str(way.getsockname()[0])
    except (OSError, ValueError):
        return ""


def measure(folder: Path) -> Measured:
    """The machine now; `folder` is on the disk that counts. Raises OSError."""
    disk = os.statvfs(folder)
    return Measured(load=os.getloadavg()[0], disk_free=disk.f_bavail * disk.f_frsize, disk_size=disk.f_blocks * disk.f_frsize)


def trouble(measured: Measured) -> str:
    """Why nothing can be run, for people; "" when it can."""
    if measured.disk_free < min(DISK_NEEDED, measured.disk_size // 20):
        return f"disk full: {measured.disk_free >> 20} MiB free"
    return ""


def sated(measured: Measured, most_load: float) -> str:
    """Why the machine has no room for more, for people; "" when it does less than it could, and its disk is far from full."""
    if measured.load >= most_load:
        return f"its load is {measured.load:.1f}, and it wants work below {most_load:g}"
    if measured.disk_free < DISK_WANTED:
        return f"its disk has {measured.disk_free >> 20} MiB free, and it wants work from {DISK_WANTED >> 20} MiB on"
    return ""
