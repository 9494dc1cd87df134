"""The worker as the process it is, on a real nats-server: killed, restarted, told to go, out of disk."""

import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from nacl.public import PrivateKey, SealedBox

from libs.bus.jetstream import connect_jetstream
from libs.tokens import new_seed, public_key, sign
from penstock.up.processes import free_port
from proto.messages import Attempt, Control, Signed
from proto.plan import TaskInput
from services.worker.executors.sandboxes import Choice
from tests.controls import eventually
from tests.nats_fixture import SEEDS, NatsServer, admitting, fresh_nats, nats_server
from tests.worker_controls import IDENTITY, SERVER, Scheduler, a_process, a_scheduler, alive, environment, sandboxes_here, sh, step
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


async def test_a_second_worker_in_a_folder_ends_at_once_and_the_first_ones_steps_go_on(
    tmp_path: Path, fresh_nats: NatsServer, scheduler: Scheduler
) -> None:
    with a_process(tmp_path / "w", fresh_nats):
        attempt = await scheduler.send(sh("until test -e go; do sleep 0.05; done; echo went on"))
        await scheduler.started(attempt)
        with a_process(tmp_path / "w", fresh_nats) as second:
            await eventually(lambda: second.poll() is not None, timeout=30)
            assert second.returncode and "another worker runs in" in (tmp_path / "worker.log").read_text()
        [workspace] = (tmp_path / "w" / "work").glob("*/workspace")
        (workspace / "go").touch()
        assert (await scheduler.finished(attempt)).status == "succeeded"


@pytest.mark.parametrize("aside", [False, True], ids=["removed", "put aside"])
async def test_a_worker_whose_folder_is_removed_says_so_and_another_can_begin_there(
    tmp_path: Path, fresh_nats: NatsServer, scheduler: Scheduler, aside: bool
) -> None:
    folder = tmp_path / "w"
    with a_process(folder, fresh_nats) as process:
        attempt = await scheduler.send(sh("until false; do sleep 0.1; done"))
        await scheduler.started(attempt)
        folder.rename(tmp_path / "aside")
        if aside:
            folder.mkdir()
        else:
            shutil.rmtree(tmp_path / "aside")
        await eventually(lambda: process.poll() is not None, timeout=30)
        assert process.returncode == 74
    log = (tmp_path / "worker.log").read_text()
    assert log.splitlines()[-1].startswith(f"worker: {folder} was removed while the worker ran") and "Traceback" not in log
    assert scheduler.heartbeats[-1].goodbye
    with a_process(folder, fresh_nats):
        assert (await scheduler.finished(await scheduler.send(step("true")))).status == "succeeded"


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


def refusals(port: int) -> Counter[str]:
    """What the worker did not honour, by reason, as it counts it."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return Counter({why: int(float(n)) for why, n in re.findall(r'penstock_worker_messages_refused_total\{reason="([^"]+)"\} (\S+)', text)})


async def test_packages_that_are_anothers_forged_old_or_sent_again_are_refused_and_counted_and_the_worker_goes_on(
    tmp_path: Path, fresh_nats: NatsServer, scheduler: Scheduler
) -> None:
    """FAULTS 87, 88, from somebody who may say everything on the bus."""
    port, pack = free_port(set()), msgspec.msgpack.encode
    runs = sh(f"echo ran >> {tmp_path}/ran")
    subject = f"execute_build_package.{scheduler.worker}"
    with a_process(tmp_path / "w", fresh_nats, status=port, worker_build_limit="16") as process:
        await eventually(lambda: scheduler.heartbeats and scheduler.heartbeats[-1].availability.challenge)
        number = iter(range(100))

        async def forged(**how: str) -> bytes:
            return await scheduler.package(Attempt(f"forged{next(number)}", "main", 1), runs, **how)

        honest = msgspec.msgpack.decode(await forged(), type=Signed)
        for package, why in (
            (b"junk", "ValidationError"),
            (await forged(signed_for="w2"), "BadSignature"),
            (await forged(worker="w2"), "another worker's"),
            (await forged(signed_by=new_seed()), "BadSignature"),
            (await forged(boot="the-one-before"), "another boot's"),
            (await forged(credit="never-offered"), "no such credit"),
            (pack(Signed(honest.body[:-1] + b"?", honest.signature)), "BadSignature"),
            (pack(sign(SERVER, "control.w1", honest.body)), "BadSignature"),
            (pack(sign(SERVER, subject, SealedBox(PrivateKey.generate().public_key).encrypt(b"another's"))), "CryptoError"),
            (pack(sign(SERVER, subject, honest.body[:40])), "TypeError"),
        ):
            before = refusals(port)
            await scheduler.bus.send(subject, package)
            await eventually(lambda before=before: refusals(port) - before)
            assert refusals(port) - before == {f"package: {why}": 1}
        boot = scheduler.heartbeats[-1].boot
        lie = Control(boot=boot, number=10**6, challenge=b"mine", lease_seconds=1e-3)
        await scheduler.bus.send("control.w1", pack(sign(new_seed(), "control.w1", pack(lie))))
        await scheduler.bus.send("control.w1", pack(sign(SERVER, "control.w2", pack(lie))))
        await eventually(lambda: refusals(port)["control: BadSignature"] == 2)

        attempt = Attempt("honest", "main", 1)
        again = await scheduler.package(attempt, runs)
        for _ in range(3):  # while it runs, it is what is run already
            await scheduler.bus.send(subject, again)
        assert (await scheduler.finished(attempt)).status == "succeeded"
        await eventually(lambda: not scheduler.heartbeats[-1].running)
        before = refusals(port)
        await scheduler.bus.send(subject, again)
        await eventually(lambda: refusals(port) - before == {"package: no such credit": 1})
        assert set(scheduler.reports) == {attempt}
        assert (tmp_path / "ran").read_text() == "ran\n"
        assert process.poll() is None and scheduler.heartbeats[-1].boot == boot
        assert (await scheduler.finished(await scheduler.send(sh("true")))).status == "succeeded"
