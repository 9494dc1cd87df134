"""`penstock up` and `penstock down`."""

from pathlib import Path

import click

data_option = click.option("--data", type=click.Path(path_type=Path), envvar="PENSTOCK_DATA", metavar="DIR", help="The data folder.")


@click.command(short_help="Start everything here.")
@data_option
@click.option("--detach", is_flag=True, help="Return when everything is ready, and leave it running.")
@click.option("--port", type=click.IntRange(0, 65535), help="Where the API listens; 7420, or a free port when that is taken, by default.")
@click.option("--slots", type=click.IntRange(1, 4096), help="How many stages the local worker runs at once.")
@click.option("--sandbox", type=click.Choice(["auto", "bwrap", "unshare", "none"]), help="What steps run in; the first that works by default.")
@click.option("--lease-seconds", type=click.FloatRange(min=0.5), help="How long a silent worker keeps its work.")
@click.option(
    "--store",
    envvar="PENSTOCK_STORE_URL",
    metavar="URL",
    help="Where artifacts are kept: s3://bucket/prefix, gs://…, az://… (with AWS_…, GOOGLE_… or AZURE_… variables), file:///folder; "
    "a folder in the data folder by default.",
)
@click.option("--restored", is_flag=True, help="Say that the database was put back as it was some time ago: what followed it starts anew.")
@click.pass_context
def up(
    ctx: click.Context,
    data: Path | None,
    detach: bool,
    port: int | None,
    slots: int | None,
    sandbox: str | None,
    lease_seconds: float | None,
    store: str | None,
    restored: bool,
) -> None:
    """Start the whole system on this machine: database, bus, services, one worker. Ctrl-C stops it; data stays."""
    from penstock.up import command

    ctx.exit(
        command.up(data=data, detach=detach, port=port, slots=slots, sandbox=sandbox, lease_seconds=lease_seconds, store=store, restored=restored)
    )


@click.command(short_help="Stop what `up` started.")
@data_option
@click.pass_context
def down(ctx: click.Context, data: Path | None) -> None:
    """Stop the system that `up` started with this data folder; data stays."""
    from penstock.up import command

    ctx.exit(command.down(data=data))
