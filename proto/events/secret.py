"""`secret-<hash of team and name>`: which secrets a team has; never what they are. Owned by the scheduler, which keeps the values, encrypted,
beside the log. What the gateway keeps for one build without being asked has no events: it lives and dies with the build."""

from proto.events.base import Event


class SecretSet(Event, frozen=True, kw_only=True):
    """The scheduler, once the value is stored: from now on `((name))` in the team's plans is version `version` (they count from 1), kept as `entry`.
    `by` is who asked."""

    name: str
    version: int
    entry: str
    by: str = ""


class SecretRemoved(Event, frozen=True, kw_only=True):
    """The scheduler, when an owner asks: the team has no such secret any more, and no value of it can be read."""

    name: str
    version: int
    by: str = ""
