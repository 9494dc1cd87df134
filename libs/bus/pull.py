"""A standing pull request: the server holds one at all times, so a message is delivered the moment it is there, and many in one piece under load.

Who made the consumer, and how it is made again, is the caller's: `prepare`. This finds out when that is needed. A pull request ends in the server's
words (a status message) when its consumer or stream is deleted; it ends silently with the connection, with the server, and in ways nobody foresaw,
and then its heartbeats stop.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import NamedTuple

import structlog

from libs.bus.bus import BusUnavailable
from libs.bus.connection import Connection

HEARTBEAT = 2.0
SILENCE = 5.0
"""Without a word for so long, a pull request is taken for lost."""
EXPIRY = 60.0
RECHECK = 15.0
"""How often an idle durable consumer is looked at: one that is ahead of its stream says nothing of it."""
RETRY = 0.25
_NO_HEADERS = b"NATS/1.0\r\n"


class Prepared(NamedTuple):
    """`stream` and `consumer` to pull from; `created` tells this making of the consumer from an earlier one."""

    stream: str
    consumer: str
    created: str


class Delivery:
    """A message of JetStream. Its place is read from its reply subject when somebody asks."""

    __slots__ = ("_connection", "_headers", "_place", "_reply", "_subject", "data")

    def __init__(self, connection: Connection, subject: bytes, reply: bytes, data: bytes, headers: bytes | None) -> None:
        self.data = data
        self._headers = headers
        self._connection = connection
        self._subject = subject
        self._reply = reply
        self._place: list[bytes] | None = None

    @property
    def subject(self) -> str:
        return self._subject.decode(errors="surrogateescape")

    @property
    def consumer(self) -> bytes:
        return self._field(1)

    @property
    def deliveries(self) -> int:
        return int(self._field(2))

    @property
    def sequence(self) -> int:
        return int(self._field(3))

    @property
    def consumer_sequence(self) -> int:
        return int(self._field(4))

    @property
    def pending(self) -> int:
        """How many come after it, as of when it was sent."""
        return int(self._field(6))

    @property
    def size(self) -> int:
        """Bytes of its headers and data, also where only headers were asked for: then the server tells it in one of its own, the last."""
        headers = self._headers or b""
        own, _, told = headers.rpartition(b"Nats-Msg-Size:")
        if self.data or not told:
            return len(headers) + len(self.data)
        return (len(own) if own != _NO_HEADERS else 0) + int(told.partition(b"\r\n")[0])

    def ack(self) -> None:
        self._connection.write(self._reply, b"", b"+ACK")

    def nak(self, delay: float = 0.0) -> None:
        self._connection.write(self._reply, b"", b'-NAK {"delay": %d}' % int(delay * 1e9) if delay > 0 else b"-NAK")

    def term(self) -> None:
        self._connection.write(self._reply, b"", b"+TERM")

    def _field(self, number: int) -> bytes:
        """`$JS.ACK.<stream>.<consumer>.<deliveries>.<sequence>.<consumer sequence>.…`, or the same with domain and account after ACK."""
        if self._place is None:
            words = self._reply.split(b".")
            self._place = words[2:] if len(words) < 11 else words[4:]
        return self._place[number]


class StandingPull:
    """`recheck`: prepare again when idle for that many seconds. `ordered`: what does not follow on is dropped, and the consumer prepared again."""

    def __init__(
        self, connection: Connection, prepare: Callable[[], Awaitable[Prepared]], batch: int, *, ordered: bool = False, recheck: float | None = None
    ) -> None:
        self._connection = connection
        self._prepare = prepare
        self._batch = batch
        self._ordered = ordered
        self._recheck = recheck
        self._log = structlog.get_logger("bus")
        self._loop = asyncio.get_running_loop()
        self._inbox = connection.new_inbox()
        self._prepared: Prepared | None = None
        self._next = 1
        self._wanted = 0
        self._buffer: list[Delivery] = []
        self._stale = True
        self._why = ""
        self._heard = 0.0
        self._checked = 0.0
        self._wakeup = asyncio.Event()

    @property
    def prepared(self) -> Prepared | None:
        return self._prepared

    async def batches(self) -> AsyncGenerator[list[Delivery], None]:
        """Everything that is ready, again and again; never ends by itself."""
        sid = self._connection.subscribe(self._inbox, self._received)
        self._connection.watchers.add(self._changed)
        try:
            while True:
                if self._buffer:
                    batch, self._buffer = self._buffer[: self._batch], self._buffer[self._batch :]
                    self._top_up()
                    yield batch
                elif self._stale or (self._recheck is not None and self._loop.time() > self._checked + self._recheck):
                    await self._renew()
                else:
                    await self._listen()
        finally:
            self._connection.watchers.discard(self._changed)
            await self._connection.unsubscribe(sid)
            if not self._ordered:
                for message in self._buffer:
                    message.nak()

    async def _listen(self) -> None:
        self._wakeup.clear()
        # Between the caller's last look and now nothing can have come: this is all in one turn of the event loop.
        limit = self._heard + SILENCE
        if self._recheck is not None:
            limit = min(limit, self._checked + self._recheck)
        try:
            async with asyncio.timeout_at(limit + 0.01):
                await self._wakeup.wait()
        except TimeoutError:
            if self._loop.time() > self._heard + SILENCE:
                self._lost("silent")

    async def _renew(self) -> None:
        await self._connection.wait_connected()
        connections = self._connection.connections
        try:
            prepared = await self._prepare()
        except BusUnavailable as error:
            if str(error) != self._why:
                self._why = str(error)
                self._log.warning("cannot follow the bus", error=self._why)
            self._stale = True
            await asyncio.sleep(RETRY)
            return
        self._why = ""
        self._checked = self._loop.time()
        if connections != self._connection.connections:
            return
        if self._stale or prepared != self._prepared:
            if prepared != self._prepared:
                self._next = 1
            self._prepared = prepared
            self._stale = False
            self._heard = self._checked
            self._wanted = 0
            self._top_up()

    def _top_up(self) -> None:
        if self._prepared is None or self._stale or self._wanted + len(self._buffer) > self._batch // 2:
            return
        ask = self._batch - self._wanted - len(self._buffer)
        self._wanted += ask
        request = b'{"batch":%d,"expires":%d,"idle_heartbeat":%d}' % (ask, int(EXPIRY * 1e9), int(HEARTBEAT * 1e9))
        subject = f"$JS.API.CONSUMER.MSG.NEXT.{self._prepared.stream}.{self._prepared.consumer}"
        self._connection.write(subject.encode(), self._inbox.encode(), request)

    def _received(self, subject: bytes, reply: bytes, data: bytes, headers: bytes | None) -> None:
        self._heard = self._loop.time()
        if reply:
            self._wanted = max(0, self._wanted - 1)
            message = Delivery(self._connection, subject, reply, data, headers)
            if self._ordered and not self._follows(message):
                return
            self._buffer.append(message)
            self._wakeup.set()
        elif headers is not None:
            self._status(headers)

    def _follows(self, message: Delivery) -> bool:
        if self._prepared is None or self._stale or message.consumer != self._prepared.consumer.encode():
            return False
        if message.consumer_sequence != self._next:
            self._lost("a gap")
            return False
        self._next += 1
        return True

    def _status(self, headers: bytes) -> None:
        """`NATS/1.0 <code> <words>`, then headers."""
        code = headers[9:12]
        if code == b"100":
            return
        if code in (b"404", b"408"):
            pending = headers.partition(b"Nats-Pending-Messages:")[2].partition(b"\r\n")[0].strip()
            self._wanted = max(0, self._wanted - int(pending or 0))
            self._top_up()
        else:
            self._lost(headers[9:].partition(b"\r\n")[0].decode(errors="replace"))

    def _lost(self, why: str) -> None:
        if not self._stale and self._prepared is not None:
            self._log.info("a pull request was lost", stream=self._prepared.stream, consumer=self._prepared.consumer, why=why)
        self._stale = True
        self._wakeup.set()

    def _changed(self) -> None:
        self._lost("the connection changed")
