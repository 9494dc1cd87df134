"""The least HTTP client that will do: one keep-alive connection, so that the load costs the machine little."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any
from urllib.parse import urlsplit

import msgspec

_LIMIT = 16 << 20


class Connection:
    """Requests one after another. `open` first."""

    def __init__(self, url: str, token: str) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "", parts.port or 80
        self._head = f"Host: {parts.netloc}\r\nAuthorization: Bearer {token}\r\n"

    async def open(self) -> "Connection":
        self._reader, self._writer = await asyncio.open_connection(self._host, self._port, limit=_LIMIT)
        return self

    def close(self) -> None:
        self._writer.close()

    async def request(self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None) -> tuple[int, bytes]:
        """Status and body."""
        self._send(method, path, body, headers or {})
        status, fields = await self._answer()
        if fields.get("transfer-encoding") == "chunked":
            return status, b"".join([chunk async for chunk in self._chunks()])
        return status, await self._reader.readexactly(int(fields.get("content-length", "0")))

    async def json(self, method: str, path: str, content: object = None, headers: Mapping[str, str] | None = None) -> Any:
        """Raises RuntimeError unless the answer is 2xx."""
        status, body = await self.request(method, path, b"" if content is None else msgspec.json.encode(content), headers)
        if status // 100 != 2:
            raise RuntimeError(f"{method} {path}: {status} {body.decode(errors='replace')}")
        return msgspec.json.decode(body)

    async def events(self, path: str, last: str = "") -> AsyncIterator[list[tuple[str, bytes]]]:
        """Server-sent events as (event, data), as many at once as have arrived, until the server ends the stream."""
        self._send("GET", path, b"", {"Accept": "text/event-stream", **({"Last-Event-ID": last} if last else {})})
        status, fields = await self._answer()
        if status != 200 or fields.get("transfer-encoding") != "chunked":
            raise RuntimeError(f"GET {path}: {status}")
        rest = b""
        async for chunk in self._chunks():
            *blocks, rest = (rest + chunk.replace(b"\r\n", b"\n")).split(b"\n\n")
            if found := [parsed for block in blocks if (parsed := _event(block))[0]]:
                yield found

    def _send(self, method: str, path: str, body: bytes, headers: Mapping[str, str]) -> None:
        more = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        if body:
            more += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        self._writer.write(f"{method} {path} HTTP/1.1\r\n{self._head}{more}\r\n".encode() + body)

    async def _answer(self) -> tuple[int, dict[str, str]]:
        first, *lines = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        fields = (line.partition(":") for line in lines if line)
        return int(first.split(" ", 2)[1]), {name.lower(): value.strip().lower() for name, _, value in fields}

    async def _chunks(self) -> AsyncIterator[bytes]:
        while size := int(await self._reader.readuntil(b"\r\n"), 16):
            yield (await self._reader.readexactly(size + 2))[:-2]
        await self._reader.readuntil(b"\r\n")


def _event(block: bytes) -> tuple[str, bytes]:
    """("", b"") for a comment."""
    name, data = "", b""
    for line in block.split(b"\n"):
        if line.startswith(b"event: "):
            name = line[7:].decode()
        elif line.startswith(b"data: "):
            data = line[6:]
    return name, data
