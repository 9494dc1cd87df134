"""`request-<key>`: a client's wishes. Owned by the gateway; the stream is named by the idempotency key, so a repeat is the same request."""

from proto.events.base import ArtifactRef, Event
from proto.plan import Plan


class BuildRequested(Event, frozen=True, kw_only=True):
    """The gateway, before it answers a POST: the build will exist and end exactly once. `body_mac` tells a repeat from another request; it is keyed,
    because the body may hold secrets that could be guessed from a plain digest. Its outputs are kept `keep_seconds` (0: as the team's policy says;
    -1: for ever)."""

    build: str
    plan: Plan
    inputs: dict[str, ArtifactRef] = {}
    name: str = ""
    body_mac: str = ""
    keep_seconds: int = 0


class BuildAbortRequested(Event, frozen=True, kw_only=True):
    """The gateway: a client wants the build to stop. builds decides what comes of it."""

    build: str
