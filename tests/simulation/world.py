"""The world: a log, two schedulers, builds, workers, read models, and a network between them; one thing after another happens, as a seed decides."""

import asyncio
import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec

from libs.bus.bus import BusUnavailable
from libs.eventlog.log import ANY, LogUnavailable
from libs.eventlog.memory import MemoryLog
from libs.eventlog.projections import Table
from libs.runtime.decisions import Cause, Early, Refused
from proto.envelope import Fact, fact
from proto.events.fleet import WorkerDrained, WorkerRegistered, WorkerResumed
from proto.events.request import BuildAbortRequested, BuildRequested
from proto.messages import Attempt, Control, Heartbeat, Package, Reports, ReportStageFinished, Signed
from proto.plan import Plan, Run, RunStep, Stage, TaskConfig
from services.builds.commands import TimeOutStep
from services.builds.decider import BuildDecider
from services.builds.leases import Leases
from services.builds.projection import TimerRow
from services.builds.projection import keys as timer_keys
from services.builds.projection import project as project_timer
from services.builds.reactions import on_fact, on_report
from services.gateway.projection import CATEGORIES, TABLES, BuildRow
from services.gateway.projection import keys as gateway_keys
from services.gateway.projection import project as project_gateway
from services.scheduler.decider import SchedulerDecider
from tests.controls import counter, write
from tests.simulation.desk import Desk, at_once
from tests.simulation.ledger import Ledger
from tests.simulation.network import Network
from tests.simulation.readmodel import ReadModel
from tests.simulation.refolding import refolded
from tests.simulation.schedulers import LEASE_SECONDS, Instance
from tests.simulation.worker import Worker

START = datetime(2026, 11, 22, tzinfo=UTC)
ENOUGH = 900.0
"""Seconds of its own within which all builds end, once nothing goes wrong any more."""


class World:
    """Everything is drawn from `seed`. `steps` counts commands decided, events folded, messages taken and heartbeats made."""

    def __init__(self, seed: int) -> None:
        chance = self.chance = random.Random(seed)
        self.steps = 0
        self.now, self._wall = 1000.0, 0.0
        self._log = MemoryLog(now=lambda: START + timedelta(seconds=self.now + self._wall))
        self._read = 0
        self._facts: list[Fact] = []
        self._ledger = Ledger(self._runs_by_right)
        loss, repeats = chance.choice([0.0, 0.05, 0.3]), chance.choice([0.0, 0.1, 0.4])
        self._core: Network[tuple[str, Any]] = Network(chance, loss, repeats)
        self._events: Network[Fact] = Network(chance, 0.0, repeats)
        self._reports: Network[tuple[str, bytes]] = Network(chance, loss, repeats)
        ids = counter("e")
        self._builds = Desk(self._log, BuildDecider(), ids, chance, self._count)
        self._offices = Desk(self._log, SchedulerDecider(), ids, chance, self._count)
        self._leases = Leases(self._log)
        self._timers = ReadModel((Table(TimerRow, "timers", "key"),), frozenset({"build"}), project_timer, timer_keys)
        self._gateway = ReadModel(TABLES, CATEGORIES, project_gateway, gateway_keys)
        self._jumps: dict[str, float] = {}
        self._snapshots: dict[str, tuple[int, str, bytes]] = {}
        self._offices.unsure = self._builds.unsure = chance.choice([0.0, 0.02])
        self._instances = [self._instance("one"), self._instance("two")]
        self._stale: Instance | None = None
        """One that leads no more and has not noticed; nor does it hear that the log grows."""
        self._term = 0
        self._workers = [self._worker(f"w{n}") for n in range(chance.randint(1, 4))]
        self._wanted = chance.choice([5, 20, 80])
        self._aborted: set[str] = set()
        self._cut_off: dict[str, float] = {}
        """Workers that the bus does not reach, and until when."""
        for worker in self._workers:
            self._append(f"fleet-worker-{worker.name}", WorkerRegistered(worker=worker.name, key="k"))
        self._elect()
        self._kinds = self._what_happens()

    # --- its parts

    def _count(self) -> None:
        self.steps += 1

    def _clock(self, name: str) -> Callable[[], float]:
        """A monotonic clock of somebody's own, which may jump ahead."""
        self._jumps[name] = self.chance.uniform(0, 1e6)
        return lambda: self.now + self._jumps[name]

    def _time(self) -> float:
        """What the machines' clocks say: they may be set."""
        return START.timestamp() + self.now + self._wall

    def _instance(self, name: str) -> Instance:
        return Instance(name, self._log, self._offices, self._snapshots, self._clock(name), lambda: START.timestamp() + self.now, self._send)

    def _worker(self, name: str) -> Worker:
        chance = self.chance

        def tell(worker: str, heartbeat: Heartbeat) -> None:
            self._count()
            self._core.send((f"presence.{worker}", heartbeat))

        slots, pulls = chance.randint(1, 4), chance.random() < 0.4
        return Worker(name, slots, pulls, chance, self._clock(name), self._time, tell, lambda *report: self._reports.send(report))

    def _runs_by_right(self, name: str, attempt: Attempt) -> bool:
        worker = next(worker for worker in self._workers if worker.name == name)
        return not worker.stopped and worker.may_run(attempt)

    async def _send(self, subject: str, message: Any) -> None:
        """Core NATS, as a scheduler sends."""
        if self.chance.random() < self._offices.unsure:
            raise BusUnavailable("simulated")
        self._core.send((subject, message))

    def _append(self, stream: str, *events: Any) -> None:
        at_once(self._log.append([write(stream, *events, expected=ANY)]))
        self._grew()

    def _grew(self) -> None:
        """Look at all that is new in the log: check it, publish it, wake the schedulers."""
        for recorded in at_once(self._log.read(self._read, 10_000)):
            happened = fact(recorded)
            self._read = happened.position
            self._facts.append(happened)
            self._count()
            self._ledger.note(happened)
            self._events.send(happened)
        for instance in self._instances:
            if instance is not self._stale:
                instance.scheduler.log_grew()

    # --- what happens

    def _what_happens(self) -> dict[Callable[[], None], float]:
        """Everything that may happen without a scheduler's turn, and how often."""
        return {
            self._submit: 0.7,
            self._abort: 0.1,
            self._pass: 6.0,
            self._pass_long: self.chance.choice([0.0, 0.0, 0.1]),
            self._jump: self.chance.choice([0.0, 0.1]),
            self._tick: 8.0,
            self._work: self.chance.choice([0.3, 2.0, 6.0]),
            self._crash_worker: self.chance.choice([0.0, 0.05, 0.3]),
            self._stop_worker: self.chance.choice([0.0, 0.1]),
            self._resume_worker: 0.05,
            self._cut: self.chance.choice([0.0, 0.05]),
            self._lie: self.chance.choice([0.0, 0.1]),
            self._leave: self.chance.choice([0.0, 0.05]),
            self._drain: 0.05,
            self._crash_builds: 0.1,
            self._ring: 1.0,
            self._project: 2.0,
            self._crash_scheduler: self.chance.choice([0.0, 0.1]),
            self._elect: self.chance.choice([0.02, 0.2]),
            self._depose: self.chance.choice([0.0, 0.1]),
            self._overlap: self.chance.choice([0.0, 0.1, 0.3]),
            self._refold: 0.03,
        }

    async def live(self, steps: int) -> None:
        """So many steps with everything that may go wrong; then nothing goes wrong any more, and all must end well."""
        kinds, weights = list(self._kinds), list(self._kinds.values())
        while self.steps < steps:
            what = self.chance.random()
            if what < 0.2:
                await self._turn(self.chance.choice(self._instances))
            elif what < 0.202:
                await self._wait()
            elif what < 0.4 and len(self._core):
                self._core.deliver(self._hear)
            elif what < 0.55 and len(self._events):
                self._events.deliver(self._react)
            elif what < 0.65 and len(self._reports):
                self._reports.deliver(self._record)
            else:
                self.chance.choices(kinds, weights)[0]()
        await self._settle()

    async def _wait(self) -> None:
        """Some time in which everybody does what is due, but for those who cannot."""
        self._notice()
        for _ in range(self.chance.randint(2, 60)):
            self.now += 0.5
            for instance in list(self._instances):
                await self._turn(instance)
            self._tick()
            self._core.deliver_all(self._hear)

    async def _settle(self) -> None:
        for network in (self._core, self._events, self._reports):
            network.heal()
        self._offices.unsure = self._builds.unsure = 0.0
        self._cut_off.clear()
        for worker in self._workers:
            worker.stopped = False
            self._append(f"fleet-worker-{worker.name}", WorkerResumed())
        self._notice()
        if all(instance.term is None for instance in self._instances):
            self._elect()
        until = self.now + ENOUGH
        while self._ledger.open or any(worker.steps for worker in self._workers):
            assert self.now < until, f"after {ENOUGH:g} s without a fault {self._ledger.open} have not ended"
            self.now += 0.5
            for instance in list(self._instances):
                await self._turn(instance)
            self._core.deliver_all(self._hear)
            for worker in self._workers:
                worker.tick()
                worker.work()
            self._core.deliver_all(self._hear)
            self._events.deliver_all(self._react)
            self._reports.deliver_all(self._record)
            self._project(10_000)
            self._ring()
        await self._check_the_end()

    async def _turn(self, instance: Instance) -> None:
        """One that fails in the middle of a turn is started anew: its memory says nothing of what it did."""
        self._count()
        before = instance.scheduler._board.position
        try:
            await instance.scheduler.turn()
        except (LogUnavailable, BusUnavailable):
            self._replace(instance)
        self.steps += max(instance.scheduler._board.position - before, 0)
        self._grew()

    def _replace(self, instance: Instance) -> None:
        term = instance.term
        at = self._instances.index(instance)
        self._instances[at] = self._instance(instance.name)
        if term is not None:
            self._elect()

    def _hear(self, message: tuple[str, Any]) -> bool:
        self._count()
        subject, content = message
        if self._cut_off.get(subject.partition(".")[2], 0.0) > self.now:
            return True
        match content:
            case Heartbeat():
                signed = Signed(msgspec.msgpack.encode(content), b"")
                for instance in self._instances:
                    instance.scheduler.hear(subject, msgspec.msgpack.encode(signed))
            case Control() | Package():
                worker = next(worker for worker in self._workers if subject.endswith(f".{worker.name}"))
                if worker.stopped:
                    return False
                if isinstance(content, Package):
                    worker.on_package(content)
                else:
                    worker.on_control(content)
        return True

    def _react(self, happened: Fact) -> bool:
        return all(self._decide(command, cause) for command, cause in on_fact(happened))

    def _record(self, message: tuple[str, bytes]) -> bool:
        subject, data = message
        at_once(self._leases.load([_Message(subject, data)]))  # type: ignore[list-item]
        for command, cause in on_report(subject, data, self._leases.of):
            self._decide(command, cause)  # what is early comes again: its worker says it until it is recorded
        return True

    def _decide(self, command: Any, cause: Cause) -> bool:
        """Whether it need not be asked again."""
        try:
            self._builds.execute(command, cause)
        except Refused:
            return True
        except (Early, LogUnavailable):
            return False
        finally:
            self._grew()
        return True

    # --- clients

    def _submit(self) -> None:
        number = len(self._ledger.requested) + 1
        if number > self._wanted:
            return
        build = f"b{number}"
        self._append(f"request-{build}", BuildRequested(build=build, plan=self._plan(), name=build))

    def _plan(self) -> Plan:
        stages: list[Stage] = []
        for number in range(self.chance.choice([1, 1, 2, 3])):
            needs = self.chance.sample([stage.name for stage in stages], self.chance.randint(0, len(stages)))
            timeouts = [self.chance.choice([3, 30, 3600]) for _ in range(self.chance.choice([1, 1, 2]))]
            steps = [RunStep(name=f"run-{n}", config=TaskConfig(run=Run(path="true")), timeout=timeout) for n, timeout in enumerate(timeouts)]
            stages.append(Stage(name=f"s{number}", needs=needs, max_attempts=self.chance.randint(1, 4), steps=steps))
        return Plan(stages=stages)

    def _abort(self) -> None:
        builds = self._ledger.open
        if builds and (build := self.chance.choice(builds)) not in self._aborted:
            self._aborted.add(build)
            self._append(f"request-abort-{build}", BuildAbortRequested(build=build))

    # --- time

    def _pass(self) -> None:
        self.now += self.chance.expovariate(3.0)

    def _pass_long(self) -> None:
        self.now += self.chance.uniform(1.0, 1.5 * LEASE_SECONDS)

    def _jump(self) -> None:
        """The clocks of machines: those that are set go either way, the others only ahead, as after a sleep."""
        if self.chance.random() < 0.5:
            self._wall = self.chance.uniform(-7200, 7200)
        else:
            self._jumps[self.chance.choice(list(self._jumps))] += self.chance.uniform(0, 60)

    # --- workers

    def _any_worker(self) -> Worker | None:
        lively = [worker for worker in self._workers if not worker.stopped]
        return self.chance.choice(lively) if lively else None

    def _tick(self) -> None:
        for worker in self._workers:
            if not worker.stopped:
                worker.tick()

    def _work(self) -> None:
        if worker := self._any_worker():
            worker.work()

    def _crash_worker(self) -> None:
        self.chance.choice(self._workers).boot()

    def _stop_worker(self) -> None:
        if worker := self._any_worker():
            worker.stopped = True

    def _resume_worker(self) -> None:
        stopped = [worker for worker in self._workers if worker.stopped]
        if stopped:
            self.chance.choice(stopped).stopped = False

    def _cut(self) -> None:
        self._cut_off[self.chance.choice(self._workers).name] = self.now + self.chance.uniform(0, 3 * LEASE_SECONDS)

    def _lie(self) -> None:
        """A worker tells of what is another's, or nobody's."""
        if builds := self._ledger.open:
            worker, body = self.chance.choice(self._workers), ReportStageFinished(status="succeeded")
            attempt = Attempt(self.chance.choice(builds), f"s{self.chance.randrange(3)}", self.chance.randint(1, 5))
            if attempt not in worker.known:
                reports = Reports(attempt=attempt, first=self.chance.randint(1, 3), bodies=[body])
                self._reports.send((f"reports.{worker.name}.{attempt.build}", msgspec.msgpack.encode(reports)))

    def _leave(self) -> None:
        if worker := self._any_worker():
            worker.leave()

    def _drain(self) -> None:
        worker = self.chance.choice(self._workers)
        self._append(f"fleet-worker-{worker.name}", self.chance.choice([WorkerDrained, WorkerResumed])())

    # --- services

    def _crash_builds(self) -> None:
        self._builds.crash()
        self._leases = Leases(self._log)

    def _crash_scheduler(self) -> None:
        self._offices.crash()
        self._replace(self.chance.choice(self._instances))

    def _elect(self) -> None:
        """One leads; the other knows that it does not."""
        self._notice()
        self._term += 1
        for instance in self._instances:
            instance.term = None
        self.chance.choice(self._instances).term = self._term

    def _overlap(self) -> None:
        """Another leads, and whoever led does not know it yet."""
        self._notice()
        leading = [instance for instance in self._instances if instance.term is not None]
        if leading:
            self._stale, self._term = leading[0], self._term + 1
            next(instance for instance in self._instances if instance is not self._stale).term = self._term

    def _notice(self) -> None:
        if self._stale is not None:
            self._stale.term, self._stale = None, None
            self._grew()

    def _depose(self) -> None:
        self._notice()
        for instance in self._instances:
            instance.term = None

    def _ring(self) -> None:
        """The timers that are due."""
        now = START + timedelta(seconds=self.now + self._wall)
        due = [row for row in self._timers.rows.values() if row.due_at <= now]
        for row in due:
            timer = row.payload
            cause = Cause(team=timer.team, correlation_id=timer.correlation_id, causation_id=timer.event_id, actor="timer")
            self._decide(TimeOutStep(build=timer.build, stage=timer.stage, attempt=timer.attempt, step=timer.step), cause)

    def _project(self, most: int | None = None) -> None:
        """The read models read on, each a batch."""
        for model in (self._timers, self._gateway):
            batch = most or self.chance.randint(1, 50)
            for happened in self._facts[model.position : model.position + batch]:
                self._count()
                model.apply(happened)

    # --- what must be true

    def _refold(self) -> None:
        boards = {instance.name: instance.scheduler._board for instance in self._instances}
        refolded(boards, (self._timers, self._gateway), self._facts, self.chance)

    async def _check_the_end(self) -> None:
        self._project(100_000)
        for _ in range(2):
            for instance in list(self._instances):
                await self._turn(instance)
        self._builds.crash()
        self._offices.crash()
        self._refold()
        for instance in self._instances:
            board = instance.scheduler._board
            assert (board.leases, board.held, list(board.queue.all()), board.queue.running) == ({}, {}, [], {}), f"{instance.name} holds what is over"
        assert self._timers.rows == {}, self._timers.rows
        shown = {row.id: row.status for (kind, _), row in self._gateway.rows.items() if kind is BuildRow}
        assert shown == self._ledger.requested, "what people see is what is recorded"


class _Message(msgspec.Struct):
    subject: str
    data: bytes


async def lived(seed: int, steps: int) -> int:
    """Let a world live; how many steps it took in all. Raises AssertionError for what must not be."""
    world = World(seed)
    await world.live(steps)
    await asyncio.sleep(0)
    return world.steps
