"""Which process is meant, and how long it may live: what Linux knows of pids."""

import ctypes
import os
import random
import signal
import socket
from collections.abc import Sequence
from pathlib import Path

import msgspec

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_libc = ctypes.CDLL(None, use_errno=True)


class Identity(msgspec.Struct, frozen=True):
    """A process that no later one with the same pid passes for. `started`: the boot's id, and the ticks since it."""

    pid: int
    started: str


def identify(pid: int) -> Identity | None:
    """Who has this pid now; None when nobody does. A zombie has ended, so it counts as nobody."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
    # The name in parentheses may hold spaces and parentheses itself; the state is field 3, the start time field 22.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else Identity(pid, f"{boot}:{fields[19]}")


def is_alive(process: Identity) -> bool:
    return identify(process.pid) == process


def send(process: Identity, number: signal.Signals) -> bool:
    """Signal exactly this process; False when it is gone."""
    try:
        handle = os.pidfd_open(process.pid)
    except OSError:
        return False
    try:
        # Between the opening and here the pid cannot have changed hands unseen: the handle is of whoever is identified now.
        if not is_alive(process):
            return False
        signal.pidfd_send_signal(handle, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(handle)
    return True


def die_with_parent(number: signal.Signals, parent: int) -> None:
    """Have the kernel send `number` to this process when the thread that forked it ends. Called in the child, which ends at once if `parent`
    has ended before the call."""
    if _libc.prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def name_process(name: str) -> None:
    """What `ps` and `top` show (15 bytes)."""
    _libc.prctl(_PR_SET_NAME, name.encode()[:15], 0, 0, 0)


def is_free(port: int) -> bool:
    """Whether a server could listen on 127.0.0.1:`port` now."""
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


def free_port(avoid: set[int]) -> int:
    """A port that nobody listens on, outside the range that the kernel gives to outgoing connections: a client that calls a server which is down
    could otherwise be given the server's own port, connect to itself, and keep the server from coming back."""
    low, high = (int(word) for word in Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    outside: Sequence[int] = [*range(20000, low), *range(high + 1, 65536)] or range(20000, 65536)
    for port in random.sample(outside, len(outside)):
        if port not in avoid and is_free(port):
            return port
    raise OSError("no port is free on 127.0.0.1")
