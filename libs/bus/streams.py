"""Streams and consumers as they should be: made, brought up to date, made again when they have vanished or are spoilt."""

import asyncio
from collections.abc import Sequence

import structlog

from libs.bus.api import (
    CONSUMER_FAILED,
    CONSUMER_NOT_FOUND,
    STREAM_NOT_FOUND,
    Api,
    ConsumerInfo,
    Refusal,
    Reply,
    StreamInfo,
    nanoseconds,
)
from libs.bus.bus import BusUnavailable
from proto.topology import Consumer, Stream

_UNREADABLE = "creating store"
"""What the server says of a consumer whose file it cannot read."""


class Streams:
    """What was ensured once is there, as far as it is in our power."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._log = structlog.get_logger("bus")
        self._streams: dict[str, Stream] = {}
        self._consumers: dict[str, Consumer] = {}
        self._remaking: asyncio.Task[None] | None = None

    async def ensure(self, streams: Sequence[Stream], consumers: Sequence[Consumer]) -> None:
        """As Bus.ensure."""
        for stream in streams:
            await self._ensure_stream(stream)
            self._streams[stream.name] = stream
        for consumer in consumers:
            await self._ensure_consumer(consumer)
            self._consumers[consumer.name] = consumer

    async def _ensure_stream(self, stream: Stream) -> StreamInfo:
        config = {
            "name": stream.name,
            "subjects": list(stream.subjects),
            "retention": "limits",
            "storage": "file",
            "discard": stream.full,
            "max_age": nanoseconds(stream.max_age),
            "max_bytes": stream.max_bytes,
            "duplicate_window": nanoseconds(stream.dedup_window),
            "allow_direct": False,
        }
        # Update first: a create reserves the stream's room once more before the server finds that it has the stream already, and may be refused.
        try:
            return await self._api.ask(f"STREAM.UPDATE.{stream.name}", config, StreamInfo)
        except Refusal as refusal:
            if refusal.number != STREAM_NOT_FOUND:
                raise
        try:
            return await self._api.ask(f"STREAM.CREATE.{stream.name}", config, StreamInfo)
        except Refusal:
            # Somebody else makes it at the same moment, or the refusal stands.
            return await self._api.ask(f"STREAM.UPDATE.{stream.name}", config, StreamInfo)

    async def stream_info(self, name: str) -> StreamInfo:
        """Of the stream as it is, made again if it was ours and is gone: to ask is cheap, and making what is there rewrites two files."""
        try:
            return await self._api.ask(f"STREAM.INFO.{name}", {}, StreamInfo)
        except Refusal as refusal:
            if refusal.number != STREAM_NOT_FOUND or name not in self._streams:
                raise
        return await self._ensure_stream(self._streams[name])

    async def consumer_info(self, consumer: Consumer) -> ConsumerInfo:
        """The consumer as it is, made again if it is gone."""
        try:
            return await self._not_ahead(consumer, await self._api.ask(f"CONSUMER.INFO.{consumer.stream}.{consumer.name}", {}, ConsumerInfo))
        except Refusal as refusal:
            if refusal.number not in (STREAM_NOT_FOUND, CONSUMER_NOT_FOUND):
                raise
        await self.stream_info(consumer.stream)
        return await self._ensure_consumer(consumer)

    async def _ensure_consumer(self, consumer: Consumer) -> ConsumerInfo:
        """One whose file a power cut has spoilt the server can neither read nor delete, but with its stream: then that is made anew, which everyone
        can bear."""
        try:
            info = await self._create_consumer(consumer)
        except Refusal as refusal:
            stream = self._streams.get(consumer.stream)
            if refusal.number != CONSUMER_FAILED or _UNREADABLE not in str(refusal) or stream is None:
                raise
            self._log.warning("a consumer is spoilt, and its stream is made anew", consumer=consumer.name, stream=stream.name, why=str(refusal))
            await self._api.ask(f"STREAM.DELETE.{stream.name}", {}, Reply)
            await self._ensure_stream(stream)
            info = await self._create_consumer(consumer)
        return await self._not_ahead(consumer, info)

    async def _not_ahead(self, consumer: Consumer, info: ConsumerInfo) -> ConsumerInfo:
        """One that is ahead of its stream (which lost its end) would wait until the stream has grown that far again: it is made anew."""
        ahead = max(info.delivered.stream_seq, info.ack_floor.stream_seq)
        if ahead and ahead > (await self._api.ask(f"STREAM.INFO.{consumer.stream}", {}, StreamInfo)).state.last_seq:
            self._log.warning("a consumer is ahead of its stream and is made anew", consumer=consumer.name, stream=consumer.stream)
            await self._api.ask(f"CONSUMER.DELETE.{consumer.stream}.{consumer.name}", {}, Reply)
            return await self._create_consumer(consumer)
        return info

    async def _create_consumer(self, consumer: Consumer) -> ConsumerInfo:
        config = {
            "name": consumer.name,
            "durable_name": consumer.name,
            "filter_subjects": list(consumer.subjects),
            "deliver_policy": "all",
            "ack_policy": "explicit",
            "replay_policy": "instant",
            "ack_wait": nanoseconds(consumer.ack_wait),
            "max_deliver": -1,
            "max_ack_pending": consumer.max_ack_pending,
        }
        body = {"stream_name": consumer.stream, "config": config}
        return await self._api.ask(f"CONSUMER.CREATE.{consumer.stream}.{consumer.name}", body, ConsumerInfo)

    def remake(self) -> None:
        """Make again, in the background, what was ensured: the server may have come back without it."""
        if self._streams and (self._remaking is None or self._remaking.done()):
            self._remaking = asyncio.create_task(self._ensure_again(), name="bus remakes its streams")

    async def _ensure_again(self) -> None:
        try:
            await self.ensure(list(self._streams.values()), list(self._consumers.values()))
        except BusUnavailable as error:
            self._log.warning("cannot make the streams again", error=str(error))

    async def close(self) -> None:
        if self._remaking is not None:
            self._remaking.cancel()
            await asyncio.gather(self._remaking, return_exceptions=True)
