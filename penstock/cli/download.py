"""`penstock download`: what fly's RFC promised: go away, and fetch the outputs later."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import click

from penstock.cli.fetching import GOES_ON, ask_before_much, check_folders, fetch, output_of
from penstock.cli.interruption import Interruption
from penstock.cli.running import Assignment, BuildRef, Failure, Mistake, connect, run, team_option
from penstock.cli.terminal import Terminal
from penstock.client import Artifact, Build, Client


@click.command(short_help="Bring outputs back.")
@click.argument("build", type=BuildRef())
@click.option("-o", "--output", "outputs", multiple=True, metavar="NAME=PATH", type=Assignment(), help="This output, into this folder.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask before a download of more than 1 GB.")
@team_option
@click.pass_context
def download(ctx: click.Context, build: str, outputs: Sequence[tuple[str, str]], yes: bool, team: str | None) -> None:
    """Bring a build's outputs back: those that are named, else all of them, each into a folder of its name.

    Files that are there are replaced, others left alone; what is there already is not fetched again.
    """
    wanted = {name: Path(path).expanduser() for name, path in outputs}
    if len(wanted) < len(outputs):
        raise Mistake("an output is given twice")
    check_folders(wanted)
    client = connect(ctx, team)
    terminal = Terminal()
    known = run(_known(client, build))
    wanted = wanted or {name: Path(name) for name in known.outputs}
    check_folders(wanted)
    found = _found(known, wanted)
    ask_before_much(sum(artifact.size for artifact in found.values()), ", ".join(map(str, wanted.values())), yes)
    run(_downloaded(client, found, wanted, terminal))
    if not wanted:
        terminal.say(f"build {known.number} has no outputs" + ("" if known.ended else f" yet: it is {known.status}"))


async def _known(client: Client, ref: str) -> Build:
    async with client:
        return await client.build(ref)


async def _downloaded(client: Client, found: dict[str, Artifact], wanted: dict[str, Path], terminal: Terminal) -> None:
    with Interruption("left") as interruption:
        interruption.cancels()
        try:
            async with client:
                await fetch(client, found, wanted, terminal)
        except asyncio.CancelledError:
            raise click.Abort(GOES_ON) from None


def _found(build: Build, wanted: dict[str, Path]) -> dict[str, Artifact]:
    found: dict[str, Artifact] = {}
    for name in wanted:
        artifact = output_of(build, name)
        if artifact is None:
            if not build.ended:
                raise Failure(f"build {build.number} is {build.status} and has no output `{name}` yet: wait with `penstock watch {build.number}`")
            raise Failure(f"build {build.number} has no output `{name}` (it has {', '.join(build.outputs) or 'none'})")
        found[name] = artifact
    return found
