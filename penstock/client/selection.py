"""Which files of a folder are uploaded: what git would show of it (tracked and untracked, without the ignored), or all of it.

`.git` itself goes along only when asked for. A `.penstockignore` in the folder, in git's syntax, takes away more.
"""

# Paths are bytes here, which pathlib does not have:
# ruff: noqa: PTH112, PTH114, PTH118

import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec

from penstock.client.errors import PenstockError


class Unreadable(PenstockError):
    """The folder, or a file in it, cannot be taken; the message names it."""


class Selection(msgspec.Struct, frozen=True, kw_only=True):
    """Paths relative to `root` as bytes, sorted, each after the folder that it is in. `size` is the bytes of the regular files, `files` their
    number, `skipped` what is neither file, folder nor link (sockets, pipes, devices)."""

    root: Path
    paths: list[bytes]
    size: int = 0
    files: int = 0
    skipped: list[str] = []


def select(root: Path, *, include_ignored: bool = False, include_git: bool = False) -> Selection:
    """Look at the folder as it is now. Raises Unreadable."""
    if not root.exists():
        raise Unreadable(f"{root} does not exist")
    if not root.is_dir():
        raise Unreadable(f"{root} is not a folder")
    top = os.fsencode(root)
    try:
        named = None if include_ignored else _listed_by_git(root)
        found = set(_walk(top, b"", include_git)) if named is None else set(_expand(top, named))
        if named is not None and include_git and os.path.lexists(os.path.join(top, b".git")):
            found.update(_walk(top, b".git", include_git=True))
        if not include_ignored:
            found = _without_ignored(root, found)
        return _measured(root, top, found)
    except OSError as error:
        raise Unreadable(f"cannot read {os.fsdecode(error.filename or top)}: {error.strerror}") from error


def _measured(root: Path, top: bytes, found: set[bytes]) -> Selection:
    paths: set[bytes] = set()
    skipped: list[str] = []
    size = files = 0
    for path in found:
        try:
            status = os.lstat(os.path.join(top, path))
        except (FileNotFoundError, NotADirectoryError):  # tracked, and deleted in the work tree
            continue
        if stat.S_ISREG(status.st_mode):
            files, size = files + 1, size + status.st_size
        elif not (stat.S_ISDIR(status.st_mode) or stat.S_ISLNK(status.st_mode)):
            skipped.append(os.fsdecode(path))
            continue
        paths.add(path)
        paths.update(_parents(path))
    return Selection(root=root, paths=sorted(paths, key=lambda path: path.split(b"/")), size=size, files=files, skipped=sorted(skipped))


def _parents(path: bytes) -> Iterator[bytes]:
    while b"/" in path:
        path = path.rpartition(b"/")[0]
        yield path


def _walk(top: bytes, start: bytes, include_git: bool) -> Iterator[bytes]:
    """Everything below (and with) `start`, links not followed."""
    if start:
        yield start
    folder = os.path.join(top, start) if start else top
    if not stat.S_ISDIR(os.lstat(folder).st_mode) and start:
        return
    pending = [(start, folder)]
    while pending:
        prefix, folder = pending.pop()
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name == b".git" and not include_git:
                    continue
                path = prefix + b"/" + entry.name if prefix else entry.name
                yield path
                if entry.is_dir(follow_symlinks=False):
                    pending.append((path, entry.path))


def _expand(top: bytes, named: list[bytes]) -> Iterator[bytes]:
    """What git lists, with the content of the submodules and nested repositories that it lists as one name."""
    for path in named:
        name = path.rstrip(b"/")
        full = os.path.join(top, name)
        if os.path.isdir(full) and not os.path.islink(full):
            yield name
            inner = _listed_by_git(Path(os.fsdecode(full))) if os.path.lexists(os.path.join(full, b".git")) else None
            content = _walk(full, b"", include_git=False) if inner is None else _expand(full, inner)
            yield from (name + b"/" + below for below in content)
        else:
            yield name


def _listed_by_git(folder: Path) -> list[bytes] | None:
    """Tracked and untracked paths below the folder, or None when all of it is meant: it is in no work tree, or is itself ignored by the one it
    is in (who names an ignored folder means what is in it)."""
    try:
        inside = _git(folder, "rev-parse", "--is-inside-work-tree")
    except FileNotFoundError:
        if any((parent / ".git").exists() for parent in (folder.resolve(), *folder.resolve().parents)):
            raise Unreadable(
                f"{folder} is in a git work tree, but there is no `git` here to list it: install git, or use --include-ignored"
            ) from None
        return None
    if inside.returncode or inside.stdout.strip() != b"true":
        if b"dubious ownership" in inside.stderr:
            raise Unreadable(f"git does not trust {folder}, which someone else owns: `git config --global --add safe.directory '{folder.resolve()}'`")
        return None
    if _git(folder, "check-ignore", "-q", ".").returncode == 0:
        return None
    listed = _git(folder, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    if listed.returncode:
        raise Unreadable(f"git cannot list {folder}: {os.fsdecode(listed.stderr).strip()}")
    return [path for path in listed.stdout.split(b"\0") if path]


def _git(folder: Path, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["git", "-C", str(folder), *arguments], stdin=subprocess.DEVNULL, capture_output=True, env={**os.environ, "LC_ALL": "C"})


def _without_ignored(root: Path, found: set[bytes]) -> set[bytes]:
    try:
        lines = (root / ".penstockignore").read_text("utf-8", "surrogateescape").splitlines()
    except FileNotFoundError:
        return found
    from pathspec import GitIgnoreSpec

    ignored = GitIgnoreSpec.from_lines(lines)
    return {path for path in found if not ignored.match_file(os.fsdecode(path))}
