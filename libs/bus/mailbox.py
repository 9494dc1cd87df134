"""Where messages of core NATS wait for whoever listens: bounded, because a slow listener must not fill the memory, and the newest matter most."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator

import msgspec

LISTEN_BUFFER = 4096


class Arrived(msgspec.Struct, frozen=True):
    """A message that needs no acknowledgement."""

    subject: str
    data: bytes
    sequence: int = 0
    deliveries: int = 1

    def ack(self) -> None: ...
    def nak(self, delay: float = 0.0) -> None: ...
    def term(self) -> None: ...


class Mailbox:
    def __init__(self) -> None:
        self._waiting: deque[Arrived] = deque()
        self._wakeup = asyncio.Event()

    def put(self, message: Arrived) -> bool:
        """False when the oldest had to be dropped for it."""
        full = len(self._waiting) == LISTEN_BUFFER
        if full:
            self._waiting.popleft()
        self._waiting.append(message)
        self._wakeup.set()
        return not full

    async def messages(self) -> AsyncGenerator[Arrived, None]:
        while True:
            while self._waiting:
                yield self._waiting.popleft()
            self._wakeup.clear()
            await self._wakeup.wait()
