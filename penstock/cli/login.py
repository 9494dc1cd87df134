"""`penstock login` and `penstock targets`."""

import os
import sys

import click
import msgspec

from penstock.cli.running import Failure, Mistake, json_option, print_json, run
from penstock.client import Client, Info, NoTarget, Target, Unauthorized
from penstock.client.targets import Targets, read_targets, targets_path, write_targets


@click.command(short_help="Remember a Penstock.")
@click.option("--url", help="Where it is, like http://127.0.0.1:7420; the known target's by default.")
@click.option("--token", help="The token; without this it is asked for, or read from stdin when that is no terminal.")
@click.option("--team", help="The team to act for; the token's by default.")
@click.option("-n", "--name", default="", help="What to call it here; it becomes the current target.")
@click.pass_context
def login(ctx: click.Context, url: str | None, token: str | None, team: str | None, name: str) -> None:
    """Check a token with the server, and remember both in a file that only you can read."""
    path = targets_path(os.environ)
    try:
        known = read_targets(path)
    except NoTarget as error:
        raise Failure(str(error)) from error
    name = name or ctx.find_root().obj or known.current or "local"
    url = url or (known.targets[name].url if name in known.targets else None)
    if not url:
        raise Mistake("--url is missing: where is the Penstock to log in to?")
    if not url.startswith(("http://", "https://")):
        raise Mistake(f"--url {url}: must start with http:// or https://")
    token = token or _asked()
    info = run(_checked(url, token))
    target = Target(url=url.rstrip("/"), token=token, team=team or info.team or "main")
    try:
        write_targets(path, Targets(current=name, targets={**known.targets, name: target}))
    except OSError as error:
        raise Failure(f"cannot write {path}: {error.strerror}") from error
    click.echo(f"logged in to {target.url} as {info.role or 'a member'} of team {target.team}; it is the target `{name}` now", err=True)


def _asked() -> str:
    token: str = click.prompt("Token", hide_input=True, err=True) if sys.stdin.isatty() else sys.stdin.readline()
    token = token.strip()
    if not token or not token.isascii() or not token.isprintable():
        raise Mistake("there is no token: give it with --token, or on stdin")
    return token


async def _checked(url: str, token: str) -> Info:
    async with Client(url, token) as client:
        try:
            return await client.info()
        except Unauthorized as error:
            raise Failure(f"{url}: {error}") from error


@click.command(short_help="List or choose targets.")
@click.option("--use", metavar="NAME", help="Make this the current one.")
@json_option
def targets(use: str | None, as_json: bool) -> None:
    """List the Penstocks that are known here; the current one is marked. Tokens are not shown."""
    path = targets_path(os.environ)
    try:
        known = read_targets(path)
    except NoTarget as error:
        raise Failure(str(error)) from error
    if use:
        if use not in known.targets:
            raise Mistake(f"--use {use}: there is no such target ({', '.join(sorted(known.targets)) or 'there is none at all'})")
        known = msgspec.structs.replace(known, current=use)
        write_targets(path, known)
    rows = [
        {"name": name, "url": target.url, "team": target.team, "current": name == known.current} for name, target in sorted(known.targets.items())
    ]
    if as_json:
        print_json(rows)
        return
    for row in rows:
        click.echo(f"{'*' if row['current'] else ' '} {row['name']}  {row['url']}  team {row['team']}")
    if not rows:
        click.echo("none: start one with `penstock up`, or log in to one with `penstock login --url …`", err=True)
