"""Workers under test that run containers, and steps for them."""

import contextlib
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec

from proto.messages import Attempt
from proto.plan import ContainerLimits, RunStep
from services.worker.executors.docker import DockerExecutor, containers_here
from services.worker.executors.hardened import Limits
from tests.engine_fixture import IMAGE, Dockerd
from tests.worker_controls import Running, Scheduler, a_system, step

LIMITS = Limits(memory=256 << 20, pids=64)


@contextlib.asynccontextmanager
async def containers_of(
    engine: Dockerd, owner: str, *, limits: Limits = LIMITS, privileged: bool = False, pull_seconds: float = 5.0, warm: int = 0
) -> AsyncIterator[DockerExecutor]:
    labels = {"penstock.worker": "w1"}
    Path(owner).mkdir(parents=True, exist_ok=True)
    kept = {"pull_seconds": pull_seconds, "warm": warm, "folder": Path(owner)}
    async with containers_here(engine.url, owner, labels, limits, privileged=privileged, **kept) as executor:
        yield executor


@contextlib.asynccontextmanager
async def a_docker_system(
    folder: Path, engine: Dockerd, *, limits: Limits = LIMITS, privileged: bool = False, pull_seconds: float = 5.0, warm: int = 0, **more: Any
) -> AsyncIterator[tuple[Scheduler, Running]]:
    """A worker that runs containers, and its scheduler. The folder is the owner's mark. Its processes are in a sandbox: without one it would take
    what else this process starts for its steps' orphans."""
    async with (
        containers_of(engine, str(folder), limits=limits, privileged=privileged, pull_seconds=pull_seconds, warm=warm) as containers,
        a_system(folder, containers=containers, sandbox="auto", **more) as (scheduler, running),
    ):
        yield scheduler, running


def contained(
    path: str,
    *args: str,
    image: str = IMAGE,
    user: str | None = None,
    network: bool = False,
    privileged: bool = False,
    memory: int | None = None,
    caches: list[Any] | None = None,
    **more: Any,
) -> RunStep:
    """A step in a container."""
    plain = step(path, *args, **more)
    config = msgspec.structs.replace(
        plain.config,
        run=msgspec.structs.replace(plain.config.run, user=user),
        image=image,
        network=network,
        caches=caches or [],
        container_limits=ContainerLimits(memory=memory) if memory else None,
    )
    return msgspec.structs.replace(plain, config=config, privileged=privileged)


def script(text: str, **more: Any) -> RunStep:
    """A shell script in a container."""
    return contained("sh", "-c", text, **more)


def docker(engine: Dockerd, *args: str, **more: Any) -> str:
    """What the engine's own client says."""
    done = subprocess.run(["docker", "--host", engine.url, *args], capture_output=True, text=True, check=True, **more)
    return done.stdout.strip()


def containers(engine: Dockerd, attempt: Attempt | None = None) -> list[str]:
    """Names of those that are there."""
    names = docker(engine, "ps", "--all", "--format", "{{.Names}}").split()
    return [name for name in names if attempt is None or f"-{attempt.build}-" in name]
