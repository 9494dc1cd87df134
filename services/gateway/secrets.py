"""Secrets as the gateway passes them on: sealed to the schedulers' key the moment they are known, and kept by nobody here."""

from collections.abc import Awaitable, Callable

import msgspec
import structlog

from libs.bus.bus import Bus, BusUnavailable, TooLarge
from libs.runtime.http import Problem, unavailable
from libs.sealing import seal
from proto.messages import KeepForBuild, KeepSecret, RemoveSecret, RotateKeys, SecretAnswer, SecretRequest, SecretValues
from services.gateway.projection import SealingKeyRow

logger = structlog.get_logger()

_decode = msgspec.msgpack.Decoder(SecretAnswer).decode


class SecretKeeper:
    """Asks a scheduler. `key` gives what to seal to by now, which only schedulers can have put into the log. Every call raises Problem 503 when
    nothing is known to have happened."""

    def __init__(self, bus: Bus, key: Callable[[], Awaitable[SealingKeyRow | None]]) -> None:
        self._bus = bus
        self._key = key

    async def set(self, team: str, name: str, value: str, by: str) -> SecretAnswer:
        return await self._ask_sealed(team, {name: value}, lambda key, sealed: KeepSecret(key=key, sealed=sealed, by=by))

    async def remove(self, team: str, name: str, by: str) -> SecretAnswer:
        return _done(await self._ask(team, RemoveSecret(name=name, by=by)))

    async def keep(self, team: str, build: str, values: dict[str, str]) -> None:
        """Until the build is over."""
        await self._ask_sealed(team, values, lambda key, sealed: KeepForBuild(build=build, key=key, sealed=sealed))

    async def rotate(self, team: str, by: str) -> SecretAnswer:
        """Have a new key to seal to, and the master keys looked at."""
        return _done(await self._ask(team, RotateKeys(by=by)))

    async def _ask_sealed(self, team: str, values: dict[str, str], request: Callable[[str, bytes], SecretRequest]) -> SecretAnswer:
        """Once more, if there is another key by now: the one before may be forgotten where this process slept in between."""
        text = msgspec.msgpack.encode(SecretValues(team=team, values=values))
        key = await self._known()
        answer = await self._ask(team, request(key.entry, seal(key.key, text)))
        if answer.refused and (newer := await self._known()) != key:
            answer = await self._ask(team, request(newer.entry, seal(newer.key, text)))
        return _done(answer)

    async def _known(self) -> SealingKeyRow:
        key = await self._key()
        if key is None:
            raise unavailable("no scheduler has said yet what secrets are to be sealed to")
        return key

    async def _ask(self, team: str, request: SecretRequest) -> SecretAnswer:
        try:
            return _decode(await self._bus.ask(f"secrets.{team}", msgspec.msgpack.encode(request)))
        except BusUnavailable:
            raise unavailable("no scheduler answers, and secrets are kept by them") from None
        except TooLarge:
            raise Problem(413, "too-large", "The request is too large", "the secrets in it are too large together") from None


def _done(answer: SecretAnswer) -> SecretAnswer:
    if answer.refused:
        logger.error("the schedulers refuse a secret", why=answer.refused)
        raise unavailable(f"the schedulers refuse it: {answer.refused}")
    return answer
