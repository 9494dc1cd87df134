"""Secrets from the HTTP API into the scheduler's table and from there to packages; the log and the read models never see a value."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import msgspec
import pytest

from libs.bus.jetstream import connect_jetstream
from libs.eventlog.log import NewEvent
from libs.runtime.http import Problem
from libs.tokens import new_seed
from proto.catalogue import UnknownEvent, decode
from proto.envelope import UnreadableEvent
from proto.events.build import BuildCreated, BuildFinished
from proto.events.secret import SealingKeyMade
from proto.plan import Plan
from services.gateway.projection import SealingKeyRow
from services.gateway.secrets import SecretKeeper
from services.scheduler.commands import secret_stream
from services.scheduler.master_keys import BadKeys, Keyring
from services.scheduler.secret_index import Entry
from tests.controls import eventually, write
from tests.gateway_fixture import Gateway, running_gateway
from tests.nats_fixture import SEEDS
from tests.secrets_fixture import Keeper, keeping_secrets

VALUE = "hunter2-and-more"
FIRST = f"k1:{new_seed()}"


@pytest.fixture
async def keeper(database: Any, nats_server: Any) -> AsyncIterator[Keeper]:
    async with keeping_secrets(database, nats_server.url, FIRST) as keeper:
        yield keeper


@pytest.fixture
async def gateway(database: Any, nats_server: Any, keeper: Keeper) -> AsyncIterator[Gateway]:
    async with running_gateway(database, nats_server.url) as gateway:
        yield gateway


def plan(params: dict[str, str], **config: Any) -> dict[str, Any]:
    task = {"run": {"path": "true"}, "params": params, **config}
    return {"stages": [{"name": "main", "steps": [{"step": "run", "name": "run", "config": task}]}]}


def read(plan: dict[str, Any]) -> Plan:
    return msgspec.convert(plan, Plan)


async def put(gateway: Gateway, name: str, value: str, status: int = 200, **more: Any) -> Any:
    return await gateway.json("PUT", f"/teams/main/secrets/{name}", status, json={"value": value}, **more)


async def everything(database: Any) -> str:
    """All rows of all tables but the one of ciphertexts, as text; with it, as the database keeps them."""
    connection = await asyncpg.connect(database.url("postgres"))
    try:
        tables = await connection.fetch("SELECT schemaname, tablename FROM pg_tables WHERE schemaname NOT IN ('pg_catalog', 'information_schema')")
        assert {"event", "builds", "secrets", "secret"} <= {row["tablename"] for row in tables}
        texts = []
        for schema, table in tables:
            texts += [str(row[0]) for row in await connection.fetch(f'SELECT t::text FROM "{schema}"."{table}" t')]
        return "\n".join(texts)
    finally:
        await connection.close()


async def test_a_secret_is_set_listed_by_name_and_given_to_packages_and_never_shown(gateway: Gateway, keeper: Keeper, database: Any) -> None:
    first = await put(gateway, "npm_token", "the first value")
    assert (first["name"], first["version"]) == ("npm_token", 1)
    second = await put(gateway, "npm_token", VALUE)
    assert (second["version"], second["set_by"]) == (2, first["set_by"])
    await put(gateway, "other", "x")
    listed = await gateway.json("GET", "/teams/main/secrets?limit=1", 200)
    assert (listed["items"], listed["next"]) == ([second], "npm_token")
    assert [item["name"] for item in (await gateway.json("GET", "/teams/main/secrets?cursor=npm_token", 200))["items"]] == ["other"]
    wanted = plan({"A": "((npm_token))", "B": "x((other))((npm_token))y", "C": "$((1 + 2))"})
    given = await keeper.given(read(wanted))
    assert given.values == {"npm_token": VALUE, "other": "x"} and not given.unreadable
    assert keeper.board.secrets.wanted("main", "b1", read(wanted).stages[0]).versions == {"npm_token": 2, "other": 1}
    assert VALUE not in repr(given)
    assert (await gateway.submit(wanted))["status"] == "pending"
    found = await everything(database)
    assert VALUE not in found and VALUE.encode().hex() not in found


async def test_a_removed_secret_is_gone_with_every_value_it_had_and_a_step_is_told_its_name(gateway: Gateway, keeper: Keeper) -> None:
    for value in ("one", "two"):
        await put(gateway, "s", value)
    await gateway.json("DELETE", "/teams/main/secrets/s", 204)
    await gateway.json("DELETE", "/teams/main/secrets/s", 404)
    assert await keeper.rows() == []
    assert (await keeper.given(read(plan({"A": "((s))"})))).unreadable == {"s": "is not set"}
    assert (await put(gateway, "s", "three"))["version"] == 3
    await keeper.vault.drop([(await keeper.rows())[0]["entry"]])
    assert (await keeper.given(read(plan({"A": "((s))"})))).unreadable == {"s": "is not there any more"}


@pytest.mark.parametrize(
    ("params", "config", "place"),
    [
        ({"A": "x((nowhere))"}, {}, "plan.stages[0].steps[0].config.params.A"),
        ({"A": "((build/b1/1))"}, {}, "plan.stages[0].steps[0].config.params.A"),
        (
            {},
            {"image_resource": {"type": "registry-image", "source": {"repository": "a", "login": ["((nowhere))"]}}},
            "image_resource.source.login.0",
        ),
        ({}, {"image_resource": {"type": "custom", "source": {"repository": "x/((known))"}}}, "image_resource.source.repository"),
        ({}, {"rootfs_uri": "docker:///((known))"}, "rootfs_uri"),
    ],
)
async def test_a_reference_to_nothing_or_in_a_name_is_refused_naming_the_place(gateway: Gateway, params: Any, config: Any, place: str) -> None:
    """FAULTS 39."""
    await put(gateway, "known", "value")
    refused = await gateway.submit(plan(params, **config), 422)
    assert refused["path"].endswith(place), refused
    named = plan({})
    named["stages"][0]["name"] = "((known))"
    await gateway.submit(named, 422)


@pytest.mark.parametrize(
    ("name", "value", "status"), [("a b", "x", 422), ("-a", "x", 422), ("a", "", 422), ("a", "x" * 65_537, 422), ("a", "\0", 400)]
)
async def test_what_cannot_be_a_secret_is_refused_without_repeating_it(gateway: Gateway, name: str, value: str, status: int) -> None:
    refused = await put(gateway, name, value, status)
    assert not value or value == "x" or value not in json.dumps(refused)
    async with gateway.call("PUT", "/teams/main/secrets/a", data=b'{"value": "hunter2", "value": 1}') as answer:
        assert answer.status == 400 and b"hunter2" not in await answer.read()


async def test_only_owners_change_secrets_and_only_members_see_their_names(gateway: Gateway) -> None:
    member, viewer = await gateway.token("main", "member"), await gateway.token("main", "viewer")
    await put(gateway, "a", "value", 403, token=member)
    await gateway.json("DELETE", "/teams/main/secrets/a", 403, token=member)
    await gateway.json("GET", "/teams/main/secrets", 200, token=member)
    await gateway.json("GET", "/teams/main/secrets", 403, token=viewer)


async def test_a_team_has_its_own_secrets(gateway: Gateway, keeper: Keeper) -> None:
    other = await gateway.token("other")
    await put(gateway, "s", "of main")
    refused = await gateway.submit(plan({"A": "((s))"}), 422, team="other", token=other)
    assert "no secret `s`" in refused["detail"]
    assert (await keeper.given(read(plan({"A": "((s))"})), team="other")).unreadable == {"s": "is not set"}


async def test_values_under_names_that_look_secret_are_kept_for_the_build_without_being_asked(
    gateway: Gateway, keeper: Keeper, database: Any
) -> None:
    await put(gateway, "db", "word")
    source = {"repository": "a/b", "username": "me", "password": 12345, "aws": {"secret_access_key": "AKIA-nested", "region": "eu"}}
    wanted = plan(
        {"NPM_TOKEN": VALUE, "DB_PASSWORD": "pre-((db))-post", "PLAIN": "plain", "api_key": "", "CLIENT_ID": "client-77"},
        image_resource={"type": "registry-image", "source": source},
    )
    build = await gateway.submit(wanted)
    rows = {row["name"]: row["build"] for row in await keeper.rows() if row["build"]}
    assert set(rows.values()) == {build["id"]} and len(rows) == 6
    ((_, recorded),) = [
        (row.type, json.loads(row.data)) for row in await gateway.logs["scheduler"].read(0, 1000, {"request"}) if row.type == "build.requested"
    ]
    config = recorded["plan"]["stages"][0]["steps"][0]["config"]
    assert config["params"]["PLAIN"] == "plain" and config["params"]["api_key"] == ""
    assert config["params"]["DB_PASSWORD"].count("((") == 3 and "((db))" in config["params"]["DB_PASSWORD"]
    assert config["image_resource"]["source"]["username"] == "me"
    text = json.dumps(recorded) + await everything(database)
    for value in (VALUE, "pre-", "-post", "client-77", "12345", "AKIA-nested"):
        assert value not in text.replace(build["id"], ""), value
    given = await keeper.given(msgspec.convert(recorded["plan"], Plan), build["id"])
    assert set(given.values.values()) == {VALUE, "pre-", "word", "-post", "client-77", "12345", "AKIA-nested"}
    assert (await keeper.given(msgspec.convert(recorded["plan"], Plan), "another")).values.keys() == {"db"}


async def test_a_repeat_keeps_nothing_twice_and_the_log_has_no_digest_to_guess_by(gateway: Gateway, keeper: Keeper) -> None:
    body = json.dumps({"plan": plan({"PASSWORD": "pin-0815"})}).encode()
    headers = {"Idempotency-Key": "k"}
    first, second = [await gateway.json("POST", "/teams/main/builds", 202, data=body, headers=headers) for _ in range(2)]
    assert first["id"] == second["id"]
    assert len(await keeper.rows()) == 1
    conflict = json.dumps({"plan": plan({"PASSWORD": "pin-0816"})}).encode()
    await gateway.json("POST", "/teams/main/builds", 409, data=conflict, headers=headers)
    assert len(await keeper.rows()) == 1
    import hashlib

    logged = b"".join(row.data for row in await gateway.logs["scheduler"].read(0, 1000, {"request"}))
    assert hashlib.sha256(body).hexdigest().encode() not in logged and b"body_mac" in logged


async def test_what_was_kept_for_a_build_goes_with_it(gateway: Gateway, keeper: Keeper) -> None:
    build = await gateway.submit(plan({"TOKEN": VALUE}))
    tidying = asyncio.create_task(keeper.secrets.tidy())
    try:
        assert len(await keeper.rows()) == 1
        await gateway.record(f"build-{build['id']}", BuildCreated(plan=read(plan({}))), BuildFinished(status="succeeded"))
        await keeper.read()
        await eventually(lambda: _empty(keeper))
    finally:
        tidying.cancel()


async def _empty(keeper: Keeper) -> bool:
    return await keeper.rows() == []


async def test_an_event_that_cannot_be_read_ends_no_housekeeping(gateway: Gateway, keeper: Keeper, monkeypatch: Any) -> None:
    """A scheduler of the version before would otherwise die at each sweep, while it is being replaced."""
    sweeps = 0

    async def sweep(_: float) -> None:
        nonlocal sweeps
        sweeps += 1
        [recorded] = await gateway.logs["builds"].read(0, 1)
        raise UnreadableEvent(recorded, UnknownEvent(recorded.type))

    monkeypatch.setattr("services.scheduler.secrets.SWEEP_EVERY", -1.0)
    monkeypatch.setattr("services.scheduler.secrets.LOOK_EVERY", 0.01)
    monkeypatch.setattr(keeper.secrets, "sweep", sweep)
    tidying = asyncio.create_task(keeper.secrets.tidy())
    try:
        await eventually(lambda: tidying.done() or sweeps > 1)
        assert not tidying.done()
    finally:
        tidying.cancel()


async def test_the_sweep_drops_what_nothing_tells_of_and_nothing_else(gateway: Gateway, keeper: Keeper) -> None:
    await put(gateway, "a", "old")
    await put(gateway, "a", "new")
    unfinished, over = [await gateway.submit(plan({"TOKEN": "value"})) for _ in range(2)]
    await gateway.record(f"build-{over['id']}", BuildCreated(plan=read(plan({}))), BuildFinished(status="failed"))
    await keeper.vault.store({Entry("never-told", "main", "b"): "x", Entry("build/none/1", "main", "build/none/1", "none"): "y"})
    await keeper.log.pool.execute("UPDATE secret SET stored_at = stored_at - interval '2 hours'")
    assert len(await keeper.rows()) == 6
    await keeper.secrets.sweep(3600.0)
    left = {row["name"] for row in await keeper.rows()}
    assert left == {"a", f"build/{unfinished['id']}/1", "build/none/1"}
    await keeper.log.pool.execute("UPDATE secret SET stored_at = stored_at - interval '2 days'")
    await keeper.secrets.sweep(3600.0)
    assert {row["name"] for row in await keeper.rows()} == {"a"}
    assert (await keeper.given(read(plan({"A": "((a))"})))).values == {"a": "new"}


@pytest.mark.parametrize("bad", ["secret.of_tomorrow", "secret.set"])
async def test_a_bad_event_keeps_what_it_is_about_and_the_sweep_goes_on(gateway: Gateway, keeper: Keeper, bad: str) -> None:
    for value in ("old", "new"):
        for name in ("a", "b"):
            await put(gateway, name, value)
    await keeper.log.append([write(secret_stream("main", "a"), NewEvent("bad", bad, b'{"version":"x"}'))])
    await keeper.log.pool.execute("UPDATE secret SET stored_at = stored_at - interval '2 hours'")
    await keeper.secrets.sweep(3600.0)
    assert sorted(row["name"] for row in await keeper.rows()) == ["a", "a", "b"]


async def test_a_master_key_that_goes_while_values_are_encrypted_anew_ends_nothing(gateway: Gateway, keeper: Keeper, monkeypatch: Any) -> None:
    await put(gateway, "a", VALUE)
    second = f"k2:{new_seed()}"
    keeper.vault.keys = Keyring(f"{second},{FIRST}")
    renew = keeper.vault._renew

    async def gone(rows: Any) -> int:
        keeper.vault.keys = Keyring(second)
        return await renew(rows)

    monkeypatch.setattr(keeper.vault, "_renew", gone)
    assert await keeper.vault.rotate() == (0, {"k1": 1})


async def test_another_first_key_encrypts_everything_anew_and_a_missing_one_is_named(gateway: Gateway, keeper: Keeper) -> None:
    await put(gateway, "a", VALUE)
    await keeper.secrets.mind_keys()
    before = await keeper.rows()
    second = f"k2:{new_seed()}"
    keeper.keys = Keyring(f"{second},{FIRST}")
    await keeper.secrets.mind_keys()
    after = await keeper.rows()
    assert [row["key_id"] for row in before + after] == ["k1", "k2"] and before[0]["ciphertext"] != after[0]["ciphertext"]
    assert keeper.secrets.problem is None
    keeper.keys = Keyring(second)
    await keeper.secrets.mind_keys()
    assert (await keeper.given(read(plan({"A": "((a))"})))).values == {"a": VALUE}
    keeper.keys = Keyring(FIRST)
    await keeper.secrets.mind_keys()
    assert keeper.secrets.problem == "the master key `k2` is missing: 1 values cannot be read"
    why = (await keeper.given(read(plan({"A": "((a))"})))).unreadable["a"]
    assert why == "cannot be read: the scheduler was not given the master key `k2`"


def gateway_that_knows(bus: Any, *keys: SealingKeyRow) -> SecretKeeper:
    """What it knows of the key to seal to, each time that it looks; the last one ever after."""
    known = list(keys)

    async def key() -> SealingKeyRow:
        return known.pop(0) if len(known) > 1 else known[0]

    return SecretKeeper(bus, key)


async def sealing_keys(keeper: Keeper) -> list[SealingKeyRow]:
    """All that were announced."""
    made = [decode(row.type, row.data) for row in await keeper.log.read(0, 1000, {"secret"}) if row.type == "sealing.key_made"]
    return [SealingKeyRow(id="", version=event.version, entry=event.entry, key=event.key) for event in made if isinstance(event, SealingKeyMade)]


async def grown_old(keeper: Keeper) -> None:
    """What was stored so far is two hours old."""
    await keeper.log.pool.execute("UPDATE secret SET stored_at = stored_at - interval '2 hours'")


async def test_what_is_sealed_to_changes_with_age_and_what_was_on_its_way_arrives(
    gateway: Gateway, keeper: Keeper, nats_server: Any, database: Any
) -> None:
    await put(gateway, "a", VALUE)
    await keeper.secrets.mind_keys()
    (old,) = await sealing_keys(keeper)
    keeper.late = 31 * 86_400.0
    await keeper.read()
    await keeper.secrets.mind_keys()
    keeper.late = 0.0
    await keeper.read()
    await keeper.secrets.mind_keys()
    _, new = await sealing_keys(keeper)
    assert (old.version, new.version) == (1, 2) and old.key != new.key
    await put(gateway, "a", "sealed to the new one")
    async with connect_jetstream(nats_server.url, SEEDS["gateway"], "gateway") as bus:
        await gateway_that_knows(bus, old).set("main", "b", "sealed to the old one", "me")
        await keeper.secrets.sweep(0.0)
        assert await keeper.sealing_keys() == [old.entry, new.entry]
        await grown_old(keeper)
        await keeper.secrets.sweep(3600.0)
        assert await keeper.sealing_keys() == [new.entry]
        with pytest.raises(Problem, match="not sealed to a key"):  # nothing opens it any more, whoever recorded it
            await gateway_that_knows(bus, old).set("main", "b", "too late", "me")
        assert (await gateway_that_knows(bus, old, new).set("main", "b", "slept, and looked again", "me")).version == 2
        with pytest.raises(Problem, match="not sealed to a key"):
            await gateway_that_knows(bus, msgspec.structs.replace(new, entry=(await keeper.rows())[0]["entry"])).set("main", "b", "x", "me")
    given = await keeper.given(read(plan({"A": "((a))((b))"})))
    assert given.values == {"a": "sealed to the new one", "b": "slept, and looked again"}
    (private,) = (await keeper.vault.read([Entry(new.entry, "", "sealing-key")])).values()
    assert isinstance(private, str) and private not in await everything(database)


async def test_a_scheduler_that_is_started_again_opens_what_was_sealed_for_the_one_before(database: Any, nats_server: Any) -> None:
    async with running_gateway(database, nats_server.url) as gateway:
        async with keeping_secrets(database, nats_server.url, FIRST) as keeper:
            await put(gateway, "a", "one")
        await put(gateway, "a", "nobody is there", 503)
        async with keeping_secrets(database, nats_server.url, FIRST) as keeper:
            assert len(await sealing_keys(keeper)) == 1
            await put(gateway, "a", "two")


async def test_of_two_schedulers_one_makes_the_new_key_and_each_opens_what_is_sealed_to_it(database: Any, nats_server: Any) -> None:
    async with (
        running_gateway(database, nats_server.url) as gateway,
        keeping_secrets(database, nats_server.url, FIRST) as one,
        keeping_secrets(database, nats_server.url, FIRST) as other,
    ):
        one.late = other.late = 31 * 86_400.0
        await asyncio.gather(one.secrets.mind_keys(), other.secrets.mind_keys())  # both believe that they lead
        made = await sealing_keys(one)
        assert [key.version for key in made] == [1, 2]
        async with connect_jetstream(nats_server.url, SEEDS["gateway"], "gateway") as bus:
            for n in range(20):  # any of them answers, though neither has read of the key
                await gateway_that_knows(bus, made[n % 2]).set("main", f"s{n}", "value", "me")
        await grown_old(one)
        await one.read()
        await one.secrets.sweep(3600.0)
        assert await one.sealing_keys() == [made[1].entry], "what the one that was later had made is nobody's"
        await put(gateway, "a", VALUE)


async def test_a_new_first_master_key_brings_a_new_sealing_key_and_no_scheduler_lacks_it_that_has_the_file(database: Any, nats_server: Any) -> None:
    async with (
        running_gateway(database, nats_server.url) as gateway,
        keeping_secrets(database, nats_server.url, FIRST) as one,
        keeping_secrets(database, nats_server.url, FIRST) as other,
    ):
        await put(gateway, "a", VALUE)
        one.keys = other.keys = Keyring(f"k2:{new_seed()},{FIRST}")
        await one.secrets.mind_keys()
        assert [key.version for key in await sealing_keys(one)] == [1, 2]
        assert {row["key_id"] for row in await one.rows()} == {"k2"}
        # The other has not looked at the file since, and is asked for what is under the new key.
        assert (await other.given(read(plan({"A": "((a))"})))).values == {"a": VALUE}
        await one.secrets.mind_keys()
        await one.read()
        await one.secrets.mind_keys()
        assert len(await sealing_keys(one)) == 2


async def test_keys_are_renewed_for_an_owner_of_the_first_team(gateway: Gateway, keeper: Keeper) -> None:
    await put(gateway, "a", VALUE)
    assert await gateway.json("POST", "/secret-keys", 200) == {"sealing_version": 2, "master_key": "k1", "values": {"k1": 1}}
    second = f"k2:{new_seed()}"
    keeper.keys = Keyring(f"{second},{FIRST}")
    assert await gateway.json("POST", "/secret-keys", 200) == {"sealing_version": 3, "master_key": "k2", "values": {"k1": 1}}
    await keeper.secrets.mind_keys()
    assert (await gateway.json("POST", "/secret-keys", 200))["values"] == {"k2": 1}
    await put(gateway, "a", "another")
    await gateway.json("POST", "/secret-keys", 403, token=await gateway.token("main", "member"))
    await gateway.json("POST", "/secret-keys", 403, token=await gateway.token("other", "owner"))


async def test_master_keys_that_cannot_be_read_are_told_of_until_they_can(gateway: Gateway, keeper: Keeper, monkeypatch: Any) -> None:
    def unreadable() -> Keyring:
        raise FileNotFoundError(2, "No such file or directory", "keys")

    await keeper.secrets.mind_keys()
    with monkeypatch.context() as patched:
        patched.setattr(keeper.vault, "_source", unreadable)
        await keeper.secrets.mind_keys()
        assert keeper.secrets.problem is not None and "cannot be read" in keeper.secrets.problem
        await put(gateway, "a", VALUE)  # those it knows are good still
        assert "cannot be read" in (await gateway.json("POST", "/secret-keys", 503))["detail"]
    await keeper.secrets.mind_keys()
    assert keeper.secrets.problem is None


async def test_a_ciphertext_counts_only_for_what_it_was_made_for(gateway: Gateway, keeper: Keeper) -> None:
    await put(gateway, "a", "of a")
    await put(gateway, "b", "of b")
    await keeper.log.pool.execute("UPDATE secret SET ciphertext = (SELECT ciphertext FROM secret WHERE name = 'a') WHERE name = 'b'")
    given = await keeper.given(read(plan({"A": "((a))((b))"})))
    assert given.values == {"a": "of a"} and "changed" in given.unreadable["b"]


async def test_without_a_scheduler_nothing_is_taken(database: Any, nats_server: Any) -> None:
    async with running_gateway(database, nats_server.url) as gateway:
        await put(gateway, "a", VALUE, 503)
        refused = await gateway.submit(plan({"TOKEN": VALUE}), 503)
        assert VALUE not in json.dumps(refused)
        await gateway.submit(plan({"PLAIN": VALUE}))


@pytest.mark.parametrize("text", ["", "k1", "k1:short", "{first},{first}", "a b:{key}", "{key}:k1"])
def test_what_is_no_list_of_master_keys_is_refused_without_repeating_it(text: str) -> None:
    key = FIRST.partition(":")[2]
    with pytest.raises(BadKeys) as refused:
        Keyring(text.format(first=FIRST, key=key))
    assert key not in str(refused.value)
