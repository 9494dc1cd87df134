"""Secrets, of which only names are shown."""

from datetime import datetime

from proto.api.bodies import Answer, Request
from proto.private import Private


class SecretValue(Private, Request, frozen=True, kw_only=True):
    """The value of a secret: text of at most 64 KiB (UTF-8)."""

    value: str


class Secret(Answer, frozen=True, kw_only=True):
    """A secret that the team has. Its value is shown to nobody."""

    name: str
    version: int
    set_at: datetime
    set_by: str


class SecretPage(Answer, frozen=True, kw_only=True):
    """Secrets by name. `next` is the cursor of the next page, null at the end."""

    items: list[Secret]
    next: str | None = None


class SecretKeys(Answer, frozen=True, kw_only=True):
    """`sealing_version`: which key secrets are sealed to on their way to the schedulers. `master_key`: the id of the master key that is first;
    `values`: how many values are under which master key. Those under others than the first are being encrypted anew."""

    sealing_version: int
    master_key: str
    values: dict[str, int]
