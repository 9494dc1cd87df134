"""The scheduler's word that a worker must quote: credits count only if their heartbeat answers a recent challenge of this very instance."""

import hmac
import secrets

LIFE = 30.0
"""Seconds for which a challenge is given out; for as long again it is still good."""


class Challenges:
    """`now` is monotonic seconds."""

    def __init__(self, now: float) -> None:
        self._current = secrets.token_bytes(16)
        self._before = self._current
        self._since = now

    def current(self, now: float) -> bytes:
        """What to give out."""
        if now - self._since > LIFE:
            self._before, self._current, self._since = self._current, secrets.token_bytes(16), now
        return self._current

    def knows(self, challenge: bytes) -> bool:
        return any(hmac.compare_digest(challenge, known) for known in (self._current, self._before))
