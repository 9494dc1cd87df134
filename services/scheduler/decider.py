"""The scheduler's aggregates: the leases of a build, a worker's life, and a secret's versions. Pure."""

from collections.abc import Mapping, Sequence
from typing import Literal, assert_never

import msgspec

from libs.runtime.decisions import Refused
from proto.events.base import Event
from proto.events.lease import LeaseExpired, StageDeferred, StageLeased
from proto.events.secret import SealingKeyMade, SecretRemoved, SecretSet
from proto.events.worker import WorkerBooted, WorkerLost
from services.scheduler.commands import (
    NOBODY,
    SEALING,
    BootWorker,
    Command,
    DeferStage,
    ExpireLease,
    LeaseStage,
    LoseWorker,
    MakeSealingKey,
    RemoveSecret,
    SetSecret,
    secret_stream,
)


class StageLease(msgspec.Struct, frozen=True):
    """The latest lease of a stage."""

    attempt: int
    worker: str
    expired: bool = False


class SecretState(msgspec.Struct, frozen=True):
    """A secret's latest version (0: there was none), and under what it is or was stored."""

    version: int = 0
    entry: str = ""
    there: bool = False


class State(msgspec.Struct, frozen=True, kw_only=True):
    """One stream: `lease-<build>` fills `leases` and `deferred` (by stage), `worker-<worker>-<boot>` fills `life`, `secret-…` fills `secret`."""

    leases: Mapping[str, StageLease] = {}
    deferred: Mapping[str, tuple[int, str]] = {}
    life: Literal["unknown", "up", "lost"] = "unknown"
    secret: SecretState = SecretState()


class SchedulerDecider:
    """Streams `lease-<build>`, `worker-<worker>-<boot>` and `secret-<hash>`."""

    initial = State()

    def stream(self, command: Command, /) -> str:
        match command:
            case LeaseStage() | ExpireLease() | DeferStage():
                return f"lease-{command.build}"
            case BootWorker() | LoseWorker():
                return f"worker-{command.worker}-{command.boot}"
            case SetSecret() | RemoveSecret():
                return secret_stream(command.team, command.name)
            case MakeSealingKey():
                return secret_stream(NOBODY, SEALING)
            case _:
                assert_never(command)

    def decide(self, command: Command, state: State, /) -> Sequence[Event]:
        match command:
            case LeaseStage():
                last = state.leases.get(command.stage)
                if last is not None and command.attempt <= last.attempt:
                    raise Refused("taken", f"attempt {command.attempt} was leased to {last.worker} already")
                return [
                    StageLeased(
                        stage=command.stage,
                        attempt=command.attempt,
                        worker=command.worker,
                        boot=command.boot,
                        credit=command.credit,
                        term=command.term,
                        lease_seconds=command.lease_seconds,
                        why=command.why,
                        refused=command.refused,
                        secrets=command.secrets,
                    )
                ]
            case ExpireLease():
                last = state.leases.get(command.stage)
                if last is None or last.attempt != command.attempt or last.expired:
                    return []
                return [LeaseExpired(stage=command.stage, attempt=command.attempt, worker=last.worker, evidence=command.evidence, term=command.term)]
            case DeferStage():
                last = state.leases.get(command.stage)
                if last is not None and last.attempt >= command.attempt:
                    return []
                if state.deferred.get(command.stage) == (command.attempt, command.reason):
                    return []
                return [
                    StageDeferred(stage=command.stage, attempt=command.attempt, reason=command.reason, refused=command.refused, term=command.term)
                ]
            case BootWorker():
                if state.life == "up":
                    return []
                return [
                    WorkerBooted(
                        worker=command.worker,
                        boot=command.boot,
                        since=command.since,
                        slots=command.slots,
                        offers=command.offers,
                        about=command.about,
                        term=command.term,
                    )
                ]
            case LoseWorker():
                if state.life != "up":
                    return []
                return [WorkerLost(worker=command.worker, boot=command.boot, reason=command.reason, term=command.term)]
            case SetSecret():
                return [SecretSet(name=command.name, version=state.secret.version + 1, entry=command.entry, by=command.by)]
            case RemoveSecret():
                if not state.secret.there:
                    return []
                return [SecretRemoved(name=command.name, version=state.secret.version, by=command.by)]
            case MakeSealingKey():
                if command.after not in (None, state.secret.version):
                    return []
                return [SealingKeyMade(version=state.secret.version + 1, entry=command.entry, key=command.key, master=command.master, by=command.by)]
            case _:
                assert_never(command)

    def evolve(self, state: State, event: Event, /) -> State:
        match event:
            case StageLeased():
                lease = StageLease(event.attempt, event.worker)
                return msgspec.structs.replace(state, leases={**state.leases, event.stage: lease})
            case LeaseExpired():
                lease = StageLease(event.attempt, event.worker, expired=True)
                return msgspec.structs.replace(state, leases={**state.leases, event.stage: lease})
            case StageDeferred():
                return msgspec.structs.replace(state, deferred={**state.deferred, event.stage: (event.attempt, event.reason)})
            case WorkerBooted():
                return msgspec.structs.replace(state, life="up")
            case WorkerLost():
                return msgspec.structs.replace(state, life="lost")
            case SecretSet() | SealingKeyMade():
                return msgspec.structs.replace(state, secret=SecretState(event.version, event.entry, True))
            case SecretRemoved():
                return msgspec.structs.replace(state, secret=msgspec.structs.replace(state.secret, there=False))
            case _:
                raise ValueError(f"{type(event).__name__} on a lease's, worker's or secret's stream")
