"""The worker as the process it is, on a real nats-server: killed, restarted, told to go, out of disk."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import pytest

from libs.bus.jetstream import connect_jetstream
from libs.tokens import public_key
from proto.plan import TaskInput
from services.worker.executors.sandboxes import Choice
from tests.controls import eventually
from tests.nats_fixture import SEEDS, NatsServer, admitting, fresh_nats, nats_server
from tests.worker_controls import IDENTITY, Scheduler, a_scheduler, alive, environment, sandboxes_here, sh, step
from tests.worker_shop import TOKEN, a_shop

__all__ = ["fresh_nats", "nats_server"]

in_each_sandbox = pytest.mark.parametrize("sandbox", sandboxes_here())


@pytest.fixture
async def scheduler(fresh_nats: NatsServer) -> AsyncIterator[Scheduler]:
    async with (
        admitting(fresh_nats, {"w1": public_key(IDENTITY)}),
        connect_jetstream(fresh_nats.url, SEEDS["scheduler"], "test") as bus,
        a_scheduler(bus) as found,
    ):
        yield found


@contextlib.contextmanager
def a_process(
    folder: Path, nats: NatsServer, sandbox: Choice = "none", prefix: Sequence[str] = (), **settings: str
) -> Iterator["subprocess.Popen[bytes]"]:
    folder.mkdir(exist_ok=True)
    with (folder.parent / "worker.log").open("ab") as log:
        process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "services.worker"],
            env={**environment(folder, nats.url, sandbox, **settings), "PYTHONPATH": os.getcwd()},
            stdin=subprocess.DEVNULL,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@in_each_sandbox
async def test_a_killed_worker_leaves_no_process_at_all_or_none_after_its_restart(
    tmp_path: Path, fresh_nats: NatsServer, scheduler: Scheduler, sandbox: Choice
) -> None:
    """FAULTS 44, finding 7."""
    marker = f"7{os.getpid()}.44"
    script = f"sleep {marker} & (setsid sleep {marker} &) ; (env -i setsid sleep {marker} &); sleep {marker}"
    with a_process(tmp_path / "w", fresh_nats, sandbox) as process:
        attempt = await scheduler.send(sh(script))
        await scheduler.started(attempt)
        await eventually(lambda: len(alive(marker)) >= 5)
        notes = tmp_path / "w" / "spool" / "processes"
        await eventually(lambda: sandbox != "none" or len(notes.read_text().splitlines()) == 3)
        process.kill()
        process.wait()
        first_life = scheduler.heartbeats[-1].boot
    if sandbox == "none":
        with a_process(tmp_path / "w", fresh_nats, sandbox):
            await eventually(lambda: scheduler.heartbeats[-1].boot != first_life)
            assert not alive(marker)
    await eventually(lambda: not alive(marker))
    assert len(scheduler.reports[attempt]) == 1


async def test_a_restarted_worker_says_again_what_was_not_recorded_before_it_announces_itself(
    tmp_path: Path, fresh_nats: NatsServer, scheduler: Scheduler
) -> None:
    scheduler.records = scheduler.archives = False
    with a_process(tmp_path / "w", fresh_nats) as process:
        attempt = await scheduler.send(sh("echo remembered"))
        await scheduler.finished(attempt)
        unfinished = await scheduler.send(step("sleep", "60"))
        await scheduler.started(unfinished)
        process.kill()
        process.wait()
    first_life = scheduler.heartbeats[-1].boot
    heard = len(scheduler.heartbeats)
    await scheduler.bus.purge("REPORTS", "reports.>")
    await scheduler.bus.purge("LOGS", "logs.>")
    scheduler.reports.clear()
    scheduler.chunks.clear()
    fresh_nats.restart()
    fresh_nats.kill()
    fresh_nats.wipe()
    fresh_nats.start()
    with a_process(tmp_path / "w", fresh_nats):
        first = await eventually(lambda: next((beat for beat in scheduler.heartbeats[heard:] if beat.boot != first_life), None))
        assert [(r.attempt, r.reported) for r in first.running] == [(attempt, 3)]
        assert first.logs == [attempt]
        assert (await scheduler.finished(attempt)).status == "succeeded"
        scheduler.records = scheduler.archives = True
        await eventually(lambda: not scheduler.heartbeats[-1].running)
        again = await scheduler.send(step("true"))
        assert (await scheduler.finished(again)).status == "succeeded"
        assert unfinished not in scheduler.reports


async def test_a_worker_survives_the_death_of_the_bus(tmp_path: Path, fresh_nats: NatsServer, scheduler: Scheduler) -> None:
    """FAULTS 57"""
    with a_process(tmp_path / "w", fresh_nats):
        attempt = await scheduler.send(sh("for i in 1 2 3 4 5 6 7 8 9 10; do echo line $i; sleep 0.1; done"))
        await scheduler.started(attempt)
        fresh_nats.restart()
        assert (await scheduler.finished(attempt)).status == "succeeded"
        log = await scheduler.log(attempt, "stdout")
        assert log == "".join(f"line {i}\n" for i in range(1, 11))


@in_each_sandbox
async def test_a_worker_that_is_told_to_go_stops_its_steps_and_leaves_nothing(
    tmp_path: Path, fresh_nats: NatsServer, scheduler: Scheduler, sandbox: Choice
) -> None:
    marker = f"7{os.getpid()}.60"
    with a_process(tmp_path / "w", fresh_nats, sandbox, grace_seconds="1") as process:
        attempt = await scheduler.send(sh(f"trap '' TERM; sleep {marker}"))
        await scheduler.started(attempt)
        process.send_signal(signal.SIGTERM)
        await eventually(lambda: process.poll() is not None)
        assert process.returncode == 0
        assert scheduler.heartbeats[-1].goodbye
        await eventually(lambda: not alive(marker))


async def test_bad_settings_are_refused_by_name(tmp_path: Path, fresh_nats: NatsServer) -> None:
    settings = environment(tmp_path, fresh_nats.url, "none") | {"PENSTOCK_WORKER_SLOT": "3"}
    done = subprocess.run([sys.executable, "-m", "services.worker"], env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "PENSTOCK_WORKER_SLOT" in done.stderr


async def test_a_full_disk_errors_the_build_and_the_worker_lives_on(tmp_path: Path, fresh_nats: NatsServer, scheduler: Scheduler) -> None:
    """FAULTS 53: the worker's folder is a small file system of its own."""
    folder = tmp_path / "w"
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    mount = f'mount -t tmpfs -o size=4m tmpfs {folder} && exec "$@"'
    with a_process(folder, fresh_nats, prefix=["unshare", *user, "--mount", "sh", "-c", mount, "sh"]) as process:
        attempt = await scheduler.send(sh("head -c 50000000 /dev/zero > big"))
        extent = await scheduler.finished(attempt)
        assert extent.status == "errored"
        assert "worker's disk is full" in extent.error

        attempt = await scheduler.send(sh(f"head -c 50000000 /dev/zero > {folder}/filler; head -c 200000 /dev/zero | tr '\\0' '\\n'; sleep 60"))
        extent = await scheduler.finished(attempt)
        assert extent.status == "errored"
        assert "worker's disk is full" in extent.error

        Path(f"/proc/{process.pid}/root{folder}/filler").unlink()
        attempt = await scheduler.send(sh("echo fine"))
        assert (await scheduler.finished(attempt)).status == "succeeded"
        assert await scheduler.log(attempt, "stdout") == "fine\n"
        assert process.poll() is None


@in_each_sandbox
async def test_a_killed_worker_leaves_no_mount_and_a_later_life_removes_its_folders(tmp_path: Path, fresh_nats: NatsServer, sandbox: Choice) -> None:
    (tmp_path / "in" / "src").mkdir(parents=True)
    (tmp_path / "in" / "src" / "file").write_text("from the input\n")
    folder = tmp_path / "w"
    src = [TaskInput(name="src")]
    async with (
        a_shop(tmp_path) as shop,
        admitting(fresh_nats, {"w1": public_key(IDENTITY)}),
        connect_jetstream(fresh_nats.url, SEEDS["scheduler"], "test") as bus,
        a_scheduler(bus, artifacts_url=shop.url) as scheduler,
    ):
        refs = shop.refs("src")
        with a_process(folder, fresh_nats, sandbox) as process:
            attempt = await scheduler.send(sh("echo x > src/new; echo up; sleep 600", inputs=src), inputs=refs, token=TOKEN)
            await eventually(lambda: "up" in scheduler.text(attempt))
            assert str(folder) not in Path("/proc/self/mounts").read_text()
            if '"inputs": "overlay"' in (tmp_path / "worker.log").read_text():
                assert str(folder) in Path(f"/proc/{process.pid}/mounts").read_text()
            left = list((folder / "work").iterdir())
            assert left
            first_life = scheduler.heartbeats[-1].boot
            process.kill()
            process.wait()
        assert str(folder) not in Path("/proc/self/mounts").read_text()
        with a_process(folder, fresh_nats, sandbox):
            await eventually(lambda: scheduler.heartbeats[-1].boot != first_life)
            assert not any(path.exists() for path in left)
            attempt = await scheduler.send(sh("cat src/*", inputs=src), inputs=refs, token=TOKEN)
            assert await scheduler.log(attempt, "stdout") == "from the input\n"
            assert shop.requests == {"manifest": 1, "blobs": 1}
