"""The scheduler's loop over log and bus in memory, with a clock of its own: leases, answers, evidence, takeover."""

import asyncio
from contextlib import asynccontextmanager, suppress

import msgspec
import pytest
from nacl.public import PrivateKey, SealedBox

from libs.bus.bus import BusUnavailable
from libs.bus.memory import MemoryBus
from libs.eventlog.log import LogUnavailable, NewEvent
from libs.eventlog.memory import MemoryLog
from libs.runtime.commands import CommandLoop
from libs.tokens import BuildToken, new_seed, public_key, read_token, sign, verify
from proto.catalogue import decode
from proto.events.artifact import LogArchived, LogGap
from proto.events.build import BuildCreated, LogExtent, StageFinished, StageInterrupted, StageQueued, StepStarted
from proto.events.fleet import WorkerDeleted, WorkerDrained, WorkerRegistered, WorkerResumed, WorkerRevoked
from proto.events.lease import LeaseExpired, StageDeferred, StageLeased
from proto.events.worker import WorkerBooted, WorkerLost
from proto.messages import ArchivedLog, Attempt, Availability, Control, Credit, Heartbeat, Held, Offers, Package, Running, Signed
from proto.plan import Plan, Requirements, Run, RunStep, Stage, TaskConfig
from proto.topology import MAX_PAYLOAD
from services.scheduler.board import Board
from services.scheduler.decider import SchedulerDecider
from services.scheduler.expelled import KNOWS_SECONDS
from services.scheduler.master_keys import Keyring
from services.scheduler.packages import Packer
from services.scheduler.scheduler import Scheduler
from services.scheduler.vault import Vault
from tests.controls import counter, eventually, write

SERVER = new_seed()
IDENTITY = new_seed()
PLAN = Plan(stages=[Stage(name="main", steps=[RunStep(name="run", config=TaskConfig(run=Run(path="true")))])])
LEASE = 15.0
NOW = 1_800_000_000.0


class Office:
    term: int | None = 1


class NoSnapshots:
    async def save(self, *_):
        raise AssertionError("too early for a snapshot")

    async def load(self, *_):
        return None


class World:
    """A scheduler, a log, and what it has said to worker w1."""

    def __init__(self, log, bus, commands):
        self.log, self.bus, self.commands = log, bus, commands
        self.now = 1000.0
        self.office = Office()
        self.box = PrivateKey.generate()
        self.packer = Packer(SERVER, "http://artifacts", LEASE, lambda: NOW)
        self.number = 0
        self.since: dict[str, int] = {}
        """Boots in the order in which they were begun: that in which they are first heard, unless it is said before."""
        self.challenge = b""
        self.packages: list[Package] = []
        self.controls: list[Control] = []
        self.cuts: list[tuple[str, str]] = []
        self.sweeps = self.looks = 0
        self.snapshots = NoSnapshots()
        self.scheduler = self.another()

    def another(self):
        return Scheduler(
            log=self.log,
            bus=self.bus,
            commands=self.commands,
            leadership=self.office,
            snapshots=self.snapshots,
            vault=Vault(None, lambda: Keyring(f"k1:{new_seed()}")),
            packer=self.packer,
            door=self,
            lease_seconds=LEASE,
            clock=lambda: self.now,
            now=lambda: NOW + self.now,
        )

    def cut(self, worker, key):
        self.cuts.append((worker, key))

    def sweep(self):
        self.sweeps += 1

    def look(self):
        self.looks += 1

    def beat(self, *, free=1, running=(), boot="b1", goodbye=False, seed=IDENTITY, challenge=None, logs=()):
        self.number += 1
        heartbeat = Heartbeat(
            boot=boot,
            since=self.since.setdefault(boot, len(self.since) + 1),
            number=self.number,
            slots=2,
            availability=Availability(
                challenge=self.challenge if challenge is None else challenge,
                offers=Offers(),
                credits=[Credit(f"{boot}-{self.number}-{i}", bytes(self.box.public_key)) for i in range(free)],
            ),
            running=[Running(attempt, 0) for attempt in running],
            logs=list(logs),
            goodbye=goodbye,
        )
        signed = sign(seed, "presence", msgspec.msgpack.encode(heartbeat))
        self.scheduler.hear("presence.w1", msgspec.msgpack.encode(signed))

    async def turn(self, seconds=0.0):
        """Let time pass as a live process sees it, then settle."""
        while seconds > 0:
            self.now += min(1.0, seconds)
            seconds -= 1.0
            await self.scheduler.turn()
        for _ in range(3):
            await self.scheduler.turn()
            await asyncio.sleep(0)
        if self.controls and self.controls[-1].challenge:
            self.challenge = self.controls[-1].challenge

    async def queue(self, build="x1", stage_attempt=1):
        created = [BuildCreated(plan=PLAN)] if stage_attempt == 1 else []
        await self.log.append([write(f"build-{build}", *created, StageQueued(stage="main", attempt=stage_attempt, requirements=Requirements()))])
        self.scheduler.log_grew()

    async def happened(self, stream, *events):
        await self.log.append([write(stream, *events)])
        self.scheduler.log_grew()

    async def events(self, *kinds):
        found = [decode(r.type, r.data) for r in await self.log.read(0, 1000)]
        return [event for event in found if isinstance(event, kinds)]

    async def events_of(self, stream, *kinds):
        found = [decode(r.type, r.data) for r in (await self.log.read_streams([stream]))[stream]]
        return [event for event in found if isinstance(event, kinds)]

    async def introduced(self):
        self.beat()
        await self.turn()
        self.beat()
        await self.turn()


@pytest.fixture
async def world():
    log, bus = MemoryLog(), MemoryBus()
    commands = CommandLoop(log, SchedulerDecider(), counter())
    async with running(commands.run()), listening(bus) as (packages, controls):
        one = World(log, bus, commands)
        one.packages, one.controls = packages, controls
        packages.box = one.box
        await one.happened("fleet-worker-w1", WorkerRegistered(worker="w1", key=public_key(IDENTITY)))
        await one.scheduler.turn()
        yield one


@asynccontextmanager
async def running(work):
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


class Sealed(list):
    box = None


@asynccontextmanager
async def listening(bus):
    packages, controls = Sealed(), []

    async def hear(subject, take):
        async with bus.listen(subject) as messages:
            async for message in messages:
                signed = msgspec.msgpack.decode(message.data, type=Signed)
                take(verify(public_key(SERVER), subject, signed))

    def opened(body):
        packages.append(msgspec.msgpack.decode(SealedBox(packages.box).decrypt(body), type=Package))

    def told(body):
        controls.append(msgspec.msgpack.decode(body, type=Control))

    async with running(hear("execute_build_package.w1", opened)), running(hear("control.w1", told)):
        await asyncio.sleep(0)
        yield packages, controls


A1 = Attempt("x1", "main", 1)


async def test_whoever_admits_workers_is_told_to_look_when_it_is_known_who_is_one(world, monkeypatch):
    """At once when the scheduler starts, rather than at the next tick; and again when it had not known for a while."""
    monkeypatch.setattr("services.scheduler.scheduler.CANDIDATE_TICK", 600.0)
    assert world.looks == 1
    world.office.term = None
    async with running(world.another().run()):
        await eventually(lambda: world.looks == 2)
    world.scheduler.log_grew()
    await world.turn()
    assert world.looks == 2, "it knew"
    world.now += 60
    world.scheduler.log_grew()
    await world.turn()
    assert world.looks == 3


async def test_an_attempt_is_leased_to_a_credit_and_its_package_names_all_that_it_is_for(world):
    await world.introduced()
    await world.queue()
    await world.turn()
    [leased] = await world.events(StageLeased)
    [package] = world.packages
    assert (leased.worker, leased.boot, leased.credit) == (package.worker, package.boot, package.credit) == ("w1", "b1", leased.credit)
    assert package.attempt == A1 and package.stage == PLAN.stages[0]
    token = read_token(public_key(SERVER), package.token, NOW, BuildToken)
    assert (token.build, token.stage, token.attempt, token.worker) == ("x1", "main", 1, "w1")


async def test_a_first_heartbeat_is_a_boot_and_its_credits_count_only_once_they_quote_the_challenge(world):
    await world.queue()
    world.beat()
    await world.turn()
    assert [event.boot for event in await world.events(WorkerBooted)] == ["b1"]
    assert not world.packages and world.challenge
    world.beat()
    await world.turn()
    assert len(world.packages) == 1


async def test_a_heartbeat_that_its_worker_did_not_sign_is_nobodys(world):
    # FAULTS 48, 79
    world.beat(seed=new_seed())
    await world.turn()
    assert not await world.events(WorkerBooted) and not world.controls
    assert world.scheduler.refused == 1


async def test_a_credit_is_used_once(world):
    await world.introduced()
    await world.queue("x1")
    await world.queue("x2")
    await world.turn()
    assert len(world.packages) == 1
    world.beat(running=[world.packages[0].attempt])
    await world.turn()
    assert len(world.packages) == 2 and world.packages[0].credit != world.packages[1].credit


async def test_whoever_does_not_lead_answers_and_places_nothing(world):
    world.office.term = None
    await world.introduced()
    await world.queue()
    await world.turn()
    assert not await world.events(WorkerBooted, StageLeased) and not world.controls


async def leased(world):
    await world.introduced()
    await world.queue()
    await world.turn()
    await world.happened("build-x1", StepStarted(stage="main", attempt=1, step="run", worker="w1", report=1))
    world.beat(free=0, running=[A1])
    await world.turn()


async def test_a_renewal_is_answered_with_what_may_be_held_and_what_is_recorded(world):
    await leased(world)
    assert world.controls[-1].held == [Held(A1, 1)]
    await world.happened("build-x1", StageInterrupted(stage="main", attempt=1, reason="aborted"))
    await world.turn()
    early = world.controls[-1]
    assert early.number == 0 and early.held == [Held(A1, 1, "aborted")]
    await world.happened("build-x1", StageFinished(stage="main", attempt=1, status="aborted"))
    world.beat(free=0, running=[A1])
    await world.turn()
    assert world.controls[-1].number == world.number and world.controls[-1].held == []


async def test_a_silent_workers_lease_expires_after_a_whole_term_and_not_before(world):
    await leased(world)
    await world.turn(LEASE - 1)
    assert not await world.events(LeaseExpired)
    await world.turn(3)
    [expired] = await world.events(LeaseExpired)
    assert "silent for 15 s" in expired.evidence
    assert [lost.reason for lost in await world.events(WorkerLost)] == ["silent"]


async def test_time_counts_only_while_the_scheduler_could_have_heard(world):
    # FAULTS 45: this process was stopped, and what it did not hear proves nothing
    await leased(world)
    world.now += 100
    await world.turn()
    assert not await world.events(LeaseExpired)
    await world.turn(LEASE + 2)
    assert await world.events(LeaseExpired)


async def test_what_was_said_before_a_stop_is_no_evidence_after_it(world):
    """It was sent before the package arrived, and is heard half a minute later."""
    await world.introduced()
    await world.queue()
    await world.turn()
    world.now += 30
    world.beat(free=0)
    await world.turn()
    assert not await world.events(LeaseExpired)
    for _ in range(12):
        await world.turn(1.0)
        world.beat(free=0)
    assert [expired.evidence for expired in await world.events(LeaseExpired)] == ["worker w1 never took it"]


async def test_a_takeover_grants_each_lease_a_whole_term(world):
    await leased(world)
    await world.turn(LEASE - 1)
    world.scheduler = world.another()
    await world.turn(LEASE - 1)
    assert not await world.events(LeaseExpired)
    await world.turn(3)
    assert len(await world.events(LeaseExpired)) == 1


async def standby(world):
    """Another instance, which hears and reads and does not lead."""
    world.office.term = None
    world.scheduler = world.another()
    await world.turn()
    world.controls.clear()


async def test_a_new_leader_says_at_once_whose_challenge_to_quote(world):
    """Rather than at the next heartbeat: credits count only then."""
    await standby(world)
    world.beat()
    await world.turn()
    assert world.controls == []
    world.office.term = 2
    await world.turn()
    [told] = world.controls
    assert told.challenge not in (b"", b"c0") and told.number == world.number


async def test_a_new_leader_does_not_take_those_for_living_whom_nobody_hears(world):
    await standby(world)
    world.beat(boot="dead")
    await world.turn(10)
    world.office.term = 2
    await world.turn()
    assert world.controls == [] and not [event for event in await world.events(WorkerBooted) if event.boot == "dead"]


async def test_every_instance_says_why_an_attempt_waits_and_forgets_who_is_silent(world):
    await standby(world)
    await world.queue()
    world.beat()
    await world.turn()
    asked = world.scheduler.waits([A1])
    assert [(one.able, [holder.worker for holder in one.holders]) for one in asked.stages] == [(1, ["w1"])]
    await world.turn(LEASE + 1)
    assert [one.able for one in world.scheduler.waits([A1]).stages] == [0]


async def test_a_worker_that_restarted_has_lost_its_leases_at_once(world):
    await leased(world)
    world.beat(boot="b2")
    await world.turn()
    [expired] = await world.events(LeaseExpired)
    assert "has restarted" in expired.evidence


async def test_a_worker_that_says_goodbye_has_given_its_leases_back(world):
    await leased(world)
    world.beat(free=0, running=[A1], goodbye=True)
    await world.turn()
    [expired] = await world.events(LeaseExpired)
    assert "has left" in expired.evidence


async def test_of_two_with_one_identity_the_older_is_told_to_hold_nothing(world):
    # FAULTS 46
    await leased(world)
    world.beat(boot="b2")
    await world.turn()
    world.beat(boot="b1", free=0, running=[A1])
    await world.turn()
    assert world.controls[-1].boot == "b1" and world.controls[-1].held == []


async def test_a_package_that_no_heartbeat_shows_is_sent_again_and_in_the_end_its_lease_expires(world):
    await world.introduced()
    await world.queue()
    await world.turn()
    for _ in range(3):
        await world.turn(1.1)
        world.beat(free=0)
    await world.turn()
    assert len(world.packages) > 1 and len({package.credit for package in world.packages}) == 1
    for _ in range(10):
        await world.turn(1.1)
        world.beat(free=0)
    await world.turn()
    [expired] = await world.events(LeaseExpired)
    assert "never took it" in expired.evidence


async def test_what_was_leased_while_the_bus_went_away_is_sent_when_it_is_back(world):
    await world.introduced()
    world.beat(free=2)
    await world.queue("x1")
    await world.queue("x2")
    appended = world.log.append

    async def append_and_lose_the_bus(writes):
        world.bus.connected = False
        return await appended(writes)

    world.log.append = append_and_lose_the_bus
    with pytest.raises(BusUnavailable):
        await world.turn()
    world.log.append, world.bus.connected = appended, True
    for _ in range(2):
        await world.turn(1.1)
        world.beat(free=0)
    await world.turn()
    assert {package.attempt for package in world.packages} == {A1, Attempt("x2", "main", 1)}


async def test_a_package_that_the_bus_cannot_carry_stops_nothing_else(world, monkeypatch):
    monkeypatch.setattr(world.packer, "package", lambda *_: b"x" * (MAX_PAYLOAD + 1))
    await world.introduced()
    await world.queue()
    await world.turn()
    world.beat()
    await world.turn()
    assert world.controls[-1].number == world.number and not world.packages


async def test_an_attempt_that_its_worker_had_and_lists_no_more_is_given_to_another_soon(world):
    await leased(world)
    for _ in range(2):
        await world.turn(1.1)
        world.beat(free=0)
    await world.turn()
    [expired] = await world.events(LeaseExpired)
    assert "gave it up" in expired.evidence


async def test_what_a_worker_said_before_it_took_an_attempt_is_no_evidence_against_it(world):
    """The heartbeat was long under way, or this process long busy: its reports were quicker."""
    await world.introduced()
    await world.queue()
    await world.turn()
    await world.happened("build-x1", StepStarted(stage="main", attempt=1, step="run", worker="w1", report=1))
    await world.turn(1.5)
    world.beat(free=0)
    await world.turn(1.5)
    world.beat(free=0, running=[A1])
    await world.turn()
    assert not await world.events(LeaseExpired)
    assert world.controls[-1].held == [Held(A1, 1)]


async def test_why_nothing_can_be_placed_is_recorded_once(world):
    await world.queue()
    await world.turn(10)
    [deferred] = await world.events(StageDeferred)
    assert deferred.reason == "no worker is connected"
    await world.introduced()
    await world.turn()
    assert len(world.packages) == 1


async def test_a_log_that_nobody_will_archive_is_forgotten(world):
    await leased(world)
    await world.happened("build-x1", StageFinished(stage="main", attempt=1, status="succeeded"))
    world.beat(logs=[A1])
    await world.turn()
    assert world.controls[-1].archived == [ArchivedLog("x1", "main", 1)]


async def test_a_worker_is_told_what_the_archive_of_a_log_holds(world):
    await leased(world)
    extent = LogExtent(chunks=5, lines=5, bytes=5)
    await world.happened("build-x1", StageFinished(stage="main", attempt=1, status="succeeded", log=extent))
    archived = LogArchived(build="x1", stage="main", attempt=1, archive=1, digest="d", chunks=3, lines=5, bytes=3, gaps=[LogGap(first=2, last=3)])
    await world.happened("artifact-log-x1-main-1", archived)
    for remembered in (True, False):
        world.beat(logs=[A1])
        await world.turn()
        assert world.controls[-1].archived == [ArchivedLog("x1", "main", 1, 5, [(2, 3)])], remembered
        world.scheduler.board.archived.clear()


async def test_a_revoked_worker_is_cut_off_its_leases_end_at_once_and_nothing_it_says_counts(world):
    await world.introduced()
    await world.queue()
    await world.turn()
    await world.happened("fleet-worker-w1", WorkerRevoked(reason="stolen"))
    await world.turn()
    [expired] = await world.events(LeaseExpired)
    assert expired.evidence == "worker w1 was revoked: stolen"
    assert [event.reason for event in await world.events(WorkerLost)] == ["revoked"]
    assert world.cuts == [("w1", public_key(IDENTITY))]
    heard = len(world.controls)
    world.beat()
    await world.queue("x2")
    await world.turn(25)
    assert len(world.controls) == heard and len(world.packages) == 1
    assert KNOWS_SECONDS < len(world.cuts) < 25, "whoever another instance let in meanwhile is cut off too, but not for ever"


@pytest.mark.parametrize(("tags", "heard"), [(3, True), (100_000, False)])
async def test_what_a_worker_offers_has_bounds_because_it_becomes_an_event(world, tags, heard):
    offers = Offers(tags=tuple(f"t{number}" for number in range(tags)))
    heartbeat = Heartbeat(boot="b1", since=1, number=1, slots=1, availability=Availability(challenge=b"", offers=offers))
    world.scheduler.hear("presence.w1", msgspec.msgpack.encode(sign(IDENTITY, "presence", msgspec.msgpack.encode(heartbeat))))
    await world.turn()
    assert bool(await world.events(WorkerBooted)) == heard


@pytest.mark.parametrize("asked", [{"logs": [A1] * 150_000}, {"running": [A1] * 150_000}], ids=["logs", "attempts"])
async def test_whoever_asks_for_more_than_an_answer_can_hold_stops_nothing(world, asked):
    """48."""
    await leased(world)
    await world.happened("build-x1", StageInterrupted(stage="main", attempt=1, reason="aborted"))
    if "logs" in asked:
        await world.happened(
            "artifact-log-x1-main-1", LogArchived(build="x1", stage="main", attempt=1, archive=1, digest="d", chunks=9, lines=9, bytes=9)
        )
    await world.turn()
    world.beat(**asked)
    await world.turn()
    assert world.controls[-1].number != world.number
    world.beat(running=[A1])
    await world.turn()
    assert world.controls[-1].number == world.number


@pytest.mark.parametrize(
    "credit", [Credit("n", bytes(32)), Credit("n" * 1_060_000, b"k" * 32)], ids=["a key that is none", "a nonce that no event holds"]
)
async def test_a_credit_that_is_a_lie_stops_nothing_else(world, credit):
    """48."""
    await world.introduced()
    available = Availability(challenge=world.challenge, offers=Offers(), credits=[credit])
    heartbeat = Heartbeat(boot="b1", since=1, number=world.number + 1, slots=2, availability=available)
    world.scheduler.hear("presence.w1", msgspec.msgpack.encode(sign(IDENTITY, "presence", msgspec.msgpack.encode(heartbeat))))
    world.number += 1
    await world.queue()
    await world.turn(2)
    world.beat(free=0)
    await world.turn()
    assert world.controls[-1].number == world.number and all(len(event.credit) <= 64 for event in await world.events(StageLeased))


@pytest.mark.parametrize("leaves", [False, True], ids=["boots anew", "comes and goes"])
async def test_a_liar_that_comes_again_and_again_makes_few_events_and_is_heard_again_when_it_has_stopped(world, leaves):
    for number in range(200):
        world.beat(boot="b" if leaves else f"b{number}")
        await world.scheduler.turn()
        if leaves:
            world.beat(boot="b", goodbye=True)
            await world.scheduler.turn()
    assert 10 <= len(await world.events(WorkerBooted)) <= 25
    before = len(await world.events(WorkerBooted))
    await world.turn(10)
    world.beat(boot="honest")
    await world.turn()
    assert [event.boot for event in (await world.events(WorkerBooted))[before:]] == ["honest"]


async def test_another_that_gets_the_name_of_one_that_came_too_often_is_heard_at_once(world):
    for number in range(30):
        world.beat(boot=f"b{number}")
        await world.scheduler.turn()
    other = new_seed()
    await world.happened("fleet-worker-w1", WorkerRevoked(), WorkerDeleted(), WorkerRegistered(worker="w1", key=public_key(other)))
    await world.scheduler.turn()
    world.beat(boot="another", seed=other)
    await world.scheduler.turn()
    assert (await world.events(WorkerBooted))[-1].boot == "another"


@pytest.mark.parametrize("gone", [[WorkerRevoked()], [WorkerRevoked(), WorkerDeleted()]])
async def test_a_worker_that_is_not_known_any_more_gets_nothing_in_the_very_turn_that_reads_of_it(world, gone):
    """Its credits are there, and it may still hear what is sent to it: a package would hold secrets."""
    await world.introduced()
    heard = len(world.controls)
    await world.queue()
    await world.happened("fleet-worker-w1", *gone)
    world.beat()
    await world.turn()
    assert not world.packages and len(world.controls) == heard
    assert not await world.events(StageLeased)


async def test_what_a_revoked_worker_never_showed_is_not_sent_to_it_again(world):
    await world.introduced()
    await world.queue()
    await world.turn()
    assert len(world.packages) == 1
    await world.turn(1.1)
    world.beat()
    await world.happened("fleet-worker-w1", WorkerRevoked())
    await world.turn()
    assert len(world.packages) == 1


async def test_an_instance_that_begins_to_lead_gives_nothing_to_whom_it_heard_before_they_were_deleted(world):
    await world.introduced()
    world.office.term = None
    await world.turn()
    await world.happened("fleet-worker-w1", WorkerRevoked(), WorkerDeleted())
    await world.queue()
    await world.turn()
    world.office.term = 2
    await world.turn()
    assert not world.packages


async def test_another_worker_of_a_revoked_ones_name_is_another(world):
    await world.introduced()
    other = new_seed()
    await world.happened("fleet-worker-w1", WorkerRevoked(), WorkerDeleted(), WorkerRegistered(worker="w1", key=public_key(other)))
    await world.turn()
    world.beat(boot="b2")
    await world.turn()
    assert [event.boot for event in await world.events(WorkerBooted)] == ["b1"]
    world.beat(boot="b2", seed=other)
    await world.turn()
    assert [event.boot for event in await world.events(WorkerBooted)] == ["b1", "b2"]
    assert set(world.cuts) == {("w1", public_key(IDENTITY))}


@pytest.mark.parametrize("gone", [[WorkerRevoked()], [WorkerRevoked(), WorkerDeleted()]], ids=["revoked", "and deleted"])
async def test_whoever_is_expelled_is_cut_off_also_while_nobody_leads(world, gone):
    world.office.term = None
    await world.turn()
    await world.happened("fleet-worker-w1", *gone)
    await world.turn()
    assert world.cuts == [("w1", public_key(IDENTITY))]


async def test_a_new_leader_cuts_off_whom_nobody_reached_before_it(world):
    assert world.sweeps == 1
    world.office.term = None
    await world.turn()
    world.office.term = 2
    await world.turn()
    assert world.sweeps == 2


async def test_a_key_that_was_revoked_is_good_for_nothing_under_any_name_and_after_a_restart(world):
    """Whatever token it shows: the gateway refuses it, and if one did not, nobody would hear it."""
    key = public_key(IDENTITY)
    await world.happened("fleet-worker-twin", WorkerRegistered(worker="twin", key=key))
    await world.happened("fleet-worker-lost", WorkerRegistered(worker="lost", key="k2"), WorkerDeleted(), WorkerRegistered(worker="lost", key="k2"))
    await world.turn()
    assert (world.scheduler.key_of("twin"), world.scheduler.key_of("lost")) == (key, "k2")
    await world.happened("fleet-worker-w1", WorkerRevoked(), WorkerDeleted(), WorkerRegistered(worker="w1", key=key))
    await world.happened("fleet-worker-w9", WorkerRegistered(worker="w9", key=key))
    await world.turn()
    assert set(world.cuts) == {("w1", key), ("twin", key)}
    board = world.scheduler.board
    for roster in (board.roster, Board.restore(board.position, board.snapshot()).roster):
        assert [roster.get(name) for name in ("w1", "twin", "w9")] == [None] * 3
        assert roster.get("lost") is not None
    world.beat()
    await world.turn()
    assert not await world.events(WorkerBooted)


async def test_whoever_has_not_read_the_log_lately_does_not_know_who_may_work(world, monkeypatch):
    assert world.scheduler.knows()
    assert not world.another().knows()
    monkeypatch.setattr(world.log, "read", lost)
    for _ in range(16):
        world.now += 1
        world.scheduler.log_grew()
        with suppress(LogUnavailable):
            await world.scheduler.turn()
    assert not world.scheduler.knows()
    monkeypatch.undo()
    await world.turn()
    assert world.scheduler.knows()


async def test_a_boot_that_could_not_be_recorded_gets_nothing_before_it_is(world, monkeypatch):
    world.beat()
    await world.turn()
    await world.queue()
    world.beat(boot="again")
    monkeypatch.setattr(world.log, "append", lost)
    with pytest.raises(LogUnavailable):
        await world.scheduler.turn()
    monkeypatch.undo()
    await world.turn()
    assert [event.boot for event in await world.events(WorkerBooted)][-1:] == ["again"]
    assert [lease.boot for lease in await world.events(StageLeased)] in ([], ["again"])


class Kept(NoSnapshots):
    """A snapshot of a board."""

    def __init__(self, board):
        self.stored = board.position, board.snapshot()

    async def load(self, *_):
        return self.stored


def spoil(log, stream, to):
    """A stream's first event is one that this code cannot read, as after a step back to it from newer code."""
    rows = log._records.streams[stream]
    rows[0] = msgspec.structs.replace(rows[0], **to)


UNREADABLE = {"of tomorrow": {"type": "build.of_tomorrow"}, "not of its type": {"data": b"{}"}, "no JSON": {"data": b"{"}}


@pytest.mark.parametrize("to", UNREADABLE.values(), ids=UNREADABLE.keys())
async def test_an_attempt_whose_plan_cannot_be_read_waits_and_is_told_why_and_the_others_do_not_wait_for_it(world, to):
    await world.queue("x1")
    await world.queue("x2")
    await world.turn()
    world.snapshots = Kept(world.scheduler.board)
    readable = world.log._records.streams["build-x1"][0]
    spoil(world.log, "build-x1", to)
    world.scheduler, world.office.term = world.another(), 2
    await world.scheduler.turn()
    await world.introduced()
    await world.turn()
    assert [package.attempt.build for package in world.packages] == ["x2"]
    await world.turn(5)
    world.beat(running=[Attempt("x2", "main", 1)])
    await world.turn()
    assert [event.reason for event in await world.events(StageDeferred)] == ["its plan cannot be read: the scheduler's log says why"]
    [waits] = world.scheduler.waits([A1]).stages
    assert (waits.able, waits.ahead) == (0, 0)
    world.log._records.streams["build-x1"][0] = readable
    for term in (None, 3):  # to lead anew is to try anew
        world.office.term = term
        await world.turn()
    world.beat()
    await world.turn()
    assert [package.attempt.build for package in world.packages] == ["x2", "x1"]


async def test_an_attempt_that_was_set_aside_waits_in_snapshots_as_it_was(world):
    await world.queue("x1")
    await world.turn()
    world.snapshots = Kept(world.scheduler.board)
    spoil(world.log, "build-x1", UNREADABLE["of tomorrow"])
    world.scheduler, world.office.term = world.another(), 2
    await world.scheduler.turn()
    await world.introduced()
    await world.turn()
    assert [queued.attempt for queued in Board.restore(*Kept(world.scheduler.board).stored).queue.all()] == [A1]


async def test_a_lease_that_was_recorded_though_nobody_said_so_has_its_credit_and_its_package(world, monkeypatch):
    append = world.log.append

    async def unsaid(writes):
        await append(writes)
        raise LogUnavailable("the answer was lost")

    await world.introduced()
    await world.queue("x1")
    monkeypatch.setattr(world.log, "append", unsaid)
    with pytest.raises(LogUnavailable):
        await world.scheduler.turn()
    monkeypatch.undo()
    await world.queue("x2")
    await world.turn()
    world.beat()
    await world.turn(2)
    world.beat(running=[Attempt("x2", "main", 1)])
    await world.turn()
    credits = [event.credit for event in await world.events(StageLeased)]
    assert len(set(credits)) == len(credits)
    assert "x1" in [package.attempt.build for package in world.packages]


async def test_after_a_failover_too_it_is_said_whether_a_worker_had_what_it_does_not_list(world):
    await leased(world)
    await world.happened("build-x1", StepStarted(stage="main", attempt=1, step="run", worker="w1", report=1))
    await world.turn()
    world.scheduler, world.office.term = world.another(), 2
    await world.turn()
    for _ in range(13):
        world.beat(free=0)
        await world.turn(1.0)
    assert [event.evidence for event in await world.events(LeaseExpired)] == ["worker w1 gave it up"]


async def test_a_package_that_cannot_be_made_again_holds_up_no_other(world):
    await world.introduced()
    await world.queue("x1")
    await world.turn()
    world.scheduler.board.plans.clear()
    spoil(world.log, "build-x1", UNREADABLE["of tomorrow"])
    await world.queue("x2")
    await world.turn(1.1)
    world.beat()
    await world.turn()
    assert [package.attempt.build for package in world.packages] == ["x1", "x2"]
    for _ in range(12):
        await world.turn(1.0)
        world.beat(running=[Attempt("x2", "main", 1)])
    await world.turn()
    assert [(event.attempt, event.evidence) for event in await world.events(LeaseExpired)] == [(1, "worker w1 never took it")]


@pytest.fixture
async def stuck(world):
    """One attempt is leased, and the board cannot take what came after it."""
    await leased(world)
    await world.log.append([write("build-bad", NewEvent("bad", "build.of_tomorrow", b"{}"))])
    world.scheduler.log_grew()
    await world.turn()
    assert "build-bad" in str(world.scheduler.stuck)
    return world


async def pass_by(world, seconds):
    for _ in range(seconds):
        world.scheduler.log_grew()
        await world.turn(1.0)


async def test_who_may_work_is_known_past_an_event_that_the_board_cannot_take(stuck):
    """Else nobody could log in again, and what runs would end with the logins."""
    await pass_by(stuck, 20)
    assert stuck.scheduler.knows() and stuck.scheduler.key_of("w1") == public_key(IDENTITY)
    await stuck.happened("fleet-worker-w2", WorkerRegistered(worker="w2", key="k2"))
    await stuck.happened("fleet-worker-w1", WorkerRevoked())
    await stuck.turn()
    assert (stuck.scheduler.key_of("w1"), stuck.scheduler.key_of("w2")) == (None, "k2")
    assert stuck.cuts == [("w1", public_key(IDENTITY))]
    assert not await stuck.events_of("lease-x1", LeaseExpired)
    await stuck.log.append([write("fleet-worker-w3", NewEvent("worse", "worker.of_tomorrow", b"{}"))])
    await pass_by(stuck, 20)
    assert not stuck.scheduler.knows(), "that may be another's leave to work, or its end"


async def test_whoever_starts_before_an_event_that_it_cannot_take_renews_what_is_leased(stuck):
    stuck.scheduler, stuck.office.term = stuck.another(), 2
    await stuck.turn()
    stuck.beat(free=0, running=[A1])
    await stuck.turn()
    assert stuck.controls[-1].number == stuck.number and stuck.controls[-1].held == [Held(A1, 1)]


async def test_a_board_that_gets_on_again_has_the_members_that_the_log_has(stuck):
    await stuck.happened("fleet-worker-w2", WorkerRegistered(worker="w2", key="k2"), WorkerRevoked())
    await stuck.happened("fleet-worker-w3", WorkerRegistered(worker="w3", key="k3", tags=("gpu",)), WorkerDrained())
    await stuck.turn()
    rows = stuck.log._records.events
    at = next(n for n, row in enumerate(rows) if row.stream == "build-bad")
    rows[at] = msgspec.structs.replace(rows[at], stream="team-bad")
    stuck.scheduler.log_grew()
    await stuck.turn()
    assert stuck.scheduler.stuck is None
    fresh = stuck.another()
    await fresh.turn()
    assert stuck.scheduler.board.roster.members == fresh.board.roster.members
    assert stuck.scheduler.board.snapshot() == fresh.board.snapshot()


async def test_a_board_that_gets_on_to_the_next_such_event_has_the_members_that_the_log_has(stuck):
    await stuck.happened("fleet-worker-w2", WorkerRegistered(worker="w2", key="k2"))
    await stuck.happened("fleet-worker-w3", WorkerRegistered(worker="w3", key="old"))
    await stuck.log.append([write("build-bad2", NewEvent("bad2", "build.of_tomorrow", b"{}"))])
    await stuck.happened("fleet-worker-w2", WorkerDeleted())
    await stuck.happened("fleet-worker-w3", WorkerDeleted(), WorkerRegistered(worker="w3", key="new"))
    await stuck.turn()
    rows = stuck.log._records.events
    at = next(n for n, row in enumerate(rows) if row.stream == "build-bad")
    rows[at] = msgspec.structs.replace(rows[at], stream="team-bad")
    for _ in range(2):
        stuck.scheduler.log_grew()
        await stuck.turn()
        assert "build-bad2" in str(stuck.scheduler.stuck)
        assert (stuck.scheduler.key_of("w2"), stuck.scheduler.key_of("w3")) == (None, "new")


async def lost(*_):
    raise LogUnavailable("the database is away")


@pytest.mark.parametrize("recorded", [True, False], ids=["the log knows the newer", "and does not"])
@pytest.mark.parametrize("order", ["on", "no"], ids=["older first", "newer first"])
async def test_after_a_failover_too_the_newer_of_two_with_one_identity_wins(world, order, recorded):
    """FAULTS 46: whomever a new process hears first, and whatever the log knows."""
    boots = {"o": "older", "n": "newer"}
    world.beat(boot="older")
    await world.turn()
    if recorded:
        world.beat(boot="newer")
        await world.turn()
    world.scheduler, world.office.term = world.another(), 2
    world.challenge = b""
    await world.scheduler.turn()
    for _ in range(3):
        for each in order:
            world.beat(boot=boots[each])
        await world.turn()
    assert world.scheduler.fleet.get("w1").heartbeat.boot == "newer"
    assert [event.boot for event in await world.events(WorkerBooted)] == ["older", "newer"]
    await world.queue()
    world.beat(boot="older")
    world.beat(boot="newer")
    await world.turn()
    assert [package.boot for package in world.packages] == ["newer"]


@pytest.mark.parametrize("recorded", [["older", "newer"], ["newer"], []], ids=["both", "the newer", "neither"])
@pytest.mark.parametrize("fresh", [True, False], ids=["a new leader", "the same"])
async def test_a_late_heartbeat_of_an_older_boot_shuts_nobody_out(world, fresh, recorded):
    """FAULTS 46: the bus may bring what an earlier life said after what the present one says; also when nobody has heard that life before."""
    world.since = {"older": 1, "newer": 2}
    for boot in recorded:
        world.beat(boot=boot)
        await world.turn()
    if fresh:
        world.scheduler, world.office.term = world.another(), 2
        await world.scheduler.turn()
    for boot in ("older", "newer", "older"):
        world.beat(boot=boot)
        await world.turn()
    world.beat(boot="newer")
    await world.turn()
    world.beat(boot="older")
    await world.queue()
    await world.turn()
    assert [package.boot for package in world.packages] == ["newer"]
    assert (await world.events(WorkerBooted))[-1].boot == "newer"


@pytest.mark.parametrize("key", [IDENTITY, new_seed()], ids=["the same key", "another key"])
async def test_a_worker_whose_clock_was_far_ahead_and_whose_folder_is_lost_begins_anew_when_it_is_registered_again(world, key):
    """It had a boot of next year; its folder would have remembered that."""
    world.since = {"next-year": 1 << 50, "now": 1}
    world.beat(boot="next-year")
    await world.turn()
    world.beat(boot="next-year", goodbye=True)
    await world.turn()
    world.beat(boot="now")
    await world.turn()
    assert (world.controls[-1].boot, world.controls[-1].challenge) == ("now", b"")
    await world.happened("fleet-worker-w1", WorkerDeleted(), WorkerRegistered(worker="w1", key=public_key(key)))
    await world.turn()
    world.beat(boot="now", seed=key)
    await world.turn()
    assert (world.controls[-1].boot, world.controls[-1].held) == ("now", []) and world.controls[-1].challenge
    assert [event.boot for event in await world.events(WorkerBooted)] == ["next-year", "now"]


async def test_whom_another_follows_while_nobody_here_hears_it_is_forgotten_by_the_next_leader(world):
    """FAULTS 46: an instance that waits to lead may have heard only the older, and the log knows better."""
    world.beat(boot="older")
    await world.turn()
    first = world.scheduler
    world.scheduler, world.office.term = world.another(), None
    await world.turn()
    world.beat(boot="older")
    await world.turn()
    standby, world.scheduler, world.office.term = world.scheduler, first, 2
    world.beat(boot="newer")
    await world.turn()
    world.scheduler, world.office.term = standby, 3
    world.controls.clear()
    await world.queue()
    await world.turn()
    assert world.scheduler.fleet.get("w1") is None and not world.packages
    world.beat(boot="older")
    await world.turn()
    assert world.controls[-1].boot == "older" and world.controls[-1].challenge == b""
    world.beat(boot="newer")
    await world.turn()
    assert world.controls[-1].boot == "newer"
    assert world.controls[-1].challenge


async def test_a_drained_worker_gets_nothing_new_before_it_knows_and_something_when_it_is_resumed(world):
    await world.introduced()
    await world.happened("fleet-worker-w1", WorkerDrained(reason="a disk"))
    await world.queue()
    await world.turn()
    assert not world.packages
    world.beat()
    await world.turn()
    assert world.controls[-1].drain and not world.packages
    await world.happened("fleet-worker-w1", WorkerResumed())
    await world.turn()
    world.beat()
    await world.turn()
    assert not world.controls[-1].drain and len(world.packages) == 1


async def test_the_tags_that_a_worker_was_registered_with_are_all_that_it_has(world):
    await world.happened("fleet-worker-w1", WorkerDeleted(), WorkerRegistered(worker="w1", key=public_key(IDENTITY), tags=("gpu",)))
    await world.turn()
    await world.introduced()
    assert [event.offers.tags for event in await world.events(WorkerBooted)] == [("gpu",)]


async def test_who_may_work_survives_in_the_snapshot(world):
    await world.happened("fleet-worker-w2", WorkerRegistered(worker="w2", key="k2", tags=("gpu",)), WorkerDrained())
    await world.happened("fleet-worker-w3", WorkerRegistered(worker="w3", key="k3"), WorkerRevoked())
    await world.turn()
    board = world.scheduler.board
    assert Board.restore(board.position, board.snapshot()).roster.members == board.roster.members
    assert (world.scheduler.key_of("w2"), world.scheduler.key_of("w3"), world.scheduler.key_of("w4")) == ("k2", None, None)


async def test_a_board_that_cannot_take_an_event_renews_what_is_leased_and_gives_and_ends_nothing(world, monkeypatch):
    await world.introduced()
    await world.queue()
    await world.turn()
    apply = Board.apply

    def refuse(board, happened):
        if happened.stream == "build-bad":
            raise ZeroDivisionError
        apply(board, happened)

    monkeypatch.setattr(Board, "apply", refuse)
    await world.queue("bad")
    await world.queue("x3")
    world.beat(running=[A1])
    await world.turn()
    assert "build-bad" in str(world.scheduler.stuck) and world.scheduler.problem is None
    assert [held.attempt for held in world.controls[-1].held] == [A1]
    await world.turn(2 * LEASE)
    assert len(await world.events(StageLeased)) == 1 and await world.events(LeaseExpired) == []
    monkeypatch.setattr(Board, "apply", apply)
    world.scheduler.log_grew()
    world.beat(running=[A1])
    await world.turn()
    assert world.scheduler.stuck is None
    world.beat(running=[A1])
    await world.turn()
    assert len(await world.events(StageLeased)) > 1
