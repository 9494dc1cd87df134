"""A projection over rows in memory: read in batches of any size, and made anew, it gives the same."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from libs.eventlog.projections import Gone, Table
from proto.catalogue import category_of
from proto.envelope import Fact

Project = Callable[..., Iterable[Any]]
Keys = Callable[[Fact], Iterable[tuple[type[Any], str]]]
Rows = dict[tuple[type[Any], str], Any]


class ReadModel:
    """`rows` at `position`; it reads events of `categories`."""

    def __init__(self, tables: Sequence[Table], categories: frozenset[str], project: Project, keys: Keys) -> None:
        self._tables, self._categories, self._project, self._keys = tables, categories, project, keys
        self._key = {table.row: table.key for table in tables}
        self.rows: Rows = {}
        self.position = 0

    def apply(self, fact: Fact) -> None:
        """As the runtime does it: only rows that were named beforehand can be asked for."""
        self.position = fact.position
        if category_of(fact.stream) not in self._categories:
            return
        named = set(self._keys(fact))

        def get(row: type[Any], key: str, /) -> Any:
            if (row, key) not in named:
                raise KeyError(f"{row.__name__} {key} was not named for {fact}")
            return self.rows.get((row, key))

        for row in list(self._project(fact, get)):
            if isinstance(row, Gone):
                self.rows.pop((row.row, row.key), None)
            else:
                self.rows[type(row), getattr(row, self._key[type(row)])] = row

    def anew(self) -> "ReadModel":
        """An empty one of its kind."""
        return ReadModel(self._tables, self._categories, self._project, self._keys)
