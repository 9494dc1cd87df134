"""One connection to NATS that never gives up.

nats-py does the handshake, TLS and the parsing of one connection (wire.py). Its life after that is ours: a broken connection is dropped with all that
waited in it, so that nothing stale is sent later, and a new one is made, for ever.
"""

import asyncio
import re
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, NamedTuple, TypeVar

import structlog

from libs.bus.bus import BusUnavailable, TooLarge, check_subject
from libs.bus.wire import Handler, Login, Subscription, Wire

ANSWER_TIMEOUT = 5.0
CONNECT_TIMEOUT = 2.0
FIRST_CONNECT_TIMEOUT = 0.5
"""The first try is given up soon: a server that has nobody to ask about us yet says nothing for as long as it would wait."""
LONGEST_REFUSED = 5.0
"""Seconds between two attempts of one whom the server does not know, in the end."""
_BACKOFF = (0.05, 0.1, 0.2, 0.4, 0.5)

_PATTERN = re.compile(r"[^\s.\x00]+(?:\.[^\s.\x00]+)*")
_HEADER = re.compile(r"[\x21-\x7e]+")
T = TypeVar("T")


class _Question(NamedTuple):
    future: asyncio.Future[Any]
    decode: Callable[[bytes | None, bytes], Any]
    deadline: float


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
        self._wire: Wire | None = None
        self._up = asyncio.Event()
        self._kicked = False
        self._closed = False
        self._sid = 0
        self._subscriptions: dict[int, Subscription] = {}
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
        self._subscriptions[self._sid] = Subscription(pattern, handler, group)
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
            wire = Wire(self._subscriptions, self._log)
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

    async def _last(self, wire: Wire) -> None:
        """Stay connected, by one wire after another, until one ends."""
        while not wire.ended.is_set() and not self._closed:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._login.renew or None):
                    await wire.ended.wait()
                    return
            successor = Wire(self._subscriptions, self._log)
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

    async def _succeed(self, wire: Wire, successor: Wire) -> None:
        """Both hear until the server has read all that the first had to say: something may come twice, but nothing is lost."""
        self._announce(successor)
        self._wire = successor
        wire.write_out()
        try:
            for each in (successor, wire):  # once the successor hears: an answer to what the first has asked may come when that is gone
                try:
                    await each.flush(timeout=2)
                except Exception as error:  # neither holds up the other; a successor that is not sound will be found out like any
                    self._log.debug("nats", error=str(error))
        finally:
            await wire.end()

    async def _connect(self, wire: Wire, timeout: float) -> None:
        await wire.open(self._login, timeout)

    def _begin(self, wire: Wire) -> None:
        self._announce(wire)
        self._wire = wire
        self.connections += 1
        self._kick()
        self._up.set()
        self._log.info("connected to the bus", server=str(wire.connected_url.netloc if wire.connected_url else ""), connections=self.connections)
        self._tell()

    def _announce(self, wire: Wire) -> None:
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
        check_subject(subject)
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
