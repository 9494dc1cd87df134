"""Two schedulers: one leads, the other is warm, and takes over when the first is gone."""

import hashlib
import secrets
import time
from typing import Any

from penstock.client import Client
from proto.events.lease import LeaseExpired, StageLeased
from tests.controls import eventually
from tests.faults.system import LEASE_SECONDS, System
from tests.faults.traffic import Traffic
from tests.faults.work import INSTANT, sleeping
from tests.second import second

FAILOVER_SECONDS = 15.0
"""On a machine that has other things to do; `just bench` says what it takes: a term's rest, and then well under two seconds."""


async def office(system: System) -> tuple[str, float]:
    """Who leads, and for how many seconds unless it is renewed."""
    database = await system.database()
    try:
        row = await database.fetchrow(
            "SELECT holder, extract(epoch FROM until - clock_timestamp())::float8 FROM scheduler.leadership WHERE name = 'placement'"
        )
    finally:
        await database.close()
    return (row[0], row[1]) if row else ("", 0.0)


async def leads(system: System, holder: str) -> bool:
    who, left = await office(system)
    return who == holder and left > 0


async def test_builds_go_on_when_the_leading_scheduler_is_killed_and_what_runs_is_not_disturbed(system: System) -> None:
    async with Traffic(system) as traffic:
        await traffic.submit(INSTANT)
        await traffic.ended()
        assert await leads(system, "local")
        with second(system.data, "scheduler", LEASE_SECONDS, {"MARK": system.mark}):
            # It hears the worker and reads the log, and leads nothing.
            await eventually(lambda: "started" in (system.data.logs / "scheduler-second.log").read_text(), timeout=30)
            running = await traffic.submit(sleeping(FAILOVER_SECONDS))
            await traffic.under_way()
            with system.without("scheduler"):
                killed = time.monotonic()
                for _ in range(5):
                    await traffic.submit(INSTANT)
                short = [build for build, work in traffic.accepted.items() if work is INSTANT]
                for build in short:
                    await eventually(lambda build=build: traffic.has_ended(build), timeout=FAILOVER_SECONDS - (time.monotonic() - killed))
                assert await leads(system, "second")
                facts = await system.log("lease-")
                terms = [fact.event.term for fact in facts if isinstance(fact.event, StageLeased)]
                assert terms == sorted(terms) and terms[-1] > terms[0], "what a leader writes names its term"
                assert not [fact for fact in facts if isinstance(fact.event, LeaseExpired) and fact.subject_id == running.id]
            await system.ready()
        # The first one is back, and takes over in its turn when the second is killed.
        await eventually(lambda: leads(system, "local"), timeout=FAILOVER_SECONDS)
        await traffic.submit(INSTANT)
        await traffic.verify()


def checking(system: System, **params: str) -> dict[str, Any]:
    """A plan whose step succeeds if its params have these values; they are given as `((secret))=value`."""
    pairs = {name: text.partition("=") for name, text in params.items()}
    checks = [f'[ "$(printf %s "${name}" | sha256sum)" = "{hashlib.sha256(v.encode()).hexdigest()}  -" ]' for name, (_, _, v) in pairs.items()]
    config = {
        "run": {"path": "sh", "args": ["-ec", "\n".join(checks)]},
        "params": {"MARK": system.mark} | {n: ref for n, (ref, _, _) in pairs.items()},
    }
    return {"stages": [{"name": "main", "steps": [{"step": "run", "name": "task", "config": config}]}]}


async def ran(client: Client, plan: dict[str, Any]) -> str:
    """How it ended."""
    build = await client.create_build(plan)

    async def over() -> str:
        now = await client.build(build.id)
        return f"{now.status} {now.error}".strip() if now.ended else ""

    return await eventually(over, timeout=2 * FAILOVER_SECONDS)


async def test_a_secret_that_one_scheduler_was_given_is_leased_by_the_other_and_keys_are_renewed_meanwhile(system: System) -> None:
    """Whoever took it is dead when it is needed; what is sealed to a key that the dead one had made is opened by the living one."""
    one, two, literal = (f"{secrets.token_urlsafe(9)}/+ {n}" for n in range(3))
    async with system.client() as client:
        await client.set_secret("one", one)
        with second(system.data, "scheduler", LEASE_SECONDS, {"MARK": system.mark}):
            await eventually(lambda: "started" in (system.data.logs / "scheduler-second.log").read_text(), timeout=30)
            with system.without("scheduler"):
                await eventually(lambda: leads(system, "second"), timeout=FAILOVER_SECONDS)
                assert await ran(client, checking(system, A=f"((one))={one}", MY_TOKEN=f"{literal}={literal}")) == "succeeded"
                before = await client.rotate_secret_keys()
                await client.set_secret("two", two)
            await system.ready()
        await eventually(lambda: leads(system, "local"), timeout=FAILOVER_SECONDS)
        assert await ran(client, checking(system, A=f"((one))={one}", B=f"((two))={two}", MY_TOKEN=f"{literal}={literal}")) == "succeeded"
        assert (await client.rotate_secret_keys()).sealing_version == before.sealing_version + 1
