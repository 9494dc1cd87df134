"""The scaled-out form says what the services understand."""

import importlib
import os
import runpy
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest

from libs.runtime.settings import decode
from proto.catalogue import SERVICES

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = msgspec.yaml.decode((ROOT / "docker-compose.yml").read_bytes())
DOCKERFILE = (ROOT / "deploy/Dockerfile").read_text()
OF_EVERY_PROCESS = {"PENSTOCK_LISTEN", "PENSTOCK_STATUS_LISTEN"}
WORKERS = ["worker-1", "worker-2"]


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deploy") / "generated"
    runpy.run_path(str(ROOT / "deploy/compose.py"))["prepare"](folder)
    return folder


@pytest.mark.parametrize("name", [*SERVICES, *WORKERS])
def test_every_setting_of_a_container_is_one_of_its_service(name: str, generated: Path) -> None:
    container = COMPOSE["services"][name]
    lines = (generated / Path(container["env_file"]).name).read_text().splitlines()
    environ = {**container["environment"], **dict(line.split("=", 1) for line in lines)}
    service = name.partition("-")[0]
    settings = importlib.import_module(f"services.{service}.wiring").Settings
    assert container["command"] == (["python", "/opt/compose.py", "worker"] if name in WORKERS else ["python", "-m", f"services.{service}"])
    decode(settings, {key: value for key, value in environ.items() if key not in OF_EVERY_PROCESS})


def test_every_container_says_how_it_is_and_comes_back(generated: Path) -> None:
    for name, container in COMPOSE["services"].items():
        assert "healthcheck" in container or ("build" in container and "HEALTHCHECK" in DOCKERFILE), name
        assert container.get("restart") == (None if name == "migrate" else "unless-stopped"), name
        if file := container.get("env_file"):
            assert (generated / Path(file).name).exists()


def test_what_is_written_to_is_a_volume_and_nothing_else_is_kept(generated: Path) -> None:
    for name, container in COMPOSE["services"].items():
        for volume in container.get("volumes", []):
            source, where, *_ = volume.split(":")
            assert source in COMPOSE["volumes"] or (generated / Path(source).name).exists(), volume
            assert "build" not in container or where == container["environment"]["PENSTOCK_WORKER_DIR"], volume
        if name in SERVICES:
            assert container["read_only"] and container["tmpfs"] == ["/tmp"] and container["cap_drop"] == ["ALL"], name
    assert "-o penstock -g penstock /home/penstock/worker" in DOCKERFILE, "a new volume is its user's"


def test_what_the_image_is_made_of_is_there_and_is_all_that_it_needs() -> None:
    copied = [word for line in DOCKERFILE.splitlines() if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert all((ROOT / path).exists() for path in copied)
    packages = msgspec.toml.decode((ROOT / "pyproject.toml").read_bytes())["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert {*packages, "pyproject.toml", "requirements.lock", "README.md", "deploy/compose.py"} <= {*copied}


ENDS = """
import runpy, sys
import services.worker.__main__ as worker
worker.main = lambda *_: print("ends", file=sys.stderr, flush=True) or sys.exit({code})
sys.argv = ["compose.py", "worker"]
runpy.run_path({script!r}, run_name="__main__")
"""


def test_a_worker_that_is_none_any_more_stays_and_others_end_as_they_end() -> None:
    """Docker starts again whatever ends, for ever."""

    def worker(code: int) -> subprocess.Popen[str]:
        program = ENDS.format(code=code, script=str(ROOT / "deploy/compose.py"))
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        return subprocess.Popen([sys.executable, "-c", program], env=environ, stderr=subprocess.PIPE, text=True)

    with worker(1) as other:
        assert other.wait(30) == 1
    with worker(77) as expelled, ExitStack() as stack:
        stack.callback(expelled.kill)
        assert expelled.stderr is not None and expelled.stderr.readline() == "ends\n"
        assert expelled.stderr.readline() == "this container waits to be stopped: to start it again is of no use\n"
        expelled.send_signal(signal.SIGTERM)
        assert expelled.wait(30) == 0
