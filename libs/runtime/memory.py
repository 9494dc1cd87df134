"""How this process's C library keeps memory. Bodies pass through in pieces of a megabyte and chunks of eight: glibc, left to itself, takes each
from the kernel and gives it back, which costs more than copying it several times, and keeps an arena for each thread that was ever busy."""

import ctypes
from contextlib import suppress

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8


def keep_memory(kept: int) -> None:
    """Large pieces come from one heap that all threads share, and of what is free at its end up to `kept` bytes stay. Elsewhere than on glibc nothing
    happens."""
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_ARENA_MAX, 1)
        mallopt(_MMAP_THRESHOLD, 32 << 20)
        mallopt(_TRIM_THRESHOLD, kept)


def give_back_memory() -> None:
    """All that is free."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
