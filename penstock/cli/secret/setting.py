"""`penstock secret set` and `rm`."""

import sys
from collections.abc import Sequence
from pathlib import Path

import click

from penstock.cli.removing import remove_each
from penstock.cli.running import Failure, Mistake, Name, connect, run, team_option
from penstock.client import Client, Secret


@click.command(name="set", short_help="Set a secret.")
@click.argument("name", type=Name())
@click.option("--from-file", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Take the value from a file, as it is.")
@click.option("--stdin", "from_stdin", is_flag=True, help="Take the value from stdin, without the newline at its end.")
@team_option
@click.pass_context
def set_(ctx: click.Context, name: str, from_file: Path | None, from_stdin: bool, team: str | None) -> None:
    """Set a secret of the team, or replace it; an owner may. Without --from-file or --stdin the value is asked for. It is never an argument: those
    are for everyone on this machine to read.

    Builds that run keep the value that they were given."""
    if from_file is not None and from_stdin:
        raise Mistake("--from-file and --stdin: which of them?")
    if from_file is None and not from_stdin and not sys.stdin.isatty():
        raise Mistake("the value is asked for on a terminal, and this is none: give it with --from-file, or with --stdin")
    value = _text(_read(from_file)) if from_file is not None else _text(sys.stdin.buffer.read()).removesuffix("\n") if from_stdin else _asked()
    if not value:
        raise Mistake("the value is empty")
    found = run(_set(connect(ctx, team), name, value))
    click.echo(f"{found.name}: set (version {found.version})", err=True)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise Mistake(f"cannot read {path}: {error.strerror}") from error


def _asked() -> str:
    value: str = click.prompt("Value", hide_input=True, err=True)
    return value


def _text(raw: bytes) -> str:
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        raise Failure("the value is not UTF-8 text: encode it, for example with base64") from None
    if "\0" in text:
        raise Failure("the value holds a NUL, which no environment variable can: encode it, for example with base64")
    return text


async def _set(client: Client, name: str, value: str) -> Secret:
    async with client:
        return await client.set_secret(name, value)


@click.command(short_help="Remove secrets.")
@click.argument("names", metavar="NAME...", nargs=-1, required=True, type=Name())
@team_option
@click.pass_context
def rm(ctx: click.Context, names: Sequence[str], team: str | None) -> None:
    """Remove secrets; an owner may. A step that still names one ends with an error that says so."""
    ctx.exit(1 if run(_removed(connect(ctx, team), names)) else 0)


async def _removed(client: Client, names: Sequence[str]) -> int:
    async with client:
        return await remove_each(names, client.remove_secret)
