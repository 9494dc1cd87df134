"""Overlay mounts by mount(2), in a mount namespace of the worker's own: whatever ends the worker and its steps ends their mounts.

Where the kernel or missing rights refuse any of it, the worker does without.
"""

import contextlib
import ctypes
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

_CLONE_NEWNS = 0x20000
_MS_REC, _MS_SLAVE = 0x4000, 0x80000
_MNT_DETACH = 2
# No `index` (two files of one cached blob must not become one), no `metacopy` (a changed mode is a file of one's own);
# with `redirect_dir` a step can rename a folder that came as an input.
_OPTIONS = "redirect_dir=on,metacopy=off,index=off,xino=off"

_libc = ctypes.CDLL(None, use_errno=True)


def private_mounts() -> bool:
    """Give this process a mount namespace of its own, which still hears of the machine's mounts. Before any thread starts, as one that runs already
    stays outside. False when that is not allowed."""
    try:
        _call(_libc.unshare, ctypes.c_int(_CLONE_NEWNS))
        _mount("none", "/", None, _MS_REC | _MS_SLAVE, None)
    except OSError:
        return False
    return True


class Overlays(NamedTuple):
    """Mounts overlays, with the options that this kernel takes."""

    options: str

    def mount(self, at: Path, lower: Sequence[Path], upper: Path, work: Path) -> None:
        """`lower` (the first lies on top) seen at `at`; what is written goes to `upper`. `work` is the kernel's own. Raises OSError."""
        with contextlib.ExitStack() as opened:

            def short(path: Path) -> str:
                # The options have one page for all paths, and meaning for some of a path's characters.
                descriptor = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
                opened.callback(os.close, descriptor)
                return f"/proc/self/fd/{descriptor}"

            layers = ":".join(short(path) for path in lower)
            _mount("overlay", at, "overlay", 0, f"lowerdir={layers},upperdir={short(upper)},workdir={short(work)},{self.options}")


def unmount(at: Path) -> None:
    """Take the mount at `at` away, even when it is in use. Raises OSError."""
    _call(_libc.umount2, os.fsencode(at), ctypes.c_int(_MNT_DETACH))


def overlays_that_work(trial: Path) -> Overlays | None:
    """Mount, write, rename and unmount in folder `trial`, which is empty: the best options with which all that succeeds."""
    for options in (f"{_OPTIONS},volatile", _OPTIONS):
        overlays = Overlays(options)
        with contextlib.suppress(OSError):
            _try(overlays, trial / str(len(options)))
            return overlays
    return None


def _try(overlays: Overlays, folder: Path) -> None:
    lower, upper, work, at = (folder / name for name in ("lower", "upper", "work", "at"))
    for each in (lower / "there" / "deep", upper, work, at):
        each.mkdir(parents=True)
    (lower / "there" / "file").write_bytes(b"1")
    overlays.mount(at, [lower], upper, work)
    try:
        (at / "there" / "file").write_bytes(b"2")
        (at / "there").rename(at / "elsewhere")
        same = (at / "elsewhere" / "file").read_bytes() == b"2" and (lower / "there" / "file").read_bytes() == b"1"
    finally:
        unmount(at)
    if not same or not (upper / "elsewhere").is_dir():
        raise OSError("an overlay does not what it should")


def _mount(source: str, at: str | Path, kind: str | None, flags: int, options: str | None) -> None:
    encoded = (None if text is None else os.fsencode(text) for text in (source, at, kind))
    _call(_libc.mount, *encoded, ctypes.c_ulong(flags), None if options is None else os.fsencode(options))


def _call(function: "ctypes._NamedFuncPointer", *arguments: object) -> None:
    if function(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
