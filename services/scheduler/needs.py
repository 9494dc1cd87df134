"""What a stage wants and what a worker offers, in the same words: a worker is able when it offers every word that the stage wants. The words are
the ones people are told."""

from proto.image import RUNNABLE
from proto.messages import Offers
from proto.plan import Requirements

_ENGINE = "a container engine"
_USER = "run.user"
_LIMITS = "container_limits"
_PRIVILEGED = "privileged"


def wanted(requirements: Requirements) -> tuple[str, ...]:
    """In the order in which a worker that lacks several is refused. There is always a platform."""
    words = [f"platform {requirements.platform}"]
    if requirements.image is not None:
        words.append(_image(requirements.image))
    # Only for a container is anything of this kept.
    bare = "" if requirements.image is not None else " without an image"
    if requirements.user:
        words.append(_USER + bare)
    if requirements.limits:
        words.append(_LIMITS + bare)
    if requirements.privileged:
        words.append(_PRIVILEGED)
    return (*words, *(f"tag {tag}" for tag in requirements.tags))


def offered(offers: Offers) -> tuple[str, ...]:
    words = [f"platform {offers.platform}", *map(_image, offers.images), *(f"tag {tag}" for tag in offers.tags)]
    if offers.user:
        words.append(_USER)
    if offers.limits:
        words.append(_LIMITS)
    if offers.privileged:
        words.append(_PRIVILEGED)
    return tuple(words)


def _image(kind: str) -> str:
    known = f"{_ENGINE} for {kind}" if kind in RUNNABLE else f"image_resource of type {kind}"
    return _ENGINE if kind == "image" else known
