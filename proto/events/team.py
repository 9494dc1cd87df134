"""`team-<team>`: who may do what. Owned by the gateway."""

from typing import Literal

from proto.events.base import Event

Role = Literal["owner", "member", "viewer"]


class TeamCreated(Event, frozen=True, kw_only=True):
    """The gateway, once a team: the team exists."""

    name: str


class TokenIssued(Event, frozen=True, kw_only=True):
    """The gateway: whoever shows the token with this SHA-256 (hex) acts for the team in this role."""

    token_id: str
    sha256: str
    role: Role
    description: str = ""
