"""Steps as real processes, in every sandbox that this machine allows; the bus is in memory."""

import asyncio
import os
from pathlib import Path

import msgspec
import pytest
from structlog.testing import capture_logs

from libs.tokens import new_seed, sign
from proto.messages import Attempt, ReportStepProgressed, Signed
from services.worker.executors.sandboxes import Choice
from services.worker.workspace import Workspace
from tests.controls import eventually
from tests.worker_controls import Scheduler, a_system, alive, sandboxes_here, sh, step

SANDBOXES = sandboxes_here()
in_each_sandbox = pytest.mark.parametrize("sandbox", SANDBOXES)
NAMES = {"bwrap": "bubblewrap", "unshare": "unshare", "none": "none"}


async def seen(scheduler: Scheduler, attempt: Attempt, text: str) -> None:
    await eventually(lambda: text in scheduler.text(attempt))


@in_each_sandbox
async def test_a_step_that_says_nothing_costs_two_messages_and_no_log(tmp_path: Path, sandbox: Choice) -> None:
    async with a_system(tmp_path, sandbox=sandbox) as (scheduler, _):
        attempt = await scheduler.send(step("true"))
        extent = await scheduler.finished(attempt)
        assert (extent.status, extent.chunks, extent.lines) == ("succeeded", 0, 0)
        assert (await scheduler.started(attempt)).sandbox == NAMES[sandbox]
        assert scheduler.step(attempt).exit_code == 0
        assert scheduler.messages == 2


@in_each_sandbox
async def test_the_first_stderr_line_names_the_sandbox(tmp_path: Path, sandbox: Choice) -> None:
    async with a_system(tmp_path, sandbox=sandbox) as (scheduler, _):
        attempt = await scheduler.send(sh("echo out; echo err >&2; exit 3"))
        extent = await scheduler.finished(attempt)
        assert (extent.status, extent.lines, scheduler.step(attempt).exit_code) == ("failed", 3, 3)
        assert await scheduler.log(attempt, "stdout") == "out\n"
        assert await scheduler.log(attempt, "stderr") == f"penstock: worker w1, sandbox {NAMES[sandbox]}\nerr\n"


@in_each_sandbox
async def test_the_environment_is_only_what_was_promised(tmp_path: Path, sandbox: Choice) -> None:
    program = "import os, sys; print(sorted(os.environ)); print(os.environ['X'], os.environ['LANG'], sys.stdin.read() == '')"
    show = "import os; print(os.getcwd() == os.path.dirname(os.environ['HOME'].rstrip('/')).rstrip('/') + '/workspace', os.listdir())"
    async with a_system(tmp_path, sandbox=sandbox) as (scheduler, _):
        attempt = await scheduler.send(step("python3", "-c", program, params={"X": "a b"}), step("python3", "-c", show, name="second"))
        lines = (await scheduler.log(attempt, "stdout")).splitlines()
        names = set(lines[0].strip("[]").replace("'", "").split(", ")) - {"PWD", "LC_CTYPE"}
        assert names == {"PATH", "HOME", "TMPDIR", "LANG", "X"}
        assert lines[1:] == ["a b C.UTF-8 True", "True []"]


@in_each_sandbox
async def test_home_and_temp_are_the_attempts_own_and_empty(tmp_path: Path, sandbox: Choice) -> None:
    async with a_system(tmp_path, sandbox=sandbox, slots=1) as (scheduler, running):
        for _ in range(3):
            attempt = await scheduler.send(sh('ls -A "$HOME" "$TMPDIR" .; mkdir -p a/b; chmod 0 a/b; touch "$HOME/x" "$TMPDIR/y" z'))
            assert (await scheduler.finished(attempt)).status == "succeeded"
            assert "x" not in (await scheduler.log(attempt, "stdout")).split()
        await eventually(lambda: not list((running.folder / "work").iterdir()))


async def test_folders_with_a_steps_marks_are_not_used_again(tmp_path: Path) -> None:
    try:
        os.setxattr(tmp_path, "user.here", b"")
    except OSError:
        pytest.skip("no extended attributes here")
    async with a_system(tmp_path, slots=1) as (scheduler, _):
        program = "import os; print(os.listxattr('.')); os.setxattr('.', 'user.mark', b'x')"
        for _ in range(2):
            attempt = await scheduler.send(step("python3", "-c", program))
            assert await scheduler.log(attempt, "stdout") == "[]\n"


async def test_folders_of_any_depth_are_removed(tmp_path: Path) -> None:
    """What a step leaves must neither stay nor keep a worker from starting."""
    program = "import os\nfor _ in range(3000):\n os.mkdir('d' * 99)\n os.chdir('d' * 99)\n os.mkdir('e'); os.chmod('e', 0)"
    async with a_system(tmp_path) as (scheduler, running):
        attempt = await scheduler.send(step("python3", "-c", program))
        assert (await scheduler.finished(attempt)).status == "succeeded"
        await eventually(lambda: not list((running.folder / "work").iterdir()))


@in_each_sandbox
@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("no-such-command", "run.path: `no-such-command` does not exist in PATH"),
        ("./missing", "run.path: `./missing` does not exist"),
        ("/opt/no/such", "run.path: `/opt/no/such` does not exist"),
        ("./plain", "run.path: `./plain` is not executable"),
        ("./folder", "run.path: `./folder` is a folder"),
        ("./script", "run.path: `./script` needs `/opt/no/interpreter`, which does not exist"),
    ],
)
async def test_a_command_that_cannot_be_run_errors_naming_the_path(tmp_path: Path, sandbox: Choice, path: str, error: str) -> None:
    prepare = sh("touch plain; mkdir folder; printf '#!/opt/no/interpreter\\n' > script; chmod +x script", name="prepare")
    async with a_system(tmp_path, sandbox=sandbox) as (scheduler, _):
        attempt = await scheduler.send(prepare, step(path))
        extent = await scheduler.finished(attempt)
        assert extent.status == scheduler.step(attempt).status == "errored"
        assert scheduler.step(attempt).error.startswith(error)
        assert error in extent.error


async def test_the_workers_own_log_tells_of_each_attempt_and_nothing_of_what_is_in_it(tmp_path: Path) -> None:
    with capture_logs() as lines:
        async with a_system(tmp_path) as (scheduler, _):
            attempt = await scheduler.send(sh("echo hidden; exit 3"))
            await scheduler.finished(attempt)
            await eventually(lambda: any(line["event"] == "an attempt ended" for line in lines))
    begun, ended = (next(line for line in lines if line["event"] == event) for event in ("an attempt begins", "an attempt ended"))
    which = {"build": attempt.build, "stage": attempt.stage, "attempt": attempt.number}
    assert which.items() <= begun.items() and which.items() <= ended.items()
    assert (begun["log_level"], ended["log_level"], ended["status"]) == ("info", "info", "failed") and 0 <= ended["seconds"] < 60
    assert "hidden" not in str(lines)


@in_each_sandbox
@pytest.mark.parametrize("tool", ["bwrap", "unshare", "setpriv"])
async def test_a_step_that_speaks_like_its_sandbox_has_failed_by_itself(tmp_path: Path, sandbox: Choice, tool: str) -> None:
    async with a_system(tmp_path, sandbox=sandbox) as (scheduler, _):
        attempt = await scheduler.send(sh(f"echo '{tool}: cannot make a namespace' >&2; ls /proc/self/fd; exit 1"))
        assert (await scheduler.finished(attempt)).status == scheduler.step(attempt).status == "failed"
        assert scheduler.step(attempt).exit_code == 1
        assert (await scheduler.log(attempt, "stdout")).split() == ["0", "1", "2", "3"], "nothing of the worker's is left open to it"


async def test_a_sandbox_that_cannot_run_a_command_is_told_from_the_command(tmp_path: Path) -> None:
    if "bwrap" not in SANDBOXES:
        pytest.skip("no bubblewrap here")
    prepare = sh("printf '#!/usr\\n' > script; chmod +x script", name="prepare")
    async with a_system(tmp_path, sandbox="bwrap") as (scheduler, _):
        attempt = await scheduler.send(prepare, step("./script"))
        assert (await scheduler.finished(attempt)).status == "errored"
        assert scheduler.step(attempt).error.startswith("the sandbox could not run it: bwrap: execvp")


@in_each_sandbox
async def test_a_command_of_the_workspace_is_run_from_its_folder(tmp_path: Path, sandbox: Choice) -> None:
    prepare = sh("mkdir -p tools/bin; printf '#!/bin/sh\\nbasename $PWD; echo $1\\n' > tools/bin/tool; chmod +x tools/bin/tool", name="prepare")
    async with a_system(tmp_path, sandbox=sandbox) as (scheduler, _):
        attempt = await scheduler.send(prepare, step("bin/tool", "a word", dir="tools"))
        assert await scheduler.log(attempt, "stdout") == "tools\na word\n"
        attempt = await scheduler.send(step("true", dir="nowhere"))
        assert "run.dir: the folder `nowhere` does not exist" in (await scheduler.finished(attempt)).error


@in_each_sandbox
async def test_a_command_that_a_signal_ends_fails_naming_it(tmp_path: Path, sandbox: Choice) -> None:
    async with a_system(tmp_path, sandbox=sandbox) as (scheduler, _):
        attempt = await scheduler.send(sh("kill -SEGV $$"))
        assert (await scheduler.finished(attempt)).status == "failed"
        assert (scheduler.step(attempt).exit_code, scheduler.step(attempt).error) == (139, "killed by SIGSEGV")


@in_each_sandbox
async def test_an_abort_reaches_the_task_as_sigterm_and_its_exit_code_comes_back(tmp_path: Path, sandbox: Choice) -> None:
    """FAULTS 106: the tail, and a marker."""
    script = "trap 'echo cleaning up; exit 7' TERM; echo ready; while :; do sleep 0.05; done"
    async with a_system(tmp_path, sandbox=sandbox) as (scheduler, _):
        attempt = await scheduler.send(sh(script))
        await seen(scheduler, attempt, "ready")
        scheduler.interrupted[attempt] = "aborted"
        assert (await scheduler.finished(attempt)).status == "aborted"
        assert scheduler.step(attempt).exit_code == 7
        log = await scheduler.log(attempt)
        assert "penstock: interrupted: aborted\n" in log
        assert log.endswith("cleaning up\n")


@in_each_sandbox
async def test_a_task_that_ignores_sigterm_is_killed_with_everything(tmp_path: Path, sandbox: Choice) -> None:
    """FAULTS 54"""
    marker = f"7{os.getpid()}.54"
    script = f"trap '' TERM; sleep {marker} & (trap '' TERM; sleep {marker}) & echo ready; while :; do sleep {marker}; done"
    async with a_system(tmp_path, sandbox=sandbox, grace=0.3) as (scheduler, _):
        attempt = await scheduler.send(sh(script))
        await seen(scheduler, attempt, "ready")
        scheduler.interrupted[attempt] = "aborted"
        assert (await scheduler.finished(attempt)).status == "aborted"
        assert scheduler.step(attempt).exit_code is None
        await eventually(lambda: not alive(marker))


@in_each_sandbox
async def test_a_double_forked_daemon_dies_with_its_step(tmp_path: Path, sandbox: Choice) -> None:
    """FAULTS 55: one that keeps the environment, one that has none."""
    marker = f"7{os.getpid()}.55"
    script = f"(setsid sh -c 'sleep {marker} & sleep {marker}' >/dev/null 2>&1 &); (env -i setsid sleep {marker} >/dev/null 2>&1 &)"
    async with a_system(tmp_path, sandbox=sandbox) as (scheduler, running):
        attempt = await scheduler.send(sh(f"{script}; while [ ! -e go ]; do sleep 0.05; done"))
        await eventually(lambda: len(alive(marker)) >= 3)
        (workspace,) = (running.folder / "work").glob("*/workspace")
        (workspace / "go").touch()
        assert (await scheduler.finished(attempt)).status == "succeeded"
        await eventually(lambda: not alive(marker))


async def test_a_daemon_that_names_no_step_dies_when_none_can_have_made_it(tmp_path: Path) -> None:
    """FAULTS 55: another step still runs, whose daemon it could be."""
    marker = f"7{os.getpid()}.56"
    async with a_system(tmp_path, sandbox="none") as (scheduler, _):
        other = await scheduler.send(sh("echo ready; while [ ! -e go ]; do sleep 0.05; done"))
        await seen(scheduler, other, "ready")
        attempt = await scheduler.send(sh(f"(env -i setsid sleep {marker} >/dev/null 2>&1 &); sleep 0.1"))
        assert (await scheduler.finished(attempt)).status == "succeeded"
        scheduler.interrupted[other] = "aborted"
        await scheduler.finished(other)
        await eventually(lambda: not alive(marker))


@in_each_sandbox
async def test_what_a_background_process_still_holds_does_not_keep_the_step(tmp_path: Path, sandbox: Choice) -> None:
    marker = f"7{os.getpid()}.57"
    async with a_system(tmp_path, sandbox=sandbox) as (scheduler, _):
        attempt = await scheduler.send(sh(f"sleep {marker} & echo done"))
        assert (await scheduler.finished(attempt, timeout=5)).status == "succeeded"
        assert await scheduler.log(attempt, "stdout") == "done\n"
        await eventually(lambda: not alive(marker))


@in_each_sandbox
async def test_what_was_written_right_before_the_exit_is_there(tmp_path: Path, sandbox: Choice) -> None:
    """FAULTS 104"""
    async with a_system(tmp_path, sandbox=sandbox, slots=4) as (scheduler, _):
        attempts = [await scheduler.send(sh(f"head -c 60000 /dev/zero | tr '\\0' x; printf 'last{i}'")) for i in range(12)]
        for i, attempt in enumerate(attempts):
            assert (await scheduler.log(attempt, "stdout")).endswith(f"xlast{i}")


async def test_a_step_past_its_timeout_fails_saying_so(tmp_path: Path) -> None:
    async with a_system(tmp_path, grace=0.2) as (scheduler, _):
        attempt = await scheduler.send(step("sleep", "60", timeout=1))
        extent = await scheduler.finished(attempt)
        assert extent.status == "failed"
        assert "its timeout of 1 s is up" in extent.error
        attempt = await scheduler.send(step("sleep", "60"))
        await scheduler.started(attempt)
        scheduler.interrupted[attempt] = "timeout"
        assert (await scheduler.finished(attempt)).status == "failed"


async def test_progress_never_falls_and_its_last_value_is_told(tmp_path: Path) -> None:
    """FAULTS 105: it stays in the log."""
    script = "for i in 10 5 20 300 x 30; do echo ::progress $i::; sleep 0.05; done; printf '::progress 99::'"
    async with a_system(tmp_path) as (scheduler, _):
        attempt = await scheduler.send(sh(script))
        await scheduler.finished(attempt)
        percents = [body.percent for _, body in sorted(scheduler.reports[attempt].items()) if isinstance(body, ReportStepProgressed)]
        assert percents == [10, 30]
        assert (await scheduler.log(attempt, "stdout")).count("::progress") == 7


async def test_an_unfinished_line_is_seen_while_the_step_waits(tmp_path: Path) -> None:
    async with a_system(tmp_path) as (scheduler, _):
        attempt = await scheduler.send(sh("printf 'password: '; while [ ! -e go ]; do sleep 0.05; done"))
        await seen(scheduler, attempt, "password: ")
        scheduler.interrupted[attempt] = "aborted"
        await scheduler.finished(attempt)


async def test_a_flood_is_bounded_and_says_so(tmp_path: Path) -> None:
    """FAULTS 101"""
    async with a_system(tmp_path, log_limit=1 << 20) as (scheduler, _):
        attempt = await scheduler.send(sh("head -c 5000000 /dev/zero | tr '\\0' '\\n'; echo bye >&2"))
        extent = await scheduler.finished(attempt)
        assert extent.status == "succeeded"
        assert extent.dropped > 3_900_000
        log = await scheduler.log(attempt)
        assert len(log) < (1 << 20) + 200
        assert log.splitlines()[-1] == f"penstock: log limit of 1 MiB reached, {extent.dropped} bytes dropped"


async def test_a_step_waits_while_nobody_takes_its_log(tmp_path: Path) -> None:
    """FAULTS 100: memory is bounded because the pipe is not read; nothing is lost."""
    async with a_system(tmp_path) as (scheduler, running):
        attempt = await scheduler.send(sh("echo ready; while [ ! -e go ]; do sleep 0.02; done; head -c 20000000 /dev/zero | tr '\\0' '\\n'"))
        await seen(scheduler, attempt, "ready")
        scheduler.bus.connected = False  # type: ignore[misc]
        (workspace,) = (running.folder / "work").glob("*/workspace")
        (workspace / "go").touch()
        await eventually(lambda: running.outbox.is_full(attempt))
        assert not any(body for body in scheduler.reports[attempt].values() if "finished" in str(type(body)).lower())
        scheduler.bus.connected = True  # type: ignore[misc]
        extent = await scheduler.finished(attempt, timeout=40)
        assert (extent.status, extent.bytes) == ("succeeded", 20_000_000 + len("ready\n") + len("penstock: worker w1, sandbox none\n"))
        await eventually(lambda: len(scheduler.chunks[attempt]) == extent.chunks)


async def test_an_attempt_that_is_not_ours_any_more_is_killed_silently(tmp_path: Path) -> None:
    """FAULTS 45"""
    marker = f"7{os.getpid()}.45"
    async with a_system(tmp_path) as (scheduler, _):
        attempt = await scheduler.send(step("sleep", marker))
        await scheduler.started(attempt)
        scheduler.lost.add(attempt)
        await eventually(lambda: not alive(marker))
        await eventually(lambda: len(scheduler.heartbeats[-1].availability.credits) == 2 and not scheduler.heartbeats[-1].running)
        assert len(scheduler.reports[attempt]) == 1


async def test_an_attempt_that_is_not_ours_any_more_while_it_tidies_up_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tidying, on, close = asyncio.Event(), asyncio.Event(), Workspace.close

    async def held(workspace: Workspace) -> None:
        tidying.set()
        await on.wait()
        await close(workspace)

    monkeypatch.setattr(Workspace, "close", held)
    async with a_system(tmp_path) as (scheduler, running):
        attempt = await scheduler.send(sh("touch left"))
        await scheduler.finished(attempt)
        await tidying.wait()
        task = running.worker._runs[attempt][1]
        scheduler.lost.add(attempt)
        await eventually(task.cancelling)
        on.set()
        await eventually(task.done)
        assert list((running.folder / "work").iterdir()) == []


async def test_without_answers_a_worker_ends_its_work_by_itself(tmp_path: Path) -> None:
    marker = f"7{os.getpid()}.46"
    async with a_system(tmp_path, lease_seconds=1.5) as (scheduler, _):
        attempt = await scheduler.send(step("sleep", marker))
        await scheduler.started(attempt)
        scheduler.silent = True
        await eventually(lambda: not alive(marker), timeout=5)
        assert len(scheduler.reports[attempt]) == 1


async def test_reports_are_said_again_until_they_are_recorded(tmp_path: Path) -> None:
    """The stream loses them; nothing else is told."""
    async with a_system(tmp_path) as (scheduler, _):
        scheduler.records = scheduler.archives = False
        attempt = await scheduler.send(sh("echo kept"))
        await scheduler.finished(attempt)
        scheduler.reports.clear()
        scheduler.bus.lose("REPORTS")  # type: ignore[attr-defined]
        assert (await scheduler.finished(attempt)).status == "succeeded"
        assert sorted(scheduler.reports[attempt]) == [1, 2, 3]
        scheduler.records = scheduler.archives = True
        await eventually(lambda: not scheduler.heartbeats[-1].running and not scheduler.heartbeats[-1].logs)


async def test_forged_packages_and_control_change_nothing(tmp_path: Path) -> None:
    """FAULTS 88"""
    async with a_system(tmp_path) as (scheduler, _):
        attempt = Attempt("forged", "main", 1)
        package = msgspec.msgpack.decode(await scheduler.package(attempt, step("true")), type=Signed)
        forger = new_seed()
        for forged in (
            b"junk",
            msgspec.msgpack.encode(Signed(package.body, b"x" * 64)),
            msgspec.msgpack.encode(sign(forger, "execute_build_package.w1", package.body)),
        ):
            await scheduler.bus.send("execute_build_package.w1", forged)
            await scheduler.bus.send("control.w1", forged)
        real = await scheduler.send(step("true"))
        await scheduler.finished(real)
        assert attempt not in scheduler.reports


async def test_a_drained_worker_stops_its_steps_and_says_goodbye(tmp_path: Path) -> None:
    async with a_system(tmp_path, grace=5) as (scheduler, running):
        attempt = await scheduler.send(sh("trap 'exit 0' TERM; echo ready; while :; do sleep 0.05; done"))
        await seen(scheduler, attempt, "ready")
        await asyncio.wait_for(running.worker.drain(), 3)
        await eventually(lambda: scheduler.heartbeats[-1].goodbye)
        assert scheduler.heartbeats[-1].availability.credits == []
        assert len(scheduler.reports[attempt]) == 1
