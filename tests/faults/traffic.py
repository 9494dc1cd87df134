"""Builds that keep coming while things break, and the proof that each ended once, as it should."""

import asyncio
import itertools
import secrets
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from types import TracebackType

from penstock.client import Artifact, Build, Client
from proto.envelope import Fact
from proto.events.build import BuildCreated, BuildFinished, StageFinished, StageQueued, StepFinished, StepStarted
from proto.events.lease import StageLeased
from proto.events.request import BuildRequested
from tests.controls import eventually
from tests.faults.system import System
from tests.faults.work import INPUT, MIX, Work, archive, files_of

PAUSE = 0.12
"""Seconds between two submissions."""
END_SECONDS = 60.0
"""After the last fault everything that was accepted has ended within this."""
LOG_SECONDS = 45.0
"""And is archived within this."""


class Traffic:
    """An async context manager. `accepted` is what the server said yes to."""

    def __init__(self, system: System, patience: float = 60.0) -> None:
        self._system = system
        self._client = system.client(patience)
        self._input: Artifact | None = None
        self.accepted: dict[str, Work] = {}
        self.unlogged: set[str] = set()
        """Builds of whose log the database has forgotten the archive, when the bus and the worker had let go of it: it may have gaps."""

    async def __aenter__(self) -> "Traffic":
        await self._client.__aenter__()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._client.__aexit__(kind, error, trace)

    @property
    def client(self) -> Client:
        return self._client

    async def submit(self, work: Work, src: Artifact | None = None) -> Build:
        """The client repeats it under one key while the server is away, so that it is accepted once or not at all. What makes outputs has an input:
        `src`, or the usual one."""
        if work.outputs and src is None and self._input is None:
            self._input = await self._client.upload(archive(INPUT), "src")
        src = src or self._input
        inputs = {"src": src} if work.outputs and src else {}
        build = await self._client.create_build(work.plan(self._system.mark), inputs, secrets.token_hex(16), name=work.name)
        self.accepted[build.id] = work
        return build

    @asynccontextmanager
    async def trickle(self, kinds: Sequence[Work] = MIX, at_least: int = 30) -> AsyncIterator[None]:
        """Builds keep coming within, `at_least` so many in all; the body begins when the first ones run."""
        enough = asyncio.Event()

        async def go_on() -> None:
            for number, work in enumerate(itertools.cycle(kinds)):
                if enough.is_set() and number >= at_least:
                    return
                await self.submit(work)
                if not enough.is_set():
                    await asyncio.sleep(PAUSE)

        submitting = asyncio.create_task(go_on())
        try:
            await self.under_way()
            yield
            enough.set()
            await submitting
        finally:
            submitting.cancel()
            await asyncio.wait([submitting])

    async def under_way(self) -> None:
        """Until steps run."""
        await eventually(self._system.steps, timeout=END_SECONDS)

    async def has_ended(self, build: str) -> bool:
        return (await self._client.build(build)).ended

    async def ended(self, within: float = END_SECONDS) -> dict[str, Build]:
        """Until every accepted build has, as the API tells it."""
        builds: dict[str, Build] = {}

        async def all_of_them() -> bool:
            for build in self.accepted.keys() - builds.keys():
                answer = await self._client.build(build)
                if answer.ended:
                    builds[build] = answer
            left = self.accepted.keys() - builds.keys()
            assert not left, f"{len(left)} of {len(self.accepted)} builds have not ended: {sorted(left)}"
            return True

        try:
            await eventually(all_of_them, timeout=within)
        except AssertionError as error:
            left = sorted(self.accepted.keys() - builds.keys())
            raise AssertionError(f"{error}\n{await self._history(*left[:3])}") from error
        return builds

    async def verify(self) -> None:
        """All has ended; the log, the API, the logs and the outputs say the same, and it is right; no step runs any more."""
        builds = await self.ended()
        await eventually(lambda: self._system.steps() == [])
        facts = await self._system.log()
        self._verify_requests(facts)
        async for wrong in self.wrong(builds, facts):
            raise AssertionError(wrong)
        listed = [build async for build in self._client.builds()]
        assert {build.id for build in listed} == self.accepted.keys()
        assert [build.number for build in listed] == list(range(len(listed), 0, -1))

    async def wrong(self, builds: Mapping[str, Build], facts: Sequence[Fact]) -> AsyncIterator[str]:
        """What is not right about a build that ended, one after the other, with its history."""
        for build in builds:
            try:
                self.verify_events(build, facts)
                self._verify_answer(builds[build], facts)
                await eventually(lambda build=build: self._verify_log(build), timeout=LOG_SECONDS)  # type: ignore[misc]
                await self._verify_outputs(builds[build])
            except AssertionError as error:
                yield f"build {build} ({self.accepted[build].name}): {error}\n{await self._history(build)}"

    def _verify_requests(self, facts: Sequence[Fact]) -> None:
        asked = [fact.event.build for fact in facts if isinstance(fact.event, BuildRequested)]
        created = [fact.subject_id for fact in facts if isinstance(fact.event, BuildCreated)]
        assert Counter(asked) == Counter(self.accepted.keys()), "accepted is what was recorded, once"
        assert Counter(created) == Counter(asked), "and each request made one build"

    def verify_events(self, build: str, facts: Sequence[Fact]) -> None:
        work = self.accepted[build]
        stream = [fact for fact in facts if fact.stream == f"build-{build}"]
        events = [fact.event for fact in stream]
        assert [fact.version for fact in stream] == list(range(1, len(stream) + 1))
        assert isinstance(events[0], BuildCreated)
        ends = [event for event in events if isinstance(event, BuildFinished)]
        assert len(ends) == 1 and events[-1] is ends[0], "one end, and it is the last event"
        assert ends[0].status == work.status, ends[0]
        attempt, finished = 0, False
        for event in events:
            if isinstance(event, StageQueued):
                assert event.attempt == attempt + 1 and not finished
                attempt = event.attempt
            elif isinstance(event, StepStarted | StepFinished | StageFinished):
                assert event.attempt == attempt and not finished, f"a late word of attempt {event.attempt}"
                finished = isinstance(event, StageFinished)
        leases = [fact.event.attempt for fact in facts if fact.stream == f"lease-{build}" and isinstance(fact.event, StageLeased)]
        assert leases == sorted(set(leases)), "an attempt is leased once"
        assert set(leases) == set(range(1, attempt + 1))

    def _verify_answer(self, build: Build, facts: Sequence[Fact]) -> None:
        work = self.accepted[build.id]
        end = next(fact for fact in facts if fact.stream == f"build-{build.id}" and isinstance(fact.event, BuildFinished))
        assert (build.status, build.exit_code) == (work.status, work.exit_code), build
        assert build.positions["status"] == end.position
        assert build.finished_at == end.recorded_at
        assert build.percent == 100 or work.status != "succeeded"
        last = max(fact.event.attempt for fact in facts if fact.stream == f"build-{build.id}" and isinstance(fact.event, StageQueued))
        assert [stage.attempt for stage in build.stages] == [last]

    async def _verify_log(self, build: str) -> bool:
        """Every line of the attempt that counts, once, in order, by dense numbers."""
        work = self.accepted[build]
        lines = []
        start: int | None = 0
        while start is not None:
            page = await self._client.log(build, start=start, limit=1000)
            lines += page.lines
            start = page.next
        assert page.complete or not work.lines, "the log is not archived yet"
        if build in self.unlogged:
            assert {line.text for line in lines if line.stream == "stdout"} <= set(work.lines)
            return True
        assert [line.line for line in lines] == list(range(len(lines))) or any("\n" not in line.text for line in lines)
        assert tuple(line.text for line in lines if line.stream == "stdout") == work.lines
        return True

    async def _verify_outputs(self, build: Build) -> None:
        work = self.accepted[build.id]
        assert build.outputs.keys() == work.outputs.keys()
        for name, files in work.outputs.items():
            pieces: list[bytes] = []

            async def keep(piece: bytes, into: list[bytes] = pieces) -> None:
                into.append(piece)

            await self._client.download(build.outputs[name], keep)
            assert files_of(b"".join(pieces)) == files

    async def _history(self, *builds: str) -> str:
        """What the log says of these builds, to find out from."""
        said = defaultdict(list)
        for fact in await self._system.log():
            for build in builds:
                if fact.stream.endswith(build) or getattr(fact.event, "build", "") == build:
                    said[build].append(
                        f"  {fact.recorded_at:%H:%M:%S.%f} {fact.position} {fact.stream[:20]}@{fact.version} {fact.actor}: {str(fact.event)[:300]}"
                    )
        return "\n".join(f"build {build}:\n" + "\n".join(lines) for build, lines in said.items())
