"""A worker of another machine's: it registers once, runs builds, comes back by its key, is drained, and is cut off."""

import json
import signal
import stat
import subprocess
import time
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest

from tests.e2e.conftest import Cli, System, asked, read_until


@pytest.fixture
def owner(system: System, cli: Cli) -> Cli:
    """The command line as an owner of the first team."""
    (cli.folder / "owner.json").write_text(
        json.dumps({"current": "first", "targets": {"first": {"url": system.url, "token": system.token, "team": system.team}}})
    )
    return cli


def admin(cli: Cli, *arguments: str) -> subprocess.CompletedProcess[str]:
    return cli(*arguments, PENSTOCK_TARGETS=str(cli.folder / "owner.json"))


def shown(system: System, name: str) -> dict[str, Any]:
    try:
        return asked(system, "GET", f"/api/v1/workers/{name}")
    except HTTPError as error:
        with error:
            return {"status": str(error.code)}


def becomes(system: System, name: str, status: str, timeout: float = 30) -> None:
    deadline = time.monotonic() + timeout
    while (worker := shown(system, name))["status"] != status:
        assert time.monotonic() < deadline, worker
        time.sleep(0.05)


def test_a_worker_that_cannot_be_removed_keeps_no_other(owner: Cli) -> None:
    result = admin(owner, "worker", "rm", "nobody", "local", "no-one")
    assert (result.returncode, result.stderr.splitlines()) == (
        1,
        [
            "Error: there is no worker `nobody`",
            "Error: local: the worker is neither revoked nor lost: stop or revoke it first",
            "Error: there is no worker `no-one`",
        ],
    )


def start(cli: Cli, folder: Path, *more: str) -> subprocess.Popen[str]:
    return cli.start("worker", "start", "--dir", str(folder), "--slots", "1", *more)


def test_a_worker_joins_runs_builds_comes_back_drains_and_is_cut_off(system: System, owner: Cli) -> None:
    cli, name, tag = owner, f"rack-{int(time.time() * 1000)}", f"tag{int(time.time() * 1000)}"
    token = admin(cli, "worker", "token", "create", "--tag", tag).stdout.strip()
    assert token.startswith("pwt_")
    folder = cli.folder / "worker"
    worker = start(cli, folder, "--register", token, "--server", system.url, "--name", name)
    becomes(system, name, "available")
    assert stat.S_IMODE((folder / "worker.json").stat().st_mode) == 0o600
    task = cli.task("echo here").rename(cli.folder / "short.yml")
    endless = cli.task("echo up; sleep 600").rename(cli.folder / "endless.yml")
    long_task = cli.task("echo up; sleep 3; echo done")
    here = ("execute", "-c", task, "--tag", tag)
    assert cli(*here).stdout == "here\n"

    # its token is spent, and its key is enough
    again = cli("worker", "start", "--dir", cli.folder / "other", "--register", token, "--server", system.url, "--name", "other")
    assert again.returncode == 1 and "does not take this token" in again.stderr
    worker.send_signal(signal.SIGINT)
    assert worker.wait(30) == 0
    becomes(system, name, "lost")
    worker = start(cli, folder)
    becomes(system, name, "available")
    assert cli(*here).stdout == "here\n"

    # what it runs it finishes, and it gets nothing new
    long = cli.start("execute", "-c", long_task, "--tag", tag)
    read_until(long.stdout, "up")
    assert admin(cli, "worker", "drain", name, "--reason", "a disk").returncode == 0
    becomes(system, name, "draining")
    waiting = cli.start(*here)
    out, err = long.communicate(timeout=30)
    assert (long.returncode, out) == (0, "done\n"), err
    assert admin(cli, "worker", "resume", name).returncode == 0
    assert waiting.communicate(timeout=30)[0] == "here\n"

    # nothing that bears its key is heard any more
    held = cli.start("execute", "-c", endless, "--tag", tag)
    read_until(held.stdout, "up")
    assert admin(cli, "worker", "revoke", name, "--reason", "stolen").returncode == 0
    becomes(system, name, "revoked", timeout=5)
    deadline, log = time.monotonic() + 5, system.data / "logs" / "scheduler.log"
    while not any("a connection is ended" in line and f'"{name}.' in line for line in log.read_text().splitlines()):
        assert time.monotonic() < deadline, "it is still connected"
        time.sleep(0.05)
    number = json.loads(cli("builds", "--json").stdout)[0]["number"]
    assert cli("abort", str(number)).returncode == 0
    assert held.wait(30) == 3, "the lease was over at once: nobody else could take it up"
    assert admin(cli, "worker", "resume", name).returncode == 1
    worker.send_signal(signal.SIGTERM)
    worker.wait(30)
    assert admin(cli, "worker", "rm", name).returncode == 0
    assert admin(cli, "worker", "show", name).returncode == 1


def test_a_worker_that_is_revoked_finds_out_says_so_and_never_comes_back_by_its_key(system: System, owner: Cli) -> None:
    cli, name, folder = owner, f"gone-{int(time.time() * 1000)}", owner.folder / "gone"

    def registering() -> tuple[str, ...]:
        return "--register", admin(cli, "worker", "token", "create").stdout.strip(), "--server", system.url, "--name", name

    worker = start(cli, folder, *registering())
    becomes(system, name, "available", timeout=60)
    assert admin(cli, "worker", "revoke", name).returncode == 0
    said = worker.communicate(timeout=60)[1]
    assert worker.returncode == 77 and f"{name} was revoked at {system.url}" in said
    assert admin(cli, "worker", "rm", name).returncode == 0
    again = cli("worker", "start", "--dir", folder, *registering())
    assert again.returncode == 1 and "this key was revoked; remove worker.json" in again.stderr


def test_what_cannot_be_meant_is_said_in_one_line(cli: Cli) -> None:
    for arguments, said in (
        ((), "no worker is registered in"),
        (("--register", "x"), "--server is missing"),
        (("--register", "x", "--server", "there"), "must start with http://"),
        (("--register", "x", "--server", "http://127.0.0.1:1", "--name", "a.b"), "--name a.b"),
    ):
        result = cli("worker", "start", "--dir", cli.folder / "w", *arguments)
        assert result.returncode == 2 and said in result.stderr, result.stderr
    assert not (cli.folder / "w").exists()
    assert cli("worker", "drain", "local").returncode == 1
    assert "first team" in cli("worker", "token", "create").stderr
