"""Whom attempts were leased to, read from the lease streams when a report is the first of its attempt."""

from collections import OrderedDict
from collections.abc import Sequence

import msgspec
import structlog

from libs.bus.bus import Message
from libs.eventlog.log import EventLog
from proto.catalogue import TAGS, decode
from proto.envelope import Recorded
from proto.events.lease import StageLeased
from proto.messages import Attempt
from services.builds.reactions import Lease

logger = structlog.get_logger()


class _Key(msgspec.Struct):
    attempt: Attempt


_KEY = msgspec.msgpack.Decoder(_Key)


def _leased(recorded: Recorded) -> StageLeased | None:
    """None for other events, and for one that cannot be read: then nobody holds that lease, and nobody else's reports wait for it."""
    if recorded.type != TAGS[StageLeased]:
        return None
    try:
        event = decode(recorded.type, recorded.data)
    except msgspec.MsgspecError as error:
        logger.error("a lease cannot be read", position=recorded.position, stream=recorded.stream, exc_info=error)
        return None
    assert isinstance(event, StageLeased)
    return event


class Leases:
    """A cache over the lease streams. The lease is recorded before its package is sent, so a report never truly overtakes it."""

    def __init__(self, log: EventLog, cached: int = 20_000) -> None:
        self._log = log
        self._cached = cached
        self._leases: OrderedDict[Attempt, Lease] = OrderedDict()

    def of(self, attempt: Attempt) -> Lease | None:
        return self._leases.get(attempt)

    async def load(self, messages: Sequence[Message]) -> None:
        """Make sure that the leases of all these reports are known; one query for all that are not."""
        unknown: set[str] = set()
        for message in messages:
            try:
                attempt = _KEY.decode(message.data).attempt
            except msgspec.MsgspecError:
                continue  # on_report refuses it, and the message is parked
            if attempt not in self._leases:
                unknown.add(attempt.build)
        if not unknown:
            return
        for history in (await self._log.read_streams([f"lease-{build}" for build in unknown])).values():
            for recorded in history:
                if (event := _leased(recorded)) is not None:
                    attempt = Attempt(recorded.stream.removeprefix("lease-"), event.stage, event.attempt)
                    self._leases[attempt] = Lease(event.worker, recorded.team, recorded.correlation_id, recorded.event_id)
        while len(self._leases) > self._cached:
            self._leases.popitem(last=False)
