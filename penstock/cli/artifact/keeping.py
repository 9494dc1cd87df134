"""`penstock artifact pin`, `unpin`, `touch` and `rm`: how long artifacts stay."""

from collections.abc import Awaitable, Callable, Sequence

import click

from penstock.cli.quantities import Duration, counted, readable_size
from penstock.cli.references import Found, Ref, Reference, find, lifetime
from penstock.cli.running import Failure, connect, json_option, print_json, run, team_option
from penstock.cli.terminal import Terminal
from penstock.client import Artifact, Client, Conflict, NotFound, Refused

Change = Callable[[Client, Found], Awaitable[Artifact]]
several = click.argument("refs", metavar="REF...", nargs=-1, required=True, type=Ref(whole=True))


@click.command(short_help="Keep artifacts.")
@several
@json_option
@team_option
@click.pass_context
def pin(ctx: click.Context, refs: Sequence[Reference], as_json: bool, team: str | None) -> None:
    """Keep artifacts until they are unpinned, whatever their expiry."""
    _change(ctx, refs, as_json, team, lambda client, found: client.pin(found.artifact.id))


@click.command(short_help="Let artifacts expire.")
@several
@json_option
@team_option
@click.pass_context
def unpin(ctx: click.Context, refs: Sequence[Reference], as_json: bool, team: str | None) -> None:
    """Take the pins away: each artifact expires when it would have without."""
    _change(ctx, refs, as_json, team, lambda client, found: client.unpin(found.artifact.id))


@click.command(short_help="Keep artifacts for longer.")
@several
@click.option(
    "--keep",
    required=True,
    type=Duration(),
    metavar="TIME",
    help="How long from now: 12h, 7d. One that is kept for longer already stays so, unless you --shorten.",
)
@click.option("--shorten", is_flag=True, help="Let also those expire then that are kept for longer.")
@json_option
@team_option
@click.pass_context
def touch(ctx: click.Context, refs: Sequence[Reference], keep: int, shorten: bool, as_json: bool, team: str | None) -> None:
    """Keep artifacts for so long from now (`pin` keeps them for good)."""
    _change(ctx, refs, as_json, team, lambda client, found: client.touch(found.artifact.id, keep, shorten))


@click.command(short_help="Remove artifacts.")
@several
@team_option
@click.pass_context
def rm(ctx: click.Context, refs: Sequence[Reference], team: str | None) -> None:
    """Remove artifacts now, pinned ones too. What a build that runs needs stays until it has ended."""

    async def remove(client: Client, found: Found) -> Artifact:
        await client.delete(found.artifact.id)
        return found.artifact

    _change(ctx, refs, False, team, remove, _removed)


def _removed(artifact: Artifact) -> str:
    return f"removed ({counted(artifact.files, 'file')}, {readable_size(artifact.size)})"


def _change(
    ctx: click.Context, refs: Sequence[Reference], as_json: bool, team: str | None, change: Change, said: Callable[[Artifact], str] = lifetime
) -> None:
    """Change one after another; a fault with one is said and does not stop the others, and the exit code tells of it."""
    changed, faults = run(_changed(connect(ctx, team), refs, change, said, Terminal()))
    if as_json:
        print_json(changed)
    ctx.exit(1 if faults else 0)


async def _changed(
    client: Client, refs: Sequence[Reference], change: Change, said: Callable[[Artifact], str], terminal: Terminal
) -> tuple[list[Artifact], int]:
    changed: list[Artifact] = []
    faults = 0
    async with client:
        for ref in refs:
            try:
                artifact = await change(client, await find(client, ref, whole=True))
            except Failure as failure:
                terminal.say(f"Error: {failure.message}", "red")
                faults += 1
            except (NotFound, Conflict, Refused) as error:
                terminal.say(f"Error: {ref}: {error}", "red")
                faults += 1
            else:
                changed.append(artifact)
                terminal.say(f"{ref}: {said(artifact)}")
    return changed, faults
