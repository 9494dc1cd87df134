"""Packages: an attempt made ready for one credit, sealed to its key and signed."""

from collections.abc import Callable

import msgspec
from nacl.exceptions import CryptoError
from nacl.public import PublicKey, SealedBox

from libs.tokens import BuildToken, sign, sign_token
from proto.messages import Control, Credit, Package
from proto.plan import Stage
from services.scheduler.queue import Queued
from services.scheduler.vault import Given

TOKEN_SLACK = 900.0
"""Seconds a build token outlives its stage's timeouts: uploads at the end, retries."""


class Packer:
    """Makes the messages that the scheduler signs. `now` is unix seconds."""

    def __init__(self, server_key: str, artifacts_url: str, lease_seconds: float, now: Callable[[], float]) -> None:
        self._key = server_key
        self._artifacts_url = artifacts_url
        self._lease_seconds = lease_seconds
        self._now = now

    def package(self, queued: Queued, stage: Stage, given: Given, worker: str, key: str, boot: str, credit: Credit) -> bytes | None:
        """The message for `execute_build_package.<worker>`; `key` is the worker's. None: nothing can be sealed to the credit's key."""
        attempt = queued.attempt
        claims = BuildToken(
            team=queued.team,
            build=attempt.build,
            stage=attempt.stage,
            attempt=attempt.number,
            worker=worker,
            key=key,
            inputs={name: ref.digest for name, ref in queued.inputs.items()},
            outputs=[f"{step.name}/{output.name}" for step in stage.steps for output in step.config.outputs],
            exp=0,
        )
        seconds = sum(step.timeout for step in stage.steps) + TOKEN_SLACK
        package = Package(
            attempt=attempt,
            team=queued.team,
            worker=worker,
            boot=boot,
            credit=credit.nonce,
            lease_seconds=self._lease_seconds,
            stage=stage,
            inputs=queued.inputs,
            token=sign_token(self._key, msgspec.to_builtins(claims), seconds, self._now()),
            artifacts_url=self._artifacts_url,
            secrets=given.values,
            unreadable=given.unreadable,
        )
        try:
            sealed = SealedBox(PublicKey(credit.key)).encrypt(msgspec.msgpack.encode(package))
        except CryptoError:
            return None
        return msgspec.msgpack.encode(sign(self._key, f"execute_build_package.{worker}", sealed))

    def control(self, worker: str, control: Control) -> bytes:
        """The message for `control.<worker>`."""
        return msgspec.msgpack.encode(sign(self._key, f"control.{worker}", msgspec.msgpack.encode(control)))
