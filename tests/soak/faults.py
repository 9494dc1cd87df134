"""The kinds of faults, and one after another of them at random."""

import asyncio
import random
import shutil
import signal
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager

import asyncpg
from nats.errors import Error as BusError

from penstock.client import PenstockError
from proto.topology import CONSUMERS, STREAMS
from tests.faults.proxy import Proxy
from tests.faults.system import SERVICES, System
from tests.faults.traffic import Traffic
from tests.faults.work import INSTANT, Work
from tests.soak.system import Mate

ENDLESS = Work("endless", "sleep 600", "aborted", None)
BURST = 20
"""Builds at once: more than there are slots."""
AT_ONCE = 3
"""Faults that may last at the same time."""
LEASE_SECONDS = 5.0
"""Of the system that is hurt. So that a busy machine is no fault by itself: what is ten times in vain is given up, as it should be."""

Fault = Callable[[], Awaitable[None]]


class Faults:
    """`strike` until `struck` holds as many as wanted. Everything that can be hurt is passed in: the system, two of whose connections go through
    proxies (its clients', and the other workers' to the bus), these workers, and the traffic, some of whose builds are there to be aborted."""

    def __init__(self, system: System, traffic: Traffic, mates: Sequence[Mate], front: Proxy, bus: Proxy, chance: random.Random) -> None:
        self._system, self._traffic, self._mates, self._front, self._bus, self._chance = system, traffic, mates, front, bus, chance
        self.struck: Counter[str] = Counter()
        self._aborted: set[str] = set()
        self._lasting: set[asyncio.Task[None]] = set()
        self._kinds: dict[str, tuple[int, Fault]] = {
            **{f"kill {name}": (4, lambda name=name: self._kill(name)) for name in (*SERVICES, "nats")},
            "kill postgres": (3, lambda: self._kill("postgres")),
            "stop postgres at once": (2, lambda: self._kill("postgres", signal.SIGQUIT)),
            **{f"stop {name}": (2, lambda name=name: self._last(system.stopped(name))) for name in (*SERVICES, "nats", "postgres")},
            "stop the worker and its steps": (2, lambda: self._last(system.hanging("worker"))),
            "kill another worker": (8, self._kill_mate),
            "stop another worker": (6, lambda: self._last(chance.choice(mates).stopped())),
            "kill a service, and keep it away": (2, lambda: self._last(system.without(chance.choice(SERVICES)))),
            "kill the bus, and keep it away": (2, lambda: self._last(system.without("nats"))),
            "empty the bus's store": (1, self._empty),
            "kill the supervisor": (1, self._restart),
            "cut the clients": (5, lambda: self._last(front.refusing(), 1.0)),
            "cut the other workers from the bus": (5, lambda: self._last(bus.refusing())),
            "cut services from the database": (4, self._hang_up),
            "delete a stream": (4, self._delete_stream),
            "delete a consumer": (4, self._delete_consumer),
            "abort": (10, self._abort),
            "a burst of builds": (2, self._burst),
        }

    async def strike(self) -> None:
        """One fault, now. What lasts goes on meanwhile; what cannot be done now, since its victim is down already, is no fault."""
        while len(self._lasting) >= AT_ONCE:
            await asyncio.wait(self._lasting, return_when=asyncio.FIRST_COMPLETED)
        kinds = list(self._kinds)
        kind = self._chance.choices(kinds, [self._kinds[name][0] for name in kinds])[0]
        try:
            async with asyncio.timeout(60):
                await self._kinds[kind][1]()
        except (AssertionError, LookupError, OSError, TimeoutError, BusError, asyncpg.PostgresError, asyncpg.InterfaceError, PenstockError):
            return
        self.struck[kind] += 1

    async def over(self) -> None:
        """Until nothing lasts any more."""
        await asyncio.gather(*self._lasting)

    # --- kinds

    async def _kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        self._system.kill(name, number)

    async def _kill_mate(self) -> None:
        self._chance.choice(self._mates).hit(signal.SIGKILL)

    async def _last(self, fault: AbstractContextManager[None], most: float = 1.5 * LEASE_SECONDS) -> None:
        """Begin what lasts, for some seconds."""
        fault.__enter__()

        async def last(seconds: float) -> None:
            try:
                await asyncio.sleep(seconds)
            finally:
                fault.__exit__(None, None, None)

        task = asyncio.create_task(last(self._chance.uniform(0.05, most)))
        self._lasting.add(task)
        task.add_done_callback(self._lasting.discard)

    async def _empty(self) -> None:
        """While it is down."""
        with self._system.without("nats"):
            shutil.rmtree(self._system.data.nats / "store")

    async def _restart(self) -> None:
        """Everything dies with it; the other workers live on."""
        await self.over()
        self._system.kill("supervisor")
        url = self._system.url
        await asyncio.to_thread(self._system.up)
        self._system.url = url

    async def _hang_up(self) -> None:
        database = await self._system.database()
        try:
            await database.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND usename <> 'postgres'")
        finally:
            await database.close()

    async def _delete_stream(self) -> None:
        async with self._system.bus() as bus:
            await bus.jetstream().delete_stream(self._chance.choice(STREAMS).name)

    async def _delete_consumer(self) -> None:
        consumer = self._chance.choice(CONSUMERS)
        async with self._system.bus() as bus:
            await bus.jetstream().delete_consumer(consumer.stream, consumer.name)

    async def _abort(self) -> None:
        """A build that would never end."""
        build = self._chance.choice(self._endless())
        await self._traffic.client.abort(build)
        self._aborted.add(build)

    async def abort_the_rest(self) -> None:
        """So that all builds end."""
        for build in self._endless():
            await self._traffic.client.abort(build)

    def _endless(self) -> list[str]:
        return [build for build, work in self._traffic.accepted.items() if work is ENDLESS and build not in self._aborted]

    async def _burst(self) -> None:
        await asyncio.gather(*(self._traffic.submit(INSTANT) for _ in range(BURST)))
