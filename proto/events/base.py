"""What every event is."""

import re
from typing import Annotated, Literal

import msgspec

Status = Literal["succeeded", "failed", "errored", "aborted"]
"""How a step, a stage or a build ended. failed: the task said no; errored: it could not be run to its end."""


class Event(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A fact. Added fields need defaults; a breaking change is a new tag and an upcast."""


class Value(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A part of an event."""


class ArtifactRef(Value, frozen=True, kw_only=True):
    """A claim check for a tree of files: `digest` is the sha256 of its manifest, `size` the bytes of its files."""

    id: Annotated[str, msgspec.Meta(max_length=256)]
    digest: Annotated[str, msgspec.Meta(max_length=256)]
    size: Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)] = 0
    files: Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)] = 0


def tag_of(cls: type) -> str:
    """`StageLeased` → `stage.leased`, `BuildAbortRequested` → `build.abort_requested`. Tags are the storage format."""
    first, *rest = re.findall(r"[A-Z][a-z0-9]*", cls.__name__)
    return f"{first.lower()}.{'_'.join(word.lower() for word in rest)}"
