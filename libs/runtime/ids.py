"""Ids that sort by time: version 7 UUIDs (RFC 9562), which keep the log's indexes dense where random ones would scatter them."""

import secrets
import time
import uuid


def new_id() -> str:
    """A UUIDv7 of now, as text."""
    value = (time.time_ns() // 1_000_000) << 80 | secrets.randbits(80)
    value = value & ~(0xF << 76) | 0x7 << 76
    value = value & ~(0x3 << 62) | 0x2 << 62
    return str(uuid.UUID(int=value))
