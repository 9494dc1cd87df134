"""`penstock worker token`: how a new worker is let in."""

import click

from penstock.cli.quantities import readable_moment
from penstock.cli.running import connect, json_option, print_json, run
from penstock.client import Client, Registration


@click.group()
def token() -> None:
    """Tokens by which new workers register: good for one worker, for minutes."""


@token.command()
@click.option("--minutes", type=click.IntRange(1, 10), default=10, show_default=True, help="How long it is good.")
@click.option(
    "--tag", "tags", multiple=True, metavar="TAG", help="What builds may choose the worker by: it has these tags and no others. Repeatable."
)
@click.option("--description", default="", help="What it is for, as the log keeps it.")
@json_option
@click.pass_context
def create(ctx: click.Context, minutes: int, tags: tuple[str, ...], description: str, as_json: bool) -> None:
    """Print a token that registers one worker. It is shown this once, and is good once.

    \b
      penstock worker token create | ssh HOST penstock worker start --register - --server URL
    """
    client = connect(ctx)
    issued = run(_created(client, minutes, tags, description))
    if as_json:
        print_json(issued)
        return
    click.echo(issued.token)
    click.echo(f"good once, until {readable_moment(issued.expires_at)}; on the new machine:", err=True)
    click.echo(f"  penstock worker start --register - --server {client.url}    # asks for it", err=True)


async def _created(client: Client, minutes: int, tags: tuple[str, ...], description: str) -> Registration:
    async with client:
        return await client.registration(minutes=minutes, tags=tags, description=description)
