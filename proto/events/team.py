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


class TeamPolicySet(Event, frozen=True, kw_only=True):
    """The gateway, when an owner asks: from now on the team's uploads are kept `input_seconds`, what its builds make `output_seconds`, and all that
    it stores takes at most `quota_bytes` (0: no limit). What was sealed before keeps its time. `privileged`: its steps may be, on
    workers that allow it."""

    input_seconds: int
    output_seconds: int
    quota_bytes: int
    privileged: bool = False


DEFAULT_POLICY = TeamPolicySet(input_seconds=12 * 3600, output_seconds=30 * 86400, quota_bytes=0)
"""What holds for a team that has set none."""
