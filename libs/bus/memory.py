"""The bus in one process, for tests. It promises no more than the real one: it delivers again, and out of order when asked."""

import asyncio
import itertools
import random
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager

from libs.bus.bus import Ack, Answer, BusUnavailable, StreamFull, StreamState, TooLarge, check_subject, matches
from libs.bus.mailbox import Arrived, Mailbox
from proto.topology import MAX_PAYLOAD, Consumer, Stream


class _Delivered:
    """One delivery of a stored message to a durable consumer."""

    def __init__(self, stored: Arrived, deliveries: int, durable: "_Durable") -> None:
        self.subject = stored.subject
        self.data = bytes(stored.data)
        self.sequence = stored.sequence
        self.deliveries = deliveries
        self._durable = durable

    def ack(self) -> None:
        self._durable.due.pop(self.sequence, None)

    def nak(self, delay: float = 0.0) -> None:
        if self.sequence in self._durable.due:
            self._durable.due[self.sequence] = asyncio.get_running_loop().time() + delay
            self._durable.changed()

    def term(self) -> None:
        self.ack()


class _Durable:
    """A consumer: how far it has read, and when each unacknowledged sequence is handed out again."""

    def __init__(self, spec: Consumer) -> None:
        self.spec = spec
        self.read = 0
        self.due: dict[int, float] = {}
        self.deliveries: dict[int, int] = {}
        self.wakeups: set[asyncio.Event] = set()

    def changed(self) -> None:
        for wakeup in self.wakeups:
            wakeup.set()


class _Stream:
    def __init__(self, spec: Stream, made: int) -> None:
        self.spec = spec
        self.created = f"memory-{made}"
        self.sequence = 0
        self.size = 0
        self.stored: dict[int, Arrived] = {}
        self.sequence_of_id: dict[str, int] = {}

    def append(self, subject: str, data: bytes, msg_id: str) -> Ack:
        if msg_id and msg_id in self.sequence_of_id:
            return Ack(self.spec.name, self.sequence_of_id[msg_id], True)
        if self.size + len(data) > self.spec.max_bytes:
            if self.spec.full == "new":
                raise StreamFull(self.spec.name)
            while self.stored and self.size + len(data) > self.spec.max_bytes:
                self.remove(next(iter(self.stored)))
        self.sequence += 1
        self.stored[self.sequence] = Arrived(subject, bytes(data), self.sequence)
        self.size += len(data)
        if msg_id:
            self.sequence_of_id[msg_id] = self.sequence
        return Ack(self.spec.name, self.sequence)

    def remove(self, sequence: int) -> None:
        self.size -= len(self.stored.pop(sequence).data)


class MemoryBus:
    """A Bus. Tests may set `connected` to False (an outage), call `lose` (a stream made anew), and pass `disorder` to have batches shuffled."""

    def __init__(self, max_payload: int = MAX_PAYLOAD, disorder: random.Random | None = None) -> None:
        self.connections = 1
        self.dropped = 0
        self._online = asyncio.Event()
        self._online.set()
        self._max_payload = max_payload
        self._disorder = disorder
        self._streams: dict[str, _Stream] = {}
        self._durables: dict[str, _Durable] = {}
        self._tails: set[asyncio.Event] = set()
        self._listeners: set[tuple[str, Mailbox]] = set()
        self._answering: list[tuple[str, Answer]] = []
        self._made = itertools.count(1)

    @property
    def connected(self) -> bool:
        return self._online.is_set()

    @connected.setter
    def connected(self, online: bool) -> None:
        if online and not self._online.is_set():
            self.connections += 1
            self._online.set()
            self._wake()
        elif not online:
            self._online.clear()

    async def wait_connected(self) -> None:
        await self._online.wait()

    def lose(self, stream: str) -> None:
        """The stream is deleted and made again, empty."""
        self._streams[stream] = _Stream(self._streams[stream].spec, next(self._made))
        for name, durable in self._durables.items():
            if durable.spec.stream == stream:
                fresh = self._durables[name] = _Durable(durable.spec)
                fresh.wakeups = durable.wakeups
        self._wake()

    async def ensure(self, streams: Sequence[Stream], consumers: Sequence[Consumer]) -> None:
        self._must_be_connected()
        for stream in streams:
            if stream.name in self._streams:
                self._streams[stream.name].spec = stream
            else:
                self._streams[stream.name] = _Stream(stream, next(self._made))
        for consumer in consumers:
            if consumer.name in self._durables:
                self._durables[consumer.name].spec = consumer
            else:
                self._durables[consumer.name] = _Durable(consumer)

    def publish(self, subject: str, data: bytes, msg_id: str = "") -> asyncio.Future[Ack]:
        future: asyncio.Future[Ack] = asyncio.get_running_loop().create_future()
        try:
            self._check(subject, data)
            stream = next((s for s in self._streams.values() if any(matches(p, subject) for p in s.spec.subjects)), None)
            if stream is None:
                raise BusUnavailable(f"no stream takes {subject}")
            future.set_result(stream.append(subject, data, msg_id))
        except (BusUnavailable, TooLarge) as error:
            future.set_exception(error)
        else:
            self._hand_out(subject, data)
            self._wake()
        return future

    async def send(self, subject: str, data: bytes) -> None:
        self._check(subject, data)
        self._hand_out(subject, data)

    async def ask(self, subject: str, data: bytes) -> bytes:
        self._check(subject, data)
        answer = next((answer for pattern, answer in self._answering if matches(pattern, subject)), None)
        if answer is None:
            raise BusUnavailable("nobody answers there")
        return await answer(subject, data)

    @asynccontextmanager
    async def answering(self, subject: str, group: str, answer: Answer) -> AsyncIterator[None]:
        self._answering.append((subject, answer))
        try:
            yield
        finally:
            self._answering.remove((subject, answer))

    @asynccontextmanager
    async def listen(self, subject: str) -> AsyncIterator[AsyncIterator[Arrived]]:
        mailbox = Mailbox()
        listener = (subject, mailbox)
        self._listeners.add(listener)
        try:
            async with aclosing(mailbox.messages()) as iterator:
                yield iterator
        finally:
            self._listeners.discard(listener)

    @asynccontextmanager
    async def consume(self, consumer: Consumer) -> AsyncIterator[AsyncIterator[list[_Delivered]]]:
        await self.ensure((), (consumer,))
        wakeup = asyncio.Event()
        self._durables[consumer.name].wakeups.add(wakeup)

        async def batches() -> AsyncGenerator[list[_Delivered], None]:
            while True:
                await self.wait_connected()
                wakeup.clear()
                batch = self._ready(consumer)
                if batch:
                    yield batch
                    continue
                due = min(self._durables[consumer.name].due.values(), default=None)
                delay = None if due is None else max(0.0, due - asyncio.get_running_loop().time())
                try:
                    await asyncio.wait_for(wakeup.wait(), delay)
                except TimeoutError:
                    continue

        try:
            async with aclosing(batches()) as iterator:
                yield iterator
        finally:
            self._durables[consumer.name].wakeups.discard(wakeup)

    @asynccontextmanager
    async def tail(self, stream: str, subject: str, after_sequence: int = 0) -> AsyncIterator[AsyncIterator[list[Arrived]]]:
        wakeup = asyncio.Event()

        async def batches() -> AsyncGenerator[list[Arrived], None]:
            after, created = after_sequence, ""
            while True:
                wakeup.clear()
                held = self._streams.get(stream)
                if held is not None and self.connected:
                    if created not in ("", held.created):
                        after = 0
                    created = held.created
                    batch = [m for m in held.stored.values() if m.sequence > after and matches(subject, m.subject)]
                    if batch:
                        after = batch[-1].sequence
                        yield batch
                        continue
                await wakeup.wait()

        self._tails.add(wakeup)
        try:
            async with aclosing(batches()) as iterator:
                yield iterator
        finally:
            self._tails.discard(wakeup)

    async def last(self, stream: str, subject: str) -> Arrived | None:
        self._must_be_connected()
        stored = self._streams[stream].stored.values() if stream in self._streams else ()
        return next((m for m in reversed(list(stored)) if matches(subject, m.subject)), None)

    async def purge(self, stream: str, subject: str, last: int | None = None) -> None:
        self._must_be_connected()
        held = self._streams.get(stream)
        if held is None:
            raise BusUnavailable(f"no stream {stream}")
        for message in [m for m in held.stored.values() if matches(subject, m.subject) and (last is None or m.sequence <= last)]:
            held.remove(message.sequence)

    async def stream_state(self, stream: str) -> StreamState | None:
        self._must_be_connected()
        held = self._streams.get(stream)
        if held is None:
            return None
        return StreamState(held.created, held.sequence, next(iter(held.stored), held.sequence + 1), len(held.stored), held.size)

    def _ready(self, consumer: Consumer) -> list[_Delivered]:
        durable = self._durables[consumer.name]
        stream = self._streams.get(consumer.stream)
        if stream is None:
            return []
        now = asyncio.get_running_loop().time()
        for sequence in [s for s in durable.due if s not in stream.stored]:
            del durable.due[sequence]
        sequences = [s for s, at in durable.due.items() if at <= now][: consumer.batch]
        for sequence in range(durable.read + 1, stream.sequence + 1):
            if len(sequences) >= consumer.batch or len(durable.due) >= consumer.max_ack_pending:
                break
            durable.read = sequence
            stored = stream.stored.get(sequence)
            if stored is not None and any(matches(p, stored.subject) for p in consumer.subjects):
                sequences.append(sequence)
                durable.due[sequence] = now
        batch = []
        for sequence in sequences:
            durable.due[sequence] = now + consumer.ack_wait
            durable.deliveries[sequence] = durable.deliveries.get(sequence, 0) + 1
            batch.append(_Delivered(stream.stored[sequence], durable.deliveries[sequence], durable))
        if self._disorder is not None:
            self._disorder.shuffle(batch)
        return batch

    def _hand_out(self, subject: str, data: bytes) -> None:
        for pattern, mailbox in self._listeners:
            if matches(pattern, subject) and not mailbox.put(Arrived(subject, bytes(data))):
                self.dropped += 1

    def _wake(self) -> None:
        for wakeup in self._tails:
            wakeup.set()
        for durable in self._durables.values():
            durable.changed()

    def _must_be_connected(self) -> None:
        if not self.connected:
            raise BusUnavailable("not connected")

    def _check(self, subject: str, data: bytes) -> None:
        check_subject(subject)
        if len(data) > self._max_payload:
            raise TooLarge(f"{len(data)} bytes, the limit is {self._max_payload}")
        self._must_be_connected()
