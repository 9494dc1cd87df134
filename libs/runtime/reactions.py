"""Message in, commands out: the consumer that drives a command loop from the bus (ARCHITECTURE.md: reactions).

At least once, in any order: the decision is made on the stream's recorded state, so a repeat decides nothing. A message is acked once what came of
it is recorded. Only a deterministic failure counts towards parking; an outage parks nothing.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Generic, TypeVar

import msgspec
import structlog
from prometheus_client import CollectorRegistry, Counter

from libs.bus.bus import Bus, Message
from libs.eventlog.log import LogUnavailable
from libs.runtime.commands import CommandLoop, Outcome
from libs.runtime.decisions import Cause, Early, Refused
from proto.catalogue import UnknownEvent
from proto.topology import Consumer

logger = structlog.get_logger()

C = TypeVar("C")

PARK_AFTER = 5
"""Failures after which a message that fails by itself is parked; deliveries during an outage are none."""
EARLY_TRIES = 8
"""Deliveries (some 5 s) after which a message whose time has not come is let go: it must not take the place of others for ever. Whoever sent it
sends it again, a worker by itself, an event's sweep from the log."""
FOREIGN = "foreign"
"""The kind of refusal that says: it was not the sender's to ask."""
REMEMBERED = 1000
UNKNOWN_AGAIN = 5.0


class ReactionConsumer(Generic[C]):
    """Feeds `loop` with what `react` makes of each message of `consumer`. `react` is pure; what it raises is a deterministic failure."""

    def __init__(
        self,
        bus: Bus,
        consumer: Consumer,
        react: Callable[[Message], Sequence[tuple[C, Cause]]],
        loop: CommandLoop[C, Any],
        registry: CollectorRegistry,
        prepare: Callable[[Sequence[Message]], Awaitable[None]] | None = None,
    ) -> None:
        """`prepare` may fetch, once a batch, what `react` needs to know; while it cannot, the batch is given back."""
        self._prepare = prepare
        self._bus = bus
        self._consumer = consumer
        self._react = react
        self._loop = loop
        self._failures: dict[int, int] = {}
        name = consumer.name.replace("-", "_")
        self._handled = Counter(f"penstock_{name}_messages", "Messages handled, by what came of them", ["outcome"], registry=registry)

    async def run(self) -> None:
        """Consume for ever."""
        async with self._bus.consume(self._consumer) as batches:
            async for batch in batches:
                if self._prepare is not None:
                    try:
                        await self._prepare(batch)
                    except LogUnavailable:
                        for message in batch:
                            message.nak(0.5)
                        continue
                for message in batch:
                    self._handle(message)

    def _handle(self, message: Message) -> None:
        try:
            commands = self._react(message)
        except UnknownEvent as error:  # not poison, but newer than this code
            self._count("unknown")
            logger.error("an event that this version does not know waits for one that does", subject=message.subject, tag=str(error))
            message.nak(UNKNOWN_AGAIN)
            return
        except msgspec.MsgspecError as error:  # no message at all: to read it again makes it none
            self._park(message, error)
            return
        except Exception as error:  # a poison message must not stop the others
            self._failed(message, error)
            return
        if not commands:
            message.ack()
            return
        waiting: asyncio.Future[Any]
        if len(commands) == 1:
            waiting = self._loop.submit(*commands[0])
        else:
            waiting = asyncio.gather(*(self._loop.submit(command, cause) for command, cause in commands))
        waiting.add_done_callback(partial(self._settle, message))

    def _settle(self, message: Message, done: "asyncio.Future[Outcome | list[Outcome]]") -> None:
        if done.cancelled():
            return
        error = done.exception()
        match error:
            case None:
                self._count("done")
                message.ack()
            case Refused():
                # What nobody honest asks for is counted by itself: an alarm.
                self._count(error.kind if error.kind == FOREIGN else "refused")
                say = logger.warning if error.kind == FOREIGN else logger.info
                say("refused", consumer=self._consumer.name, subject=message.subject, kind=error.kind, why=error.message)
                message.ack()
            case Early() if message.deliveries >= EARLY_TRIES:
                self._count("given up")
                logger.warning("a message came too early for too long", consumer=self._consumer.name, subject=message.subject)
                message.ack()
            case Early():
                self._count("early")
                message.nak(min(5.0, 0.02 * 2 ** min(message.deliveries, 10)))
            case LogUnavailable():
                self._count("unavailable")
                message.nak(0.5)
            case _:
                self._failed(message, error)

    def _failed(self, message: Message, error: BaseException) -> None:
        failures = self._failures[message.sequence] = self._failures.pop(message.sequence, 0) + 1
        if failures < PARK_AFTER:
            while len(self._failures) > REMEMBERED:
                del self._failures[next(iter(self._failures))]
            self._count("failed")
            logger.warning("a message failed", consumer=self._consumer.name, subject=message.subject, failures=failures, exc_info=error)
            message.nak(0.2 * 2**failures)
            return
        del self._failures[message.sequence]
        self._park(message, error)

    def _park(self, message: Message, error: BaseException) -> None:
        self._count("parked")
        logger.error("a message is parked", consumer=self._consumer.name, subject=message.subject, sequence=message.sequence, exc_info=error)
        message.term()

    def _count(self, outcome: str) -> None:
        self._handled.labels(outcome).inc()
