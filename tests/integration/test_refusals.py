"""Whoever shows no right to what it asks (FAULTS 79–89): refused, told nothing that says which check failed, noted in the log with who and why, and
counted by the reason."""

import hashlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import AsyncMock

import jwt
import msgspec
import pytest
from nacl.public import PublicKey, SealedBox
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from libs.bus.jetstream import connect_jetstream
from libs.eventlog.postgres import PostgresLog, open_postgres_log
from libs.proofs import NOTHING, proof_headers
from libs.tokens import new_seed, public_key, sign, sign_token, signature_text
from proto.events.build import StageFinished
from proto.messages import Attempt, Package
from proto.plan import Stage
from services.artifacts.routes import application
from tests.artifacts_fixture import BLOBS, SERVER_KEY, TREE, WORKER_KEY, Api, blob_stream, manifest
from tests.artifacts_fixture import serving as serving_artifacts
from tests.controls import eventually, write
from tests.gateway_fixture import TOKEN, Gateway, running_gateway
from tests.nats_fixture import NatsServer, admitting
from tests.postgres_fixture import Database
from tests.worker_controls import SERVER, Running, Scheduler, a_system, sh

FILES = {"a": b"alpha"}
INPUT = "/inputs/src"
Said = tuple[int, bytes]


class Scene(NamedTuple):
    gateway: Gateway
    api: Api
    log: PostgresLog
    scheduler: Scheduler
    worker: Running
    nats: NatsServer
    door: CollectorRegistry
    digest: str
    artifact: str

    # --- artifacts, as a worker asks

    def token(self, build: str = "b1", **claims: Any) -> str:
        return self.api.build(build, inputs={"src": self.digest}, **claims)["Authorization"].removeprefix("Bearer ")

    async def ask(self, token: str, seed: str = WORKER_KEY, path: str = INPUT, at: float = 0, asked: str = "", **headers: str) -> Said:
        """`path` is what is signed, `asked` what is asked for."""
        answer = await self.api.ask("GET", asked or path, proof_headers(seed, token, "GET", path, NOTHING, time.time() + at) | headers)
        return answer.status, answer.body

    def forged(self, algorithm: str) -> str:
        claims = {"team": "main", "build": "b1", "stage": "s", "attempt": 1, "worker": "w1", "key": public_key(WORKER_KEY), "outputs": []}
        claims |= {"inputs": {"src": self.digest}, "exp": int(time.time()) + 60}
        return jwt.encode(claims, "" if algorithm == "none" else public_key(SERVER_KEY), algorithm=algorithm)

    async def other_body(self) -> Said:
        body = manifest({"empty": b""})
        headers = proof_headers(WORKER_KEY, self.token(), "POST", "/outputs/step/out", hashlib.sha256(body).hexdigest(), time.time())
        answer = await self.api.ask("POST", "/outputs/step/out", headers | {"Content-Type": TREE}, data=manifest({"forged": b""}))
        return answer.status, answer.body

    async def after_the_end(self) -> Said:
        return await self.ask(self.token("over"))

    async def grant(self, action: str, artifact: str = "", seconds: float = 60) -> Said:
        answer = await self.api.ask("GET", f"/artifacts/{self.artifact}", self.api.grant(artifact or self.artifact, action, seconds=seconds))
        return answer.status, answer.body

    # --- the gateway, as a worker asks

    async def apply(self, name: str = "w1", server: str = "", context: str = "penstock-register", spent: bool = False, **changed: str) -> Said:
        gateway, seed = self.gateway, new_seed()
        token = (await gateway.json("POST", "/workers/tokens", 201, json={}))["token"]
        challenge = await gateway.json("POST", "/workers/challenge", 200, token=None)

        async def send(name: str, **changed: str) -> Said:
            said = "\0".join((server or challenge["server"], challenge["nonce"], name, public_key(seed)))
            signature = signature_text(sign(seed, context, said.encode()).signature)
            body = {"token": token, "name": name, "key": public_key(seed), "nonce": challenge["nonce"], "signature": signature}
            async with gateway.call("POST", "/workers/register", token=None, json={**body, **changed}) as answer:
                return answer.status, await answer.read()

        if spent:
            assert (await send("first"))[0] == 201
        return await send(name, **changed)

    def challenge(self, algorithm: str = "EdDSA", seconds: float = 60, seed: str = "") -> str:
        if algorithm == "EdDSA":
            return sign_token(seed or self.gateway.artifacts.key, {"register": "x"}, seconds, time.time())
        key = "" if algorithm == "none" else public_key(self.gateway.artifacts.key)
        return jwt.encode({"register": "x", "exp": int(time.time()) + 60}, key, algorithm=algorithm)

    async def as_somebody(self, token: str | None) -> Said:
        async with self.gateway.call("GET", "/teams/main/builds", token=token) as answer:
            return answer.status, await answer.read()

    # --- a worker, and the bus

    async def package(self, seed: str = SERVER, subject: str = "execute_build_package.w1", **changed: Any) -> Said:
        """Nobody is answered."""
        credit = await eventually(self.scheduler._credit)
        package = Package(
            attempt=Attempt("forged", "main", 1),
            team="main",
            worker="w1",
            boot=self.scheduler.heartbeats[-1].boot,
            credit=credit.nonce,
            lease_seconds=15.0,
            stage=Stage(name="main", steps=[sh("true")]),
            inputs={},
            token="",
            artifacts_url="",
        )
        sealed = SealedBox(PublicKey(credit.key)).encrypt(msgspec.msgpack.encode(msgspec.structs.replace(package, **changed)))
        before = _count(self.worker_metrics)
        await self.scheduler.bus.send("execute_build_package.w1", msgspec.msgpack.encode(sign(seed, subject, sealed)))
        await eventually(lambda: _count(self.worker_metrics) > before)
        return 0, b""

    @property
    def worker_metrics(self) -> Any:
        return self.worker.worker._metrics.refused

    async def connect(self, name: str) -> Said:
        async with connect_jetstream(self.nats.url, new_seed(), name, patience=0.2) as bus:
            await eventually(lambda: bus.refused)
            assert not bus.connected
        return 0, b""


def _count(source: Any, why: str = "") -> float:
    """What a registry's or a counter's refusals come to, of one reason or of all."""
    samples = [sample for metric in source.collect() for sample in metric.samples]
    names = ("penstock_refusals_total", "penstock_artifacts_refusals_total", "penstock_worker_messages_refused_total", "penstock_bus_strangers_total")
    return sum(s.value for s in samples if s.name in names and why in ("", *s.labels.values()))


class Refused(NamedTuple):
    """`where` counts it; all that are refused with one status there get the same answer, by `answer` if there are several kinds."""

    faults: int
    where: str
    status: int
    why: str
    ask: Callable[[Scene], Awaitable[Said]]
    who: dict[str, str] = {}
    answer: str = ""


W1, NAMED = {"worker": "w1", "build": "b1"}, {"worker": "w1"}
REFUSED = (
    Refused(79, "artifacts", 401, "not signed by its worker", lambda s: s.ask(s.token(), new_seed()), W1),
    Refused(79, "bus", 0, "", lambda s: s.connect("w1"), {"name": "w1"}),
    Refused(79, "gateway", 401, "not signed by its key", lambda s: s.apply(key=public_key(new_seed())), NAMED, "register"),
    Refused(80, "artifacts", 403, "another input", lambda s: s.ask(s.token(), path="/inputs/other"), W1),
    Refused(80, "artifacts", 401, "not signed by its worker", lambda s: s.ask(s.token("b2"), Authorization=f"Bearer {s.token()}"), W1),
    Refused(80, "artifacts", 403, "another grant", lambda s: s.grant("get", "another")),
    Refused(81, "artifacts", 403, "over", lambda s: s.after_the_end(), {"build": "over"}),
    Refused(82, "artifacts", 401, "no build token", lambda s: s.ask(s.token(seconds=-1))),
    Refused(82, "artifacts", 401, "another time", lambda s: s.ask(s.token(), at=3600), W1),
    Refused(82, "artifacts", 401, "another time", lambda s: s.ask(s.token(), at=-3600), W1),
    Refused(82, "artifacts", 401, "no grant", lambda s: s.grant("get", seconds=-1)),
    Refused(82, "gateway", 401, "no good challenge", lambda s: s.apply(nonce=s.challenge(seconds=-1)), NAMED, "register"),
    Refused(83, "artifacts", 401, "no build token", lambda s: s.ask(s.forged("none"))),
    Refused(83, "artifacts", 401, "no build token", lambda s: s.ask(s.forged("HS256"))),
    Refused(83, "gateway", 401, "no good challenge", lambda s: s.apply(nonce=s.challenge("none")), NAMED, "register"),
    Refused(83, "gateway", 401, "no good challenge", lambda s: s.apply(nonce=s.challenge("HS256")), NAMED, "register"),
    Refused(84, "artifacts", 401, "another body", lambda s: s.other_body()),
    Refused(84, "artifacts", 401, "not signed by its worker", lambda s: s.ask(s.token(), asked=f"{INPUT}?x=1"), W1),
    Refused(85, "gateway", 401, "no good token", lambda s: s.apply("second", spent=True), {"worker": "second"}, "register"),
    Refused(85, "gateway", 401, "no good token", lambda s: s.apply(token="pwt_" + "a" * 43), NAMED, "register"),
    Refused(86, "gateway", 401, "no good challenge", lambda s: s.apply(nonce=s.challenge(seed=new_seed())), NAMED, "register"),
    Refused(86, "gateway", 401, "not signed by its key", lambda s: s.apply(server=public_key(new_seed())), NAMED, "register"),
    Refused(86, "gateway", 401, "not signed by its key", lambda s: s.apply(context="penstock-standing"), NAMED, "register"),
    Refused(86, "gateway", 401, "no token", lambda s: s.as_somebody(None), answer="bearer"),
    Refused(86, "gateway", 401, "no known token", lambda s: s.as_somebody("pst_" + "b" * 43), answer="bearer"),
    Refused(87, "worker", 0, "package: another worker's", lambda s: s.package(worker="w2")),
    Refused(87, "worker", 0, "package: BadSignature", lambda s: s.package(subject="execute_build_package.w2")),
    Refused(88, "worker", 0, "package: BadSignature", lambda s: s.package(seed=new_seed())),
    Refused(89, "worker", 0, "package: another boot's", lambda s: s.package(boot="an earlier one")),
    Refused(89, "worker", 0, "package: no such credit", lambda s: s.package(credit="one that is spent")),
    Refused(89, "artifacts", 403, "over", lambda s: s.after_the_end(), {"build": "over"}),
)


@pytest.fixture
async def scene(database: Database, fresh_nats: NatsServer, tmp_path: Path) -> AsyncIterator[Scene]:
    async with AsyncExitStack() as stack:
        api = await stack.enter_async_context(serving_artifacts(database, fresh_nats, tmp_path / "store"))
        gateway = await stack.enter_async_context(running_gateway(database, fresh_nats.url))
        log = await stack.enter_async_context(open_postgres_log(database.url("postgres")))
        scheduler, worker = await stack.enter_async_context(a_system(tmp_path / "worker"))
        door = await stack.enter_async_context(admitting(fresh_nats, {"w1": public_key(WORKER_KEY)}))
        strangers = CollectorRegistry()
        door.measure(strangers)
        stored = await api.put(FILES)
        await log.append([write("build-over", StageFinished(stage="s", attempt=1, status="errored"), expected=0)])
        scene = Scene(gateway, api, log, scheduler, worker, fresh_nats, strangers, stored["digest"], stored["id"])

        async def is_over() -> bool:
            return (await scene.after_the_end())[0] == 403

        await eventually(is_over)
        assert (await scene.ask(scene.token()))[0] == (await scene.grant("get"))[0] == (await scene.as_somebody(TOKEN))[0] == 200
        yield scene


async def test_every_refusal_is_noted_and_counted_and_tells_nobody_which_check_failed(scene: Scene) -> None:
    """FAULTS 79–89"""
    counted = {"artifacts": scene.api.registry, "gateway": scene.gateway.registry, "worker": scene.worker_metrics, "bus": scene.door}
    answers: dict[tuple[str, int, str], set[bytes]] = {}
    secret = [scene.token(), TOKEN]
    for refused in REFUSED:
        before = _count(counted[refused.where], refused.why)
        with capture_logs() as lines:
            status, body = await refused.ask(scene)
        assert status == refused.status, refused
        noted = [line for line in lines if line["log_level"] == "warning" and refused.why in (line.get("why"), f"package: {line.get('reason')}", "")]
        noted = [line for line in noted if refused.who.items() <= line.items() or refused.who.items() <= line.get("who", {}).items()]
        assert noted, (refused, lines)
        assert status == 0 or {"method", "path", "address"} <= noted[0].keys(), noted
        assert not any(text in str(lines) for text in secret)
        assert _count(counted[refused.where], refused.why) > before, refused
        answers.setdefault((refused.where, status, refused.answer), set()).add(body)
    assert {len(bodies) for bodies in answers.values()} == {1}, answers
    assert {refused.faults for refused in REFUSED} == {*range(79, 90)}


async def test_what_is_the_first_team_s_to_decide_is_refused_to_others_by_that_reason(scene: Scene) -> None:
    owner = await scene.gateway.token("other", "owner")
    for method, path, body in (
        ("POST", "/secret-keys", {}),
        ("POST", "/workers/tokens", {"json": {}}),
        ("PUT", "/teams/other/policy", {"json": {"input_seconds": 60, "output_seconds": 60, "quota_bytes": 0, "privileged": True}}),
    ):
        before = _count(scene.gateway.registry, "another team")
        await scene.gateway.json(method, path, 403, token=owner, **body)
        assert _count(scene.gateway.registry, "another team") == before + 1, path


async def test_every_request_that_a_worker_signs_does_the_same_or_nothing_when_it_is_sent_again(scene: Scene) -> None:
    """FAULTS 84: there is none that does more the second time. Which are signed is asked of the service, route by route."""
    signed = set()
    for route in application(AsyncMock(), AsyncMock()).router.routes():
        assert route.resource is not None
        path = route.resource.canonical
        for name, value in {"artifact": scene.artifact, "attempt": "1", "name": "src", "step": "step", "build": "b1", "stage": "s"}.items():
            path = path.replace(f"{{{name}}}", value)
        with capture_logs() as lines:
            bearer = {"Authorization": f"Bearer {scene.token()}", "Penstock-Time": ""}
            assert (await scene.api.ask(route.method, path, bearer)).status == 401, path
        if [line["why"] for line in lines if "why" in line] == ["not signed by its worker"]:
            signed.add((route.method, route.resource.canonical))
    assert signed == {
        ("GET", "/inputs/{name}"),
        ("POST", "/inputs/{name}/blobs"),
        ("POST", "/outputs/{step}/{name}"),
        ("PUT", "/outputs/{step}/{name}/blobs"),
    }

    files, token = {"out": b"an output"}, scene.token()
    digests = b"".join(hashlib.sha256(contents).digest() for contents in FILES.values())
    requests: list[tuple[str, str, str, bytes]] = [
        ("GET", INPUT, "", b""),
        ("POST", f"{INPUT}/blobs", "", digests),
        ("POST", "/outputs/step/out", TREE, manifest(files)),
        ("PUT", "/outputs/step/out/blobs", BLOBS, blob_stream(files.values())),
    ]
    for method, path, kind, body in requests:
        content = "stream" if method == "PUT" else hashlib.sha256(body).hexdigest()
        headers = proof_headers(WORKER_KEY, token, method, path, content, time.time()) | ({"Content-Type": kind} if kind else {})
        first = await scene.api.ask(method, path, headers, **({"data": body} if body else {}))
        assert first.status in (200, 201, 202), (method, path, first.body)
        position = await scene.log.head()
        again = await scene.api.ask(method, path, headers, **({"data": body} if body else {}))
        assert (again.status, again.body) == (first.status, first.body) or again.problem == "upload-unknown", path
        assert await scene.log.head() == position, path
