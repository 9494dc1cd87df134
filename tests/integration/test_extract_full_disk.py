"""Extraction on a disk that fills up: said as such, and nothing left (FAULTS 31)."""

import asyncio
import subprocess
import sys
import textwrap
from pathlib import Path

from tests.integration.test_blobstore import small_disk

PROGRAM = textwrap.dedent(
    """
    import asyncio, errno, os, sys
    from pathlib import Path
    from libs.archives.extract import extract
    from libs.archives.rules import Limits
    from libs.archives.tar import END, write_header
    async def archive():
        for n in range(40):
            yield write_header(b"d%d/f" % n, b"0", 0o644, 1 << 18) + os.urandom(1 << 18)
        yield END
    async def main():
        try:
            await extract(archive(), Path(sys.argv[1]) / "root", Limits())
        except OSError as error:
            assert error.errno == errno.ENOSPC, error
        else:
            sys.exit("it was not full")
        assert os.listdir(sys.argv[1]) == []
    asyncio.run(main())
    """
)


async def test_a_full_disk_stops_extraction_and_nothing_stays(tmp_path: Path) -> None:
    """FAULTS 31"""
    command = [*small_disk(tmp_path, "4m"), sys.executable, "-c", PROGRAM, str(tmp_path)]
    run = await asyncio.create_subprocess_exec(*command, stderr=subprocess.PIPE)
    _, errors = await run.communicate()
    assert run.returncode == 0, errors.decode()
