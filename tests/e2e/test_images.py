"""Tasks in images, from the command line to a real engine and back."""

import json
import subprocess
from collections.abc import Iterator

import pytest

from tests.e2e.conftest import COMMAND, Cli, System, asked, environment
from tests.engine_fixture import IMAGE, Dockerd

TASK = """
platform: linux
image: {image}
inputs: [{{name: src}}]
outputs: [{{name: dist}}]
run: {{path: sh, args: [-c, "id -u; cat src/file | busybox tr a-z A-Z | busybox tee dist/file"], user: builder}}
container_limits: {{memory: 64mb}}
"""


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory, dockerd: Dockerd) -> Iterator[System]:
    """`penstock up` where DOCKER_HOST names an engine."""
    home = tmp_path_factory.mktemp("with-an-engine")
    data, environ = home / "data", {**environment(home), "DOCKER_HOST": dockerd.url}
    subprocess.run([*COMMAND, "up", "--data", data, "--detach", "--port", "0"], env=environ, capture_output=True, timeout=100, check=True)
    try:
        targets = json.loads((home / "targets.json").read_text())
        target = targets["targets"][targets["current"]]
        yield System(data=data, url=target["url"], token=target["token"], team=target["team"], environ=environ)
    finally:
        subprocess.run([*COMMAND, "down", "--data", data], env=environ, check=True, capture_output=True, timeout=100)


def test_a_task_runs_in_its_image_and_its_output_comes_back(cli: Cli) -> None:
    (cli.folder / "src").mkdir()
    (cli.folder / "src" / "file").write_text("loud\n")
    (cli.folder / "task.yml").write_text(TASK.format(image=IMAGE))
    ran = cli("execute", "-c", "task.yml", "-i", "src=src", "-o", "dist=out")
    assert (ran.returncode, ran.stdout) == (0, "1234\nLOUD\n"), ran.stderr
    assert "sandbox docker" in ran.stderr
    assert (cli.folder / "out" / "file").read_text() == "LOUD\n"


def test_an_image_given_with_the_command_is_the_one(cli: Cli) -> None:
    (cli.folder / "task.yml").write_text("platform: linux\nrun: {path: busybox, args: [echo, inside]}\n")
    ran = cli("execute", "-c", "task.yml", "--image", IMAGE)
    assert (ran.returncode, ran.stdout) == (0, "inside\n"), ran.stderr


def test_what_ran_out_of_memory_says_so(cli: Cli) -> None:
    (cli.folder / "task.yml").write_text(
        f"platform: linux\nimage: {IMAGE}\ncontainer_limits: {{memory: 16mb}}\nrun: {{path: busybox, args: [tail, /dev/zero]}}\n"
    )
    ran = cli("execute", "-c", "task.yml")
    assert ran.returncode == 137
    assert "out of memory (limit 16 MiB)" in ran.stderr


def test_privileged_steps_take_a_policy_and_a_worker(cli: Cli, system: System) -> None:
    (cli.folder / "task.yml").write_text(f"platform: linux\nimage: {IMAGE}\nrun: {{path: 'true'}}\n")
    refused = cli("execute", "-c", "task.yml", "--privileged")
    assert refused.returncode != 0
    assert "does not let its steps be privileged" in refused.stderr
    assert "only an owner of the first team" in cli("artifact", "policy", "--privileged").stderr
    policy = asked(system, "GET", f"/api/v1/teams/{cli.system.team}/policy")
    assert asked(system, "PUT", f"/api/v1/teams/{cli.system.team}/policy", {**policy, "privileged": True})["privileged"]
    assert "may be privileged" in cli("artifact", "policy").stdout
    waits = cli("execute", "-c", "task.yml", "--privileged", "--detach")
    assert waits.returncode == 0
    assert cli("abort", waits.stdout.strip()).returncode == 0
    assert "privileged" not in cli("artifact", "policy", "--not-privileged").stdout
