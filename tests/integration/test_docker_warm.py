"""Steps that begin in containers which were started before them, on a real engine: nobody but the clock can tell."""

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from aiodocker.stream import Stream as Attached

from libs.bus.jetstream import connect_jetstream
from libs.tokens import public_key
from proto.messages import Attempt
from proto.plan import TaskInput
from services.worker.executors import container
from services.worker.executors.docker import DockerExecutor
from services.worker.executors.executor import CannotRun
from tests.controls import eventually
from tests.engine_controls import a_docker_system, contained, containers, docker, script
from tests.engine_fixture import IMAGE, Dockerd, root_filesystem
from tests.nats_fixture import SEEDS, NatsServer, admitting, fresh_nats, nats_server
from tests.worker_controls import IDENTITY, Running, Scheduler, a_process, a_scheduler, alive
from tests.worker_shop import TOKEN, a_shop

__all__ = ["fresh_nats", "nats_server"]


async def waits(engine: Dockerd, running: Running | None = None) -> str:
    """The id of the only container that is there, and waits."""

    def found() -> str:
        there = [line.split() for line in docker(engine, "ps", "--no-trunc", "--format", "{{.ID}} {{.Names}}").splitlines()]
        assert len(there) == len(containers(engine)) == 1 and there[0][1].startswith("penstock-warm-")
        assert running is None or executor_of(running).waiting == 1
        return there[0][0]

    return await eventually(found, timeout=30)


async def seen(scheduler: Scheduler, attempt: Attempt, text: str) -> None:
    await eventually(lambda: text in scheduler.text(attempt))


def inspected(engine: Dockerd, container: str) -> dict[str, Any]:
    [shown] = json.loads(docker(engine, "inspect", container))
    return dict(shown)


def executor_of(running: Running) -> DockerExecutor:
    executor = running.tools.executors.containers
    assert isinstance(executor, DockerExecutor)
    return executor


LOOK = """
    busybox tr '\\0' '\\n' </proc/1/environ | busybox sort; pwd; id -u; id -g; umask; ulimit -c; cat
    ls -l /proc/self/fd | busybox grep -c /dev/null; ls -A . $HOME /tmp
    busybox grep -E 'CapEff|CapBnd|NoNewPrivs|Seccomp:' /proc/self/status
    busybox tr '\\0' ' ' </proc/1/cmdline | busybox cut -d' ' -f2-; echo $PPID
    touch /x || echo read-only; ip link | busybox grep -c mtu; busybox hostname
    busybox cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null; echo out; echo err >&2; exit 3
"""


async def test_a_step_in_a_container_that_waited_sees_what_it_would_see_in_a_new_one(tmp_path: Path, dockerd: Dockerd) -> None:
    (tmp_path / "in" / "src").mkdir(parents=True)
    (tmp_path / "in" / "src" / "file").write_text("1")
    more = "cat ../src/file; touch ../src/x ../src/file || echo refused; touch there && echo written\n"
    wants: dict[str, Any] = {"inputs": [TaskInput(name="src")], "outputs": ["dist"], "dir": "dist", "memory": 64 << 20}
    texts, ids = [], []
    async with a_shop(tmp_path) as shop, a_docker_system(tmp_path / "w", dockerd, artifacts_url=shop.url, warm=1) as (scheduler, running):
        for _ in range(2):
            attempt = await scheduler.send(
                script(more + LOOK, params={"X.y": "a b", "Z": "é"}, **wants),
                script("cat dist/there", name="never"),
                inputs=shop.refs("src"),
                token=TOKEN,
            )
            texts.append("\0".join([await scheduler.log(attempt, "stdout"), await scheduler.log(attempt, "stderr")]))
            shutil.rmtree(tmp_path / "out")
            extent = await scheduler.finished(attempt)
            assert (extent.status, scheduler.step(attempt).exit_code) == ("failed", 3)
            ids.append(await waits(dockerd, running))
        host = [line for line in texts[1].splitlines() if line.startswith("HOSTNAME=")]
        assert host == [f"HOSTNAME={ids[0][:12]}"]
        cold = next(line.removeprefix("HOSTNAME=") for line in texts[0].splitlines() if line.startswith("HOSTNAME="))
        assert texts[1].replace(ids[0][:12], cold) == texts[0]
        assert "X.y=a b\n" in texts[0] and "refused\nwritten\n" in texts[0] and "CapEff:\t0000000000000000" in texts[0]


async def test_a_container_that_waited_is_named_for_its_step_keeps_its_limits_and_hears_signals(tmp_path: Path, dockerd: Dockerd) -> None:
    trap = "trap 'echo cleaned; exit 7' TERM; echo up; (busybox setsid sleep 77.61 &); while true; do sleep 0.05; done"
    async with a_docker_system(tmp_path, dockerd, warm=1) as (scheduler, running):
        await scheduler.finished(await scheduler.send(contained("true", memory=32 << 20)))
        waiting = await waits(dockerd, running)
        attempt = await scheduler.send(script(trap, memory=32 << 20))
        await seen(scheduler, attempt, "up")
        shown = inspected(dockerd, waiting)
        assert shown["Name"] == f"/penstock-{attempt.build}-main.step-1"
        assert (shown["HostConfig"]["Memory"], shown["HostConfig"]["MemorySwap"], shown["HostConfig"]["PidsLimit"]) == (32 << 20, 32 << 20, 64)
        assert alive("77.61")
        scheduler.interrupted[attempt] = "aborted"
        assert (await scheduler.finished(attempt)).status == "aborted"
        assert scheduler.step(attempt).exit_code == 7
        assert "cleaned" in await scheduler.log(attempt)
        assert not alive("77.61")
        await waits(dockerd, running)
        hog = await scheduler.send(script("exec busybox tail /dev/zero", memory=32 << 20))
        assert (await scheduler.finished(hog)).status == "failed"
        assert scheduler.step(hog).error == "out of memory (limit 32 MiB)"


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("nope", "run.path: `nope` does not exist in its image (PATH is /usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin)"),
        ("/bin/not-executable", "run.path: `/bin/not-executable` is not executable in its image"),
    ],
)
async def test_a_command_that_is_not_there_is_said_by_what_waited_too(tmp_path: Path, dockerd: Dockerd, path: str, said: str) -> None:
    async with a_docker_system(tmp_path, dockerd, warm=1) as (scheduler, running):
        await scheduler.finished(await scheduler.send(contained("true")))
        await waits(dockerd, running)
        attempt = await scheduler.send(contained(path))
        assert ((await scheduler.finished(attempt)).status, scheduler.step(attempt).error) == ("errored", said)


async def test_what_waits_is_for_the_first_step_of_a_stage_that_wants_the_same(tmp_path: Path, dockerd: Dockerd) -> None:
    async with a_docker_system(tmp_path, dockerd, warm=2) as (scheduler, running):
        await scheduler.finished(await scheduler.send(contained("true")))
        waiting = await waits(dockerd, running)
        say = "echo $HOSTNAME"
        other = await scheduler.send(script(say, memory=64 << 20), script(say, name="second"))
        assert waiting[:12] not in await scheduler.log(other, "stdout")
        same = await scheduler.send(script(say), script(say, name="second"))
        assert (await scheduler.log(same, "stdout")).splitlines()[0] == waiting[:12] != (await scheduler.log(same, "stdout")).splitlines()[1]


async def test_an_image_whose_tag_has_moved_is_not_the_one_that_waits(tmp_path: Path, dockerd: Dockerd) -> None:
    made = tmp_path / "image.tar"
    made.write_bytes(root_filesystem())
    docker(dockerd, "tag", IMAGE, "penstock-moving:1")
    async with a_docker_system(tmp_path, dockerd, warm=1) as (scheduler, running):
        await scheduler.finished(await scheduler.send(contained("true", image="penstock-moving:1")))
        waiting = await waits(dockerd, running)
        docker(dockerd, "import", "--change", "ENV MOVED=yes", str(made), "penstock-moving:1")
        moved = await scheduler.send(script("echo $MOVED $HOSTNAME", image="penstock-moving:1"))
        said = await scheduler.log(moved, "stdout")
        assert said.startswith("yes ") and waiting[:12] not in said
        assert waiting not in docker(dockerd, "ps", "--all", "--no-trunc", "--quiet")
        waiting = await waits(dockerd, running)
        again = await scheduler.send(script("echo $MOVED $HOSTNAME", image="penstock-moving:1"))
        assert await scheduler.log(again, "stdout") == f"yes {waiting[:12]}\n"
    docker(dockerd, "rmi", "penstock-moving:1")


async def test_what_waited_and_died_costs_its_step_nothing_but_time(tmp_path: Path, dockerd: Dockerd) -> None:
    async with a_docker_system(tmp_path, dockerd, warm=1) as (scheduler, running):
        await scheduler.finished(await scheduler.send(contained("true")))
        docker(dockerd, "kill", await waits(dockerd, running))
        attempt = await scheduler.send(script("echo x >>ran; cat ran"))
        assert await scheduler.log(attempt, "stdout") == "x\n"
        assert (await scheduler.finished(attempt)).status == "succeeded"


async def test_a_step_that_began_before_anybody_heard_of_it_is_not_run_again(
    tmp_path: Path, dockerd: Dockerd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This process was stopped, or the engine's answer was late: it runs already."""
    read_out, deaf = Attached.read_out, [True]

    async def late(stream: Attached) -> Any:
        if deaf:
            deaf.pop()
            await asyncio.sleep(60)
        return await read_out(stream)

    monkeypatch.setattr(container, "BEGIN_SECONDS", 1.0)
    async with a_docker_system(tmp_path, dockerd, warm=1) as (scheduler, running):
        await scheduler.finished(await scheduler.send(contained("true")))
        await waits(dockerd, running)
        monkeypatch.setattr(Attached, "read_out", late)
        attempt = await scheduler.send(script("echo x; sleep 60"))
        assert (await scheduler.finished(attempt)).status == "errored"
        assert scheduler.step(attempt).error == "the container engine was too slow: the step may have begun"
        await eventually(lambda: containers(dockerd) == [])


async def test_a_step_that_begins_during_a_sweep_is_no_stray(tmp_path: Path, dockerd: Dockerd, monkeypatch: pytest.MonkeyPatch) -> None:
    async with a_docker_system(tmp_path, dockerd, warm=1) as (scheduler, running):
        executor = executor_of(running)
        await scheduler.finished(await scheduler.send(contained("true")))
        await waits(dockerd, running)
        look, looked, go_on = executor._engine.containers, asyncio.Event(), asyncio.Event()

        async def slow(labels: Any) -> Any:
            found = await look(labels)
            looked.set()
            await go_on.wait()
            return found

        monkeypatch.setattr(executor._engine, "containers", slow)
        sweeping = asyncio.create_task(executor.sweep())
        await looked.wait()
        attempt = await scheduler.send(script("echo up; sleep 60"))
        await seen(scheduler, attempt, "up")
        go_on.set()
        assert await sweeping == 0
        scheduler.interrupted[attempt] = "aborted"
        assert (await scheduler.finished(attempt)).status == "aborted"


async def test_a_command_that_is_too_long_is_refused_by_an_engine_that_says_why(tmp_path: Path, dockerd: Dockerd) -> None:
    async with a_docker_system(tmp_path, dockerd, warm=1) as (scheduler, running):
        await scheduler.finished(await scheduler.send(contained("true")))
        await waits(dockerd, running)
        attempt = await scheduler.send(contained("true", params={"X": "x" * 200_000}))
        assert "argument list too long" in await scheduler.log(attempt, "stderr")


async def test_what_nobody_wants_goes_and_nothing_is_left_of_it(tmp_path: Path, dockerd: Dockerd) -> None:
    async with a_docker_system(tmp_path, dockerd, warm=1) as (scheduler, running):
        executor = executor_of(running)
        await scheduler.finished(await scheduler.send(contained("true")))
        await waits(dockerd, running)
        assert await executor.sweep() == 0
        await scheduler.finished(await scheduler.send(contained("true", memory=16 << 20)))
        await waits(dockerd, running)
        await executor._warm.expire(0.0)
        assert containers(dockerd) == []
        await eventually(lambda: not list((running.folder / "work").glob("warm-*/*/*")))
        await scheduler.finished(await scheduler.send(contained("true")))
        await waits(dockerd, running)
    assert containers(dockerd) == []


async def test_what_nobody_wants_and_cannot_be_removed_is_swept_later(tmp_path: Path, dockerd: Dockerd, monkeypatch: pytest.MonkeyPatch) -> None:
    async def busy(_: str) -> None:
        raise CannotRun("busy")

    async with a_docker_system(tmp_path, dockerd, warm=1) as (scheduler, running):
        executor = executor_of(running)
        await scheduler.finished(await scheduler.send(contained("true")))
        await waits(dockerd, running)
        with monkeypatch.context() as patched:
            patched.setattr(executor._engine, "remove", busy)
            await executor._warm.expire(0.0)
        assert len(containers(dockerd)) == 1
        assert await executor.sweep() == 1
        assert containers(dockerd) == []


async def test_what_waits_says_whose_it_is_and_for_what_and_a_later_life_removes_it(tmp_path: Path, dockerd: Dockerd) -> None:
    async with a_docker_system(tmp_path, dockerd, warm=1) as (scheduler, running):
        await scheduler.finished(await scheduler.send(contained("true")))
        waiting = inspected(dockerd, await waits(dockerd, running))
        labels = waiting["Config"]["Labels"]
        image = f"docker.io/library/{IMAGE}"
        assert labels == {"penstock.worker": "w1", "penstock.owner": str(tmp_path), "penstock.waits-for": image}
        left = [part for key, value in labels.items() for part in ("--label", f"{key}={value}")]
        docker(dockerd, "run", "--detach", "--network=none", "--name", "lost", *left, IMAGE, "sleep", "60")
        assert await executor_of(running).sweep() == 1
        assert docker(dockerd, "ps", "--all", "--no-trunc", "--quiet", "--filter", f"label=penstock.waits-for={image}") == waiting["Id"]


async def test_an_attempt_that_ends_before_its_step_gives_back_what_waited_for_it(tmp_path: Path, dockerd: Dockerd) -> None:
    async with a_docker_system(tmp_path, dockerd, warm=1) as (scheduler, running):
        await scheduler.finished(await scheduler.send(contained("true")))
        await waits(dockerd, running)
        attempt = await scheduler.send(contained("true", dir="nope"))
        assert (await scheduler.finished(attempt)).status == "errored"
        await eventually(lambda: containers(dockerd) == [])


async def test_two_workers_on_one_engine_leave_each_other_s_alone(tmp_path: Path, dockerd: Dockerd) -> None:
    async with (
        a_docker_system(tmp_path / "one", dockerd, warm=1) as (scheduler, running),
        a_docker_system(tmp_path / "two", dockerd, warm=1) as (others, beside),
    ):
        others._numbers = iter(range(1000, 1010))
        for each in (scheduler, others):
            await each.finished(await each.send(contained("true")))
        await eventually(lambda: len([name for name in containers(dockerd) if "warm" in name]) == len(containers(dockerd)) == 2, timeout=30)
        there = set(containers(dockerd))
        assert (await executor_of(running).sweep(), await executor_of(beside).sweep()) == (0, 0)
        assert set(containers(dockerd)) == there
        ours, theirs = await scheduler.send(script("echo up; sleep 60")), await others.send(script("echo up; sleep 60"))
        await seen(scheduler, ours, "up")
        await seen(others, theirs, "up")
        assert (await executor_of(running).sweep(), await executor_of(beside).sweep()) == (0, 0)
        scheduler.interrupted[ours] = "aborted"
        assert (await scheduler.finished(ours)).status == "aborted"
        assert containers(dockerd, theirs)
        others.interrupted[theirs] = "aborted"
        assert (await others.finished(theirs)).status == "aborted"


async def test_what_waits_ends_with_its_worker_however_that_dies(tmp_path: Path, fresh_nats: NatsServer, dockerd: Dockerd) -> None:
    settings = {"worker_executors": "process,docker", "worker_docker_url": dockerd.url, "worker_container_memory_bytes": str(64 << 20)}
    async with (
        admitting(fresh_nats, {"w1": public_key(IDENTITY)}),
        connect_jetstream(fresh_nats.url, SEEDS["scheduler"], "test") as bus,
        a_scheduler(bus) as scheduler,
    ):
        with a_process(tmp_path / "w", fresh_nats, **settings) as process:
            await scheduler.finished(await scheduler.send(contained("true")))
            waiting = await waits(dockerd)
            process.kill()
            process.wait()
            await eventually(lambda: not inspected(dockerd, waiting)["State"]["Running"])
            first_life = scheduler.heartbeats[-1].boot
        with a_process(tmp_path / "w", fresh_nats, **settings) as process:
            await eventually(lambda: scheduler.heartbeats[-1].boot != first_life, timeout=20)
            assert containers(dockerd) == []
            process.terminate()
            assert process.wait(20) == 0
