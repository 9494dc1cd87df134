"""A step in a container, beside the same container made by hand through the same library: what Penstock adds, and what one
that waits saves."""

import asyncio
import tempfile
import time
from pathlib import Path

import aiohttp
from aiodocker import Docker

from services.worker.executors.docker import DockerExecutor
from tests.bench.figures import Figure, at_least, at_most, percentile
from tests.engine_controls import a_docker_system, contained
from tests.engine_fixture import IMAGE, Dockerd, a_dockerd, no_engine
from tests.worker_controls import Running


def docker(count: int) -> list[Figure]:
    """In turns, so that both see the same machine. Both are removed afterwards, which neither waits for. Nothing where no engine can be started."""
    if no_engine():
        return []
    with a_dockerd() as engine, tempfile.TemporaryDirectory(prefix="penstock-bench-") as folder:
        bare, ours = asyncio.run(_measured(engine, Path(folder) / "cold", count, 0))
        beside, warm = asyncio.run(_measured(engine, Path(folder) / "warm", count, 1))
    return [
        Figure("container of true by hand: create, attach, start, wait, p50", 1000 * percentile(bare, 0.5), "ms"),
        Figure("step true in a container, package to its end reported, p50", 1000 * percentile(ours, 0.5), "ms"),
        Figure("what that adds", 1000 * (percentile(ours, 0.5) - percentile(bare, 0.5)), "ms", at_most(15)),
        Figure("the same step, when a container waits for it, p50", 1000 * percentile(warm, 0.5), "ms"),
        Figure("create, attach, start, wait by hand ÷ that", percentile(beside, 0.5) / percentile(warm, 0.5), "×", at_least(4)),
    ]


async def _measured(engine: Dockerd, folder: Path, count: int, warm: int) -> tuple[list[float], list[float]]:
    bare: list[float] = []
    ours: list[float] = []
    folder.mkdir()
    connector = aiohttp.UnixConnector(engine.url.removeprefix("unix://"))
    async with (
        Docker(url="http://engine", connector=connector) as client,
        connector,
        a_docker_system(folder, engine, warm=warm) as (scheduler, running),
    ):
        for number in range(-2, count):
            by_hand = await _by_hand(client)
            attempt = await scheduler.send(contained("true"))
            sent = time.perf_counter()
            assert (await scheduler.finished(attempt)).status == "succeeded"
            in_penstock = time.perf_counter() - sent
            while not await _settled(client, running, warm):
                await asyncio.sleep(0.01)
            if number >= 0:
                bare.append(by_hand)
                ours.append(in_penstock)
    return bare, ours


async def _settled(client: Docker, running: Running, warm: int) -> bool:
    """What was used is gone, and what is kept ready waits."""
    executor = running.tools.executors.containers
    assert isinstance(executor, DockerExecutor)
    return len(await client.containers.list(all=True)) == executor.waiting == warm


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
