"""`why.<build>`, asked by the gateway over the bus: why stages wait (waiting.py knows)."""

import asyncio

import msgspec

from libs.bus.bus import Bus
from proto.messages import WhyWaiting
from services.scheduler.scheduler import Scheduler


async def answer_why(bus: Bus, scheduler: Scheduler) -> None:
    """Say why stages wait, for ever. Any instance is asked, whether it leads or not."""

    async def answer(subject: str, question: bytes) -> bytes:
        return msgspec.msgpack.encode(scheduler.waits(msgspec.msgpack.decode(question, type=WhyWaiting).attempts))

    async with bus.answering("why.*", "scheduler", answer):
        await asyncio.Event().wait()
