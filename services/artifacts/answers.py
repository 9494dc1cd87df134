"""What handlers here answer alike: problems by name, ETags, ranges, streams that are cut rather than passed off as whole."""

import asyncio
import hashlib
import re
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from urllib.parse import parse_qsl

import msgspec
import structlog
from aiohttp import web
from prometheus_client import CollectorRegistry, Counter

from libs.archives.rules import ArchiveRefused, LimitExceeded
from libs.blobstore.store import BlobDamaged, BlobMissing, QuotaExceeded, SizeDiffers, StoreFull, StoreUnavailable
from libs.runtime.http import Problem, unavailable
from services.artifacts.trees import NoSuchPath
from services.artifacts.uploads import Gone, ManifestRefused, TreeUnknown, UploadUnknown

logger = structlog.get_logger()

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")
_WRITE_SECONDS = 60.0
_WRITE_LEAST = 512 << 10
"""Bytes that a reader must take in as many seconds of waiting for it."""
_WRITTEN = 512 << 10
"""Bytes that are handed to a connection at a time: what its reader does not take is copied."""


class Traffic:
    """Counts the bytes of bodies, by direction."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._bytes = Counter("penstock_artifacts_bytes", "Bytes of bodies, by direction", ["direction"], registry=registry)

    def came(self, size: int) -> None:
        self._bytes.labels("in").inc(size)

    async def send(
        self,
        request: web.Request,
        pieces: AsyncGenerator[bytes | memoryview, None],
        headers: dict[str, str],
        status: int = 200,
        length: int | None = None,
    ) -> web.StreamResponse:
        """Stream an answer as fast as it is read, at most `length` bytes of it. What fails before its first piece is still answered as a
        problem; later the connection is cut."""
        response = web.StreamResponse(status=status, headers=headers)
        counter = self._bytes.labels("out")
        left = length
        if left is not None:
            response.content_length = left
        async with aclosing(pieces):
            first = await anext(pieces, b"")
            await response.prepare(request)
            pace = _Pace(response)
            piece: bytes | memoryview | None = first if request.method != "HEAD" else None
            while piece is not None:
                if left is not None:
                    piece, left = piece[:left], left - min(left, len(piece))
                await pace.write(piece)
                counter.inc(len(piece))
                piece = None if left == 0 else await anext(pieces, None)
            if left and request.method != "HEAD":
                raise ConnectionResetError("the answer is shorter than it was said to be")
            await response.write_eof()
        return response


class _Pace:
    """Writes an answer to a reader, who must take at least so much in so long."""

    def __init__(self, response: web.StreamResponse) -> None:
        self._response = response
        self._clock = asyncio.get_running_loop().time
        self._waited = 0.0
        self._taken = 0

    async def write(self, piece: bytes | memoryview) -> None:
        """Raises TimeoutError."""
        view = memoryview(piece)
        for at in range(0, len(piece), _WRITTEN):
            part, begun = view[at : at + _WRITTEN], self._clock()
            async with asyncio.timeout(max(_WRITE_SECONDS - self._waited, 0)):
                await self._response.write(part)
            self._waited, self._taken = self._waited + self._clock() - begun, self._taken + len(part)
            if self._taken >= _WRITE_LEAST:
                self._waited, self._taken = 0.0, 0


@web.middleware
async def store_problems(request: web.Request, handler: Handler) -> web.StreamResponse:
    """What archives and the store raise, as problems."""
    try:
        return await handler(request)
    except ArchiveRefused as error:
        raise refused("archive-refused", error) from None
    except ManifestRefused as error:
        raise Problem(422, "manifest-refused", "The manifest was refused", str(error), member="", rule=str(error)) from None
    except SizeDiffers as error:
        raise Problem(
            422, "manifest-refused", "The manifest was refused", str(error), member="", rule="gives a chunk another size than it has"
        ) from None
    except StoreFull:
        raise Problem(507, "store-full", "There is no room left in the store") from None
    except QuotaExceeded as error:
        raise Problem(507, "quota-exceeded", "The team's quota is used up", f"the team's quota does not allow it: {error}") from None
    except StoreUnavailable:
        raise unavailable("the store cannot be reached") from None
    except BlobDamaged as error:
        logger.error("the store is damaged", why=str(error), path=request.path)
        raise damaged(str(error)) from None
    except BlobMissing as error:
        logger.error("the store lacks what it should have", blob=str(error), path=request.path)
        raise damaged(f"blob {error} is gone") from None
    except UploadUnknown:
        raise Problem(404, "upload-unknown", "There is no such upload any more", "send the manifest again") from None
    except TreeUnknown:
        raise Problem(404, "tree-unknown", "The team does not have this tree", "send its manifest") from None
    except Gone:
        raise gone() from None
    except NoSuchPath:
        raise absent() from None


def refused(slug: str, error: ArchiveRefused) -> Problem:
    """422, or 413 when it is past a limit."""
    if isinstance(error, LimitExceeded):
        return Problem(413, "too-large", "What was sent is past a limit", str(error), member=error.member, rule=error.rule)
    return Problem(422, slug, "What was sent was refused", str(error), member=error.member, rule=error.rule)


def damaged(detail: str) -> Problem:
    return Problem(500, "damaged", "What was stored is damaged", f"{detail}; uploading the same files again heals it")


def absent() -> Problem:
    return Problem(404, "not-found", "There is no such thing")


def gone() -> Problem:
    return Problem(410, "expired", "The artifact has expired or was deleted")


def invalid(name: str, rule: str) -> Problem:
    return Problem(422, "invalid", "The request does not say what it must", f"{name}: {rule}", path=name)


def answer(status: int, body: object) -> web.Response:
    return web.Response(status=status, body=msgspec.json.encode(body), content_type="application/json")


def unchanged(request: web.Request, etag: str) -> web.Response | None:
    """304, if that is what the asker has."""
    has = request.headers.get("If-None-Match", "")
    if etag not in (tag.strip().removeprefix("W/") for tag in has.split(",")) and has.strip() != "*":
        return None
    return web.Response(status=304, headers={"ETag": etag})


def part_tag(digest: str, path: bytes) -> str:
    return hashlib.sha256(bytes.fromhex(digest) + path).hexdigest()


def byte_range(request: web.Request, etag: str, size: int) -> tuple[int, int] | None:
    """First byte and number of bytes that are asked for; None: all. Raises Problem 416."""
    asked = _RANGE.fullmatch(request.headers.get("Range", "").replace(" ", ""))
    if asked is None or request.headers.get("If-Range", etag) != etag:
        return None
    first, last = asked.groups()
    if not first and not last:
        return None
    start = int(first) if first else max(size - int(last), 0)
    end = min(int(last), size - 1) if first and last else size - 1
    if first and last and int(last) < int(first):
        return None
    if start >= size:
        raise Problem(416, "range", "There is no such range", f"of {size} bytes", headers={"Content-Range": f"bytes */{size}"})
    return start, end - start + 1


def ranged(headers: dict[str, str], found: tuple[int, int] | None, size: int) -> tuple[int, int, int]:
    """Status, first byte and number of bytes of an answer of `size` bytes, whose headers are added to."""
    headers["Accept-Ranges"] = "bytes"
    if found is None:
        return 200, 0, size
    start, length = found
    headers["Content-Range"] = f"bytes {start}-{start + length - 1}/{size}"
    return 206, start, length


def number(request: web.Request, name: str) -> int | None:
    """A whole number of the query. Raises Problem 422."""
    text = request.query.get(name)
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or len(text) > 15:
        raise invalid(name, "must be a number")
    return int(text)


def path_of(request: web.Request) -> bytes | None:
    """The query's `path`, any bytes, without slashes around it; None when there is none."""
    for name, value in parse_qsl(request.rel_url.raw_query_string, keep_blank_values=True, errors="surrogateescape"):
        if name == "path":
            return value.encode("utf-8", "surrogateescape").strip(b"/")
    return None
