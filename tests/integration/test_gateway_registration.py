"""How a worker is let in, over HTTP: FAULTS 85, 86 and the tokens' part of 79 to 84."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

import jwt
import pytest

from libs.tokens import new_seed, public_key, sign, sign_token, signature_bytes, signature_text, verify
from proto.catalogue import decode
from proto.events.fleet import RegistrationTokenIssued, RegistrationTokenUsed, WorkerDrained, WorkerRegistered, WorkerResumed, WorkerRevoked
from proto.events.worker import WorkerBooted, WorkerLost
from proto.messages import Offers, Signed
from tests.controls import eventually
from tests.gateway_fixture import SERVER_KEY, Gateway, running_gateway

SERVER = public_key(SERVER_KEY)


@pytest.fixture
async def gateway(database, nats_server) -> AsyncIterator[Gateway]:
    async with running_gateway(database, nats_server.url, worker_nats_url="tls://bus.example") as running:
        yield running


async def issued(gateway: Gateway, **more: Any) -> str:
    token: str = (await gateway.json("POST", "/workers/tokens", 201, json=more))["token"]
    return token


async def application(gateway: Gateway, token: str, name: str = "w1", seed: str | None = None, **changed: str) -> dict[str, str]:
    """What a worker sends; `changed` after it was signed."""
    seed = seed or new_seed()
    challenge = await gateway.json("POST", "/workers/challenge", 200, token=None)
    body = {"token": token, "name": name, "key": public_key(seed), "nonce": challenge["nonce"]}
    said = "\0".join((challenge["server"], challenge["nonce"], name, body["key"]))
    body["signature"] = signature_text(sign(seed, "penstock-register", said.encode()).signature)
    return {**body, **changed}


async def register(gateway: Gateway, body: dict[str, str]) -> tuple[int, Any]:
    async with gateway.call("POST", "/workers/register", token=None, json=body) as answer:
        return answer.status, await answer.json()


async def fleet(gateway: Gateway) -> list[Any]:
    return [decode(each.type, each.data) for each in await gateway.logs["scheduler"].read(0, 1000, {"fleet"})]


async def test_a_token_registers_one_worker_and_its_text_is_nowhere(gateway: Gateway) -> None:
    token = await issued(gateway, tags=["gpu"], description="rack", minutes=5)
    seed = new_seed()
    status, answer = await register(gateway, await application(gateway, token, seed=seed))
    gateway_key = public_key(gateway.artifacts.key)
    assert status == 201
    assert answer == {"worker": "w1", "server_public_key": SERVER, "gateway_public_key": gateway_key, "nats_url": "tls://bus.example"}
    issue, used, registered = await fleet(gateway)
    assert isinstance(issue, RegistrationTokenIssued) and 200 < issue.expires_at - time.time() <= 300
    assert used == RegistrationTokenUsed(worker="w1", key=public_key(seed))
    assert registered == WorkerRegistered(worker="w1", key=public_key(seed), tags=("gpu",), token_id=issue.token_id)
    recorded = await gateway.logs["scheduler"].read(0, 1000)
    assert not any(token.encode() in each.data or token[4:].encode() in each.data for each in recorded)
    shown = await gateway.json("GET", "/workers/w1", 200)
    assert "gpu" in str(shown["routes"])


async def test_the_same_worker_may_ask_again_and_nobody_else(gateway: Gateway) -> None:
    """FAULTS 85"""
    token, seed = await issued(gateway), new_seed()
    assert (await register(gateway, await application(gateway, token, seed=seed)))[0] == 201
    assert (await register(gateway, await application(gateway, token, seed=seed)))[0] == 201
    for again in (await application(gateway, token), await application(gateway, token, "w2", seed), await application(gateway, token, "w2")):
        assert (await register(gateway, again))[0] == 401
    assert len(await fleet(gateway)) == 3


async def test_of_many_who_race_with_one_token_one_wins(gateway: Gateway) -> None:
    """FAULTS 85"""
    token = await issued(gateway)
    bodies = [await application(gateway, token, f"w{n}") for n in range(8)]
    statuses = [status for status, _ in await asyncio.gather(*(register(gateway, body) for body in bodies))]
    assert sorted(statuses) == [201] + [401] * 7
    assert len([event for event in await fleet(gateway) if isinstance(event, WorkerRegistered)]) == 1


async def test_a_name_that_is_taken_costs_no_token(gateway: Gateway) -> None:
    assert (await register(gateway, await application(gateway, await issued(gateway))))[0] == 201
    token = await issued(gateway)
    status, answer = await register(gateway, await application(gateway, token))
    assert (status, answer["type"]) == (409, "urn:penstock:problem:conflict")
    assert (await register(gateway, await application(gateway, token, "w2")))[0] == 201


async def test_who_proves_nothing_is_told_nothing(gateway: Gateway) -> None:
    """FAULTS 83, 86: a challenge of another server or for another purpose, another signature, another name than was signed."""
    token = await issued(gateway)
    key = gateway.artifacts.key
    good = await application(gateway, token)
    other = sign_token(new_seed(), {"register": "x"}, 60, time.time())
    grant = sign_token(key, {"team": "main", "artifact": "", "action": "see"}, 60, time.time())
    late = sign_token(key, {"register": "x"}, -1, time.time())
    none = jwt.encode({"register": "x", "exp": int(time.time()) + 60}, "", algorithm="none")
    answers = [
        await register(gateway, body)
        for body in (
            {**good, "signature": "A" * 86},
            {**good, "name": "w2"},
            {**good, "key": public_key(new_seed())},
            {**good, "nonce": other},
            {**good, "nonce": grant},
            {**good, "nonce": late},
            {**good, "nonce": none},
            await application(gateway, "pwt_" + "a" * 43),
            await application(gateway, ""),
        )
    ]
    assert {status for status, _ in answers} == {401}
    assert len({str(answer) for _, answer in answers}) == 1
    assert [type(event) for event in await fleet(gateway)] == [RegistrationTokenIssued]
    for name in ("a.b", "*", "", "a b", "w\n", "x" * 65):
        assert (await register(gateway, {**good, "name": name}))[0] == 422
    assert (await register(gateway, good))[0] == 201


async def test_the_nonce_is_signed_for_this_server_only(gateway: Gateway) -> None:
    """FAULTS 86: a worker that was shown another server's name signs that one."""
    token, seed = await issued(gateway), new_seed()
    body = await application(gateway, token, seed=seed)
    said = "\0".join((public_key(new_seed()), body["nonce"], "w1", body["key"]))
    body["signature"] = signature_text(sign(seed, "penstock-register", said.encode()).signature)
    assert (await register(gateway, body))[0] == 401


async def test_who_asks_too_often_waits(gateway: Gateway) -> None:
    async def ask() -> tuple[int, str]:
        async with gateway.call("POST", "/workers/challenge", token=None) as answer:
            return answer.status, answer.headers.get("Retry-After", "")

    answers = await asyncio.gather(*(ask() for _ in range(60)))
    assert {status for status, _ in answers} == {200, 429}
    assert all(after == "1" for status, after in answers if status == 429)


async def test_only_owners_of_the_first_team_decide_about_workers(gateway: Gateway) -> None:
    await register(gateway, await application(gateway, await issued(gateway)))
    member, other = await gateway.token("main", "member"), await gateway.token("other")
    for token in (member, other):
        for method, path in (
            ("POST", "/workers/tokens"),
            ("PUT", "/workers/w1/drain"),
            ("PUT", "/workers/w1/resume"),
            ("PUT", "/workers/w1/revoke"),
            ("DELETE", "/workers/w1"),
        ):
            await gateway.json(method, path, 403, token=token, json={})
    assert len(await fleet(gateway)) == 3


async def test_a_worker_is_drained_resumed_revoked_and_deleted(gateway: Gateway) -> None:
    await register(gateway, await application(gateway, await issued(gateway)))

    async def change(verb: str, **body: str) -> object:
        await gateway.json("PUT", f"/workers/w1/{verb}", 204, json=body)
        return (await fleet(gateway))[-1]

    assert await change("drain", reason="a disk") == WorkerDrained(reason="a disk")
    assert await change("resume") == WorkerResumed()
    assert await change("revoke", reason="stolen") == WorkerRevoked(reason="stolen")
    assert (await gateway.json("GET", "/workers/w1", 200))["status"] == "revoked"
    await gateway.json("PUT", "/workers/w1/drain", 409, json={})
    await gateway.json("DELETE", "/workers/w1", 204)
    await gateway.json("GET", "/workers/w1", 404)
    await gateway.json("DELETE", "/workers/w1", 404)
    await gateway.json("PUT", "/workers/nobody/drain", 404, json={})
    await gateway.json("PUT", "/workers/w1/drain", 422, json={"why": "x"})


async def test_a_worker_that_lives_is_not_deleted_and_one_that_is_lost_is(gateway: Gateway) -> None:
    await register(gateway, await application(gateway, await issued(gateway)))
    await gateway.record("worker-w1-b1", WorkerBooted(worker="w1", boot="b1", since=1, slots=1, offers=Offers()))

    async def slots() -> bool:
        return bool((await gateway.json("GET", "/workers/w1", 200))["build_limit"] == 1)

    await eventually(slots)
    assert await _deleted(gateway, 409)
    await gateway.record("worker-w1-b1", WorkerLost(worker="w1", boot="b1", reason="silent"))
    await eventually(lambda: _deleted(gateway, 204))


async def test_a_key_that_was_revoked_registers_no_more_under_no_name_and_one_that_was_only_removed_does(gateway: Gateway) -> None:
    seed, other = new_seed(), new_seed()

    async def again(name: str, seed: str) -> tuple[int, str]:
        status, answer = await register(gateway, await application(gateway, await issued(gateway), name, seed))
        return status, answer.get("detail", "")

    assert (await again("w1", seed))[0] == (await again("w2", other))[0] == 201
    for name in ("w1", "w2"):
        await gateway.record(f"worker-{name}-b", WorkerBooted(worker=name, boot="b", since=1, slots=1, offers=Offers()))
        await gateway.record(f"worker-{name}-b", WorkerLost(worker=name, boot="b", reason="silent"))
    await gateway.json("PUT", "/workers/w1/revoke", 204, json={})
    assert await again("w3", seed) == (409, "this key was revoked")
    await eventually(lambda: _deleted(gateway, 204, "w2"))
    await gateway.json("DELETE", "/workers/w1", 204)
    assert await again("w1", seed) == (409, "this key was revoked")
    assert await again("w3", seed) == (409, "this key was revoked")
    assert (await again("w2", other))[0] == (await again("w1", new_seed()))[0] == 201
    assert await again("w4", seed) == (409, "this key was revoked"), "also when another has its name"


async def standing(gateway: Gateway, name: str, seed: str, context: str = "penstock-standing", /, **changed: str) -> tuple[int, Any]:
    challenge = await gateway.json("POST", "/workers/challenge", 200, token=None)
    question = secrets.token_urlsafe(16)
    said = "\0".join((challenge["server"], challenge["nonce"], name, public_key(seed), question))
    signature = signature_text(sign(seed, context, said.encode()).signature)
    body = {"name": name, "key": public_key(seed), "nonce": challenge["nonce"], "question": question, "signature": signature}
    async with gateway.call("POST", "/workers/standing", token=None, json={**body, **changed}) as answer:
        told = await answer.json()
    if signature := told.get("signature"):
        words = "\0".join((question, name, public_key(seed), told.get("standing", "unknown")))
        verify(public_key(gateway.artifacts.key), "penstock-become", Signed(words.encode(), signature_bytes(signature)))
    assert bool(signature) == (answer.status in (200, 404))
    return answer.status, told.get("standing", "")


async def test_a_worker_and_nobody_else_is_told_what_has_become_of_it(gateway: Gateway) -> None:
    seed, other = new_seed(), new_seed()
    assert await standing(gateway, "w1", seed) == (404, "")
    await register(gateway, await application(gateway, await issued(gateway), seed=seed))
    assert await standing(gateway, "w1", seed) == (200, "registered")
    assert await standing(gateway, "w1", other) == await standing(gateway, "w2", seed) == (404, "")
    for forged in ({"signature": "A" * 86}, {"name": "w2"}, {"key": public_key(other)}, {"nonce": "x"}, {"question": "x" * 16}):
        assert await standing(gateway, "w1", seed, **forged) == (401, "")
    assert await standing(gateway, "w1", seed, "penstock-register") == (401, "")
    await gateway.json("PUT", "/workers/w1/revoke", 204, json={})
    assert await standing(gateway, "w1", seed) == (200, "revoked")
    await gateway.json("DELETE", "/workers/w1", 204)
    assert await standing(gateway, "w1", seed) == (200, "revoked")


async def test_behind_a_proxy_of_ours_each_client_has_a_rate_of_its_own_and_cannot_choose_whose(database, nats_server) -> None:
    async with running_gateway(database, nats_server.url, trusted_proxies="127.0.0.0/8,10.0.0.0/8") as proxied:

        async def statuses(*forwarded: str) -> set[int]:
            async def ask(number: int) -> int:
                headers = {"X-Forwarded-For": ", ".join(forwarded).format(number)}
                async with proxied.call("POST", "/workers/challenge", token=None, headers=headers) as answer:
                    return answer.status

            return set(await asyncio.gather(*(ask(number) for number in range(60))))

        assert await statuses("198.51.100.{}") == {200}
        assert await statuses("198.51.100.{}", "203.0.113.5", "10.0.0.7") == {200, 429}, "what it says of itself does not count"
        assert await statuses("203.0.113.6") == {200, 429}
    async with running_gateway(database, nats_server.url) as plain:
        proxied = plain
        assert await statuses("198.51.100.{}") == {200, 429}, "nobody is believed unless it is said"


async def _deleted(gateway: Gateway, status: int, name: str = "w1") -> bool:
    async with gateway.call("DELETE", f"/workers/{name}") as answer:
        return bool(answer.status == status)
