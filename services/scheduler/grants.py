"""When each lease was given or last shown by a heartbeat, and what may still be sent for it. Pure: `now` is monotonic seconds."""

from collections.abc import Collection

import msgspec

from proto.messages import CREDIT_SECONDS, Attempt, Credit
from services.scheduler.board import Lease

RESEND = 1.0
"""Seconds after which a package that a heartbeat does not show is sent again."""


class _Grant(msgspec.Struct):
    since: float
    credit: Credit | None
    sent: float
    shown: bool = False


class Grants:
    """`note` what this instance leases; leases of others are noted when they are first asked about, and their packages cannot be sent again."""

    def __init__(self) -> None:
        self._grants: dict[Attempt, _Grant] = {}

    def note(self, attempt: Attempt, credit: Credit | None, now: float) -> None:
        self._grants[attempt] = _Grant(now, credit, now)

    def forget(self, attempt: Attempt) -> None:
        """It was not leased after all."""
        self._grants.pop(attempt, None)

    def shown(self, attempt: Attempt, now: float) -> None:
        """Its worker holds it."""
        self._grants[attempt] = _Grant(now, None, now, True)

    def since(self, attempt: Attempt, now: float) -> float:
        """When it was given or shown; now, if nothing is known of it."""
        return self._grant(attempt, now).since

    def given_up(self, lease: Lease, now: float, listening_since: float) -> str:
        """Why a worker that lives and does not list it never will; "" if it may yet: until it was shown, what is heard may be from before it was
        taken, above all by a process that did not listen for a while."""
        grant = self._grant(lease.attempt, now)
        waited = now - max(grant.since, listening_since)
        if grant.shown and waited > RESEND:
            return f"worker {lease.worker} gave it up"
        if waited <= CREDIT_SECONDS + 1:
            return ""
        return f"worker {lease.worker} gave it up" if lease.recorded else f"worker {lease.worker} never took it"

    def to_send_again(self, attempt: Attempt, now: float) -> Credit | None:
        """The credit of a package that is due again, and counts as sent now."""
        grant = self._grant(attempt, now)
        if grant.credit is None or now - grant.sent <= RESEND:
            return None
        grant.sent = now
        return grant.credit

    def forget_all_but(self, attempts: Collection[Attempt]) -> None:
        self._grants = {attempt: grant for attempt, grant in self._grants.items() if attempt in attempts}

    def _grant(self, attempt: Attempt, now: float) -> _Grant:
        if attempt not in self._grants:
            self.note(attempt, None, now)
        return self._grants[attempt]
