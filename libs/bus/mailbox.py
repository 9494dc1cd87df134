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
    """Subjects take turns, so that one who says very much is heard no more than the others, and makes nobody's words but its own be dropped."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[Arrived]] = {}
        self._number = 0
        self._wakeup = asyncio.Event()

    def put(self, message: Arrived) -> bool:
        """False when the oldest had to be dropped for it."""
        full = self._number == LISTEN_BUFFER
        if full:
            most = message.subject if message.subject in self._waiting else max(self._waiting, key=lambda subject: len(self._waiting[subject]))
            self._take(most)
        self._waiting.setdefault(message.subject, deque()).append(message)
        self._number += 1
        self._wakeup.set()
        return not full

    async def messages(self) -> AsyncGenerator[Arrived, None]:
        while True:
            while self._waiting:
                yield self._take(next(iter(self._waiting)))
            self._wakeup.clear()
            await self._wakeup.wait()

    def _take(self, subject: str) -> Arrived:
        """Its oldest; then it is the others' turn."""
        own = self._waiting.pop(subject)
        message = own.popleft()
        self._number -= 1
        if own:
            self._waiting[subject] = own
        return message
