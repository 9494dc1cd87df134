"""`penstock why`: why a build waits, or why it is where it is."""

import time
from collections.abc import Iterator, Mapping

import click

from penstock.cli.quantities import counted, readable_size, readable_time
from penstock.cli.running import BuildRef, connect, json_option, print_json, run, team_option
from penstock.cli.terminal import STATUS_COLOURS, Terminal, printable
from penstock.client import BuildPreparation, Client, Holder, Preparation
from penstock.client.model import ENDED

NAMED = 5  # of what is ahead
STATES = ("draining", "in trouble")
"""What is no requirement among what a worker was refused for."""


@click.command(short_help="Say why a build waits, and what is ahead of it.")
@click.argument("build", type=BuildRef())
@json_option
@team_option
@click.pass_context
def why(ctx: click.Context, build: str, as_json: bool, team: str | None) -> None:
    """Say why BUILD waits: what it needs, what was recorded, what is ahead of it and who has the slots; or where it runs, and why there. Of other
    teams' builds only how many there are."""
    preparation = run(_asked(connect(ctx, team), build))
    if as_json:
        print_json(preparation)
        return
    terminal, now = Terminal(), time.time()
    click.echo(f"build {preparation.number} {_is(preparation, terminal)}", color=True)
    if preparation.status in ENDED:
        return
    for stage in preparation.stages:
        click.echo(f"{terminal.styled(printable(stage.stage), 'cyan')}: {_state(stage, now)}", color=True)
        for line in _details(stage):
            click.echo(f"  {line}")


async def _asked(client: Client, build: str) -> BuildPreparation:
    async with client:
        return await client.preparation(build)


def _is(preparation: BuildPreparation, terminal: Terminal) -> str:
    status = terminal.styled(preparation.status, STATUS_COLOURS.get(preparation.status))
    return f"has ended: {status}" if preparation.status in ENDED else f"is {status}"


def _state(stage: Preparation, now: float) -> str:
    again = f", attempt {stage.attempt}" if stage.attempt > 1 else ""
    match stage.state:
        case "blocked":
            return f"waits for {_and(stage.needs)}" if stage.needs else stage.reason or "waits"
        case "queued":
            return f"has waited {_for(stage, now)} for a worker{again}"
        case "leased":
            runs = "has run" if stage.started_at else "has had a slot"
            return f"{runs} on {printable(stage.worker)} for {_for(stage, now)}{again}"
        case _:
            return stage.status + (f": {printable(stage.reason)}" if stage.reason else "")


def _for(stage: Preparation, now: float) -> str:
    since = stage.started_at or stage.leased_at or stage.since
    return readable_time(now - since.timestamp()) if since else "?"


def _details(stage: Preparation) -> Iterator[str]:
    if stage.lost:
        yield f"attempt {stage.attempt - 1} was lost: {printable(stage.lost)}"
    if stage.state == "leased" and stage.why:
        yield "why there: " + "; ".join(f"{printable(one.worker)} had {one.load:.0%} of its slots in use{_fetch(one.missing)}" for one in stage.why)
    if stage.state != "queued":
        return
    if stage.requires:
        yield f"it needs {printable(_and(stage.requires))}"
    if stage.reason and not (stage.live and stage.able):  # else it was so, and is not any more: those that are able are busy
        yield f"recorded: {printable(stage.reason)}{_counts(stage.refused)}"
    if not stage.live:
        yield "no scheduler answers: what is ahead of it is not known now"
        return
    yield _ahead(stage)
    yield f"{counted(stage.able, 'worker') if stage.able else 'no worker'} could take it" + (":" if stage.holders else "")
    for holder in stage.holders:
        yield f"  {_holder(holder)}"


def _counts(refused: Mapping[str, int]) -> str:
    """What each worker was refused for: the first thing that stood against it."""
    if len(refused) == 1:
        return f" ({counted(next(iter(refused.values())), 'worker')})"
    return f" ({_and([_refusal(why, count) for why, count in refused.items()])})" if refused else ""


def _refusal(why: str, count: int) -> str:
    verbs = ("is", "are") if why in STATES else ("lacks", "lack")
    return f"{counted(count, 'worker')} {verbs[count != 1]} {printable(why)}"


def _ahead(stage: Preparation) -> str:
    if not stage.ahead:
        return "nothing is ahead of it"
    own = [f"build {one.build}" + (f" ({printable(one.stage)})" if one.stage != stage.stage else "") for one in stage.ahead_builds[:NAMED]]
    others = stage.ahead - len(own)
    more = [f"{others} more"] if others and own else []
    named = f": {_and([*own, *more])}" if own else ", of other teams"
    return f"ahead of it: {'at least ' if stage.more else ''}{counted(stage.ahead, 'stage')}{named}"


def _holder(holder: Holder) -> str:
    own = [f"build {number}" for number in holder.builds[:NAMED]]
    left = len(holder.builds) + holder.others - len(own)
    others = [f"{left} more" if own else f"{counted(left, 'stage')} of other teams"] if left else []
    used = f"used by {_and([*own, *others])}" if own or others else "none in use"
    idle = ", and offers none now" if not holder.offered and len(holder.builds) + holder.others < holder.slots else ""
    return f"{printable(holder.worker)}: {counted(holder.slots, 'slot')}, {used}{idle}"


def _fetch(missing: int) -> str:
    return f" and lacked {readable_size(missing)}" if missing else ""


def _and(parts: list[str]) -> str:
    return ", ".join(parts[:-1]) + (" and " if len(parts) > 1 else "") + parts[-1] if parts else ""
