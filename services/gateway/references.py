"""What a build's input may be named by: `ID`, `artifact:ID[/path]` or `build:N/output[/path]`. Pure."""

import msgspec


class OfArtifact(msgspec.Struct, frozen=True):
    """An artifact, or what lies at `path` in it ("": all of it)."""

    artifact: str
    path: str = ""


class OfBuild(msgspec.Struct, frozen=True):
    """An output of a build, by its number or id, or what lies at `path` in it."""

    build: str
    output: str
    path: str = ""


Wanted = OfArtifact | OfBuild


def wanted(text: str) -> Wanted:
    """What the reference means. Raises ValueError with the rule that it breaks."""
    kind, colon, rest = text.partition(":")
    if not colon:
        return OfArtifact(text)
    first, _, below = rest.partition("/")
    match kind:
        case "artifact" if first:
            return OfArtifact(first, below.strip("/"))
        case "build":
            output, _, path = below.partition("/")
            if first and output:
                return OfBuild(first, output, path.strip("/"))
    raise ValueError("must be an artifact's id, `artifact:ID[/path]` or `build:N/output[/path]`")


def names_part(text: str) -> bool:
    """Whether a part of an artifact is meant, if anything is."""
    try:
        return bool(wanted(text).path)
    except ValueError:
        return False
