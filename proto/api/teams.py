"""Teams, their policies and tokens; and the server itself."""

from typing import Annotated

import msgspec

from proto.api.bodies import Answer, Lifetime, Request
from proto.events.team import Role
from proto.private import Private


class Policy(Request, frozen=True, kw_only=True):
    """How long a team's uploads (`input_seconds`) and its builds' outputs are kept unless they say otherwise, and how many bytes all that it
    stores may take (0: no limit). `privileged`: its steps may be, on workers that allow it; owners of the first team may grant that."""

    input_seconds: Lifetime
    output_seconds: Lifetime
    quota_bytes: Annotated[int, msgspec.Meta(ge=0, le=1 << 60)]
    privileged: bool = False


class NewToken(Request, frozen=True, kw_only=True):
    """Issue a token for a team. owner: may issue tokens; member: may upload, build and abort; viewer: may look."""

    role: Role
    description: Annotated[str, msgspec.Meta(max_length=200)] = ""


class Token(Private, Answer, frozen=True, kw_only=True):
    """A new token. `token` is shown this once: the server keeps only its SHA-256."""

    id: str
    token: str
    team: str
    role: Role
    description: str = ""


class Team(Answer, frozen=True, kw_only=True):
    """A tenancy boundary: everything belongs to one team."""

    name: str


class Info(Answer, frozen=True, kw_only=True, omit_defaults=True):
    """The server's version and, with a token, whose it is: `teams` lists the one team of the token."""

    version: str
    teams: list[str] = []
    team: str = ""
    role: Role | None = None
