"""Who was expelled: their connections to the bus are cut, whoever leads."""

from typing import Protocol

from services.scheduler.roster import Roster

KNOWS_SECONDS = 15.0
"""So long after it last read the log an instance still knows who may work here; it reads every 5 s, if nothing happens."""
CUT_SECONDS, CUT_EVERY = KNOWS_SECONDS + 5.0, 1.0
"""How long, and how often, the connections of one that was expelled are looked for: another instance may admit it until it has read as much."""


class Door(Protocol):
    """What admits workers to the bus, and ends their connections (`libs.bus.callout.Doorkeeper`): `look` whether it is known who is one, `cut` those
    of a worker and its key, `sweep` those of all who are no workers."""

    def look(self) -> None: ...

    def cut(self, worker: str, key: str) -> None: ...

    def sweep(self) -> None: ...


class Expelled:
    """`now` is monotonic seconds."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._looked_for: dict[tuple[str, str], tuple[float, float]] = {}
        """(worker, key): until when, and when next."""

    @property
    def names(self) -> set[str]:
        """Who was, lately."""
        return {name for name, _ in self._looked_for}

    def add(self, worker: str, key: str, now: float) -> None:
        """From now on it may not work by that key."""
        self._looked_for[worker, key] = now + CUT_SECONDS, now

    def cut(self, roster: Roster, now: float) -> None:
        """End the connections that are due to be looked for, but of those who may work again."""
        for (name, key), (until, due) in list(self._looked_for.items()):
            if now >= until or roster.key_of(name) == key:
                del self._looked_for[name, key]
            elif now >= due:
                self._looked_for[name, key] = until, now + CUT_EVERY
                self._door.cut(name, key)
