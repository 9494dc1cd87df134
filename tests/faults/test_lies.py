"""A registered worker that lies (FAULTS 47–49, 67): whatever it says, every build ends once with the truth, and everybody else's goes on."""

import asyncio
import os
import re
import secrets
import urllib.request
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import msgspec
import pytest

from penstock.client import Build
from proto.events.base import ArtifactRef
from proto.events.build import BuildFinished
from proto.messages import (
    Attempt,
    LogChunk,
    Package,
    ReportStageFinished,
    ReportStepFinished,
    ReportStepProgressed,
    ReportStepStarted,
    Running,
    Segment,
)
from tests.controls import eventually
from tests.faults.liar import Liar, honest, liar
from tests.faults.system import System
from tests.faults.traffic import Traffic
from tests.faults.work import Work, talking
from tests.faults.workers import registered

_pack = msgspec.msgpack.Encoder().encode
HUGE = 2**64 - 1
"""The largest number that msgpack has, and no column of a database."""
SOON = 20.0
"""Within so many seconds an honest build ends while somebody lies."""


class ForTheLiar(Work):
    """Only the liar may run it."""

    def plan(self, mark: str) -> dict[str, Any]:
        plan = super().plan(mark)
        plan["stages"][0]["tags"] = ["liar"]
        return plan


LIED = ForTheLiar("lied about", "true", lines=("honest\n",))


class Scene(NamedTuple):
    """`package` is the liar's, running; `victim` the first attempt of a build that runs at an honest worker."""

    traffic: Traffic
    liar: Liar
    package: Package
    victim: Attempt

    @property
    def own(self) -> Attempt:
        return self.package.attempt

    async def report_raw(self, *bodies: object, first: object = 1, attempt: object = None) -> None:
        attempt = attempt or [self.own.build, self.own.stage, self.own.number]
        await self.liar.say(f"reports.{self.liar.name}.{self.own.build}", _pack({"attempt": attempt, "first": first, "bodies": list(bodies)}))

    async def chunk_raw(self, number: object, *segments: object, first_line: object = 0) -> None:
        body = {"attempt": self.own, "number": number, "first_line": first_line, "segments": list(segments)}
        await self.liar.say(f"logs.{self.liar.name}.{self.own.build}.main.1", _pack(body))


async def about_anothers_build(scene: Scene) -> None:
    """48: as a report, as an end, as a log; about the attempt that runs and the next one."""
    for number in (1, 2):
        attempt = Attempt(scene.victim.build, "main", number)
        await scene.liar.report(attempt, 1, ReportStageFinished(status="failed", error="a lie"))
        await scene.liar.report(attempt, 2, ReportStageFinished(status="failed", error="a lie"), build=scene.own.build)
        chunk = LogChunk(attempt=attempt, number=1, first_line=0, segments=[Segment("task", "stdout", 0, b"forged\n")])
        await scene.liar.say(f"logs.{scene.liar.name}.{attempt.build}.main.{number}", _pack(chunk))
    await scene.liar.beat(running=[Running(scene.victim, 0), Running(scene.own, 0)], logs=[scene.victim])


async def about_what_does_not_exist(scene: Scene) -> None:
    """47: before there is a lease, or without a build."""
    for attempt in (
        Attempt(scene.own.build, "main", 2),
        Attempt(scene.own.build, "other", 1),
        Attempt("nobodys", "main", 1),
        Attempt(scene.own.build, "main", 0),
    ):
        await scene.liar.report(attempt, 1, *honest())
    await scene.report_raw({"type": "step.started", "step": "other"})
    await scene.report_raw({"type": "step.started", "step": "task"}, attempt=["../x", "a.b", -1])


async def numbers_that_are_none(scene: Scene) -> None:
    for percent in (1e308, float("nan"), float("-inf"), -1e308, "50", None, []):
        await scene.report_raw({"type": "step.progressed", "step": "task", "percent": percent})
    for first in (0, -1, HUGE, 1.5):
        await scene.report_raw({"type": "step.progressed", "step": "task", "percent": 1}, first=first)
    for number in (0, -1, HUGE, 2.5):
        await scene.chunk_raw(number, ["task", "stdout", 0, b"x\n"])
    await scene.chunk_raw(5, ["task", "stdout", -HUGE // 2, b"x\n"], first_line=-(2**62))


async def percents_beyond_all(scene: Scene) -> None:
    """These are numbers; what they say is bounded."""
    await scene.liar.report(
        scene.own, 1, ReportStepStarted(step="task"), *(ReportStepProgressed(step="task", percent=each) for each in (-(2**62), HUGE, 0))
    )
    await scene.liar.report(scene.own, 5, *honest()[1:])


async def words_that_are_none(scene: Scene) -> None:
    """Invalid UTF-8, where text is meant, and what is no message at all."""
    bad = _pack({"type": "step.started", "step": "t??k"}).replace(b"??", b"\xff\xfe")
    head = _pack({"attempt": scene.own, "first": 1, "bodies": [0]})[:-1]
    said = [b"", b"\xc1", os.urandom(1000), b"\x91" * 100_000 + b"\xc0", b"{}", _pack([[[]]]), head + bad, head]
    for data in said:
        for subject in (
            f"reports.{scene.liar.name}.{scene.own.build}",
            f"logs.{scene.liar.name}.{scene.own.build}.main.1",
            f"presence.{scene.liar.name}",
        ):
            await scene.liar.say(subject, data)
    await scene.liar.say(f"reports.{scene.liar.name}.a.b.c", head)
    await scene.liar.say(f"logs.{scene.liar.name}.x", head)


async def text_that_hurts(scene: Scene) -> None:
    """NUL, control characters and a megabyte, in a step's end; it is recorded or refused, and stops nobody."""
    for error in ("a\0b\x1b[2J\u2028\ud7ff", "\\u0000\\", "x" * 1_040_000):
        await scene.liar.report(
            scene.own, 1, ReportStepStarted(step="task", sandbox="\0"), ReportStepFinished(step="task", status="succeeded", error=error)
        )


async def numbers_that_no_column_holds(scene: Scene) -> None:
    """The end of an honest attempt, but for its numbers."""
    outputs = {"o\0": ArtifactRef(id="../../x", digest="sha256:\0", size=HUGE, files=HUGE)}
    finished = ReportStepFinished(step="task", status="succeeded", exit_code=HUGE, outputs=outputs)
    end = ReportStageFinished(status="succeeded", chunks=HUGE, lines=HUGE, bytes=HUGE, dropped=HUGE)
    await scene.liar.report(scene.own, 1, ReportStepStarted(step="task"), finished, end)


async def again_and_in_any_order(scene: Scene) -> None:
    """49: each report by itself, the last first, three times over."""
    said = list(enumerate(honest(), 1))
    for number, body in [*reversed(said), *said, *reversed(said)]:
        await scene.liar.report(scene.own, number, body)


async def thousands_too_early(scene: Scene) -> None:
    """67: reports that wait for one which never comes, more of them than may wait."""
    for number in range(6000):
        data = _pack({"attempt": scene.own, "first": 1000 + number, "bodies": [{"type": "step.progressed", "step": "task", "percent": 1}]})
        await scene.liar.bus.publish(f"reports.{scene.liar.name}.{scene.own.build}", data)
    await scene.liar.bus.flush()


async def thousands_at_once(scene: Scene) -> None:
    """One message, as large as they may be, of the smallest reports."""
    bodies = [{"type": "step.progressed", "step": "task", "percent": 1}] * 20_000
    await scene.report_raw({"type": "step.started", "step": "task"}, *bodies)


async def thousands_that_are_poison(scene: Scene) -> None:
    """67: each is tried five times before it is parked."""
    for _ in range(6000):
        await scene.liar.bus.publish(f"reports.{scene.liar.name}.{scene.own.build}", b"\xc1")
    await scene.liar.bus.flush()


async def a_log_that_is_not_there(scene: Scene) -> None:
    """Its end counts chunks that never come, of more bytes than there is memory."""
    end = ReportStageFinished(status="succeeded", chunks=1000, lines=10**6, bytes=1 << 40)
    await scene.liar.report(scene.own, 1, *honest()[:2], end)


async def heartbeats_of_others(scene: Scene) -> None:
    """Signed by nobody's key, said again, and with credits that another must open."""
    await scene.liar.beat(credits=1, seed=secrets.token_urlsafe(32))
    for beat in [*scene.liar.beats, *reversed(scene.liar.beats)]:
        await scene.liar.say(f"presence.{scene.liar.name}", beat)
    await scene.liar.beat(running=[Running(scene.own, HUGE // 2)], boot="../../x")
    await scene.liar.beat(running=[Running(scene.own, 0)], trouble="\0" * 256, cache_used=2**61)


Lie = Callable[[Scene], Awaitable[None]]
HARMLESS: list[Lie] = [
    about_anothers_build,
    about_what_does_not_exist,
    numbers_that_are_none,
    words_that_are_none,
    again_and_in_any_order,
    heartbeats_of_others,
    thousands_too_early,
    thousands_that_are_poison,
]
"""Afterwards the attempt goes on, and its liar may yet say the truth about it."""
ENDS: list[Lie] = [percents_beyond_all, text_that_hurts, numbers_that_no_column_holds, a_log_that_is_not_there, thousands_at_once]
"""What a worker says of its own attempt is what becomes of it."""


async def runs(traffic: Traffic, build: Build) -> bool:
    return (await traffic.client.build(build.id)).status == "started"


async def others_go_on(traffic: Traffic) -> None:
    """An honest build runs to its end, its log is archived, all in good time."""
    build = await traffic.submit(talking(3, 0.01))
    await eventually(lambda: whole(traffic, build), timeout=SOON)


async def whole(traffic: Traffic, build: Build) -> bool:
    return (await traffic.client.build(build.id)).status == "succeeded" and (await traffic.client.log(build.id)).complete


@pytest.mark.timeout(400)
@pytest.mark.parametrize("lies", [HARMLESS, ENDS], ids=["harmless", "ends"])
async def test_nobody_is_hurt_by_what_a_worker_says(system: System, lies: list[Lie]) -> None:
    """Each lie is told while the liar holds an attempt of its own and an honest worker another's."""
    async with Traffic(system) as traffic, liar(system, await registered(system, "liar", ["liar"])) as one:
        victim = await traffic.submit(Work("endless", "echo begin; sleep 600", "aborted", None, ("begin\n",)))
        await eventually(lambda: runs(traffic, victim), timeout=SOON)
        for lie in lies:
            await traffic.submit(LIED)
            scene = Scene(traffic, one, await one.leased(), Attempt(victim.id, "main", 1))
            holding = asyncio.create_task(keep_holding(one, scene.package))
            try:
                await lie(scene)
                await others_go_on(traffic)
                assert await runs(traffic, victim), "the build that was lied about"
                if lies is HARMLESS:
                    await one.end(scene.own)
                    await eventually(lambda scene=scene: succeeded(traffic, scene), timeout=SOON)
                else:
                    del traffic.accepted[scene.own.build]
                    await eventually(lambda scene=scene: ended_in_any_way(scene), timeout=SOON)
            except AssertionError as error:
                raise AssertionError(f"{lie.__name__}: {error}") from error
            finally:
                holding.cancel()
        await traffic.client.abort(victim.id)
        await traffic.ended()
        if lies is HARMLESS:
            assert [outcome for outcome in ("refused", "parked", "given up", "foreign") if not await counted(system, outcome)] == []
            warned = [line for line in system.data.log("builds").read_text().splitlines() if '"level": "warning"' in line and '"foreign"' in line]
            assert any("a report by liar on an attempt that is not its own" in line for line in warned), "the alarm names who lied (48)"
        facts = await system.log()
        for build in traffic.accepted:
            traffic.verify_events(build, facts)
            await eventually(lambda build=build: traffic._verify_log(build), timeout=45)
        for end in [fact for fact in facts if isinstance(fact.event, BuildFinished)]:
            assert [fact.position for fact in facts if fact.stream == end.stream][-1] == end.position


async def counted(system: System, outcome: str) -> float:
    """How many of the workers' messages came to this."""
    text = (await asyncio.to_thread(urllib.request.urlopen, f"http://{system.run().status['builds']}/metrics")).read().decode()
    found = re.search(rf'^penstock_builds_reports_messages_total{{outcome="{outcome}"}} (\S+)$', text, re.MULTILINE)
    return float(found[1]) if found else 0.0


async def test_a_message_of_two_gigabytes_ends_its_senders_connection_and_nothing_else(system: System) -> None:
    """The server hangs up at the announcement; the worker that comes back is welcome."""
    member = await registered(system, "liar", ["liar"])
    async with Traffic(system) as traffic:
        await traffic.submit(LIED)
        async with liar(system, member) as one:
            package = await one.leased()
            assert one.bus._transport is not None
            one.bus._transport.write(f"PUB reports.liar.{package.attempt.build} {2**31 - 1}\r\n".encode() + b"x" * 2_000_000)
            await eventually(lambda: not one.bus.is_connected)
            async with liar(system, member, one) as again:
                await again.hold(package)
                await again.end(package.attempt)
                await others_go_on(traffic)
                await traffic.verify()


async def keep_holding(one: Liar, package: Package) -> None:
    while True:
        await one.hold(package)
        await asyncio.sleep(0.4)


async def succeeded(traffic: Traffic, scene: Scene) -> bool:
    return (await traffic.client.build(scene.own.build)).status == "succeeded"


async def ended_in_any_way(scene: Scene) -> bool:
    for last in (1, 3, 20_002):  # whichever the number of the next report is
        await scene.liar.report(scene.own, last, ReportStageFinished(status="succeeded"))
    return (await scene.traffic.client.build(scene.own.build)).ended
