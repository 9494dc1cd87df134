"""The scaled-out form says what the services understand."""

import importlib
import runpy
from pathlib import Path
from typing import Any

import msgspec
import pytest

from libs.runtime.settings import decode
from proto.catalogue import SERVICES

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = msgspec.yaml.decode((ROOT / "docker-compose.yml").read_bytes())
OF_EVERY_PROCESS = {"PENSTOCK_LISTEN", "PENSTOCK_STATUS_LISTEN"}


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deploy") / "generated"
    runpy.run_path(str(ROOT / "deploy/compose.py"))["prepare"](folder)
    return folder


@pytest.mark.parametrize("name", [*SERVICES, "worker-1", "worker-2"])
def test_every_setting_of_a_container_is_one_of_its_service(name: str, generated: Path) -> None:
    container = COMPOSE["services"][name]
    lines = (generated / Path(container["env_file"]).name).read_text().splitlines()
    environ = {**container["environment"], **dict(line.split("=", 1) for line in lines)}
    module = container["command"][-1]
    settings = importlib.import_module(f"{module}.wiring").Settings
    assert module == f"services.{name.partition('-')[0]}"
    decode(settings, {key: value for key, value in environ.items() if key not in OF_EVERY_PROCESS})


def test_every_container_says_how_it_is(generated: Path) -> None:
    dockerfile = (ROOT / "deploy/Dockerfile").read_text()
    for name, container in COMPOSE["services"].items():
        assert "healthcheck" in container or ("build" in container and "HEALTHCHECK" in dockerfile), name
        if file := container.get("env_file"):
            assert (generated / Path(file).name).exists()
