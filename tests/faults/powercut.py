"""A disk of the system's own, and its power cut: what the file system had not written out is gone, as are all processes, in one moment."""

import fcntl
import os
import signal
import struct
import subprocess
from collections import defaultdict
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import msgspec

from proto.events.artifact import LogArchived
from proto.messages import Attempt, LogChunk
from services.scheduler.spooled import archive_of
from services.worker.spool import Spool
from tests.controls import eventually
from tests.faults.system import System
from tests.faults.traffic import END_SECONDS, LOG_SECONDS, Traffic

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
rm -rf journal
cp -a workers/local/spool journal
find workers -name machine -type f -exec sh -c 'for seen; do echo another > "$seen"; done' sh {{}} +
exec "$@"
"""
"""As when the machine starts: what the worker's cache was made in is another run of it. What the cut left of the worker's journal is copied first."""
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


class Chunk(NamedTuple):
    """One of a log's."""

    attempt: Attempt
    number: int


async def journaled(system: System) -> set[Chunk]:
    """What the worker's journal held when the system was last started: each record that was synced before the cut, and those of logs only that
    still waited for an archive."""
    spool = Spool(system.data.path / "journal")
    logs = defaultdict[Attempt, set[Chunk]](set)
    for _, record in spool.replay():
        kind, attempt, body = msgspec.msgpack.decode(record, type=tuple[str, Attempt, bytes])
        if kind == "chunk":
            logs[attempt].add(Chunk(attempt, msgspec.msgpack.decode(body, type=LogChunk).number))
        elif kind == "log-done":
            logs.pop(attempt, None)
    await spool.close()
    return set().union(*logs.values())


class Aftermath(NamedTuple):
    """Builds that did not end once, as they should, or without their outputs, and chunks that were in a journal and are in no archive; builds
    whose log lacks what had not reached the disk, and says so."""

    wrong: list[str]
    marked: list[str]


async def aftermath(system: System, traffic: Traffic, kept: Collection[Chunk], within: float = END_SECONDS) -> Aftermath:
    """`kept`: what the journal held after each cut."""
    found = Aftermath([], [])
    builds, facts = await traffic.ended(within), await system.log()
    async for what in traffic.wrong(builds, facts):
        (found.marked if "gaps=[LogGap(" in what else found.wrong).append(what)
    with suppress(AssertionError):
        await eventually(lambda: _all_archived(system, kept), timeout=LOG_SECONDS)
    found.wrong.extend(f"{chunk} was in the journal, and is not in the archive" for chunk in await _lacking(system, kept))
    return found


async def _all_archived(system: System, kept: Collection[Chunk]) -> bool:
    return await _lacking(system, kept) == []


async def _lacking(system: System, kept: Collection[Chunk]) -> list[Chunk]:
    """Of those whose log is archived: of an attempt that another has followed there is no archive."""
    archives = [archive_of(fact.event) for fact in await system.log("artifact-log") if isinstance(fact.event, LogArchived)]
    newest = {archive.attempt: archive for archive in archives}
    return sorted(chunk for chunk in kept if chunk.attempt in newest and not newest[chunk.attempt].holds(chunk.number))


async def lost(system: System, before: list[object]) -> int:
    """How many of the facts that somebody saw before are not there now, just so."""
    now = await system.log()
    return sum(1 for fact, again in zip(before, [*now, *[None] * len(before)], strict=False) if fact != again)
