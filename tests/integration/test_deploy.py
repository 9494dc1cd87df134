"""The scaled-out form, without its containers: the commands and settings of docker-compose.yml and of `compose.py prepare`, on real servers."""

import json
import os
import runpy
import socket
import subprocess
import sys
import sysconfig
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec

from penstock.up.service import why_unready
from proto.catalogue import SERVICES
from tests.controls import eventually
from tests.postgres_fixture import postgres_cluster
from tests.s3_fixture import S3Server

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = msgspec.yaml.decode((ROOT / "docker-compose.yml").read_bytes())["services"]


def settings(file: Path) -> dict[str, str]:
    return dict(line.split("=", 1) for line in file.read_text().splitlines())


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def running(command: list[str], environ: Mapping[str, str], log: Path) -> Iterator[None]:
    with log.open("wb") as file, subprocess.Popen(command, env=environ, stdin=subprocess.DEVNULL, stdout=file, stderr=file) as process:
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


async def test_the_services_come_up_with_what_their_containers_are_given(tmp_path: Path, s3_server: S3Server) -> None:
    compose = runpy.run_path(str(ROOT / "deploy/compose.py"))
    generated = tmp_path / "generated"
    token = compose["prepare"](generated)
    nats, artifacts, gateway = free_port(), free_port(), free_port()
    with ExitStack() as stack:
        postgres = stack.enter_context(postgres_cluster())
        passwords = {name.removeprefix("PASSWORD_").lower(): value for name, value in settings(generated / "migrate.env").items()}
        await compose["migrate"](postgres.dsn(), {service: passwords[service] for service in SERVICES})
        here = {
            "postgres:5432": f"127.0.0.1:{postgres.port}",
            "nats:4222": f"127.0.0.1:{nats}",
            "0.0.0.0:4222": f"127.0.0.1:{nats}",
            "artifacts:7421": f"127.0.0.1:{artifacts}",
            "0.0.0.0:7421": f"127.0.0.1:{artifacts}",
            "gateway:7420": f"127.0.0.1:{gateway}",
            "0.0.0.0:7420": f"127.0.0.1:{gateway}",
            "http://store:9000": s3_server.environment["AWS_ENDPOINT"],
            "s3://penstock": s3_server.new_place(),
            "/home/penstock/worker": str(tmp_path / "worker"),
            '"/data"': f'"{tmp_path}/data"',
            "/opt/compose.py": str(ROOT / "deploy/compose.py"),
        }

        def moved(text: str) -> str:
            for there, place in here.items():
                text = text.replace(there, place)
            return text

        config = generated / "nats.conf"
        config.write_text(moved(config.read_text()))
        server = [f"{sysconfig.get_path('scripts')}/nats-server", "--config", str(config), "--http_port", str(free_port())]
        stack.enter_context(running(server, {}, tmp_path / "nats.log"))
        status: dict[str, str] = {}
        for name in (*SERVICES, "worker-1"):
            container = COMPOSE[name]
            given = {**container["environment"], **settings(generated / Path(container["env_file"]).name)}
            status[name] = f"127.0.0.1:{free_port()}"
            environ = {
                "PATH": os.environ["PATH"],
                "HOME": str(tmp_path),
                "PYTHONPATH": os.pathsep.join(sys.path),
                "PENSTOCK_STATUS_LISTEN": status[name],
                **{key: moved(value) for key, value in given.items()},
            }
            command = [sys.executable, *map(moved, container["command"][1:])]
            stack.enter_context(running(command, environ, tmp_path / f"{name}.log"))
        for where in status.values():
            await eventually(lambda where=where: why_unready(where) is None, timeout=60)  # type: ignore[misc]
        request = urllib.request.Request(f"http://127.0.0.1:{gateway}/api/v1/workers", headers={"Authorization": f"Bearer {token}"})

        def available() -> bool:
            with urllib.request.urlopen(request, timeout=10) as response:
                return "available" in [worker["status"] for worker in json.load(response)["items"]]

        await eventually(available, timeout=30)
