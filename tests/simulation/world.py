"""The world: a log, two schedulers, builds, workers, read models, and a network between them. What happens in it is elsewhere (`happenings.py`)."""

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
from proto.events.fleet import WorkerRegistered
from proto.messages import Attempt, Control, Heartbeat, Package, Signed
from services.builds.commands import TimeOutStep
from services.builds.decider import BuildDecider
from services.builds.leases import Leases
from services.builds.projection import TimerRow
from services.builds.projection import keys as timer_keys
from services.builds.projection import project as project_timer
from services.builds.reactions import on_fact, on_report
from services.gateway.projection import CATEGORIES, TABLES
from services.gateway.projection import keys as gateway_keys
from services.gateway.projection import project as project_gateway
from services.scheduler.decider import SchedulerDecider
from tests.controls import counter, write
from tests.simulation.desk import Desk, at_once
from tests.simulation.ledger import Ledger
from tests.simulation.network import Network
from tests.simulation.office import Office
from tests.simulation.readmodel import ReadModel
from tests.simulation.refolding import refolded
from tests.simulation.schedulers import Instance
from tests.simulation.worker import Worker

START = datetime(2026, 11, 22, tzinfo=UTC)
WORDS = 100
"""Heartbeats, each the last of some life, that may come again."""


class World:
    """Everything is drawn from `seed`. `steps` counts commands decided, events folded, messages taken and heartbeats made. `now` is what passes
    (seconds), `wall` what clocks that are set are off by, `jumps` how far each monotonic clock is ahead; `cut_off` are workers that the bus does not
    reach, and until when."""

    def __init__(self, seed: int) -> None:
        chance = self.chance = random.Random(seed)
        self.steps = 0
        self.now, self.wall = 1000.0, 0.0
        self.log = MemoryLog(now=lambda: START + timedelta(seconds=self.now + self.wall))
        self._read = 0
        self._facts: list[Fact] = []
        self.ledger = Ledger(self._runs_by_right)
        loss, repeats = chance.choice([0.0, 0.05, 0.3]), chance.choice([0.0, 0.1, 0.4])
        self.core: Network[tuple[str, Any]] = Network(chance, loss, repeats)
        self.events: Network[Fact] = Network(chance, 0.0, repeats)
        self.reports: Network[tuple[str, bytes]] = Network(chance, loss, repeats)
        self._ids = counter("e")
        self.builds = Desk(self.log, BuildDecider(), self._ids, chance, self.count)
        self.leases = Desk(self.log, SchedulerDecider(), self._ids, chance, self.count)
        self.leases.unsure = self.builds.unsure = chance.choice([0.0, 0.02])
        self.reporters = Leases(self.log)
        self.timers = ReadModel((Table(TimerRow, "timers", "key"),), frozenset({"build"}), project_timer, timer_keys)
        self.gateway = ReadModel(TABLES, CATEGORIES, project_gateway, gateway_keys)
        self.jumps: dict[str, float] = {}
        self._snapshots: dict[str, tuple[int, str, bytes]] = {}
        self._office = Office(self._time, self.leases.lost)
        self._named = chance.random() < 0.5
        """Whether a scheduler has the office of its predecessor of that name at once."""
        self.instances = [self._instance("one"), self._instance("two")]
        self.last_words: dict[tuple[str, str], Heartbeat] = {}
        self.workers = [self._worker(f"w{n}") for n in range(chance.randint(1, 4))]
        self.cut_off: dict[str, float] = {}
        for worker in self.workers:
            self.append(f"fleet-worker-{worker.name}", WorkerRegistered(worker=worker.name, key="k"))

    # --- its parts

    def count(self) -> None:
        self.steps += 1

    def _clock(self, name: str) -> Callable[[], float]:
        """A monotonic clock of somebody's own."""
        self.jumps[name] = self.chance.uniform(0, 1e6)
        return lambda: self.now + self.jumps[name]

    def _time(self) -> float:
        """What the machines' clocks say, and the database's."""
        return START.timestamp() + self.now + self.wall

    def _instance(self, name: str) -> Instance:
        holder, right = name if self._named else self._ids(), lambda: START.timestamp() + self.now
        clock = self._clock(name)
        return Instance(name, holder, self.log, self._office, self.leases, self._snapshots, self.chance, clock, right, self._send)

    def _worker(self, name: str) -> Worker:
        chance = self.chance
        slots, pulls = chance.randint(1, 4), chance.random() < 0.4
        return Worker(name, slots, pulls, chance, self._clock(name), self._time, self._tell, lambda *report: self.reports.send(report))

    def _runs_by_right(self, name: str, attempt: Attempt) -> bool:
        worker = next(worker for worker in self.workers if worker.name == name)
        return not worker.stopped and worker.may_run(attempt)

    def lively(self) -> list[Worker]:
        return [worker for worker in self.workers if not worker.stopped]

    # --- what goes from one to another

    def _tell(self, worker: str, heartbeat: Heartbeat) -> None:
        self.count()
        self.core.send((f"presence.{worker}", heartbeat))
        if len(self.last_words) < WORDS:
            self.last_words[worker, heartbeat.boot] = heartbeat

    async def _send(self, subject: str, message: Any) -> None:
        """Core NATS, as a scheduler sends."""
        if self.chance.random() < self.leases.unsure:
            raise BusUnavailable("simulated")
        self.core.send((subject, message))

    def append(self, stream: str, *events: Any) -> None:
        at_once(self.log.append([write(stream, *events, expected=ANY)]))
        self.grew()

    def grew(self) -> None:
        """Look at all that is new in the log: check it, publish it, wake the schedulers."""
        for recorded in at_once(self.log.read(self._read, 10_000)):
            happened = fact(recorded)
            self._read = happened.position
            self._facts.append(happened)
            self.count()
            self.ledger.note(happened)
            self.events.send(happened)
        for instance in self.instances:
            if not instance.deaf:
                instance.scheduler.log_grew()

    def hear(self, message: tuple[str, Any]) -> bool:
        self.count()
        subject, content = message
        if self.cut_off.get(subject.partition(".")[2], 0.0) > self.now:
            return True
        match content:
            case Heartbeat():
                signed = msgspec.msgpack.encode(Signed(msgspec.msgpack.encode(content), b""))
                for instance in self.instances:
                    instance.hear(subject, signed)
            case Control() | Package():
                worker = next(worker for worker in self.workers if subject.endswith(f".{worker.name}"))
                if worker.stopped:
                    return False
                if isinstance(content, Package):
                    worker.on_package(content)
                else:
                    worker.on_control(content)
        return True

    def react(self, happened: Fact) -> bool:
        return all(self._decide(command, cause) for command, cause in on_fact(happened))

    def record(self, message: tuple[str, bytes]) -> bool:
        subject, data = message
        at_once(self.reporters.load([_Message(subject, data)]))  # type: ignore[list-item]
        for command, cause in on_report(subject, data, self.reporters.of):
            self._decide(command, cause)  # what is early comes again: its worker says it until it is recorded
        return True

    def _decide(self, command: Any, cause: Cause) -> bool:
        """Whether it need not be asked again."""
        try:
            self.builds.execute(command, cause)
        except Refused:
            return True
        except (Early, LogUnavailable):
            return False
        finally:
            self.grew()
        return True

    # --- what everybody does in time

    async def turn(self, instance: Instance) -> None:
        """Of one that does not stand still. One that fails in the middle of a turn goes on with what it knows, or is started anew: then its memory
        says nothing of what it did."""
        if instance.frozen:
            return
        self.count()
        before = instance.scheduler.board.position
        try:
            await instance.turn()
        except (LogUnavailable, BusUnavailable) as error:
            if self.chance.random() < 0.5:
                self.replace(instance)
            else:
                instance.scheduler.fail(error)
        self.steps += max(instance.scheduler.board.position - before, 0)
        self.grew()

    async def turns(self, at_once: bool = False) -> None:
        """Of both, one after the other; or `at_once`, and each may get on whenever the other waits for something."""
        for instance in self.instances:
            instance.races = at_once
        if at_once:
            await asyncio.gather(*map(self.turn, self.instances))
        else:
            for instance in list(self.instances):
                await self.turn(instance)
        for instance in self.instances:
            instance.races = False

    def replace(self, instance: Instance) -> None:
        """It dies, and another is started in its place."""
        instance.kill()
        self.instances[self.instances.index(instance)] = self._instance(instance.name)

    def campaign(self, instance: Instance) -> None:
        """It asks for the office, or renews it, as it does every second or two; by then it has heard of what is in the log, too."""
        if not instance.frozen:
            at_once(instance.leadership.campaign())
            instance.deaf = False
            instance.scheduler.log_grew()

    async def thaw(self, instance: Instance, stood_still: float) -> None:
        """It goes on where it stood still; so did its clock for so many seconds."""
        self.jumps[instance.name] -= stood_still
        instance.thaw()
        heard, instance.inbox = instance.inbox, []
        for message in heard:
            instance.hear(*message)
        await self.turn(instance)

    def ring(self) -> None:
        """The timers that are due."""
        now = START + timedelta(seconds=self.now + self.wall)
        for row in [row for row in self.timers.rows.values() if row.due_at <= now]:
            timer = row.payload
            cause = Cause(team=timer.team, correlation_id=timer.correlation_id, causation_id=timer.event_id, actor="timer")
            self._decide(TimeOutStep(build=timer.build, stage=timer.stage, attempt=timer.attempt, step=timer.step), cause)

    def project(self, most: int | None = None) -> None:
        """The read models read on, each a batch."""
        for model in (self.timers, self.gateway):
            batch = most or self.chance.randint(1, 50)
            for happened in self._facts[model.position : model.position + batch]:
                self.count()
                model.apply(happened)

    def refold(self) -> None:
        """What was folded as it came is what the log says. Raises AssertionError."""
        boards = {instance.name: instance.scheduler.board for instance in self.instances}
        refolded(boards, (self.timers, self.gateway), self._facts, self.chance)


class _Message(msgspec.Struct):
    subject: str
    data: bytes
