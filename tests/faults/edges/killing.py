"""A service that dies at each of the points that a watched build came to, one after the other, while builds go on; and what must be true of all of
them in the end."""

import asyncio
import secrets
import signal
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from penstock.client import Build, Client
from penstock.up.processes import send
from proto.envelope import Fact
from proto.events.build import BuildCreated, BuildFinished, StageFinished, StageQueued, StepFinished, StepStarted
from tests.controls import eventually
from tests.faults.edges.control import Control, Order
from tests.faults.system import System
from tests.faults.work import INPUT, archive, files_of

LINES = ["one\n", "two\n", "three\n"]
SECONDS = 8.0
"""Within this a point is reached that some timer leads to."""
BUILD_SECONDS = 120.0
"""However often its service dies, a build ends within this."""
MORE, AGAIN = 3, 2
"""Builds, at most, that are made beside the first so that a point is reached; before this one of them the service is started again."""
AT_ONCE = 16
"""Builds that may still be ending while the next point is armed."""
OF_A_WORKER = 6
"""So many when it is the worker that dies: each time may cost each of them one of its ten attempts."""


class Point(NamedTuple):
    """`boot`: a service crosses it when it starts, and not in a build."""

    name: str
    nth: int
    boot: bool

    @property
    def edge(self) -> str:
        """Whoever crosses it."""
        return self.name.rpartition(": ")[0].partition(",")[0].partition(" in ")[0]


class Submitted(NamedTuple):
    """A build that has ended, what its output must hold, and for the sake of which point it was made."""

    build: Build
    files: dict[str, bytes]
    attempts: int
    why: str


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


def plan(mark: str, attempts: int, image: str) -> dict[str, Any]:
    """Two stages, the second of which needs what the first made. With an image each runs in a container."""
    copy, contained = ("busybox cp", {"image": image}) if image else ("cp", {})

    def stage(name: str, source: str, made: str, needs: list[str]) -> dict[str, Any]:
        run = {"path": "sh", "args": ["-c", f"{copy} -r {source}/. {made}; printf 'one\\ntwo\\n'; echo {name} > {made}/{name}; echo three"]}
        config = {"run": run, "params": {"MARK": mark}, "inputs": [{"name": source}], "outputs": [{"name": made}], **contained}
        return {"name": name, "needs": needs, "steps": [{"step": "run", "name": "task", "config": config}], "max_attempts": attempts}

    # names with digits: the two make no two points
    return {"stages": [stage("s1", "src", "mid", []), stage("s2", "mid", "dist", ["s1"])]}


class Killing:
    """Builds go on, one for each point, and their service dies again and again. `image`: what the steps run in, if anything."""

    def __init__(self, system: System, control: Control, client: Client, service: str, image: str = "") -> None:
        self._system = system
        self._control = control
        self._client = client
        self._service = service
        self._image = image
        self._at_once = OF_A_WORKER if service == "worker" else AT_ONCE
        self._ending: list[asyncio.Task[None]] = []
        self._began = time.monotonic()
        self.ended: dict[str, Submitted] = {}
        self.wanted: list[Point] = []
        self.reached: list[Point] = []
        self.missed: list[Point] = []
        self._always: set[str] = set()

    async def record(self) -> None:
        """See what the service crosses when it starts, and in three builds."""
        await self._build(10, "first")
        self._control.record(True)
        died = self._system.kill(self._service)
        await self._system.back(self._service, died)
        boot = self._control.recorded(self._service)
        seen = []
        for _ in range(3):
            await self._build(10, "record")
            await asyncio.sleep(0.5)
            seen.append(self._control.recorded(self._service))
        self._control.record(False)
        build = Counter({name: min(count for each in seen if (count := each[name])) for name in seen[0] | seen[1] | seen[2]})
        self._always = set(seen[0]) & set(seen[1]) & set(seen[2])
        self.wanted = points(boot, build, self._always)

    async def kill_at_all(self, wanted: Callable[[Point], bool] = lambda _: True) -> None:
        """At each of the points that were recorded and are `wanted`, until all builds have ended."""
        self.wanted = [point for point in self.wanted if wanted(point)]
        for number, point in enumerate(self.wanted):
            # a worker that died is the end of what must not run twice
            await self._submit(1 if number % 3 == 0 and self._service == "worker" else 10, str(point))
            (self.reached if await self._killed_at(number, point) else self.missed).append(point)
        await asyncio.gather(*self._ending)

    def lost(self) -> set[str]:
        """Edges that every build crossed which was watched, and no other."""
        return {point.edge for point in self.wanted if point.name in self._always} - {point.edge for point in self.reached}

    def __str__(self) -> str:
        of = f"{self._service}: killed at {len(self.reached)} of {len(self.wanted)} points, {len(self.ended)} builds"
        return "\n  ".join([f"{of}, {time.monotonic() - self._began:.0f} s; not reached again:", *map(str, self.missed)])

    async def _build(self, attempts: int, why: str) -> None:
        """One from its upload, of what nobody has yet, to its end."""
        files = {**INPUT, "fresh": secrets.token_bytes(8)}
        src = await self._client.upload(archive(files), "src")
        build = await self._client.create_build(plan(self._system.mark, attempts, self._image), {"src": src}, secrets.token_hex(16))
        async with asyncio.timeout(BUILD_SECONDS):
            ended = await self._client.wait(build.id)
        self.ended[build.id] = Submitted(ended, {**files, "s1": b"s1\n", "s2": b"s2\n"}, attempts, why)

    async def _submit(self, attempts: int, why: str) -> None:
        while len(self._ending) > self._at_once:
            await self._ending.pop(0)
        self._ending.append(asyncio.create_task(self._build(attempts, why)))

    async def _killed_at(self, number: int, point: Point) -> bool:
        """A build may end without having come there, for what the kill before did to it."""
        self._control.arm(self._service, Order(str(number), point.nth, point.name))
        if point.boot:
            await self._start_again()
        # How often an edge is crossed differs from build to build, and what a service does once in its life it may have done.
        until, more = time.monotonic() + SECONDS, 0
        while (died := self._control.died(self._service)) is None:
            if all(task.done() for task in self._ending):
                if more < MORE:
                    more += 1
                    if point.boot or more == AGAIN:
                        await self._start_again()
                    await self._submit(10, str(point))
                elif time.monotonic() > until and self._control.disarm(self._service):
                    return False
            await asyncio.sleep(0.005)
        await self._system.back(self._service, died)
        return True

    async def _start_again(self) -> None:
        """It may be dying by its order: what a start crosses, a retry of something may cross too."""
        running = self._system.run().children.get(self._service)
        if running is not None and send(running, signal.SIGKILL):
            await self._system.back(self._service, running)

    async def verify(self) -> None:
        """Each build ended once, as it should, with all of its output and its log."""
        facts = await self._system.log()
        streams: dict[str, list[Fact]] = {}
        for fact in facts:
            streams.setdefault(fact.stream, []).append(fact)
        for id, (build, files, attempts, why) in self.ended.items():
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
    """One end, after which nothing comes; attempts in order, and of each the reports, each once."""
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
