"""A step's output with its secrets taken out: the pure part, on lines as programs log them."""

import random
import string
import time

from services.worker.masking import Masker, Texts
from tests.bench.figures import Figure, at_least

READ = 1 << 16


def masking(megabytes: int) -> list[Figure]:
    """With ten secrets, one of them a key of many lines."""
    rng = random.Random(1)
    letters = string.ascii_letters + string.digits
    values = ["".join(rng.choices(letters, k=20 + 3 * n)) for n in range(9)]
    values.append("-----BEGIN KEY-----\n" + "\n".join("".join(rng.choices(letters + "+/", k=64)) for _ in range(25)) + "\n-----END KEY-----\n")
    when = "2026-11-22T08:40:{:02}.{:06}Z INFO [worker-{}] request {:x} status=200 path=/api/v1/builds\n"
    lines = [when.format(n % 60, rng.randrange(10**6), n % 9, rng.getrandbits(64)) for n in range(megabytes * 10_000)]
    data = "".join(lines).encode()
    masker = Masker(Texts(values))
    began = time.process_time()
    shown = sum(len(masker.feed(data[at : at + READ])) for at in range(0, len(data), READ)) + len(masker.rest())
    took = time.process_time() - began
    assert shown == len(data), "what holds no secret passes as it is"
    return [Figure("a step's output, ten secrets masked (processor time)", len(data) / took / 1e6, "MB/s", at_least(50))]
