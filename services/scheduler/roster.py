"""Who may be a worker, as a fold of the gateway's `fleet-` streams. Pure."""

from collections import deque
from collections.abc import Iterable

import msgspec
from msgspec.structs import replace

from proto.events.base import Event
from proto.events.fleet import WorkerDeleted, WorkerDrained, WorkerRegistered, WorkerResumed, WorkerRevoked
from proto.messages import Rank

_WORKER = "worker-"
NEVER: Rank = 0, ""
"""Before every boot."""


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """`key` is the worker's public key; `tags`, if there are any, are all that it has, whatever it says; `barred` says why it is not heard any more
    ("" if it is); `latest` its latest boot since it was registered."""

    key: str
    tags: tuple[str, ...] = ()
    draining: bool = False
    barred: str = ""
    latest: Rank = NEVER


class Roster:
    """Fold events with `apply`; drain `news`, the workers that something has happened to, with the key that they had. `revoked` are keys that nobody
    works by any more, by whatever name and token they may come back."""

    def __init__(self, members: dict[str, Member] | None = None, revoked: Iterable[str] = ()) -> None:
        self.members = members or {}
        self.revoked = set(revoked)
        self.news: deque[tuple[str, str]] = deque(maxlen=10_000)

    def get(self, name: str) -> Member | None:
        """A worker that may work here."""
        return None if self.barred(name) else self.members[name]

    def key_of(self, name: str) -> str | None:
        """Its public key; None for who may not."""
        member = self.get(name)
        return member.key if member else None

    def barred(self, name: str) -> str:
        """Why one may not; "" if it may."""
        member = self.members.get(name)
        if member is None:
            return "is not registered"
        return member.barred or ("bears a key that was revoked" if member.key in self.revoked else "")

    def draining(self, name: str) -> bool:
        member = self.members.get(name)
        return member is not None and member.draining

    def on_boot(self, name: str, rank: Rank) -> bool:
        """A boot was recorded; whether it is the worker's latest."""
        member = self.members.get(name)
        if member is not None and rank < member.latest:
            return False
        if member is not None:
            self.members[name] = replace(member, latest=rank)
        return True

    def apply(self, stream_id: str, event: Event) -> None:
        """What was recorded on `fleet-<stream_id>`."""
        if not stream_id.startswith(_WORKER):
            return
        name = stream_id.removeprefix(_WORKER)
        known = self.members.get(name)
        match event:
            case WorkerRegistered():
                self.members[name] = Member(key=event.key, tags=event.tags)
            case WorkerDrained() if known is not None:
                self.members[name] = replace(known, draining=True)
            case WorkerResumed() if known is not None:
                self.members[name] = replace(known, draining=False)
            case WorkerRevoked() if known is not None:
                self.members[name] = replace(known, barred=f"was revoked: {event.reason}" if event.reason else "was revoked")
                self.revoked.add(known.key)
                self.news.extend((other, known.key) for other, member in self.members.items() if member.key == known.key and other != name)
            case WorkerDeleted():
                self.members.pop(name, None)
            case _:
                return
        self.news.append((name, known.key if known is not None else ""))
