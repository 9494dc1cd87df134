"""`penstock worker show`: all that is known of one worker."""

import time

import click

from penstock.cli.quantities import readable_moment, readable_size, readable_time
from penstock.cli.running import Name, connect, json_option, print_json, run
from penstock.cli.terminal import Terminal, printable
from penstock.cli.workers import COLOURS, ago
from penstock.client import Client, Worker


@click.command(short_help="Show all that is known of a worker.")
@click.argument("name", type=Name())
@json_option
@click.pass_context
def show(ctx: click.Context, name: str, as_json: bool) -> None:
    """Show all that is known of worker NAME."""
    worker = run(_known(connect(ctx), name))
    if as_json:
        print_json(worker)
        return
    terminal = Terminal()
    for key, value in _facts(worker, time.time()):
        text = terminal.styled(value, COLOURS.get(worker.status)) if key == "status" else value
        click.echo(f"{terminal.styled(f'{key:<14}', dim=True)}{text}", color=True)


async def _known(client: Client, name: str) -> Worker:
    async with client:
        return await client.worker(name)


def _facts(worker: Worker, now: float) -> list[tuple[str, str]]:
    """What there is to say, in order; what is not known is left out."""
    cache = f"{readable_size(worker.cache_used)} of {readable_size(worker.cache_limit)}" if worker.cache_limit else ""
    builds = [f"{build.number} ({build.stage}, {readable_time(now - build.since.timestamp())})" for build in worker.running_builds]
    more = [f"{worker.other_builds} of other teams"] if worker.other_builds else []
    told = {
        "worker": worker.name,
        "status": worker.status + (f": {worker.reason}" if worker.reason else ""),
        "slots": f"{worker.slots_in_use} of {worker.build_limit} in use",
        "builds": ", ".join([*builds, *more]),
        "last seen": ago(worker.last_checked_in, now),
        "status since": readable_moment(worker.last_status_update_at) if worker.last_status_update_at else "",
        "last build": _last(worker, now),
        "mode": worker.mode,
        "routes": ", ".join(worker.routes),
        "images": ", ".join(worker.images),
        "sandbox": worker.sandbox,
        "cache": cache,
        "host": " ".join(part for part in (worker.hostname, worker.address) if part),
        "version": worker.version,
        "registered": readable_moment(worker.registered_at) if worker.registered_at else "",
    }
    return [(key, printable(value)) for key, value in told.items() if value]


def _last(worker: Worker, now: float) -> str:
    parts = [("given", worker.last_build_started_at), ("ended", worker.last_build_finished_at)]
    return ", ".join(f"{word} {ago(moment, now)}" for word, moment in parts if moment)
