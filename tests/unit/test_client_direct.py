"""Which direct addresses a client uses, and what becomes of what went there in vain."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web

from penstock.client import Unavailable
from penstock.client import http as http_module
from penstock.client import upload as upload_module
from penstock.client.http import Http
from penstock.client.model import Direct
from penstock.client.tree import CHUNK
from tests.unit.artifact_server import ArtifactServer, connected, problem


@pytest.mark.parametrize(
    ("server", "offered", "used"),
    [
        ("http://127.0.0.1:7420", "http://127.0.0.1:7421/x", True),
        ("http://localhost:7420", "http://127.0.0.1:7421/x", True),
        ("http://penstock.example", "http://artifacts.example/x", True),
        ("https://penstock.example", "https://artifacts.example/x", True),
        ("http://penstock.example", "https://artifacts.example/x", True),
        ("https://penstock.example", "http://artifacts.example/x", False),  # would show what was private
        ("http://penstock.example", "http://127.0.0.1:7421/x", False),  # this is another machine than the server's
        ("http://penstock.example", "file:///etc/passwd", False),
    ],
)
def test_an_address_is_used_when_it_is_as_private_and_the_same_machine(server: str, offered: str, used: bool) -> None:
    direct = Direct(url=offered, token="t")
    assert Http(server, "t", 1.0).direct(direct) == (direct if used else None)
    assert Http(server, "t", 1.0).direct(None) is None


@asynccontextmanager
async def somebody(answer: bytes | None, takes: int = 100) -> AsyncIterator[tuple[str, list[bytes]]]:
    """Takes each connection, reads a little, and breaks it off after this answer; None: reads no more, and says nothing. Its address, and what it
    read."""
    came: list[bytes] = []
    over = asyncio.Event()

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        came.append(b"")
        try:
            while len(came[-1]) < takes:
                piece = await reader.read(1000)
                came[-1] += piece
                if b"100-continue" in piece:
                    writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            if answer is None:
                await over.wait()
            else:
                writer.write(answer)
                await writer.drain()
        finally:
            writer.close() if answer else writer.transport.abort()

    server = await asyncio.start_server(take, "127.0.0.1", 0, limit=takes)
    async with server:
        try:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/x", came
        finally:
            over.set()


@pytest.mark.parametrize("answer", [b"", None], ids=["breaks off", "stalls"])
async def test_an_address_that_lets_nothing_pass_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes | None) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(http_module, "ANSWER_SECONDS", 0.5)
    monkeypatch.setattr(upload_module, "CONNECT_SECONDS", 0.5)
    (tmp_path / "in").mkdir()
    (tmp_path / "in/big").write_bytes(os.urandom(CHUNK + 5))
    server = ArtifactServer()
    async with somebody(answer) as (server.direct, came), connected(server, patience=0.3, patience_upload=0.3) as client:
        artifact = await client.upload(tmp_path / "in")
        sent = len(came)
        assert sent
        await client.download(artifact, tmp_path / "out")
        assert len(came) == sent  # nothing is tried there again
    async with somebody(answer) as (server.direct, came), connected(server, patience=0.3) as client:
        await client.download(artifact, tmp_path / "again")
        assert len(came) == 1
    for folder in ("out", "again"):
        assert (tmp_path / folder / "big").read_bytes() == (tmp_path / "in/big").read_bytes()


async def test_the_rest_of_a_stream_is_never_taken_for_all_of_it() -> None:
    """Somebody on the way takes some of it, and then says no: what is left may well look like an archive of its own."""
    came: list[bytes] = []

    async def before(request: web.Request) -> web.StreamResponse:
        if request.path.endswith("/direct"):
            return web.json_response({"id": "a", "missing": [], "direct": {"url": server.direct, "token": "t"}})
        came.append(await request.read())
        return web.json_response({"id": "a", "digest": "00", "size": 1, "files": 1}, status=201)

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield os.urandom(10_000)

    server = ArtifactServer()
    server.before = before
    refusal = b"HTTP/1.1 502 Bad Gateway\r\nContent-Type: text/html\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    async with somebody(refusal, takes=50_000) as (server.direct, _), connected(server) as client:
        with pytest.raises(Unavailable):
            await client.upload(pieces())
    assert not came


async def test_a_token_that_is_too_old_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it is refused with goes to the server itself, and the rest past it again."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(upload_module, "STREAM", CHUNK)
    monkeypatch.setattr(upload_module, "AT_ONCE", 1)
    (tmp_path / "in").mkdir()
    (tmp_path / "in/big").write_bytes(os.urandom(4 * CHUNK))
    went: list[str] = []

    async def before(request: web.Request) -> web.StreamResponse | None:
        if request.method == "PUT":
            went.append(request.headers["Authorization"].removeprefix("Bearer "))
        return problem(401) if len(went) == 2 and went[-1] == "t" else None

    server = ArtifactServer()
    server.before = before
    async with connected(server) as client:
        server.direct = f"{client.url}/api/v1/teams/main/user-artifacts/{{}}/blobs"
        await client.upload(tmp_path / "in")
    assert went == ["t", "t", "pst_x", "t", "t"]
