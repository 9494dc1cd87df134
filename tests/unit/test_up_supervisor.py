"""The supervisor of `penstock up` over made-up services: real processes, real signals."""

import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from penstock.up.processes import identify, is_alive
from tests.controls import eventually

ROOT = Path(__file__).parents[2]


class Supervised:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.pids: dict[str, int] = {}
        self.status: dict[str, str] = {}

    def until(self, start: str) -> str:
        """The first line that begins so."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            match line.split():
                case ["ready", name, pid, status]:
                    self.pids[name], self.status[name] = int(pid), status
            if line.startswith(start):
                return line
        raise AssertionError(f"it ended without saying {start!r}")

    def end(self) -> int:
        assert self.process.stdout is not None
        rest = self.process.stdout.read()
        assert "threads 1 left 0" in rest, rest
        return self.process.wait(20)


@contextmanager
def supervised(folder: Path, **behaviours: str) -> Iterator[Supervised]:
    command = [sys.executable, "-m", "tests.unit.supervised", str(folder), *(f"{name}={how}" for name, how in behaviours.items())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            yield Supervised(process)
        finally:
            process.kill()


def pid_of(status: str) -> int:
    host, _, port = status.rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=10)
    try:
        connection.request("GET", "/readyz", headers={"Connection": "close"})
        answer: dict[str, int] = json.loads(connection.getresponse().read())
        return answer["pid"]
    finally:
        connection.close()


def test_a_service_that_dies_is_started_again_and_its_callers_wait_instead_of_being_refused(tmp_path: Path) -> None:
    with supervised(tmp_path, gateway="well", builds="well") as system:
        system.until("watching")
        assert pid_of(system.status["builds"]) == system.pids["builds"]
        os.kill(system.pids["builds"], signal.SIGKILL)
        now = pid_of(system.status["builds"])
        assert now != system.pids["builds"]
        assert "builds was killed by SIGKILL; starting it again in 0.1 s" in system.until("say builds was killed")
        assert pid_of(system.status["gateway"]) == system.pids["gateway"]
        system.process.terminate()
        assert system.end() == 0


def test_the_gateway_ends_first(tmp_path: Path) -> None:
    with supervised(tmp_path, builds="well", gateway="well") as system:
        system.until("watching")
        system.process.send_signal(signal.SIGINT)
        assert system.end() == 0
        assert (tmp_path / "ended").read_text() == "gateway\nbuilds\n"


async def test_a_second_signal_forces_what_does_not_end(tmp_path: Path) -> None:
    with supervised(tmp_path, gateway="well", builds="stubborn") as system:
        system.until("watching")
        system.process.send_signal(signal.SIGINT)
        await eventually(lambda: (tmp_path / "ended").exists())
        system.process.send_signal(signal.SIGINT)
        system.until("say builds does not end; killing it")
        assert system.end() == 0


async def test_nothing_outlives_a_killed_supervisor(tmp_path: Path) -> None:
    with supervised(tmp_path, gateway="well", builds="stubborn") as system:
        system.until("watching")
        children = [identify(pid) for pid in system.pids.values()]
        assert len(children) == 2
        system.process.kill()
        await eventually(lambda: not any(child and is_alive(child) for child in children))


def test_a_service_that_does_not_stay_up_ends_the_start_with_its_last_words(tmp_path: Path) -> None:
    with supervised(tmp_path, gateway="well", builds="dies") as system:
        failed = system.until("StartFailed")
        assert "builds does not stay up" in failed
        assert "no reason to live" in system.until("no reason to live")
        assert system.end() == 1


def test_a_worker_that_is_never_let_in_keeps_nobody_from_the_rest(tmp_path: Path) -> None:
    with supervised(tmp_path, worker="spare", gateway="well") as system:
        said = system.until("say worker is not ready")
        assert "pid" in said and "worker.log" in said
        system.until("watching")
        assert pid_of(system.status["gateway"]) == system.pids["gateway"]
        system.process.terminate()
        assert system.end() == 0


def test_a_worker_that_was_expelled_is_not_started_again_and_all_else_goes_on(tmp_path: Path) -> None:
    with supervised(tmp_path, worker="expelled", gateway="well") as system:
        said = system.until("say worker")
        assert "has left for good" in said and "worker.log" in said and "it was revoked" in said
        system.until("watching")
        os.kill(system.pids["gateway"], signal.SIGKILL)  # whoever comes back is looked after as before
        assert system.until("say ").startswith("say gateway was killed")
        assert system.until("say ").startswith("say gateway is back")
        system.process.terminate()
        assert system.end() == 0
    assert (tmp_path / "worker.log").read_text() == "it was revoked\n"


def test_a_stop_before_all_is_up_is_heeded(tmp_path: Path) -> None:
    with supervised(tmp_path, gateway="well", builds="dies") as system:
        system.until("say builds exited with 3")
        system.process.terminate()
        system.until("Interrupted")
        assert system.end() == 1
