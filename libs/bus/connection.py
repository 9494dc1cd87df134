"""One connection to NATS that never gives up.

nats-py does the handshake, TLS and the parsing of one connection. Its life after that is ours: a broken connection is dropped with all
that waited in it, so that nothing stale is sent later, and a new one is made, for ever. What is hot goes around nats-py's queue and task for each
subscription and its header dictionaries (measured: 8 µs for a publish with its ack instead of 28, 3 µs for a delivery instead of 5 and more).
"""

import asyncio
import base64
import re
import secrets
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any, NamedTuple, TypeVar

import structlog
from nats.aio.client import Client
from nats.aio.subscription import Subscription

from libs.bus.bus import BusUnavailable, TooLarge
from libs.bus.nkeys import nkey
from libs.tokens import public_key, raw_signature

Handler = Callable[[bytes, bytes, bytes, bytes | None], None]
"""What is called with (subject, reply, data, raw headers) of each message. It must not block; what it raises is logged."""

ANSWER_TIMEOUT = 5.0
CONNECT_TIMEOUT = 2.0
FIRST_CONNECT_TIMEOUT = 0.5
"""The first try is given up soon: a server that has nobody to ask about us yet says nothing for as long as it would wait."""
LOOK = 1.5
SILENT = 3
"""Seconds between two looks whether the server has said anything, and how many may find nothing: at the first it may have had nothing to say, then
it is pinged. So one that is dead is given up 4.5 to 6 s after its last word."""
LONGEST_REFUSED = 5.0
"""Seconds between two attempts of one whom the server does not know, in the end."""
_BACKOFF = (0.05, 0.1, 0.2, 0.4, 0.5)

_SUBJECT = re.compile(r"[^\s.*>\x00]+(?:\.[^\s.*>\x00]+)*")
_PATTERN = re.compile(r"[^\s.\x00]+(?:\.[^\s.\x00]+)*")
_NONCE = re.compile(r"[A-Za-z0-9_-]{8,64}")
_HEADER = re.compile(r"[\x21-\x7e]+")
T = TypeVar("T")


class Login(NamedTuple):
    """`url` may list several servers, separated by commas; `seed` is the Ed25519 key to show oneself by; `name` who one says one is. `renew`: seconds
    after which a connection is replaced by another, so that the server need not end it when its admission lapses (0: it does not)."""

    url: str
    seed: str
    name: str
    renew: float = 0.0

    def __repr__(self) -> str:
        return f"Login({self.name!r} at {self.url!r})"


class _Subscription(NamedTuple):
    pattern: str
    handler: Handler
    group: str


class _Question(NamedTuple):
    future: asyncio.Future[Any]
    decode: Callable[[bytes | None, bytes], Any]
    deadline: float


class _Wire(Client):  # type: ignore[misc, unused-ignore]
    """One TCP connection's life: `ended` is set at its first trouble, and whoever made it ends it."""

    def __init__(self, subscriptions: Mapping[int, "_Subscription"], log: structlog.stdlib.BoundLogger) -> None:
        super().__init__()
        self.ended = asyncio.Event()
        self._subscriptions = subscriptions
        self._logger = log
        self._silent = 0
        """Looks since the server's last word."""

    async def _ping_interval(self) -> None:
        """Any word is as good as a pong: who hears the server every moment asks nothing of it, and wakes neither."""
        while True:
            await asyncio.sleep(LOOK)
            self._silent += 1
            if self._silent > SILENT:
                await self._process_op_err(ConnectionError("it says nothing"))
                return
            if self._silent > 1:
                await self._send_ping()

    async def _process_pong(self) -> None:
        self._silent = 0
        await super()._process_pong()

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes | None) -> None:
        self._silent = 0
        subscription = self._subscriptions.get(sid)
        if subscription is not None:
            try:
                subscription.handler(subject, reply, data, headers)
            except Exception:
                self._logger.exception("a handler of the bus failed", subject=subject.decode(errors="replace"))

    async def _process_err(self, err_msg: str) -> None:
        if "permissions violation" in err_msg:
            self._logger.warning("the bus forbids it", error=err_msg)
        else:
            await self._process_op_err(ConnectionError(err_msg))

    async def _process_op_err(self, e: Exception) -> None:
        if not self.ended.is_set():
            self._logger.warning("the bus hung up", error=str(e) or type(e).__name__)
            self.ended.set()

    def announce(self, sid: int, subject: str, group: str) -> None:
        self._sid = max(self._sid, sid)
        self._subs[sid] = Subscription(self, sid, subject, group)
        self.put(f"SUB {subject} {group} {sid}\r\n".encode())

    def show_oneself(self, seed: str) -> None:
        """At the next connection."""
        self._public_nkey = nkey(public_key(seed))
        self._auth_configured = True

    def put(self, command: bytes) -> None:
        self._pending.append(command)
        self._pending_data_size += len(command)

    def write_out(self) -> None:
        if self._pending and self._transport is not None:
            commands, self._pending, self._pending_data_size = self._pending, [], 0
            self._transport.writelines(commands)

    async def end(self) -> None:
        """A peer that reads nothing more must not keep us: what a second does not close is cut off."""
        transport = self._transport
        tasks = [t for t in (self._reading_task, self._ping_interval_task, self._flusher_task) if t is not None]
        with suppress(Exception):
            async with asyncio.timeout(1.0):
                await self._close(Client.CLOSED, False)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        writer = getattr(transport, "_io_writer", None)
        if writer is not None:
            writer.transport.abort()


class Connection:
    """`subscribe` and `ask` may be called at any time; what is subscribed is subscribed again after each reconnection.

    `connections` counts them, `refusals` how often in a row the server has not admitted us. `watchers` are called after each loss and each new
    connection.
    """

    def __init__(self, login: Login, inbox_prefix: str) -> None:
        self.connections = self.refusals = 0
        self.watchers: set[Callable[[], None]] = set()
        self._login = login
        self._log = structlog.get_logger("bus").bind(connection=login.name)
        self._wire: _Wire | None = None
        self._up = asyncio.Event()
        self._kicked = False
        self._closed = False
        self._sid = 0
        self._subscriptions: dict[int, _Subscription] = {}
        self._questions: dict[bytes, _Question] = {}
        self._asked = 0
        self._sweeper: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        # Whoever knows an inbox can answer in it (FAULTS 63), so it is not to be guessed.
        self._inbox = f"{inbox_prefix}.{secrets.token_hex(16)}"
        self._skip = len(self._inbox) + 1
        self.subscribe(f"{self._inbox}.*", self._answered)

    @property
    def connected(self) -> bool:
        return self._wire is not None

    async def wait_connected(self) -> None:
        await self._up.wait()

    def new_inbox(self) -> str:
        return f"{self._inbox}.{secrets.token_hex(8)}.x"

    def subscribe(self, pattern: str, handler: Handler, group: str = "") -> int:
        """The number to give to `unsubscribe`. Of all subscribers in one `group` one gets each message.
        Raises ValueError for what is no subject or pattern."""
        if not _PATTERN.fullmatch(pattern):
            raise ValueError(f"not a subject: {pattern!r}")
        self._sid += 1
        self._subscriptions[self._sid] = _Subscription(pattern, handler, group)
        if self._wire is not None:
            self._wire.announce(self._sid, pattern, group)
            self._kick()
        return self._sid

    async def unsubscribe(self, sid: int) -> None:
        """What the server had sent before it knew is still handed to the handler before this returns."""
        if self._wire is not None:
            self._wire.put(f"UNSUB {sid}\r\n".encode())
            with suppress(BusUnavailable):
                await self.flush()
        self._subscriptions.pop(sid, None)
        if self._wire is not None:
            self._wire._subs.pop(sid, None)

    def write(self, subject: bytes, reply: bytes, data: bytes, headers: bytes = b"") -> None:
        """Sent with all else of this turn of the event loop. Does nothing when not connected; subject and reply must be known to be sound."""
        if self._wire is None:
            return
        if headers:
            command = b"HPUB %b %b %d %d\r\n%b%b\r\n" % (subject, reply, len(headers), len(headers) + len(data), headers, data)
        else:
            command = b"PUB %b %b %d\r\n%b\r\n" % (subject, reply, len(data), data)
        self._wire.put(command)
        self._kick()

    def send(self, subject: str, data: bytes) -> None:
        """Raises BusUnavailable, TooLarge, ValueError."""
        self._check(subject, len(data))
        self.write(subject.encode(), b"", data)

    def ask(self, subject: str, data: bytes, decode: Callable[[bytes | None, bytes], T], msg_id: str = "") -> asyncio.Future[T]:
        """A request; `decode(raw headers, data)` makes the future's result or raises its exception. Raises ValueError for an unsound subject."""
        future: asyncio.Future[T] = self._loop.create_future()
        headers = b""
        try:
            if msg_id:
                if not _HEADER.fullmatch(msg_id):
                    raise ValueError(f"not a message id: {msg_id!r}")
                headers = b"NATS/1.0\r\nNats-Msg-Id: %b\r\n\r\n" % msg_id.encode()
            self._check(subject, len(headers) + len(data))
        except (BusUnavailable, TooLarge) as error:
            _fail(future, error)
            return future
        self._asked += 1
        token = b"%d" % self._asked
        self._questions[token] = _Question(future, decode, self._loop.time() + ANSWER_TIMEOUT)
        if self._sweeper is None:
            self._sweeper = self._loop.call_later(1.0, self._sweep)
        self.write(subject.encode(), b"%b.%b" % (self._inbox.encode(), token), data, headers)
        return future

    async def flush(self) -> None:
        """Until the server has read all that was written. Raises BusUnavailable."""
        wire = self._wire
        if wire is None:
            raise BusUnavailable("not connected")
        wire.write_out()
        try:
            await wire.flush(timeout=2)
        except Exception as error:
            raise BusUnavailable(f"no answer: {error}") from error

    async def run(self) -> None:
        """Connects, and connects again, until it is cancelled after `close`. That it is cancelled is not enough: nats-py connects under
        `asyncio.wait_for`, which in Python 3.11 forgets a cancellation that comes just when the connection is made or refused."""
        failures = silences = 0
        while not self._closed:
            wire = _Wire(self._subscriptions, self._log)
            try:
                try:
                    await self._connect(wire, min(CONNECT_TIMEOUT, FIRST_CONNECT_TIMEOUT * 2.0 ** min(silences, 10)))
                except Exception as error:
                    silences = silences + 1 if isinstance(error, TimeoutError) else 0
                    self.refusals = self.refusals + 1 if "authorization" in str(error).lower() else 0
                    if failures == 0:
                        self._log.warning("no connection to the bus", error=str(error) or type(error).__name__)
                else:
                    if not self._closed:
                        failures, self.refusals, silences = -1, 0, 0
                        self._begin(wire)
                        await self._last(wire)
            finally:
                wire = self._wire or wire
                self._lose()
                await wire.end()
            failures += 1
            if not self._closed:
                pause = _BACKOFF[0] if silences else _BACKOFF[min(failures, len(_BACKOFF) - 1)]
                await asyncio.sleep(max(pause, min(LONGEST_REFUSED, 0.01 * 2.0 ** min(self.refusals, 20))))

    async def _last(self, wire: _Wire) -> None:
        """Stay connected, by one wire after another, until one ends."""
        while not wire.ended.is_set() and not self._closed:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._login.renew or None):
                    await wire.ended.wait()
                    return
            successor = _Wire(self._subscriptions, self._log)
            try:
                await self._connect(successor, CONNECT_TIMEOUT)
            except Exception as error:
                self._log.info("no second connection to the bus", error=str(error) or type(error).__name__)
            else:
                await self._succeed(wire, successor)
                wire = successor
            finally:
                if self._wire is not successor:
                    await successor.end()

    async def _succeed(self, wire: _Wire, successor: _Wire) -> None:
        """Both hear until the server has read all that the first had to say: something may come twice, but nothing is lost."""
        self._announce(successor)
        self._wire = successor
        try:
            wire.write_out()
            await wire.flush(timeout=2)
        except Exception as error:
            self._log.debug("nats", error=str(error))
        finally:
            await wire.end()

    async def _connect(self, wire: _Wire, timeout: float) -> None:
        async def ignore(error: Exception) -> None:
            self._log.debug("nats", error=str(error))

        wire.show_oneself(self._login.seed)
        await wire.connect(
            servers=[server.strip() for server in self._login.url.split(",")],
            signature_cb=self._signed,
            name=self._login.name,
            allow_reconnect=False,
            max_reconnect_attempts=1,
            reconnect_time_wait=0,
            connect_timeout=timeout,  # type: ignore[arg-type, unused-ignore]  # seconds, like any
            error_cb=ignore,
        )

    def _signed(self, nonce: str) -> bytes:
        # Whoever poses as the server must not get a signature of anything that means something elsewhere.
        if not _NONCE.fullmatch(nonce):
            raise ValueError("the server's nonce is none")
        return base64.urlsafe_b64encode(raw_signature(self._login.seed, nonce.encode())).rstrip(b"=")

    def _begin(self, wire: _Wire) -> None:
        self._announce(wire)
        self._wire = wire
        self.connections += 1
        self._kick()
        self._up.set()
        self._log.info("connected to the bus", server=str(wire.connected_url.netloc if wire.connected_url else ""), connections=self.connections)
        self._tell()

    def _announce(self, wire: _Wire) -> None:
        for sid, (pattern, _, group) in self._subscriptions.items():
            wire.announce(sid, pattern, group)
        wire.write_out()

    def _lose(self) -> None:
        if self._wire is None:
            return
        self._wire.write_out()
        self._wire = None
        self._up.clear()
        questions, self._questions = self._questions, {}
        for question in questions.values():
            _fail(question.future, BusUnavailable("the connection was lost"))
        self._tell()

    def _tell(self) -> None:
        for watcher in list(self.watchers):
            watcher()

    def _kick(self) -> None:
        if not self._kicked:
            self._kicked = True
            self._loop.call_soon(self._write_out)

    def _write_out(self) -> None:
        self._kicked = False
        if self._wire is not None:
            self._wire.write_out()

    def _check(self, subject: str, size: int) -> None:
        if not _SUBJECT.fullmatch(subject):
            raise ValueError(f"not a subject to send to: {subject!r}")
        if self._wire is None:
            raise BusUnavailable("not connected")
        if size > self._wire.max_payload:
            raise TooLarge(f"{size} bytes, the limit is {self._wire.max_payload}")

    def _answered(self, subject: bytes, reply: bytes, data: bytes, headers: bytes | None) -> None:
        question = self._questions.pop(subject[self._skip :], None)
        if question is None or question.future.done():
            return
        try:
            question.future.set_result(question.decode(headers, data))
        except Exception as error:
            _fail(question.future, error)

    def _sweep(self) -> None:
        """All questions wait equally long, so the oldest is the first."""
        self._sweeper = None
        now = self._loop.time()
        for token, question in list(self._questions.items()):
            if question.deadline > now:
                break
            del self._questions[token]
            _fail(question.future, BusUnavailable(f"no answer within {ANSWER_TIMEOUT:g} s"))
        if self._questions:
            self._sweeper = self._loop.call_later(1.0, self._sweep)

    def close(self) -> None:
        """Before `run` is cancelled: nothing connects any more."""
        self._closed = True
        if self._sweeper is not None:
            self._sweeper.cancel()


@asynccontextmanager
async def connect(login: Login, inbox_prefix: str, patience: float) -> AsyncIterator[Connection]:
    """A connection, made within `patience` seconds or still being tried for."""
    connection = Connection(login, inbox_prefix)
    task = asyncio.create_task(connection.run(), name=f"bus {login.name}")
    try:
        with suppress(TimeoutError):
            async with asyncio.timeout(patience):
                await connection.wait_connected()
        yield connection
        with suppress(BusUnavailable):
            await connection.flush()
    finally:
        connection.close()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def _fail(future: asyncio.Future[Any], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
        # Marked as seen: that the bus is away is no bug of whoever gave up waiting.
        future.exception()
