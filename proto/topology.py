"""JetStream streams and durable consumers, as data. Consumers are named `{service}-{purpose}`."""

from typing import Literal, NamedTuple

MAX_EVENT = 1 << 20
"""An event, and so a plan, is at most 1 MiB."""
MAX_NAME = 1000
"""Bytes in each of the names around an event: its stream, team, type, ids and actor."""
MAX_PAYLOAD = MAX_EVENT + (64 << 10)
"""The server's max_payload: an event and its envelope, whose names have room even where JSON needs six bytes for each of theirs."""
MAX_CHUNK = 64 << 10
"""Data in one log chunk."""


class Stream(NamedTuple):
    """A JetStream stream. Ages in seconds, sizes in bytes; `full` says whether a full stream drops the oldest or refuses the newest."""

    name: str
    subjects: tuple[str, ...]
    max_age: float
    max_bytes: int
    full: Literal["old", "new"]
    dedup_window: float = 120.0


class Consumer(NamedTuple):
    """A durable consumer that all instances of a service share: at least once, in any order. `batch` is what a standing pull asks for."""

    name: str
    stream: str
    subjects: tuple[str, ...]
    batch: int = 256
    ack_wait: float = 30.0
    max_ack_pending: int = 4096


EVENTS = Stream("EVENTS", ("events.>",), max_age=7 * 86400.0, max_bytes=2 << 30, full="old")
REPORTS = Stream("REPORTS", ("reports.>",), max_age=86400.0, max_bytes=256 << 20, full="new")
LOGS = Stream("LOGS", ("logs.>",), max_age=86400.0, max_bytes=1 << 30, full="new")

STREAMS: tuple[Stream, ...] = (EVENTS, REPORTS, LOGS)

BUILDS_REACTIONS = Consumer("builds-reactions", "EVENTS", ("events.request.>", "events.lease.*.*.LeaseExpired"))
BUILDS_REPORTS = Consumer("builds-reports", "REPORTS", ("reports.>",))
ARTIFACTS_ARCHIVE = Consumer("artifacts-archive", "EVENTS", ("events.build.*.*.StageFinished",), batch=32, ack_wait=60.0)

CONSUMERS: tuple[Consumer, ...] = (BUILDS_REACTIONS, BUILDS_REPORTS, ARTIFACTS_ARCHIVE)
