"""An event with its place in the log, as a decider, a reaction or a projection sees it, and as it travels on the bus."""

from collections.abc import Iterable, Iterator
from datetime import datetime

import msgspec

from proto.catalogue import TAGS, UnknownEvent, category_of, decode
from proto.events.base import Event


class Recorded(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A row of the log. `position` is its place in the log, `version` in its stream (from 1); `data` the exact bytes appended (JSON)."""

    position: int
    stream: str
    version: int
    event_id: str
    type: str
    data: bytes
    team: str
    correlation_id: str
    causation_id: str
    actor: str
    recorded_at: datetime


class Fact(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A recorded event, decoded."""

    position: int
    stream: str
    version: int
    event_id: str
    team: str
    correlation_id: str
    causation_id: str
    actor: str
    recorded_at: datetime
    event: Event

    @property
    def tag(self) -> str:
        return TAGS[type(self.event)]

    @property
    def subject_id(self) -> str:
        """What the stream is about: `build-1f…` → `1f…`."""
        return self.stream.partition("-")[2]


def fact(recorded: Recorded) -> Fact:
    """Decode a row. Raises UnknownEvent for a tag this code does not know."""
    return Fact(
        position=recorded.position,
        stream=recorded.stream,
        version=recorded.version,
        event_id=recorded.event_id,
        team=recorded.team,
        correlation_id=recorded.correlation_id,
        causation_id=recorded.causation_id,
        actor=recorded.actor,
        recorded_at=recorded.recorded_at,
        event=decode(recorded.type, recorded.data),
    )


class UnreadableEvent(Exception):
    """Names an event of the log that this code cannot read: it is of a newer version, or is not what it should be."""

    def __init__(self, recorded: Recorded, why: Exception) -> None:
        super().__init__(f"event {recorded.position} ({recorded.type} on {recorded.stream}) cannot be read: {type(why).__name__}: {why}")
        self.position = recorded.position


def facts(rows: Iterable[Recorded]) -> Iterator[Fact]:
    """Decode what was read of a stream, to act on it. Raises UnreadableEvent."""
    for recorded in rows:
        try:
            yield fact(recorded)
        except (UnknownEvent, msgspec.MsgspecError) as error:
            raise UnreadableEvent(recorded, error) from error


class CloudEvent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """CloudEvents 1.0, structured JSON; extension attributes in lower case as its specification wants."""

    specversion: str = "1.0"
    id: str
    type: str
    source: str
    subject: str
    time: datetime
    datacontenttype: str = "application/json"
    data: msgspec.Raw
    position: int
    version: int
    epoch: int
    correlationid: str
    causationid: str
    team: str
    actor: str

    def recorded(self) -> Recorded:
        return Recorded(
            position=self.position,
            stream=self.subject,
            version=self.version,
            event_id=self.id,
            type=self.type,
            data=bytes(self.data),
            team=self.team,
            correlation_id=self.correlationid,
            causation_id=self.causationid,
            actor=self.actor,
            recorded_at=self.time,
        )


_ENCODER = msgspec.json.Encoder()
_DECODER = msgspec.json.Decoder(CloudEvent)


def cloud_event(recorded: Recorded, epoch: int) -> bytes:
    """The message on the bus."""
    return _ENCODER.encode(
        CloudEvent(
            id=recorded.event_id,
            type=recorded.type,
            source=f"penstock/{category_of(recorded.stream)}",
            subject=recorded.stream,
            time=recorded.recorded_at,
            data=msgspec.Raw(recorded.data),
            position=recorded.position,
            version=recorded.version,
            epoch=epoch,
            correlationid=recorded.correlation_id,
            causationid=recorded.causation_id,
            team=recorded.team,
            actor=recorded.actor,
        )
    )


def decode_cloud_event(data: bytes) -> CloudEvent:
    """Raises msgspec.ValidationError or msgspec.DecodeError for what is no such message."""
    return _DECODER.decode(data)


def subject_of(recorded: Recorded) -> str:
    """`events.<category>.<team>.<id>.<Event>`: `events.build.main.1f….BuildFinished`."""
    category, _, stream_id = recorded.stream.partition("-")
    first, _, rest = recorded.type.partition(".")
    event = first.capitalize() + "".join(word.capitalize() for word in rest.split("_"))
    return f"events.{category}.{recorded.team}.{stream_id}.{event}"
