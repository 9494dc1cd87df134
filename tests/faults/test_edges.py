"""FAULTS 44: SIGKILL of each service at each of its edges. The points are not chosen by hand: a build is watched, and whatever a process crossed (see
`tests.faults.edges`) is where it is then killed, in a build of its own: the first time, and the last time."""

import asyncio
import secrets
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from penstock.client import Build, Client
from proto.envelope import Fact
from proto.events.build import BuildCreated, BuildFinished, StageFinished, StageQueued, StepFinished, StepStarted
from tests.controls import eventually
from tests.faults.conftest import Start
from tests.faults.edges.control import Control, Order
from tests.faults.storage import nothing_but_what_lives, nothing_of_attempts
from tests.faults.system import SERVICES, System
from tests.faults.work import INPUT, archive, files_of

LINES = ["one\n", "two\n", "three\n"]
SECONDS = 8.0
"""Within this a point is reached that some timer leads to."""
BUILD_SECONDS = 120.0
"""However often its service dies, a build ends within this."""
MORE = 3
"""Builds, at most, that are made beside the first so that a point is reached."""
AT_ONCE = 16
"""Builds that may still be ending while the next point is armed."""
OF_A_WORKER = 6
"""So many when it is the worker that dies: each time may cost each of them one of its ten attempts."""
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


class Point(NamedTuple):
    """`boot`: a service crosses it when it starts, and not in a build."""

    name: str
    nth: int
    boot: bool

    @property
    def edge(self) -> str:
        """Whoever crosses it."""
        return self.name.rpartition(": ")[0].partition(",")[0].partition(" in ")[0]


def points(boot: Counter[str], build: Counter[str], always: set[str]) -> list[Point]:
    """After the n-th crossing comes before the next one of another edge: one of them is enough. What not every build crosses is looked for when the
    service starts, if it is crossed there."""
    during = [
        Point(name, nth, False)
        for name, count in sorted(build.items())
        if name in always or name not in boot
        for nth in sorted({1} if name.endswith(": after") else {1, count})
    ]
    return during + [Point(name, 1, True) for name in sorted(boot.keys() - always)]


def plan(mark: str, attempts: int) -> dict[str, Any]:
    """Two stages, the second of which needs what the first made."""

    def stage(name: str, source: str, made: str, needs: list[str]) -> dict[str, Any]:
        run = {"path": "sh", "args": ["-c", f"cp -r {source}/. {made}; printf 'one\\ntwo\\n'; echo {name} > {made}/{name}; echo three"]}
        config = {"run": run, "params": {"MARK": mark}, "inputs": [{"name": source}], "outputs": [{"name": made}]}
        return {"name": name, "needs": needs, "steps": [{"step": "run", "name": "task", "config": config}], "max_attempts": attempts}

    # names with digits: the two make no two points
    return {"stages": [stage("s1", "src", "mid", []), stage("s2", "mid", "dist", ["s1"])]}


class Killing:
    """Builds go on, one for each point, and their service dies again and again."""

    def __init__(self, system: System, control: Control, client: Client, service: str) -> None:
        self._system = system
        self._control = control
        self._client = client
        self._service = service
        self.builds: dict[str, tuple[Build, dict[str, bytes], int, str]] = {}
        self._at_once = OF_A_WORKER if service == "worker" else AT_ONCE
        self._ending: list[asyncio.Task[None]] = []
        self.reached: list[Point] = []
        self.missed: list[Point] = []
        self.always: set[str] = set()

    async def build(self, attempts: int, why: str) -> None:
        """One from its upload, of what nobody has yet, to its end."""
        files = {**INPUT, "fresh": secrets.token_bytes(8)}
        src = await self._client.upload(archive(files), "src")
        build = await self._client.create_build(plan(self._system.mark, attempts), {"src": src}, secrets.token_hex(16))
        async with asyncio.timeout(BUILD_SECONDS):
            ended = await self._client.wait(build.id)
        self.builds[build.id] = ended, {**files, "s1": b"s1\n", "s2": b"s2\n"}, attempts, why

    async def record(self) -> list[Point]:
        await self.build(10, "first")
        self._control.record(True)
        died = self._system.kill(self._service)
        await self._system.back(self._service, died)
        boot = self._control.recorded(self._service)
        seen = []
        for _ in range(3):
            await self.build(10, "record")
            await asyncio.sleep(0.5)
            seen.append(self._control.recorded(self._service))
        self._control.record(False)
        build = Counter({name: min(count for each in seen if (count := each[name])) for name in seen[0] | seen[1] | seen[2]})
        self.always = set(seen[0]) & set(seen[1]) & set(seen[2])
        return points(boot, build, self.always)

    async def all_points(self, wanted: list[Point]) -> None:
        for number, point in enumerate(wanted):
            # a worker that died is the end of what must not run twice
            await self._submit(1 if number % 3 == 0 and self._service == "worker" else 10, str(point))
            (self.reached if await self._killed_at(number, point) else self.missed).append(point)
        await asyncio.gather(*self._ending)

    async def _submit(self, attempts: int, why: str) -> None:
        while len(self._ending) > self._at_once:
            await self._ending.pop(0)
        self._ending.append(asyncio.create_task(self.build(attempts, why)))

    async def _killed_at(self, number: int, point: Point) -> bool:
        """A build may end without having come there, for what the kill before did to it."""
        before = self._system.process(self._service)
        self._control.arm(self._service, Order(str(number), point.nth, point.name))
        if point.boot:
            # it may have died already: what a start crosses, a retry of something may cross too
            send(before, signal.SIGKILL)
        # How often an edge is crossed differs from build to build.
        until, more = time.monotonic() + SECONDS, 0
        while self._control.armed(self._service):
            if all(task.done() for task in self._ending):
                if more < MORE:
                    more += 1
                    await self._submit(10, str(point))
                elif time.monotonic() > until and self._control.disarm(self._service):
                    return False
            await asyncio.sleep(0.005)
        await self._system.back(self._service, before)
        return True

    async def verify(self) -> None:
        facts = await self._system.log()
        streams: dict[str, list[Fact]] = {}
        for fact in facts:
            streams.setdefault(fact.stream, []).append(fact)
        for id, (build, files, attempts, why) in self.builds.items():
            stream = streams[f"build-{id}"]
            try:
                ended_once(stream)
                if attempts > 1 or build.status != "errored":
                    assert build.status == "succeeded", build
                    await self._whole(build, files)
                else:
                    assert build.error, "what may not run twice says why it did not"
                for stage in ("s1", "s2"):
                    await eventually(lambda id=id, stage=stage, build=build: self._log_is_whole(id, stage, build.status), timeout=60)
            except AssertionError as error:
                told = "\n".join(f"  {fact.position} {fact.recorded_at:%H:%M:%S.%f} {str(fact.event)[:300]}" for fact in stream)
                raise AssertionError(f"{why}: build {id}: {error}\n{told}") from error

    async def _whole(self, build: Build, files: dict[str, bytes]) -> None:
        pieces: list[bytes] = []

        async def keep(piece: bytes) -> None:
            pieces.append(piece)

        await self._client.download(build.outputs["dist"], keep)
        assert files_of(b"".join(pieces)) == files

    async def _log_is_whole(self, build: str, stage: str, status: str) -> bool:
        page = await self._client.log(build, stage)
        if status == "succeeded":
            assert [line.text for line in page.lines if line.stream == "stdout"] == LINES, page.lines
        return page.complete or status != "succeeded"


def ended_once(stream: list[Fact]) -> None:
    events = [fact.event for fact in stream]
    assert [fact.version for fact in stream] == list(range(1, len(stream) + 1))
    assert isinstance(events[0], BuildCreated)
    assert [isinstance(event, BuildFinished) for event in events].index(True) == len(events) - 1, "one end, and it is the last event"
    attempts: Counter[str] = Counter()
    over: set[str] = set()
    recorded: Counter[tuple[str, int]] = Counter()
    for event in events:
        if isinstance(event, StageQueued):
            attempts[event.stage] += 1
            assert event.attempt == attempts[event.stage] and event.stage not in over
        elif isinstance(event, StepStarted | StepFinished | StageFinished):
            assert event.attempt == attempts[event.stage] and event.stage not in over, f"a late word of attempt {event.attempt}"
            reported = recorded[event.stage, event.attempt]
            assert event.report in (0, reported + 1), f"report {event.report} after report {reported}"
            recorded[event.stage, event.attempt] = event.report
            if isinstance(event, StageFinished):
                over.add(event.stage)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("service", sorted(SERVICES, reverse=True))
async def test_a_service_may_die_at_any_of_its_edges(start: Start, tmp_path: Path, service: str) -> None:
    control, began = Control(tmp_path), time.monotonic()
    system = start(edges=tmp_path)
    async with system.client(patience=120) as client:
        killing = Killing(system, control, client, service)
        wanted = await killing.record()
        blind = EXPECTED[service] - {point.edge for point in wanted}
        assert not blind, f"never crossed: {sorted(blind)}"
        await killing.all_points(wanted)
        said = f"{service}: killed at {len(killing.reached)} of {len(wanted)} points, {len(killing.builds)} builds, {time.monotonic() - began:.0f} s"
        print(said, "not reached again:", *killing.missed, sep="\n  ")
        await eventually(lambda: system.steps() == [], timeout=20)
        await killing.verify()
        lost = {point.edge for point in wanted if point.name in killing.always} - {point.edge for point in killing.reached}
        assert not lost, f"crossed when a build was watched, and not again: {sorted(lost)}"
        assert len(killing.missed) <= SELDOM * len(wanted), killing.missed
        await nothing_of_attempts(system)
        await nothing_but_what_lives(system, client)
