"""Bytes past the gateway: the same answers, less in between, and a token for nothing else."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from libs.archives.tree import CHUNK
from penstock import Client
from penstock.client.http import Http
from tests.artifacts_fixture import BLOBS, GRANT_KEY, TREE, Api, blob_stream, manifest, missing, serving, tar, tree_digest
from tests.gateway_fixture import TOKEN, Gateway, running_gateway
from tests.gateway_fixture import serving as served
from tests.nats_fixture import NatsServer
from tests.postgres_fixture import Database

BIG = os.urandom(CHUNK + 5000)
FILES = {"a": b"alpha", "lib/b": b"beta", "z": BIG}
ALL = "/teams/main/user-artifacts"


@asynccontextmanager
async def a_system(database: Database, nats: NatsServer, store: Path, public_url: str = "") -> AsyncIterator[tuple[Gateway, Api]]:
    """`public_url`: what the gateway tells clients; the artifacts service's own unless given."""
    async with (
        serving(database, nats, store) as api,
        running_gateway(database, nats.url, artifacts_url=api.url, artifacts_public_url=public_url or api.url, grant_key=GRANT_KEY) as gateway,
    ):
        yield gateway, api


@pytest.fixture
async def system(database: Database, nats_server: NatsServer, tmp_path: Path) -> AsyncIterator[tuple[Gateway, Api]]:
    async with a_system(database, nats_server, tmp_path / "store") as system:
        yield system


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each call of a client: whether it was made past the gateway, and answered there."""
    made: list[bool] = []
    whole = Http.open

    @asynccontextmanager
    async def noting(self: Http, method: str, path: str, **more: Any) -> AsyncIterator[Any]:
        async with whole(self, method, path, **more) as response:
            made.append(more.get("at") is not None)
            yield response

    monkeypatch.setattr(Http, "open", noting)
    return made


def write(folder: Path) -> Path:
    for name, contents in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(contents)
    return folder


async def pieces(data: bytes) -> AsyncIterator[bytes]:
    for at in range(0, len(data), 100_000):
        yield data[at : at + 100_000]


async def there_and_back(gateway: Gateway, folder: Path) -> None:
    async with Client(gateway.url, TOKEN) as client:
        sent = await client.upload(write(folder / "in"), name="src")
        streamed = await client.upload(pieces(tar(FILES)), name="src")
        assert (sent.name, sent.digest, sent.files) == (streamed.name, streamed.digest, streamed.files) == ("src", tree_digest(FILES), 3)
        assert sent.id != streamed.id
        await client.download(streamed, folder / "out")
    assert {name: (folder / "out" / name).read_bytes() for name in FILES} == FILES


async def test_folders_tars_and_downloads_go_past_the_gateway(system: tuple[Gateway, Api], tmp_path: Path, places: list[bool]) -> None:
    await there_and_back(system[0], tmp_path)
    assert places.count(True) == 3


async def test_an_address_that_cannot_be_reached_is_done_without(
    database: Database, nats_server: NatsServer, tmp_path: Path, places: list[bool]
) -> None:
    async with a_system(database, nats_server, tmp_path / "store", "http://127.0.0.1:1") as (gateway, _):
        await there_and_back(gateway, tmp_path)
    assert places and not any(places)


async def test_somebody_else_at_that_address_is_done_without(database: Database, nats_server: NatsServer, tmp_path: Path, places: list[bool]) -> None:
    async with served(web.Application()) as stranger, a_system(database, nats_server, tmp_path / "store", stranger) as (gateway, _):
        await there_and_back(gateway, tmp_path)
    assert places and not any(places)


async def test_a_token_is_for_its_upload_and_deed_alone(system: tuple[Gateway, Api]) -> None:
    gateway, api = system
    pending = await gateway.json("POST", ALL, 202, data=manifest(FILES), headers={"Content-Type": TREE})
    send = {"Authorization": f"Bearer {pending['direct']['token']}"}
    own = f"/artifacts/{pending['id']}"
    assert pending["direct"]["url"] == f"{api.url}{own}/blobs"
    assert 0 < pending["direct"]["seconds"] <= 300
    other = own[:-1] + ("0" if own[-1] != "0" else "1")
    typed = {"Content-Type": BLOBS}
    assert (await api.ask("PUT", f"{other}/blobs", send | typed, data=blob_stream([b"alpha"]))).status == 403
    assert (await api.ask("POST", own, send | {"Content-Type": TREE}, data=manifest(FILES))).status == 403
    done = await api.ask("PUT", f"{own}/blobs", send | typed, data=blob_stream(missing(FILES, pending)))
    assert done.status == 201
    for method, path in (("GET", own), ("POST", f"{own}/blobs"), ("PATCH", own), ("DELETE", own), ("GET", f"{own}/tree"), ("GET", "/usage")):
        assert (await api.ask(method, path, send)).status == 403

    async with gateway.call("GET", f"{ALL}/{pending['id']}?format=tree") as answer:
        fetch = {"Authorization": f"Bearer {answer.headers['Penstock-Direct-Token']}"}
        assert answer.headers["Penstock-Direct-Url"] == f"{api.url}{own}/blobs"
    for method, path in (("GET", own), ("PUT", f"{own}/blobs"), ("PATCH", own), ("DELETE", own), ("POST", f"{other}/blobs")):
        assert (await api.ask(method, path, fetch)).status == 403
    assert (await api.ask("POST", f"{own}/blobs", fetch, data=b"")).status == 200

    direct = (await gateway.json("POST", f"{ALL}/direct?name=n", 200))["direct"]
    stream = {"Authorization": f"Bearer {direct['token']}"}
    path = direct["url"].removeprefix(api.url)
    assert (await api.ask("POST", path, stream | {"Content-Type": TREE}, data=manifest(FILES))).status == 403
    assert (await api.ask("POST", f"{path}&from={pending['id']}", stream)).status == 403
    assert (await api.ask("POST", f"{path}&tree={tree_digest(FILES)}", stream)).status == 403
    assert (await api.ask("POST", path.replace("name=n", f"name={'n' * 201}"), stream, data=tar(FILES))).status == 422
    assert (await api.ask("POST", path, {"Authorization": "Bearer nobody"}, data=tar(FILES))).status == 401
    assert (await api.ask("POST", path, stream, data=tar(FILES))).status == 201


async def test_an_address_of_this_machine_is_for_this_machine(system: tuple[Gateway, Api]) -> None:
    gateway, _ = system
    through_a_proxy = {"Content-Type": TREE, "Host": "penstock.example.org"}
    assert "direct" not in await gateway.json("POST", ALL, 202, data=manifest(FILES), headers=through_a_proxy)
    assert "direct" not in await gateway.json("POST", f"{ALL}/direct", 200, headers={"Host": "penstock.example.org"})


async def test_chunks_may_come_with_the_manifest(system: tuple[Gateway, Api]) -> None:
    gateway, _ = system
    led = {"Content-Type": "application/vnd.penstock.blobs+tree"}
    small = {"a": b"alpha", "lib/b": b"beta"}
    made = await gateway.json("POST", ALL, 201, data=blob_stream(small.values()) + manifest(small), headers=led)
    assert made["digest"] == tree_digest(small)
    pending = await gateway.json("POST", ALL, 202, data=blob_stream([b"alpha"]) + manifest(FILES), headers=led)
    assert pending["missing_bytes"] == len(BIG)
    for body, status in (
        (blob_stream([b"not of it"]) + manifest(small), 422),
        (blob_stream([b"alpha"])[:-36], 422),
        (blob_stream([b"alpha"]).replace(b"alpha", b"alphb") + manifest(small), 422),
        (blob_stream([BIG[: 1 << 20]]) + manifest({"big": BIG[: 1 << 20]}), 413),
    ):
        await gateway.json("POST", ALL, status, data=body, headers=led)
