"""A disk of the system's own, and its power cut: what the file system had not written out is gone, as are all processes, in one moment."""

import fcntl
import os
import signal
import struct
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from tests.controls import eventually
from tests.faults.system import System
from tests.faults.traffic import END_SECONDS, Traffic

BYTES = 2 << 30
PARTS = "pg nats blobs workers"
"""Of the data folder, what lies on the disk: all that changes."""
ON_THE_DISK = f"""
set -e
cd "$PENSTOCK_DATA"
mkdir -p disk
mount -o loop "$0" disk
for part in {PARTS}; do
    [ -e disk/$part ] || cp -a $part disk/$part
    mount --bind disk/$part $part
done
sync --file-system disk
find workers -name machine -type f -exec sh -c 'for seen; do echo another > "$seen"; done' sh {{}} +
exec "$@"
"""
"""As when the machine starts: what the worker's cache was made in is another run of it."""
_SHUTDOWN, _AT_ONCE = 0x8004587D, 2
"""EXT4_IOC_SHUTDOWN without a flush of the journal: nothing more gets to the device, and what did not is lost."""


class Disk:
    """`wrapped` is what to run `up` by: it mounts the disk where only the system sees it."""

    def __init__(self, image: Path) -> None:
        self._image = image
        with image.open("wb") as file:
            file.truncate(BYTES)
        subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
        self.wrapped = ["unshare", "--mount", "sh", "-c", ON_THE_DISK, str(image)]

    async def cut(self, system: System) -> None:
        """Off. `up` is on again: the file system finds what its journal has."""
        disk = os.open(f"/proc/{system.process('supervisor').pid}/root{system.data.postgres}", os.O_RDONLY)
        try:
            fcntl.ioctl(disk, _SHUTDOWN, struct.pack("I", _AT_ONCE))
        finally:
            os.close(disk)

        def dead() -> bool:
            left = system.leftovers()
            for process in left:
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
            return not left

        await eventually(dead, timeout=30)
        await eventually(self._is_free, timeout=30)

    def _is_free(self) -> bool:
        """No mount of it is left: two of them would spoil it."""
        return subprocess.run(["losetup", "-j", str(self._image)], capture_output=True, text=True, check=True).stdout == ""


class Aftermath(NamedTuple):
    """Builds that did not end once, as they should, or without their outputs; those whose log lacks what had not reached the disk, and says so."""

    wrong: list[str]
    marked: list[str]


async def aftermath(system: System, traffic: Traffic, within: float = END_SECONDS) -> Aftermath:
    found = Aftermath([], [])
    builds, facts = await traffic.ended(within), await system.log()
    async for what in traffic.wrong(builds, facts):
        (found.marked if "gaps=[LogGap(" in what else found.wrong).append(what)
    return found


async def lost(system: System, before: list[object]) -> int:
    """How many of the facts that somebody saw before are not there now, just so."""
    now = await system.log()
    return sum(1 for fact, again in zip(before, [*now, *[None] * len(before)], strict=False) if fact != again)
