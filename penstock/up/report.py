"""What a detached supervisor tells the command that started it: lines of JSON over a pipe, until it serves or has failed."""

import contextlib
import os
from collections.abc import Callable
from typing import Literal

import msgspec


class Report(msgspec.Struct, frozen=True):
    """`said` is progress. The others are the last: `ready` with the URL, `taken` when another supervisor has the data folder, `failed` with why."""

    kind: Literal["said", "ready", "taken", "failed"]
    text: str = ""


class Reporter:
    """The supervisor's end. Nobody may be listening any more: then nothing happens."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._open = True

    def send(self, report: Report) -> None:
        if not self._open:
            return
        with contextlib.suppress(BrokenPipeError):
            os.write(self._descriptor, msgspec.json.encode(report) + b"\n")
        if report.kind != "said":
            os.close(self._descriptor)
            self._open = False


def wait_for_report(descriptor: int, say: Callable[[str], None]) -> Report:
    """The last report, after saying what came before it. A pipe that closes without one means failure."""
    with os.fdopen(descriptor, "rb") as pipe:
        for line in pipe:
            report = msgspec.json.decode(line, type=Report)
            if report.kind != "said":
                return report
            say(report.text)
    return Report("failed", "its supervisor ended without a word; see logs/supervisor.log in the data folder")
