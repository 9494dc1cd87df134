"""What all bodies of the public API have in common, and what several of them hold."""

from typing import Annotated

import msgspec

TeamName = Annotated[
    str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$(?!\n)", description="lower-case letters, digits and `-`; at most 63, the first no `-`")
]


class Request(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A body that a client sends."""


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """A body that the gateway answers."""


LONGEST = 100 * 365 * 86400
"""Seconds that a lifetime may be."""
Lifetime = Annotated[int, msgspec.Meta(ge=1, le=LONGEST)]


class ProblemDetails(Answer, frozen=True, kw_only=True):
    """RFC 9457. `path` names the part of the request that is meant, `position` the byte or character at which JSON ends to be JSON."""

    type: str
    title: str
    status: int
    detail: str = ""
    path: str = ""
    position: int | None = None
