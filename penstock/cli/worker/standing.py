"""`penstock worker drain`, `resume`, `revoke` and `rm`: what an owner of the first team decides about a worker."""

from collections.abc import Sequence
from typing import Literal

import click

from penstock.cli.removing import remove_each
from penstock.cli.running import Decorator, Name, connect, run
from penstock.cli.terminal import Terminal
from penstock.client import Client

reason_option: Decorator = click.option("--reason", default="", help="Why, for whoever asks later.")


@click.command(short_help="Give a worker nothing new.")
@click.argument("name", type=Name())
@reason_option
@click.pass_context
def drain(ctx: click.Context, name: str, reason: str) -> None:
    """Give worker NAME nothing new. What it runs it finishes; `penstock worker show NAME` says when it has."""
    run(_changed(connect(ctx), name, "drain", reason))
    Terminal().say(f"{name}: draining; `penstock worker show {name}` says what it still runs")


@click.command(short_help="Give a drained worker work again.")
@click.argument("name", type=Name())
@click.pass_context
def resume(ctx: click.Context, name: str) -> None:
    """Give worker NAME work again."""
    run(_changed(connect(ctx), name, "resume", ""))
    Terminal().say(f"{name}: gets work again")


@click.command(short_help="Cut a worker off for good.")
@click.argument("name", type=Name())
@reason_option
@click.pass_context
def revoke(ctx: click.Context, name: str, reason: str) -> None:
    """Cut worker NAME off: nothing that bears its key is heard any more, and what it was running is given to others at once.

    This is for a worker that cannot be trusted; one that is only to be stopped is better drained. Its name is free after `penstock worker rm`."""
    run(_changed(connect(ctx), name, "revoke", reason))
    Terminal().say(f"{name}: revoked; `penstock worker rm {name}` frees its name")


@click.command(short_help="Forget workers that are revoked or lost.")
@click.argument("names", metavar="NAME...", nargs=-1, required=True, type=Name())
@click.pass_context
def rm(ctx: click.Context, names: Sequence[str]) -> None:
    """Forget workers that are revoked or lost. Their names are free for others.

    To come back a worker registers anew. A key that was revoked never does: remove its worker.json first, so that it makes another."""
    ctx.exit(1 if run(_removed(connect(ctx), names)) else 0)


async def _changed(client: Client, name: str, verb: Literal["drain", "resume", "revoke"], reason: str) -> None:
    async with client:
        await client.change_worker(name, verb, reason)


async def _removed(client: Client, names: Sequence[str]) -> int:
    async with client:
        return await remove_each(names, client.remove_worker)
