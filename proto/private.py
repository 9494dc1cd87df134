"""What holds what others must not know tells nothing of it where it is shown: in a traceback, a log, a failed assertion."""

from typing import Any

import msgspec


class Private(msgspec.Struct, frozen=True):
    """A base whose kind is all that `repr` gives, Rich's included."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}(…)"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return []
