"""Why the bus does not admit this worker. The bus itself says no more than no, and that also when nobody is there to ask; so the worker asks the
gateway, by its key, whether it is one still, says what it learns and what to do, and ends when it is none any more. Only what the gateway has signed
for this very question counts: whoever is on the way there ends no worker.
"""

import asyncio
import secrets
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import Literal, NamedTuple

import aiohttp
import msgspec
import structlog

from libs.proofs import WINDOW
from libs.runtime.service import GivenUp
from libs.tokens import BadSignature, public_key, sign, signature_bytes, signature_text, verify
from proto.api.workers import Challenge
from proto.introduction import BECOME, EXPELLED, STANDING, words
from proto.messages import Signed

logger = structlog.get_logger()

LOOK, LONGEST = 1.0, 60.0
"""Seconds between two questions, at first and in the end."""
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
    """`key` is the worker's seed; `server` and `gateway` are the public keys that it trusts, `url` is the gateway's ("": it is not known); `now` is
    unix seconds."""

    def __init__(self, link: Link, name: str, key: str, server: str, gateway: str, url: str, now: Callable[[], float]) -> None:
        self._link = link
        self._name = name
        self._key = key
        self._server = server
        self._gateway = gateway
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
            return f"another server than the one that it is registered with, or somebody on the way there, answers at {self._url}"
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
                question = secrets.token_urlsafe(16)
                async with session.post(f"{self._url}/api/v1/workers/standing", data=self._asked(challenge, question)) as answer:
                    told = msgspec.json.decode(await answer.read(), type=_Told)
                if not told.signature:
                    return Learned("away", ahead)
                said = words(question, self._name, public_key(self._key), told.standing)
                verify(self._gateway, BECOME, Signed(said, signature_bytes(told.signature)))
                return Learned(told.standing, ahead)
        except BadSignature:
            return Learned("another", ahead)
        except (aiohttp.ClientError, TimeoutError, KeyError, ValueError) as error:
            logger.debug("the gateway does not say", error=str(error) or type(error).__name__)
            return Learned("away")

    def _asked(self, challenge: Challenge, question: str) -> bytes:
        public = public_key(self._key)
        said = words(challenge.server, challenge.nonce, self._name, public, question)
        signature = signature_text(sign(self._key, STANDING, said).signature)
        return msgspec.json.encode({"name": self._name, "key": public, "nonce": challenge.nonce, "question": question, "signature": signature})


class _Told(msgspec.Struct, frozen=True):
    """What the gateway says, or whatever answers in its place. A 404 names no standing: it is `unknown`, and signed as that."""

    standing: Literal["registered", "revoked", "unknown"] = "unknown"
    signature: str = ""
