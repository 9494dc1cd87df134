"""`penstock secret ls`."""

import click

from penstock.cli.running import connect, json_option, print_json, run, team_option
from penstock.cli.tables import person, print_table
from penstock.client import Client, Secret


@click.command(short_help="List secrets.")
@json_option
@team_option
@click.pass_context
def ls(ctx: click.Context, as_json: bool, team: str | None) -> None:
    """List the team's secrets by name: which version each one has, when it was set and by whom. Values are never shown."""
    found = run(_listed(connect(ctx, team)))
    if as_json:
        print_json(found)
        return
    print_table(("name", "version", "set", "by"), [_row(secret) for secret in found], right=["version"])


async def _listed(client: Client) -> list[Secret]:
    async with client:
        return [secret async for secret in client.secrets()]


def _row(secret: Secret) -> tuple[str, ...]:
    at = secret.set_at.astimezone().strftime("%Y-%m-%d %H:%M:%S") if secret.set_at else ""
    return secret.name, str(secret.version), at, person(secret.set_by)
