"""The scheduler's part in secrets, on a real database and bus, without the rest of it."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

from libs.bus.jetstream import connect_jetstream
from libs.eventlog.postgres import PostgresLog, open_postgres_log
from libs.runtime.commands import CommandLoop
from libs.runtime.ids import new_id
from proto.envelope import fact
from proto.plan import Plan
from services.scheduler.board import CATEGORIES, Board
from services.scheduler.decider import SchedulerDecider
from services.scheduler.master_keys import Keyring
from services.scheduler.sealing import SealingKeys
from services.scheduler.secrets import Secrets
from services.scheduler.vault import Given, Vault
from tests.nats_fixture import SEEDS


class Keeper:
    """`secrets` serves; `board` is read when it is asked for. `keys` may be replaced, as the file of master keys may; `late` seconds are added to the
    log's time."""

    def __init__(self, log: PostgresLog, keys: Keyring) -> None:
        self.log = log
        self.keys = keys
        self.vault = Vault(log.pool, lambda: self.keys)
        self.late = 0.0
        self.board = Board()
        self.leads = True
        self.secrets: Secrets

    async def read(self) -> Board:
        while rows := await self.log.read(self.board.position, 1000, CATEGORIES):
            for row in rows:
                self.board.apply(fact(row))
        return self.board

    async def given(self, plan: Plan, build: str = "b1", team: str = "main") -> Given:
        """What the plan's first stage would be sent."""
        return await self.vault.given((await self.read()).secrets.wanted(team, build, plan.stages[0]))

    async def rows(self) -> list[dict[str, Any]]:
        """Of teams."""
        return [dict(row) for row in await self.log.pool.fetch("SELECT * FROM secret WHERE team <> '' ORDER BY stored_at")]

    async def sealing_keys(self) -> list[str]:
        """Those that are still there."""
        return [row[0] for row in await self.log.pool.fetch("SELECT entry FROM secret WHERE team = '' ORDER BY stored_at")]


@contextlib.asynccontextmanager
async def keeping_secrets(database: Any, nats_url: str, keys: str) -> AsyncIterator[Keeper]:
    async with (
        open_postgres_log(database.url("scheduler"), size=4) as log,
        connect_jetstream(nats_url, SEEDS["scheduler"], "scheduler") as bus,
    ):
        commands: Any = CommandLoop(log, SchedulerDecider(), new_id)
        keeper = Keeper(log, Keyring(keys))
        keeper.secrets = Secrets(
            log=log,
            bus=bus,
            commands=commands,
            vault=keeper.vault,
            sealing=SealingKeys(keeper.vault, commands, new_id, lambda: keeper.board.now + keeper.late),
            index=lambda: keeper.board.secrets,
            leads=lambda: keeper.leads,
            ids=new_id,
            clock=time.monotonic,
        )
        await keeper.vault.create()
        tasks = [asyncio.create_task(work) for work in (commands.run(), keeper.secrets.serve())]
        try:
            await keeper.secrets.mind_keys()
            await keeper.read()
            yield keeper
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
