"""A worker: its real session, a spool that outlives it, and steps which get on, end, or are killed."""

import random
from collections.abc import Callable, Sequence

import msgspec

from proto.events.base import Status
from proto.messages import (
    About,
    Attempt,
    Control,
    Heartbeat,
    Offers,
    Package,
    ReportBody,
    Reports,
    ReportStageFinished,
    ReportStepFinished,
    ReportStepProgressed,
    ReportStepStarted,
)
from services.worker.session import HEARTBEAT_SECONDS, LEASE_SHARE, Forget, Interrupt, Kill, Recorded, Session, Start

RESEND_SECONDS = 2.0


class _Spooled(msgspec.Struct):
    """An attempt's reports, and how many of them are recorded."""

    bodies: list[ReportBody] = []
    recorded: int = 0


class _Step(msgspec.Struct):
    """An attempt under way: which step is next or runs, and what must stop it."""

    package: Package
    step: int = 0
    running: bool = False
    interrupted: str = ""


class Worker:
    """`tell(heartbeat)` and `report(subject, bytes)` go to the network. Its clocks are its own: `clock()` stands still for
    nobody, `now()` may be set (unix seconds)."""

    def __init__(
        self,
        name: str,
        slots: int,
        pulls: bool,
        chance: random.Random,
        clock: Callable[[], float],
        now: Callable[[], float],
        tell: Callable[[str, Heartbeat], None],
        report: Callable[[str, bytes], None],
    ) -> None:
        self.name, self.slots = name, slots
        self._pulls, self._chance, self._clock, self._now, self._tell, self._report = pulls, chance, clock, now, tell, report
        self._spool: dict[Attempt, _Spooled] = {}
        self._lives = self._since = 0
        self._honoured: set[str] = set()
        self.known: set[Attempt] = set()
        """What it has ever been given."""
        self.stopped = False
        self.steps: dict[Attempt, _Step] = {}
        self.boot()

    # --- its life

    def boot(self) -> None:
        """A new life: nothing runs, and what was reported and not recorded is said again."""
        self._lives += 1
        self._since = max(int(self._now() * 1000), self._since + 1)
        self._nonces = 0
        self.stopped = False
        self.steps = {}
        about = About(mode="pull" if self._pulls else "push")
        boot = f"{self.name}-life-{self._lives}"
        self.session = Session(self.name, boot, self._since, bytes(32), self.slots, Offers(), self._nonce, about)
        self._beat_at = self._resent_at = float("-inf")
        for attempt, spooled in list(self._spool.items()):
            if spooled.recorded < len(spooled.bodies):
                self.session.on_replayed(attempt, len(spooled.bodies))
            else:
                del self._spool[attempt]

    def _nonce(self) -> str:
        self._nonces += 1
        return f"{self.session.boot if self._nonces > 1 else self._lives}-{self._nonces}"

    def tick(self) -> None:
        """What is due now."""
        now = self._clock()
        self._act(self.session.on_time(now))
        if now - self._beat_at >= HEARTBEAT_SECONDS:
            self._beat(now)
        if now - self._resent_at >= RESEND_SECONDS:
            self._resent_at = now
            for attempt in list(self._spool):
                self._publish(attempt)

    def work(self) -> None:
        """Some step gets on."""
        if self.steps:
            self._get_on(self._chance.choice(list(self.steps)))

    def leave(self) -> None:
        """It says goodbye, and is gone: a life later it is back."""
        self.session.leaving = True
        self._tell(self.name, self.session.on_heartbeat_due(self._clock(), [], goodbye=True))
        self.boot()

    def may_run(self, attempt: Attempt) -> bool:
        """Whether it runs the attempt, and would not end that if it looked at its clock now."""
        lease = self.session._leases.get(attempt)
        return attempt in self.steps and lease is not None and self._clock() - lease.answered < lease.seconds * LEASE_SHARE

    # --- what it is told

    def on_package(self, package: Package) -> None:
        now = self._clock()
        self._act(self.session.on_time(now))
        answer = self.session.on_package(package, now)
        if isinstance(answer, Start):
            assert package.credit not in self._honoured, f"credit {package.credit} was honoured twice"
            self._honoured.add(package.credit)
            self.known.add(package.attempt)
            self.steps[package.attempt] = _Step(package)
            self._spool[package.attempt] = _Spooled()
            assert len(self.steps) <= self.slots, f"{self.name} runs {list(self.steps)} in {self.slots} slots"
            if self._pulls:
                self._beat(now)

    def on_control(self, control: Control) -> None:
        self._act(self.session.on_control(control))

    def _act(self, actions: Sequence[object]) -> None:
        for action in actions:
            match action:
                case Interrupt(attempt=attempt, reason=reason):
                    self.steps[attempt].interrupted = reason
                case Kill(attempt=attempt):
                    del self.steps[attempt]
                case Recorded(attempt=attempt, number=number):
                    spooled = self._spool[attempt]
                    spooled.recorded = max(spooled.recorded, number)
                case Forget(attempt=attempt):
                    self._spool.pop(attempt, None)
                    assert attempt not in self.steps, f"{attempt} runs, and its reports are forgotten"

    def _beat(self, now: float) -> None:
        self._beat_at = now
        self._tell(self.name, self.session.on_heartbeat_due(now, []))

    # --- what it does

    def _get_on(self, attempt: Attempt) -> None:
        step = self.steps[attempt]
        plan = step.package.stage.steps[step.step]
        if not step.running:
            step.running = True
            self._say(attempt, ReportStepStarted(step=plan.name, sandbox="none"))
            return
        if not step.interrupted and self._chance.random() < 0.3:
            self._say(attempt, ReportStepProgressed(step=plan.name, percent=self._chance.randrange(-5, 120)))
            return
        status: Status = "aborted" if step.interrupted else self._chance.choice(["succeeded"] * 8 + ["failed", "errored"])  # type: ignore[arg-type]
        ended = ReportStepFinished(step=plan.name, status=status, exit_code=0 if status == "succeeded" else 1)
        if status == "succeeded" and step.step + 1 < len(step.package.stage.steps):
            step.step, step.running = step.step + 1, False
            self._say(attempt, ended)
            return
        del self.steps[attempt]
        self._say(attempt, ended, ReportStageFinished(status=status, chunks=self._chance.randrange(3)))
        self.session.on_attempt_ended(attempt)
        self._beat(self._clock())

    def _say(self, attempt: Attempt, *bodies: ReportBody) -> None:
        spooled = self._spool[attempt]
        spooled.bodies += bodies
        self.session.on_reported(attempt, len(spooled.bodies))
        self._publish(attempt, len(spooled.bodies) - len(bodies))

    def _publish(self, attempt: Attempt, after: int | None = None) -> None:
        """What is not recorded yet, or what comes after a number."""
        spooled = self._spool[attempt]
        after = spooled.recorded if after is None else after
        if after < len(spooled.bodies):
            reports = Reports(attempt=attempt, first=after + 1, bodies=spooled.bodies[after:])
            self._report(f"reports.{self.name}.{attempt.build}", msgspec.msgpack.encode(reports))
