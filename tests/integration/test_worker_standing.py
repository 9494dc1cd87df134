"""What a worker does that the bus does not admit (any more), on real servers: it finds out why, says so, and ends when it is no worker."""

import asyncio
import contextlib
import json
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from libs.bus.callout import Doorkeeper
from libs.runtime.service import GivenUp
from libs.tokens import new_seed, public_key, sign, signature_text
from penstock.client.joining import Membership, join, new_membership
from proto.events.worker import WorkerBooted, WorkerLost
from proto.messages import Offers
from services.gateway.bootstrap import Bootstrap
from services.worker.standing import Link, Watch
from tests.controls import eventually
from tests.gateway_fixture import Gateway, running_gateway, serving
from tests.nats_fixture import NatsServer, admitting
from tests.worker_controls import a_process

EXPELLED = 77


class Place:
    """A gateway, a bus whose door a test keeps by `keys`, and a worker that is registered."""

    def __init__(self, folder: Path, gateway: Gateway, nats: NatsServer, member: Membership) -> None:
        self.folder = folder
        self.gateway = gateway
        self.nats = nats
        self.member = member
        self.log = folder / "worker.log"

    def worker(self, **settings: str) -> "contextlib.AbstractContextManager[subprocess.Popen[bytes]]":
        """What `penstock worker start` becomes."""
        known = {
            "worker_name": self.member.name,
            "worker_key": self.member.key,
            "server_public_key": self.member.server_public_key,
            "gateway_public_key": self.member.gateway_public_key,
            "server_url": self.member.url,
            "worker_executors": "process",
        }
        return a_process(self.folder / "w", self.nats, **known | settings)

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


Body = dict[str, Any]


class OnTheWay:
    """Passes on what the worker asks of the gateway, and what it likes of the answer: `forge(what was asked, the answer)`."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self.forge: Callable[[Body, Body], Body | str] = lambda asked, told: told
        self.status = 0
        self.passed: list[Body] = []
        self.challenge: Body | None = None
        """To be shown in place of a new one."""

    def application(self) -> web.Application:
        app = web.Application()
        app.router.add_post("/api/v1/workers/{what}", self.handle)
        return app

    async def handle(self, request: web.Request) -> web.Response:
        what, asked = request.match_info["what"], await request.read()
        async with self.gateway.call("POST", f"/workers/{what}", token=None, data=asked) as answer:
            status, told = answer.status, await answer.json()
        if what == "challenge":
            return web.json_response(self.challenge or told)
        self.passed.append(told)
        forged = self.forge(json.loads(asked), told)
        return web.Response(text=forged if isinstance(forged, str) else json.dumps(forged), status=self.status or status)


@pytest.fixture
async def between(place: Place, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[OnTheWay, Watch]]:
    """Somebody between the gateway and a worker that the bus does not admit."""
    monkeypatch.setattr("services.worker.standing.LOOK", 0.01)
    monkeypatch.setattr("services.worker.standing.LONGEST", 0.02)
    member, somebody = place.member, OnTheWay(place.gateway)
    async with serving(somebody.application()) as url:
        link = Link(lambda: False, lambda: True)
        yield somebody, Watch(link, "w1", member.key, member.server_public_key, member.gateway_public_key, url, time.time)


async def test_one_that_could_believe_nothing_that_it_is_told_does_not_start(place: Place) -> None:
    with place.worker(gateway_public_key="") as process:
        assert await ended(process) == 2
    assert "PENSTOCK_GATEWAY_PUBLIC_KEY" in place.log.read_text().splitlines()[-1]


async def test_the_gateways_own_word_ends_a_worker_whoever_passes_it_on(place: Place, between: tuple[OnTheWay, Watch]) -> None:
    _, watch = between
    await place.gone()
    with pytest.raises(GivenUp, match="was removed"):
        await watch.run()


def _signed_by(seed: str, asked: Body, standing: str) -> Body:
    words = "\0".join((asked["question"], asked["name"], asked["key"], standing))
    return {"standing": standing, "signature": signature_text(sign(seed, "penstock-become", words.encode()).signature)}


@pytest.mark.parametrize(
    ("status", "forge"),
    [
        (200, lambda asked, told: {"standing": "revoked"}),
        (404, lambda asked, told: {"type": "urn:penstock:problem:worker-unknown"}),
        (200, lambda asked, told: {**told, "standing": "revoked"}),
        (404, lambda asked, told: {"type": "urn:penstock:problem:worker-unknown", "signature": told["signature"]}),
        (200, lambda asked, told: _signed_by(new_seed(), asked, "revoked")),
        (200, lambda asked, told: {"standing": "revoked", "signature": asked["signature"]}),
        (200, lambda asked, told: {"standing": "revoked", "signature": "\u00fc"}),
        (200, lambda asked, told: {"standing": "away"}),
        (502, lambda asked, told: "<html>"),
    ],
    ids=[
        "no signature",
        "an unsigned 404",
        "another word",
        "a word taken away",
        "another key",
        "its own",
        "no signature at all",
        "no word",
        "no JSON",
    ],
)
async def test_a_forged_word_ends_no_worker(between: tuple[OnTheWay, Watch], status: int, forge: Callable[[Body, Body], Body | str]) -> None:
    somebody, watch = between
    somebody.status, somebody.forge = status, forge
    await _goes_on(somebody, watch)


async def test_a_true_word_of_another_day_ends_no_worker(place: Place, between: tuple[OnTheWay, Watch]) -> None:
    """It was removed, and came back by another token. Whoever kept what the gateway said meanwhile says it again."""
    somebody, watch = between
    async with place.gateway.call("POST", "/workers/challenge", token=None) as answer:
        challenge = await answer.json()
    await place.gone()
    somebody.challenge = challenge
    with pytest.raises(GivenUp):
        await watch.run()
    await join(place.member, (await place.gateway.json("POST", "/workers/tokens", 201, json={}))["token"])
    kept = somebody.passed[-1]
    assert kept["signature"]
    somebody.forge = lambda asked, told: kept
    await _goes_on(somebody, watch)


async def _goes_on(somebody: OnTheWay, watch: Watch) -> None:
    asked, running = len(somebody.passed), asyncio.ensure_future(watch.run())
    try:
        await eventually(lambda: running.done() or len(somebody.passed) >= asked + 3)
        assert not running.done()
    finally:
        running.cancel()
        await asyncio.wait([running])
