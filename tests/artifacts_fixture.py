"""A running artifacts service, asked as the gateway and workers ask it; and trees to send."""

import asyncio
import hashlib
import io
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import aiohttp
import msgspec
from prometheus_client import CollectorRegistry

from libs.archives.blobstream import END_FRAME, frame_header
from libs.archives.tar import END, padding, write_header
from libs.archives.tree import CHUNK, FOLDER_MODE, ZERO_CHUNK, Entry, manifest_of, order, root_of
from libs.proofs import STREAM, proof_headers
from libs.runtime.service import Service, bind, listen
from libs.tokens import new_seed, public_key, sign_token
from services.artifacts.wiring import wire
from tests.controls import eventually, files_in
from tests.nats_fixture import SEEDS, NatsServer
from tests.postgres_fixture import Database

GRANT_KEY, SERVER_KEY, WORKER_KEY = new_seed(), new_seed(), new_seed()
TREE, BLOBS = "application/vnd.penstock.tree", "application/vnd.penstock.blobs"


def file(path: bytes, contents: bytes = b"", mode: int = 0o644) -> bytes:
    """A member of a tar."""
    return write_header(path, b"0", mode, len(contents)) + contents + bytes(padding(len(contents)))


def tar(files: Mapping[str, bytes]) -> bytes:
    return b"".join(file(path.encode(), contents) for path, contents in files.items()) + END


def chunks_of(contents: bytes) -> list[bytes]:
    return [contents[at : at + CHUNK] for at in range(0, len(contents), CHUNK)]


def digest_of(contents: bytes) -> bytes:
    return b"".join(hashlib.sha256(chunk).digest() for chunk in chunks_of(contents))


def entry(path: str, contents: bytes = b"", mode: int = 0o644) -> Entry:
    return Entry(path.encode(), "file", mode, len(contents), digest_of(contents))


def entries_of(files: Mapping[str, bytes]) -> list[Entry]:
    """The entries of a tree of plain files, with the folders that they lie in."""
    folders = {"/".join(parts[:n]) for path in files for parts in [path.split("/")] for n in range(1, len(parts))}
    found = [entry(path, contents) for path, contents in files.items()]
    found += [Entry(folder.encode(), "folder", FOLDER_MODE) for folder in folders]
    return sorted(found, key=lambda each: order(each.path))


def manifest(files: Mapping[str, bytes] | Iterable[Entry]) -> bytes:
    return b"".join(manifest_of(entries_of(files) if isinstance(files, Mapping) else files))


def tree_digest(files: Mapping[str, bytes] | Iterable[Entry]) -> str:
    return root_of(manifest(files)).digest.hex()


def distinct(files: Mapping[str, bytes]) -> list[bytes]:
    """The chunks of a tree in the order of their numbers."""
    found: dict[bytes, None] = {}
    for path in sorted(files, key=lambda path: order(path.encode())):
        found.update(dict.fromkeys(chunks_of(files[path])))
    return list(found)


def blob_stream(blobs: Iterable[bytes], end: bytes = END_FRAME) -> bytes:
    return b"".join(frame_header(hashlib.sha256(blob).digest(), len(blob)) + blob for blob in blobs) + end


def blobs_in(stream: bytes) -> dict[bytes, bytes]:
    """The blobs of an answer, which must be whole."""
    found, at = {}, 0
    while stream[at : at + 36] != END_FRAME:
        digest, size = stream[at : at + 32], int.from_bytes(stream[at + 32 : at + 36], "big")
        found[digest] = stream[at + 36 : at + 36 + size]
        assert hashlib.sha256(found[digest]).digest() == digest
        at += 36 + size
    assert at + 36 == len(stream)
    return found


class Answer(msgspec.Struct):
    status: int
    body: bytes
    headers: Any

    @property
    def json(self) -> Any:
        return msgspec.json.decode(self.body)

    @property
    def problem(self) -> str:
        return self.json["type"].removeprefix("urn:penstock:problem:")


class Api:
    """A client of one artifacts service."""

    def __init__(self, url: str, session: aiohttp.ClientSession, store: Path, registry: CollectorRegistry | None = None) -> None:
        self.url = url
        self.registry = registry
        self.session = session
        self.store = store

    def grant(self, subject: str, action: str, team: str = "main", seconds: float = 60) -> dict[str, str]:
        claims = {"team": team, "artifact": subject, "action": action, "actor": "somebody"}
        return {"Authorization": f"Bearer {sign_token(GRANT_KEY, claims, seconds, time.time())}"}

    def build(self, build: str = "b1", attempt: int = 1, seconds: float = 60, **claims: object) -> dict[str, str]:
        known = {"team": "main", "build": build, "stage": "s", "attempt": attempt, "worker": "w1", "key": public_key(WORKER_KEY), "inputs": {}}
        known["outputs"] = ["step/out"]
        return {"Authorization": f"Bearer {sign_token(SERVER_KEY, {**known, **claims}, seconds, time.time())}"}

    async def ask(self, method: str, path: str, headers: Mapping[str, str], **options: Any) -> Answer:
        """Signed by the worker where workers ask."""
        if path.startswith(("/inputs/", "/outputs/")) and "Penstock-Time" not in headers:
            body = options.get("data") or b""
            content = STREAM if path.endswith("/blobs") and method == "PUT" else hashlib.sha256(body).hexdigest()
            token = headers.get("Authorization", "").removeprefix("Bearer ")
            headers = {**headers, **proof_headers(WORKER_KEY, token, method, path, content, time.time())}
        if isinstance(body := options.get("data"), bytes):
            options["data"] = io.BytesIO(body)  # aiohttp does not like large ones otherwise
        async with self.session.request(method, self.url + path, headers=headers, **options) as answer:
            return Answer(answer.status, await answer.read(), answer.headers)

    async def of(self, artifact: str, action: str, method: str, below: str = "", team: str = "main", **options: Any) -> Answer:
        """Ask about one artifact under a grant for it."""
        headers = self.grant(artifact, action, team) | options.pop("headers", {})
        return await self.ask(method, f"/artifacts/{artifact}{below}", headers, **options)

    async def upload(self, body: Any, artifact: str | None = None, team: str = "main", query: str = "?name=src") -> Answer:
        """A tar."""
        return await self.of(artifact or str(uuid4()), "put", "POST", query, team, data=body)

    async def send_manifest(
        self, files: Mapping[str, bytes] | bytes, artifact: str | None = None, team: str = "main", query: str = "", **headers: str
    ) -> Answer:
        body = files if isinstance(files, bytes) else manifest(files)
        return await self.of(artifact or str(uuid4()), "put", "POST", query, team, data=body, headers={"Content-Type": TREE} | headers)

    async def send_blobs(self, artifact: str, body: Any, team: str = "main", **headers: str) -> Answer:
        return await self.of(artifact, "put", "PUT", "/blobs", team, data=body, headers={"Content-Type": BLOBS} | headers)

    async def put(self, files: Mapping[str, bytes], artifact: str | None = None, team: str = "main", query: str = "") -> Any:
        """The manifest, and then what is missing: the artifact."""
        artifact = artifact or str(uuid4())
        answer = await self.send_manifest(files, artifact, team, query)
        if answer.status == 202:
            answer = await self.send_blobs(artifact, blob_stream(missing(files, answer.json)), team)
        assert answer.status == 201, answer.body
        return answer.json

    async def get(self, artifact: str, query: str = "", team: str = "main", **headers: str) -> Answer:
        return await self.of(artifact, "get", "GET", query, team, headers=headers)

    async def blobs(self, artifact: str, digests: Iterable[bytes], team: str = "main") -> Answer:
        return await self.of(artifact, "get", "POST", "/blobs", team, data=b"".join(digests))

    async def reads_back(self, artifact: str, files: Mapping[str, bytes], team: str = "main") -> None:
        """Whole, by manifest and chunks."""
        answer = await self.get(artifact, "?format=tree", team)
        assert (answer.status, answer.body) == (200, manifest(files))
        digests = {hashlib.sha256(chunk).digest() for chunk in distinct(files)}
        answer = await self.blobs(artifact, digests, team)
        assert (answer.status, blobs_in(answer.body).keys()) == (200, digests)

    def stored(self) -> list[str]:
        return sorted(str(self.store / name) for name in files_in(self.store))


def missing(files: Mapping[str, bytes], pending: Any) -> list[bytes]:
    """The chunks that a PendingUpload asks for."""
    chunks = distinct(files)
    found = [chunks[number] for first, last in pending["missing"] for number in range(first, last + 1)]
    assert (len(found), sum(map(len, found))) == (pending["missing_blobs"], pending["missing_bytes"])
    assert ZERO_CHUNK not in {hashlib.sha256(chunk).digest() for chunk in found}
    return found


def settings(database: Database, nats: NatsServer, store: Path, **more: str) -> dict[str, str]:
    return {
        "PENSTOCK_DATABASE_URL": database.url("artifacts"),
        "PENSTOCK_NATS_URL": nats.url,
        "PENSTOCK_NATS_SEED": SEEDS["artifacts"],
        "PENSTOCK_STORE_URL": store.as_uri(),
        "PENSTOCK_GRANT_PUBLIC_KEY": public_key(GRANT_KEY),
        "PENSTOCK_SERVER_PUBLIC_KEY": public_key(SERVER_KEY),
        "PENSTOCK_TIDY_SECONDS": "0.3",
        **more,
    }


@asynccontextmanager
async def serving(database: Database, nats: NatsServer, store: Path, **more: str) -> AsyncIterator[Api]:
    """The service in this process."""
    service = Service("artifacts")
    sock = bind("127.0.0.1:0")
    try:
        app = await wire(service, settings(database, nats, store, **more), {})
        assert app is not None
        await service.enter(await listen(app, sock))
        await eventually(lambda: not service.problems())
        async with aiohttp.ClientSession(auto_decompress=False, headers={"Accept-Encoding": "identity"}) as session:
            yield Api(f"http://127.0.0.1:{sock.getsockname()[1]}", session, store, service.registry)
        if service._died.done():
            service._died.result()
    finally:
        await service.aclose()
        sock.close()


class Running:
    """One process, and a client of it."""

    def __init__(self, process: asyncio.subprocess.Process, api: Api) -> None:
        self.process = process
        self.api = api

    @property
    def peak(self) -> int:
        """Bytes of memory that it has had at most."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))

    def count(self) -> None:
        """From now on."""
        self.process.send_signal(signal.SIGUSR1)


@contextmanager
def held_port() -> Iterator[int]:
    """A port that nobody takes before the process that is told of it: bound here, where nothing listens."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]


@asynccontextmanager
async def running(
    database: Database, nats: NatsServer, store: Path, name: str, step: int = 0, by: signal.Signals = signal.SIGKILL
) -> AsyncIterator[Running]:
    """The service in a process of its own, which sends itself a signal before its `step`-th step after `count`."""
    with held_port() as port, held_port() as status:
        environ = settings(
            database,
            nats,
            store,
            PENSTOCK_LISTEN=f"127.0.0.1:{port}",
            PENSTOCK_STATUS_LISTEN=f"127.0.0.1:{status}",
            PENSTOCK_TIDY_SECONDS="3600",
            PENSTOCK_INSTANCE=name,
        )
        command = [sys.executable, "-m", "tests.interrupted_artifacts", str(step), str(int(by))]
        process = await asyncio.create_subprocess_exec(*command, env=os.environ | environ, stderr=asyncio.subprocess.DEVNULL)
        try:
            async with aiohttp.ClientSession(auto_decompress=False, headers={"Accept-Encoding": "identity"}) as session:

                async def ready() -> bool:
                    with suppress(aiohttp.ClientError):
                        async with session.get(f"http://127.0.0.1:{status}/readyz") as answer:
                            return answer.status == 200
                    return False

                await eventually(ready, timeout=30)
                yield Running(process, Api(f"http://127.0.0.1:{port}", session, store))
        finally:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
