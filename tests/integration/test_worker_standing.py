"""What a worker does that the bus does not admit (any more), on real servers: it finds out why, says so, and ends when it is no worker."""

import contextlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from libs.bus.callout import Doorkeeper
from libs.tokens import new_seed, public_key
from penstock.client.joining import Membership, join, new_membership
from proto.events.worker import WorkerBooted, WorkerLost
from proto.messages import Offers
from services.gateway.bootstrap import Bootstrap
from tests.controls import eventually
from tests.gateway_fixture import Gateway, running_gateway
from tests.nats_fixture import NatsServer, admitting
from tests.worker_controls import environment

EXPELLED = 77


class Place:
    """A gateway, a bus whose door a test keeps by `keys`, and a worker that is registered."""

    def __init__(self, folder: Path, gateway: Gateway, nats: NatsServer, member: Membership) -> None:
        self.folder = folder
        self.gateway = gateway
        self.nats = nats
        self.member = member
        self.log = folder / "worker.log"

    @contextlib.contextmanager
    def worker(self, **settings: str) -> Iterator["subprocess.Popen[bytes]"]:
        """What `penstock worker start` becomes."""
        known = {
            "worker_name": self.member.name,
            "worker_key": self.member.key,
            "server_public_key": self.member.server_public_key,
            "server_url": self.member.url,
            "worker_executors": "process",
        }
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "services.worker"],
                env={**environment(self.folder / "w", self.nats.url, "none", **known | settings), "PYTHONPATH": os.getcwd()},
                stdin=subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,
            )
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    async def says(self, words: str) -> bool:
        return await eventually(lambda: words in self.log.read_text(), timeout=60)

    async def gone(self) -> None:
        """Lost, and removed by an owner."""
        await self.gateway.record("worker-w1-b", WorkerBooted(worker="w1", boot="b", since=1, slots=1, offers=Offers()))
        await self.gateway.record("worker-w1-b", WorkerLost(worker="w1", boot="b", reason="silent"))

        async def removed() -> bool:
            async with self.gateway.call("DELETE", "/workers/w1") as answer:
                return bool(answer.status == 204)

        await eventually(removed)


async def ended(process: "subprocess.Popen[bytes]") -> int:
    await eventually(lambda: process.poll() is not None, timeout=60)
    return process.returncode


@pytest.fixture
async def place(tmp_path: Path, database, fresh_nats: NatsServer) -> AsyncIterator[Place]:
    async with running_gateway(database, fresh_nats.url) as gateway:
        token = (await gateway.json("POST", "/workers/tokens", 201, json={}))["token"]
        yield Place(tmp_path, gateway, fresh_nats, await join(new_membership("w1", gateway.url), token))


def admitted(place: Place) -> "contextlib.AbstractAsyncContextManager[Doorkeeper]":
    return admitting(place.nats, {"w1": public_key(place.member.key)})


async def test_one_that_is_revoked_says_so_and_ends(place: Place) -> None:
    keys = {"w1": public_key(place.member.key)}
    async with admitting(place.nats, keys) as door:
        with place.worker() as process:
            await place.says("connected to the bus")
            await place.gateway.json("PUT", "/workers/w1/revoke", 204, json={"reason": "stolen"})
            door.cut("w1", keys.pop("w1"))
            assert await ended(process) == EXPELLED
        with place.worker() as process:
            assert await ended(process) == EXPELLED
    last = place.log.read_text().splitlines()[-1]
    assert last.startswith(f"worker: w1 was revoked at {place.gateway.url}") and "--register" in last


async def test_one_that_was_removed_says_so_and_ends_and_a_404_of_anybody_else_ends_nobody(place: Place) -> None:
    await place.gone()
    async with admitting(place.nats, {}):
        with place.worker(server_url=f"{place.gateway.url}/elsewhere") as process:
            await place.says("neither the bus nor")
            assert process.poll() is None
        with place.worker() as process:
            assert await ended(process) == EXPELLED
    assert "it was removed" in place.log.read_text().splitlines()[-1]


async def test_a_gateway_that_has_not_registered_the_deployments_workers_yet_ends_nobody(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    await place.gone()
    monkeypatch.setattr(Bootstrap, "problem", property(lambda _: "has not begun"), raising=False)
    async with admitting(place.nats, {}):
        with place.worker() as process:
            await place.says("neither the bus nor")
            assert process.poll() is None
            monkeypatch.undo()
            assert await ended(process) == EXPELLED


async def test_one_whom_nobody_is_there_to_admit_waits_and_comes_back_by_itself(place: Place) -> None:
    with place.worker() as process:
        place.nats.kill()
        try:
            await place.says("the bus does not answer")
        finally:
            place.nats.start()
        async with admitted(place):
            await place.says("connected to the bus")
            assert process.poll() is None


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"server_url": "http://127.0.0.1:1"}, "neither the bus nor http://127.0.0.1:1 answers"),
        ({"server_public_key": public_key(new_seed())}, "another server than the one that it is registered with"),
        ({"server_url": ""}, "it was revoked or removed, or no scheduler is there"),
    ],
    ids=["nobody to ask", "another server", "no address"],
)
async def test_one_that_learns_nothing_for_certain_goes_on_trying(place: Place, changed: dict[str, str], said: str) -> None:
    await place.gateway.json("PUT", "/workers/w1/revoke", 204, json={})
    async with admitting(place.nats, {}):
        with place.worker(**changed) as process:
            await place.says(said)
            assert process.poll() is None
