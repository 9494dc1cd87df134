"""What an archive may hold: limits, and the one exception that names the member and the rule it breaks."""

from typing import NamedTuple


class Limits(NamedTuple):
    """Bounds on one archive. Sizes in bytes; `max_names` bounds all paths and link targets together, and with them the memory a tree takes.
    `max_ratio` (bytes out for a byte in) counts once `free_ratio_bytes` have come out, because a small file of zeros is no bomb."""

    max_members: int = 250_000
    max_bytes: int = 64 << 30
    max_ratio: int = 1000
    max_depth: int = 128
    max_path: int = 4096
    max_component: int = 255
    max_names: int = 64 << 20
    free_ratio_bytes: int = 256 << 20

    @property
    def max_stream(self) -> int:
        """Bytes of tar that an archive inside the limits can need: contents, headers, extended headers, padding."""
        return self.max_bytes + self.max_members * 4096 + 2 * self.max_names + (16 << 20)

    @property
    def max_manifest(self) -> int:
        """Bytes of manifest that a tree inside the limits can need: names, 80 bytes an entry, 32 for each whole chunk of 8 MiB."""
        return self.max_names + 2 * self.max_members * 80 + (self.max_bytes >> 18) + 4096


class ArchiveRefused(Exception):
    """The archive is refused whole. `member` names the culprit ("" when it is the stream itself), `rule` says what it breaks."""

    def __init__(self, member: bytes, rule: str) -> None:
        self.member = shown(member)
        self.rule = rule
        super().__init__(f"`{self.member}` {rule}" if member else f"the archive {rule}")


class LimitExceeded(ArchiveRefused):
    """The archive is past a limit on count, size or ratio."""


def shown(path: bytes) -> str:
    """A path for people: what is not UTF-8 or not printable is escaped, and a very long one is cut in the middle."""
    text = path.decode("utf-8", "backslashreplace")
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= 300 else f"{text[:150]}…{text[-150:]}"


def clean_path(raw: bytes, limits: Limits) -> bytes:
    """A member's path without `.` components and doubled or trailing slashes; b"" is the root. Raises ArchiveRefused."""
    if b"\0" in raw:
        raise ArchiveRefused(raw, "has a NUL in its path")
    if raw.startswith(b"/"):
        raise ArchiveRefused(raw, "has an absolute path")
    if len(raw) > limits.max_path:
        raise ArchiveRefused(raw, f"has a path of more than {limits.max_path} bytes")
    parts = [part for part in raw.split(b"/") if part and part != b"."]
    if b".." in parts:
        raise ArchiveRefused(raw, "has `..` in its path")
    if len(parts) > limits.max_depth:
        raise ArchiveRefused(raw, f"lies more than {limits.max_depth} folders deep")
    for part in parts:
        if len(part) > limits.max_component:
            raise ArchiveRefused(raw, f"has a name of more than {limits.max_component} bytes in its path")
    return b"/".join(parts)


def check_target(path: bytes, target: bytes, limits: Limits) -> None:
    """Refuse a symbolic link whose text no disk takes. Raises ArchiveRefused."""
    if not target:
        raise ArchiveRefused(path, "is a link to nothing")
    if b"\0" in target:
        raise ArchiveRefused(path, "has a NUL in its link")
    if len(target) >= limits.max_path:
        raise ArchiveRefused(path, f"has a link of {limits.max_path} bytes or more")
