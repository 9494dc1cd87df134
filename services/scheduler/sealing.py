"""The keys to which the gateway seals secrets: made by whoever leads, announced in the log, forgotten when nothing that is sealed to them can come.

A private key is a value in the vault, under the master key, like any other: so it is encrypted anew with them, and any scheduler opens what names it,
however much of the log it has read. One that is forgotten opens nothing any more, whoever has recorded what was on the bus.
"""

from collections.abc import Callable

from libs.runtime.commands import CommandLoop, Outcome
from libs.runtime.decisions import Cause
from libs.sealing import NotSealed, new_sealing_key, sealing_public_key, unseal
from services.scheduler.commands import NOBODY, SEALING, Command, MakeSealingKey
from services.scheduler.decider import State
from services.scheduler.secret_index import Entry, SealingKey
from services.scheduler.vault import Vault

ROTATE_AFTER = 30 * 86_400.0
"""Seconds that one key is sealed to."""
KEPT_FOR = 3_600.0
"""Seconds that the earlier ones stay: far longer than a question is under way, or a gateway behind the log. One that is later yet is refused, and
seals to the new key."""
SYSTEM = "system"


class SealingKeys:
    """Calls raise LogUnavailable. `now` is the log's own clock (unix seconds), as the latest key's age is: whatever a machine's shows, no more
    keys are made."""

    def __init__(self, vault: Vault, commands: CommandLoop[Command, State], ids: Callable[[], str], now: Callable[[], float]) -> None:
        self._vault = vault
        self._commands = commands
        self._ids = ids
        self._now = now

    async def opened(self, entry: str, sealed: bytes) -> bytes:
        """What was sealed to the key that is stored as `entry`. Raises NotSealed."""
        key = (await self._vault.read([_entry(entry)])).get(_entry(entry))
        if not isinstance(key, str):
            raise NotSealed
        return unseal(key, sealed)

    def due(self, latest: SealingKey | None, master: str) -> bool:
        """Whether there shall be another: the latest is old, or was made under another master key, which may be known to others."""
        return latest is None or latest.master != master or self._now() - latest.made_at > ROTATE_AFTER

    async def make(self, by: str, after: int | None = None) -> Outcome:
        """Another one, if there were `after` before (None: in any case). Of several who make it at once one does."""
        entry, private, master = self._ids(), new_sealing_key(), self._vault.keys.first
        await self._vault.store({_entry(entry): private})
        command = MakeSealingKey(entry=entry, key=sealing_public_key(private), master=master, by=by, after=after)
        return await self._commands.execute(command, Cause(team=SYSTEM, correlation_id=entry, causation_id=entry, actor=by))

    async def forget(self, latest: SealingKey) -> None:
        """Those before the latest, once it is old enough."""
        await self._vault.forget_before(latest.entry, KEPT_FOR)


def _entry(entry: str) -> Entry:
    return Entry(entry, NOBODY, SEALING)
