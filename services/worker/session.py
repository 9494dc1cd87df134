"""What a worker's life decides: credits, packages, control and leases. A pure state machine: no I/O, the clock (monotonic seconds) is passed in.

One function for each thing that can happen; each answers with what is to be done about it. Invariants:

* a credit is honoured once, in this boot only, and only while it is under `CREDIT_SECONDS` old;
* in push mode every free slot has one, renewed by itself; in pull mode there is one at a time, and only while work is wanted; none while so many
  reports wait to be recorded that a heartbeat could not list more;
* what it has cached is said until somebody answered, and again to whoever may not have heard it (a challenge names them);
* an attempt is never run past two thirds of its lease counted from the *sending* of the last heartbeat that was answered, so the worker
  kills its own work before the owner gives it to another.
"""

from collections.abc import Callable

import msgspec

from proto.messages import (
    CREDIT_SECONDS,
    MAX_SHORT,
    MAX_SLOTS,
    About,
    ArchivedLog,
    Attempt,
    Availability,
    Control,
    Credit,
    Heartbeat,
    Offers,
    Package,
    Running,
)
from services.worker.condition import FINE, Condition

REPLACE_SECONDS = 4.0
"""A credit this old is replaced by a fresh one in the next heartbeat; the old one stays good until it is too old or its slot is taken."""
HEARTBEAT_SECONDS = 1.0
LEASE_SHARE = 2 / 3
REMEMBERED_HEARTBEATS = 4096


class Start(msgspec.Struct, frozen=True):
    """Run the package's stage."""

    package: Package


class Refuse(msgspec.Struct, frozen=True):
    """The package is not for us, or not now; nobody is told."""

    reason: str


class Interrupt(msgspec.Struct, frozen=True):
    """The attempt must stop, with a grace period, and say how it ended."""

    attempt: Attempt
    reason: str


class Kill(msgspec.Struct, frozen=True):
    """The attempt is not ours any more: end it at once and say nothing."""

    attempt: Attempt
    why: str


class Recorded(msgspec.Struct, frozen=True):
    """Reports up to `number` are events."""

    attempt: Attempt
    number: int


class Forget(msgspec.Struct, frozen=True):
    """Nobody waits for the attempt's reports."""

    attempt: Attempt


class Followed(msgspec.Struct, frozen=True):
    """A later boot has our name: we get no work, and what we run is not ours."""


class ForgetLog(msgspec.Struct, frozen=True):
    """So much of the attempt's log is archived."""

    log: ArchivedLog


Action = Interrupt | Kill | Recorded | Forget | ForgetLog | Followed


class _Slot:
    """The newest credit of a free slot and the one it replaced; whether the last heartbeat offered it. One that was withdrawn is honoured, since a
    lease may be quoting it, but never offered again."""

    def __init__(self) -> None:
        self.nonces: list[tuple[str, float]] = []
        self.offered = False


class _Lease:
    def __init__(self, seconds: float, answered: float, started: float) -> None:
        self.seconds = seconds
        self.answered = answered
        self.started = started
        self.interrupted = ""


def without_images(offers: Offers) -> Offers:
    """What is left of them when no container can be run."""
    return msgspec.structs.replace(offers, images=(), user=False, limits=False, privileged=False)


class Session:
    """One boot of a worker; of two boots the later has the greater `since`. `challenge` is the scheduler's last one; `draining`: it finishes what it
    has, and offers nothing; `leaving`: it takes nothing either."""

    def __init__(self, worker: str, boot: str, since: int, key: bytes, slots: int, offers: Offers, nonces: Callable[[], str], about: About) -> None:
        self.worker = worker
        self.boot = boot
        self.draining = False
        self.leaving = False
        self._since = since
        self._followed = False
        self._about = about
        self._key = key
        self._slots = slots
        self._offers = offers
        self._nonces = nonces
        self._free = [_Slot() for _ in range(slots)]
        self._leases: dict[Attempt, _Lease] = {}
        self._reported: dict[Attempt, int] = {}
        self.challenge = b""
        self._number = 0
        self._answered = 0
        self._answered_at = float("-inf")
        self._sent: dict[int, tuple[float, frozenset[Attempt]]] = {}
        self._cached: tuple[str, ...] = ()
        self._cached_told = b"", 1
        """The challenge that it is said with, and the number of the first heartbeat that does."""
        self._cached_heard = False

    @property
    def active(self) -> list[Attempt]:
        """Attempts that run."""
        return list(self._leases)

    @property
    def pulls(self) -> bool:
        """Whether each credit is asked for: what uses one is a reason to beat at once."""
        return self._about.mode == "pull"

    def on_heartbeat_due(
        self, now: float, logs: list[Attempt], cached: tuple[str, ...] = (), goodbye: bool = False, condition: Condition = FINE
    ) -> Heartbeat:
        """Renew what is old among the credits and say how things are. Every running attempt is listed, and every one with unrecorded reports."""
        credits = self._credits(now, condition)
        self._number += 1
        self._sent[self._number] = (now, frozenset(self._reported))
        if len(self._sent) > REMEMBERED_HEARTBEATS:
            del self._sent[next(iter(self._sent))]
        if cached != self._cached or self.challenge != self._cached_told[0]:
            self._cached, self._cached_told, self._cached_heard = cached, (self.challenge, self._number), False
        return Heartbeat(
            boot=self.boot,
            since=self._since,
            number=self._number,
            slots=self._slots,
            availability=Availability(
                challenge=self.challenge,
                offers=self._offers if not condition.no_images else without_images(self._offers),
                credits=credits,
                cached=None if self._cached_heard else cached,
            ),
            running=[Running(attempt, reported) for attempt, reported in self._reported.items()],
            logs=logs,
            draining=self.draining or self.leaving,
            goodbye=goodbye,
            busy=self._slots - len(self._free),
            trouble=condition.trouble[:MAX_SHORT],
            limited=self._limited(condition)[:MAX_SHORT],
            about=self._about,
            cache_used=condition.cache_used,
            cache_limit=condition.cache_limit,
        )

    def _limited(self, condition: Condition) -> str:
        """Why it takes less than it could, for people."""
        if self.pulls and condition.sated:
            return condition.sated
        return f"no images: {condition.no_images}" if condition.no_images else ""

    def _credits(self, now: float, condition: Condition) -> list[Credit]:
        closed = self.draining or self.leaving or condition.trouble or (self.pulls and condition.sated) or len(self._reported) >= MAX_SLOTS
        most = 0 if closed else 1 if self.pulls else self._slots
        credits: list[Credit] = []
        for number, slot in enumerate(self._free):
            offered, slot.offered = slot.offered, number < most
            if not slot.offered:
                continue
            if not offered or now - slot.nonces[-1][1] >= REPLACE_SECONDS:
                slot.nonces = [*slot.nonces[-1:], (self._nonces(), now)]
            credits.append(Credit(slot.nonces[-1][0], self._key))
        return credits

    def on_package(self, package: Package, now: float) -> Start | Refuse | None:
        """Take the slot of the credit that the package quotes. None: we have the attempt already."""
        if package.attempt in self._reported:
            return None
        if package.worker != self.worker:
            return Refuse("another worker's")
        if package.boot != self.boot:
            return Refuse("another boot's")
        if self.leaving:
            return Refuse("leaving")
        for slot in self._free:
            for nonce, offered in slot.nonces:
                if nonce == package.credit:
                    if now - offered >= CREDIT_SECONDS:
                        return Refuse("credit too old")
                    self._free.remove(slot)
                    self._leases[package.attempt] = _Lease(package.lease_seconds, max(offered, self._answered_at), now)
                    self._reported[package.attempt] = 0
                    return Start(package)
        return Refuse("no such credit")

    def on_control(self, control: Control) -> list[Action]:
        """Apply an answer, or an early word (number 0)."""
        if control.boot != self.boot:
            return []
        if control.number >= self._answered and control.challenge:
            self.challenge = control.challenge
        actions: list[Action] = [ForgetLog(log) for log in control.archived]
        if not control.challenge and not self._followed:
            self._followed = True
            actions.append(Followed())
        held = {}
        for word in control.held:
            held[word.attempt] = word
            if word.attempt not in self._reported:
                continue
            actions.append(Recorded(word.attempt, word.recorded))
            lease = self._leases.get(word.attempt)
            if lease is None:
                if word.recorded >= self._reported[word.attempt]:
                    actions += self._forget(word.attempt)
            elif word.interrupted and not lease.interrupted:
                lease.interrupted = word.interrupted
                actions.append(Interrupt(word.attempt, word.interrupted))
        sent = self._sent.get(control.number)
        if control.number and sent is not None:
            at, listed = sent  # of a heartbeat later than those that were answered, which are forgotten
            self.draining = control.drain
            self._answered = control.number
            self._answered_at = max(self._answered_at, at)
            self._cached_heard |= control.number >= self._cached_told[1]
            for number in [n for n in self._sent if n <= control.number]:
                del self._sent[number]
            for attempt in listed:
                if attempt in held:
                    lease = self._leases.get(attempt)
                    if lease is not None:
                        lease.answered = max(lease.answered, at)
                        lease.seconds = control.lease_seconds
                elif attempt in self._reported:
                    actions += self._lose(attempt, "not ours any more")
        return actions

    def on_reported(self, attempt: Attempt, number: int) -> None:
        """The attempt's reports up to `number` are made."""
        if attempt in self._reported:
            self._reported[attempt] = number

    def on_attempt_ended(self, attempt: Attempt) -> bool:
        """Its slot is free; the attempt stays listed until its reports are recorded. False if it had ended already."""
        if self._leases.pop(attempt, None) is None:
            return False
        self._free.append(_Slot())
        return True

    def on_replayed(self, attempt: Attempt, number: int) -> None:
        """An attempt that ended in an earlier boot, with reports up to `number` that may not be recorded."""
        self._reported[attempt] = number

    def on_time(self, now: float) -> list[Action]:
        """Give up the attempts that nobody has answered for. The clock may have jumped: then all of them go."""
        lost = [attempt for attempt, lease in self._leases.items() if now - lease.answered >= lease.seconds * LEASE_SHARE]
        return [action for attempt in lost for action in self._lose(attempt, "no answer for too long")]

    def _lose(self, attempt: Attempt, why: str) -> list[Action]:
        running = attempt in self._leases
        self.on_attempt_ended(attempt)
        return [*([Kill(attempt, why)] if running else []), *self._forget(attempt)]

    def _forget(self, attempt: Attempt) -> list[Action]:
        del self._reported[attempt]
        return [Forget(attempt)]
