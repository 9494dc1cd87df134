"""What workers said of themselves last. Every instance of the gateway hears all heartbeats, keeps the newest of each worker unread, and reads one
when somebody asks: that they are signed by their worker matters only then."""

from collections.abc import Callable

import msgspec

from libs.bus.bus import Bus
from libs.tokens import BadSignature, verify
from proto.messages import Heartbeat, Signed

MANY = 20_000
"""Workers that are remembered."""

_SIGNED = msgspec.msgpack.Decoder(Signed)
_HEARTBEAT = msgspec.msgpack.Decoder(Heartbeat)


class Heard(msgspec.Struct, frozen=True):
    """A worker's own word, and when it came (unix seconds)."""

    heartbeat: Heartbeat
    at: float


class Presence:
    """`now` is unix seconds."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._newest: dict[str, tuple[bytes, float]] = {}
        self._read: dict[str, tuple[bytes, str, Heartbeat | None]] = {}

    async def listen(self, bus: Bus) -> None:
        """Hear them, for ever."""
        async with bus.listen("presence.*") as messages:
            async for message in messages:
                self.hear(message.subject.partition(".")[2], message.data)

    def hear(self, worker: str, data: bytes) -> None:
        """Keep it, and forget who was silent longest when there are too many."""
        self._newest.pop(worker, None)
        self._newest[worker] = bytes(data), self._now()
        if len(self._newest) > MANY:
            silent = next(iter(self._newest))
            del self._newest[silent]
            self._read.pop(silent, None)

    def of(self, worker: str, key: str, boot: str) -> Heard | None:
        """What it said last; None when nothing was heard of it, or nothing that bears `key` and is of its present `boot`."""
        if (newest := self._newest.get(worker)) is None:
            return None
        data, at = newest
        known = self._read.get(worker)
        if known is None or known[:2] != (data, key):
            known = self._read[worker] = data, key, _verified(key, data)
        heartbeat = known[2]
        return Heard(heartbeat, at) if heartbeat is not None and heartbeat.boot == boot else None


def _verified(key: str, data: bytes) -> Heartbeat | None:
    try:
        return _HEARTBEAT.decode(verify(key, "presence", _SIGNED.decode(data)))
    except (BadSignature, msgspec.MsgspecError, ValueError):
        return None
