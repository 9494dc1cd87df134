"""What holds a secret shows none of it by accident: not in a traceback, a log, a failed assertion."""

from typing import Any

import msgspec

SECRET = frozenset({"token", "key"})


class Discreet(msgspec.Struct, frozen=True):
    """A base whose `repr` leaves out the fields that are named like a secret, Rich's included."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.__rich_repr__())})"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [(name, getattr(self, name)) for name in self.__struct_fields__ if name not in SECRET]
