"""The workers as this instance hears them: heartbeats that are signed, and who waits for an answer."""

from collections.abc import Callable, Mapping

import msgspec
import structlog

from libs.tokens import BadSignature, verify
from proto.messages import Heartbeat, Signed
from services.scheduler.challenges import Challenges
from services.scheduler.fleet import Fleet, Worker

logger = structlog.get_logger()

_SIGNED = msgspec.msgpack.Decoder(Signed)
_HEARTBEAT = msgspec.msgpack.Decoder(Heartbeat)


class Presence:
    """`heard` are the workers whose heartbeat nobody has answered yet, `strangers` those whose boot another has followed."""

    def __init__(self, worker_keys: Mapping[str, str], clock: Callable[[], float]) -> None:
        self._worker_keys = worker_keys
        self._clock = clock
        self.fleet = Fleet()
        self.challenges = Challenges(clock())
        self.heard: dict[str, Worker] = {}
        self.strangers: dict[str, Heartbeat] = {}

    def hear(self, subject: str, data: bytes) -> bool:
        """Take note of one heartbeat, `presence.<worker>`; whether it wants an answer. One that its worker did not sign is nobody's."""
        name = subject.partition(".")[2]
        key = self._worker_keys.get(name)
        if key is None:
            logger.warning("a heartbeat of an unknown worker", worker=name)
            return False
        try:
            heartbeat = _HEARTBEAT.decode(verify(key, "presence", _SIGNED.decode(data)))
        except (BadSignature, msgspec.MsgspecError) as error:
            logger.warning("a heartbeat that is not its worker's", worker=name, exc_info=error)
            return False
        trusted = self.challenges.knows(heartbeat.challenge)
        worker = self.fleet.on_heartbeat(name, heartbeat, trusted, self._clock())
        if worker is not None:
            self.heard[name] = worker
            return True
        known = self.fleet.get(name)
        if known is None or known.heartbeat.boot == heartbeat.boot:
            return False
        self.strangers[name] = heartbeat
        return True

    def take_heard(self) -> dict[str, Worker]:
        heard, self.heard = self.heard, {}
        return heard

    def take_strangers(self) -> dict[str, Heartbeat]:
        strangers, self.strangers = self.strangers, {}
        return strangers
