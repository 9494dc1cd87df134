"""Streams as far as this code can read them: what one bad event, or one of a newer version, says of anything is not known, and stops nobody."""

from collections.abc import Mapping, Sequence

import msgspec
import structlog

from proto.catalogue import UnknownEvent, decode
from proto.envelope import Recorded
from proto.events.base import Event

logger = structlog.get_logger()


def readable(streams: Mapping[str, Sequence[Recorded]]) -> dict[str, list[Event]]:
    """The events of each stream, by its name; those with one that cannot be read are left out: whoever folds them names it."""
    found: dict[str, list[Event]] = {}
    for name, rows in streams.items():
        try:
            found[name] = [decode(row.type, row.data) for row in rows]
        except (UnknownEvent, msgspec.MsgspecError) as error:
            logger.debug("a stream cannot be read", stream=name, error=f"{type(error).__name__}: {error}")
    return found
