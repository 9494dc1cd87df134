"""What gives a value away: each listed encoding of it, made by other means than the worker's own, bit by bit."""

import re
import string
from collections.abc import Iterator

_ALPHABET = string.ascii_uppercase + string.ascii_lowercase + string.digits
_PLAIN = set((string.ascii_letters + string.digits + "_.-~").encode())
_ESCAPES = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t", "\f": "\\f", "\b": "\\b"}
_LINE_ENDS = re.compile("\r\n|[\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029]")
BLOCK = 1024
"""Of what is longer, blocks of so many bytes are what counts, and the last ones."""


def encodings(value: str) -> list[bytes]:
    """Of the value as a whole; all of them that have at least 4 bytes."""
    return [text for text in dict.fromkeys(_whole(value)) if len(text) >= 4]


def listed(value: str) -> set[bytes]:
    """All that is to be masked of a value, as the worker's documentation lists it."""
    texts: set[bytes] = set()
    for whole in (value, value.strip()):
        if len(whole.strip()) >= 4:
            texts |= {*_whole(whole), *_wrapped(whole)}
    for line in _LINE_ENDS.split(value):
        if len(line.strip()) >= 4:
            texts |= {line.encode(), line.strip().encode()}
    return {block for text in texts for block in _blocks(text) if len(block) >= 4 and block.strip()}


def _whole(value: str) -> Iterator[bytes]:
    raw = value.encode()
    yield raw
    for ascii_only in (True, False):
        text = _json(value, ascii_only)
        yield text.encode()
        yield text.replace("/", "\\/").encode()
    yield re.sub("[<>&\u2028\u2029]", lambda match: f"\\u{ord(match[0]):04x}", _json(value, False)).encode()  # for a page
    for kept in (b"", b"/"):
        for space in ("%20", "+"):
            for digits in ("%{:02X}", "%{:02x}"):
                yield "".join(chr(b) if b in _PLAIN or b in kept else space if b == 0x20 else digits.format(b) for b in raw).encode()
    yield "".join(f"{b:02x}" for b in raw).encode()
    yield "".join(f"{b:02X}" for b in raw).encode()
    bits = "".join(f"{b:08b}" for b in raw)
    for more in ("+/", "-_"):
        yield _sixes(bits + "0" * (-len(bits) % 6), more)
        yield _sixes(bits + "0" * (-len(bits) % 6), more) + b"=" * (-len(raw) % 3)
        for skipped in (0, 4, 2):  # bits which the byte before has a part in: at the three alignments
            yield _sixes(bits[skipped:], more)


def _json(value: str, ascii_only: bool) -> str:
    return "".join(_ESCAPES.get(c) or (f"\\u{ord(c):04x}" if c < " " else _utf16(c) if ascii_only and c >= "\x7f" else c) for c in value)


def _utf16(c: str) -> str:
    units = c.encode("utf-16-be")
    return "".join(f"\\u{units[at] << 8 | units[at + 1]:04x}" for at in range(0, len(units), 2))


def _sixes(bits: str, more: str) -> bytes:
    """What stands for whole sixes of them in base64."""
    return "".join((_ALPHABET + more)[int(bits[at : at + 6], 2)] for at in range(0, len(bits) - 5, 6)).encode()


def _wrapped(value: str) -> Iterator[bytes]:
    """The lines of its base64, where programs break it."""
    raw = value.encode()
    bits = "".join(f"{b:08b}" for b in raw)
    whole = _sixes(bits + "0" * (-len(bits) % 6), "+/") + b"=" * (-len(raw) % 3)
    for width in (64, 76):
        if len(whole) > width:
            yield from (whole[at : at + width] for at in range(0, len(whole), width))


def _blocks(text: bytes) -> Iterator[bytes]:
    while len(text) > BLOCK:
        yield text[:BLOCK]
        last, text = text[-BLOCK:], text[BLOCK:]
        if len(text) <= BLOCK:
            text = last
    yield text
