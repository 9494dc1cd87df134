"""Secrets as the gateway passes them on: sealed to the schedulers' key the moment they are known, and kept by nobody here."""

import msgspec
import structlog

from libs.bus.bus import Bus, BusUnavailable, TooLarge
from libs.runtime.http import Problem, unavailable
from libs.sealing import seal
from proto.messages import KeepForBuild, KeepSecret, RemoveSecret, SecretAnswer, SecretRequest, SecretValues

logger = structlog.get_logger()

_decode = msgspec.msgpack.Decoder(SecretAnswer).decode


class SecretKeeper:
    """Asks a scheduler. `sealing_key` is the schedulers' public key. Every call raises Problem 503 when nothing is known to have happened."""

    def __init__(self, bus: Bus, sealing_key: str) -> None:
        """Raises ValueError for what is no key."""
        seal(sealing_key, b"")
        self._bus = bus
        self._sealing_key = sealing_key

    async def set(self, team: str, name: str, value: str, by: str) -> SecretAnswer:
        return await self._ask(team, KeepSecret(sealed=self._sealed(team, {name: value}), by=by))

    async def remove(self, team: str, name: str, by: str) -> SecretAnswer:
        return await self._ask(team, RemoveSecret(name=name, by=by))

    async def keep(self, team: str, build: str, values: dict[str, str]) -> None:
        """Until the build is over."""
        await self._ask(team, KeepForBuild(build=build, sealed=self._sealed(team, values)))

    def _sealed(self, team: str, values: dict[str, str]) -> bytes:
        return seal(self._sealing_key, msgspec.msgpack.encode(SecretValues(team=team, values=values)))

    async def _ask(self, team: str, request: SecretRequest) -> SecretAnswer:
        try:
            answer = _decode(await self._bus.ask(f"secrets.{team}", msgspec.msgpack.encode(request)))
        except BusUnavailable:
            raise unavailable("no scheduler answers, and secrets are kept by them") from None
        except TooLarge:
            raise Problem(413, "too-large", "The request is too large", "the secrets in it are too large together") from None
        if answer.refused:
            logger.error("the schedulers refuse a secret", why=answer.refused)
            raise unavailable(f"the schedulers refuse it: {answer.refused}")
        return answer
