"""`penstock artifact upload`."""

from pathlib import Path
from typing import Literal

import click

from penstock.cli.interruption import Interruption
from penstock.cli.quantities import Keep
from penstock.cli.references import lifetime
from penstock.cli.running import Mistake, connect, json_option, print_json, run, team_option
from penstock.cli.sending import send
from penstock.cli.terminal import Terminal
from penstock.client import Artifact, Client, PenstockError, Selection, select


@click.command(short_help="Store a folder.")
@click.argument("folder", metavar="[DIR]", default=".", type=click.Path(path_type=Path))
@click.option("--name", help="What to call it; the folder's own name by default.")
@click.option("--keep", type=Keep(), metavar="TIME", help="Keep it so long: 12h, 7d, forever; by default as the team's policy says.")
@click.option("--include-ignored", is_flag=True, help="Upload what git ignores, too.")
@click.option("--include-git", is_flag=True, help="Upload the .git folder, too.")
@json_option
@team_option
@click.pass_context
def upload(
    ctx: click.Context,
    folder: Path,
    name: str | None,
    keep: int | Literal["forever"] | None,
    include_ignored: bool,
    include_git: bool,
    as_json: bool,
    team: str | None,
) -> None:
    """Store a folder (the current one by default) and print its id, which other commands take: `-i src=artifact:ID`.

    A folder in a git work tree is uploaded as git shows it: tracked and untracked, without the ignored. Only what the server does not have yet is
    sent. After Ctrl-C or a broken connection the same command goes on where it was; what was sent is kept for an hour.
    """
    client = connect(ctx, team)
    terminal = Terminal()
    folder = folder.expanduser()
    try:
        selection = select(folder, include_ignored=include_ignored, include_git=include_git)
    except PenstockError as error:
        raise Mistake(str(error)) from error
    for path in selection.skipped:
        terminal.say(f"{path} is no file, folder or link: not uploaded")
    artifact = run(_uploaded(client, selection, folder.resolve().name if name is None else name, keep, terminal))
    if as_json:
        print_json(artifact)
    else:
        click.echo(artifact.id)


async def _uploaded(client: Client, selection: Selection, name: str, keep: int | Literal["forever"] | None, terminal: Terminal) -> Artifact:
    with Interruption("left; what was sent is kept for an hour") as interruption:
        interruption.cancels()
        async with client:
            [artifact] = (await send(client, {name: selection}, terminal, keep)).values()
    terminal.say(lifetime(artifact))
    return artifact
