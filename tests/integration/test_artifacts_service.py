"""The artifacts service over HTTP, on real Postgres, NATS and a real folder."""

import asyncio
import gzip
import io
import os
import tarfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import uuid4

import aiohttp
import msgspec
import obstore
import pytest
from backports import zstd
from obstore.exceptions import GenericError

from libs.archives.extract import extract
from libs.archives.rules import Limits
from libs.archives.tar import END, padding, write_header
from libs.archives.writer import pack
from libs.bus.bus import Bus
from libs.bus.jetstream import connect_jetstream
from libs.eventlog.log import NO_STREAM
from libs.eventlog.postgres import PostgresLog, open_postgres_log
from libs.runtime.service import Service, bind, listen
from libs.tokens import new_seed, public_key, sign_token
from proto.catalogue import decode
from proto.envelope import cloud_event, subject_of
from proto.events.artifact import ArtifactSealed, LogArchived, LogGap
from proto.events.build import BuildFinished, LogExtent, StageFinished
from proto.messages import Attempt, LogChunk, Segment
from proto.topology import CONSUMERS, STREAMS
from services.artifacts.routes import OUTPUT_LIFETIME, USER_LIFETIME
from services.artifacts.wiring import wire
from tests.controls import eventually, write
from tests.nats_fixture import PASSWORD, NatsServer
from tests.postgres_fixture import Database

GRANT_KEY, SERVER_KEY = new_seed(), new_seed()


def file(path: bytes, contents: bytes = b"") -> bytes:
    return write_header(path, b"0", 0o644, len(contents)) + contents + bytes(padding(len(contents)))


TAR = file(b"a", b"alpha") + write_header(b"d/", b"5", 0o755, 0) + file(b"d/b", b"beta") + END


def names(archive: bytes) -> dict[str, int]:
    """The names in an archive, with their modes."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return {member.name: member.mode for member in tar}


class Api:
    """A client of one running artifacts service."""

    def __init__(self, url: str, session: aiohttp.ClientSession, store: Path) -> None:
        self.url = url
        self.session = session
        self.store = store

    def grant(self, subject: str, action: str, team: str = "main", seconds: float = 60) -> dict[str, str]:
        token = sign_token(GRANT_KEY, {"team": team, "artifact": subject, "action": action}, seconds, time.time())
        return {"Authorization": f"Bearer {token}"}

    def build(self, build: str = "b1", attempt: int = 1, seconds: float = 60, **claims: object) -> dict[str, str]:
        known = {"team": "main", "build": build, "stage": "s", "attempt": attempt, "worker": "w1", "inputs": {}, "outputs": ["step/out"]}
        return {"Authorization": f"Bearer {sign_token(SERVER_KEY, {**known, **claims}, seconds, time.time())}"}

    async def ask(self, method: str, path: str, headers: dict[str, str], **options: object) -> tuple[int, bytes, "aiohttp.typedefs.LooseHeaders"]:
        async with self.session.request(method, self.url + path, headers=headers, **options) as answer:
            return answer.status, await answer.read(), answer.headers

    async def upload(self, body: object, artifact: str | None = None, team: str = "main") -> tuple[int, dict]:
        artifact = artifact or str(uuid4())
        status, text, _ = await self.ask(
            "POST", f"/artifacts/{artifact}?name=src", self.grant(artifact, "put", team), data=io.BytesIO(body) if isinstance(body, bytes) else body
        )
        return status, msgspec.json.decode(text)

    def stored(self) -> list[str]:
        return sorted(str(path) for path in self.store.rglob("*") if path.is_file())


@asynccontextmanager
async def serving(database: Database, nats: NatsServer, store: Path, **settings: str) -> AsyncIterator[Api]:
    environ = {
        "PENSTOCK_DATABASE_URL": database.url("artifacts"),
        "PENSTOCK_NATS_URL": nats.url,
        "PENSTOCK_NATS_USER": "artifacts",
        "PENSTOCK_NATS_PASSWORD": PASSWORD,
        "PENSTOCK_STORE_URL": store.as_uri(),
        "PENSTOCK_GRANT_PUBLIC_KEY": public_key(GRANT_KEY),
        "PENSTOCK_SERVER_PUBLIC_KEY": public_key(SERVER_KEY),
        **settings,
    }
    service = Service("artifacts")
    sock = bind("127.0.0.1:0")
    try:
        app = await wire(service, environ, {})
        assert app is not None
        await service.enter(await listen(app, sock))
        await eventually(lambda: not service.problems())
        async with aiohttp.ClientSession(auto_decompress=False) as session:
            yield Api(f"http://127.0.0.1:{sock.getsockname()[1]}", session, store)
    finally:
        await service.aclose()
        sock.close()


@pytest.fixture
async def api(database: Database, nats_server: NatsServer, tmp_path: Path) -> AsyncIterator[Api]:
    async with serving(database, nats_server, tmp_path / "store") as api:
        yield api


@pytest.fixture
async def builds_log(database: Database) -> AsyncIterator[PostgresLog]:
    async with open_postgres_log(database.url("builds")) as log:
        yield log


async def test_a_tree_goes_in_and_comes_out_in_every_format(api: Api, tmp_path: Path) -> None:
    digests = set()
    for body in (TAR, gzip.compress(TAR), zstd.compress(TAR)):
        before = int(time.time())
        status, sealed = await api.upload(body)
        assert status == 201
        assert (sealed["size"], sealed["files"]) == (9, 2)
        assert before + USER_LIFETIME <= sealed["expires_at"] <= time.time() + USER_LIFETIME
        digests.add(sealed["digest"])
    assert len(digests) == 1
    for n, form in enumerate(("tar", "tgz", "tzst")):
        status, archive, headers = await api.ask("GET", f"/artifacts/{sealed['id']}?format={form}", api.grant(sealed["id"], "get"))
        assert (status, headers["ETag"]) == (200, f'"{sealed["digest"]}-{form}"')

        async def chunks(archive: bytes = archive) -> AsyncIterator[bytes]:
            yield archive

        assert (await extract(chunks(), tmp_path / str(n), Limits())).digest == sealed["digest"]
        status, body, _ = await api.ask(
            "GET", f"/artifacts/{sealed['id']}?format={form}", api.grant(sealed["id"], "get") | {"If-None-Match": headers["ETag"]}
        )
        assert (status, body) == (304, b"")


async def test_one_file_or_folder_of_a_tree_can_be_read(api: Api) -> None:
    _, sealed = await api.upload(TAR)
    get = api.grant(sealed["id"], "get")
    status, body, headers = await api.ask("GET", f"/artifacts/{sealed['id']}?path=d/b", get)
    assert (status, body, headers["Content-Length"]) == (200, b"beta", "4")
    assert (await api.ask("GET", f"/artifacts/{sealed['id']}?path=d/b", get | {"If-None-Match": headers["ETag"]}))[0] == 304
    status, body, _ = await api.ask("GET", f"/artifacts/{sealed['id']}?path=d", get)
    assert names(body) == {"b": 0o644}
    assert (await api.ask("GET", f"/artifacts/{sealed['id']}?path=nothing", get))[0] == 404
    assert (await api.ask("GET", f"/artifacts/{sealed['id']}?format=zip", get))[0] == 422


async def test_the_same_upload_again_is_the_same_answer_and_another_is_refused(api: Api) -> None:
    artifact = str(uuid4())
    first = await api.upload(TAR, artifact)
    stored = api.stored()
    assert await api.upload(TAR, artifact) == first
    assert api.stored() == stored
    status, problem = await api.upload(file(b"other") + END, artifact)
    assert (status, problem["status"]) == (409, 409)
    assert (await api.ask("GET", f"/artifacts/{artifact}?path=a", api.grant(artifact, "get")))[1] == b"alpha"


@pytest.mark.parametrize(
    ("archive", "member", "rule"),
    [
        (file(b"../out"), "../out", "`..`"),  # FAULTS 19
        (file(b"/etc/passwd"), "/etc/passwd", "absolute"),  # FAULTS 19
        (write_header(b"l", b"2", 0o777, 0, b"d") + file(b"l/out"), "l/out", "under a link"),  # FAULTS 20
        (write_header(b"h", b"1", 0o644, 0, b"../../x"), "../../x", "`..`"),  # FAULTS 21
        (write_header(b"fifo", b"6", 0o644, 0), "fifo", "FIFO"),  # FAULTS 23
        (file(b"n" * 256), "n" * 256, "255 bytes"),  # FAULTS 27
        (file(b"a") + file(b"a"), "a", "twice"),  # FAULTS 28
    ],
)
async def test_a_hostile_archive_is_refused_whole(api: Api, archive: bytes, member: str, rule: str) -> None:
    """FAULTS 19–28"""
    status, problem = await api.upload(file(b"sound", os.urandom(100)) + archive + END)
    assert (status, problem["member"]) == (422, member)
    assert rule in problem["rule"]
    assert problem["type"] == "urn:penstock:problem:archive-refused"
    assert api.stored() == []


async def test_setuid_does_not_survive(api: Api) -> None:
    """FAULTS 24"""
    _, sealed = await api.upload(write_header(b"p", b"0", 0o6755, 0) + END)
    _, archive, _ = await api.ask("GET", f"/artifacts/{sealed['id']}", api.grant(sealed["id"], "get"))
    assert names(archive) == {"p": 0o755}


async def test_a_bomb_and_a_flood_of_members_are_stopped_at_the_limit(database: Database, nats_server: NatsServer, tmp_path: Path) -> None:
    """FAULTS 25, 26"""
    limits = {"PENSTOCK_MAX_ARTIFACT_BYTES": "10000000", "PENSTOCK_MAX_ARTIFACT_FILES": "100"}
    async with serving(database, nats_server, tmp_path / "store", **limits) as api:
        bomb = zstd.compress(write_header(b"zeros", b"0", 0o644, 1 << 28) + bytes(1 << 28) + END)
        status, problem = await api.upload(bomb)
        assert (status, problem["member"]) == (413, "zeros")
        status, problem = await api.upload(b"".join(file(b"%d" % n, b"x") for n in range(101)) + END)
        assert (status, problem["member"]) == (413, "100")
        assert api.stored() == []


async def test_an_archive_cut_short_is_refused_and_leaves_nothing(api: Api) -> None:
    """FAULTS 29"""
    for cut in (b"", TAR[:100], TAR[:-600], gzip.compress(TAR)[:-1], file(b"big", bytes(20 << 20))[: 15 << 20]):
        status, problem = await api.upload(cut)
        assert (status, "cut short" in problem["rule"]) == (422, True)
    assert api.stored() == []


async def test_a_client_that_disappears_in_the_middle_leaves_nothing(api: Api, database: Database) -> None:
    """FAULTS 32"""
    artifact = str(uuid4())
    body = file(b"big", bytes(40 << 20)) + END
    host, _, port = api.url.removeprefix("http://").partition(":")
    _, writer = await asyncio.open_connection(host, int(port))
    token = api.grant(artifact, "put")["Authorization"]
    writer.write(f"POST /artifacts/{artifact} HTTP/1.1\r\nHost: x\r\nAuthorization: {token}\r\nContent-Length: {len(body)}\r\n\r\n".encode())
    writer.write(body[: 30 << 20])
    await writer.drain()
    await eventually(api.stored)
    writer.transport.abort()
    await eventually(lambda: not api.stored())
    assert (await api.ask("GET", f"/artifacts/{artifact}", api.grant(artifact, "get")))[0] == 404


async def test_another_teams_artifact_is_absent(api: Api) -> None:
    """FAULTS 33"""
    _, sealed = await api.upload(TAR, team="main")
    status, body, _ = await api.ask("GET", f"/artifacts/{sealed['id']}", api.grant(sealed["id"], "get", team="other"))
    nothing = str(uuid4())
    assert (status, body) == (await api.ask("GET", f"/artifacts/{nothing}", api.grant(nothing, "get", team="other")))[:2]
    assert status == 404


async def test_an_expired_artifact_is_absent(api: Api, database: Database) -> None:
    artifact = str(uuid4())
    async with open_postgres_log(database.url("artifacts")) as log:
        sealed = ArtifactSealed(artifact=artifact, kind="user", digest="00" * 32, size=0, files=0, expires_at=1)
        await log.append([write(f"artifact-{artifact}", sealed)])
    assert (await api.ask("GET", f"/artifacts/{artifact}", api.grant(artifact, "get")))[0] == 404


async def test_tokens_open_only_what_they_name(api: Api) -> None:
    """FAULTS 79–83, 89"""
    _, sealed = await api.upload(TAR)
    ask = api.ask
    artifact = sealed["id"]
    for headers, expected in (
        ({}, 401),
        ({"Authorization": "Bearer nonsense"}, 401),
        (api.grant(artifact, "get", seconds=-5), 401),
        (api.build(), 401),
        (api.grant(artifact, "put"), 403),
        (api.grant(str(uuid4()), "get"), 403),
    ):
        assert (await ask("GET", f"/artifacts/{artifact}", headers))[0] == expected
    token = api.build(inputs={"src": sealed["digest"]})
    assert (await ask("GET", "/inputs/src", token))[0] == 200
    assert (await ask("GET", "/inputs/other", token))[0] == 403
    assert (await ask("GET", "/inputs/src", api.grant("src", "get")))[0] == 401
    assert (await ask("GET", "/inputs/src", api.build(inputs={"src": sealed["digest"]}, team="other")))[0] == 404
    assert (await ask("POST", "/outputs/step/other", token, data=TAR))[0] == 403
    assert (await ask("POST", "/outputs/step/out", api.build(seconds=-5), data=TAR))[0] == 401


async def test_an_output_is_sealed_under_the_same_id_however_often_it_is_sent(api: Api, database: Database) -> None:
    status, text, _ = await api.ask("POST", "/outputs/step/out", api.build(), data=TAR)
    assert status == 201
    again = await api.ask("POST", "/outputs/step/out", api.build(), data=gzip.compress(TAR))
    assert (again[0], again[1]) == (201, text)
    ref = msgspec.json.decode(text)
    async with open_postgres_log(database.url("artifacts")) as log:
        [recorded] = (await log.read_streams([f"artifact-{ref['id']}"])).popitem()[1]
    sealed = decode(recorded.type, recorded.data)
    assert (sealed.kind, sealed.build, sealed.stage, sealed.attempt, sealed.step, sealed.name) == ("output", "b1", "s", 1, "step", "out")
    assert abs(sealed.expires_at - time.time() - OUTPUT_LIFETIME) < 60
    assert (await api.ask("POST", "/outputs/step/out", api.build(), data=file(b"else") + END))[0] == 409


async def test_a_token_is_dead_when_its_attempt_is_over(api: Api, builds_log: PostgresLog) -> None:
    """FAULTS 81, 89"""
    _, sealed = await api.upload(TAR)

    async def status(attempt: int) -> int:
        return (await api.ask("GET", "/inputs/src", api.build("b7", attempt, inputs={"src": sealed["digest"]})))[0]

    assert await status(1) == 200
    await builds_log.append([write("build-b7", StageFinished(stage="s", attempt=1, status="errored"), expected=NO_STREAM)])

    async def first_is_dead() -> bool:
        return await status(1) == 403

    await eventually(first_is_dead)
    assert await status(2) == 200
    await builds_log.append([write("build-b7", BuildFinished(status="aborted"), expected=1)])

    async def second_is_dead() -> bool:
        return await status(2) == 403

    await eventually(second_is_dead)


async def test_a_full_store_is_507_and_the_service_goes_on(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """FAULTS 31, at the edge: the real full disk is tests/integration/test_blobstore.py's."""

    def full(*_: object, **__: object) -> None:
        raise GenericError("Generic LocalFileSystem error: Unable to copy data to file: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(obstore, "put", full)
        status, problem = await api.upload(TAR)
        assert (status, problem["type"]) == (507, "urn:penstock:problem:store-full")
    assert api.stored() == []
    assert (await api.upload(TAR))[0] == 201


async def test_a_damaged_store_never_passes_for_a_whole_answer(api: Api) -> None:
    contents = os.urandom(3 << 20)
    _, sealed = await api.upload(file(b"f", contents) + END)
    part = next(path for path in api.store.rglob("000000"))
    damaged = bytearray(part.read_bytes())
    damaged[2_000_000] ^= 1
    part.write_bytes(damaged)
    with pytest.raises(aiohttp.ClientError):
        await api.ask("GET", f"/artifacts/{sealed['id']}?path=f", api.grant(sealed["id"], "get"))


# --- logs ----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
async def bus(nats_server: NatsServer) -> AsyncIterator[Bus]:
    async with connect_jetstream(nats_server.url, "builds", PASSWORD, "test") as bus:
        await bus.ensure(STREAMS, CONSUMERS)
        yield bus


class Ended:
    """An attempt of its own, whose worker has sent chunks."""

    def __init__(self, bus: Bus, log: PostgresLog, database: Database) -> None:
        self.build = uuid4().hex
        self.subject = f"logs.w1.{self.build}.s.1"
        self._bus = bus
        self._log = log
        self._database = database

    async def send(self, *numbers: int) -> None:
        for number in numbers:
            segments = [Segment("step", "stdout", 1, b"".join(b"line %d\n" % ((number - 1) * 10 + n) for n in range(10)))]
            chunk = LogChunk(attempt=Attempt(self.build, "s", 1), number=number, first_line=(number - 1) * 10, segments=segments)
            await self._bus.publish(self.subject, msgspec.msgpack.encode(chunk))

    async def finish(self, chunks: int, times: int = 1) -> None:
        extent = LogExtent(chunks=chunks, lines=chunks * 10, bytes=chunks * 80)
        event = StageFinished(stage="s", attempt=1, status="succeeded", worker="w1", log=extent)
        await self._log.append([write(f"build-{self.build}", event, expected=NO_STREAM)])
        [recorded] = (await self._log.read_streams([f"build-{self.build}"]))[f"build-{self.build}"]
        for n in range(times):
            await self._bus.publish(subject_of(recorded), cloud_event(recorded, 1), f"{recorded.event_id}-{self.build}-{n}")

    async def archives(self) -> list[LogArchived]:
        stream = f"artifact-log-{self.build}-s-1"
        return [decode(r.type, r.data) for r in (await self._log.read_streams([stream]))[stream]]

    async def last_chunk(self) -> object:
        return await self._bus.last("LOGS", self.subject)


@pytest.fixture
async def ended(bus: Bus, builds_log: PostgresLog, database: Database) -> Callable[[], Ended]:
    return lambda: Ended(bus, builds_log, database)


async def read_log(api: Api, build: str, query: str = "") -> tuple[str, list[tuple[int, Segment]]]:
    status, body, headers = await api.ask("GET", f"/logs/{build}/s/1{query}", api.grant(build, "log"))
    assert status == 200, body
    found = []
    while body:
        size = int.from_bytes(body[:4], "big")
        found.append(msgspec.msgpack.decode(body[4 : 4 + size], type=tuple[int, Segment]))
        body = body[4 + size :]
    return headers["Penstock-Lines"], found


async def test_a_log_is_archived_whole_purged_and_read_by_line(api: Api, ended: Callable[[], Ended]) -> None:
    attempt = ended()
    await attempt.send(2, 1, 2, 3)
    assert (await api.ask("GET", f"/logs/{attempt.build}/s/1", api.grant(attempt.build, "log")))[0] == 404
    await attempt.finish(chunks=3, times=2)
    [archived] = await eventually(attempt.archives)
    assert (archived.archive, archived.chunks, archived.lines, archived.gaps) == (1, 3, 30, [])
    lines, found = await read_log(api, attempt.build)
    assert lines == "30"
    assert b"".join(segment.data for _, segment in found) == b"".join(b"line %d\n" % n for n in range(30))
    assert [first for first, _ in (await read_log(api, attempt.build, "?from=15&limit=10"))[1]] == [10, 20]

    async def purged() -> bool:
        return await attempt.last_chunk() is None

    await eventually(purged)
    assert len(await attempt.archives()) == 1


async def test_chunks_that_come_after_the_end_are_waited_for(api: Api, ended: Callable[[], Ended]) -> None:
    """FAULTS 104"""
    attempt = ended()
    await attempt.send(1)
    await attempt.finish(chunks=2)
    await attempt.send(2)
    [archived] = await eventually(attempt.archives)
    assert (archived.chunks, archived.gaps) == (2, [])


async def test_what_never_comes_is_listed_as_a_gap(database: Database, nats_server: NatsServer, tmp_path: Path, ended: Callable[[], Ended]) -> None:
    async with serving(database, nats_server, tmp_path / "store", PENSTOCK_LOG_PATIENCE="0.5") as api:
        attempt = ended()
        await attempt.send(1, 4)
        await attempt.finish(chunks=5)
        [archived] = await eventually(attempt.archives)
        assert (archived.chunks, archived.lines, archived.gaps) == (2, 50, [LogGap(first=2, last=3), LogGap(first=5, last=5)])
        assert [first for first, _ in (await read_log(api, attempt.build))[1]] == [0, 30]


async def test_the_log_of_a_lost_worker_is_archived_as_far_as_it_came(
    database: Database, nats_server: NatsServer, tmp_path: Path, ended: Callable[[], Ended]
) -> None:
    async with serving(database, nats_server, tmp_path / "store", PENSTOCK_LOG_PATIENCE="0.5"):
        attempt, silent = ended(), ended()
        await attempt.send(1, 2)
        await attempt.finish(chunks=-1)
        await silent.finish(chunks=-1)
        [archived] = await eventually(attempt.archives)
        assert (archived.chunks, archived.lines, archived.gaps) == (2, 20, [])
        [nothing] = await eventually(silent.archives)
        assert (nothing.chunks, nothing.lines) == (0, 0)


async def test_archiving_goes_on_after_nats_was_killed(
    database: Database, nats_server: NatsServer, tmp_path: Path, ended: Callable[[], Ended]
) -> None:
    """FAULTS 57"""
    async with serving(database, nats_server, tmp_path / "store"):
        attempt = ended()
        await attempt.send(1)
        await attempt.finish(chunks=2)
        nats_server.restart()

        async def sent() -> bool:
            try:
                await attempt.send(2)
            except Exception:
                return False
            return True

        await eventually(sent)
        [archived] = await eventually(attempt.archives)
        assert (archived.chunks, archived.gaps) == (2, [])


async def test_what_pack_writes_the_service_takes(api: Api, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "d").mkdir(parents=True)
    (source / "d/f").write_bytes(os.urandom(9 << 20))
    (source / "link").symlink_to("d/f")
    status, sealed = await api.upload(pack(source, "tzst"))
    assert (status, sealed["files"]) == (201, 1)
    _, archive, _ = await api.ask("GET", f"/artifacts/{sealed['id']}", api.grant(sealed["id"], "get"))
    assert archive == b"".join([chunk async for chunk in pack(source)])
