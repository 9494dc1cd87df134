"""`penstock watch` and `penstock logs`."""

import asyncio

import click

from penstock.cli.following import exit_code_of, follow, say_end, say_why
from penstock.cli.interruption import Interruption
from penstock.cli.main import NOBODY_READS
from penstock.cli.running import BuildRef, connect, json_option, print_json, run, team_option
from penstock.cli.terminal import Terminal
from penstock.client import Build, Client, LogLine, NotFound


@click.command(short_help="Watch a build live.")
@click.argument("build", type=BuildRef())
@team_option
@click.option("--json", "as_json", is_flag=True, help="Print the build as JSON on stdout at its end; the log goes to stderr.")
@click.pass_context
def watch(ctx: click.Context, build: str, team: str | None, as_json: bool) -> None:
    """Watch a build from its start to its end, whenever it started. The exit code is the build's, as with execute. Ctrl-C leaves; the build goes
    on."""
    client = connect(ctx, team)
    terminal = Terminal(log_to_stderr=as_json)
    seen = run(_watched(client, build, terminal))
    if terminal.reader_gone:
        ctx.exit(NOBODY_READS)
    if as_json:
        print_json(seen)
    ctx.exit(exit_code_of(seen))


async def _watched(client: Client, ref: str, terminal: Terminal) -> Build:
    with Interruption("left") as interruption:
        interruption.cancels()
        async with client:
            build: Build | None = None
            try:
                build = await client.build(ref)
                terminal.say(f"build {build.number}: {build.url}")
                build = await follow(client, build, terminal, until_reader_goes=True)
            except asyncio.CancelledError:
                if build and not build.ended:
                    terminal.say(f"left: build {build.number} goes on (`penstock abort {build.number}` ends it)")
                raise click.Abort from None
            if not terminal.reader_gone:
                say_why(build, terminal)
                say_end(build, terminal)
            return build


@click.command(short_help="Print a build's log.")
@click.argument("build", type=BuildRef())
@click.option("--stage", default="", help="Of this stage only.")
@click.option("--attempt", type=click.IntRange(min=1), help="Of this attempt of it, not of the last one.")
@click.option("--plain", is_flag=True, help="All of it on stdout, byte for byte, stdout and stderr as they came.")
@json_option
@team_option
@click.pass_context
def logs(ctx: click.Context, build: str, stage: str, attempt: int | None, plain: bool, as_json: bool, team: str | None) -> None:
    """Print what a build has written so far: the task's stdout on stdout, its stderr on stderr. It does not wait; `watch` does."""
    client = connect(ctx, team)
    terminal = Terminal()
    lines = run(_logged(client, build, terminal, stage, attempt, plain, as_json))
    terminal.restore()
    if as_json:
        print_json(lines)
    if terminal.reader_gone:
        ctx.exit(NOBODY_READS)


async def _logged(client: Client, ref: str, terminal: Terminal, stage: str, attempt: int | None, plain: bool, as_json: bool) -> list[LogLine]:
    """Write it stage after stage, page after page; the lines themselves are kept for JSON only."""
    kept: list[LogLine] = []
    async with client:
        build = await client.build(ref)
        stages = [stage] if stage else [known.name for known in build.stages if known.attempt]
        for name in stages:
            try:
                if plain:
                    async for piece in client.log_text(build.id, name, attempt):
                        terminal.log_bytes(piece)
                    continue
                start: int | None = 0
                while start is not None and not terminal.reader_gone:
                    page = await client.log(build.id, name, attempt, start)
                    for line in page.lines:
                        if as_json:
                            kept.append(line)
                        else:
                            terminal.log(line.stream, line.text)
                    start = page.next if page.lines else None
            except NotFound:
                if stage or attempt:
                    raise
                # the stage has not written anything yet
    return kept
