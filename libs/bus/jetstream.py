"""The bus over NATS JetStream."""

import asyncio
import base64
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any, TypeVar

import msgspec
import structlog
from prometheus_client import CollectorRegistry, Gauge

from libs.bus.bus import Ack, Answer, BusUnavailable, StreamFull, StreamState
from libs.bus.connection import Connection, Login, connect
from libs.bus.mailbox import Arrived, Mailbox
from libs.bus.pull import RECHECK, Delivery, Prepared, StandingPull
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

_STREAM_NOT_FOUND = 10059
_CONSUMER_NOT_FOUND = 10014
_NO_MESSAGE = 10037
_CONSUMER_FAILED, _UNREADABLE = 10012, "creating store"
"""What the server says of a consumer whose file it cannot read."""
_STORE_FAILED = 10077

T = TypeVar("T", bound="_Answer")


class _Fault(msgspec.Struct, frozen=True):
    code: int = 0
    err_code: int = 0
    description: str = ""


class _Answer(msgspec.Struct, frozen=True):
    error: _Fault | None = None


class _PubAck(_Answer, frozen=True):
    stream: str = ""
    seq: int = 0
    duplicate: bool = False


class _State(msgspec.Struct, frozen=True):
    messages: int
    first_seq: int
    last_seq: int
    bytes: int


class _StreamInfo(_Answer, frozen=True):
    created: str = ""
    state: _State = _State(0, 0, 0, 0)


class _Delivered(msgspec.Struct, frozen=True):
    stream_seq: int = 0


class _ConsumerInfo(_Answer, frozen=True):
    created: str = ""
    delivered: _Delivered = _Delivered()
    ack_floor: _Delivered = _Delivered()


class _StoredMessage(msgspec.Struct, frozen=True):
    subject: str
    seq: int
    data: str = ""


class _MessageAnswer(_Answer, frozen=True):
    message: _StoredMessage | None = None


_PUB_ACK = msgspec.json.Decoder(_PubAck)


class _Refusal(BusUnavailable):
    """JetStream said no; `number` is its error code."""

    def __init__(self, fault: _Fault) -> None:
        super().__init__(fault.description)
        self.number = fault.err_code


class JetStreamBus:
    """A Bus. `dropped` counts what `listen` had to drop."""

    def __init__(self, connection: Connection) -> None:
        self.dropped = 0
        self._connection = connection
        self._log = structlog.get_logger("bus")
        self._streams: dict[str, Stream] = {}
        self._consumers: dict[str, Consumer] = {}
        self._remaking: asyncio.Task[None] | None = None
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
        for stream in streams:
            await self._ensure_stream(stream)
            self._streams[stream.name] = stream
        for consumer in consumers:
            await self._ensure_consumer(consumer)
            self._consumers[consumer.name] = consumer

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
            info = await self._looked_at(consumer)
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
            info = await self._stream_info(stream)
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
                "inactive_threshold": _nanoseconds(60.0),
                "headers_only": headers_only,
            }
            await self._api(f"CONSUMER.CREATE.{stream}.{name}", {"stream_name": stream, "config": config, "action": "create"}, _ConsumerInfo)
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
            answer = await self._api(f"STREAM.MSG.GET.{stream}", {"last_by_subj": subject}, _MessageAnswer)
        except _Refusal as refusal:
            if refusal.number in (_NO_MESSAGE, _STREAM_NOT_FOUND):
                return None
            raise
        if answer.message is None:
            return None
        return Arrived(answer.message.subject, base64.b64decode(answer.message.data), answer.message.seq)

    async def purge(self, stream: str, subject: str, last: int | None = None) -> None:
        await self._api(f"STREAM.PURGE.{stream}", {"filter": subject} | ({} if last is None else {"seq": last + 1}), _Answer)

    async def stream_state(self, stream: str) -> StreamState | None:
        try:
            info = await self._api(f"STREAM.INFO.{stream}", {}, _StreamInfo)
        except _Refusal as refusal:
            if refusal.number == _STREAM_NOT_FOUND:
                return None
            raise
        return StreamState(info.created, info.state.last_seq, info.state.first_seq or 1, info.state.messages, info.state.bytes)

    async def settled(self, consumer: Consumer) -> int:
        """The sequence up to which its stream is dealt with. Raises BusUnavailable."""
        return (await self._api(f"CONSUMER.INFO.{consumer.stream}.{consumer.name}", {}, _ConsumerInfo)).ack_floor.stream_seq

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

    async def _ensure_stream(self, stream: Stream) -> _StreamInfo:
        config = {
            "name": stream.name,
            "subjects": list(stream.subjects),
            "retention": "limits",
            "storage": "file",
            "discard": stream.full,
            "max_age": _nanoseconds(stream.max_age),
            "max_bytes": stream.max_bytes,
            "duplicate_window": _nanoseconds(stream.dedup_window),
            "allow_direct": False,
        }
        # Update first: a create reserves the stream's room once more before the server finds that it has the stream already, and may be refused.
        try:
            return await self._api(f"STREAM.UPDATE.{stream.name}", config, _StreamInfo)
        except _Refusal as refusal:
            if refusal.number != _STREAM_NOT_FOUND:
                raise
        try:
            return await self._api(f"STREAM.CREATE.{stream.name}", config, _StreamInfo)
        except _Refusal:
            # Somebody else makes it at the same moment, or the refusal stands.
            return await self._api(f"STREAM.UPDATE.{stream.name}", config, _StreamInfo)

    async def _stream_info(self, name: str) -> _StreamInfo:
        """Of the stream as it is, made again if it was ours and is gone: to ask is cheap, and making what is there rewrites two files."""
        try:
            return await self._api(f"STREAM.INFO.{name}", {}, _StreamInfo)
        except _Refusal as refusal:
            if refusal.number != _STREAM_NOT_FOUND or name not in self._streams:
                raise
        return await self._ensure_stream(self._streams[name])

    async def _looked_at(self, consumer: Consumer) -> _ConsumerInfo:
        """The consumer as it is, made again if it is gone."""
        try:
            return await self._not_ahead(consumer, await self._api(f"CONSUMER.INFO.{consumer.stream}.{consumer.name}", {}, _ConsumerInfo))
        except _Refusal as refusal:
            if refusal.number not in (_STREAM_NOT_FOUND, _CONSUMER_NOT_FOUND):
                raise
        await self._stream_info(consumer.stream)
        return await self._ensure_consumer(consumer)

    async def _ensure_consumer(self, consumer: Consumer) -> _ConsumerInfo:
        """One whose file a power cut has spoilt the server can neither read nor delete, but with its stream: then that is made anew, which everyone
        can bear."""
        try:
            info = await self._create_consumer(consumer)
        except _Refusal as refusal:
            stream = self._streams.get(consumer.stream)
            if refusal.number != _CONSUMER_FAILED or _UNREADABLE not in str(refusal) or stream is None:
                raise
            self._log.warning("a consumer is spoilt, and its stream is made anew", consumer=consumer.name, stream=stream.name, why=str(refusal))
            await self._api(f"STREAM.DELETE.{stream.name}", {}, _Answer)
            await self._ensure_stream(stream)
            info = await self._create_consumer(consumer)
        return await self._not_ahead(consumer, info)

    async def _not_ahead(self, consumer: Consumer, info: _ConsumerInfo) -> _ConsumerInfo:
        """One that is ahead of its stream (which lost its end) would wait until the stream has grown that far again: it is made anew."""
        ahead = max(info.delivered.stream_seq, info.ack_floor.stream_seq)
        if ahead and ahead > (await self._api(f"STREAM.INFO.{consumer.stream}", {}, _StreamInfo)).state.last_seq:
            self._log.warning("a consumer is ahead of its stream and is made anew", consumer=consumer.name, stream=consumer.stream)
            await self._api(f"CONSUMER.DELETE.{consumer.stream}.{consumer.name}", {}, _Answer)
            return await self._create_consumer(consumer)
        return info

    async def _create_consumer(self, consumer: Consumer) -> _ConsumerInfo:
        config = {
            "name": consumer.name,
            "durable_name": consumer.name,
            "filter_subjects": list(consumer.subjects),
            "deliver_policy": "all",
            "ack_policy": "explicit",
            "replay_policy": "instant",
            "ack_wait": _nanoseconds(consumer.ack_wait),
            "max_deliver": -1,
            "max_ack_pending": consumer.max_ack_pending,
        }
        body = {"stream_name": consumer.stream, "config": config}
        return await self._api(f"CONSUMER.CREATE.{consumer.stream}.{consumer.name}", body, _ConsumerInfo)

    async def _api(self, call: str, body: Mapping[str, Any], answer: type[T]) -> T:
        def decode(headers: bytes | None, data: bytes) -> T:
            if _is_status(headers, data):
                raise BusUnavailable("JetStream does not answer")
            decoded = msgspec.json.decode(data, type=answer)
            if decoded.error is not None:
                raise _Refusal(decoded.error)
            return decoded

        return await self._connection.ask(f"$JS.API.{call}", msgspec.json.encode(body) if body else b"", decode)

    def _acked(self, headers: bytes | None, data: bytes) -> Ack:
        if _is_status(headers, data):
            self._remake()
            raise BusUnavailable("no stream takes it")
        ack = _PUB_ACK.decode(data)
        if ack.error is not None:
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
            self._remake()

    def _remake(self) -> None:
        """Make again, in the background, what was ensured: the server may have come back without it."""
        if self._streams and (self._remaking is None or self._remaking.done()):
            self._remaking = asyncio.create_task(self._ensure_again(), name="bus remakes its streams")

    async def _ensure_again(self) -> None:
        try:
            await self.ensure(list(self._streams.values()), list(self._consumers.values()))
        except BusUnavailable as error:
            self._log.warning("cannot make the streams again", error=str(error))

    async def close(self) -> None:
        self._connection.watchers.discard(self._reconnected)
        if self._remaking is not None:
            self._remaking.cancel()
            await asyncio.gather(self._remaking, return_exceptions=True)


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
    if _is_status(headers, data):
        raise BusUnavailable("nobody answers there")
    return data


def _is_status(headers: bytes | None, data: bytes) -> bool:
    """The server's own word, of which there is only one for a request: 503, nobody is there to answer."""
    return headers is not None and not data and headers.startswith(b"NATS/1.0 ")


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
