"""What a task's output can do to the terminal that shows it: nothing (FAULTS 102)."""

import random
import re

import pytest

from penstock.cli.harmless import Harmless

SEQUENCE = re.compile(r"\x1b\[(?:[0-9;:]*m|[0-2]?K)|[^\x00-\x07\x0b\x0c\x0e-\x1f\x7f-\x9f]")


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("plain ünïcode 🙂\tx\n", "plain ünïcode 🙂\tx\n"),
        ("\x1b[1;31mred\x1b[0m \x1b[38;2;1;2;3mrgb\x1b[m \x1b[4:3mwave\x1b[K", "\x1b[1;31mred\x1b[0m \x1b[38;2;1;2;3mrgb\x1b[m \x1b[4:3mwave\x1b[K"),
        ("10 %\r\x1b[K20 %\b\n", "10 %\r\x1b[K20 %\b\n"),
        ("a\x1b]52;c;aGFybQ==\x07b", "ab"),
        ("a\x1b]52;c;aGFybQ==\x1b\\b", "ab"),
        ("a\x9d52;c;aGFybQ==\x9cb", "ab"),
        ("a\x1b]0;title\x07b\x1b]2;title\x1b\\c", "abc"),
        ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("a\x1b[2J\x1b[H\x1b[3A\x1b[5;5Hb\x1b[?1049h\x1b[?25lc\x1b[6n\x1b[c\x1b[>4;1m\x9b2Jd", "abcd"),
        ("a\x1bP$q\x1b\\b\x1b_Gkitty\x1b\\c\x1b^x\x1b\\d\x1bXx\x1b\\e\x90q\x9cf", "abcdef"),
        ("a\x1bcb\x1b7c\x1b8d\x1b(0e\x1b#8f\x1b%Gg", "abcdefg"),
        ("a\x00\x05\x07\x0e\x0f\x0b\x0c\x7f\x85b", "ab"),
        ("a\x1b]never ended\nb", "a\nb"),
        ("a\x1b[31\nb", "a\nb"),
        ("a\x1b[31\x1b[2Jb", "ab"),
        ("a\x1bé", "aé"),
        ("a\x1b\x1b[2Jb", "ab"),
    ],
)
def test_text_and_colours_are_shown_and_nothing_else_however_it_is_cut(written: str, shown: str) -> None:
    assert Harmless()(written) == shown
    for cut in range(len(written)):
        harmless = Harmless()
        assert harmless(written[:cut]) + harmless(written[cut:]) == shown, cut
    harmless = Harmless()
    assert "".join(map(harmless, written)) == shown


def test_of_anything_only_text_and_colours_are_left() -> None:
    chance = random.Random(102)
    for _ in range(3000):
        harmless = Harmless()
        pieces = ["".join(chance.choices("\x1b\x1b\x1b[]PX0;2JmKc\\\x07\x9b\x9d\x9c\na \x85", k=chance.randrange(12))) for _ in range(4)]
        shown = "".join(map(harmless, pieces))
        assert SEQUENCE.sub("", shown) == "", (pieces, shown)


def test_a_sequence_without_an_end_costs_no_memory_and_no_time() -> None:
    harmless = Harmless()
    for opener in ("\x1b]", "\x1b[", "\x9d" * 1000, "\x1b "):
        assert harmless(opener) == ""
        for _ in range(100):
            harmless({"\x1b[": "1", "\x1b ": " "}.get(opener, "x") * 100_000)
        assert len(harmless._begun) <= 64
        harmless("\n")


@pytest.mark.parametrize(("written", "styled"), [("\x1b[31m", True), ("\x1b[31m\x1b[0m", False), ("\x1b[31m\x1b[m", False), ("\x1b[K", False)])
def test_it_knows_whether_colours_are_left_behind(written: str, styled: bool) -> None:
    harmless = Harmless()
    harmless(written)
    assert harmless.styled == styled
