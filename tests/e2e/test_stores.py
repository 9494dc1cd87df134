"""The whole system on an S3 store, also while that is away."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import obstore
import pytest
from obstore.store import from_url

from penstock.client import Client, Unavailable
from tests.controls import eventually
from tests.e2e.conftest import COMMAND, Cli, System, environment
from tests.faults.folders import same, write
from tests.faults.proxy import Proxy
from tests.s3_fixture import S3Server


class Store:
    """Where the system keeps its packs: a server, and the way to it, which can be cut."""

    def __init__(self, server: S3Server, proxy: Proxy, url: str) -> None:
        self.server = server
        self.proxy = proxy
        self.url = url
        self.environ = {**server.environment, "AWS_ENDPOINT": f"http://127.0.0.1:{proxy.port}"}
        settings = {name.lower(): value for name, value in server.environment.items() if name != "AWS_ALLOW_HTTP"}
        self._bucket = from_url(url, config=settings, client_options={"allow_http": True})  # type: ignore[call-overload]

    def sizes(self, team: str) -> list[int]:
        """The sizes of a team's objects."""
        return [found["size"] for page in obstore.list(self._bucket, team) for found in page]

    def answered(self, method: str) -> int:
        return self.server.count(method)


@pytest.fixture(scope="module")
def store(s3_server: S3Server) -> Iterator[Store]:
    with Proxy(int(s3_server.environment["AWS_ENDPOINT"].rpartition(":")[2])) as proxy:
        yield Store(s3_server, proxy, s3_server.new_place())


@pytest.fixture(scope="module")
def system(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """`penstock up --store s3://…`"""
    home = tmp_path_factory.mktemp("system")
    data = home / "data"
    environ = {**environment(home), **store.environ}
    command = [*COMMAND, "up", "--data", data, "--detach", "--port", "0", "--store", store.url]
    started = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=100)
    try:
        assert started.returncode == 0, started.stderr
        target = json.loads((home / "targets.json").read_text())["targets"]["local"]
        yield System(data=data, url=target["url"], token=target["token"], team=target["team"], environ=environ)
    finally:
        subprocess.run([*COMMAND, "down", "--data", data], env=environ, check=True, capture_output=True, timeout=100)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    write(tmp_path / "work", {"a": b"alpha", "d/b": b"beta", "large": os.urandom(20 << 20)})
    return tmp_path / "work"


async def test_what_is_uploaded_lies_in_the_bucket_until_nobody_needs_it(cli: Cli, store: Store, work: Path) -> None:
    """Stored in few requests, and once; the same again costs none."""
    before = store.answered("PUT")
    one = cli("artifact", "upload", work)
    assert one.returncode == 0, one.stderr
    assert 3 <= store.answered("PUT") - before <= 5
    before = store.answered("PUT")
    two = cli("artifact", "upload", work)
    assert (two.returncode, store.answered("PUT")) == (0, before), two.stderr
    assert "sent nothing" in two.stderr
    assert cli("artifact", "download", two.stdout.strip(), "back").returncode == 0
    assert same(cli.folder / "back", work)
    assert cli("artifact", "rm", one.stdout.strip()).returncode == 0
    assert cli("artifact", "download", two.stdout.strip(), "again").returncode == 0
    assert same(cli.folder / "again", work)
    assert cli("artifact", "rm", two.stdout.strip()).returncode == 0
    await eventually(lambda: store.sizes(cli.system.team) == [], timeout=30)


async def test_a_build_takes_its_input_from_the_bucket_and_leaves_its_output_there(cli: Cli, store: Store, work: Path) -> None:
    task = cli.task("cp -r src/. dist; echo done", inputs=["src"], outputs=["dist"])
    done = cli("execute", "-c", task, "-i", "src=work", "-o", "dist=out")
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    assert same(cli.folder / "out", work)
    assert cli("artifact", "download", "build:1/dist", "later").returncode == 0
    assert same(cli.folder / "later", work)
    for artifact in json.loads(cli("artifact", "ls", "--json").stdout):
        assert cli("artifact", "rm", artifact["id"]).returncode == 0
    # the build's log stays
    await eventually(lambda: sum(store.sizes(cli.system.team)) < 10_000, timeout=30)
    assert cli("watch", "1").stdout == "done\n"


async def test_while_the_store_is_away_an_upload_waits_and_then_goes_on(cli: Cli, store: Store, work: Path) -> None:
    before = store.answered("PUT")
    uploading = cli.start("artifact", "upload", work)
    await eventually(lambda: store.answered("PUT") > before)
    store.server.away = True
    try:
        failed = store.answered("PUT")
        await eventually(lambda: store.answered("PUT") > failed + 2, timeout=30)
        with store.proxy.refusing():
            assert uploading.poll() is None
            store.server.away = False
            with pytest.raises(Unavailable, match="the store cannot be reached"):
                await sent_in_a_hurry(cli.system, cli.folder / "other")
    finally:
        store.server.away = False
    out, err = uploading.communicate(timeout=60)
    assert uploading.returncode == 0, err
    assert cli("artifact", "download", out.strip(), "back").returncode == 0
    assert same(cli.folder / "back", work)


async def sent_in_a_hurry(system: System, folder: Path) -> None:
    write(folder, {"other": os.urandom(1000)})
    async with Client(system.url, system.token, system.team, patience_upload=1.0) as client:
        await client.info()
        await client.upload(folder)


async def test_while_the_store_is_away_a_builds_output_waits_and_then_is_kept(cli: Cli, store: Store) -> None:
    before = store.answered("PUT")
    task = cli.task("head -c 20000000 /dev/urandom > dist/large; sha256sum < dist/large", outputs=["dist"])
    store.server.away = True
    try:
        building = cli.start("execute", "-c", task, "-o", "dist=out")
        await eventually(lambda: store.answered("PUT") > before + 1, timeout=30)
        with store.proxy.refusing():
            store.server.away = False
            assert building.poll() is None
    finally:
        store.server.away = False
    out, err = building.communicate(timeout=100)
    assert building.returncode == 0, err
    found = subprocess.run(["sha256sum"], input=(cli.folder / "out/large").read_bytes(), capture_output=True, check=True)
    assert found.stdout.decode() == out
