"""References to container images: `[registry[:port]/]repository[:tag][@digest]`, as everyone writes them. Pure."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

_HOST = r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9a-fA-F:]+\])(?::[0-9]{1,5})?"
_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_TAG = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}"
_DIGEST = r"sha256:[0-9a-f]{64}"
_REFERENCE = re.compile(rf"(?:({_HOST})/)?({_PART}(?:/{_PART})*)(?::({_TAG}))?(?:@({_DIGEST}))?")
_DEFAULT_REGISTRY = "docker.io"
_LONGEST = 512

RUNNABLE = ("docker-image", "image", "registry-image")
"""The types of image that `reference_of` understands; `image` is a plain reference."""


class BadImage(ValueError):
    """No image can be named so; the text says what is wrong with it."""


class Reference(NamedTuple):
    """With a digest the tag says nothing any more."""

    registry: str
    repository: str
    tag: str
    digest: str

    @property
    def name(self) -> str:
        return f"{self.registry}/{self.repository}"

    def __str__(self) -> str:
        return f"{self.name}@{self.digest}" if self.digest else f"{self.name}:{self.tag}"


def parse_image(text: str) -> Reference:
    """Whole: registry and tag are filled in. `host:5000/img` has a port, `img:5000` a tag. Raises BadImage."""
    if len(text) > _LONGEST:
        raise BadImage(f"an image's name has at most {_LONGEST} letters")
    match = _REFERENCE.fullmatch(text)
    # The first part of a path is a host if it could be nothing else.
    if match and match[1] and not (set(".:") & set(match[1]) or match[1] == "localhost"):
        match = re.fullmatch(rf"()({_PART}(?:/{_PART})*)(?::({_TAG}))?(?:@({_DIGEST}))?", text)
    if match is None:
        raise BadImage(f"`{text}` names no image: it is [registry[:port]/]repository[:tag][@sha256:…], the repository in lower case")
    registry, repository, tag, digest = match[1] or _DEFAULT_REGISTRY, match[2], match[3] or "latest", match[4] or ""
    if registry == _DEFAULT_REGISTRY and "/" not in repository:
        repository = f"library/{repository}"
    return Reference(registry, repository, tag, digest)


def reference_of(kind: str, source: Mapping[str, Any], version: Mapping[str, str] | None) -> Reference:
    """What an `image_resource` of a type among RUNNABLE names: Concourse's `repository`, `tag` and `version.digest`. Raises BadImage."""
    if kind not in RUNNABLE:
        raise BadImage(f"images of type `{kind}` cannot be run: only {', '.join(RUNNABLE)} can")
    repository, tag, digest = source.get("repository"), source.get("tag"), (version or {}).get("digest")
    if not isinstance(repository, str):
        raise BadImage("source.repository: must name the image")
    found = parse_image(repository)
    if tag is not None:
        # A tag such as 3.10 is a number to YAML.
        found = found._replace(tag=parse_image(f"x:{tag}").tag)
    return found._replace(digest=parse_image(f"x@{digest}").digest) if digest else found
