"""FAULTS 44: SIGKILL of each service at each of its edges. The points are not chosen by hand: a build is watched, and whatever a process crossed (see
`tests.faults.edges`) is where it is then killed, in a build of its own: the first time, and the last time."""

from pathlib import Path

import pytest

from tests.controls import eventually
from tests.engine_controls import docker
from tests.engine_fixture import IMAGE, Dockerd
from tests.faults.conftest import Start
from tests.faults.edges.control import Control
from tests.faults.edges.killing import Killing, Point
from tests.faults.storage import nothing_but_what_lives, nothing_of_attempts
from tests.faults.system import SERVICES, System

SELDOM = 0.1
"""The part of the points that chance may keep from being reached again, as long as their edges are."""

EXPECTED: dict[str, set[str]] = {
    "gateway": {
        "append build.requested",
        "sql",
        "http handles POST /api/v1/teams/main/builds",
        "http asks POST",
        "bus says $JS.API.STREAM.INFO.LOGS",
    },
    "builds": {
        *(f"append {kind}" for kind in ("build.created", "stage.queued", "step.started", "step.finished", "stage.finished", "build.finished")),
        *("bus says ack builds-reactions", "bus says ack builds-reports", "bus says events.build.main.*.BuildFinished"),
        *("bus tells events.request.main.*.BuildRequested", "bus tells reports.local.*", "sql", "sql connects"),
    },
    "scheduler": {"append stage.leased", "bus says control.local", "bus tells presence.local", "sql"},
    "artifacts": {
        *("append artifact.sealed", "append log.archived", "bus says ack artifacts-archive", "bus says $JS.API.STREAM.PURGE.LOGS", "sql"),
        *("disk fsync", "disk rename", "disk writev", "http handles POST /outputs/task/dist", "http answers GET /inputs/src"),
    },
    "worker": {
        *("bus says reports.local.*", "bus says logs.local.*.*.*", "bus says presence.local", "bus tells control.local"),
        *("disk pwrite", "disk fdatasync", "disk rename", "disk link", "disk mkdir", "process spawn", "process waitpid", "http asks POST"),
    },
}
"""Edges that a build cannot do without: when one is not found, the harness has gone blind."""
OF_A_CONTAINER = {
    *("engine POST /containers/create", "engine POST /containers/*/attach", "engine POST /containers/*/start", "engine POST /containers/*/wait"),
    *("engine GET /containers/*/json", "engine GET /containers/json", "engine DELETE /containers/*", "engine tells output"),
}
"""The same of a build in containers."""


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("service", sorted(SERVICES, reverse=True))
async def test_a_service_may_die_at_any_of_its_edges(start: Start, tmp_path: Path, service: str) -> None:
    system = start(edges=tmp_path)
    async with system.client(patience=120) as client:
        killing = Killing(system, Control(tmp_path), client, service)
        await killing.record()
        blind = EXPECTED[service] - {point.edge for point in killing.wanted}
        assert not blind, f"never crossed: {sorted(blind)}"
        await killing.kill_at_all()
        await nothing_is_lost(killing, system)
        await nothing_of_attempts(system)
        await nothing_but_what_lives(system, client)


@pytest.mark.timeout(600)
async def test_a_worker_may_die_at_any_edge_of_a_containers_life(start: Start, tmp_path: Path, dockerd: Dockerd) -> None:
    """Only the points that a build without containers does not have. No container is left, not even of those whose making it died in."""
    system = start(edges=tmp_path, engine=dockerd.url)
    async with system.client(patience=120) as client:
        killing = Killing(system, Control(tmp_path), client, "worker", IMAGE)
        await killing.record()
        blind = OF_A_CONTAINER - {point.edge for point in killing.wanted}
        assert not blind, f"never crossed: {sorted(blind)}"
        await killing.kill_at_all(of_a_container)
        await nothing_is_lost(killing, system)
        await system.back("worker", system.kill("worker"))  # what waits for a next step goes with who keeps it
        assert docker(dockerd, "ps", "--all", "--quiet") == ""
        await nothing_of_attempts(system)
        await nothing_but_what_lives(system, client)


def of_a_container(point: Point) -> bool:
    return point.name.startswith("engine ") or "services.worker.copying" in point.name


async def nothing_is_lost(killing: Killing, system: System) -> None:
    """All builds ended well, and their service died wherever it can."""
    print(killing)
    await eventually(lambda: system.steps() == [], timeout=20)
    await killing.verify()
    assert not killing.lost(), f"crossed when a build was watched, and not again: {sorted(killing.lost())}"
    assert len(killing.missed) <= SELDOM * len(killing.wanted), killing.missed
