"""Streams of bytes with secrets in them, each in some encoding, in some surroundings, cut anywhere: what is shown is what an oracle says, byte by
byte, and holds nothing that gives a secret away (FAULTS 97, 98, 99). The oracle shares no code with the worker: it makes the encodings by itself
(`tests.encodings`), and finds them in the whole stream, one after the other.

`python -m tests.soak.masking [--streams N] [--minutes M] [--seed S]`: a failure names its round's seed, which replays it: `--seed "S R"`."""

import argparse
import asyncio
import base64
import binascii
import json
import random
import secrets
import string
import sys
import time
import urllib.parse
from collections.abc import Callable, Sequence

from proto.messages import Attempt, LogChunk
from services.worker.logs import AttemptLog
from services.worker.masking import Masker, Texts
from tests.bench.figures import Figure, table
from tests.encodings import listed
from tests.soak.options import Options, none, say

STREAMS = 1_000_000
A_ROUND = 250
"""Streams with the same secrets."""
SAY_EVERY = 10.0

ALPHABETS = (
    string.ascii_letters + string.digits,
    string.ascii_letters + string.digits + "-_+/=",
    string.hexdigits,
    string.printable.replace("*", ""),
    "ab",
    "a",
    "äß€😀/+ %\n\"'\\<&\u2028",
)
_LINES = (
    "2026-11-22T08:40:{n} INFO request {n} ok\n",
    "[{n}/77] CC src/{n}.o\r\n",
    "password: ",
    "::progress {n}::\n",
    "\x1b[1m{n}\x1b[0m",
    "{{{n}}}",
)


class Leak(Exception):
    """What went wrong, and where: a value is shown, or what is none is not."""


def values_of(rng: random.Random) -> list[str]:
    """One to five secrets; some are in one another, overlap, share beginnings, have lines, are long or too short to be masked."""
    found: list[str] = []
    for _ in range(rng.choice((1, 1, 2, 3, 5))):
        letters = rng.choice(ALPHABETS)
        match rng.randrange(12):
            case 0 if found:  # inside another
                one = rng.choice(found)
                at = rng.randrange(len(one))
                found.append(one[at : at + rng.randrange(3, 20)])
            case 1 if found:  # overlapping another
                found.append(rng.choice(found)[-rng.randrange(2, 9) :] + "".join(rng.choices(letters, k=6)))
            case 2:
                key = "\n".join(base64.b64encode(rng.randbytes(48)).decode() for _ in range(rng.randrange(2, 8)))
                found.append(f"-----BEGIN KEY-----\n{key}\n-----END KEY-----\n")
            case 3 if rng.random() < 0.2:
                found.append("".join(rng.choices(letters, k=rng.randrange(900, 2600))))
            case 4:
                found.append("\n".join("Qabc" + "".join(rng.choices("abc", k=rng.randrange(6))) for _ in range(rng.randrange(2, 14))))
            case _:
                found.append("".join(rng.choices(letters, k=rng.choice((2, 4, 5, 8, 16, 20, 32, 40, 64)))))
    return found


def written(rng: random.Random, value: str) -> bytes:
    """The value as programs write it, perhaps inside a longer text."""
    raw, before, after = value.encode(), rng.randbytes(rng.randrange(5)), rng.randbytes(rng.randrange(5))
    ways: Sequence[Callable[[], bytes]] = (
        lambda: raw,
        lambda: base64.b64encode(before + raw + after),
        lambda: base64.urlsafe_b64encode(before + raw + after),
        lambda: base64.encodebytes(raw),
        lambda: binascii.hexlify(before + raw + after),
        lambda: binascii.hexlify(raw).upper(),
        lambda: json.dumps({"it": value, "more": [value, 1]}).encode(),
        lambda: json.dumps([value], ensure_ascii=False, indent=1).replace("/", rng.choice(("/", "\\/"))).encode(),
        lambda: urllib.parse.quote(value, safe=rng.choice(("", "/"))).encode(),
        lambda: urllib.parse.urlencode({"a": value, "b": value}).encode(),
        lambda: raw.replace(b"\n", b"\r\n"),
        lambda: rng.choice(raw.splitlines() or [raw]),
        lambda: raw * rng.randrange(2, 4),
        lambda: raw[:-1] + raw,
        lambda: raw[1:],
    )
    return rng.choice(ways)()


def stream_of(rng: random.Random, values: Sequence[str], texts: Sequence[bytes]) -> bytes:
    """What a step writes: noise, secrets, and what is nearly one."""
    parts: list[bytes] = []
    for _ in range(rng.randrange(1, 7)):
        match rng.randrange(7):
            case 0 | 1:
                parts.append(written(rng, rng.choice(values)))
            case 2 | 3 if texts:
                parts.append(rng.choice(texts))
            case 4 if texts:
                text = rng.choice(texts)
                parts.append(text[: rng.randrange(len(text))])
            case 5:
                parts.append(rng.randbytes(rng.randrange(8)).replace(b"*", b""))
            case _:
                parts.append(rng.choice(_LINES).format(n=rng.randrange(1000)).encode())
    return b"".join(parts)


def cuts_of(rng: random.Random, data: bytes) -> list[bytes]:
    """The stream as it is read: byte by byte, in pieces of any size, or at once."""
    most = rng.choice((1, 7, 30, 90, 200, len(data) + 1)) if len(data) < 400 else rng.choice((30, 200, 900, len(data) + 1))
    pieces, at = [], 0
    while at < len(data):
        size = rng.randrange(1, most + 1)
        pieces.append(data[at : at + size])
        at += size
    return pieces


def expected(texts: Sequence[bytes], data: bytes) -> bytes:
    """The stream with a mask in place of each text, or of several that overlap."""
    places: list[tuple[int, int]] = []
    for text in texts:
        at = data.find(text)
        while at >= 0:
            places.append((at, at + len(text)))
            at = data.find(text, at + 1)
    shown, done = b"", 0
    for start, end in sorted(places):
        if start >= done:
            shown += data[done:start] + b"***"
        done = max(done, end)
    return shown + data[done:]


def shown_by_the_log(texts: Texts, pieces: Sequence[bytes]) -> bytes:
    """What becomes of them on the worker's whole way into chunks."""
    chunks: list[LogChunk] = []
    log = AttemptLog(Attempt("b", "s", 1), chunks.append, 1 << 30, "", texts)
    for piece in pieces:
        log.write("run", "stdout", piece)
    log.end_step("run")
    log.close("run")
    return b"".join(segment.data for chunk in chunks for segment in chunk.segments)


def a_round(seed: str, streams: int = A_ROUND) -> int:
    """How many streams were looked at, and found right. An event loop must run: the log has timers. Raises Leak."""
    rng = random.Random(seed)
    values = values_of(rng)
    texts = Texts(values)
    given_away = sorted(set[bytes]().union(*map(listed, values)))
    for number in range(streams):
        data = stream_of(rng, values, given_away)
        pieces = cuts_of(rng, data)
        if number % 10:
            masker = Masker(texts)
            shown = b"".join([masker.feed(piece) for piece in pieces]) + masker.rest()
        else:
            shown = shown_by_the_log(texts, pieces)
        leaks = [text for text in given_away if text in shown]
        if leaks or shown != expected(given_away, data):
            raise Leak(f"--seed {seed!r}, stream {number}: {values=} {pieces=} {shown=} {leaks=}")
    return streams


async def run(options: Options) -> list[Figure]:
    """A part of the soak."""
    return await masked(f"{options.seed} masking", options.many(STREAMS, 5_000), options.until())


async def masked(seed: str, streams: int, until: float) -> list[Figure]:
    done, leaks, spoken, began = 0, 0, time.monotonic(), time.process_time()
    for number in range(-(-streams // A_ROUND)):
        if time.monotonic() >= until:
            break
        try:
            done += a_round(f"{seed} {number}", min(A_ROUND, streams - done))
        except Leak as leak:
            say(str(leak))
            leaks += 1
        if time.monotonic() - spoken > SAY_EVERY:
            spoken = time.monotonic()
            say(f"{done:,} of {streams:,} streams, {leaks} leaks, {done / (time.process_time() - began):,.0f}/s of processor time")
            await asyncio.sleep(0)
    return [Figure("masked streams, drawn from seeds", done, ""), none("of these with a leak, or a byte too few", leaks)]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak.masking", description="Fuzz the masking of secrets.")
    parser.add_argument("--streams", type=int, default=STREAMS)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="end after so many")
    parser.add_argument("--seed", default=str(secrets.randbits(32)), help="a number; or a round's seed, as a failure names it, to run that one alone")
    given = parser.parse_args()
    say(f"seed {given.seed}")
    if " " in given.seed:
        asyncio.run(_one(given.seed))
        return 0
    figures = asyncio.run(masked(given.seed, given.streams, time.monotonic() + 60 * given.minutes))
    print(f"{table(figures)}\n\nseed {given.seed}", flush=True)
    return 0 if all(figure.goal is None or figure.goal.reached(figure.measured) for figure in figures) else 1


async def _one(seed: str) -> None:
    a_round(seed)


if __name__ == "__main__":
    sys.exit(main())
