"""`secret-<hash of team and name>`: which secrets a team has; never what they are. Owned by the scheduler, which keeps the values, encrypted,
beside the log. What the gateway keeps for one build without being asked has no events: it lives and dies with the build. One stream is the
schedulers' own: the keys to which the gateway seals what it passes on."""

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


class SealingKeyMade(Event, frozen=True, kw_only=True):
    """The scheduler: what the gateway seals is from now on sealed to the public key `key`, and names `entry`, under which the private one is kept
    as the secrets are. They count from 1. `master` is the id of the master key that was first. `by` is who asked ("scheduler": it was due)."""

    version: int
    entry: str
    key: str
    master: str
    by: str = ""
