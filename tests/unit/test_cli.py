"""The command line where no server is needed: what it says, what it imports, what it exits with."""

import contextlib
import json
import os
import pty
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from penstock.cli.following import exit_code_of
from penstock.cli.main import NOBODY_READS
from penstock.cli.quantities import readable_size
from penstock.cli.tables import person, print_table
from penstock.cli.terminal import Terminal
from penstock.client import Build

ID = "01234567-89ab-7def-8123-456789abcdef"
TASK = "platform: linux\ninputs: [{name: src}, {name: extra, optional: true}]\noutputs: [{name: dist}]\nrun: {path: 'true'}\n"


def penstock(*arguments: str, cwd: Path, stdin: str = "", **environ: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": os.environ["PATH"], "HOME": str(cwd), "PENSTOCK_TARGETS": str(cwd / "targets.json"), **environ}
    command = [sys.executable, "-m", "penstock", *arguments]
    return subprocess.run(command, cwd=cwd, env=env, input=stdin, capture_output=True, text=True, timeout=60)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with a task file, an input, and a target where nobody listens."""
    (tmp_path / "task.yml").write_text(TASK)
    (tmp_path / "in").mkdir()
    targets = {"current": "local", "targets": {"local": {"url": "http://127.0.0.1:9", "token": "pst_x", "team": "main"}}}
    (tmp_path / "targets.json").write_text(json.dumps(targets))
    return tmp_path


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "penstock", "--help"], capture_output=True, text=True, cwd=tmp_path, check=True, timeout=60
    )
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "click" in imported
    assert not imported & {"aiohttp", "asyncio", "msgspec", "rich", "nats", "yaml", "asyncpg", "penstock.client"}
    for command in ("execute", "watch", "logs", "download", "artifact", "abort", "why", "builds", "workers", "login", "up", "down", "completion"):
        assert f"  {command} " in result.stdout


def test_no_command_imports_what_only_a_call_needs(tmp_path: Path) -> None:
    code = """
import sys
from penstock.cli.main import cli
for group in (cli, *(cli.get_command(None, name) for name in ("artifact", "secret", "worker"))):
    for name in group.list_commands(None):
        assert group.get_command(None, name)
assert "aiohttp" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=60)


COMMANDS = ["execute", "watch", "logs", "download", "artifact", "abort", "why", "builds", "workers", "login", "targets", "up", "down", "version"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(tmp_path: Path, command: str) -> None:
    result = penstock(command, "--help", cwd=tmp_path)
    assert result.returncode == 0
    assert "Usage: penstock" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-c", "none.yml"], "Error: cannot read none.yml: No such file or directory"),
        (["-c", "task.yml"], "Error: the task's input `src` is not given: add -i src=PATH"),
        (["-c", "task.yml", "-i", "src=in", "-o", "dits=out"], "Error: -o dits=…: task.yml has no output `dits` (it has dist)"),
        (["-c", "task.yml", "-i", "scr=in"], "Error: -i scr=…: task.yml has no input `scr` (it has src, extra)"),
        (["-c", "task.yml", "-i", "src=gone"], "Error: -i src=gone: gone does not exist"),
        (["-c", "task.yml", "-i", "src=task.yml"], "Error: -i src=task.yml: task.yml is not a folder"),
        (["-c", "task.yml", "-i", "src=in", "-i", "src=in"], "Error: -i src=…: given twice"),
        (["-c", "task.yml", "-i", "src=in", "-m", "foo=src"], "Error: -m foo=…: task.yml has no input `foo` (it has src, extra)"),
        (["-c", "task.yml", "-i", "src=in", "-o", "dist=task.yml"], "Error: -o dist=task.yml: task.yml is there and is not a folder"),
        (["-c", "task.yml", "-i", "src"], "`src` must be NAME=VALUE"),
        (["-c", "task.yml", "-i", "src=artifact:7"], "Error: -i src=…: `artifact:7` names nothing stored"),
        (["-c", "task.yml", "-i", "src=build:x/dist"], "Error: -i src=…: `build:x/dist` names no build"),
        (["-c", "task.yml", "-i", f"src={ID}"], f"{ID} does not exist (what is stored is artifact:{ID})"),
        (["-c", "task.yml", "-i", "scr=build:7/dist"], "Error: -i scr=…: task.yml has no input `scr` (it has src, extra)"),
        (["-c", "task.yml", "-i", "src=in", "--keep", "long"], "`long` must be `forever`, or a time like 90s, 12h or 7d"),
        (["-c", "task.yml", "-i", "src=in", "--timeout", "soon"], "`soon` must be a time like 90s, 10m or 1h30m, 30 days at most"),
        (["-c", "task.yml", "-i", "src=in", "--timeout", "0"], "`0` must be a time"),
    ],
)
def test_a_command_line_that_cannot_be_meant_is_refused_before_anything_is_sent(here: Path, arguments: list[str], said: str) -> None:
    result = penstock("execute", *arguments, cwd=here)
    assert said in result.stderr
    assert (result.returncode, result.stdout) == (2, "")


def test_a_task_file_that_is_wrong_is_refused_before_anything_is_sent(here: Path) -> None:
    (here / "task.yml").write_text("run:\n  path: 1\n")
    result = penstock("execute", "-c", "task.yml", cwd=here)
    assert result.stderr == "Error: task.yml:2: run.path: must be text, not a whole number: put it in quotes\n"
    assert result.returncode == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["execute", "-c", "task.yml", "-i", "src=in"],
        ["execute", "-c", "task.yml", "-i", "src=build:7/dist"],
        ["execute", "-c", "task.yml", "--inputs-from", "7"],
        ["builds"],
        ["watch", "1"],
        ["logs", "1"],
        ["download", "1"],
        ["abort", "1"],
        ["why", "1"],
        ["workers"],
        ["worker", "show", "w1"],
    ],
)
def test_a_server_that_is_not_there_is_one_line_that_says_what_to_do(here: Path, arguments: list[str]) -> None:
    result = penstock(*arguments, cwd=here)
    assert result.stderr == "Error: cannot reach http://127.0.0.1:9: is it running? start it with `penstock up`\n"
    assert result.returncode == 1


def test_of_a_server_elsewhere_it_is_not_said_to_start_it_here(here: Path) -> None:
    far = {"url": "http://nowhere.invalid:1", "token": "x", "team": "t"}
    (here / "targets.json").write_text(json.dumps({"current": "far", "targets": {"far": far}}))
    said = penstock("builds", cwd=here).stderr
    assert said == "Error: cannot reach http://nowhere.invalid:1: is the URL right, and is there a way to it from here?\n"


@pytest.mark.parametrize(
    ("typed", "said"),
    [("bulds", ": did you mean `builds`?"), ("zzz", ""), ("worker delete", ": did you mean `rm`?"), ("secret list", ": did you mean `ls`?")],
)
def test_a_command_that_is_not_there_is_answered_with_the_nearest(here: Path, typed: str, said: str) -> None:
    result = penstock(*typed.split(), cwd=here)
    assert result.returncode == 2 and result.stderr.endswith(f"\nError: there is no command `{typed.split()[-1]}`{said}\n"), result.stderr


def test_without_a_target_it_says_how_to_get_one(tmp_path: Path) -> None:
    result = penstock("builds", cwd=tmp_path)
    assert result.stderr == "Error: no Penstock is known yet: start one with `penstock up`, or log in to one with `penstock login --url …`\n"
    assert result.returncode == 1
    assert penstock("-t", "prod", "builds", cwd=tmp_path).stderr.startswith("Error: there is no target `prod`")


@pytest.mark.parametrize("arguments", [["--help"], ["targets"], ["worker", "--help"]])
def test_a_reader_that_has_gone_is_no_error(here: Path, arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "penstock", *arguments]
    env = {**os.environ, "PENSTOCK_TARGETS": str(here / "targets.json")}
    result = subprocess.run(command, env=env, stdout=writer, stderr=subprocess.PIPE, timeout=60)
    os.close(writer)
    assert (result.returncode, result.stderr) == (NOBODY_READS, b"")


def test_a_stdout_that_takes_nothing_is_said_and_one_that_is_closed_is_done_without(here: Path) -> None:
    command = f"{sys.executable} -m penstock targets"
    env = {**os.environ, "PENSTOCK_TARGETS": str(here / "targets.json")}
    for onto, ended in ((">/dev/full", (1, "Error: [Errno 28] No space left on device\n")), (">&-", (0, "")), ("<&- >&-", (0, ""))):
        result = subprocess.run(["sh", "-c", f"{command} {onto}"], env=env, capture_output=True, text=True, timeout=60)
        assert (result.returncode, result.stderr) == ended, onto


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        (
            {"PENSTOCK_TOKEN": "pst_x\nX-Admin: 1"},
            "Error: the token holds what no token can, like the end of a line: log in again with `penstock login`\n",
        ),
        ({"PENSTOCK_URL": "ftp://x"}, "Error: `ftp://x` is no URL: it looks like http://127.0.0.1:7420\n"),
    ],
)
def test_what_the_environment_says_wrong_is_one_line(here: Path, environ: dict[str, str], said: str) -> None:
    result = penstock("workers", cwd=here, **environ)
    assert (result.returncode, result.stderr) == (1, said)


@pytest.mark.parametrize("command", ["worker show", "worker drain", "worker revoke", "worker rm", "secret rm", "secret set --stdin"])
def test_a_name_that_is_empty_is_refused_before_anything_is_sent(here: Path, command: str) -> None:
    result = penstock(*command.split(), "", cwd=here, stdin="x")
    assert result.returncode == 2 and "it is empty" in result.stderr


def test_a_terminal_that_is_too_narrow_goes_without_what_can_be_spared(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def shown(columns: int | None) -> list[str]:
        monkeypatch.setattr(Terminal, "columns", columns)
        print_table(("id", "size", "age", "by"), [("1", "8 B", "3 h", "me")], right=["size"], spare=["age", "size"], colours={(0, "age"): "red"})
        return capfd.readouterr().out.splitlines()

    assert shown(None) == shown(17) == ["id  size  age  by", "1    8 B  3 h  me"]
    assert shown(16) == shown(12) == ["id  size  by", "1    8 B  me"]
    assert shown(11) == shown(1) == ["id  by", "1   me"]


def test_targets_are_listed_without_their_tokens_and_chosen(here: Path) -> None:
    known = json.loads((here / "targets.json").read_text())
    known["targets"]["prod"] = {"url": "http://p:1", "token": "pst_y", "team": "ops"}
    (here / "targets.json").write_text(json.dumps(known))
    result = penstock("targets", cwd=here)
    assert result.stdout == "* local  http://127.0.0.1:9  team main\n  prod  http://p:1  team ops\n"
    assert penstock("targets", "--use", "prod", cwd=here).stdout.splitlines()[1] == "* prod  http://p:1  team ops"
    listed = json.loads(penstock("targets", "--json", cwd=here).stdout)
    assert [row["current"] for row in listed] == [False, True]
    assert penstock("targets", "--use", "none", cwd=here).returncode == 2


def test_login_needs_a_url_and_a_token(tmp_path: Path) -> None:
    assert "--url is missing" in penstock("login", cwd=tmp_path).stderr
    assert "there is no token" in penstock("login", "--url", "http://127.0.0.1:9", cwd=tmp_path).stderr
    assert "must start with http" in penstock("login", "--url", "localhost", "--token", "x", cwd=tmp_path).stderr
    unreachable = penstock("login", "--url", "http://127.0.0.1:9", cwd=tmp_path, stdin="pst_x\n")
    assert "cannot reach" in unreachable.stderr
    assert not (tmp_path / "targets.json").exists()


@pytest.mark.parametrize(("shell", "sign"), [("bash", "complete"), ("zsh", "#compdef penstock"), ("fish", "function _penstock")])
def test_completion_is_there_for_three_shells(tmp_path: Path, shell: str, sign: str) -> None:
    assert sign in penstock("completion", shell, cwd=tmp_path).stdout


def test_completion_completes_commands_and_options(tmp_path: Path) -> None:
    result = penstock("x", cwd=tmp_path, _PENSTOCK_COMPLETE="bash_complete", COMP_WORDS="penstock execute --inc", COMP_CWORD="2")
    assert result.stdout.split() == ["plain,--include-ignored", "plain,--include-git"]


@pytest.mark.parametrize(
    ("status", "own", "code"),
    [
        ("succeeded", 0, 0),
        ("failed", 3, 3),
        ("failed", None, 1),
        ("failed", 0, 1),
        ("failed", -15, 143),
        ("failed", 256, 1),
        ("errored", None, 2),
        ("aborted", 143, 3),
        ("aborted", None, 3),
    ],
)
def test_exit_codes_are_flys(status: str, own: int | None, code: int) -> None:
    assert exit_code_of(Build(id="b", number=1, status=status, exit_code=own)) == code  # type: ignore[arg-type]


UNENDED = """
from penstock.cli.terminal import Terminal
from penstock.client import Transfer
terminal = Terminal()
terminal.log("stdout", "no newline")
with terminal.bars() as bars:
    bars.add("dist")(Transfer("receiving", 1, 1, 0))
    bars.done("dist", "downloaded dist: 1 file, 1 B")
"""


def test_a_line_that_a_task_leaves_unended_is_not_drawn_over_on_a_terminal() -> None:
    seen = on_terminal(UNENDED)
    assert seen.startswith("no newline\r\n")
    assert "downloaded dist" in seen


WATCHED = """
from itertools import count
from penstock.cli.terminal import Bars, Terminal
from penstock.client import Transfer
terminal = Terminal()
bars = Bars(terminal, drawn={drawn}, clock=count(0, {seconds}).__next__)
told = bars.add("src")
told(Transfer("hashing", 500, 1000, 9000))
told(Transfer("sending", 1, 2, 9998))
bars.done("src", "uploaded src: all of it")
bars.close()
"""


@pytest.mark.parametrize(("drawn", "seconds", "bar"), [(True, 0.3, True), (True, 0.01, False), (False, 0.3, False)])
def test_a_transfer_that_takes_a_while_has_a_bar_for_what_is_moved(drawn: bool, seconds: float, bar: bool) -> None:
    seen = on_terminal(WATCHED.format(drawn=drawn, seconds=seconds))
    assert ("━" in seen) == bar
    assert ("sending src" in seen and "1/2 bytes" in seen) == bar
    assert "uploaded src: all of it\r\n" in seen


def on_terminal(script: str) -> str:
    """What the script shows when both its streams are a terminal."""
    ours, theirs = pty.openpty()
    environ = {**os.environ, "TERM": "xterm-256color"}
    process = subprocess.Popen([sys.executable, "-c", script], stdout=theirs, stderr=theirs, env=environ)
    os.close(theirs)
    seen = b""
    with contextlib.suppress(OSError):  # the other side is closed
        while piece := os.read(ours, 65536):
            seen += piece
    os.close(ours)
    assert process.wait(60) == 0, seen
    return seen.decode()


def test_a_line_that_a_task_leaves_unended_is_ended_where_both_streams_go_to_one_place() -> None:
    together = subprocess.run([sys.executable, "-c", UNENDED], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True, timeout=60)
    assert together.stdout == "no newline\ndownloaded dist: 1 file, 1 B\n"
    apart = subprocess.run([sys.executable, "-c", UNENDED], capture_output=True, text=True, check=True, timeout=60)
    assert (apart.stdout, apart.stderr) == ("no newline", "downloaded dist: 1 file, 1 B\n")


def test_the_version_is_an_option_too(tmp_path: Path) -> None:
    result = penstock("--version", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (0, f"penstock {version('penstock')}\n")


def test_sizes_are_for_people() -> None:
    assert [readable_size(size) for size in (0, 999, 1500, 3_000_000)] == ["0 B", "999 B", "1.5 kB", "3.0 MB"]


def test_the_first_token_is_called_so() -> None:
    assert person("token:bootstrap-d134c3e9") == "first token"
    assert person("token:0199") == "token:0199"
