"""Log lines, by page and as events."""

from typing import Literal

from proto.api.bodies import Answer


class LogLine(Answer, frozen=True, kw_only=True, omit_defaults=True):
    """One numbered line (from 0), with its newline; an unfinished piece has none. `at` is unix time in milliseconds. Where a step wrote what is no
    UTF-8, `text` has U+FFFD, and `text_base64` is all of it as it was written."""

    line: int
    step: str
    stream: Literal["stdout", "stderr"]
    at: int
    text: str
    text_base64: str | None = None


class LogPage(Answer, frozen=True, kw_only=True):
    """Lines of one attempt's log. `next` is the line to ask for next, null when there is none yet; `complete`: no more will come."""

    stage: str
    attempt: int
    lines: list[LogLine]
    next: int | None = None
    complete: bool = False


class LogEvent(Answer, frozen=True, kw_only=True, omit_defaults=True):
    """The data of a `log` event: consecutive whole lines of one stream of one step, `line` numbering the first, or an unfinished piece of a line.
    `text` and `text_base64` as a LogLine's."""

    stage: str
    attempt: int
    step: str
    stream: Literal["stdout", "stderr"]
    line: int
    at: int
    text: str
    text_base64: str | None = None
