"""Trees compared, and parts of trees. Pure."""

from collections.abc import Iterable, Iterator, Mapping

import msgspec

from penstock.client import Entry


class Part(msgspec.Struct, frozen=True):
    """A folder's entries by their paths in it, or with `is_folder` false one file or link, by b""."""

    entries: dict[bytes, Entry]
    is_folder: bool = True

    @property
    def files(self) -> int:
        return sum(entry.kind == "file" for entry in self.entries.values())

    @property
    def size(self) -> int:
        """The bytes of its files, those with several names counted once."""
        return sum({entry.target or entry.path: entry.size for entry in self.entries.values() if entry.kind == "file"}.values())


def part_of(tree: Iterable[Entry], path: bytes = b"") -> Part | None:
    """What lies at the path; None when nothing does."""
    if not path:
        return Part({entry.path: entry for entry in tree})
    inner = path + b"/"
    entries: dict[bytes, Entry] = {}
    there = False
    for entry in tree:
        if entry.path == path:
            if entry.kind != "folder":
                return Part({b"": entry}, is_folder=False)
            there = True
        elif entry.path.startswith(inner):
            entries[entry.path[len(inner) :]] = entry
    return Part(entries) if there else None


class Change(msgspec.Struct, frozen=True):
    """A path that two trees differ in: added without `before`, removed without `after`."""

    path: bytes
    before: Entry | None
    after: Entry | None

    @property
    def sign(self) -> str:
        return "+" if self.before is None else "-" if self.after is None else "~"

    @property
    def is_content(self) -> bool:
        """Whether a file's bytes changed."""
        return bool(self.before and self.after and self.before.kind == self.after.kind == "file" and self.before.digest != self.after.digest)


def compare(before: Mapping[bytes, Entry], after: Mapping[bytes, Entry]) -> Iterator[Change]:
    """What differs, by path. A folder that came or went is told of only where it is empty: what is in it is told itself."""
    filled = [{parent for path in tree if (parent := path.rpartition(b"/")[0])} for tree in (before, after)]
    for path in sorted(before.keys() | after.keys(), key=lambda path: path.split(b"/")):
        old, new = before.get(path), after.get(path)
        if old and new:
            if _differ(old, new):
                yield Change(path, old, new)
        elif old and path not in filled[0]:
            yield Change(path, old, None)
        elif new and path not in filled[1]:
            yield Change(path, None, new)


def _differ(old: Entry, new: Entry) -> bool:
    if old.kind != new.kind or old.executable != new.executable:
        return True
    return old.digest != new.digest if old.kind == "file" else old.kind == "link" and old.target != new.target
