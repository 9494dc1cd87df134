"""`penstock artifact ls`: the team's artifacts, or what is in one."""

import os
import time
from typing import Literal, get_args

import click

from penstock.cli.main import NOBODY_READS
from penstock.cli.quantities import counted, readable_size, readable_time
from penstock.cli.references import Ref, Reference, find, nothing
from penstock.cli.running import Mistake, connect, json_option, print_json, run, team_option
from penstock.cli.tables import print_table
from penstock.cli.terminal import Terminal, printable
from penstock.client import Artifact, Client, NotFound, TreeEntry
from penstock.client.model import ArtifactKind

HEADING = ("id", "origin", "files", "size", "age", "expires")
SOON = 3600.0  # seconds before its expiry from which on an artifact is marked


@click.command(short_help="List artifacts, or what is in one.")
@click.argument("ref", required=False, type=Ref())
@click.option("-r", "--recursive", is_flag=True, help="With REF: folders with all that is in them.")
@click.option("-l", "--long", is_flag=True, help="With REF: also kind, size and digest.")
@click.option(
    "--kind",
    type=click.Choice(get_args(ArtifactKind)),
    help="Only uploads, only what builds made, or only the parts of others that builds were given (not listed otherwise).",
)
@click.option("--build", type=click.IntRange(min=1), metavar="N", help="Only the outputs of build N.")
@click.option("--limit", type=click.IntRange(min=1), default=50, show_default=True, help="So many artifacts at most.")
@json_option
@team_option
@click.pass_context
def ls(
    ctx: click.Context,
    ref: Reference | None,
    recursive: bool,
    long: bool,
    kind: ArtifactKind | None,
    build: int | None,
    limit: int,
    as_json: bool,
    team: str | None,
) -> None:
    """List the team's artifacts, newest first; with a REF, what is in that artifact or folder.

    An artifact comes from a folder, or from a build: `build:7/dist` names it as well as its id. On a narrow terminal the sizes and ages are left out.
    """
    client = connect(ctx, team)
    if ref is None:
        if recursive or long:
            raise Mistake("-r and -l look into an artifact: name one, `penstock artifact ls -l ID`")
        artifacts, more = run(_artifacts(client, kind or "", build, limit))
        if as_json:
            print_json(artifacts)
        else:
            print_artifacts(artifacts, time.time())
        if more:
            Terminal().say(f"these are the newest {limit}: more with --limit")
        return
    if kind or build:
        raise Mistake("--kind and --build choose among all artifacts: leave REF away")
    terminal = Terminal()
    entries = run(_looked(client, ref, recursive, long, as_json, terminal))
    if terminal.reader_gone:
        ctx.exit(NOBODY_READS)
    if as_json:
        print_json(entries)


async def _artifacts(client: Client, kind: ArtifactKind | Literal[""], build: int | None, limit: int) -> tuple[list[Artifact], bool]:
    """So many at most, and whether there are more."""
    found: list[Artifact] = []
    async with client:
        async for artifact in client.artifacts(kind, build):
            if len(found) == limit:
                return found, True
            found.append(artifact)
    return found, False


def print_artifacts(artifacts: list[Artifact], now: float) -> None:
    rows = [_row(artifact, now) for artifact in artifacts]
    colours = {(n, "id"): "cyan" for n in range(len(rows))}
    for n, artifact in enumerate(artifacts):
        if artifact.pinned:
            colours[n, "expires"] = "green"
        elif artifact.expires_at and artifact.expires_at.timestamp() < now + SOON:
            colours[n, "expires"] = "yellow"
    print_table(HEADING, rows, right=("files", "size", "age"), spare=("files", "age", "size"), colours=colours)


def _row(artifact: Artifact, now: float) -> tuple[str, ...]:
    age = readable_time(now - artifact.created_at.timestamp()) if artifact.created_at else ""
    origin = f"build:{artifact.build}/{artifact.name}" if artifact.kind == "output" and artifact.build else artifact.name
    return artifact.id, printable(origin), f"{artifact.files:,}", readable_size(artifact.size), age, _expiry(artifact, now)


def _expiry(artifact: Artifact, now: float) -> str:
    if artifact.pinned:
        return "pinned"
    if artifact.expires_at is None:
        return "never"
    left = artifact.expires_at.timestamp() - now
    return f"in {readable_time(left)}" if left > 0 else "now"


async def _looked(client: Client, ref: Reference, recursive: bool, long: bool, as_json: bool, terminal: Terminal) -> list[TreeEntry]:
    """Print what is in the folder that the reference names (a file or link is listed itself) as it comes; for JSON it is kept."""
    kept: list[TreeEntry] = []
    files = size = 0
    async with client:
        found = await find(client, ref)
        path = os.fsencode(found.path)
        inside = len(path) + 1 if path else 0
        try:
            async for entry in client.tree(found.artifact.id, path, recursive):
                if as_json:
                    kept.append(entry)
                    continue
                name = entry.path_bytes[inside:] or path.rpartition(b"/")[2]
                terminal.write(_line(entry, os.fsdecode(name), long, terminal).encode())
                if terminal.reader_gone:
                    return []
                if entry.kind == "file":
                    files, size = files + 1, size + (0 if entry.target else entry.size)
        except NotFound as error:
            raise nothing(found) from error
    if long and not as_json:
        terminal.say(f"{counted(files, 'file')}, {readable_size(size)}")
    return kept


def _line(entry: TreeEntry, name: str, long: bool, terminal: Terminal) -> str:
    shown = terminal.styled(printable(name), {"folder": "blue", "link": "cyan"}.get(entry.kind, "green" if entry.executable else None))
    if entry.kind == "folder":
        shown += "/"
    if not long:
        return f"{shown}\n"
    if entry.target:
        shown += f" {'->' if entry.kind == 'link' else '='} {printable(entry.target)}"
    letter = {"folder": "d", "link": "l"}.get(entry.kind, "x" if entry.executable else "-")
    size = readable_size(entry.size) if entry.kind == "file" else ""
    return f"{letter} {size:>9}  {entry.digest[:12]:12}  {shown}\n"
