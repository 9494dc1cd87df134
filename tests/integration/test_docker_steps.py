"""Steps in containers of a real engine; the bus is in memory."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiodocker.stream import Stream as Attached

from libs.archives.pump import in_thread
from proto.messages import Attempt
from proto.plan import ImageResource, TaskCache, TaskInput
from services.worker.executors.docker import DockerExecutor
from tests.controls import eventually
from tests.engine_controls import a_docker_system, contained, containers, docker, script
from tests.engine_fixture import IMAGE, Dockerd, a_dockerd
from tests.worker_controls import Scheduler, sh
from tests.worker_shop import TOKEN, a_shop


async def seen(scheduler: Scheduler, attempt: Attempt, text: str) -> None:
    await eventually(lambda: text in scheduler.text(attempt))


async def test_a_step_runs_in_its_image_and_its_container_is_gone_afterwards(tmp_path: Path, dockerd: Dockerd) -> None:
    async with a_docker_system(tmp_path, dockerd) as (scheduler, _):
        attempt = await scheduler.send(script("echo out; echo err >&2; cat /etc/passwd; exit 3"))
        extent = await scheduler.finished(attempt)
        assert (extent.status, scheduler.step(attempt).exit_code) == ("failed", 3)
        assert (await scheduler.log(attempt, "stdout")).splitlines()[::2] == ["out", "builder:x:1234:1234::/:/bin/sh"]
        assert await scheduler.log(attempt, "stderr") == "penstock: worker w1, sandbox docker\nerr\n"
        started = await scheduler.started(attempt)
        assert (started.sandbox, started.image) == ("docker", docker(dockerd, "image", "inspect", "--format", "{{.Id}}", IMAGE))
        assert started.reference == f"docker.io/library/{IMAGE}"
        await eventually(lambda: not containers(dockerd, attempt))


async def test_a_step_whose_output_cannot_be_read_any_more_is_ended_and_says_so(
    tmp_path: Path, dockerd: Dockerd, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Attached.read_out

    async def broken(stream: Attached) -> Any:
        await read(stream)
        raise ValueError("a frame that is none")

    monkeypatch.setattr(Attached, "read_out", broken)
    async with a_docker_system(tmp_path, dockerd) as (scheduler, _):
        attempt = await scheduler.send(script("echo out; sleep 60"))
        extent = await scheduler.finished(attempt)
        assert (extent.status, scheduler.step(attempt).error) == ("errored", "what the step wrote was lost: ValueError")
        await eventually(lambda: not containers(dockerd, attempt))


async def test_a_step_has_no_more_than_it_needs(tmp_path: Path, dockerd: Dockerd) -> None:
    look = """
        busybox grep -E 'CapEff|CapBnd|NoNewPrivs' /proc/self/status | busybox tr -d '\\t'
        ip link | busybox grep -c mtu
        touch /x || echo read-only
        touch /tmp/x /workspace/x $HOME/x && echo writable
        id -u; pwd; echo $HOME $TMPDIR $X
    """
    async with a_docker_system(tmp_path, dockerd) as (scheduler, _):
        attempt = await scheduler.send(script(look, params={"X": "a b"}))
        assert (await scheduler.log(attempt, "stdout")).splitlines() == [
            "CapEff:0000000000000000",
            "CapBnd:0000000000000000",
            "NoNewPrivs:1",
            "1",
            "read-only",
            "writable",
            "0",
            "/workspace",
            "/home/penstock /tmp a b",
        ]


async def test_limits_are_the_tasks_but_never_more_than_the_workers(tmp_path: Path, dockerd: Dockerd) -> None:
    async with a_docker_system(tmp_path, dockerd, slots=3) as (scheduler, _):
        attempts = [await scheduler.send(script("echo up; sleep 60", memory=memory)) for memory in (64 << 20, 1 << 40, None)]
        limits = []
        for attempt in attempts:
            await seen(scheduler, attempt, "up")
            host = settings_of(dockerd, attempt)
            assert host["MemorySwap"] == host["Memory"]
            assert (host["PidsLimit"], host["NetworkMode"], host["LogConfig"]["Type"], host["Privileged"]) == (64, "none", "none", False)
            limits.append(host["Memory"])
            scheduler.interrupted[attempt] = "aborted"
        assert limits == [64 << 20, 256 << 20, 256 << 20]
        for attempt in attempts:
            assert (await scheduler.finished(attempt)).status == "aborted"


async def test_inputs_are_read_only_unless_their_folder_is_an_output_too(tmp_path: Path, dockerd: Dockerd) -> None:
    source = tmp_path / "in" / "src" / "deep"
    source.mkdir(parents=True)
    (source / "file").write_text("one\n")
    first = "cat src/deep/file; for f in src/x src/deep/file; do touch $f || echo refused; done; cat src/deep/file >dist/copy; echo c >cache/c"
    src = [TaskInput(name="src")]
    async with a_shop(tmp_path) as shop, a_docker_system(tmp_path / "w", dockerd, artifacts_url=shop.url) as (scheduler, _):
        attempt = await scheduler.send(
            script(first, inputs=src, outputs=["dist"], caches=[TaskCache(path="cache")]),
            script("cat dist/copy cache/c; touch dist/new || echo refused", name="second", inputs=[TaskInput(name="dist")]),
            script("echo changed >src/deep/file; cat src/deep/file", name="third", inputs=src, outputs=["src"]),
            inputs=shop.refs("src"),
            token=TOKEN,
        )
        assert (await scheduler.log(attempt, "stdout")).splitlines() == ["one", "refused", "refused", "one", "c", "refused", "changed"]
        assert (tmp_path / "out" / "step" / "dist" / "copy").read_text() == "one\n"
        assert (tmp_path / "out" / "third" / "src" / "deep" / "file").read_text() == "changed\n"


async def test_a_step_is_run_as_its_user_who_may_write_where_it_should(tmp_path: Path, dockerd: Dockerd) -> None:
    (tmp_path / "in" / "src").mkdir(parents=True)
    (tmp_path / "in" / "src" / "file").write_text("1")
    write = "id -u; id -g; touch here dist/there $HOME/x && echo written; touch src/x || echo refused; cat src/file"
    async with a_shop(tmp_path) as shop, a_docker_system(tmp_path / "w", dockerd, artifacts_url=shop.url) as (scheduler, running):
        for name, user in (("by-name", "builder"), ("by-number", "1234:1234")):
            attempt = await scheduler.send(
                script(write, name=name, user=user, inputs=[TaskInput(name="src")], outputs=["dist"]), inputs=shop.refs("src"), token=TOKEN
            )
            assert (await scheduler.log(attempt, "stdout")).splitlines() == ["1234", "1234", "written", "refused", "1"]
            assert (await scheduler.finished(attempt)).status == "succeeded"
        await eventually(lambda: not list((running.folder / "work").iterdir()))
        unknown = await scheduler.send(script("true", user="nobody-here"))
        assert ((await scheduler.finished(unknown)).status, "nobody-here" in scheduler.step(unknown).error) == ("errored", True)


async def test_images_are_named_as_concourse_does_it(tmp_path: Path, dockerd: Dockerd) -> None:
    async with a_docker_system(tmp_path, dockerd) as (scheduler, _):
        for kind in ("registry-image", "docker-image"):
            plain = script("echo here")
            resource = ImageResource(type=kind, source={"repository": "penstock-test", "tag": 1})
            config = msgspec.structs.replace(plain.config, image=None, image_resource=resource)
            attempt = await scheduler.send(msgspec.structs.replace(plain, config=config))
            assert await scheduler.log(attempt, "stdout") == "here\n"


PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("nope", f"run.path: `nope` does not exist in its image (PATH is {PATH})"),
        ("/bin/nope", "run.path: `/bin/nope` does not exist in its image"),
        ("/bin", "run.path: `/bin` is a folder in its image"),
        ("./nope", "run.path: `./nope` does not exist"),
        ("not-executable", f"run.path: `/bin/not-executable` is not executable in its image (PATH is {PATH})"),
    ],
)
async def test_a_command_that_is_not_there_is_said(tmp_path: Path, dockerd: Dockerd, path: str, said: str) -> None:
    async with a_docker_system(tmp_path, dockerd) as (scheduler, _):
        attempt = await scheduler.send(contained(path))
        assert ((await scheduler.finished(attempt)).status, scheduler.step(attempt).error) == ("errored", said)


async def test_a_command_of_the_workspace_is_one_that_is_there_and_may_be_run(tmp_path: Path, dockerd: Dockerd) -> None:
    make = "echo 'echo made' >a; echo 'echo made' >b; busybox chmod +x b; ln -s /bin/busybox c; echo '#!/nope' >d; busybox chmod +x d"
    run = "run.path: `./{}` {}".format
    async with a_docker_system(tmp_path, dockerd) as (scheduler, _):
        for name, error in (("a", run("a", "is not executable")), ("b", ""), ("c", ""), ("d", "")):
            attempt = await scheduler.send(script(make), contained(f"./{name}", "echo", "linked", name="second"))
            await scheduler.finished(attempt)
            assert scheduler.step(attempt, "second").error == error
        assert scheduler.step(attempt, "second").status == "failed"
        assert "exec /workspace/d failed: No such file or directory" in await scheduler.log(attempt, "stderr")
        for path, where in (("b", "/workspace:/bin"), ("./bin/echo", "")):
            run = contained(path, name="second", params={"PATH": where} if where else {})
            attempt = await scheduler.send(script(f"{make}; ln -s /bin bin"), run)
            assert (await scheduler.finished(attempt)).status == "succeeded", "where a link leads, or PATH, is the step's own affair"


@pytest.mark.parametrize("code", [126, 127])
async def test_a_step_that_speaks_like_the_engines_init_has_failed_by_itself(tmp_path: Path, dockerd: Dockerd, code: int) -> None:
    lie = f"echo '[FATAL tini (7)] exec nope failed: No such file or directory' >&2; busybox rm -f tool; exit {code}"
    make = f'echo "{lie}" >tool; busybox chmod +x tool'
    async with a_docker_system(tmp_path, dockerd, warm=1) as (scheduler, running):
        executor = running.tools.executors.containers
        assert isinstance(executor, DockerExecutor)
        for _ in range(2):
            attempt = await scheduler.send(script(lie))
            assert (await scheduler.finished(attempt)).status == "failed"
            assert (scheduler.step(attempt).exit_code, scheduler.step(attempt).error) == (code, "")
            await eventually(lambda: executor.waiting, timeout=30)
        attempt = await scheduler.send(script(make), contained("./tool", name="second"))
        assert (await scheduler.finished(attempt)).status == "failed"
        assert (scheduler.step(attempt, "second").exit_code, scheduler.step(attempt, "second").error) == (code, "")


async def test_a_folder_to_run_in_that_is_not_there_is_said(tmp_path: Path, dockerd: Dockerd) -> None:
    async with a_docker_system(tmp_path, dockerd) as (scheduler, _):
        attempt = await scheduler.send(contained("true", dir="nope"))
        assert (await scheduler.finished(attempt)).status == "errored"
        assert scheduler.step(attempt).error == "run.dir: the folder `nope` does not exist"


async def test_a_link_that_an_earlier_step_left_leads_no_container_out_of_the_workspace(tmp_path: Path, dockerd: Dockerd) -> None:
    """The engine would follow it, as root, on the worker's machine."""
    (tmp_path / "machines").mkdir()
    (tmp_path / "machines" / "file").write_text("the machine's own")
    link = f"busybox rm -r out; ln -s {tmp_path}/machines out"
    async with a_shop(tmp_path) as shop, a_docker_system(tmp_path / "w", dockerd, artifacts_url=shop.url) as (scheduler, _):
        for name, wants in (
            ("read", {"inputs": [TaskInput(name="out")]}),
            ("write", {"outputs": ["out"]}),
            ("keep", {"caches": [TaskCache(path="out")]}),
        ):
            attempt = await scheduler.send(
                script("true", name=name, outputs=["out"]), script(link, name="link"), script("cat out/file", name="last", **wants), token=TOKEN
            )
            assert (await scheduler.finished(attempt)).status == "errored"
            assert "leads through a link" in scheduler.step(attempt, "last").error
            assert "own" not in await scheduler.log(attempt)


async def test_privileged_is_for_workers_that_allow_it(tmp_path: Path, dockerd: Dockerd) -> None:
    async with a_docker_system(tmp_path, dockerd) as (scheduler, _):
        attempt = await scheduler.send(script("true", privileged=True))
        assert (await scheduler.finished(attempt)).status == "errored"
        assert scheduler.step(attempt).error == "this worker runs no privileged steps"


async def test_only_a_step_that_asks_for_a_network_reaches_a_server(tmp_path: Path, engines: None) -> None:
    """On an engine with a bridge, in a network of its own, which nothing leaves; in new containers and in one that waited."""
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "file").write_text("from the server\n")
    serve = [sys.executable, "-u", "-m", "http.server", "--bind", "10.231.7.1", "--directory", str(tmp_path / "served"), "7000"]
    fetch = "echo 'GET /file HTTP/1.0' >asked; echo >>asked; busybox nc -w 5 10.231.7.1 7000 <asked"
    with a_dockerd("10.231.7.1/24") as engine, subprocess.Popen(engine.inside(*serve), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as server:
        try:
            assert server.stdout and await in_thread(server.stdout.readline)
            async with a_docker_system(tmp_path / "w", engine, warm=1) as (scheduler, running):
                executor = running.tools.executors.containers
                assert isinstance(executor, DockerExecutor)
                for _ in range(2):
                    without = await scheduler.send(script(fetch))
                    assert (await scheduler.finished(without)).status == "failed"
                    assert "Network is unreachable" in await scheduler.log(without, "stderr")
                    await eventually(lambda: executor.waiting, timeout=30)
                for _ in range(2):
                    asking = await scheduler.send(script(fetch, network=True))
                    assert (await scheduler.log(asking, "stdout")).endswith("\nfrom the server\n")
                    await eventually(lambda: executor.waiting, timeout=30)
        finally:
            server.kill()


async def test_sigterm_reaches_the_step_and_its_exit_code_counts(tmp_path: Path, dockerd: Dockerd) -> None:
    async with a_docker_system(tmp_path, dockerd) as (scheduler, _):
        attempt = await scheduler.send(script("trap 'echo cleaned; exit 7' TERM; echo up; while true; do sleep 0.05; done"))
        await seen(scheduler, attempt, "up")
        scheduler.interrupted[attempt] = "aborted"
        assert (await scheduler.finished(attempt)).status == "aborted"
        assert scheduler.step(attempt).exit_code == 7
        assert "cleaned" in await scheduler.log(attempt)


async def test_a_process_step_and_a_container_share_a_workspace(tmp_path: Path, dockerd: Dockerd) -> None:
    async with a_docker_system(tmp_path, dockerd) as (scheduler, _):
        attempt = await scheduler.send(sh("echo from a process >shared"), script("cat shared", name="second"))
        assert await scheduler.log(attempt, "stdout") == "from a process\n"


async def test_a_user_without_an_image_is_refused_rather_than_forgotten(tmp_path: Path, dockerd: Dockerd) -> None:
    """The stage is placed for its other step's sake."""
    plain = sh("id -u", name="second")
    config = msgspec.structs.replace(plain.config, run=msgspec.structs.replace(plain.config.run, user="nobody"))
    async with a_docker_system(tmp_path, dockerd) as (scheduler, _):
        attempt = await scheduler.send(script("true"), msgspec.structs.replace(plain, config=config))
        assert (await scheduler.finished(attempt)).status == "errored"
        assert "the step must name an image" in scheduler.step(attempt, "second").error


def settings_of(engine: Dockerd, attempt: Attempt) -> dict[str, Any]:
    """What its container was made with."""
    [shown] = json.loads(docker(engine, "inspect", *containers(engine, attempt)))
    return dict(shown["HostConfig"])
