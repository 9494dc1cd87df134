"""10,000 steps that write a numbered tail and are gone at once: every log is complete, or is marked where it is cut (FAULTS 104, 106)."""

import asyncio
import itertools
import random
import secrets
import signal
import time
from contextlib import suppress
from typing import Any

import msgspec

from penstock.client import Build, Conflict, LogLine
from tests.bench.figures import Figure
from tests.controls import eventually
from tests.faults.system import System
from tests.faults.traffic import Traffic
from tests.soak.options import Options, none, say
from tests.soak.system import fresh_system

EXITS, STAGES, SLOTS, AT_ONCE = 10_000, 20, 8, 3
"""Steps; of a build, each a stage, and so a log, of its own; at once on the worker; builds at once."""
SECONDS = 120.0
"""Until a log is archived."""
WORKER_DIES_EVERY = 25
"""Builds."""


class Exit(msgspec.Struct, frozen=True):
    """A step: how it goes, and what it must have written before. `whole`: it is never cut short."""

    script: str
    lines: tuple[str, ...]
    exit_codes: tuple[int, ...]
    whole: bool = True


def drawn(chance: random.Random) -> Exit:
    """Some lines, the last of which may have no end; then an exit, a signal, or a child that is killed while it writes."""
    count, code = chance.choice([1, 3, 50, 400, 3000]), chance.choice([0, 0, 3, 143])
    lines = [f"line {number}\n" for number in range(count)]
    text = f"i=0; while [ $i -lt {count} ]; do echo line $i; i=$((i+1)); done" if count < 100 else f"seq -f 'line %.0f' 0 {count - 1}"
    match chance.randrange(4):
        case 0:
            return Exit(f"{text}; exit {code}", tuple(lines), (code,))
        case 1:
            return Exit(f"{text}; printf 'the end'; exit {code}", (*lines, "the end"), (code,))
        case 2:
            return Exit(f"{text}; kill -9 $$", tuple(lines), (137, -9))
        case _:
            script = f"{text}; i={count}; while :; do echo line $i; i=$((i+1)); done & sleep 0.0{chance.randrange(10)}; kill -9 0"
            return Exit(script, tuple(lines), (137, -9), whole=False)


async def run(options: Options) -> list[Figure]:
    """Half of them in the default sandbox, half without; a few of them, in the default one."""
    chance, until = options.chance("exits"), options.until()
    sandboxes: list[str | None] = [None] if options.smoke else [None, "none"]
    builds = options.many(EXITS, 60) // STAGES // len(sandboxes)
    counts = {"logs": 0, "aborted": 0, "kills of the worker": 0}
    wrong: list[str] = []
    for sandbox in sandboxes:
        with fresh_system(sandbox=sandbox, slots=SLOTS) as system:
            async with Traffic(system) as traffic:
                await several(system, traffic, builds, chance, until, counts, wrong)
                await eventually(lambda system=system: system.steps() == [], timeout=60)
    return [
        options.done("exits: logs of steps that were gone at once", counts["logs"], EXITS),
        Figure("exits: of these, of builds that were aborted meanwhile", counts["aborted"], ""),
        Figure("exits: kills of the worker meanwhile", counts["kills of the worker"], ""),
        none("exits: logs that are neither complete nor marked", len(wrong)),
    ]


async def several(
    system: System, traffic: Traffic, builds: int, chance: random.Random, until: float, counts: dict[str, int], wrong: list[str]
) -> None:
    """So many builds, some at once; now and then one is aborted, or the worker dies."""
    numbers = itertools.count(1)

    async def one_after_another() -> None:
        while (number := next(numbers)) <= builds and time.monotonic() < until:
            exits = [drawn(chance) for _ in range(STAGES)]
            build = await traffic.client.create_build(plan(exits, system.mark), {}, secrets.token_hex(16))
            if number % WORKER_DIES_EVERY == 0:
                await asyncio.sleep(chance.uniform(0, 0.5))
                with suppress(AssertionError, KeyError):
                    system.kill("worker", signal.SIGKILL)
                    counts["kills of the worker"] += 1
            elif chance.random() < 0.1:
                await asyncio.sleep(chance.uniform(0, 0.5))
                with suppress(Conflict):
                    await traffic.client.abort(build.id)
            build = await traffic.client.wait(build.id)
            counts["aborted"] += STAGES * (build.status == "aborted")
            for number_of, one in enumerate(exits):
                counts["logs"] += 1
                if why := await problem(traffic, build, f"s{number_of}", one):
                    wrong.append(why)
                    say(f"build {build.id}, stage s{number_of}: {why}\n  {one.script}")
            if counts["logs"] // STAGES % 25 == 0:
                say(f"{counts['logs']:,} logs, {len(wrong)} of them wrong")

    await asyncio.gather(*(one_after_another() for _ in range(AT_ONCE)))


def plan(exits: list[Exit], mark: str) -> dict[str, Any]:
    """Stages that need nothing of one another."""
    stages = []
    for number, one in enumerate(exits):
        config = {"run": {"path": "sh", "args": ["-c", one.script]}, "params": {"MARK": mark}}
        stages.append({"name": f"s{number}", "steps": [{"step": "run", "name": "task", "config": config}], "max_attempts": 10})
    return {"stages": stages}


async def problem(traffic: Traffic, build: Build, name: str, one: Exit) -> str:
    """What is wrong with the log of a stage's last attempt; "" if nothing is."""
    stage = next(stage for stage in build.stages if stage.name == name)
    if stage.attempt == 0 or not stage.worker:
        return ""  # aborted before it had a worker
    lines: list[LogLine] = []

    async def archived() -> bool:
        lines.clear()
        start: int | None = 0
        while start is not None:
            page = await traffic.client.log(build.id, name, start=start, limit=1000)
            lines.extend(page.lines)
            start = page.next
        return page.complete

    try:
        await eventually(archived, timeout=SECONDS)
    except AssertionError:
        return f"it is not complete after {SECONDS:g} s"
    written = [line.text for line in lines if line.stream == "stdout"]
    if [line.line for line in lines] != list(range(len(lines))):
        return "its lines are not numbered one after another"
    cut = build.status == "aborted" and stage.status == "aborted"
    if not cut and stage.steps[0].exit_code not in one.exit_codes:
        return f"its step ended with {stage.steps[0].exit_code} ({stage.error})"
    said = [line.text for line in lines if line.text == "penstock: interrupted: aborted\n" or line.text.startswith("[penstock: the worker was lost")]
    if cut and written and len(written) < len(one.lines) and not said:
        return f"it is cut after {len(written)} lines of {len(one.lines)}, and does not say so"
    if cut or not one.whole:
        return prefix(written, one, cut)
    return "" if tuple(written) == one.lines else f"{len(written)} lines of {len(one.lines)}, and the last are {written[-2:]}"


def prefix(written: list[str], one: Exit, cut: bool) -> str:
    """What was cut short has all lines from the first to some last one, which may be a part; the tail before the cut is there."""
    for number, text in enumerate(written):
        whole = one.lines[number] if number < len(one.lines) else f"line {number}\n"
        if text != whole and not (number == len(written) - 1 and whole.startswith(text)):
            return f"line {number} is {text!r}"
    return "" if cut or len(written) >= len(one.lines) else f"{len(written)} lines of at least {len(one.lines)}"
