"""More workers than the one that `penstock up` runs, with names and keys of their own."""

import asyncio
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from libs.tokens import public_key
from penstock.client.joining import Membership, join, new_membership
from tests.faults.system import System


async def registered(system: System, name: str, tags: Sequence[str] = ()) -> Membership:
    """A worker's name and key, as an owner and the worker itself have them registered."""
    async with system.client() as client:
        token = (await client.registration(tags=tags)).token
    return await join(new_membership(name, system.url), token)


@asynccontextmanager
async def worker_process(
    system: System, member: Membership, wrapped: Sequence[str] = (), slots: int = 4, bus: str = ""
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A worker in a folder of its own. `wrapped` is a command that it is run by, `bus` another address of the bus."""
    settings = {
        "PENSTOCK_NATS_URL": bus or system.bus_url(),
        "PENSTOCK_WORKER_NAME": member.name,
        "PENSTOCK_WORKER_KEY": member.key,
        "PENSTOCK_SERVER_PUBLIC_KEY": public_key(system.data.secrets().server_key),
        "PENSTOCK_WORKER_DIR": str(system.home / member.name),
        "PENSTOCK_WORKER_BUILD_LIMIT": str(slots),
    }
    base = {name: value for name, value in system.environ.items() if not name.startswith("PENSTOCK_")}
    with system.data.log(f"worker-{member.name}").open("ab") as log:
        command = [*wrapped, sys.executable, "-P", "-m", "services.worker"]
        process = await asyncio.create_subprocess_exec(*command, env={**base, **settings}, cwd=system.home, stderr=log)
        try:
            yield process
        finally:
            if process.returncode is None:
                process.terminate()
            await process.wait()
