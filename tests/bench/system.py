"""A Penstock of the bench's own, in a folder of its own, as `penstock up` makes it."""

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import asyncpg
import msgspec

from penstock.client.targets import read_targets
from penstock.up.datadir import DataDir, Ports
from tests.bench.machine import Parts


class System:
    """A data folder whose system can be started and stopped. `url`, `token`, `team` and `parts` are of the running one."""

    def __init__(self, folder: Path, sandbox: str, slots: int) -> None:
        self._folder = folder
        self.data = folder / "data"
        self._environ = {
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": str(folder),
            "LANG": "C.UTF-8",
            "PYTHONPATH": os.pathsep.join(sys.path),  # the very code that this process would import
            "PENSTOCK_DATA": str(self.data),
            "PENSTOCK_TARGETS": str(folder / "targets.json"),
        }
        self._options = ["--port", "0", "--slots", str(slots), "--sandbox", sandbox]

    def up(self) -> float:
        """Seconds until it serves, the command line's own start included. Raises RuntimeError with what it said."""
        began = time.monotonic()
        said = self.penstock("up", "--detach", *self._options)
        seconds = time.monotonic() - began
        if said.returncode:
            raise RuntimeError(f"the system does not start:\n{said.stderr}")
        run = DataDir(self.data).run()
        targets = read_targets(self._folder / "targets.json")
        assert run is not None
        target = targets.targets[targets.current]
        self.url, self.token, self.team = target.url, target.token, target.team
        self.pids = {"supervisor": run.supervisor.pid, **{name: child.pid for name, child in run.children.items()}}
        self.parts = Parts(self.pids)
        return seconds

    async def transactions(self) -> int:
        """How many Postgres has committed, reads included. Its processes tell of theirs a second late."""
        data = DataDir(self.data)
        ports = msgspec.json.decode((data.path / "ports.json").read_bytes(), type=Ports)
        await asyncio.sleep(1.5)
        connection = await asyncpg.connect(
            host="127.0.0.1", port=ports.postgres, user="postgres", password=data.secrets().database["postgres"], database="postgres", ssl=False
        )
        try:
            return int(await connection.fetchval("SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()"))
        finally:
            await connection.close()

    def down(self) -> None:
        said = self.penstock("down")
        if said.returncode:
            raise RuntimeError(f"the system does not stop:\n{said.stderr}")

    def penstock(self, *words: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "penstock", *words], env=self._environ, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
        )


@contextmanager
def system(sandbox: str, slots: int) -> Iterator[System]:
    """A running system; nothing of it is left afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="penstock-bench-"))
    made = System(folder, sandbox, slots)
    try:
        made.up()
        yield made
    finally:
        made.down()
        shutil.rmtree(folder)
