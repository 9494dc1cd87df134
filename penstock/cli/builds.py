"""`penstock builds` and `penstock abort`."""

from datetime import datetime

import click

from penstock.cli.running import BuildRef, Failure, connect, json_option, print_json, run, team_option
from penstock.cli.tables import person, print_table
from penstock.cli.terminal import STATUS_COLOURS, Terminal
from penstock.client import Build, Client, Conflict


@click.command(short_help="List builds.")
@click.option("--limit", type=click.IntRange(min=1), default=20, show_default=True, help="So many at most.")
@click.option("--status", type=click.Choice(["pending", "started", "succeeded", "failed", "errored", "aborted"]), help="Only those.")
@json_option
@team_option
@click.pass_context
def builds(ctx: click.Context, limit: int, status: str | None, as_json: bool, team: str | None) -> None:
    """List the team's builds, newest first."""
    found = run(_listed(connect(ctx, team), status or "", limit))
    if as_json:
        print_json(found)
        return
    colours = {(n, "status"): STATUS_COLOURS[build.status] for n, build in enumerate(found) if build.status in STATUS_COLOURS}
    print_table(
        ("number", "status", "name", "created", "took", "by"),
        [_row(build) for build in found],
        right=["number"],
        spare=["by", "name"],
        colours=colours,
    )


async def _listed(client: Client, status: str, limit: int) -> list[Build]:
    async with client:
        return [build async for build in client.builds(status, limit)]


def _row(build: Build) -> tuple[str, ...]:
    status = f"{build.status} {build.percent} %" if build.status == "started" else build.status
    created = build.created_at.astimezone().strftime("%Y-%m-%d %H:%M:%S") if build.created_at else ""
    return str(build.number), status, build.name, created, _took(build.started_at, build.finished_at), person(build.requested_by)


def _took(start: datetime | None, end: datetime | None) -> str:
    if not start or not end:
        return ""
    seconds = (end - start).total_seconds()
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


@click.command(short_help="End a build.")
@click.argument("build", type=BuildRef())
@json_option
@team_option
@click.pass_context
def abort(ctx: click.Context, build: str, as_json: bool, team: str | None) -> None:
    """Ask for a build to end. Its task gets SIGTERM, and SIGKILL when it does not heed that."""
    aborted = run(_aborted(connect(ctx, team), build))
    if as_json:
        print_json(aborted)
    else:
        Terminal().say(f"aborting build {aborted.number}: see `penstock watch {aborted.number}`")


async def _aborted(client: Client, ref: str) -> Build:
    async with client:
        try:
            return await client.abort(ref)
        except Conflict as error:
            raise Failure(f"nothing to abort: {error}") from error
