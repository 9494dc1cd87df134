"""No secret is in what a masked stream shows, in any of the listed encodings, however the stream is cut (FAULTS 97, 98, 99)."""

import base64
import random
import string
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proto.messages import Attempt
from services.worker.logs import AttemptLog
from services.worker.masking import LONGEST, Masker, Texts, masked, variants
from services.worker.progress import last_percent
from tests.encodings import encodings, listed
from tests.soak.masking import ALPHABETS, a_round

PEM = "-----BEGIN KEY-----\n" + "\n".join(base64.b64encode(bytes(range(n, n + 48))).decode() for n in range(8)) + "\n-----END KEY-----\n"


def run(texts: Texts, pieces: list[bytes]) -> bytes:
    masker = Masker(texts)
    return b"".join([masker.feed(piece) for piece in pieces]) + masker.rest()


def plainly(texts: Texts, data: bytes) -> bytes:
    """What must be shown, found in the slowest way."""
    shown, at = b"", 0
    for start in range(len(data)):
        end = max((start + len(text) for text in texts.all if data.startswith(text, start)), default=0)
        if end:
            if start >= at:
                shown += data[at:start] + b"***"
            at = max(at, end)
    return shown + data[at:]


@pytest.mark.parametrize("value", ["hunter2!", "p4ss wörd/+?", 'a "quoted" \\ value', PEM, "x" * 7_000, "päss", "1234"])
def test_every_listed_encoding_is_masked_inside_a_longer_text(value):
    texts = Texts([value])
    for text in encodings(value):
        shown = run(texts, [b"before>" + text + b"<after"])
        assert shown.startswith(b"before>***") and text not in shown, text[:50]


def test_base64_of_a_longer_text_that_holds_the_value_is_masked_at_every_alignment():
    """FAULTS 98."""
    value = "s3cr3t-token-value"
    core = value.encode()
    for before in range(7):
        for after in range(4):
            for encode in (base64.b64encode, base64.urlsafe_b64encode):
                text = encode(b"u" * before + core + b"v" * after)
                shown = run(Texts([value]), [text])
                assert b"***" in shown and len(shown) <= 2 * before + 2 * after + 13, (text, shown)


def test_each_line_of_a_key_is_masked_and_its_wrapped_base64():
    """FAULTS 99."""
    texts = Texts([PEM])
    for line in PEM.splitlines():
        assert run(texts, [f"[{line}]\r\n".encode()]) == b"[***]\r\n"
    for width in (64, 76):
        text = base64.b64encode(PEM.encode()).decode()
        for line in [text[at : at + width] for at in range(0, len(text), width)]:
            assert run(texts, [line.encode() + b"\n"]) == b"***\n"


def test_short_and_blank_values_are_not_masked_and_nothing_is_with_none():
    assert variants("abc") == variants("  ab \n") == variants(" \n \t    ") == variants("") == set()
    assert run(Texts(["abc", ""]), [b"abc", b" and so on"]) == b"abc and so on"


def test_only_what_may_be_the_beginning_of_a_secret_is_held_back():
    masker = Masker(Texts(["hunter2!"]))
    assert masker.feed(b"password: ") == b"password: "
    assert masker.feed(b"hunt") == b""
    assert masker.feed(b"ing season\nh") == b"hunting season\n"
    assert masker.feed(b"unter2!") == b"***"
    assert masker.feed(b"hunter2") == b""
    assert masker.rest() == b"hunter2"


def test_a_value_that_others_begin_with_or_overlap_is_masked_as_one():
    texts = Texts(["abcdef", "abcdefghij", "defgxyz", "ghijkl"])
    for data, shown in ((b"abcdefghi", b"***ghi"), (b"abcdefgxyz.", b"***."), (b"abcdefghijkl", b"***"), (b"abcdefabcdef", b"******")):
        for cut in range(len(data)):
            assert run(texts, [data[:cut], data[cut:]]) == shown


def test_a_long_value_holds_little_back_and_is_masked_whole():
    rng = random.Random(1)
    value = "".join(rng.choice(string.ascii_letters) for _ in range(50_000))
    masker = Masker(Texts([value]))
    shown = b"".join(masker.feed(value.encode()[at : at + 100]) for at in range(0, len(value), 100))
    assert set(shown + masker.rest()) == {ord("*")}
    assert len(masker.feed(value.encode()[: LONGEST - 1])) == 0


def test_a_text_of_one_letter_does_not_make_the_search_slow():
    """A step must not be able to stop its worker with what it writes: it would take seconds if each place cost the whole of the value."""
    texts = Texts(["a" * 65_536])
    places = texts.found(b"a" * 20_000)
    assert len(places) == 20_000 - LONGEST + 1
    assert len(masked(texts, "a" * 20_000)) < 100


def test_many_lines_that_share_a_piece_do_not_make_the_search_slow_either():
    """Whoever sets a secret and writes a log must not be able to stop the worker: compared one by one, this takes 20 s."""
    texts = Texts(["\n".join(f"~bqz{number:04}" for number in range(7000))])
    began = time.process_time()
    assert run(texts, [b"~bqz" * 16_384]) == b"~bqz" * 16_384
    assert time.process_time() - began < 5
    assert run(texts, [b"<~bqz6999>~bqz7000"]) == b"<***>~bqz7000"


def test_what_many_begin_with_is_masked_as_far_as_the_longest_of_them():
    rng = random.Random(2)
    for _ in range(60):
        lines = {"Qabc" + "".join(rng.choices("abc", k=rng.randrange(8))) for _ in range(rng.randrange(5, 40))}
        texts = Texts(["\n".join(sorted(lines))])
        stream = "".join("Qabc" + "".join(rng.choices("abcQ", k=rng.randrange(10))) for _ in range(40)).encode()
        cut = rng.randrange(len(stream))
        assert run(texts, [stream[:cut], stream[cut:]]) == plainly(texts, stream)


async def test_a_log_is_masked_before_it_is_cut_into_lines_and_chunks_and_what_is_held_comes_at_the_steps_end():
    chunks = []
    log = AttemptLog(Attempt("b", "s", 1), chunks.append, 1 << 20, "", Texts(["hunter2!"]))
    assert log.write("run", "stdout", b"one\nhunt") == [b"one\n"]
    log.write("run", "stderr", b"er2! is not split between streams\n")
    assert log.write("run", "stdout", b"er2!") == []
    assert log.write("run", "stdout", b"\n50%\nhunter2") == [b"***\n50%\n"]
    log.end_step("run")
    log.close("run")
    written = [(segment.stream, segment.data) for chunk in chunks for segment in chunk.segments]
    assert b"".join(data for stream, data in written if stream == "stdout") == b"one\n***\n50%\nhunter2"
    assert b"".join(data for stream, data in written if stream == "stderr") == b"er2! is not split between streams\n"


VALUES = st.lists(st.text(st.sampled_from("aab/\n =é"), min_size=4, max_size=12), min_size=1, max_size=4)


@settings(max_examples=400, deadline=None)
@given(VALUES, st.data())
def test_any_cut_of_a_stream_gives_the_same_and_it_is_right(values, data):
    """FAULTS 97."""
    texts = Texts(values)
    pieces = data.draw(st.lists(st.one_of(st.binary(max_size=6), st.sampled_from(texts.all or [b"-"]), st.sampled_from([b"a", b"b", b"/", b"\n"]))))
    stream = b"".join(pieces)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    cut = [stream[start:end] for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert run(texts, cut) == run(texts, [stream]) == plainly(texts, stream)


async def test_fuzzed_streams_leak_nothing_and_lose_nothing_else():
    """A little of `python -m tests.soak.masking`, which takes a million."""
    assert sum(a_round(f"unit {number}", 60) for number in range(40)) == 2400


def test_the_worker_looks_for_what_the_oracle_lists():
    rng = random.Random(4)
    for letters in ALPHABETS:
        for length in (3, 4, 5, 20, 100, 1400):
            value = "".join(rng.choices(letters + " \n", k=length))
            assert variants(value) == listed(value), value


@pytest.mark.parametrize(
    "line",
    [
        "::add-mask::hunter2!",
        "::remove-mask::hunter2!",
        "::stop-commands::hunter2!",
        "::set-output name=key::hunter2!",
        "##vso[task.setvariable variable=key;issecret=false]hunter2!",
        "##teamcity[setParameter name='key' value='hunter2!']",
        "::progress hunter2!::",
        "penstock: interrupted: hunter2!",
    ],
)
async def test_a_line_that_gives_orders_elsewhere_is_text_here_and_masked_as_such(line):
    """FAULTS 105: there is one control line, progress, and no program can show by any of them what is masked."""
    chunks = []
    log = AttemptLog(Attempt("b", "s", 1), chunks.append, 1 << 20, "", Texts(["hunter2!"]))
    taken = [log.write("run", stream, f"{line}\nand then hunter2!\n".encode()) for stream in ("stdout", "stderr")]
    log.close("run")
    shown = f"{line}\nand then hunter2!\n".replace("hunter2!", "***").encode()
    assert taken == [[shown], [shown]]
    assert [(segment.stream, segment.data) for chunk in chunks for segment in chunk.segments] == [("stdout", shown), ("stderr", shown)]
    assert last_percent(shown) is None
