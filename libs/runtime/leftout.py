"""Events that the bus does not take: too large for it, or with a name that it cannot carry. The log refuses to record such, so there is something
wrong with the bus, or with what somebody has put into the log by another way.

One of them must not stop all that come after it: whoever follows EVENTS decides on the log, in any order, and finds what the bus has lost by sweeping
the log. So the relay leaves it out, never silently, and offers it again until the bus takes it or it is gone. What was taken late stands behind later
ones in the stream, and may be lost when they are not: it is kept in mind until it has aged out of it.
"""

from collections.abc import Collection

import structlog

from libs.bus.bus import TooLarge

FINAL = (TooLarge, ValueError)
"""What the bus says of an event that it will not take next time either."""
MOST = 100
"""So many are left out; with more it is the bus that is wrong."""

logger = structlog.get_logger("relay")


class TooMany(Exception):
    """Nothing more is left out: the relay stands still."""


class LeftOut:
    """By position: what it is, and why it is not on the bus; or the sequence as which it was taken late."""

    def __init__(self) -> None:
        self._why: dict[int, str] = {}
        self._late: dict[int, int] = {}

    @property
    def positions(self) -> tuple[int, ...]:
        return tuple(sorted(self._why))

    @property
    def named(self) -> tuple[tuple[int, int], ...]:
        """As in a checkpoint: positions, with the sequence if it was taken late, or 0."""
        return tuple(sorted({**dict.fromkeys(self._why, 0), **self._late}.items()))

    def __len__(self) -> int:
        return len(self._why)

    def restore(self, named: Collection[tuple[int, int]]) -> None:
        """What an earlier relay named; why it was left out, is known when it is offered again."""
        self._why = {position: self._why.get(position, "it was left out before") for position, sequence in named if not sequence}
        self._late = {position: sequence for position, sequence in named if sequence}

    def add(self, position: int, event: str, error: BaseException) -> None:
        """Raises TooMany."""
        if position not in self._why:
            if len(self._why) >= MOST:
                raise TooMany(f"the bus takes none of {MOST + 1} events, the last of them {position} ({event}): {error}")
            logger.error("the bus does not take an event, and it is left out", position=position, stream=event, why=str(error))
        self._why[position] = f"{event}: {error}"

    def remove(self, position: int, why: str) -> None:
        logger.warning("an event is left out no more", position=position, why=why)
        del self._why[position]

    def taken(self, position: int, sequence: int) -> None:
        self.remove(position, "the bus has taken it")
        self._late[position] = sequence

    def rewind(self, position: int, sequence: int) -> None:
        """What is after that position will be published in its turn; what was taken late, and after that sequence, is lost."""
        lost = {at: "the bus has lost it" for at, taken in self._late.items() if taken > sequence}
        self._why = {at: why for at, why in (self._why | lost).items() if at <= position}
        self._late = {at: taken for at, taken in self._late.items() if at <= position and at not in lost}

    def forget_aged(self, first_sequence: int) -> None:
        """What the stream has let go of in its order is lost no more."""
        self._late = {at: taken for at, taken in self._late.items() if taken >= first_sequence}

    def __str__(self) -> str:
        first = min(self._why)
        more = f", and {len(self) - 1} more" if len(self) > 1 else ""
        return f"event {first} is not on the bus ({self._why[first]}){more}"
