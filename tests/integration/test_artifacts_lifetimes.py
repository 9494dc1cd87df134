"""Whatever happens in whatever order, on real Postgres and a real folder: every artifact that lives and every input of an unfinished build reads back
whole, and once all is gone nothing is left."""

import asyncio
import math
import random
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import msgspec
import pytest
from msgspec.structs import replace

from libs.archives.pages import paged
from libs.archives.rules import ArchiveRefused, Limits
from libs.blobstore.objects import Folder
from libs.blobstore.store import BlobMissing, QuotaExceeded, StoreFull, StoreUnavailable, open_blob_store
from libs.eventlog.log import NO_STREAM, LogUnavailable
from libs.eventlog.postgres import PostgresLog, open_postgres_log
from libs.eventlog.projections import StoredProjection
from libs.runtime.commands import CommandLoop
from libs.runtime.decisions import Cause, Refused
from libs.runtime.ids import new_id
from libs.runtime.projector import Projector
from proto.api.artifacts import PendingUpload
from proto.catalogue import decode
from proto.events.artifact import ArtifactDeleted, ArtifactExpired, ArtifactSealed
from proto.events.base import ArtifactRef
from proto.events.build import BuildFinished
from proto.events.request import BuildRequested
from proto.plan import Plan
from services.artifacts.commands import ChangeLifetime, Command, DeleteArtifact, SealArtifact
from services.artifacts.decider import ArtifactDecider, State
from services.artifacts.janitor import Janitor
from services.artifacts.logs import Logs
from services.artifacts.projection import ARTIFACTS
from services.artifacts.queries import Queries
from services.artifacts.sessions import LAPSE, Session, Sessions
from services.artifacts.trees import NoSuchPath, Trees
from services.artifacts.uploads import Gone, TreeUnknown, Uploads, UploadUnknown
from tests.artifacts_fixture import blob_stream, distinct, manifest, tar, tree_digest
from tests.controls import eventually, files_in, write
from tests.postgres_fixture import Database

PLAN = msgspec.convert({"stages": [{"name": "s", "steps": [{"step": "run", "name": "t", "config": {"run": {"path": "true"}}}]}]}, Plan)
TEAMS = ("main", "other")
REFUSALS = (ArchiveRefused, Gone, Refused, TreeUnknown, UploadUnknown, NoSuchPath, BlobMissing)
"""What an operation may answer when others have been quicker."""
LIFETIME = 3600

Files = dict[str, bytes]


@asynccontextmanager
async def own_memory(size: int, before: int) -> AsyncIterator[memoryview]:
    yield paged(size, before)


class Clock:
    """Unix seconds, as the test has them."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


class Instance:
    """One instance of the service, without its edges."""

    def __init__(self, database: Database, store: Path, clock: Clock, name: str, skew: float = math.inf) -> None:
        self._database = database
        self._skew = skew
        self._url = store.as_uri()
        self._clock = clock
        self.name = name
        self._stack = AsyncExitStack()
        self._tasks: list[asyncio.Task[None]] = []
        self.busy: set[asyncio.Task[None]] = set()
        """What is done here now."""

    async def start(self) -> "Instance":
        enter, clock = self._stack.enter_async_context, self._clock
        self.log = await enter(open_postgres_log(self._database.url("artifacts")))
        pool = self.log.pool
        self.store = await enter(open_blob_store(self._url, pool, lambda: uuid4().hex[:12], instance=f"{self.name}-"))
        self.commands: CommandLoop[Command, State] = CommandLoop(self.log, ArtifactDecider(), new_id)
        self.projector = Projector(self.log, StoredProjection(pool, ARTIFACTS))
        queries = Queries(self.log, pool, self.projector)
        life = f"{self.name}-{uuid4().hex}-"
        sessions, self.trees = Sessions(pool), Trees(self.store)
        self.uploads = Uploads(self.store, sessions, self.trees, self.commands, queries, Limits(), lambda: life + uuid4().hex, clock)
        self.janitor = Janitor(
            self.log,
            pool,
            self.projector,
            self.store,
            sessions,
            self.uploads,
            self.trees,
            Logs(self.store),
            self.commands,
            clock,
            60,
            skew=self._skew,
        )
        await sessions.create()
        await sessions.succeed(f"{self.name}-", life)
        self._tasks = [asyncio.create_task(work) for work in (self.store.run(), self.commands.run(), self.projector.run())]
        await eventually(lambda: self.store.problem is None and self.projector.problem is None)
        return self

    async def stop(self) -> None:
        """All at once, whatever is under way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._stack.aclose()


class World:
    """Two instances and all that is done to them. Operations are chosen by the seed, and run several at a time."""

    def __init__(self, seed: int, database: Database, store: Path, outside: PostgresLog) -> None:
        self.random = random.Random(seed)
        self.clock = Clock()
        self.outside = outside
        self.instances: list[Instance] = []
        self._database = database
        self._store = store
        self.trees: dict[str, Files] = {}
        self.artifacts: dict[str, str] = {}
        self.pending: dict[str, tuple[str, Files]] = {}
        self.builds: dict[str, str] = {}
        self.done: dict[str, int] = {}
        self._ids = 0

    async def begin(self) -> None:
        self.instances = [await Instance(self._database, self._store, self.clock, name).start() for name in ("a", "b")]

    def any(self) -> Instance:
        return self.random.choice(self.instances)

    def files(self) -> Files:
        """Of few different contents, so that trees share some."""
        pick = self.random
        files = {f"{pick.choice('abc')}/{n}": b"%d" % pick.randrange(40) * pick.choice((1, 1, 3000)) for n in range(pick.randrange(1, 8))}
        self.trees[tree_digest(files)] = files
        return files

    def seal(self, build: str = "") -> SealArtifact:
        self._ids += 1
        return SealArtifact(artifact=str(UUID(int=self._ids)), kind="output" if build else "user", digest="", size=0, files=0, name="n", build=build)

    def lifetime(self) -> int:
        return self.random.choice((LIFETIME, LIFETIME, 5 * LIFETIME, 0))

    # --- operations --------------------------------------------------------------------------------------------------------------------

    async def tar(self, at: Instance) -> None:
        files, seal, team = self.files(), self.seal(), self.random.choice(TEAMS)
        await at.uploads.tar(team, seal, self.lifetime(), cause(team), pieces(tar(files), self.random), own_memory)
        self.artifacts[seal.artifact] = team

    async def manifest(self, at: Instance) -> None:
        team = self.random.choice(TEAMS)
        build = self.random.choice([build for build, of in self.builds.items() if of == team] or [""]) if self.random.random() < 0.3 else ""
        files, seal = self.files(), self.seal(build)
        self.pending[seal.artifact] = (team, files)
        result = await at.uploads.manifest(team, seal, self.lifetime(), cause(team), pieces(manifest(files), self.random))
        if not isinstance(result, PendingUpload):
            self.pending.pop(seal.artifact, None)
            self.artifacts[seal.artifact] = team

    async def blobs(self, at: Instance) -> None:
        """All of an upload's chunks, or some, or cut in the middle."""
        if not self.pending:
            return
        artifact = self.random.choice(list(self.pending))
        team, files = self.pending[artifact]
        chunks = self.random.sample(distinct(files), self.random.randint(1, len(distinct(files))))
        body = blob_stream(chunks)
        if self.random.random() < 0.1:
            body = body[: self.random.randrange(len(body))]
        try:
            result = await at.uploads.blobs(team, artifact, cause(team), pieces(body, self.random))
        except UploadUnknown:
            self.pending.pop(artifact, None)
            raise
        if not isinstance(result, PendingUpload):
            self.pending.pop(artifact, None)
            self.artifacts[artifact] = team

    async def known(self, at: Instance) -> None:
        if not self.trees:
            return
        team, seal = self.random.choice(TEAMS), self.seal()
        await at.uploads.known(team, seal, self.lifetime(), cause(team), self.random.choice(list(self.trees)))
        self.artifacts[seal.artifact] = team

    async def part(self, at: Instance) -> None:
        if not self.artifacts:
            return
        source, team = self.random.choice(list(self.artifacts.items()))
        sealed = (await at.log.read_streams([f"artifact-{source}"]))[f"artifact-{source}"]
        digest = msgspec.convert(decode(sealed[0].type, sealed[0].data), ArtifactSealed).digest
        folder, seal = self.random.choice("abc"), self.seal()
        inside = {path[2:]: contents for path, contents in self.trees[digest].items() if path.startswith(f"{folder}/")}
        self.trees[tree_digest(inside)] = inside
        await at.uploads.part(team, seal, self.lifetime(), cause(team), digest, folder.encode())
        self.artifacts[seal.artifact] = team

    async def request(self, at: Instance) -> None:
        """A build of up to three artifacts, gone or not."""
        team, build = self.random.choice(TEAMS), uuid4().hex
        mine = [artifact for artifact, of in self.artifacts.items() if of == team]
        inputs = {f"i{n}": ArtifactRef(id=each, digest="") for n, each in enumerate(self.random.sample(mine, min(len(mine), 3)))}
        event = BuildRequested(build=build, plan=PLAN, inputs=inputs)
        try:
            await self.outside.append([write(f"request-{build}", event, expected=NO_STREAM, team=team)])
        finally:
            self.builds[build] = team

    async def finish(self, at: Instance) -> None:
        if self.builds:
            build = self.random.choice(list(self.builds))
            team = self.builds[build]
            await self.outside.append([write(f"build-{build}", BuildFinished(status="succeeded"), expected=NO_STREAM, team=team)])
            self.builds.pop(build, None)

    async def change(self, at: Instance) -> None:
        if self.artifacts:
            artifact, team = self.random.choice(list(self.artifacts.items()))
            pinned, until = self.random.choice((None, True, False)), int(self.clock()) + self.lifetime()
            command = ChangeLifetime(artifact=artifact, pinned=pinned, expires_at=until, shorten=self.random.random() < 0.3)
            await at.commands.execute(command, cause(team))

    async def delete(self, at: Instance) -> None:
        if self.artifacts:
            artifact, team = self.random.choice(list(self.artifacts.items()))
            await at.commands.execute(DeleteArtifact(artifact=artifact), cause(team))

    async def tidy(self, at: Instance) -> None:
        await at.janitor.round()

    async def time(self, at: Instance) -> None:
        self.clock.now += self.random.choice((1, 61, LAPSE / 2, LAPSE + 1))

    async def rebuild(self, at: Instance) -> None:
        """The read models are made anew from the log's start."""
        await self.outside.pool.execute("DELETE FROM artifacts.checkpoint WHERE name = 'artifacts'")

    async def crash(self) -> None:
        """What is under way at one of the instances ends where it is, and another takes its place."""
        number = self.random.randrange(2)
        old = self.instances[number]
        self.instances[number] = await Instance(self._database, self._store, self.clock, old.name).start()
        for work in old.busy:
            work.cancel()
        await asyncio.gather(*old.busy, return_exceptions=True)
        await old.stop()

    async def step(self) -> None:
        """One operation, which may be cut off anywhere."""
        name = self.random.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        at = self.any()
        work = asyncio.create_task(getattr(self, name)(at))
        at.busy.add(work)
        work.add_done_callback(at.busy.discard)
        if self.random.random() < 0.08:
            await asyncio.sleep(self.random.random() * 0.02)
            work.cancel()
        try:
            await work
        except (*REFUSALS, LogUnavailable, StoreUnavailable, asyncio.CancelledError) as error:
            name += f": {type(error).__name__}"
        self.done[name] = self.done.get(name, 0) + 1

    # --- what must hold ----------------------------------------------------------------------------------------------------------------

    async def needed(self) -> dict[str, tuple[str, str]]:
        """By the log alone: what lives, and what unfinished builds may read: (what, team) → tree."""
        live: dict[str, tuple[str, str]] = {}
        uses: dict[str, dict[str, tuple[str, str]]] = {}
        over: set[str] = set()
        after = 0
        while page := await self.outside.read(after, 1000):
            for recorded in page:
                match decode(recorded.type, recorded.data):
                    case ArtifactSealed() as event:
                        live[event.artifact] = (recorded.team, event.digest)
                        if event.build and event.build not in over:
                            uses.setdefault(event.build, {})[event.artifact] = live[event.artifact]
                    case ArtifactExpired() | ArtifactDeleted() as event:
                        live.pop(event.artifact)
                    case BuildRequested() as event:
                        found = {ref.id: live[ref.id] for ref in event.inputs.values() if ref.id in live}
                        uses.setdefault(event.build, {}).update(found)
                    case BuildFinished():
                        over.add(recorded.stream.removeprefix("build-"))
                        uses.pop(recorded.stream.removeprefix("build-"), None)
            after = page[-1].position
        return {f"{use}/{artifact}": tree for use, used in (("", live), *uses.items()) for artifact, tree in used.items()}

    async def check(self) -> int:
        """Everything that is needed reads back; how much that is."""
        needed, at = await self.needed(), self.any()
        for team, digest in set(needed.values()):
            tree = await at.trees.open(team, digest)
            body = b"".join([piece async for piece in tree.drawn(tree.archive(b"", "tar"))])
            expected = self.trees[digest]
            assert await tree.select(lambda entries: {each.path.decode() for each in entries if each.kind == "file"}) == set(expected)
            assert all(contents in body for contents in expected.values()), digest
        return len(needed)


WEIGHTS = {
    "tar": 6,
    "manifest": 8,
    "blobs": 10,
    "known": 8,
    "part": 8,
    "request": 5,
    "finish": 4,
    "change": 6,
    "delete": 6,
    "tidy": 8,
    "time": 4,
    "rebuild": 0.3,
}


def cause(team: str) -> Cause:
    return Cause(team=team, correlation_id="c", causation_id="", actor="tester")


async def pieces(body: bytes, pick: random.Random) -> AsyncIterator[bytes]:
    """The body, cut somewhere, with a pause."""
    middle = pick.randrange(len(body)) if body else 0
    yield body[:middle]
    await asyncio.sleep(0)
    yield body[middle:]


@asynccontextmanager
async def world(seed: int, database: Database, store: Path) -> AsyncIterator[World]:
    async with open_postgres_log(database.url("postgres")) as outside:
        made = World(seed, database, store, outside)
        await made.begin()
        try:
            yield made
        finally:
            for instance in made.instances:
                await instance.stop()


@pytest.mark.parametrize("seed", range(4))
async def test_nothing_needed_is_ever_removed_and_nothing_else_is_left(seed: int, database: Database, tmp_path: Path) -> None:
    async with world(seed, database, tmp_path / "store") as made:
        checked = 0
        for _ in range(25):
            await asyncio.gather(*(several(made.step, 5) for _ in range(4)))
            if made.random.random() < 0.3:
                await asyncio.gather(made.crash(), several(made.step, 3), several(made.step, 3))
            checked += await made.check()
        assert checked > 100, made.done
        await end(made)
        assert files_in(tmp_path / "store") == {}
        for table in ("pack", "blob", "hold", "upload", "build_use", "artifact"):
            assert await made.outside.pool.fetchval(f"SELECT count(*) FROM artifacts.{table}") == 0, table


async def several(step: Callable[[], Awaitable[None]], times: int) -> None:
    for _ in range(times):
        await step()


async def end(made: World) -> None:
    """All builds finish, everything is deleted, all uploads lapse."""
    at = made.instances[0]
    while made.builds:
        await made.finish(at)
    made.clock.now += 2 * LAPSE
    await at.janitor.round()
    sealed: dict[str, str] = {}
    for recorded in await made.outside.read(0, 100_000, {"artifact"}):
        sealed[recorded.stream.removeprefix("artifact-")] = recorded.team
    for artifact, team in sealed.items():
        with suppress(Refused):
            await at.commands.execute(DeleteArtifact(artifact=artifact), cause(team))

    async def nothing_left() -> Any:
        await at.janitor.round()
        await at.store.collect(silent_for=0, late_by=0)
        return not await made.outside.pool.fetchval("SELECT count(*) FROM artifacts.pack")

    await eventually(nothing_left, timeout=20)
    await at.store.collect(silent_for=0, late_by=0)


@asynccontextmanager
async def instance(database: Database, store: Path) -> AsyncIterator[Instance]:
    running = await Instance(database, store, Clock(), "a").start()
    try:
        yield running
    finally:
        await running.stop()


async def whole(body: bytes) -> AsyncIterator[bytes]:
    yield body


class Stopped:
    """An instance at which nothing is sealed until it goes `on`."""

    def __init__(self, at: Instance, monkeypatch: pytest.MonkeyPatch) -> None:
        self.marked, self.on = asyncio.Event(), asyncio.Event()
        execute = at.commands.execute

        async def waiting(command: Command, why: Cause) -> Any:
            if isinstance(command, SealArtifact):
                self.marked.set()
                await self.on.wait()
            return await execute(command, why)

        monkeypatch.setattr(at.commands, "execute", waiting)


async def test_a_stream_that_finds_the_store_full_leaves_what_another_is_sealing(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"x": b"x" * 100_000}
    async with instance(database, tmp_path / "store") as at:
        seal, stream = SealArtifact(artifact=str(uuid4()), kind="user", digest="", size=0, files=0, name=""), blob_stream(distinct(files))
        assert isinstance(await at.uploads.manifest("main", seal, LIFETIME, cause("main"), whole(manifest(files))), PendingUpload)
        stopped, put, both, full = Stopped(at, monkeypatch), Folder.put, threading.Barrier(2), threading.Event()

        def second_fails(self: Folder, key: str, data: Sequence[bytes]) -> None:
            if both.wait(10):
                full.wait(10)
                raise StoreFull("no space left in the store")
            put(self, key, data)

        with monkeypatch.context() as patch:
            patch.setattr(Folder, "put", second_fails)
            streams = [asyncio.create_task(at.uploads.blobs("main", seal.artifact, cause("main"), whole(stream))) for _ in range(2)]
            await asyncio.wait_for(stopped.marked.wait(), 10)
            full.set()
            done, (sealing,) = await asyncio.wait(streams, return_when=asyncio.FIRST_COMPLETED)
        assert [type(stream.exception()) for stream in done] == [StoreFull]
        await tidied(at, stopped)
        sealed = await sealing
        assert not isinstance(sealed, PendingUpload)
        await reads_back(at, sealed.as_sealed.digest, files)


async def test_a_manifest_past_the_quota_leaves_what_another_is_sealing(database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one who opened the session looks for its chunks when another has joined, brought them and marked it."""
    files = {"x": b"x" * 100_000}
    async with instance(database, tmp_path / "store") as at:
        pool, stopped = at.log.pool, Stopped(at, monkeypatch)
        await pool.execute("INSERT INTO policy (team, input_seconds, output_seconds, quota_bytes) VALUES ('main', 60, 60, 50000)")
        seal, look = SealArtifact(artifact=str(uuid4()), kind="user", digest="", size=0, files=0, name=""), Uploads._look
        looked, on = asyncio.Event(), asyncio.Event()

        async def late(*arguments: Any) -> None:
            await look(*arguments)
            looked.set()
            await on.wait()

        with monkeypatch.context() as patch:
            patch.setattr(Uploads, "_look", late)
            first = asyncio.create_task(at.uploads.manifest("main", seal, LIFETIME, cause("main"), whole(manifest(files))))
            await asyncio.wait_for(looked.wait(), 10)
        await eventually(lambda: pool.fetchval("SELECT EXISTS (SELECT FROM hold)"))
        await pool.execute("UPDATE policy SET quota_bytes = 0")
        sealing = asyncio.create_task(at.uploads.blobs("main", seal.artifact, cause("main"), whole(blob_stream(distinct(files)))))
        await asyncio.wait_for(stopped.marked.wait(), 10)
        on.set()
        with pytest.raises(QuotaExceeded):
            await first
        await tidied(at, stopped)
        sealed = await sealing
        assert not isinstance(sealed, PendingUpload)
        await reads_back(at, sealed.as_sealed.digest, files)


async def reads_back(at: Instance, digest: str, files: Files) -> None:
    tree = await at.trees.open("main", digest)
    body = b"".join([piece async for piece in tree.drawn(tree.archive(b"", "tar"))])
    assert all(contents in body for contents in files.values())


async def tidied(at: Instance, stopped: Stopped) -> None:
    """The janitor seals what is marked; what it would do about the rest it does."""
    assert await at.log.pool.fetchval("SELECT count(*) FROM upload WHERE sealing") == 1
    await at.janitor._release()
    await at.store.collect(silent_for=0, late_by=0)
    stopped.on.set()


async def test_nothing_expires_or_lapses_while_the_clock_is_not_the_databases(database: Database, tmp_path: Path) -> None:
    clock, files = Clock(), {"x": b"x"}
    clock.now = time.time()
    at = await Instance(database, tmp_path / "store", clock, "a", skew=60).start()
    try:
        seal = SealArtifact(artifact=str(uuid4()), kind="user", digest="", size=0, files=0, name="")
        sealed = await at.uploads.tar("main", seal, LIFETIME, cause("main"), whole(tar(files)), own_memory)
        pending = replace(seal, artifact=str(uuid4()))
        assert isinstance(await at.uploads.manifest("main", pending, 0, cause("main"), whole(manifest({"y": b"y"}))), PendingUpload)
        clock.now += 10 * LIFETIME
        await at.projector.passed(await at.log.head(), 10)
        await at.janitor.round()
        await reads_back(at, sealed.as_sealed.digest, files)
        assert await at.log.pool.fetchval("SELECT count(*) FROM upload WHERE NOT sealing") == 1
        clock.now -= 10 * LIFETIME
        await at.uploads.tar("main", replace(seal, artifact=str(uuid4())), 20, cause("main"), whole(tar({"z": b"z"})), own_memory)
        clock.now += 40
        await at.projector.passed(await at.log.head(), 10)
        await at.janitor.round()
        await at.projector.passed(await at.log.head(), 10)
        assert await at.log.pool.fetchval("SELECT array_agg(id) FROM artifact") == [seal.artifact], "what is due when it is right"
    finally:
        await at.stop()


async def test_an_upload_that_comes_before_its_predecessors_are_dropped_goes_on(database: Database, tmp_path: Path) -> None:
    async with instance(database, tmp_path / "store") as at:
        sessions, seal = Sessions(at.log.pool), SealArtifact(artifact=str(uuid4()), kind="user", digest="", size=0, files=0, name="")
        for id in ("a-before-1", "a-now-1", "b-before-1"):
            await sessions.open(Session(id, "main", seal), 1.0)
        await sessions.succeed("a-", "a-now-")
        assert await at.log.pool.fetchval("SELECT array_agg(id ORDER BY id) FROM upload") == ["a-now-1", "b-before-1"]
