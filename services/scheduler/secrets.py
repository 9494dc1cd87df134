"""Secrets: set and removed when the gateway asks, forgotten when nobody may need them any more; and the keys around them, renewed. (Packages take
them from the vault.)

A value is stored before the event that makes it count; one that no event ever tells of is dropped in time."""

import asyncio
from collections.abc import Callable, Mapping, Sequence

import msgspec
import structlog

from libs.bus.bus import Bus
from libs.eventlog.log import EventLog, LogUnavailable
from libs.runtime.commands import CommandLoop
from libs.runtime.decisions import Cause
from libs.sealing import NotSealed
from proto.envelope import UnreadableEvent
from proto.events.base import Event
from proto.events.build import BuildFinished
from proto.events.secret import SealingKeyMade, SecretRemoved, SecretSet
from proto.messages import KeepForBuild, KeepSecret, RotateKeys, SecretAnswer, SecretRequest, SecretValues
from proto.messages import RemoveSecret as RemoveRequest
from proto.secrets import OWN
from services.scheduler.commands import Command, RemoveSecret, SetSecret, secret_stream
from services.scheduler.decider import State
from services.scheduler.master_keys import Keyring
from services.scheduler.readable import readable
from services.scheduler.sealing import SealingKeys
from services.scheduler.secret_index import Entry, SecretIndex
from services.scheduler.vault import Vault

logger = structlog.get_logger()

GROUP = "scheduler"
LOOK_EVERY = 3.0
"""Seconds between two looks for builds that have ended, and at the keys."""
AT_FIRST = 0.1
"""The same, while there is no key to seal to."""
SWEEP_EVERY = 600.0
SETTLED = 600.0
"""Seconds after which what was stored has its event, or never will."""
ASKED_AT_ONCE = 200

_REQUEST = msgspec.msgpack.Decoder(SecretRequest)
_VALUES = msgspec.msgpack.Decoder(SecretValues)


class Secrets:
    """`index` gives the fold of the log; `leads`: whether this instance leads, and has read the log. `clock` is monotonic seconds."""

    def __init__(
        self,
        *,
        log: EventLog,
        bus: Bus,
        commands: CommandLoop[Command, State],
        vault: Vault,
        sealing: SealingKeys,
        index: Callable[[], SecretIndex],
        leads: Callable[[], bool],
        ids: Callable[[], str],
        clock: Callable[[], float],
    ) -> None:
        self._log = log
        self._bus = bus
        self._commands = commands
        self._vault = vault
        self._sealing = sealing
        self._index = index
        self._leads = leads
        self._ids = ids
        self._clock = clock
        self._created = False
        self._minded: Keyring | None = None
        self._trouble: str | None = "has not looked at its keys yet"

    @property
    def problem(self) -> str | None:
        """Why a secret cannot be set, or read."""
        return self._trouble or (None if self._index().sealing is not None else "there is no key to seal to yet")

    # --- for the gateway

    async def serve(self) -> None:
        """Do what the gateway asks, for ever."""
        async with self._bus.answering("secrets.*", GROUP, self._answer):
            await asyncio.Event().wait()

    async def _answer(self, subject: str, question: bytes) -> bytes:
        """What cannot be read is repeated nowhere, nor is what a decoder says of it: it may hold a value."""
        try:
            request = _REQUEST.decode(question)
        except msgspec.MsgspecError:
            answer = SecretAnswer(refused="it is no request that schedulers know")
        else:
            answer = await self._answer_to(subject.partition(".")[2], request)
        return msgspec.msgpack.encode(answer)

    async def _answer_to(self, team: str, request: SecretRequest) -> SecretAnswer:
        try:
            await self._create()
            return await self._do(team, request)
        except NotSealed:
            return SecretAnswer(refused="what it holds was not sealed to a key of the schedulers' for this")
        except UnreadableEvent as error:
            logger.error("a secret's history cannot be read", team=team, error=str(error))
            return SecretAnswer(refused=str(error))

    async def _do(self, team: str, request: SecretRequest) -> SecretAnswer:
        match request:
            case KeepSecret():
                values = await self._unsealed(team, request)
                if len(values) != 1:
                    raise NotSealed
                [(name, value)] = values.items()
                return await self._set(team, name, value, request.by)
            case KeepForBuild():
                values = await self._unsealed(team, request)
                own = {name: value for name, value in values.items() if name.startswith(f"{OWN}{request.build}/")}
                await self._vault.store({Entry(name, team, name, request.build): value for name, value in own.items()})
                return SecretAnswer()
            case RemoveRequest():
                return await self._remove(team, request.name, request.by)
            case RotateKeys():
                return await self._renew(request.by)

    async def _unsealed(self, team: str, request: KeepSecret | KeepForBuild) -> Mapping[str, str]:
        opened = await self._sealing.opened(request.key, request.sealed)
        try:
            values = _VALUES.decode(opened)
        except msgspec.MsgspecError:
            raise NotSealed from None
        if values.team != team:
            raise NotSealed
        return values.values

    async def _set(self, team: str, name: str, value: str, by: str) -> SecretAnswer:
        entry = Entry(self._ids(), team, name)
        await self._vault.store({entry: value})
        outcome = await self._commands.execute(SetSecret(team=team, name=name, entry=entry.entry, by=by), _cause(team, entry.entry, by))
        await self._vault.store({entry: value})  # again: if this process slept in between, it may have been dropped
        return SecretAnswer(position=outcome.position, version=outcome.state.secret.version)

    async def _remove(self, team: str, name: str, by: str) -> SecretAnswer:
        outcome = await self._commands.execute(RemoveSecret(team=team, name=name, by=by), _cause(team, self._ids(), by))
        await self._vault.remove(outcome.state.secret.entry)
        return SecretAnswer(position=outcome.position, version=outcome.state.secret.version)

    async def _renew(self, by: str) -> SecretAnswer:
        if await self._look() is None:
            return SecretAnswer(refused=self._trouble or "")
        outcome = await self._sealing.make(by)
        under = {key_id: count for key_id, count in (await self._vault.under()).items() if count}
        return SecretAnswer(position=outcome.position, version=outcome.state.secret.version, master=self._vault.keys.first, under=under)

    # --- housekeeping

    async def tidy(self) -> None:
        """For ever: mind the keys, forget what was kept for builds that are over, and now and then what nothing tells of."""
        swept = self._clock()
        while True:
            try:
                await self._create()
                await self.mind_keys()
                over = self._index().over
                builds = [over.popleft() for _ in range(len(over))]
                if self._leads() and builds:
                    await self._vault.forget_builds(builds)
                if self._leads() and self._clock() - swept > SWEEP_EVERY:
                    swept = self._clock()
                    await self.sweep(SETTLED)
                    await self._rotate()  # another instance may have had older keys for longer
            except (LogUnavailable, UnreadableEvent) as error:
                logger.warning("secrets are not minded now", error=f"{type(error).__name__}: {error}")
            await asyncio.sleep(LOOK_EVERY if self._index().sealing is not None else AT_FIRST)

    async def _create(self) -> None:
        if not self._created:
            await self._vault.create()
            self._created = True

    async def mind_keys(self) -> None:
        """Once for each change of the master keys: what is under others than the first is encrypted anew. What nothing opens is said. Whoever leads
        sees to it that what the gateway seals to is new enough, too."""
        if (keys := await self._look()) is None:
            return
        if self._minded is not keys:
            await self._rotate()
            self._minded = keys
        latest = self._index().sealing
        if self._leads() and self._sealing.due(latest, keys.first):
            made = await self._sealing.make(GROUP, after=latest.version if latest else 0)
            logger.info("what is sealed to has changed", version=made.state.secret.version)

    async def _look(self) -> Keyring | None:
        try:
            return await self._vault.look()
        except (ValueError, OSError) as error:  # BadKeys, and what is no text
            self._trouble, self._minded = f"the master keys cannot be read: {error}", None
            return None

    async def _rotate(self) -> None:
        renewed, missing = await self._vault.rotate()
        self._trouble = "; ".join(f"the master key `{key_id}` is missing: {count} values cannot be read" for key_id, count in missing.items()) or None
        logger.info("the secrets' master keys are minded", first=self._vault.keys.first, renewed=renewed, missing=sorted(missing))

    async def sweep(self, settled: float) -> None:
        """Drop what was stored more than `settled` seconds ago and does not count: no event tells of it, a newer one is set, its build is over
        (or, after a day, was never made). Where that cannot be read, it counts."""
        after = ""
        while page := await self._vault.older(settled, after, ASKED_AT_ONCE):
            after = page[-1][0].entry
            streams = {entry: f"build-{entry.build}" if entry.build else secret_stream(entry.team, entry.name) for entry, _ in page}
            told = readable(await self._log.read_streams(list(set(streams.values()))))
            known = [(entry, old, told[streams[entry]]) for entry, old in page if streams[entry] in told]
            await self._vault.drop([entry.entry for entry, old, history in known if not _counts(entry, history, old)])
        if (latest := self._index().sealing) is not None:
            await self._sealing.forget(latest)


def _counts(entry: Entry, history: Sequence[Event], old: bool) -> bool:
    """Whether it may yet be needed, by what its stream tells."""
    if not history:
        return bool(entry.build) and not old
    if entry.build:
        return not any(isinstance(event, BuildFinished) for event in history)
    if isinstance(history[-1], SealingKeyMade):
        return any(isinstance(event, SealingKeyMade) and event.entry == entry.entry for event in history)  # earlier ones, too, for a while
    last = next(event for event in reversed(history) if isinstance(event, SecretSet | SecretRemoved))
    return isinstance(last, SecretSet) and last.entry == entry.entry


def _cause(team: str, correlation_id: str, by: str) -> Cause:
    return Cause(team=team, correlation_id=correlation_id, causation_id=correlation_id, actor=by)
