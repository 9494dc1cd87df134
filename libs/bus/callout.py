"""Who a client of the bus is: the server asks, one of the schedulers answers, and may have a connection ended.

The server passes on the client's nkey, its signature of the server's nonce, and the name that it gives itself; it checks neither. What comes back is
a JWT that confines the connection, and ends it when the JWT lapses: the client then connects again and is asked about anew. The user's name in it is
`<worker>.<key>`, so that one key's connections can be told from another's.
"""

import base64
import binascii
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import msgspec
import structlog

from libs.bus.accounts import CalloutKeys, permissions
from libs.bus.connection import Connection, Login, connect
from libs.bus.nkeys import jwt, nkey, public_of
from libs.tokens import is_signed, public_key

GROUP = "callout"
_ASKED = "$SYS.REQ.USER.AUTH"
_PAGE = 1024

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
    authorized_user: str = ""


class _Page(msgspec.Struct, frozen=True):
    connections: list[_Held] | None = None


class _Connections(msgspec.Struct, frozen=True):
    server: _Server
    data: _Page = _Page()


_request = msgspec.json.Decoder(_Request).decode
_connections = msgspec.json.Decoder(_Connections).decode


def answer(question: bytes, key_of: Callable[[str], str | None], issuer: str, seconds: float) -> tuple[bytes, str]:
    """What to tell the server, and whom it admits ("" for nobody). `key_of` gives a worker's public key by its name, None for who is no worker;
    `issuer` is the seed to sign with. All times are by the server's own clock, which judges them.
    Raises msgspec.MsgspecError, ValueError for what is no question."""
    request = _request(_decoded(question.split(b".")[1]))
    asked, now = request.nats, request.iat
    said, name = asked.connect_opts, asked.connect_opts.name
    answer: dict[str, Any] = {"type": "authorization_response", "version": 2}
    admitted = ""
    if asked.client_info.nonce and (key := key_of(name)) is not None and _is_its_own(key, said, asked.client_info.nonce):
        admitted = name
        user = {**permissions(name), "type": "user", "version": 2, "subs": -1, "data": -1, "payload": -1}
        claims = {"sub": asked.user_nkey, "aud": "WORKERS", "name": user_name(name, key), "exp": now + int(seconds), "nats": user}
        answer["jwt"] = _issued(issuer, claims, now)
    else:
        answer["error"] = "denied"
    return _issued(issuer, {"sub": asked.user_nkey, "aud": asked.server_id.id, "nats": answer}, now).encode(), admitted


def user_name(worker: str, key: str) -> str:
    """What a connection of a worker with a key is called in the server."""
    return f"{worker}.{key}"


class Doorkeeper:
    """Answers while it is entered (see `keeping_the_door`). `cut` ends connections."""

    def __init__(self, asked: Connection, system: Connection, key_of: Callable[[str], str | None], issuer: str, seconds: float) -> None:
        self._asked = asked
        self._system = system
        self._key_of = key_of
        self._issuer = issuer
        self._seconds = seconds
        self._pages = system.new_inbox()
        self._unwanted: set[str] = set()
        asked.subscribe(_ASKED, self._answer, GROUP)
        system.subscribe(self._pages, self._kick)

    @property
    def connected(self) -> bool:
        return self._asked.connected and self._system.connected

    def cut(self, worker: str, key: str) -> None:
        """End the connections of a worker with this key, without waiting for it; whoever wants to be sure says it again."""
        user = user_name(worker, key)
        self._unwanted.add(user)
        query = {"auth": True, "acc": "WORKERS", "user": user, "limit": _PAGE}
        self._system.write(b"$SYS.REQ.SERVER.PING.CONNZ", self._pages.encode(), msgspec.json.encode(query))

    def _kick(self, subject: bytes, reply: bytes, data: bytes, headers: bytes | None) -> None:
        """One server's list of connections. What asks for no answer is ignored there."""
        found = _connections(data)
        for held in found.data.connections or ():
            if held.authorized_user in self._unwanted:
                logger.info("a connection is ended", user=held.authorized_user)
                kick = f"$SYS.REQ.SERVER.{found.server.id}.KICK".encode()
                self._system.write(kick, self._system.new_inbox().encode(), msgspec.json.encode({"cid": held.cid}))

    def _answer(self, subject: bytes, reply: bytes, data: bytes, headers: bytes | None) -> None:
        text, admitted = answer(data, self._key_of, self._issuer, self._seconds)
        if not admitted:
            asked = _request(_decoded(data.split(b".")[1])).nats
            logger.warning("a stranger wants to join", name=asked.connect_opts.name[:64], host=asked.client_info.host)
        self._asked.write(reply, b"", text)


@asynccontextmanager
async def keeping_the_door(
    url: str, seeds: CalloutKeys, key_of: Callable[[str], str | None], seconds: float, patience: float = 2.0
) -> AsyncIterator[Doorkeeper]:
    """Answer for workers, each admitted for `seconds`, as one of the schedulers that do."""
    async with AsyncExitStack() as stack:
        asked = await stack.enter_async_context(connect(Login(url, seeds.asked, "callout"), "_INBOX", patience))
        system = await stack.enter_async_context(connect(Login(url, seeds.system, "callout"), "_INBOX", patience))
        yield Doorkeeper(asked, system, key_of, seeds.issuer, seconds)


def _is_its_own(key: str, said: _Connecting, nonce: str) -> bool:
    try:
        return public_of(said.nkey) == key and is_signed(key, nonce.encode(), _decoded(said.sig.encode()))
    except (ValueError, binascii.Error):
        return False


def _issued(seed: str, claims: dict[str, Any], now: int) -> str:
    return jwt(seed, {**claims, "iss": nkey(public_key(seed), "account"), "iat": now})


def _decoded(text: bytes) -> bytes:
    return base64.urlsafe_b64decode(text + b"=" * (-len(text) % 4))
