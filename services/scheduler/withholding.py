"""`withhold.<worker>`: the builds service says who fills a stream; whoever admits workers to the bus sees to it that it does not go on."""

import msgspec
import structlog

from libs.bus.bus import Bus
from libs.bus.callout import Doorkeeper
from proto.messages import Withhold

logger = structlog.get_logger()

_decode = msgspec.msgpack.Decoder(Withhold).decode


async def heed_quotas(bus: Bus, door: Doorkeeper) -> None:
    """For ever. Every instance hears it, for any of them may be asked about the worker next."""
    async with bus.listen("withhold.*") as heard:
        async for message in heard:
            try:
                said = _decode(message.data)
            except msgspec.DecodeError:
                logger.error("a message cannot be read", subject=message.subject)
                continue
            door.withhold(message.subject.partition(".")[2], said.kind, said.seconds)
