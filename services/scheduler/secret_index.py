"""Which secrets teams have, which of them a stage needs, and what the gateway seals to, as a fold of the log. No values. Pure."""

from collections import deque

import msgspec

from proto.events.secret import SecretRemoved, SecretSet
from proto.plan import Stage
from proto.secrets import OWN, stage_references


class Secret(msgspec.Struct, frozen=True):
    """The version that counts, and under what it is stored."""

    version: int
    entry: str


class SealingKey(msgspec.Struct, frozen=True):
    """What the gateway seals to by now: under what the private key is stored, the id of the master key that was first, and when (unix seconds)."""

    version: int
    entry: str
    master: str
    made_at: float


class Entry(msgspec.Struct, frozen=True):
    """Where a value is stored, and whose it is. Of what is kept for one build the entry is the name."""

    entry: str
    team: str
    name: str
    build: str = ""


class Wanted(msgspec.Struct, frozen=True):
    """What a stage refers to: where it is stored, by name (None: it is not set), and the versions of those that have versions."""

    entries: dict[str, Entry | None] = {}
    versions: dict[str, int] = {}


class SecretIndex:
    """`of_team` by team and name; `sealing` is the latest key (None: there was none yet); `over` are builds that have ended, for whoever
    drains it."""

    def __init__(self, of_team: dict[str, dict[str, Secret]] | None = None, sealing: SealingKey | None = None) -> None:
        self.of_team = of_team if of_team is not None else {}
        self.sealing = sealing
        self.over: deque[str] = deque(maxlen=10_000)

    def apply(self, team: str, event: SecretSet | SecretRemoved) -> None:
        """Fold one event."""
        match event:
            case SecretSet():
                self.of_team.setdefault(team, {})[event.name] = Secret(event.version, event.entry)
            case SecretRemoved():
                self.of_team.get(team, {}).pop(event.name, None)

    def get(self, team: str, name: str) -> Secret | None:
        return self.of_team.get(team, {}).get(name)

    def wanted(self, team: str, build: str, stage: Stage) -> Wanted:
        """As of now. A build's own are there for it alone."""
        entries: dict[str, Entry | None] = {}
        versions: dict[str, int] = {}
        for name in sorted(stage_references(stage)):
            secret = self.get(team, name)
            if secret is not None:
                entries[name], versions[name] = Entry(secret.entry, team, name), secret.version
            else:
                entries[name] = Entry(name, team, name, build) if name.startswith(f"{OWN}{build}/") else None
        return Wanted(entries, versions)
