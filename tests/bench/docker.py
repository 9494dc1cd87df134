"""A step in a container, beside the same container made by hand through the same library: what Penstock adds."""

import asyncio
import tempfile
import time
from pathlib import Path

import aiohttp
from aiodocker import Docker

from tests.bench.figures import Figure, at_most, percentile
from tests.engine_controls import a_docker_system, contained
from tests.engine_fixture import IMAGE, Dockerd, a_dockerd, no_engine


def docker(count: int) -> list[Figure]:
    """In turns, so that both see the same machine. Both are removed afterwards, which neither waits for. Nothing where no engine can be started."""
    if no_engine():
        return []
    with a_dockerd() as engine, tempfile.TemporaryDirectory(prefix="penstock-bench-") as folder:
        bare, ours = asyncio.run(_measured(engine, Path(folder), count))
    return [
        Figure("container of true by hand: create, attach, start, wait, p50", 1000 * percentile(bare, 0.5), "ms"),
        Figure("step true in a container, package to its end reported, p50", 1000 * percentile(ours, 0.5), "ms"),
        Figure("what that adds", 1000 * (percentile(ours, 0.5) - percentile(bare, 0.5)), "ms", at_most(15)),
    ]


async def _measured(engine: Dockerd, folder: Path, count: int) -> tuple[list[float], list[float]]:
    bare: list[float] = []
    ours: list[float] = []
    connector = aiohttp.UnixConnector(engine.url.removeprefix("unix://"))
    async with Docker(url="http://engine", connector=connector) as client, connector, a_docker_system(folder, engine) as (scheduler, _):
        for number in range(-2, count):
            by_hand = await _by_hand(client)
            attempt = await scheduler.send(contained("true"))
            sent = time.perf_counter()
            assert (await scheduler.finished(attempt)).status == "succeeded"
            in_penstock = time.perf_counter() - sent
            while await client.containers.list(all=True):
                await asyncio.sleep(0.01)
            if number >= 0:
                bare.append(by_hand)
                ours.append(in_penstock)
    return bare, ours


async def _by_hand(client: Docker) -> float:
    began = time.perf_counter()
    host = {"NetworkMode": "none", "Init": True, "LogConfig": {"Type": "none"}}
    container = await client.containers.create({"Image": IMAGE, "Cmd": ["true"], "AttachStdout": True, "AttachStderr": True, "HostConfig": host})
    async with container.attach(stdout=True, stderr=True) as stream:
        await container.start()
        assert await stream.read_out() is None
    assert (await container.wait())["StatusCode"] == 0
    took = time.perf_counter() - began
    await container.delete(force=True)
    return took
