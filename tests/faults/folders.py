"""Folders of files that clients send and get back, compared byte by byte."""

import hashlib
import os
import random
from collections.abc import Mapping
from pathlib import Path

SUMS = "SUMS"
"""A file that names the others with their digests, as sha256sum does, so that a step can tell whether its input is whole."""


def files_in(folder: Path) -> dict[str, bytes]:
    """The contents of all files."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same(one: Path, other: Path) -> bool:
    """The same names, kinds and contents."""
    return _kinds(one) == _kinds(other) and files_in(one) == files_in(other)


def write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Make, replace and remove files until these are there."""
    for path in files_in(folder).keys() - files.keys():
        (folder / path).unlink()
    for path, contents in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(contents)


def with_sums(files: Mapping[str, bytes]) -> dict[str, bytes]:
    lines = "".join(f"{hashlib.sha256(contents).hexdigest()}  {path}\n" for path, contents in sorted(files.items()) if path != SUMS)
    return {**files, SUMS: lines.encode()}


def some_files(chance: random.Random, large: int) -> dict[str, bytes]:
    """Small files, an empty one, and one of `large` bytes."""
    small = {f"d{number % 4}/f{number:02}": chance.randbytes(chance.randrange(20_000)) for number in range(24)}
    return with_sums({**small, "empty": b"", "large": chance.randbytes(large)})


def edited(chance: random.Random, files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Some small ones are others, one is gone, one is new, and of the large one a few bytes have changed."""
    changed = dict(files)
    small = sorted(path for path in files if path.startswith("d"))
    for path in chance.sample(small, 5):
        changed[path] = chance.randbytes(chance.randrange(20_000))
    del changed[chance.choice(small)]
    changed[f"d0/new{chance.randrange(10**6)}"] = chance.randbytes(1000)
    at = chance.randrange(len(files["large"]) - 8)
    changed["large"] = files["large"][:at] + chance.randbytes(8) + files["large"][at + 8 :]
    return with_sums(changed)


def _kinds(folder: Path) -> dict[str, tuple[bool, bool, bool]]:
    return {path.relative_to(folder).as_posix(): (path.is_dir(), path.is_symlink(), os.access(path, os.X_OK)) for path in folder.rglob("*")}
