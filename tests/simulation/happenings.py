"""Everything that may happen in the world beside messages that arrive and schedulers that turn, and how often: a seed decides."""

from collections.abc import Awaitable, Callable

import msgspec

from proto.events.fleet import WorkerDrained, WorkerResumed
from proto.events.request import BuildAbortRequested, BuildRequested
from proto.messages import Attempt, Reports, ReportStageFinished
from proto.plan import Plan, Run, RunStep, Stage, TaskConfig
from services.builds.leases import Leases
from tests.simulation.schedulers import LEASE_SECONDS
from tests.simulation.worker import Worker
from tests.simulation.world import World

Happening = Callable[[], Awaitable[None] | None]


class Happenings:
    """`odds`: of all that may happen in this world."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._chance = chance = world.chance
        self._wanted = chance.choice([5, 20, 80])
        self._aborted: set[str] = set()
        self._frozen: dict[str, float] = {}
        """Schedulers that stand still, and since when."""
        self.odds: dict[Happening, float] = {
            self._submit: 0.7,
            self._abort: 0.1,
            self._pass: 6.0,
            self._pass_long: chance.choice([0.0, 0.0, 0.1]),
            self._jump: chance.choice([0.0, 0.1]),
            self._tick: 8.0,
            self._work: chance.choice([0.3, 2.0, 6.0]),
            self._crash_worker: chance.choice([0.0, 0.05, 0.3]),
            self._stop_worker: chance.choice([0.0, 0.1]),
            self._resume_worker: 0.05,
            self._cut: chance.choice([0.0, 0.05]),
            self._lie: chance.choice([0.0, 0.1]),
            self._leave: chance.choice([0.0, 0.05]),
            self._drain: 0.05,
            self._echo: chance.choice([0.0, 0.2, 1.0]),
            self._crash_builds: 0.1,
            world.ring: 1.0,
            world.project: 2.0,
            self._crash_scheduler: chance.choice([0.0, 0.1]),
            self._campaign: chance.choice([0.5, 3.0]),
            self._resign: chance.choice([0.0, 0.05]),
            self._race: chance.choice([0.0, 1.0]),
            self._freeze: chance.choice([0.0, 0.1, 0.3]),
            self._thaw: 0.2,
            self._overtake: chance.choice([0.0, 0.1, 0.3]),
            world.refold: 0.03,
        }

    # --- clients

    def _submit(self) -> None:
        number = len(self._world.ledger.requested) + 1
        if number <= self._wanted:
            build = f"b{number}"
            self._world.append(f"request-{build}", BuildRequested(build=build, plan=self._plan(), name=build))

    def _plan(self) -> Plan:
        stages: list[Stage] = []
        for number in range(self._chance.choice([1, 1, 2, 3])):
            needs = self._chance.sample([stage.name for stage in stages], self._chance.randint(0, len(stages)))
            timeouts = [self._chance.choice([3, 30, 3600]) for _ in range(self._chance.choice([1, 1, 2]))]
            steps = [RunStep(name=f"run-{n}", config=TaskConfig(run=Run(path="true")), timeout=timeout) for n, timeout in enumerate(timeouts)]
            stages.append(Stage(name=f"s{number}", needs=needs, max_attempts=self._chance.randint(1, 4), steps=steps))
        return Plan(stages=stages)

    def _abort(self) -> None:
        builds = self._world.ledger.open
        if builds and (build := self._chance.choice(builds)) not in self._aborted:
            self._aborted.add(build)
            self._world.append(f"request-abort-{build}", BuildAbortRequested(build=build))

    # --- time

    def _pass(self) -> None:
        self._world.now += self._chance.expovariate(3.0)

    def _pass_long(self) -> None:
        self._world.now += self._chance.uniform(1.0, 1.5 * LEASE_SECONDS)

    def _jump(self) -> None:
        """The clocks of machines: those that are set go either way, the others only ahead, as after a sleep."""
        if self._chance.random() < 0.5:
            self._world.wall = self._chance.uniform(-7200, 7200)
        else:
            self._world.jumps[self._chance.choice(list(self._world.jumps))] += self._chance.uniform(0, 60)

    # --- workers

    def _any_worker(self) -> Worker | None:
        lively = self._world.lively()
        return self._chance.choice(lively) if lively else None

    def _tick(self) -> None:
        for worker in self._world.lively():
            worker.tick()

    def _work(self) -> None:
        if worker := self._any_worker():
            worker.work()

    def _crash_worker(self) -> None:
        self._chance.choice(self._world.workers).boot()

    def _stop_worker(self) -> None:
        if worker := self._any_worker():
            worker.stopped = True

    def _resume_worker(self) -> None:
        stopped = [worker for worker in self._world.workers if worker.stopped]
        if stopped:
            self._chance.choice(stopped).stopped = False

    def _cut(self) -> None:
        self._world.cut_off[self._chance.choice(self._world.workers).name] = self._world.now + self._chance.uniform(0, 3 * LEASE_SECONDS)

    def _lie(self) -> None:
        """A worker tells of what is another's, or nobody's."""
        if builds := self._world.ledger.open:
            worker, body = self._chance.choice(self._world.workers), ReportStageFinished(status="succeeded")
            attempt = Attempt(self._chance.choice(builds), f"s{self._chance.randrange(3)}", self._chance.randint(1, 5))
            if attempt not in worker.known:
                reports = Reports(attempt=attempt, first=self._chance.randint(1, 3), bodies=[body])
                self._world.reports.send((f"reports.{worker.name}.{attempt.build}", msgspec.msgpack.encode(reports)))

    def _leave(self) -> None:
        if worker := self._any_worker():
            worker.leave()

    def _drain(self) -> None:
        worker = self._chance.choice(self._world.workers)
        self._world.append(f"fleet-worker-{worker.name}", self._chance.choice([WorkerDrained, WorkerResumed])())

    def _echo(self) -> None:
        """The last that a worker said in a life that is over comes once more, or only now."""
        worker = self._chance.choice(self._world.workers)
        if over := [heartbeat for (name, boot), heartbeat in self._world.last_words.items() if name == worker.name and boot != worker.session.boot]:
            self._world.core.send((f"presence.{worker.name}", self._chance.choice(over)))

    # --- services

    def _crash_builds(self) -> None:
        self._world.builds.crash()
        self._world.reporters = Leases(self._world.log)

    def _crash_scheduler(self) -> None:
        self._world.leases.crash()
        dies = self._chance.choice(self._world.instances)
        self._frozen.pop(dies.name, None)
        self._world.replace(dies)

    def _campaign(self) -> None:
        self._world.campaign(self._chance.choice(self._world.instances))

    async def _resign(self) -> None:
        await self._chance.choice(self._world.instances).leadership.resign()

    async def _race(self) -> None:
        await self._world.turns(at_once=True)

    async def _freeze(self) -> None:
        """One stands still, if it can be in the middle of a turn; the more often whoever leads."""
        lively = [instance for instance in self._world.instances if not instance.frozen]
        leading = [instance for instance in lively if instance.leadership.term is not None]
        if lively:
            chosen = self._chance.choice(leading or lively)
            chosen.halts = True
            await self._world.turn(chosen)
            if chosen in self._world.instances:
                chosen.frozen = True
                self._frozen[chosen.name] = self._world.now

    async def _thaw(self) -> None:
        """It goes on, and does not know that others did; perhaps its clock stood still, too, so that its term is not over, as far as it knows."""
        for instance in self._world.instances:
            if instance.frozen:
                since = self._frozen.pop(instance.name)
                instance.deaf = self._chance.random() < 0.5
                await self._world.thaw(instance, self._chance.choice([0.0, self._world.now - since]))
                return

    async def _overtake(self) -> None:
        """Whoever leads stands still, clock and all, until the other leads, and goes on: for some seconds both believe that they do."""
        await self._freeze()
        for _ in range(3):
            self._pass_on()
            for instance in self._world.instances:
                self._world.campaign(instance)
            await self._world.turns()
        for instance in self._world.instances:
            if instance.frozen:
                instance.deaf = True
                await self._world.thaw(instance, self._world.now - self._frozen.pop(instance.name))

    def _pass_on(self) -> None:
        """Time in which the workers go on."""
        self._world.now += 2.0
        self._tick()
        self._world.core.deliver_all(self._world.hear)
