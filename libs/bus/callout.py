"""Who a client of the bus is: the server asks, one of the schedulers answers, and may have a connection ended.

The server passes on the client's nkey, its signature of the server's nonce, and the name that it gives itself; it checks neither. What comes back is
a JWT that confines the connection, and ends it when the JWT lapses: the client then connects again and is asked about anew. The user's name in it is
`<worker>.<key>`, so that one key's connections can be told from another's.
"""

import asyncio
import base64
import binascii
from bisect import insort
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import datetime
from typing import Any

import msgspec
import structlog
from prometheus_client import CollectorRegistry, Counter

from libs.bus.accounts import CalloutKeys, permissions
from libs.bus.connection import Connection, connect
from libs.bus.nkeys import jwt, nkey, public_of
from libs.bus.wire import Login
from libs.tokens import is_signed, public_key

GROUP = "callout"
_ASKED = "$SYS.REQ.USER.AUTH"
_EVENTS = "$SYS.ACCOUNT.WORKERS."
_PAGE = 1024
MOST = 2
"""Connections that a key may have: whoever renews one has two for a moment. The oldest goes."""
LOOK = 5.0
"""Seconds between two looks whether we (still) know whom to admit, if nothing else is a reason to: a question that comes when we do not is one."""

logger = structlog.get_logger()


class _Client(msgspec.Struct, frozen=True):
    nonce: str = ""
    host: str = ""


class _Connecting(msgspec.Struct, frozen=True):
    nkey: str = ""
    sig: str = ""
    name: str = ""


class _Server(msgspec.Struct, frozen=True):
    id: str


class _Nats(msgspec.Struct, frozen=True):
    server_id: _Server
    user_nkey: str
    client_info: _Client
    connect_opts: _Connecting


class _Request(msgspec.Struct, frozen=True):
    iat: int
    nats: _Nats


class _Held(msgspec.Struct, frozen=True):
    cid: int
    start: datetime
    authorized_user: str = ""


class _Page(msgspec.Struct, frozen=True):
    connections: list[_Held] | None = None
    offset: int = 0
    total: int = 0


class _Connections(msgspec.Struct, frozen=True):
    server: _Server
    data: _Page = _Page()


class _Whose(msgspec.Struct, frozen=True):
    id: int
    start: datetime
    user: str = ""


class _Event(msgspec.Struct, frozen=True):
    server: _Server
    client: _Whose


_request = msgspec.json.Decoder(_Request).decode
_connections = msgspec.json.Decoder(_Connections).decode
_event = msgspec.json.Decoder(_Event).decode


def answer(
    question: bytes, key_of: Callable[[str], str | None], issuer: str, seconds: float, withheld: Callable[[str], Mapping[str, float]] = lambda _: {}
) -> tuple[bytes, str]:
    """What to tell the server, and whom it admits ("" for nobody). `key_of` gives a worker's public key by its name, None for who is no worker;
    `issuer` is the seed to sign with; `withheld` what a worker may not say now, and for how many seconds. All times are by the server's own clock,
    which judges them. Raises msgspec.MsgspecError, ValueError for what is no question."""
    request = _request(_decoded(question.split(b".")[1]))
    asked, now = request.nats, request.iat
    said, name = asked.connect_opts, asked.connect_opts.name
    answer: dict[str, Any] = {"type": "authorization_response", "version": 2}
    admitted = ""
    if asked.client_info.nonce and (key := key_of(name)) is not None and _is_its_own(key, said, asked.client_info.nonce):
        admitted = name
        kept = withheld(name)
        seconds = min([seconds, *(left + 2 for left in kept.values())])  # whole seconds count: once it is over, not just before
        user = {**permissions(name, kept), "type": "user", "version": 2, "subs": -1, "data": -1, "payload": -1}
        claims = {"sub": asked.user_nkey, "aud": "WORKERS", "name": user_name(name, key), "exp": now + int(seconds), "nats": user}
        answer["jwt"] = _issued(issuer, claims, now)
    else:
        answer["error"] = "denied"
    return _issued(issuer, {"sub": asked.user_nkey, "aud": asked.server_id.id, "nats": answer}, now).encode(), admitted


def user_name(worker: str, key: str) -> str:
    """What a connection of a worker with a key is called in the server."""
    return f"{worker}.{key}"


class Doorkeeper:
    """Answers while `keep` runs, and it `knows` who is a worker; whoever comes to know tells it to `look`. `cut` and `sweep` end connections; of
    those of one key that are too many the oldest are ended by themselves."""

    def __init__(
        self, asked: Connection, system: Connection, key_of: Callable[[str], str | None], issuer: str, seconds: float, knows: Callable[[], bool]
    ) -> None:
        self._asked = asked
        self._system = system
        self._key_of = key_of
        self._issuer = issuer
        self._seconds = seconds
        self._knows = knows
        self._refused: Counter | None = None
        self._look = asyncio.Event()
        self._withheld: dict[str, dict[str, float]] = {}
        """By worker: what it may not say, and until when by the loop's clock."""
        self._pages, self._lists = system.new_inbox(), system.new_inbox()
        self._held: dict[str, list[tuple[datetime, int, str]]] = {}
        """By user: when each connection began, its number and its server, the oldest first, whatever we heard of first."""
        self._seen = 0
        system.subscribe(f"{self._pages}.*.*", self._kick_unwanted)
        system.subscribe(self._lists, self._listed)
        system.subscribe(f"{_EVENTS}CONNECT", self._came)
        system.subscribe(f"{_EVENTS}DISCONNECT", self._went)
        system.watchers.add(self._reconnected)
        self._reconnected()

    @property
    def connected(self) -> bool:
        return self._asked.connected and self._system.connected

    def measure(self, registry: CollectorRegistry) -> None:
        """How many were not admitted."""
        self._refused = Counter("penstock_bus_strangers", "Connections to the bus that were not admitted", registry=registry)

    async def keep(self) -> None:
        """Answer for ever, but only while it is known who is a worker: meanwhile the server asks others."""
        answering = None
        while True:
            self._look.clear()
            if self._knows() and answering is None:
                answering = self._asked.subscribe(_ASKED, self._answer, GROUP)
            elif not self._knows() and answering is not None:
                logger.warning("nobody is admitted by what may have changed: the log cannot be read")
                await self._asked.unsubscribe(answering)
                answering = None
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK):
                    await self._look.wait()

    def look(self) -> None:
        """It may be known by now who is a worker, or not any more."""
        self._look.set()

    def cut(self, worker: str, key: str) -> None:
        """End the connections of a worker with this key, without waiting for it; whoever wants to be sure says it again."""
        user = user_name(worker, key)
        query = {"auth": True, "acc": "WORKERS", "user": user, "limit": _PAGE}
        self._system.write(b"$SYS.REQ.SERVER.PING.CONNZ", f"{self._pages}.{user}".encode(), msgspec.json.encode(query))

    def withhold(self, worker: str, kind: str, seconds: float) -> None:
        """Let it say nothing of this kind ("reports", "logs") for so long: its connections end, and the next ones do not allow it."""
        self._withheld.setdefault(worker, {})[kind] = asyncio.get_running_loop().time() + seconds
        if (key := self._key_of(worker)) is not None:
            self.cut(worker, key)

    def _left(self, worker: str) -> Mapping[str, float]:
        """What it may not say now, and for how many seconds more."""
        now = asyncio.get_running_loop().time()
        left = {kind: until - now for kind, until in self._withheld.get(worker, {}).items() if until > now}
        if not left:
            self._withheld.pop(worker, None)
        return left

    def sweep(self) -> None:
        """End the connections of all who are no workers (any more), as `cut` does."""
        self._list("PING", 0)

    def _list(self, server: str, offset: int) -> None:
        query = {"auth": True, "acc": "WORKERS", "limit": _PAGE, "offset": offset}
        self._system.write(f"$SYS.REQ.SERVER.{server}.CONNZ".encode(), self._lists.encode(), msgspec.json.encode(query))

    def _listed(self, subject: bytes, reply: bytes, data: bytes, headers: bytes | None) -> None:
        """A page of one server's connections."""
        found = _connections(data)
        held = found.data.connections or []
        for one in held:
            name, _, key = one.authorized_user.rpartition(".")
            if self._knows() and self._key_of(name) != key:
                self._kick(found.server.id, one.cid, one.authorized_user)
            else:
                self._note(one.authorized_user, found.server.id, one.cid, one.start)
        if held and found.data.offset + len(held) < found.data.total:
            self._list(found.server.id, found.data.offset + len(held))

    def _kick_unwanted(self, subject: bytes, reply: bytes, data: bytes, headers: bytes | None) -> None:
        """A page of one user's connections, whom the subject names."""
        found, user = _connections(data), subject.decode().removeprefix(f"{self._pages}.")
        for held in found.data.connections or ():
            if held.authorized_user == user:
                self._kick(found.server.id, held.cid, user)

    def _kick(self, server: str, cid: int, user: str) -> None:
        """What asks for no answer is ignored there."""
        logger.info("a connection is ended", user=user)
        self._system.write(f"$SYS.REQ.SERVER.{server}.KICK".encode(), self._system.new_inbox().encode(), msgspec.json.encode({"cid": cid}))

    def _came(self, subject: bytes, reply: bytes, data: bytes, headers: bytes | None) -> None:
        event = _event(data)
        self._note(event.client.user, event.server.id, event.client.id, event.client.start)

    def _note(self, user: str, server: str, cid: int, start: datetime) -> None:
        held = self._held.setdefault(user, [])
        if (start, cid, server) not in held:
            insort(held, (start, cid, server))
        while len(held) > MOST:
            _, oldest, there = held.pop(0)
            self._kick(there, oldest, user)

    def _went(self, subject: bytes, reply: bytes, data: bytes, headers: bytes | None) -> None:
        event = _event(data)
        left = [one for one in self._held.get(event.client.user, ()) if one[1:] != (event.client.id, event.server.id)]
        if left:
            self._held[event.client.user] = left
        else:
            self._held.pop(event.client.user, None)

    def _reconnected(self) -> None:
        """What happened meanwhile nobody told us."""
        if self._system.connections != self._seen:
            self._seen = self._system.connections
            self._held.clear()
            self.sweep()

    def _answer(self, subject: bytes, reply: bytes, data: bytes, headers: bytes | None) -> None:
        if not self._knows():
            self.look()
            return
        text, admitted = answer(data, self._key_of, self._issuer, self._seconds, self._left)
        if not admitted:
            asked = _request(_decoded(data.split(b".")[1])).nats
            logger.warning("a stranger wants to join", name=asked.connect_opts.name[:64], host=asked.client_info.host)
            if self._refused is not None:
                self._refused.inc()
        self._asked.write(reply, b"", text)


@asynccontextmanager
async def connect_doorkeeper(
    url: str,
    seeds: CalloutKeys,
    key_of: Callable[[str], str | None],
    seconds: float,
    knows: Callable[[], bool] = lambda: True,
    patience: float = 2.0,
) -> AsyncIterator[Doorkeeper]:
    """What answers for workers once it is told to `keep` the door, as one of the schedulers that do: each is admitted for `seconds`."""
    async with AsyncExitStack() as stack:
        asked = await stack.enter_async_context(connect(Login(url, seeds.asked, "callout"), "_INBOX", patience))
        system = await stack.enter_async_context(connect(Login(url, seeds.system, "callout"), "_INBOX", patience))
        yield Doorkeeper(asked, system, key_of, seeds.issuer, seconds, knows)


def _is_its_own(key: str, said: _Connecting, nonce: str) -> bool:
    try:
        return public_of(said.nkey) == key and is_signed(key, nonce.encode(), _decoded(said.sig.encode()))
    except (ValueError, binascii.Error):
        return False


def _issued(seed: str, claims: dict[str, Any], now: int) -> str:
    return jwt(seed, {**claims, "iss": nkey(public_key(seed), "account"), "iat": now})


def _decoded(text: bytes) -> bytes:
    return base64.urlsafe_b64decode(text + b"=" * (-len(text) % 4))
