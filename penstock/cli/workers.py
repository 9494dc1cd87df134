"""`penstock workers`: who runs builds, and what each one does."""

import asyncio
import time
from datetime import datetime

import click

from penstock.cli.main import NOBODY_READS
from penstock.cli.quantities import readable_size, readable_time
from penstock.cli.running import connect, json_option, print_json, run
from penstock.cli.tables import print_table
from penstock.cli.terminal import Terminal, printable
from penstock.client import Client, Worker

HEADING = ("worker", "status", "slots", "builds", "seen", "mode", "cache", "version")
COLOURS = {"available": "green", "busy": "cyan", "error": "red", "draining": "yellow", "lost": "magenta", "revoked": "magenta"}
NAMED = 3  # builds that are named in the table
EVERY = 1.0  # seconds


@click.command(short_help="List the workers: status, slots, what they run.")
@click.option("-w", "--watch", is_flag=True, help="Show it again whenever it changes, until Ctrl-C.")
@json_option
@click.pass_context
def workers(ctx: click.Context, watch: bool, as_json: bool) -> None:
    """List the workers of this Penstock, by name.

    \b
    STATUS  available  has free slots, and offers them
            busy       all its slots are in use
            idle       offers nothing now (pull mode: wants no work) or was never heard of
            draining   finishes what it has, and gets nothing new
            error      can take no work: its disk is full, its container engine is gone
            lost       nothing is heard of it; what it ran is run elsewhere
            revoked    may not work here any more

    BUILDS are the team's by number, and +N those of others.
    """
    terminal = Terminal()
    run(_shown(connect(ctx), watch, as_json, terminal))
    if terminal.reader_gone:
        ctx.exit(NOBODY_READS)


async def _shown(client: Client, watch: bool, as_json: bool, terminal: Terminal) -> None:
    last = ""
    async with client:
        while True:
            found = [worker async for worker in client.workers()]
            if as_json:
                print_json(found)
            elif (told := str([_row(worker, 0.0) for worker in found])) != last or terminal.can_redraw:
                if watch and terminal.can_redraw:
                    terminal.clear()
                print_workers(found, time.time())
                last = told
            if not watch:
                return
            await asyncio.sleep(EVERY)
            terminal.look_for_reader()
            if terminal.reader_gone:
                return


def print_workers(workers: list[Worker], now: float) -> None:
    """The table, and why those that take no work do not."""
    colours = {(n, "status"): COLOURS[worker.status] for n, worker in enumerate(workers) if worker.status in COLOURS}
    print_table(HEADING, [_row(worker, now) for worker in workers], right=("slots", "seen", "cache"), colours=colours)
    terminal = Terminal()
    for worker in workers:
        if worker.reason:
            terminal.say(f"{printable(worker.name)}: {printable(worker.reason)}")


def _row(worker: Worker, now: float) -> tuple[str, ...]:
    slots = f"{worker.slots_in_use}/{worker.build_limit}"
    cache = readable_size(worker.cache_used) if worker.cache_limit else ""
    return (
        printable(worker.name),
        worker.status,
        slots,
        _builds(worker),
        ago(worker.last_checked_in, now),
        worker.mode,
        cache,
        printable(worker.version),
    )


def _builds(worker: Worker) -> str:
    numbers = list(dict.fromkeys(str(build.number) for build in worker.running_builds))
    others = worker.other_builds + len(numbers) - len(numbers[:NAMED])
    return " ".join([*numbers[:NAMED], *([f"+{others}"] if others else [])])


def ago(moment: datetime | None, now: float) -> str:
    """How long ago it was, as lists say it; "" if it never was."""
    if not moment or not now:
        return ""
    passed = now - moment.timestamp()
    return f"{readable_time(passed)} ago" if passed >= 2 else "now"
