"""`penstock up` and `down` through the command line, on the whole real system."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.up.datadir import DataDir, Run
from penstock.up.processes import is_alive
from penstock.up.service import why_unready
from tests.controls import eventually


class Machine:
    """A user's machine: a home of its own, and the command line."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.data = DataDir(home / "data")
        self.environ = {"HOME": str(home), "PATH": os.defpath, "PENSTOCK_DATA": str(self.data.path), "LANG": "C.UTF-8"}

    def start(self, *words: str, alone: bool = False) -> subprocess.Popen[str]:
        """`alone`: in a session of its own, as a terminal's."""
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "penstock", *words],
            cwd=self.home,
            env=self.environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=alone,
        )

    def penstock(self, *words: str) -> tuple[int, str]:
        """Exit code and stderr; stdout must stay empty."""
        with self.start(*words) as process:
            said, complained = process.communicate(timeout=90)
        assert said == ""
        return process.returncode, complained

    def run(self) -> Run:
        run = self.data.run()
        assert run is not None
        return run

    def is_serving(self) -> bool:
        return all(why_unready(status) is None for status in self.run().status.values())

    def answer(self) -> dict[str, object]:
        target = json.loads((self.home / ".config/penstock/targets.json").read_text())["targets"]["local"]
        request = urllib.request.Request(target["url"] + "/api/v1/info", headers={"Authorization": f"Bearer {target['token']}"})
        with urllib.request.urlopen(request, timeout=10) as response:
            answer: dict[str, object] = json.load(response)
            return answer


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    machine = Machine(tmp_path_factory.mktemp("machine"))
    yield machine
    code, _ = machine.penstock("down")
    assert code == 0


@pytest.fixture
def running(machine: Machine) -> Machine:
    code, said = machine.penstock("up", "--detach", "--port", "0")
    assert code == 0, said
    return machine


def test_up_returns_when_everything_is_ready_and_the_command_line_knows_it(running: Machine) -> None:
    assert running.is_serving()
    assert set(running.run().children) == {"postgres", "nats", "gateway", "builds", "scheduler", "artifacts", "worker"}
    assert running.answer()["team"] == "main"
    targets = running.home / ".config/penstock/targets.json"
    assert stat.S_IMODE(targets.stat().st_mode) == 0o600


def test_a_second_up_says_where_the_first_listens(running: Machine) -> None:
    before = running.run()
    code, said = running.penstock("up", "--detach")
    assert (code, before.url in said) == (0, True)
    code, said = running.penstock("up")
    assert (code, before.url in said) == (1, True)
    code, said = running.penstock("up", "--detach", "--restored")
    assert (code, "nobody was told that the database was put back: stop it" in said) == (1, True), "it is no wish that may be passed over"
    assert running.run().supervisor == before.supervisor


@pytest.mark.parametrize("name", ["gateway", "builds", "scheduler", "artifacts", "worker", "nats", "postgres"])
async def test_whatever_is_killed_comes_back(running: Machine, name: str) -> None:
    before = running.run().children[name]
    os.kill(before.pid, signal.SIGKILL)
    await eventually(lambda: running.run().children.get(name, before) != before, timeout=20)
    await eventually(running.is_serving, timeout=20)
    assert running.answer()["team"] == "main"


async def test_after_a_kill_of_the_supervisor_nothing_is_left_and_up_works_again(running: Machine) -> None:
    before = running.run()
    os.kill(before.supervisor.pid, signal.SIGKILL)
    await eventually(lambda: not any(is_alive(child) for child in before.children.values()))
    code, said = running.penstock("up", "--detach", "--port", "0")
    assert code == 0, said
    assert running.run().supervisor != before.supervisor
    assert running.answer()["team"] == "main"


def test_down_ends_everything_and_says_when_there_is_nothing_to_end(running: Machine) -> None:
    before = running.run()
    code, said = running.penstock("down")
    assert (code, said.splitlines()[-1]) == (0, "stopped; the data stays")
    assert not any(is_alive(child) for child in [before.supervisor, *before.children.values()])
    code, said = running.penstock("down")
    assert (code, said) == (0, f"nothing runs on {running.data.path}\n")


def test_down_leaves_a_process_alone_that_only_has_the_pid(running: Machine) -> None:
    running.penstock("down")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as innocent:
        (running.data.path / "run.json").write_text(json.dumps({"supervisor": {"pid": innocent.pid, "started": "then"}}))
        code, said = running.penstock("down")
        assert (code, "nothing runs" in said) == (0, True)
        assert innocent.poll() is None
        innocent.communicate(b"\n")
    assert innocent.returncode == 0


async def test_in_the_foreground_ctrl_c_ends_it_in_order(machine: Machine) -> None:
    machine.penstock("down")
    with machine.start("up", "--port", "0") as process:
        await eventually(lambda: machine.data.run() is not None and machine.run().url and machine.is_serving(), timeout=60)
        children = machine.run().children
        process.send_signal(signal.SIGINT)
        said, complained = process.communicate(timeout=60)
    assert (process.returncode, said) == (0, "")
    assert complained.endswith("stopped\n")
    assert not any(is_alive(child) for child in children.values())


@pytest.mark.parametrize("how", [["up"], ["up", "--detach"]])
async def test_ctrl_c_while_postgres_is_made_ends_the_start_at_once_and_says_so(tmp_path: Path, how: list[str]) -> None:
    """A terminal's Ctrl-C, which all of its processes get."""
    own = Machine(tmp_path)
    making = own.data.path / "pg.new"
    with own.start(*how, "--port", "0", alone=True) as process:
        try:
            await eventually(lambda: (making / "PG_VERSION").exists(), timeout=30)
            os.killpg(process.pid, signal.SIGINT)
            said, complained = process.communicate(timeout=30)
        except BaseException:
            own.penstock("down")
            process.kill()
            raise
    assert (process.returncode, said) == (130, "")
    assert "stopping (once more: at once)\n" in complained
    assert complained.endswith(f"stopped before it was ready: nothing runs, and {own.data.path} stays for the next start\n")
    assert own.data.run() is None and not making.exists() and not own.data.postgres.exists()
    assert not [entry for entry in Path("/proc").glob("[0-9]*/cmdline") if str(own.data.path).encode() in _read(entry)]
    code, said = own.penstock("up", "--detach", "--port", "0")
    assert code == 0, said
    assert own.penstock("down")[0] == 0


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_a_start_that_fails_says_why_and_leaves_nothing(machine: Machine) -> None:
    machine.penstock("down")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, said = machine.penstock("up", "--detach", "--port", str(port))
    assert code == 1
    assert f"the gateway cannot listen on 127.0.0.1:{port}: Address already in use" in said
    code, said = machine.penstock("up", "--detach", "--port", "0", "--lease-seconds", "0.5", "--sandbox", "none", "--slots", "1")
    assert code == 0, said


async def test_without_its_worker_which_was_revoked_the_system_goes_on_and_says_so_once(tmp_path: Path) -> None:
    own = Machine(tmp_path)
    code, said = own.penstock("up", "--detach", "--port", "0")
    try:
        assert code == 0, said
        code, said = own.penstock("worker", "revoke", "local")
        assert code == 0, said
        await eventually(lambda: "worker" not in own.run().children and "worker" not in own.run().status, timeout=60)
        log = own.data.log("supervisor").read_text()
        assert log.count("worker has left for good") == 1 and "local was revoked at http://127.0.0.1:" in log
        assert own.is_serving()
        code, said = own.penstock("up", "--detach")
        assert code == 0 and own.run().url in said
    finally:
        assert own.penstock("down")[0] == 0
