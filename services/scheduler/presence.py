"""The workers as this instance hears them: heartbeats that are signed, and who waits for an answer."""

from collections.abc import Callable

import msgspec
import structlog
from msgspec.structs import replace

from libs.tokens import BadSignature, verify
from proto.messages import Heartbeat, Signed
from services.scheduler.challenges import Challenges
from services.scheduler.fleet import Fleet, Worker
from services.scheduler.roster import Roster

logger = structlog.get_logger()

_SIGNED = msgspec.msgpack.Decoder(Signed)
_HEARTBEAT = msgspec.msgpack.Decoder(Heartbeat)


class Presence:
    """`heard` are the workers whose heartbeat nobody has answered yet, `strangers` those whose boot another has followed, as the log
    has it. `refused` counts heartbeats that were nobody's."""

    def __init__(self, roster: Callable[[], Roster], clock: Callable[[], float]) -> None:
        self._roster = roster
        self._clock = clock
        self.fleet = Fleet()
        self.challenges = Challenges(clock())
        self.heard: dict[str, Worker] = {}
        self.strangers: dict[str, Heartbeat] = {}
        self.refused = 0

    def hear(self, subject: str, data: bytes) -> bool:
        """Take note of one heartbeat, `presence.<worker>`; whether it wants an answer. One that its worker did not sign is nobody's."""
        name = subject.partition(".")[2]
        member = self._roster().get(name)
        if member is None:
            self.refused += 1
            logger.warning("a heartbeat of an unknown worker", worker=name)
            return False
        try:
            heartbeat = _HEARTBEAT.decode(verify(member.key, "presence", _SIGNED.decode(data)))
        except (BadSignature, msgspec.MsgspecError) as error:
            self.refused += 1
            logger.warning("a heartbeat that is not its worker's", worker=name, exc_info=error)
            return False
        if member.tags:
            offers = replace(heartbeat.availability.offers, tags=member.tags)
            heartbeat = replace(heartbeat, availability=replace(heartbeat.availability, offers=offers))
        if heartbeat.rank < member.latest:
            self.strangers[name] = heartbeat
            return True
        trusted = self.challenges.knows(heartbeat.availability.challenge)
        worker = self.fleet.on_heartbeat(name, heartbeat, trusted, self._clock())
        if worker is None:
            return False
        self.fleet.drain(name, member.draining)
        self.heard[name] = worker
        return True

    def recent(self, seconds: float) -> dict[str, Worker]:
        """Who was heard of within so many seconds."""
        since = self._clock() - seconds
        return {worker.name: worker for worker in self.fleet if worker.heard >= since}

    def forget_expelled(self) -> None:
        """Who may not work here any more, as the log has just come to say, is not there: the very turn that reads of it gives it nothing."""
        roster = self._roster()
        for name, key in roster.news:
            if key and roster.key_of(name) != key:
                self.dismiss(name)
                self.fleet.forget(name)

    def forget_followed(self) -> None:
        """Whom another has followed, as the log has come to say, is not there."""
        for worker in list(self.fleet):
            member = self._roster().get(worker.name)
            if member is not None and worker.heartbeat.rank < member.latest:
                self.dismiss(worker.name)

    def forget_silent(self, seconds: float) -> None:
        """Whom nobody has heard of for so long is not there; whoever leads does this for itself, with evidence."""
        since = self._clock() - seconds
        for worker in [worker for worker in self.fleet if worker.heard < since]:
            self.fleet.remove(worker.name)

    def dismiss(self, name: str) -> None:
        """Nothing that it said counts any more."""
        self.fleet.remove(name)
        self.heard.pop(name, None)
        self.strangers.pop(name, None)

    def take_heard(self) -> dict[str, Worker]:
        heard, self.heard = self.heard, {}
        return heard

    def keep_heard(self, heard: dict[str, Worker]) -> None:
        """They could not be answered; whoever was heard of since counts as it was heard last."""
        self.heard = heard | self.heard

    def take_strangers(self) -> dict[str, Heartbeat]:
        strangers, self.strangers = self.strangers, {}
        return strangers
