"""Events that the bus does not take: too large for it, or with a name that it cannot carry. The log refuses to record such, so there is something
wrong with the bus, or with what somebody has put into the log by another way.

One of them must not stop all that come after it: whoever follows EVENTS decides on the log, in any order, and finds what the bus has lost by sweeping
the log. So the relay leaves it out, never silently, and offers it again until the bus takes it or it is gone.
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
    """By position: what it is, and why it is not on the bus."""

    def __init__(self) -> None:
        self._why: dict[int, str] = {}

    @property
    def positions(self) -> tuple[int, ...]:
        return tuple(sorted(self._why))

    def __len__(self) -> int:
        return len(self._why)

    def restore(self, positions: Collection[int]) -> None:
        """What an earlier relay left out; why, is known when they are offered again."""
        self._why = {position: self._why.get(position, "it was left out before") for position in positions}

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

    def forget_after(self, position: int) -> None:
        """They will be published in their turn."""
        self._why = {at: why for at, why in self._why.items() if at <= position}

    def __str__(self) -> str:
        first = min(self._why)
        more = f", and {len(self) - 1} more" if len(self) > 1 else ""
        return f"event {first} is not on the bus ({self._why[first]}){more}"
