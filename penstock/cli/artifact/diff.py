"""`penstock artifact diff`: two trees, each of them stored or a folder here."""

import difflib
import os
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import click
import msgspec

from penstock.cli.main import NOBODY_READS
from penstock.cli.quantities import readable_size
from penstock.cli.references import Found, Reference, find, is_reference, parse_reference, part_at
from penstock.cli.running import Failure, Mistake, connect, json_option, print_json, run, team_option
from penstock.cli.terminal import Terminal, printable
from penstock.cli.trees import Change, Part, compare
from penstock.client import Client, Entry, PenstockError, Selection, select
from penstock.client.scan import hash_files, save
from penstock.client.threads import Threads

TEXT = 1_000_000  # bytes: a file up to which -p shows how it changed
COLOURS = {"+": "green", "-": "red", "~": "yellow"}


class Side(click.ParamType[Reference | Path]):
    """A reference, or a folder here."""

    name = "side"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Reference | Path:
        if isinstance(value, Reference | Path):
            return value
        text, path = str(value), Path(str(value)).expanduser()
        try:
            if is_reference(text) or not path.exists():
                return parse_reference(text)
        except ValueError as error:
            self.fail(str(error) if is_reference(text) else f"`{text}` is neither a folder here nor anything stored", param, ctx)
        if not path.is_dir():
            self.fail(f"{text} is a file: compare it with `penstock artifact cat REF | diff - {text}`", param, ctx)
        return path


class Tree(msgspec.Struct, frozen=True):
    """One of the two: where its files' bytes are, and its entries."""

    place: Found | Path
    part: Part
    given: str


@click.command(short_help="Compare two trees.")
@click.argument("before", metavar="A", type=Side())
@click.argument("after", metavar="B", type=Side())
@click.option("-p", "--patch", is_flag=True, help="Show how text files changed, as diff -u does.")
@click.option("--stat", is_flag=True, help="Print only how many files were added, removed and changed.")
@click.option("--include-ignored", is_flag=True, help="Of a folder here, also what git ignores.")
@click.option("--include-git", is_flag=True, help="Of a folder here, also the .git folder.")
@json_option
@team_option
@click.pass_context
def diff(
    ctx: click.Context,
    before: Reference | Path,
    after: Reference | Path,
    patch: bool,
    stat: bool,
    include_ignored: bool,
    include_git: bool,
    as_json: bool,
    team: str | None,
) -> None:
    """Compare what is at A with what is at B; each is a REF, or a folder here, taken as `upload` would.

    Each line is + added, - removed or ~ changed, with the sizes in A and in B. The exit code is that of diff: 0 the same, 1 different, 2 trouble.
    """
    terminal = Terminal()
    try:
        selections = {
            side: select(side, include_ignored=include_ignored, include_git=include_git) for side in (before, after) if isinstance(side, Path)
        }
        changes = run(_compared(connect(ctx, team), before, after, selections, terminal, shown=not (stat or as_json), patch=patch))
    except PenstockError as error:
        raise Mistake(str(error)) from error
    except Failure as failure:
        raise Mistake(failure.message) from failure  # 1 is for trees that differ
    if as_json:
        print_json([_row(change) for change in changes])
    elif stat or (changes and not terminal.reader_gone):
        summary = _summary(changes)
        terminal.write(f"{summary}\n".encode()) if stat else terminal.say(summary)
    ctx.exit(NOBODY_READS if terminal.reader_gone else 1 if changes else 0)


async def _compared(
    client: Client,
    before: Reference | Path,
    after: Reference | Path,
    selections: dict[Path, Selection],
    terminal: Terminal,
    *,
    shown: bool,
    patch: bool,
) -> list[Change]:
    """What differs, printed as it is found when `shown`."""
    async with client:
        left, right = [await _tree(client, side, selections) for side in (before, after)]
        if left.part.is_folder != right.part.is_folder:
            file, folder = (right, left) if left.part.is_folder else (left, right)
            raise Mistake(f"{file.given} is a file, and {folder.given} is a folder")
        changes = list(compare(left.part.entries, right.part.entries))
        for change in changes if shown else []:
            terminal.write(_line(change, left.given, terminal).encode())
            if patch and change.is_content:
                terminal.log_bytes(await _patch(client, change, left, right, terminal))
            if terminal.reader_gone:
                break
    return changes


async def _tree(client: Client, side: Reference | Path, selections: dict[Path, Selection]) -> Tree:
    if isinstance(side, Path):
        return Tree(side, Part({entry.path: entry for entry in await _hashed(selections[side])}), str(side))
    found = await find(client, side)
    return Tree(found, await part_at(client, found), found.given)


async def _hashed(selection: Selection) -> list[Entry]:
    """A folder's entries, with digests."""
    async with Threads(2) as threads:
        await hash_files(selection, threads, lambda done: None)
        await threads.run(save, selection)
    return selection.entries


def _line(change: Change, given: str, terminal: Terminal) -> str:
    old, new = change.before, change.after
    sizes = f"{_size(old):>9} {_size(new):>9}"
    notes: list[str] = []
    if old and new:
        if old.kind != new.kind:
            notes.append(f"{old.kind} → {new.kind}")
        elif old.executable != new.executable:
            notes.append("now executable" if new.executable else "no longer executable")
        if old.kind == new.kind == "link":
            notes.append(f"-> {printable(os.fsdecode(old.target))} → {printable(os.fsdecode(new.target))}")
    name = printable(os.fsdecode(change.path)) or given
    line = f"{change.sign} {sizes}  {name}{'/' if 'folder' in {entry.kind for entry in (old, new) if entry} and not notes else ''}"
    return terminal.styled(line + (f" ({', '.join(notes)})" if notes else ""), COLOURS[change.sign]) + "\n"


def _size(entry: Entry | None) -> str:
    return readable_size(entry.size) if entry and entry.kind == "file" else ""


async def _patch(client: Client, change: Change, left: Tree, right: Tree, terminal: Terminal) -> bytes:
    """How a file's text changed; nothing for what is large or no text."""
    if not change.before or not change.after or max(change.before.size, change.after.size) > TEXT:
        return b""
    texts = [await _read(client, tree, change.path) for tree in (left, right)]
    if any(b"\0" in text for text in texts):
        return b""
    try:
        old, new = (list(StringIO(text.decode())) for text in texts)  # which ends lines at nothing but \n
    except UnicodeDecodeError:
        return b""
    name = printable(os.fsdecode(change.path)) or "file"
    return "".join(_unified(old, new, name, terminal)).encode()


def _unified(old: list[str], new: list[str], name: str, terminal: Terminal) -> Iterator[str]:
    for line in difflib.unified_diff(old, new, f"a/{name}", f"b/{name}"):
        text = line.removesuffix("\n")
        yield terminal.styled(text, {"+": "green", "-": "red", "@": "cyan"}.get(text[:1])) + "\n"
        if text == line:
            yield "\\ No newline at end of file\n"


async def _read(client: Client, tree: Tree, path: bytes) -> bytes:
    if isinstance(tree.place, Path):
        return (tree.place / os.fsdecode(path)).read_bytes()
    where = b"/".join(filter(None, (os.fsencode(tree.place.path), path)))
    return b"".join([piece async for piece in client.read_file(tree.place.artifact.id, where)])


def _summary(changes: list[Change]) -> str:
    counts = [(sum(change.sign == sign for change in changes), word) for sign, word in (("+", "added"), ("-", "removed"), ("~", "changed"))]
    return ", ".join(f"{number:,} {word}" for number, word in counts if number) or "no differences"


def _row(change: Change) -> dict[str, Any]:
    """A change as JSON."""

    def side(entry: Entry | None) -> dict[str, Any] | None:
        if entry is None:
            return None
        digest = entry.file_id if entry.kind == "file" else ""
        target = printable(os.fsdecode(entry.target))
        return {"kind": entry.kind, "size": entry.size, "executable": entry.executable, "digest": digest, "target": target}

    words = {"+": "added", "-": "removed", "~": "changed"}
    path = printable(os.fsdecode(change.path))
    return {"path": path, "change": words[change.sign], "before": side(change.before), "after": side(change.after)}
