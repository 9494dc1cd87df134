"""`fleet-token-<id>` and `fleet-worker-<name>`: who may be a worker. Owned by the gateway."""

from proto.events.base import Event


class RegistrationTokenIssued(Event, frozen=True, kw_only=True):
    """The gateway, when an owner of the first team asks: whoever shows the token with this SHA-256 (hex) before `expires_at` (unix seconds) may
    register one worker, which has these tags."""

    token_id: str
    sha256: str
    expires_at: float
    tags: tuple[str, ...] = ()
    description: str = ""


class RegistrationTokenUsed(Event, frozen=True, kw_only=True):
    """The gateway: this worker, by this key, is registered by it; it is good for nothing else any more."""

    worker: str
    key: str


class WorkerRegistered(Event, frozen=True, kw_only=True):
    """The gateway: `key` (Ed25519, base64url) is this worker's, from now on. `tags`, if there are any, are all that it has. `token_id`: by
    which token ("" when the deployment named it)."""

    worker: str
    key: str
    tags: tuple[str, ...] = ()
    token_id: str = ""


class WorkerDrained(Event, frozen=True, kw_only=True):
    """The gateway, when the owner asks: it finishes what it runs, and gets nothing new."""

    reason: str = ""


class WorkerResumed(Event, frozen=True, kw_only=True):
    """The gateway, when the owner asks: it gets work again."""


class WorkerRevoked(Event, frozen=True, kw_only=True):
    """The gateway, when the owner asks: nothing that bears its key is heard any more, and its leases are over."""

    reason: str = ""


class WorkerDeleted(Event, frozen=True, kw_only=True):
    """The gateway, when the owner asks: the name is free for another key."""
