"""The bus as the rest of Penstock sees it: JetStream for what must arrive at least once, core NATS for what may be lost.

The bus is never the only holder of anything: all that is on it may vanish at any moment, and whoever holds the fact sends it again.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import msgspec

from proto.topology import Consumer, Stream

Answer = Callable[[str, bytes], Awaitable[bytes]]
"""What answers a question: given its subject and what it says."""


class Ack(msgspec.Struct, frozen=True):
    """A stream holds the message at `sequence`. `duplicate`: it held one with this msg_id already (inside its dedup window; perhaps purged since)."""

    stream: str
    sequence: int
    duplicate: bool = False


class StreamState(msgspec.Struct, frozen=True):
    """`created` names this making of the stream: a deleted and remade stream has another. An empty stream has first_sequence = last_sequence + 1.
    `bytes` is what it takes of its `max_bytes`."""

    created: str
    last_sequence: int
    first_sequence: int
    messages: int
    bytes: int


class BusUnavailable(Exception):
    """Nothing is known to have arrived: send it again, with the same msg_id."""


class StreamFull(BusUnavailable):
    """The stream refuses new messages until old ones are gone."""


class TooLarge(Exception):
    """Over the server's max_payload, which is found out before anything is sent; or over what the stream takes."""


class Message(Protocol):
    """Something delivered. `sequence` is its place in the stream (0 from `listen`), `deliveries` how often it was handed out, from 1.

    ack, nak and term cost nothing to call: they are buffered, sent without waiting, and may be lost, so that the message comes again.
    They do nothing for what `listen` or `tail` gave.
    """

    @property
    def subject(self) -> str: ...
    @property
    def data(self) -> bytes: ...
    @property
    def sequence(self) -> int: ...
    @property
    def deliveries(self) -> int: ...

    def ack(self) -> None:
        """It is dealt with."""

    def nak(self, delay: float = 0.0) -> None:
        """Hand it out again after `delay` seconds."""

    def term(self) -> None:
        """Never hand it out again, though it was not dealt with."""


class Bus(Protocol):
    """One connection. It reconnects for ever by itself; whatever is asked meanwhile fails with BusUnavailable, and nothing hangs."""

    @property
    def connected(self) -> bool: ...

    @property
    def connections(self) -> int:
        """How often it has connected so far: when it changes, anything may have been lost."""

    async def wait_connected(self) -> None: ...

    async def ensure(self, streams: Sequence[Stream], consumers: Sequence[Consumer]) -> None:
        """Make or update what is missing or different; what was ensured once is made again by itself when it vanishes. Idempotent."""

    def publish(self, subject: str, data: bytes, msg_id: str = "") -> asyncio.Future[Ack]:
        """To a stream, pipelined: call it many times, then await the futures. Sent in the order of the calls.

        The future fails with BusUnavailable (no connection, no ack within 5 s, no stream, StreamFull) or TooLarge. A msg_id counts for the whole
        stream, whoever sends it: where senders do not trust one another it must not be guessable, or one makes another's message a duplicate
        beforehand.
        Raises ValueError for a subject or msg_id that is none (see `check_subject`).
        """

    async def send(self, subject: str, data: bytes) -> None:
        """Core NATS, at most once. Raises BusUnavailable when not connected, TooLarge."""

    async def ask(self, subject: str, data: bytes) -> bytes:
        """Core NATS: the answer of whoever answers there. Raises BusUnavailable when nobody does within 5 s (or anything is lost: then nothing is
        known), TooLarge."""

    def answering(self, subject: str, group: str, answer: Answer) -> AbstractAsyncContextManager[None]:
        """Answer what is asked on a subject (wildcards allowed); of all that share the name `group` one is given each question. What `answer`
        raises is logged by its type alone, and nothing is answered."""

    def listen(self, subject: str) -> AbstractAsyncContextManager[AsyncIterator[Message]]:
        """Everything sent to a subject (wildcards allowed) from now on. The buffer is bounded: when it is full the oldest is dropped and counted."""

    def consume(self, consumer: Consumer) -> AbstractAsyncContextManager[AsyncIterator[Sequence[Message]]]:
        """What the instances of a service share, at least once and in any order; everything that is ready at once, up to `consumer.batch`.

        It outlives the server, the consumer, the stream and the JetStream folder: they are made again, and it goes on.
        """

    def tail(self, stream: str, subject: str, after_sequence: int = 0) -> AbstractAsyncContextManager[AsyncIterator[Sequence[Message]]]:
        """Everything in a stream on a subject filter after a sequence, in order and without gaps or repeats, then what comes.

        When the stream was made again (its sequences start anew) it goes on from the new stream's start: then `sequence` falls.
        """

    async def last(self, stream: str, subject: str) -> Message | None:
        """The last message on a subject (wildcards allowed). Raises BusUnavailable."""

    async def purge(self, stream: str, subject: str, last: int | None = None) -> None:
        """Remove everything on a subject (wildcards allowed), or that up to sequence `last`. Raises BusUnavailable."""

    async def stream_state(self, stream: str) -> StreamState | None:
        """None when there is no such stream. Raises BusUnavailable."""


_SUBJECT = re.compile(r"[^\s.*>\x00]+(?:\.[^\s.*>\x00]+)*")
_LONGEST = 3500
"""Bytes of a subject: with a longer one the line that it is on is over 4 KiB, and the server hangs up."""


def check_subject(subject: str) -> None:
    """Raises ValueError for what nothing can be sent to."""
    if not _SUBJECT.fullmatch(subject) or len(subject.encode()) > _LONGEST:
        raise ValueError(f"not a subject to send to: {subject[:100]!r}")


def matches(pattern: str, subject: str) -> bool:
    """Whether a subject is one that a pattern of NATS stands for: `*` is one word, `>` at the end is one or more."""
    wanted = pattern.split(".")
    words = subject.split(".")
    if wanted[-1] == ">":
        wanted.pop()
        if len(words) <= len(wanted):
            return False
        words = words[: len(wanted)]
    return len(wanted) == len(words) and all(want in ("*", word) for want, word in zip(wanted, words, strict=True))
