"""Why the bus does not admit this worker. The bus itself says no more than no, and that also when nobody is there to ask; so the worker asks the
gateway, by its key, whether it is one still, says what it learns and what to do, and ends when it is none any more.
"""

import asyncio
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import Literal, NamedTuple

import aiohttp
import msgspec
import structlog

from libs.proofs import WINDOW
from libs.runtime.service import GivenUp
from libs.tokens import public_key, sign, signature_text
from proto.api import Challenge, WorkerStanding

logger = structlog.get_logger()

EXPELLED = 77
"""The exit code of a worker that was revoked or removed: to start it again is of no use."""
LOOK, LONGEST = 1.0, 60.0
"""Seconds between two questions, at first and in the end."""
CONTEXT = "penstock-standing"
_TIMEOUT = aiohttp.ClientTimeout(total=10.0)

Standing = Literal["registered", "revoked", "unknown", "another", "away"]


class Learned(NamedTuple):
    """`ahead`: by how many seconds this machine's clock is ahead of the gateway's."""

    standing: Standing
    ahead: float = 0.0


class Link(NamedTuple):
    """The bus: whether there is a connection, and whether the server refuses to make one."""

    connected: Callable[[], bool]
    refused: Callable[[], bool]


class Watch:
    """`key` is the worker's seed, `server` the public key that it trusts, `url` the gateway's ("": it is not known), `now` unix seconds."""

    def __init__(self, link: Link, name: str, key: str, server: str, url: str, now: Callable[[], float]) -> None:
        self._link = link
        self._name = name
        self._key = key
        self._server = server
        self._url = url.rstrip("/")
        self._now = now

    async def run(self) -> None:
        """For ever. Raises GivenUp once the gateway says that this is no worker (any more)."""
        pause, told = LOOK, ""
        while True:
            await asyncio.sleep(pause)
            if self._link.connected():
                pause, told = LOOK, ""
                continue
            learned = await self._ask() if self._url else Learned("away")
            pause = min(LONGEST, 2 * pause)
            if self._link.connected():
                continue
            if learned.standing in ("revoked", "unknown"):
                raise GivenUp(self._farewell(learned.standing), EXPELLED)
            if (why := self._why(learned)) != told:
                told = why
                todo = "nothing: it tries again by itself" if self._url else "ask `penstock workers`"
                logger.warning("not admitted to the bus", why=why, todo=todo)
                if abs(learned.ahead) > WINDOW:
                    logger.warning("this machine's clock is not the server's", seconds_ahead=round(learned.ahead), todo="set it")

    def _farewell(self, standing: Standing) -> str:
        if standing == "revoked":
            return (
                f"{self._name} was revoked at {self._url}: its key is good for nothing now. To come back: `penstock worker rm {self._name}` there,"
                " remove worker.json here, and start with --register - --server URL"
            )
        return f"{self._url} has no worker {self._name} of this key: it was removed. To come back: start with --register - --server URL"

    def _why(self, learned: Learned) -> str:
        if learned.standing == "registered":
            return "no scheduler is there to admit it" if self._link.refused() else "the bus does not answer, or no scheduler is there to admit it"
        if learned.standing == "another":
            return f"another server than the one that it is registered with answers at {self._url}"
        if not self._url:
            return "it was revoked or removed, or no scheduler is there" if self._link.refused() else "the bus does not answer"
        return f"neither the bus nor {self._url} answers"

    async def _ask(self) -> Learned:
        try:
            async with aiohttp.ClientSession(timeout=_TIMEOUT) as session:
                async with session.post(f"{self._url}/api/v1/workers/challenge") as answer:
                    answer.raise_for_status()
                    challenge = msgspec.json.decode(await answer.read(), type=Challenge)
                    ahead = self._now() - parsedate_to_datetime(answer.headers["Date"]).timestamp()
                if challenge.server != self._server:
                    return Learned("another", ahead)
                async with session.post(f"{self._url}/api/v1/workers/standing", data=self._myself(challenge)) as answer:
                    body = await answer.read()
                    if answer.status == 404:
                        return Learned("unknown" if msgspec.json.decode(body, type=_Problem).type == _UNKNOWN else "away", ahead)
                    answer.raise_for_status()
                    return Learned(msgspec.json.decode(body, type=WorkerStanding).standing, ahead)
        except (aiohttp.ClientError, TimeoutError, KeyError, ValueError) as error:
            logger.debug("the gateway does not say", error=str(error) or type(error).__name__)
            return Learned("away")

    def _myself(self, challenge: Challenge) -> bytes:
        public = public_key(self._key)
        said = "\0".join((challenge.server, challenge.nonce, self._name, public))
        signature = signature_text(sign(self._key, CONTEXT, said.encode()).signature)
        return msgspec.json.encode({"name": self._name, "key": public, "nonce": challenge.nonce, "signature": signature})


class _Problem(msgspec.Struct):
    type: str = ""


_UNKNOWN = "urn:penstock:problem:worker-unknown"
"""Only the gateway's own word counts: anything may answer 404 in its place."""
