"""One TCP connection to NATS, from its making to its first trouble.

What is hot goes around nats-py's queue and task for each subscription and its header dictionaries (measured: 8 µs for a publish with its ack instead
of 28, 3 µs for a delivery instead of 5 and more).
"""

import asyncio
import base64
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import NamedTuple

import structlog
from nats.aio.client import Client
from nats.aio.subscription import Subscription as Registered

from libs.bus.nkeys import nkey
from libs.tokens import public_key, raw_signature

Handler = Callable[[bytes, bytes, bytes, bytes | None], None]
"""What is called with (subject, reply, data, raw headers) of each message. It must not block; what it raises is logged."""

LOOK = 1.5
SILENT = 3
"""Seconds between two looks whether the server has said anything, and how many may find nothing: at the first it may have had nothing to say, then
it is pinged. So one that is dead is given up 4.5 to 6 s after its last word."""
_NONCE = re.compile(r"[A-Za-z0-9_-]{8,64}")


class Login(NamedTuple):
    """`url` may list several servers, separated by commas; `seed` is the Ed25519 key to show oneself by; `name` who one says one is. `renew`: seconds
    after which a connection is replaced by another, so that the server need not end it when its admission lapses (0: it does not)."""

    url: str
    seed: str
    name: str
    renew: float = 0.0

    def __repr__(self) -> str:
        return f"Login({self.name!r} at {self.url!r})"


class Subscription(NamedTuple):
    pattern: str
    handler: Handler
    group: str


class Wire(Client):  # type: ignore[misc, unused-ignore]
    """One TCP connection's life: `ended` is set at its first trouble, and whoever made it ends it."""

    def __init__(self, subscriptions: Mapping[int, Subscription], log: structlog.stdlib.BoundLogger) -> None:
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
        self._subs[sid] = Registered(self, sid, subject, group)
        self.put(f"SUB {subject} {group} {sid}\r\n".encode())

    async def open(self, login: Login, timeout: float) -> None:
        """Connect. Raises what nats-py does."""

        async def ignore(error: Exception) -> None:
            self._logger.debug("nats", error=str(error))

        def signed(nonce: str) -> bytes:
            # Whoever poses as the server must not get a signature of anything that means something elsewhere.
            if not _NONCE.fullmatch(nonce):
                raise ValueError("the server's nonce is none")
            return base64.urlsafe_b64encode(raw_signature(login.seed, nonce.encode())).rstrip(b"=")

        self._public_nkey = nkey(public_key(login.seed))
        self._auth_configured = True
        await self.connect(
            servers=[server.strip() for server in login.url.split(",")],
            signature_cb=signed,
            name=login.name,
            allow_reconnect=False,
            max_reconnect_attempts=1,
            reconnect_time_wait=0,
            connect_timeout=timeout,  # type: ignore[arg-type, unused-ignore]  # seconds, like any
            error_cb=ignore,
        )

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
