"""The main job, end to end: a folder goes up, a task runs on it, its log is seen, its outputs come back."""

import contextlib
import json
import os
import pty
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.conftest import Cli, read_until


def folder(path: Path, **files: str) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (path / name).write_text(content)
    return path


def test_a_folder_goes_up_a_task_runs_and_its_output_comes_back(cli: Cli) -> None:
    folder(cli.folder / "in", a="one\n", b="two\n")
    task = cli.task("cat src/a src/b > dist/both; echo out; echo err >&2", inputs=["src"], outputs=["dist"])
    result = cli("execute", "-c", task, "-i", "src=in", "-o", "dist=got/here")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "out\n"
    assert "err\n" in result.stderr
    assert (cli.folder / "got/here/both").read_text() == "one\ntwo\n"
    lines = result.stderr.splitlines()
    assert lines[0] == "uploaded src: 2 files, 8 B: hashed 8 B, sent 8 B"
    assert lines[1].startswith("build ")
    assert "http://127.0.0.1:" in lines[1]
    assert lines[-2] == "downloaded dist: 1 file, 8 B"
    assert lines[-1] == "succeeded"


def test_a_failing_task_gives_its_own_exit_code_and_its_outputs_all_the_same(cli: Cli) -> None:
    task = cli.task("echo partial > dist/report; exit 7", outputs=["dist"])
    result = cli("execute", "-c", task, "-o", "dist=out")
    assert result.returncode == 7
    assert result.stderr.splitlines()[-1] == "failed"
    assert (cli.folder / "out/report").read_text() == "partial\n"


def test_a_command_that_does_not_exist_is_an_error_that_names_it(cli: Cli) -> None:
    (cli.folder / "task.yml").write_text("platform: linux\nrun: {path: no-such-command}")
    result = cli("execute", "-c", "task.yml")
    assert result.returncode == 2
    assert "no-such-command" in result.stderr
    assert result.stderr.splitlines()[-1] == "errored"


def test_arguments_after_the_dashes_go_to_the_task(cli: Cli) -> None:
    (cli.folder / "task.yml").write_text("platform: linux\nrun: {path: printf, args: ['%s|']}")
    result = cli("execute", "-c", "task.yml", "--", "--flag", "two words", "-i")
    assert result.stdout == "--flag|two words|-i|"


def test_params_variables_and_the_environment_reach_the_task(cli: Cli) -> None:
    more = '"params": {"NUMBER": 10, "SWITCH": true, "GIVEN": null, "TEXT": "((greeting.word)), ((name))"}'
    task = cli.task("echo $NUMBER $SWITCH $GIVEN $TEXT", more=more)
    (cli.folder / "vars.yml").write_text("greeting: {word: hello}")
    result = cli("execute", "-c", task, "-l", "vars.yml", "-v", "name=you", GIVEN="given")
    assert result.stdout == "10 true given hello, you\n"


def test_an_empty_output_is_valid_and_noted(cli: Cli) -> None:
    result = cli("execute", "-c", cli.task("true", outputs=["dist"]), "-o", "dist=out")
    assert result.returncode == 0, result.stderr
    assert "output `dist` is empty" in result.stderr
    assert list((cli.folder / "out").iterdir()) == []


@pytest.mark.parametrize("script", ["rmdir dist", "rmdir dist; touch dist"])
def test_an_output_that_is_gone_or_no_folder_fails_the_build_naming_it(cli: Cli, script: str) -> None:
    result = cli("execute", "-c", cli.task(script, outputs=["dist"]), "-o", "dist=out")
    assert result.returncode in (1, 2)
    assert "dist" in result.stderr.replace("-o dist", "")
    assert result.stderr.splitlines()[-1] in ("failed", "errored")


def test_two_outputs_and_an_optional_input_that_is_not_given(cli: Cli) -> None:
    task = cli.task("echo 1 > a/x; echo 2 > b/x", outputs=["a", "b"])
    content = json.loads(task.read_text())
    content["inputs"] = [{"name": "extra", "optional": True}]
    task.write_text(json.dumps(content))
    result = cli("execute", "-c", task, "-o", "a=a", "-o", "b=b")
    assert result.returncode == 0, result.stderr
    assert [(cli.folder / name / "x").read_text() for name in ("a", "b")] == ["1\n", "2\n"]


def test_the_current_folder_goes_up_without_i_when_an_input_has_its_name(cli: Cli) -> None:
    work = folder(cli.folder / "project", a="here\n")
    task = cli.task("cat project/a", inputs=["project"])
    result = cli("execute", "-c", task)
    assert result.returncode == 2
    assert "input `project` is not given" in result.stderr
    cli.folder = work
    assert cli("execute", "-c", task).stdout == "here\n"


def test_inputs_are_git_aware_and_mapped(cli: Cli) -> None:
    work = folder(cli.folder / "work", tracked="t", ignored="i", untracked="u", **{".gitignore": "ignored\n"})
    subprocess.run(["git", "init", "-q", str(work)], check=True)
    subprocess.run(["git", "-C", str(work), "add", "tracked", ".gitignore"], check=True)
    task = cli.task("ls -A code", inputs=["code"])
    assert cli("execute", "-c", task, "-i", "repo=work", "-m", "code=repo").stdout.split() == [".gitignore", "tracked", "untracked"]
    everything = cli("execute", "-c", task, "-i", "code=work", "--include-ignored", "--include-git").stdout.split()
    assert everything == [".git", ".gitignore", "ignored", "tracked", "untracked"]


def test_odd_names_modes_and_links_survive_the_whole_way(cli: Cli) -> None:
    work = folder(cli.folder / "in", **{"new\nline": "n", "ü": "u"})
    (work / "run").write_text("#!/bin/sh\necho ran\n")
    (work / "run").chmod(0o755)
    (work / "link").symlink_to("run")
    (work / "empty").mkdir()
    task = cli.task("./src/link; cp -a src/. dist/", inputs=["src"], outputs=["dist"])
    result = cli("execute", "-c", task, "-i", "src=in", "-o", "dist=out")
    assert result.stdout == "ran\n", result.stderr
    assert sorted(path.name for path in (cli.folder / "out").iterdir()) == sorted(path.name for path in work.iterdir())
    assert (cli.folder / "out/link").readlink() == Path("run")
    assert (cli.folder / "out/run").stat().st_mode & 0o111


@pytest.mark.parametrize(
    "requirement",
    ['"image_resource": {"type": "registry-image", "source": {"repository": "x"}}', '"container_limits": {"memory": "1GB"}'],
)
def test_what_no_worker_offers_leaves_the_build_pending_with_the_reason(
    cli: Cli, requirement: str, interrupt: Callable[[subprocess.Popen[str]], None]
) -> None:
    process = cli.start("execute", "-c", cli.task("true", more=requirement))
    assert process.stderr
    seen = read_until(process.stderr, "waiting: ")
    assert "waiting: " in seen.splitlines()[-1]
    interrupt(process)
    assert read_until(process.stderr, "aborted").splitlines()[-1] == "aborted"
    assert process.wait(20) == 3


def test_the_first_ctrl_c_aborts_on_the_server_and_watches_the_end(cli: Cli, interrupt: Callable[[subprocess.Popen[str]], None]) -> None:
    task = cli.task("trap 'echo cleaned; exit 0' TERM; echo up; while :; do sleep 0.05; done")
    process = cli.start("execute", "-c", task)
    assert process.stdout and process.stderr
    read_until(process.stdout, "up")
    interrupt(process)
    out, err = process.communicate(timeout=40)
    assert process.returncode == 3, err
    assert "aborting build" in err
    assert err.splitlines()[-1] == "aborted"
    assert out == "cleaned\n"


def test_sigterm_aborts_too(cli: Cli) -> None:
    process = cli.start("execute", "-c", cli.task("echo up; exec sleep 100"))
    assert process.stdout
    read_until(process.stdout, "up")
    process.terminate()
    _, err = process.communicate(timeout=40)
    assert (process.returncode, err.splitlines()[-1]) == (3, "aborted")


def test_the_second_ctrl_c_leaves_at_once(cli: Cli, interrupt: Callable[[subprocess.Popen[str]], None]) -> None:
    process = cli.start("execute", "-c", cli.task("trap '' TERM; echo up; while :; do sleep 0.05; done"))
    assert process.stdout and process.stderr
    read_until(process.stdout, "up")
    interrupt(process)
    read_until(process.stderr, "aborting build")
    interrupt(process)
    _, err = process.communicate(timeout=5)
    assert process.returncode == 130
    assert "left; see `penstock watch" in err


def test_ctrl_c_before_a_build_exists_starts_none(cli: Cli, interrupt: Callable[[subprocess.Popen[str]], None]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        process = cli.start("execute", "-c", cli.task("true"), PENSTOCK_URL=f"http://127.0.0.1:{mute.getsockname()[1]}")
        connection, _ = mute.accept()
        with connection:
            interrupt(process)
            _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (130, "interrupted\n")


def test_on_a_terminal_there_are_colours_unless_they_are_not_wanted(cli: Cli) -> None:
    folder(cli.folder / "in", a="x" * 1000)
    task = cli.task("true", inputs=["src"])
    seen = on_terminal(cli, "execute", "-c", task, "-i", "src=in", TERM="xterm-256color")
    assert "\x1b[32msucceeded" in seen
    plain = on_terminal(cli, "execute", "-c", task, "-i", "src=in", TERM="dumb")
    assert "\x1b" not in plain
    assert "uploaded src: 1 file, 1.0 kB" in plain
    colourless = on_terminal(cli, "execute", "-c", task, "-i", "src=in", TERM="xterm-256color", NO_COLOR="1")
    assert "\x1b[3" not in colourless


def on_terminal(cli: Cli, *arguments: str | Path, **environ: str) -> str:
    """What a command shows when its stderr is a terminal."""
    ours, theirs = pty.openpty()
    try:
        process = cli.start(*arguments, stderr=theirs, **environ)
    finally:
        os.close(theirs)
    seen = b""
    with contextlib.suppress(OSError):  # the other side is closed
        while piece := os.read(ours, 65536):
            seen += piece
    os.close(ours)
    assert process.wait(30) == 0, seen
    return seen.decode()


def test_a_reader_of_stdout_that_leaves_does_no_harm(cli: Cli) -> None:
    task = cli.task("seq 1 200000; echo done > dist/x", outputs=["dist"])
    process = cli.start("execute", "-c", task, "-o", "dist=out")
    assert process.stdout and process.stderr
    assert process.stdout.readline() == "1\n"
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(60) == 0, err
    assert "Traceback" not in err and "Broken" not in err
    assert (cli.folder / "out/x").read_text() == "done\n"


def test_json_puts_the_build_on_stdout_and_the_log_on_stderr(cli: Cli) -> None:
    result = cli("execute", "-c", cli.task("echo said; exit 4"), "--json", "--name", "named")
    build = json.loads(result.stdout)
    assert (build["status"], build["exit_code"], build["name"]) == ("failed", 4, "named")
    assert "said\n" in result.stderr
    assert result.returncode == 4


def test_a_timeout_ends_the_task(cli: Cli) -> None:
    result = cli("execute", "-c", cli.task("sleep 60"), "--timeout", "1s")
    assert result.returncode != 0
    assert result.stderr.splitlines()[-1] in ("failed", "errored")


def test_nothing_is_coloured_without_a_terminal(cli: Cli) -> None:
    result = cli("execute", "-c", cli.task("true"), TERM="xterm-256color", FORCE_COLOR="1")
    assert "\x1b" not in result.stderr + result.stdout
