"""`penstock artifact cat` and `download`: the bytes of an artifact, or of a part of it."""

import asyncio
import os
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path

import click
import msgspec

from penstock.cli.fetching import GOES_ON, ask_before_much, received
from penstock.cli.interruption import Interruption
from penstock.cli.main import NOBODY_READS
from penstock.cli.quantities import counted, readable_size
from penstock.cli.references import Found, Ref, Reference, find, look, part_at
from penstock.cli.running import Failure, Mistake, connect, run, team_option
from penstock.cli.terminal import Terminal, printable
from penstock.client import Client


@click.command(short_help="Print files of an artifact.")
@click.argument("refs", metavar="REF/PATH...", nargs=-1, required=True, type=Ref())
@team_option
@click.pass_context
def cat(ctx: click.Context, refs: Sequence[Reference], team: str | None) -> None:
    """Print files of artifacts on stdout, one after another, byte for byte.

    A terminal gets their text and its colours, nothing else that it would obey, and no binary file."""
    terminal = Terminal()
    run(_printed(connect(ctx, team), refs, terminal))
    terminal.restore()
    if terminal.reader_gone:
        ctx.exit(NOBODY_READS)


async def _printed(client: Client, refs: Sequence[Reference], terminal: Terminal) -> None:
    async with client:
        for ref in refs:
            found = await find(client, ref)
            entry = await look(client, found)
            if entry is None:
                raise Mistake(f"{found.given} is a folder: name a file in it (`penstock artifact ls {found.given}` lists them), or `download` it")
            if entry.kind == "link":
                raise Mistake(f"{found.given} is a link to {printable(entry.target)}: name that")
            async with aclosing(client.read_file(found.artifact.id, os.fsencode(found.path))) as pieces:
                async for piece in pieces:
                    if terminal.is_read_by_a_person and b"\0" in piece:
                        raise Failure(f"{found.given} is binary, and this is a terminal: `penstock artifact download` it, or send stdout elsewhere")
                    terminal.log_bytes(piece)
                    if terminal.reader_gone:
                        return


@click.command(short_help="Bring an artifact back.")
@click.argument("ref", type=Ref())
@click.argument("folder", metavar="[DIR]", required=False, type=click.Path(path_type=Path))
@click.option("-y", "--yes", is_flag=True, help="Do not ask before a download of more than 1 GB.")
@team_option
@click.pass_context
def download(ctx: click.Context, ref: Reference, folder: Path | None, yes: bool, team: str | None) -> None:
    """Bring an artifact back, or the folder or file that REF names in it, into DIR.

    DIR is made when it is not there: by default a folder of the artifact's or the folder's name here, and for a single file this folder itself. Files
    that are there are replaced, each in one step; others are left alone, and what is there already is not fetched again.
    """
    client = connect(ctx, team)
    terminal = Terminal()
    into = _folder(folder.expanduser()) if folder else None
    wanted = run(_measured(client, ref))
    into = into or _folder(Path(wanted.found.name) if wanted.is_folder else Path())
    terminal.say(f"{printable(wanted.found.given)}: {counted(wanted.files, 'file')}, {readable_size(wanted.size)}, into {into}")
    ask_before_much(wanted.size, str(into), yes)
    run(_downloaded(client, wanted, into, terminal))


def _folder(path: Path) -> Path:
    if path.exists() and not path.is_dir():
        raise Mistake(f"{path} is there and is not a folder")
    return path


class Wanted(msgspec.Struct, frozen=True):
    """What is to come, and how much that is."""

    found: Found
    files: int
    size: int
    is_folder: bool = True


async def _measured(client: Client, ref: Reference) -> Wanted:
    async with client:
        found = await find(client, ref)
        if not found.path:
            return Wanted(found, found.artifact.files, found.artifact.size)
        part = await part_at(client, found)
        return Wanted(found, part.files, part.size, part.is_folder)


async def _downloaded(client: Client, wanted: Wanted, into: Path, terminal: Terminal) -> None:
    found = wanted.found
    with Interruption("left") as interruption, terminal.bars() as bars:
        interruption.cancels()
        try:
            async with client:
                files = await client.download(found.artifact, into, bars.add(found.name), os.fsencode(found.path))
        except asyncio.CancelledError:
            raise click.Abort(GOES_ON) from None
        bars.done(found.name, received(found.name, files, wanted.size, bars))
