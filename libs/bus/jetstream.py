"""The bus over NATS JetStream."""

import asyncio
import base64
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager, suppress

import msgspec
import structlog
from prometheus_client import CollectorRegistry, Gauge

from libs.bus.api import NO_MESSAGE, STREAM_NOT_FOUND, Api, ConsumerInfo, MessageAnswer, PubAck, Refusal, Reply, StreamInfo, is_status, nanoseconds
from libs.bus.bus import Ack, Answer, BusUnavailable, StreamFull, StreamState, TooLarge
from libs.bus.connection import Connection, connect
from libs.bus.mailbox import Arrived, Mailbox
from libs.bus.pull import RECHECK, Delivery, Prepared, StandingPull
from libs.bus.streams import Streams
from libs.bus.wire import Login
from proto.topology import Consumer, Stream

TAIL_BATCH = 128
_COUNT_BATCH = 4096
_COUNT_SECONDS = 60.0
_STORED_WITH = 30
"""Bytes that a message takes in a stream beyond its subject and data."""
PATIENCE = 2.0
"""How long connecting may hold up the start of a service; after that it goes on in the background."""

WARN_SECONDS = 10.0
"""Between two warnings that messages are dropped."""

_STORE_FAILED = 10077
_MESSAGE_TOO_LARGE, _HEADER_TOO_LARGE = 10054, 10097
_PUB_ACK = msgspec.json.Decoder(PubAck)


class JetStreamBus:
    """A Bus. `dropped` counts what `listen` had to drop."""

    def __init__(self, connection: Connection) -> None:
        self.dropped = 0
        self._connection = connection
        self._log = structlog.get_logger("bus")
        self._api = Api(connection)
        self._streams = Streams(self._api)
        self._seen = connection.connections
        self._warn_again = 0.0
        connection.watchers.add(self._reconnected)

    @property
    def connected(self) -> bool:
        return self._connection.connected

    @property
    def connections(self) -> int:
        return self._connection.connections

    @property
    def refused(self) -> bool:
        """Whether the server answers, and does not admit us."""
        return self._connection.refusals > 0

    def measure(self, registry: CollectorRegistry) -> None:
        """What says that somebody is too slow for the bus: a reader of ours, or this whole process, whom the server then cuts off."""
        Gauge("penstock_bus_dropped", "Messages that their reader was too slow for", registry=registry).set_function(lambda: self.dropped)
        Gauge("penstock_bus_connections", "Connections to the bus so far", registry=registry).set_function(lambda: self.connections)

    async def wait_connected(self) -> None:
        await self._connection.wait_connected()

    async def ensure(self, streams: Sequence[Stream], consumers: Sequence[Consumer]) -> None:
        await self._streams.ensure(streams, consumers)

    def publish(self, subject: str, data: bytes, msg_id: str = "") -> asyncio.Future[Ack]:
        return self._connection.ask(subject, data, self._acked, msg_id)

    async def send(self, subject: str, data: bytes) -> None:
        self._connection.send(subject, data)

    async def ask(self, subject: str, data: bytes) -> bytes:
        return await self._connection.ask(subject, data, _answered)

    @asynccontextmanager
    async def answering(self, subject: str, group: str, answer: Answer) -> AsyncIterator[None]:
        under_way: set[asyncio.Task[None]] = set()

        async def reply_to(subject: str, reply: bytes, data: bytes) -> None:
            try:
                self._connection.write(reply, b"", await answer(subject, data))
            except Exception as error:  # its text may hold what was asked
                self._log.warning("a question is not answered", subject=subject, error=type(error).__name__)

        def received(subject: bytes, reply: bytes, data: bytes, headers: bytes | None) -> None:
            if reply:
                task = asyncio.create_task(reply_to(subject.decode(errors="surrogateescape"), reply, data))
                under_way.add(task)
                task.add_done_callback(under_way.discard)

        sid = self._connection.subscribe(subject, received, group)
        try:
            await self._settled()
            yield
        finally:
            await self._connection.unsubscribe(sid)
            if under_way:
                _, late = await asyncio.wait(under_way, timeout=PATIENCE)
                for task in late:
                    task.cancel()

    @asynccontextmanager
    async def listen(self, subject: str) -> AsyncIterator[AsyncIterator[Arrived]]:
        mailbox, pattern = Mailbox(), subject

        def received(subject: bytes, reply: bytes, data: bytes, headers: bytes | None) -> None:
            if not mailbox.put(Arrived(subject.decode(errors="surrogateescape"), data)):
                self._dropped(pattern)

        sid = self._connection.subscribe(subject, received)
        try:
            await self._settled()
            async with aclosing(mailbox.messages()) as iterator:
                yield iterator
        finally:
            await self._connection.unsubscribe(sid)

    async def _settled(self) -> None:
        """Until the server knows what was subscribed. One that is away, or dies now, is told when it is back."""
        with suppress(BusUnavailable):
            await self._connection.flush()

    @asynccontextmanager
    async def consume(self, consumer: Consumer) -> AsyncIterator[AsyncIterator[list[Delivery]]]:
        async def prepare() -> Prepared:
            info = await self._streams.consumer_info(consumer)
            return Prepared(consumer.stream, consumer.name, info.created)

        pull = StandingPull(self._connection, prepare, consumer.batch, recheck=RECHECK)
        async with aclosing(pull.batches()) as iterator:
            yield iterator

    @asynccontextmanager
    async def tail(
        self, stream: str, subject: str, after_sequence: int = 0, headers_only: bool = False
    ) -> AsyncIterator[AsyncIterator[list[Delivery]]]:
        after = after_sequence
        created = ""

        async def prepare() -> Prepared:
            nonlocal after, created
            info = await self._streams.stream_info(stream)
            if created not in ("", info.created):
                after = 0
            created = info.created
            # A stream that lost its end gives those sequences to other messages.
            after = min(after, info.state.last_seq)
            name = f"tail-{secrets.token_hex(8)}"
            config = {
                "name": name,
                "filter_subjects": [subject],
                "deliver_policy": "by_start_sequence",
                "opt_start_seq": after + 1,
                "ack_policy": "none",
                "replay_policy": "instant",
                "mem_storage": True,
                "num_replicas": 1,
                "inactive_threshold": nanoseconds(60.0),
                "headers_only": headers_only,
            }
            await self._api.ask(f"CONSUMER.CREATE.{stream}.{name}", {"stream_name": stream, "config": config, "action": "create"}, ConsumerInfo)
            return Prepared(stream, name, created)

        pull = StandingPull(self._connection, prepare, _COUNT_BATCH if headers_only else TAIL_BATCH, ordered=True)

        async def batches() -> AsyncGenerator[list[Delivery], None]:
            nonlocal after
            async with aclosing(pull.batches()) as iterator:
                async for batch in iterator:
                    after = batch[-1].sequence
                    yield batch

        try:
            async with aclosing(batches()) as iterator:
                yield iterator
        finally:
            if pull.prepared is not None:
                self._connection.write(f"$JS.API.CONSUMER.DELETE.{stream}.{pull.prepared.consumer}".encode(), b"", b"")

    async def last(self, stream: str, subject: str) -> Arrived | None:
        try:
            answer = await self._api.ask(f"STREAM.MSG.GET.{stream}", {"last_by_subj": subject}, MessageAnswer)
        except Refusal as refusal:
            if refusal.number in (NO_MESSAGE, STREAM_NOT_FOUND):
                return None
            raise
        if answer.message is None:
            return None
        return Arrived(answer.message.subject, base64.b64decode(answer.message.data), answer.message.seq)

    async def purge(self, stream: str, subject: str, last: int | None = None) -> None:
        await self._api.ask(f"STREAM.PURGE.{stream}", {"filter": subject} | ({} if last is None else {"seq": last + 1}), Reply)

    async def stream_state(self, stream: str) -> StreamState | None:
        try:
            info = await self._api.ask(f"STREAM.INFO.{stream}", {}, StreamInfo)
        except Refusal as refusal:
            if refusal.number == STREAM_NOT_FOUND:
                return None
            raise
        return StreamState(info.created, info.state.last_seq, info.state.first_seq or 1, info.state.messages, info.state.bytes)

    async def settled(self, consumer: Consumer) -> int:
        """The sequence up to which its stream is dealt with. Raises BusUnavailable."""
        return (await self._api.ask(f"CONSUMER.INFO.{consumer.stream}.{consumer.name}", {}, ConsumerInfo)).ack_floor.stream_seq

    async def holders(self, stream: str, enough: int) -> dict[str, int]:
        """How many bytes of a stream are whose, by the second word of the subject, the sender's name. Only sizes are fetched, and no more once
        somebody has `enough`. Raises BusUnavailable."""
        held: dict[str, int] = {}
        state = await self.stream_state(stream)
        if state is None or not state.messages:
            return held
        with suppress(TimeoutError):  # then it is those of the oldest part
            async with asyncio.timeout(_COUNT_SECONDS), self.tail(stream, ">", headers_only=True) as batches:
                async for batch in batches:
                    for message in batch:
                        subject = message.subject
                        sender = subject.split(".", 2)[1]
                        held[sender] = held.get(sender, 0) + message.size + len(subject) + _STORED_WITH
                    if batch[-1].pending == 0 or batch[-1].sequence >= state.last_sequence or max(held.values()) >= enough:
                        break
        return held

    def _acked(self, headers: bytes | None, data: bytes) -> Ack:
        if is_status(headers, data):
            self._streams.remake()
            raise BusUnavailable("no stream takes it")
        ack = _PUB_ACK.decode(data)
        if ack.error is not None:
            if ack.error.err_code in (_MESSAGE_TOO_LARGE, _HEADER_TOO_LARGE):
                raise TooLarge(ack.error.description)
            full = ack.error.err_code == _STORE_FAILED and "maximum" in ack.error.description
            raise StreamFull(ack.error.description) if full else BusUnavailable(ack.error.description)
        return Ack(ack.stream, ack.seq, ack.duplicate)

    def _dropped(self, subject: str) -> None:
        self.dropped += 1
        now = asyncio.get_running_loop().time()
        if now >= self._warn_again:
            self._warn_again = now + WARN_SECONDS
            self._log.warning("a reader of the bus is too slow: the oldest messages are dropped", subject=subject, dropped=self.dropped)

    def _reconnected(self) -> None:
        if self.connected and self._seen != self.connections:
            self._seen = self.connections
            self._streams.remake()

    async def close(self) -> None:
        self._connection.watchers.discard(self._reconnected)
        await self._streams.close()


@asynccontextmanager
async def connect_jetstream(
    url: str, seed: str, name: str, inbox_prefix: str | None = None, patience: float = PATIENCE, renew: float = 0.0
) -> AsyncIterator[JetStreamBus]:
    """A bus, connected within `patience` seconds or still trying for ever. `seed` is the caller's key; a worker's `name` must be its own, and its
    `inbox_prefix` the one that it may hear. `renew`: see Login."""
    async with connect(Login(url, seed, name, renew), inbox_prefix or "_INBOX", patience) as connection:
        bus = JetStreamBus(connection)
        try:
            yield bus
        finally:
            await bus.close()


def _answered(headers: bytes | None, data: bytes) -> bytes:
    if is_status(headers, data):
        raise BusUnavailable("nobody answers there")
    return data
