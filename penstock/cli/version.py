"""`penstock version`."""

from importlib.metadata import version as installed

import click

from penstock.cli.running import connect, json_option, print_json
from penstock.client import Client, PenstockError


@click.command(short_help="Print versions.")
@json_option
@click.pass_context
def version(ctx: click.Context, as_json: bool) -> None:
    """Print the version of this program and, when one is known and answers, of the server."""
    import asyncio

    here = installed("penstock")
    try:
        there: str | None = asyncio.run(_server(connect(ctx)))
    except (PenstockError, click.ClickException):
        there = None
    if as_json:
        print_json({"client": here, "server": there})
        return
    click.echo(f"penstock {here}")
    if there:
        click.echo(f"server {there}")


async def _server(client: Client) -> str:
    async with client:
        return (await client.info()).version
