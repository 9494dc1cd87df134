"""Times and sizes as people type and read them."""

import re
from datetime import datetime
from typing import Any, Literal

import click

FOREVER = 100 * 365 * 86400  # the longest that a server keeps anything by time alone
_TIME = re.compile(r"(?:(\d+)w)?(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?")
_SECONDS = (7 * 86400, 86400, 3600, 60, 1)
_UNITS = ((86400, "d"), (3600, "h"), (60, "min"))
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(?:([kmgt]?)(i?)b?)", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_LARGEST = 1 << 60


class Duration(click.ParamType[int]):
    """Seconds, as `90`, `90s`, `10m`, `1h30m`, `7d`."""

    name = "duration"

    def __init__(self, longest: int = FOREVER, said: str = "a time like 90s, 12h or 7d, 100 years at most") -> None:
        self._longest = longest
        self._said = said

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = _TIME.fullmatch(str(value).strip().lower()) if len(str(value)) < 20 else None
        total = sum(int(part or 0) * unit for part, unit in zip(match.groups(), _SECONDS, strict=True)) if match else 0
        if not 1 <= total <= self._longest:
            self.fail(f"`{value}` must be {self._said}", param, ctx)
        return total


class Keep(click.ParamType[int | Literal["forever"]]):
    """Seconds, or `forever`."""

    name = "keep"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | Literal["forever"]:
        if str(value).strip().lower() == "forever":
            return "forever"
        return Duration(said="`forever`, or a time like 90s, 12h or 7d, 100 years at most").convert(value, param, ctx)


class Size(click.ParamType[int]):
    """Bytes, as `500MB`, `1.5 GB`, `10GiB`; `none` is 0."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        if str(value).strip().lower() == "none":
            return 0
        match = _SIZE.fullmatch(str(value).strip()) if len(str(value)) < 30 else None
        size = int(float(match[1]) * (1024 if match[3] else 1000) ** _POWERS[match[2].lower()]) if match else -1
        if not 0 <= size <= _LARGEST:
            self.fail(f"`{value}` must be a size like 500MB or 50GB, or `none`", param, ctx)
        return size


def readable_size(size: float) -> str:
    """Bytes for people, in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def readable_time(seconds: float) -> str:
    """How long, for people, in the one unit that fits; `2 d` from a little before."""
    for size, unit in _UNITS:
        if (count := int(seconds / size + 0.02)) >= 2:
            return f"{count} {unit}"
    return f"{max(seconds, 0):.0f} s"


def exact_time(seconds: int) -> str:
    """How long, in the largest unit that divides it."""
    size, unit = next((size, unit) for size, unit in (*_UNITS, (1, "s")) if seconds % size == 0)
    return f"{seconds // size:,} {unit}"


def readable_moment(moment: datetime) -> str:
    """A moment, in this machine's own time."""
    return moment.astimezone().strftime("%Y-%m-%d %H:%M")


def counted(number: int, noun: str) -> str:
    """`1 file`, `5,000 files`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
