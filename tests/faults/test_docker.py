"""Containers that misbehave, engines and workers that die. A real engine; the bus is in memory, or a real one where the worker is a process."""

import asyncio
from pathlib import Path

import pytest

from libs.bus.jetstream import connect_jetstream
from libs.tokens import public_key
from services.worker.executors.container import STOPPED, WENT
from services.worker.executors.docker import DockerExecutor
from tests.controls import eventually
from tests.engine_controls import a_docker_system, containers, docker, script
from tests.engine_fixture import IMAGE, Dockerd
from tests.faults.measured import peak
from tests.nats_fixture import SEEDS, NatsServer, admitting
from tests.worker_controls import IDENTITY, Scheduler, a_process, a_scheduler, alive, sh


async def seen(scheduler: Scheduler, attempt: object, text: str) -> None:
    await eventually(lambda: text in scheduler.text(attempt))


async def test_memory_that_is_used_up_fails_the_step_and_is_said(tmp_path: Path, dockerd: Dockerd) -> None:
    """FAULTS 56: as process 1's child, and as a child of that whose parent lives on."""
    hog = "busybox tail /dev/zero"
    async with a_docker_system(tmp_path, dockerd) as (scheduler, _):
        for hogging in (f"exec {hog}", f"{hog}; sleep 0.5; echo went on; exit 5"):
            attempt = await scheduler.send(script(hogging, memory=16 << 20))
            assert (await scheduler.finished(attempt)).status == "failed"
            # Now and then (1 of 60, on a busy machine) the engine misses it when the container ends by it, and says nothing.
            missed = "killed by SIGKILL, by itself or for want of memory (limit 16 MiB)"
            assert scheduler.step(attempt).error in ("out of memory (limit 16 MiB)", missed)
        after = await scheduler.send(script("true"))
        assert (await scheduler.finished(after)).status == "succeeded"


async def test_a_fork_bomb_is_the_containers_own_trouble(tmp_path: Path, dockerd: Dockerd) -> None:
    """FAULTS 56."""
    async with a_docker_system(tmp_path, dockerd) as (scheduler, _):
        bomb = await scheduler.send(script("bomb() { bomb | bomb & wait; }; bomb; sleep 60"))
        await seen(scheduler, bomb, "can't fork")
        beside = await scheduler.send(script("echo fine"))
        assert await scheduler.log(beside, "stdout") == "fine\n"
        scheduler.interrupted[bomb] = "aborted"
        await scheduler.finished(bomb)
        await eventually(lambda: not containers(dockerd, bomb))


async def test_a_step_that_ignores_sigterm_is_killed(tmp_path: Path, dockerd: Dockerd) -> None:
    """FAULTS 54."""
    async with a_docker_system(tmp_path, dockerd, grace=0.3) as (scheduler, _):
        attempt = await scheduler.send(script("trap '' TERM; echo up; while true; do sleep 0.05; done"))
        await seen(scheduler, attempt, "up")
        scheduler.interrupted[attempt] = "aborted"
        assert ((await scheduler.finished(attempt)).status, scheduler.step(attempt).exit_code) == ("aborted", None)


async def test_a_daemon_that_forked_away_dies_with_its_step(tmp_path: Path, dockerd: Dockerd) -> None:
    """FAULTS 55."""
    async with a_docker_system(tmp_path, dockerd) as (scheduler, _):
        attempt = await scheduler.send(script("(busybox setsid sleep 77.551 &) ; (busybox setsid sleep 77.552 >/dev/null 2>&1 &); echo done"))
        assert (await scheduler.finished(attempt)).status == "succeeded"
        await eventually(lambda: not alive("77.55"))


async def test_a_flood_of_log_neither_fills_memory_nor_a_disk(tmp_path: Path, dockerd: Dockerd) -> None:
    flood = "busybox yes 0123456789012345678901234567890123456789 | busybox head -c 200000000; touch flooded; sleep 60"
    async with a_docker_system(tmp_path, dockerd, log_limit=1 << 20) as (scheduler, running):
        Path("/proc/self/clear_refs").write_text("5")  # the most memory that this process has had is what it has
        before = peak("self")
        attempt = await scheduler.send(script(flood))
        await eventually(lambda: list((running.folder / "work").glob("*/workspace/flooded")), timeout=60)
        [container] = (dockerd.folder / "data" / "containers").iterdir()  # with it goes what the engine has kept
        assert sum(file.stat().st_size for file in container.rglob("*") if file.is_file()) < 1 << 20
        scheduler.interrupted[attempt] = "aborted"
        extent = await scheduler.finished(attempt)
        assert (extent.status, extent.dropped > 190_000_000) == ("aborted", True)
        assert peak("self") - before < 48 << 20


async def test_what_was_written_last_is_in_the_log(tmp_path: Path, dockerd: Dockerd) -> None:
    async with a_docker_system(tmp_path, dockerd) as (scheduler, _):
        attempt = await scheduler.send(script("busybox seq 20000; echo last >&2"))
        assert await scheduler.log(attempt, "stdout") == "".join(f"{n}\n" for n in range(1, 20001))
        assert (await scheduler.log(attempt, "stderr")).endswith("last\n")


async def test_a_container_of_the_same_name_is_replaced_if_it_is_ours_and_left_if_not(tmp_path: Path, dockerd: Dockerd) -> None:
    """FAULTS 51."""
    names = [f"penstock-build{n}-main.step-1" for n in (1, 2)]
    async with a_docker_system(tmp_path, dockerd) as (scheduler, _):
        for name, owner in zip(names, (str(tmp_path), "somebody"), strict=True):
            docker(dockerd, "create", "--name", name, "--label", f"penstock.owner={owner}", IMAGE, "true")
        ours = await scheduler.send(script("echo here"))
        assert await scheduler.log(ours, "stdout") == "here\n"
        theirs = await scheduler.send(script("echo here"))
        assert (await scheduler.finished(theirs)).status == "errored"
        assert scheduler.step(theirs).error == f"a container `{names[1]}` is there already, and it is not this worker's"
    assert containers(dockerd) == [names[1]]
    docker(dockerd, "rm", names[1])


async def test_a_sweep_removes_what_is_lost_and_nothing_that_runs_or_is_not_ours(tmp_path: Path, dockerd: Dockerd) -> None:
    async with a_docker_system(tmp_path, dockerd) as (scheduler, running):
        executor = running.tools.executors.containers
        assert isinstance(executor, DockerExecutor)
        for name, label in (("lost-ours", f"penstock.owner={tmp_path}"), ("lost-others", "penstock.owner=others"), ("plain", "other=label")):
            docker(dockerd, "run", "--detach", "--network=none", "--name", name, "--label", label, IMAGE, "sleep", "60")
        attempt = await scheduler.send(script("echo up; sleep 60"))
        await seen(scheduler, attempt, "up")
        assert await executor.sweep() == 1
        left = {"lost-others", "plain", *containers(dockerd, attempt)}
        assert set(containers(dockerd)) == left and len(left) == 3
    await eventually(lambda: set(containers(dockerd)) == {"lost-others", "plain"})
    docker(dockerd, "rm", "--force", "lost-others", "plain")


async def test_an_attempt_that_is_lost_leaves_no_container_wherever_it_was(tmp_path: Path, dockerd: Dockerd) -> None:
    """Killed at once, at any moment of its start."""
    async with a_docker_system(tmp_path, dockerd, slots=8) as (scheduler, running):
        for delay in range(8):
            attempt = await scheduler.send(script("sleep 60"))
            await asyncio.sleep(delay * 0.02)
            scheduler.lost.add(attempt)
        await eventually(lambda: not running.worker._runs, timeout=30)
        await eventually(lambda: not containers(dockerd), timeout=30)
        assert not list((running.folder / "work").glob("*/workspace/*"))


async def test_an_engine_that_dies_ends_the_step_with_the_truth_and_nothing_of_it_goes_on(tmp_path: Path, dockerd_of_our_own: Dockerd) -> None:
    """FAULTS 50."""
    engine = dockerd_of_our_own
    async with a_docker_system(tmp_path, engine) as (scheduler, running):
        executor = running.tools.executors.containers
        assert executor is not None
        attempt = await scheduler.send(script("echo up; sleep 77.50"))
        await seen(scheduler, attempt, "up")
        assert alive("77.50")
        engine.kill()
        assert (await scheduler.finished(attempt)).status == "errored"
        assert scheduler.step(attempt).error == WENT
        await eventually(lambda: not alive("77.50"))
        assert executor.trouble == "the container engine does not answer"
        meanwhile = await scheduler.send(script("true"))
        assert (await scheduler.finished(meanwhile)).status == "errored"
        assert "the container engine does not answer" in scheduler.step(meanwhile).error
        bare = await scheduler.send(sh("true"))
        assert (await scheduler.finished(bare)).status == "succeeded"
        engine.start()
        await eventually(lambda: executor.trouble == "", timeout=20)
        await eventually(lambda: not containers(engine))
        after = await scheduler.send(script("echo again"))
        assert await scheduler.log(after, "stdout") == "again\n"


@pytest.fixture
def docker_settings(dockerd: Dockerd) -> dict[str, str]:
    return {
        "worker_executors": "process,docker",
        "worker_docker_url": dockerd.url,
        "worker_container_memory_bytes": str(64 << 20),
        "worker_warm_containers": "0",
    }


async def test_containers_of_a_killed_worker_are_gone_before_it_is_back(
    tmp_path: Path, fresh_nats: NatsServer, dockerd: Dockerd, docker_settings: dict[str, str]
) -> None:
    """FAULTS 44. Another worker on the same engine keeps its own."""
    async with (
        admitting(fresh_nats, {"w1": public_key(IDENTITY)}),
        connect_jetstream(fresh_nats.url, SEEDS["scheduler"], "test") as bus,
        a_scheduler(bus) as scheduler,
        a_docker_system(tmp_path / "other", dockerd) as (others, _),
    ):
        others._numbers = iter([1000])
        beside = await others.send(script("echo up; sleep 60"))
        await seen(others, beside, "up")
        with a_process(tmp_path / "w", fresh_nats, **docker_settings) as process:
            attempt = await scheduler.send(script("echo up; touch x; sleep 77.44"))
            await seen(scheduler, attempt, "up")
            process.kill()
            process.wait()
            first_life = scheduler.heartbeats[-1].boot
        assert alive("77.44")
        with a_process(tmp_path / "w", fresh_nats, **docker_settings):
            await eventually(lambda: scheduler.heartbeats[-1].boot != first_life, timeout=20)
            assert not alive("77.44")
            assert containers(dockerd) == containers(dockerd, beside) != []
            offers = scheduler.heartbeats[-1].availability.offers
            assert ("registry-image" in offers.images, offers.user, offers.limits, offers.privileged) == (True, True, True, False)
            again = await scheduler.send(script("echo again"))
            assert await scheduler.log(again, "stdout") == "again\n"


async def test_a_worker_that_is_told_to_go_takes_its_containers_along(
    tmp_path: Path, fresh_nats: NatsServer, dockerd: Dockerd, docker_settings: dict[str, str]
) -> None:
    async with (
        admitting(fresh_nats, {"w1": public_key(IDENTITY)}),
        connect_jetstream(fresh_nats.url, SEEDS["scheduler"], "test") as bus,
        a_scheduler(bus) as scheduler,
    ):
        with a_process(tmp_path / "w", fresh_nats, **docker_settings) as process:
            attempt = await scheduler.send(script("echo up; sleep 77.45"))
            await seen(scheduler, attempt, "up")
            process.terminate()
            assert process.wait(20) == 0
        assert not alive("77.45")
        assert containers(dockerd) == []


@pytest.mark.parametrize("text", ["echo up; sleep 77.51", "trap '' TERM; echo up; while true; do sleep 0.1; done"], ids=["heeds SIGTERM", "does not"])
async def test_an_engine_that_is_restarted_ends_the_step_as_errored(tmp_path: Path, dockerd_of_our_own: Dockerd, text: str) -> None:
    """FAULTS 50: it stops its containers first, and what they end with looks like their own doing."""
    async with a_docker_system(tmp_path, dockerd_of_our_own) as (scheduler, _):
        attempt = await scheduler.send(script(text))
        await seen(scheduler, attempt, "up")
        dockerd_of_our_own.terminate()
        assert (await scheduler.finished(attempt, timeout=30)).status == "errored"
        # It may be gone before it has said what it did.
        assert scheduler.step(attempt).error in (STOPPED, WENT)


async def test_a_step_that_is_killed_from_outside_is_errored_and_one_that_kills_itself_failed(tmp_path: Path, dockerd: Dockerd) -> None:
    async with a_docker_system(tmp_path, dockerd) as (scheduler, _):
        attempt = await scheduler.send(script("trap 'exit 0' TERM; echo up; while true; do sleep 0.05; done"))
        await seen(scheduler, attempt, "up")
        docker(dockerd, "stop", *containers(dockerd, attempt))
        assert ((await scheduler.finished(attempt)).status, scheduler.step(attempt).error) == ("errored", STOPPED)
        itself = await scheduler.send(script("kill -9 $$"))
        assert (await scheduler.finished(itself)).status == "failed"
        assert scheduler.step(itself).error.startswith("killed by SIGKILL, by itself or for want of memory (limit ")
