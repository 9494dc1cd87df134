"""`penstock artifact usage` and `policy`: how much a team stores, and what bounds it."""

from typing import Literal

import click

from penstock.cli.quantities import FOREVER, Keep, Size, exact_time, readable_size
from penstock.cli.running import connect, json_option, print_json, run, team_option
from penstock.client import Client, Policy, Usage


@click.command(short_help="Print how much is stored.")
@json_option
@team_option
@click.pass_context
def usage(ctx: click.Context, as_json: bool, team: str | None) -> None:
    """Print how much the team's artifacts take. What several of them have in common is stored once."""
    found = run(_usage(connect(ctx, team)))
    if as_json:
        print_json(found)
        return
    quota = ""
    if found.quota_bytes:
        quota = f" of {readable_size(found.quota_bytes)} ({found.stored_bytes / found.quota_bytes:.0%})"
    click.echo(f"stored     {readable_size(found.stored_bytes)}{quota}")
    click.echo(f"artifacts  {found.artifacts:,}, {readable_size(found.artifact_bytes)} if each were stored for itself")


async def _usage(client: Client) -> Usage:
    async with client:
        return await client.usage()


@click.command(short_help="Print or set what bounds storage.")
@click.option("--inputs", type=Keep(), metavar="TIME", help="Keep uploads so long: 12h, 7d, forever.")
@click.option("--outputs", type=Keep(), metavar="TIME", help="Keep builds' outputs so long.")
@click.option("--quota", type=Size(), metavar="SIZE", help="Store so much at most: 50GB; none: no limit.")
@click.option("--privileged/--not-privileged", default=None, help="Let steps be privileged, on workers that allow it (owners of the first team).")
@json_option
@team_option
@click.pass_context
def policy(
    ctx: click.Context,
    inputs: int | Literal["forever"] | None,
    outputs: int | Literal["forever"] | None,
    quota: int | None,
    privileged: bool | None,
    as_json: bool,
    team: str | None,
) -> None:
    """Print how long the team's artifacts are kept unless they say otherwise, and how much may be stored. The options change it (owners only), for
    what is stored from then on."""
    found = run(_policy(connect(ctx, team), _seconds(inputs), _seconds(outputs), quota, privileged))
    if as_json:
        print_json(found)
        return
    click.echo(f"inputs   {_kept(found.input_seconds)}")
    click.echo(f"outputs  {_kept(found.output_seconds)}")
    click.echo(f"quota    {readable_size(found.quota_bytes) if found.quota_bytes else 'none'}")
    click.echo(f"steps    {'may be privileged, on workers that allow it' if found.privileged else 'may not be privileged'}")


async def _policy(client: Client, inputs: int | None, outputs: int | None, quota: int | None, privileged: bool | None) -> Policy:
    async with client:
        if inputs is None and outputs is None and quota is None and privileged is None:
            return await client.policy()
        return await client.set_policy(input_seconds=inputs, output_seconds=outputs, quota_bytes=quota, privileged=privileged)


def _seconds(keep: int | Literal["forever"] | None) -> int | None:
    return FOREVER if keep == "forever" else keep


def _kept(seconds: int) -> str:
    return "kept forever" if seconds >= FOREVER else f"kept for {exact_time(seconds)}"
