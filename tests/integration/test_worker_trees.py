"""Inputs and outputs, from and to an artifacts service that speaks the real protocol; in each sandbox, and by each means to place a tree."""

from pathlib import Path

import pytest

from proto.events.base import ArtifactRef
from proto.plan import TaskInput, TaskOutput
from services.worker.executors.sandboxes import Choice
from services.worker.placing import Means
from tests.worker_controls import a_system, all_means, means, sandboxes_here, sh
from tests.worker_shop import TOKEN, a_shop

__all__ = ["all_means", "means"]

REF = ArtifactRef(id="a1", digest="d1")


@pytest.mark.parametrize("sandbox", sandboxes_here())
async def test_inputs_are_placed_and_outputs_taken(tmp_path: Path, sandbox: Choice, means: Means) -> None:
    (tmp_path / "in" / "src" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "src" / "deep" / "tool").write_text("#!/bin/sh\necho made of $1 > dist/result\n")
    (tmp_path / "in" / "src" / "deep" / "tool").chmod(0o755)
    async with a_shop(tmp_path) as shop, a_system(tmp_path / "w", sandbox=sandbox, means=means, artifacts_url=shop.url) as (scheduler, _):
        make = sh("source/deep/tool parts; ls dist", name="make", inputs=[TaskInput(name="src", path="source")], outputs=["dist"])
        use = sh("cat dist/result", name="use", inputs=[TaskInput(name="dist")])
        attempt = await scheduler.send(make, use, inputs=shop.refs("src"), token=TOKEN)
        assert (await scheduler.finished(attempt)).status == "succeeded"
        ref = scheduler.step(attempt, "make").outputs["dist"]
        assert (ref.id, ref.size, ref.files) == ("make-dist", 14, 1)
        assert (tmp_path / "out" / "make" / "dist" / "result").read_text() == "made of parts\n"
        assert await scheduler.log(attempt, "stdout") == "result\nmade of parts\n"


async def test_a_later_step_may_want_an_earlier_output_elsewhere(tmp_path: Path) -> None:
    async with a_shop(tmp_path) as shop, a_system(tmp_path / "w", artifacts_url=shop.url) as (scheduler, _):
        attempt = await scheduler.send(
            sh("echo x > dist/result", name="make", outputs=["dist"]),
            sh("cat again/result", name="use", inputs=[TaskInput(name="dist", path="again"), TaskInput(name="absent", optional=True)]),
            token=TOKEN,
        )
        assert await scheduler.log(attempt, "stdout") == "x\n"


async def test_a_missing_input_errors_naming_it(tmp_path: Path) -> None:
    async with a_system(tmp_path) as (scheduler, _):
        attempt = await scheduler.send(sh("true", inputs=[TaskInput(name="src")]))
        extent = await scheduler.finished(attempt)
        assert (extent.status, extent.error) == ("errored", "step `step`: input `src` is missing")


async def test_outputs_are_taken_after_a_failure_too(tmp_path: Path) -> None:
    async with a_shop(tmp_path) as shop, a_system(tmp_path / "w", artifacts_url=shop.url) as (scheduler, _):
        attempt = await scheduler.send(sh("echo why > report/text; exit 2", outputs=["report"]), token=TOKEN)
        assert (await scheduler.finished(attempt)).status == "failed"
        assert scheduler.step(attempt).exit_code == 2
        assert scheduler.step(attempt).outputs["report"].files == 1


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ("rmdir dist", "output `dist`: the folder `dist` is gone"),
        ("rmdir dist; touch dist", "output `dist`: the folder `dist` is not a folder"),
        ("rmdir dist; ln -s / dist", "output `dist`: the folder `dist` leads through a link, `dist`"),
    ],
)
async def test_an_output_folder_that_is_none_at_the_end_fails_the_step(tmp_path: Path, script: str, error: str) -> None:
    async with a_shop(tmp_path) as shop, a_system(tmp_path / "w", artifacts_url=shop.url) as (scheduler, _):
        attempt = await scheduler.send(sh(script, outputs=["dist", "other"]), token=TOKEN)
        assert (await scheduler.finished(attempt)).status == "failed"
        assert scheduler.step(attempt).error == error
        assert list(scheduler.step(attempt).outputs) == ["other"]


async def test_no_link_of_a_step_leads_the_worker_out_of_the_workspace(tmp_path: Path, means: Means) -> None:
    """The worker places and takes folders from outside of the sandbox: a path that is nothing to the step is the machine's own to the worker."""
    secret = tmp_path / "host" / "secret"
    secret.mkdir(parents=True)
    (secret / "key").write_text("the key")
    (tmp_path / "in" / "src").mkdir(parents=True)
    (tmp_path / "in" / "src" / "file").touch()
    lead = f"ln -s {tmp_path}/host"
    one, two = TaskInput(name="src", path="a/new"), TaskInput(name="dist", path="copy")
    cases = {
        "taken": [sh(f"rmdir a/secret a; {lead} a", outputs=[TaskOutput(name="dist", path="a/secret")])],
        "made": [sh(f"{lead} a", name="first"), sh("true", outputs=[TaskOutput(name="dist", path="a/new/dist")])],
        "placed": [sh(f"{lead} a", name="first"), sh("true", inputs=[one])],
        "copied": [
            sh("true", name="first", outputs=["dist"]),
            sh(f"rmdir dist; {lead} dist", name="second"),
            sh("cat copy/secret/key", inputs=[two]),
        ],
        "written": [
            sh("mkdir dist/secret; echo x > dist/secret/key", name="first", outputs=["dist"]),
            sh(f"mkdir copy; {lead}/secret copy/secret", name="second"),
            sh("true", inputs=[two]),
        ],
    }
    async with a_shop(tmp_path) as shop, a_system(tmp_path / "w", means=means, artifacts_url=shop.url) as (scheduler, _):
        for what, steps in cases.items():
            attempt = await scheduler.send(*steps, inputs=shop.refs("src"), token=TOKEN)
            extent = await scheduler.finished(attempt)
            assert extent.status in ("failed", "errored"), what
            assert "link" in extent.error, what
            assert "the key" not in scheduler.text(attempt), what
            assert not (tmp_path / "out" / "step").exists(), what
            assert [path.name for path in (tmp_path / "host").iterdir()] == ["secret"], what
            assert (secret / "key").read_text() == "the key", what


async def test_what_no_archive_can_hold_is_told_at_once(tmp_path: Path) -> None:
    async with a_shop(tmp_path) as shop, a_system(tmp_path / "w", artifacts_url=shop.url) as (scheduler, _):
        attempt = await scheduler.send(sh("mkfifo dist/pipe", outputs=["dist"]), token=TOKEN)
        assert "`pipe` is neither a file, a folder nor a link" in (await scheduler.finished(attempt, timeout=5)).error


async def test_an_artifacts_service_that_restarts_is_waited_for(tmp_path: Path) -> None:
    (tmp_path / "in" / "src").mkdir(parents=True)
    async with a_shop(tmp_path) as shop, a_system(tmp_path / "w", artifacts_url=shop.url) as (scheduler, _):
        shop.down = 2
        attempt = await scheduler.send(sh("true", inputs=[TaskInput(name="src")], outputs=["dist"]), inputs=shop.refs("src"), token=TOKEN)
        assert (await scheduler.finished(attempt)).status == "succeeded"


async def test_one_that_stays_away_errors_the_step(tmp_path: Path) -> None:
    async with a_system(tmp_path, artifacts_url="http://127.0.0.1:9", patience=0.3) as (scheduler, _):
        attempt = await scheduler.send(sh("true", inputs=[TaskInput(name="src")]), inputs={"src": REF})
        extent = await scheduler.finished(attempt)
        assert extent.status == "errored"
        assert "input `src`: the artifacts service did not answer" in extent.error


async def test_a_refusal_is_told_at_once(tmp_path: Path) -> None:
    async with a_shop(tmp_path) as shop, a_system(tmp_path / "w", artifacts_url=shop.url) as (scheduler, _):
        for name in ("src", "lib"):
            (tmp_path / "in" / name).mkdir(parents=True)
            (tmp_path / "in" / name / name).touch()
        inputs = [TaskInput(name="src"), TaskInput(name="lib")]
        attempt = await scheduler.send(sh("true", inputs=inputs), inputs=shop.refs("src", "lib"), token="another's")
        assert "`: 403 Forbidden" in (await scheduler.finished(attempt, timeout=3)).error


async def test_an_abort_does_not_wait_for_a_download(tmp_path: Path) -> None:
    async with a_system(tmp_path, artifacts_url="http://127.0.0.1:9", patience=60) as (scheduler, _):
        attempt = await scheduler.send(sh("true", inputs=[TaskInput(name="src")]), inputs={"src": REF})
        scheduler.interrupted[attempt] = "aborted"
        assert (await scheduler.finished(attempt, timeout=5)).status == "aborted"
