"""A tree written out on a disk that fills up: said as such, and nothing left (FAULTS 31)."""

import asyncio
import subprocess
import sys
import textwrap
from pathlib import Path

from tests.integration.test_blobstore import small_disk

PROGRAM = textwrap.dedent(
    """
    import errno, hashlib, os, sys
    from pathlib import Path
    from libs.archives.place import create_file, place
    from libs.archives.tree import Entry
    entries = [Entry(b"d", "folder", 0o755)]
    contents = {}
    for n in range(40):
        text = os.urandom(1 << 18)
        entries.append(Entry(b"d/f%02d" % n, "file", 0o644, len(text), hashlib.sha256(text).digest()))
        contents[entries[-1].path] = text
    try:
        place(entries, Path(sys.argv[1]) / "root", lambda entry, parent, name: create_file(entry, parent, name, [contents[entry.path]]))
    except OSError as error:
        assert error.errno == errno.ENOSPC, error
    else:
        sys.exit("it was not full")
    assert os.listdir(sys.argv[1]) == []
    """
)


async def test_a_full_disk_stops_placing_and_nothing_stays(tmp_path: Path) -> None:
    """FAULTS 31"""
    command = [*small_disk(tmp_path, "4m"), sys.executable, "-c", PROGRAM, str(tmp_path)]
    run = await asyncio.create_subprocess_exec(*command, stderr=subprocess.PIPE)
    _, errors = await run.communicate()
    assert run.returncode == 0, errors.decode()
