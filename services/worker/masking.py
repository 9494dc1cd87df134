"""Secrets are taken out of what a step writes, whatever they look like and wherever a read happens to end. Pure.

Masked is every value of at least 4 characters: as it is, each of its lines, and the whole of it (also without the blanks around it) as it
stands in JSON and in URLs, in hex, in base64 and base64url inside anything longer, wrapped lines of base64 included. Not masked are shorter
values, what the step makes of them otherwise, and what it writes partly to stdout and partly to stderr.

A text is found by one rare piece of it: 4 bytes which begin with the byte that logs have least often. One regular expression looks for all
those pieces, so that what holds no secret passes at the regex engine's speed; only where it stops is the whole text compared. Of a piece that is
in many texts, each of these is found by its beginning instead, all of them at once: whoever chooses secrets and writes logs must not be able to
stop the worker.
"""

import base64
import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from urllib.parse import quote, quote_plus

MASK = b"***"
SHORTEST = 4
"""Characters of a value that is worth masking, and bytes of the shortest text that is looked for."""
LONGEST = 1024
"""Bytes of the longest."""
FEW = 8
"""Texts, at most, that are compared one by one."""
_FOR_PAGES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}
"""What Go writes otherwise in JSON, as if all of it were for a page."""
_WRAPS = (64, 76)
"""Columns at which programs break base64."""
_COMMON = b" etaoinsrldcumpfhg0.-/:1y2_b\",5w3v4k6,8=97[]xA\nETSIROCNDLPM()Uj'B{}FzGVHWq>KXYJ<QZ\t+"
_RARITY = bytes.maketrans(bytes(range(256)), bytes(_COMMON.find(byte) % 256 if byte in _COMMON else 255 for byte in range(256)))
"""byte → how rarely logs have it (255: hardly ever)."""


def variants(value: str) -> set[bytes]:
    """The texts that give a value away; none for what is too short."""
    found: set[bytes] = set()
    for whole in {value, value.strip()}:
        if len(whole.strip()) >= SHORTEST:
            found |= set(_encoded(whole))
    for line in value.splitlines():
        if len(line.strip()) >= SHORTEST:
            found |= {line.encode(), line.strip().encode()}
    return {block for text in found for block in _blocks(text) if len(block) >= SHORTEST and not block.isspace()}


def _blocks(text: bytes) -> Iterator[bytes]:
    """A long text is found block by block: so little is held back, and no text can make the search slow."""
    if len(text) > LONGEST:
        yield from (text[at : at + LONGEST] for at in range(0, len(text) - LONGEST, LONGEST))
    yield text[-LONGEST:]


def _encoded(value: str) -> Iterator[bytes]:
    raw = value.encode()
    yield raw
    for text in (json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1]):
        yield text.encode()
        yield text.replace("/", "\\/").encode()
    yield json.dumps(value, ensure_ascii=False)[1:-1].translate(_FOR_PAGES).encode()
    for text in (quote(value, safe=""), quote(value), quote_plus(value), quote_plus(value, safe="/")):
        yield text.encode()
        yield re.sub("%[0-9A-F]{2}", lambda match: match[0].lower(), text).encode()
    yield raw.hex().encode()
    yield raw.hex().upper().encode()
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        yield encode(raw)
        yield encode(raw).rstrip(b"=")
        for before in range(3):
            # What neither the bytes before nor those after have a part in.
            yield encode(bytes(before) + raw)[-(-before * 4 // 3) : (before + len(raw)) * 4 // 3]
    unwrapped = base64.b64encode(raw)
    for width in _WRAPS:
        if len(unwrapped) > width:
            yield from (unwrapped[at : at + width] for at in range(0, len(unwrapped), width))


class Texts:
    """What one or more values look like, made ready to be found; shared by all streams of an attempt."""

    def __init__(self, values: Iterable[str]) -> None:
        self.all = sorted({text for value in values for text in variants(value)})
        self.longest = max(map(len, self.all), default=0)
        by_piece: dict[bytes, list[tuple[int, bytes]]] = {}
        for text in self.all:
            at = _rarest(text)
            by_piece.setdefault(text[at : at + SHORTEST], []).append((at, text))
        self._few = {piece: texts for piece, texts in by_piece.items() if len(texts) <= FEW}
        self._heads = {text[:SHORTEST] for texts in by_piece.values() if len(texts) > FEW for _, text in texts}
        self._lengths = _lengths(self.all) if self._heads else []
        self._piece = re.compile(_any_of(self._few.keys() | self._heads), re.DOTALL)
        self._head = re.compile(_any_of({text[:SHORTEST] for text in self.all}), re.DOTALL)

    def found(self, data: bytes) -> list[tuple[int, int]]:
        """Where they are in `data`, as (start, end), ordered: all of them, but for those that another one begins with."""
        places: list[tuple[int, int]] = []
        search = self._piece.search
        match = search(data)
        while match is not None:
            at = match.start()
            for before, text in self._few.get(match[0], ()):
                if at >= before and data.startswith(text, at - before):
                    places.append((at - before, at - before + len(text)))
            if match[0] in self._heads and (length := self._longest_of(data[at : at + self.longest])):
                places.append((at, at + length))
            match = search(data, at + 1)
        places.sort()
        return places

    def _longest_of(self, tail: bytes) -> int:
        """How long the longest is that `tail` begins with, 0 if none is. Whichever is next before it in order begins with that one."""
        number = bisect_right(self.all, tail) - 1
        if number < 0:
            return 0
        return max(0, (self._lengths[number] & ((2 << _common(self.all[number], tail)) - 1)).bit_length() - 1)

    def begun(self, data: bytes) -> int:
        """Where the first one begins that `data` may end within; its length if there is none."""
        at = max(0, len(data) - self.longest + 1)
        match = self._head.search(data, at)
        while match is not None:
            if self._is_begun(data[match.start() :]):
                return match.start()
            match = self._head.search(data, match.start() + 1)
        for at in range(max(0, len(data) - SHORTEST + 1), len(data)):
            if self._is_begun(data[at:]):
                return at
        return len(data)

    def _is_begun(self, tail: bytes) -> bool:
        """Whether there is a longer one that begins so."""
        at = bisect_left(self.all, tail + b"\0")
        return at < len(self.all) and self.all[at].startswith(tail)


class Masker:
    """One stream of bytes. What may be the beginning of a secret is held back until it is known, and nothing else: so the same is given, in all,
    however the stream is cut."""

    def __init__(self, texts: Texts) -> None:
        self._texts = texts
        self._held = b""
        self._masked = 0
        """How many bytes of what is held the mask stands for that was given last."""

    def feed(self, data: bytes) -> bytes:
        """What can be shown by now."""
        return self._shown(self._held + data if self._held else data, last=False)

    def rest(self) -> bytes:
        """What is held, at the stream's end."""
        return self._shown(self._held, last=True)

    def _shown(self, data: bytes, last: bool) -> bytes:
        until = len(data) if last else self._texts.begun(data)
        places = self._texts.found(data)
        if not places and not self._masked:
            self._held = data[until:]
            return data if until == len(data) else data[:until]
        shown: list[bytes] = []
        at = self._masked
        for start, end in places:
            if start >= until:
                break
            if start >= at:
                shown += (data[at:start], MASK)
            at = max(at, end)
        shown.append(data[at:until])
        self._held, self._masked = data[until:], max(0, at - until)
        return b"".join(shown)


def masked(texts: Texts, text: str) -> str:
    """A text that is whole, masked."""
    masker = Masker(texts)
    data = text.encode(errors="surrogateescape")
    return (masker.feed(data) + masker.rest()).decode(errors="surrogateescape")


def _rarest(text: bytes) -> int:
    """Where its rarest byte is that 3 more follow."""
    ranks = text[: len(text) - SHORTEST + 1].translate(_RARITY)
    return ranks.index(max(ranks))


def _lengths(texts: list[bytes]) -> list[int]:
    """Of each text, in order: how long it is and those are that it begins with, as bits."""
    found: list[int] = []
    begun: list[tuple[bytes, int]] = []
    for text in texts:
        while begun and not text.startswith(begun[-1][0]):
            begun.pop()
        found.append((begun[-1][1] if begun else 0) | 1 << len(text))
        begun.append((text, found[-1]))
    return found


def _common(one: bytes, other: bytes) -> int:
    """How many bytes they have in common from their beginning on."""
    least, most = 0, min(len(one), len(other))
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if one.startswith(other[:middle]) else (least, middle - 1)
    return least


def _any_of(pieces: Iterable[bytes]) -> bytes:
    """A pattern of these pieces, and of some others: few, unless the pieces are very many, for which an exact one would be slow."""
    rests: dict[bytes, list[bytes]] = {}
    for piece in pieces:
        rests.setdefault(piece[:1], []).append(piece[1:])
    return b"|".join(re.escape(first) + b"".join(map(_one_of, zip(*rest, strict=True))) for first, rest in rests.items()) or rb"(?!)"


def _one_of(found: Iterable[int]) -> bytes:
    return b"[" + b"".join(b"\\x%02x" % byte for byte in sorted({*found})) + b"]"
