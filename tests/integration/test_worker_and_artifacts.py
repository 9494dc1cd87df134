"""A worker and the real artifacts service: what both make of one protocol."""

import hashlib
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from libs.archives.tree import CHUNK
from libs.tokens import public_key
from proto.events.base import ArtifactRef
from proto.plan import TaskInput, TaskOutput
from tests.artifacts_fixture import Api, serving
from tests.controls import eventually
from tests.nats_fixture import NatsServer
from tests.postgres_fixture import Database
from tests.worker_controls import IDENTITY, a_system, sh


@pytest.fixture
async def api(database: Database, nats_server: NatsServer, tmp_path: Path) -> AsyncIterator[Api]:
    async with serving(database, nats_server, tmp_path / "store") as api:
        yield api


async def test_a_tree_goes_through_two_workers_and_comes_back_as_it_was(api: Api, tmp_path: Path) -> None:
    files = {"a": b"alpha\n", "deep/big": os.urandom(CHUNK) + bytes(CHUNK) + b"end", "deep/empty": b"", "name\xc4": b"x\n", "other": b"alpha\n"}
    sealed = await api.put(files)
    ref = ArtifactRef(id=sealed["id"], digest=sealed["digest"], size=sealed["size"], files=sealed["files"])
    token = api.build(inputs={"src": ref.digest}, outputs=["step/src"], key=public_key(IDENTITY))["Authorization"].removeprefix("Bearer ")
    again = sh("cat src/deep/big | sha256sum | cut -c1-64", inputs=[TaskInput(name="src")], outputs=[TaskOutput(name="src")])
    for worker in ("one", "two"):
        async with a_system(tmp_path / worker, artifacts_url=api.url) as (scheduler, _):
            attempt = await scheduler.send(again, inputs={"src": ref}, token=token)
            assert (await scheduler.finished(attempt)).status == "succeeded", scheduler.step(attempt).error
            assert await scheduler.log(attempt, "stdout") == hashlib.sha256(files["deep/big"]).hexdigest() + "\n"
            taken = scheduler.step(attempt).outputs["src"]
            assert (taken.digest, taken.size, taken.files) == (ref.digest, ref.size, ref.files)


async def test_what_a_worker_stores_another_stage_fetches(api: Api, tmp_path: Path) -> None:
    make = "mkdir dist/a; seq 1000000 > dist/a/numbers; seq 9 > dist/one; ln dist/one dist/two; ln -s a dist/link; truncate -s 20M dist/holes"
    look = "md5sum dist/* dist/a/* 2>/dev/null"
    token = api.build(outputs=["step/dist"], key=public_key(IDENTITY))["Authorization"].removeprefix("Bearer ")
    async with a_system(tmp_path / "one", artifacts_url=api.url) as (scheduler, _):
        first = await scheduler.send(sh(f"{make}; {look}; true", outputs=["dist"]), token=token)
        assert (await scheduler.finished(first)).status == "succeeded", scheduler.step(first).error
        ref = scheduler.step(first).outputs["dist"]
        said = await scheduler.log(first, "stdout")
    await eventually(lambda: api.stored())
    token = api.build("b2", inputs={"dist": ref.digest}, key=public_key(IDENTITY))["Authorization"].removeprefix("Bearer ")
    async with a_system(tmp_path / "two", artifacts_url=api.url) as (scheduler, _):
        using = sh(f"{look}; test dist/one -ef dist/two", inputs=[TaskInput(name="dist")])
        second = await scheduler.send(using, inputs={"dist": ref}, token=token)
        assert await scheduler.log(second, "stdout") == said
        assert (await scheduler.finished(second)).status == "succeeded"


async def test_a_worker_whose_clock_is_an_hour_off_is_told_the_time(api: Api, tmp_path: Path) -> None:
    """FAULTS 82"""
    sealed = await api.put({"file": b"contents"})
    ref = ArtifactRef(id=sealed["id"], digest=sealed["digest"], size=sealed["size"], files=sealed["files"])
    token = api.build(inputs={"src": ref.digest}, outputs=["step/out"], key=public_key(IDENTITY))["Authorization"].removeprefix("Bearer ")
    for hours in (-1, 1):
        async with a_system(tmp_path / str(hours), artifacts_url=api.url, now=lambda: time.time() + 3600 * hours) as (scheduler, _):  # noqa: B023
            attempt = await scheduler.send(sh("cp src/file out", inputs=[TaskInput(name="src")], outputs=["out"]), inputs={"src": ref}, token=token)
            assert (await scheduler.finished(attempt)).status == "succeeded", scheduler.step(attempt).error
