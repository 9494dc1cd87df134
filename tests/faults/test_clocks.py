"""FAULTS 82: machines whose clocks are off by an hour, on either side: nothing that counts goes by a machine's own clock."""

from typing import Any

import pytest

from tests.controls import eventually
from tests.faults.conftest import Start
from tests.faults.traffic import Traffic
from tests.faults.work import COPYING, INSTANT, Work
from tests.faults.workers import registered, worker_process

HOUR = 3600.0


class Brief(Work):
    """Its build token is good for a quarter of an hour and a minute."""

    def plan(self, mark: str) -> dict[str, Any]:
        plan = super().plan(mark)
        plan["stages"][0]["steps"][0]["timeout"] = 60
        return plan


BRIEF = Brief(*COPYING)


@pytest.mark.parametrize("behind", ["gateway", "scheduler", "artifacts"])
async def test_services_on_machines_whose_clocks_are_two_hours_apart_work_together(start: Start, behind: str) -> None:
    """A grant of the gateway's (a minute) and a build token of the scheduler's are good at artifacts, and why a build waits is said at once."""
    ahead = {name: -HOUR if name == behind else HOUR for name in ("gateway", "scheduler", "artifacts")}
    system = start(clocks=ahead)
    async with Traffic(system) as traffic:
        for work in (INSTANT, BRIEF):
            await traffic.submit(work)
        await traffic.verify()
        nowhere = await traffic.client.create_build({"stages": [{**INSTANT.plan("")["stages"][0], "tags": ["nowhere"]}]}, {})

        async def said() -> bool:
            return bool((await traffic.client.build(nowhere.id)).stages[0].reason)

        await eventually(said, timeout=30)
    for name, seconds in ahead.items():
        said_so = [line for line in system.data.log(name).read_text().splitlines() if "clock is not the database's" in line]
        assert said_so and f'"seconds_ahead": {seconds:.0f}' in said_so[0], name


@pytest.mark.parametrize("seconds", [HOUR, -HOUR], ids=["ahead", "behind"])
async def test_a_worker_whose_clock_is_an_hour_off_works_as_any_other(start: Start, seconds: float) -> None:
    """It is admitted, holds its leases, reads inputs and stores outputs: its signed requests are refused with the server's time, and made again."""
    system = start(clocks={"worker": seconds})
    async with Traffic(system) as traffic:
        member = await registered(system, "late")
        async with worker_process(system, member):
            for _ in range(4):
                await traffic.submit(BRIEF)
            await traffic.verify()
    refused = [line for line in system.data.log("artifacts").read_text().splitlines() if '"why": "another time"' in line]
    assert refused, "its clock was off"
