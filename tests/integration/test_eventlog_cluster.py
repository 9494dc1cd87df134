"""Postgres from the wheel: started, stopped, killed and started again."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import asyncpg
import psutil
import pytest

from libs.embedded.postgres import EmbeddedPostgres, PostgresFailed
from tests.controls import eventually
from tests.postgres_fixture import FAST


async def ask(cluster: EmbeddedPostgres, question: str = "SELECT 1") -> object:
    connection = await asyncpg.connect(cluster.dsn())
    try:
        return await connection.fetchval(question)
    finally:
        await connection.close()


@pytest.fixture
def cluster(tmp_path: Path):
    cluster = EmbeddedPostgres(tmp_path / "pg", 0, tmp_path / "log", "p/ss wörd".encode().hex(), FAST)
    yield cluster
    cluster.stop()


async def test_a_cluster_is_made_once_keeps_its_data_and_wants_the_password(cluster: EmbeddedPostgres) -> None:
    cluster.start()
    cluster.start()
    await ask(cluster, "CREATE TABLE kept ()")
    with pytest.raises(asyncpg.InvalidPasswordError):
        await asyncpg.connect(cluster.dsn("postgres", "wrong"))
    cluster.stop()
    assert not cluster.running()
    cluster.start()
    assert await ask(cluster, "SELECT count(*) FROM kept") == 0
    assert await ask(cluster, "SHOW listen_addresses") == "127.0.0.1"
    assert {path.name for path in cluster.data.parent.iterdir()} == {"pg", "log"}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGQUIT])
async def test_a_killed_cluster_starts_again(cluster: EmbeddedPostgres, number: signal.Signals) -> None:
    cluster.start()
    connection = await asyncpg.connect(cluster.dsn())
    os.kill(cluster.pid, number)
    await eventually(lambda: not cluster.running())
    connection.terminate()
    cluster.start()
    assert await ask(cluster) == 1


class CalledOff(Exception):
    """What `pause` raises."""


def working_on(folder: Path) -> list[str]:
    """The command lines of processes that name the folder, or stand in it."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if any(str(folder) in word for word in [*process.cmdline(), process.cwd()]):
                found.append(" ".join(process.cmdline()))
    return found


@pytest.mark.parametrize("sign", ["pg.new/PG_VERSION", "pg/postmaster.pid"])
async def test_a_first_start_that_is_called_off_leaves_nothing_and_may_be_made_again(cluster: EmbeddedPostgres, sign: str) -> None:
    """While the cluster is made, and while the server comes up."""
    folder = cluster.data.parent
    working: list[str] = []

    def pause(seconds: float) -> None:
        if (folder / sign).exists() and working_on(folder):
            working.extend(working_on(folder))
            raise CalledOff
        time.sleep(seconds)

    with pytest.raises(CalledOff):
        cluster.start(pause=pause)
    cluster.stop()
    assert working
    await eventually(lambda: not working_on(folder))
    assert {path.name for path in folder.iterdir()} <= {"pg", "log"}
    cluster.start()
    assert await ask(cluster) == 1


def runs(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def test_nothing_is_left_of_a_cluster_that_does_not_end(cluster: EmbeddedPostgres) -> None:
    """Its checkpointer hangs, as on a disk that is too slow, or gone."""
    cluster.start()
    family = psutil.Process(cluster.pid).children()
    [checkpointer] = [process for process in family if "checkpointer" in process.cmdline()[0]]
    checkpointer.suspend()
    cluster.stop(timeout=0.1, patience=0.1)
    await eventually(lambda: not any(map(runs, family)))
    cluster.start()
    assert await ask(cluster) == 1


async def test_a_lock_file_whose_process_id_is_someone_elses_by_now_is_no_obstacle(cluster: EmbeddedPostgres) -> None:
    cluster.start()
    lock = (cluster.data / "postmaster.pid").read_text()
    cluster.stop()
    (cluster.data / "postmaster.pid").write_text(lock.replace(lock.split()[0], str(os.getppid()), 1))
    cluster.start()
    assert await ask(cluster) == 1


def test_two_clusters_in_one_folder_are_refused(cluster: EmbeddedPostgres) -> None:
    cluster.start()
    other = EmbeddedPostgres(cluster.data, 0, cluster.log, "x", FAST)
    with pytest.raises(PostgresFailed, match="another Postgres runs in"):
        other.start(patience=0.1)


def test_a_failure_to_start_shows_what_postgres_said(tmp_path: Path) -> None:
    cluster = EmbeddedPostgres(tmp_path / "pg", 0, tmp_path / "log", "x", {**FAST, "shared_buffers": "a lot"})
    with pytest.raises(PostgresFailed, match="shared_buffers"):
        cluster.start()
    assert not cluster.running()


def test_a_cluster_stops_when_its_parent_is_killed(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from libs.embedded.postgres import EmbeddedPostgres\n"
        "folder = Path(sys.argv[1]); cluster = EmbeddedPostgres(folder / 'pg', 0, folder / 'log', 'x', {'fsync': 'off'}); cluster.start()\n"
        "print(cluster.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent.stdout:
        pid = int(parent.stdout.readline())
        server = psutil.Process(pid)
        parent.kill()
        parent.wait()
    _, alive = psutil.wait_procs([server], timeout=10)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    assert "database system is shut down" in (tmp_path / "log").read_text()
