"""One running system for each pytest worker, and the command line as a subprocess on it."""

import json
import os
import secrets
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

COMMAND = [sys.executable, "-m", "penstock"]


class System(msgspec.Struct, frozen=True, kw_only=True):
    """A running Penstock, and a team of it. `environ` is what a command needs to find them."""

    data: Path
    url: str
    token: str
    team: str
    environ: dict[str, str]


def environment(home: Path) -> dict[str, str]:
    """A user's environment, with nothing of this one's that could leak in."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PENSTOCK_", "GIT_", "XDG_"))}
    return {**kept, "HOME": str(home), "PENSTOCK_TARGETS": str(home / "targets.json")}


@pytest.fixture(scope="session")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """`penstock up` in a folder of its own, whose worker runs no containers, whatever engine this machine has; stopped in the end."""
    home = tmp_path_factory.mktemp("system")
    data = home / "data"
    environ = {**environment(home), "DOCKER_HOST": f"unix://{home}/no-engine"}
    started = subprocess.run([*COMMAND, "up", "--data", data, "--detach", "--port", "0"], env=environ, capture_output=True, text=True, timeout=100)
    try:
        assert started.returncode == 0, started.stderr + _last_lines(data)
        targets = json.loads((home / "targets.json").read_text())
        target = targets["targets"][targets["current"]]
        yield System(data=data, url=target["url"], token=target["token"], team=target["team"], environ=environ)
    finally:
        subprocess.run([*COMMAND, "down", "--data", data], env=environ, check=True, capture_output=True, timeout=100)


def _last_lines(data: Path) -> str:
    return "".join(f"\n--- {log.name}\n{log.read_text('utf-8', 'replace')[-2000:]}" for log in sorted(data.glob("logs/*.log")))


class Cli:
    """`penstock` run in a folder of the test's own."""

    def __init__(self, system: System, folder: Path) -> None:
        self.folder = folder
        self.system = system
        self._started: list[subprocess.Popen[str]] = []

    def __call__(self, *arguments: str | Path, timeout: float = 60, **environ: str) -> subprocess.CompletedProcess[str]:
        """Run it to its end."""
        process = self.start(*arguments, **environ)
        out, err = process.communicate(timeout=timeout)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def start(self, *arguments: str | Path, stderr: int = subprocess.PIPE, **environ: str) -> subprocess.Popen[str]:
        """Run it, and go on."""
        process = subprocess.Popen(
            [*COMMAND, *map(str, arguments)],
            cwd=self.folder,
            env={**self.system.environ, "PYTHONWARNINGS": "error", **environ},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
        self._started.append(process)
        return process

    def task(self, script: str, *, inputs: Sequence[str] = (), outputs: Sequence[str] = (), more: str = "") -> Path:
        """A task file that runs a shell script."""
        content = {
            "platform": "linux",
            "inputs": [{"name": name} for name in inputs],
            "outputs": [{"name": name} for name in outputs],
            "run": {"path": "sh", "args": ["-ec", script]},
        }
        path = self.folder / "task.yml"
        path.write_text(json.dumps(content)[:-1] + (f", {more}" if more else "") + "}")
        return path

    def close(self) -> None:
        for process in self._started:
            if process.poll() is None:
                process.kill()
            process.communicate()


@pytest.fixture
def team(system: System, tmp_path_factory: pytest.TempPathFactory) -> System:
    """A team of the test's own, and a home with a target for it."""
    name = f"team-{secrets.token_hex(6)}"
    asked(system, "PUT", f"/api/v1/teams/{name}")
    token = asked(system, "POST", f"/api/v1/teams/{name}/tokens", {"role": "owner"})["token"]
    home = tmp_path_factory.mktemp("home")
    target = {"url": system.url, "token": token, "team": name}
    (home / "targets.json").write_text(json.dumps({"current": "test", "targets": {"test": target}}))
    return System(data=system.data, url=system.url, token=token, team=name, environ=environment(home))


def asked(system: System, method: str, path: str, body: object = None) -> dict[str, Any]:
    """An API call with a system's token."""
    headers = {"Authorization": f"Bearer {system.token}", "Content-Type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(system.url + path, data=data, headers=headers, method=method)
    with urllib.request.urlopen(request, timeout=30) as response:
        answer: dict[str, Any] = json.load(response)
    return answer


@pytest.fixture
def cli(team: System, tmp_path: Path) -> Iterator[Cli]:
    """The command line, for a fresh team, in a fresh folder."""
    made = Cli(team, tmp_path)
    yield made
    made.close()


def read_until(stream: object, sign: str, timeout: float = 30) -> str:
    """What a process writes up to and including the line with the sign."""
    seen = ""
    deadline = time.monotonic() + timeout
    for line in stream:  # type: ignore[attr-defined]
        seen += line
        if sign in line:
            return seen
        assert time.monotonic() < deadline, f"no `{sign}` in:\n{seen}"
    raise AssertionError(f"no `{sign}` in:\n{seen}")


@pytest.fixture
def interrupt() -> Callable[[subprocess.Popen[str]], None]:
    return lambda process: process.send_signal(signal.SIGINT)
