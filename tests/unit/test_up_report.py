"""What a detached supervisor tells the command that started it."""

import os

import pytest

from penstock.up.report import Report, Reporter, wait_for_report


def test_progress_is_said_until_the_last_report() -> None:
    reader, writer = os.pipe()
    reporter = Reporter(writer)
    reporter.send(Report("said", "starting"))
    reporter.send(Report("ready", "http://127.0.0.1:7420"))
    reporter.send(Report("said", "nobody hears this"))
    said: list[str] = []
    assert wait_for_report(reader, said.append) == Report("ready", "http://127.0.0.1:7420")
    assert said == ["starting"]


def test_a_supervisor_that_ends_without_a_word_has_failed() -> None:
    reader, writer = os.pipe()
    os.close(writer)
    assert wait_for_report(reader, print).kind == "failed"


def test_a_supervisor_goes_on_when_nobody_listens_any_more() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    reporter = Reporter(writer)
    reporter.send(Report("said", "starting"))
    reporter.send(Report("ready", "http://127.0.0.1:7420"))
    with pytest.raises(OSError):
        os.fstat(writer)
