"""Log files that never fill a disk."""

import os
import shutil
from pathlib import Path

LIMIT = 16 << 20


def bound(log: Path, limit: int = LIMIT) -> None:
    """Move what a log holds aside (to `<name>.1`, over what was there) when it is longer than `limit` bytes. Whoever writes it has it open for
    appending, and so goes on at the start; lines written at this very moment may be lost."""
    try:
        if log.stat().st_size <= limit:
            return
        shutil.copyfile(log, log.with_name(f"{log.name}.1"))
        os.truncate(log, 0)
    except FileNotFoundError:
        return


def last_lines(log: Path, count: int = 15, most: int = 16 << 10) -> str:
    """The end of a log, for a person to read; "" when there is none."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - most))
            return "\n".join(file.read().decode(errors="replace").splitlines()[-count:])
    except FileNotFoundError:
        return ""
