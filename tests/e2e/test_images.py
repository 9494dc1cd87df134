"""Tasks in images, from the command line to a real engine and back."""

import asyncio
import contextlib
import hashlib
import json
import subprocess
from collections.abc import Callable, Iterator

import pytest

from tests.controls import eventually
from tests.e2e.conftest import COMMAND, Cli, System, asked, environment, read_until
from tests.e2e.test_secrets import call, fetched, files, kept, running, tables, value
from tests.encodings import encodings
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
    assert f"image docker.io/library/{IMAGE}, exactly sha256:" in ran.stderr
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
    assert "may not be privileged" in cli("artifact", "policy", "--not-privileged").stdout


def inspected(dockerd: Dockerd) -> dict[str, str]:
    """What the engine tells of each container that it has, by name."""
    docker = ["docker", "--host", dockerd.url]
    every = subprocess.run([*docker, "ps", "--all", "--quiet"], capture_output=True, text=True, check=True).stdout.split()
    told = subprocess.run([*docker, "inspect", *every], capture_output=True, text=True, check=False).stdout if every else "[]"
    return {one["Name"]: json.dumps(one, ensure_ascii=False).replace("\\u0026", "&") for one in json.loads(told or "[]")}


def of_the_engine(dockerd: Dockerd) -> Iterator[tuple[str, bytes]]:
    """Everything that it keeps on its disk, and what it writes of its own."""
    for path in dockerd.folder.rglob("*"):
        with contextlib.suppress(OSError):
            if path.is_file() and not path.is_symlink():
                yield str(path), path.read_bytes()


SAYS = """
printf %s "$A" | busybox sha256sum; printf %s "$MY_PASSWORD" | busybox sha256sum
for text in "$A" "$MY_PASSWORD"; do echo "it is $text"; echo "it is $text" >&2; printf %s "$text" | busybox base64; done
"""


def test_a_secret_in_a_container_is_its_environment_and_nothing_else(
    cli: Cli, dockerd: Dockerd, interrupt: Callable[[subprocess.Popen[str]], None]
) -> None:
    """What the engine was told goes with the container; what it writes is masked (invariant 10)."""
    given, literal = value(), value()
    kept(cli, "word", given)
    params = {"A": "((word))", "MY_PASSWORD": literal}
    more = f'"image": {json.dumps(IMAGE)}, "params": {json.dumps(params)}'
    told = [hashlib.sha256(text.encode()).hexdigest() for text in (given, literal)]
    process = cli.start("execute", "-c", cli.task(f"{SAYS}echo waits; while :; do sleep 0.05; done", more=more))
    assert process.stdout
    said = read_until(process.stdout, "waits")
    assert all(digest in said for digest in told) and said.count("it is ***") == 2
    (build,) = call(cli, "GET", "builds")["items"]  # type: ignore[misc]
    assert [name for name in inspected(dockerd) if str(build["id"]) in name], "the one that runs"
    sources: dict[str, bytes] = dict(running(cli))
    interrupt(process)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 3, err
    for _ in range(2):  # one may be begun in a container that waited
        done = cli("execute", "-c", cli.task(SAYS, more=more))
        assert done.returncode == 0 and all(digest in done.stdout for digest in told), done.stderr
        sources[f"build after {_}"] = (done.stdout + done.stderr).encode()
    ids = [str(one["id"]) for one in call(cli, "GET", "builds")["items"]]  # type: ignore[attr-defined]
    asyncio.run(eventually(lambda: not [name for name in inspected(dockerd) if any(each in name for each in ids)]))
    sources |= {"said": said.encode(), "rest": (out + err).encode()}
    sources |= {f"container {name}": text.encode() for name, text in inspected(dockerd).items()}
    sources |= {f"build {number}": fetched(cli, f"builds/{number}/log") for number in (1, 2, 3)}
    sources |= asyncio.run(tables(cli.system.data))
    sources |= dict(files(cli.system.data))
    sources |= dict(of_the_engine(dockerd))
    assert any(IMAGE.encode() in content for name, content in sources.items() if name.startswith(str(dockerd.folder))), "the engine's files were read"
    found = [(name, text) for name, content in sources.items() for one in (given, literal) for text in encodings(one) if text in content]
    assert found == []
