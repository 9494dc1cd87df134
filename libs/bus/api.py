"""JetStream's API: what it answers, and how it is asked."""

from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from libs.bus.bus import BusUnavailable
from libs.bus.connection import Connection

STREAM_NOT_FOUND = 10059
CONSUMER_NOT_FOUND = 10014
NO_MESSAGE = 10037
CONSUMER_FAILED = 10012

T = TypeVar("T", bound="Reply")


class Fault(msgspec.Struct, frozen=True):
    """Why JetStream refuses; `err_code` is for programs."""

    code: int = 0
    err_code: int = 0
    description: str = ""


class Reply(msgspec.Struct, frozen=True):
    """Any answer."""

    error: Fault | None = None


class PubAck(Reply, frozen=True):
    """To a message for a stream."""

    stream: str = ""
    seq: int = 0
    duplicate: bool = False


class State(msgspec.Struct, frozen=True):
    """Of a stream."""

    messages: int
    first_seq: int
    last_seq: int
    bytes: int


class StreamInfo(Reply, frozen=True):
    """To the making of a stream, or a question about one."""

    created: str = ""
    state: State = State(0, 0, 0, 0)


class Delivered(msgspec.Struct, frozen=True):
    """How far a consumer is in its stream."""

    stream_seq: int = 0


class ConsumerInfo(Reply, frozen=True):
    """To the making of a consumer, or a question about one."""

    created: str = ""
    delivered: Delivered = Delivered()
    ack_floor: Delivered = Delivered()


class StoredMessage(msgspec.Struct, frozen=True):
    """`data` is base64."""

    subject: str
    seq: int
    data: str = ""


class MessageAnswer(Reply, frozen=True):
    """To a question for one message."""

    message: StoredMessage | None = None


class Refusal(BusUnavailable):
    """JetStream said no; `number` is its error code."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.description)
        self.number = fault.err_code


class Api:
    """Asks over a connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def ask(self, call: str, body: Mapping[str, Any], answer: type[T]) -> T:
        """Raises Refusal, and BusUnavailable when nobody answers."""

        def decode(headers: bytes | None, data: bytes) -> T:
            if is_status(headers, data):
                raise BusUnavailable("JetStream does not answer")
            decoded = msgspec.json.decode(data, type=answer)
            if decoded.error is not None:
                raise Refusal(decoded.error)
            return decoded

        return await self._connection.ask(f"$JS.API.{call}", msgspec.json.encode(body) if body else b"", decode)


def is_status(headers: bytes | None, data: bytes) -> bool:
    """The server's own word, of which there is only one for a request: 503, nobody is there to answer."""
    return headers is not None and not data and headers.startswith(b"NATS/1.0 ")


def nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
