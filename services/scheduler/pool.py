"""The fleet as placement reads it: sets of workers, each set one whole number in which every worker has a bit.

What a requirement leaves of 10,000 workers is then an `&` of 1,250 bytes. Each set is kept up to date by the change of a single worker; nothing
here is ever computed from the whole fleet."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import msgspec

from proto.messages import Credit, Offers
from services.scheduler.needs import offered

LEVELS = 32
"""Loads are told apart this finely: exactly, up to so many slots."""
REMEMBERED = 2000
"""Sets of needs whose standing is remembered."""
DRAINING, IN_TROUBLE = "draining", "in trouble"
"""Why a worker may take nothing, whatever it offers."""
FEW = 16
"""Up to so many holders of a tree are listed one by one, which is smaller than a set of bits."""


class WorkerView(msgspec.Struct, frozen=True, kw_only=True):
    """A worker as placement sees it: `credits` are offers that were not used yet, `busy` its slots in use, `closed` why it may take nothing ("" if it
    may), `cached` the trees it has (see Availability)."""

    worker: str
    boot: str
    slots: int
    offers: Offers
    credits: Sequence[Credit]
    busy: int = 0
    closed: str = ""
    cached: tuple[str, ...] = ()

    def load(self, more: int = 0) -> float:
        """The share of its slots in use, were `more` of them used."""
        return (self.busy + more) / self.slots if self.slots else 1.0

    def level(self, more: int = 0) -> int | None:
        """Which level of load it is free at; None when it is not free."""
        if self.closed or len(self.credits) <= more:
            return None
        return max(0, min(LEVELS - 1, int(self.load(more) * LEVELS)))


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """`able` are those that offer all that is needed and may take work, free or not; `refused` counts the others by the first reason; `rarest` is the
    need that the fewest offer: whoever comes to be able offers that. `missing` are the needs that nobody offers, `closed` why those may take no work
    that offer all."""

    able: int
    refused: dict[str, int]
    rarest: str
    missing: tuple[str, ...]
    closed: tuple[str, ...]


class Pool:
    """Workers by what matters to placement. `takers` are those that may take work; `levels` those that are free, by load. `generation` is another
    object whenever somebody came, went, drained or changed what it offers."""

    def __init__(self, views: Iterable[WorkerView] = ()) -> None:
        self._bits: dict[str, int] = {}
        self._views: list[WorkerView | None] = []
        self._spare: list[int] = []
        self._offering: dict[str, int] = {}
        self._holding = _Holders()
        self._freed: dict[str, None] = {}
        self._standings: dict[tuple[str, ...], Standing] = {}
        self._closed: dict[str, int] = {}
        self.takers = 0
        self.levels = [0] * LEVELS
        self.generation = object()
        for view in views:
            self.put(view)

    def put(self, view: WorkerView) -> None:
        """A worker is as this says from now on."""
        bit = self._bits.get(view.worker)
        if bit is None:
            bit = self._bits[view.worker] = self._spare.pop() if self._spare else len(self._views)
            if bit == len(self._views):
                self._views.append(None)
        old = self._views[bit]
        mark = 1 << bit
        able_anew = old is None or old.offers != view.offers or old.closed != view.closed
        if able_anew:
            self._disable(bit)
            self._enable(mark, view)
        before, now = old.level() if old is not None else None, view.level()
        if before != now:
            if before is not None:
                self.levels[before] ^= mark
            if now is not None:
                self.levels[now] ^= mark
        if now is not None and (before is None or able_anew):
            self._freed.update(dict.fromkeys(offered(view.offers)))
        cached = old.cached if old is not None else ()
        if cached != view.cached:
            self._holding.change(bit, cached, view.cached)
        self._views[bit] = view

    def remove(self, worker: str) -> None:
        bit = self._bits.pop(worker, None)
        if bit is None:
            return
        view = self.at(bit)
        level = view.level()
        if level is not None:
            self.levels[level] ^= 1 << bit
        self._holding.change(bit, view.cached, ())
        self._disable(bit)
        self._views[bit] = None
        self._spare.append(bit)

    def _enable(self, mark: int, view: WorkerView) -> None:
        self._new_generation()
        if view.closed:
            self._closed[view.closed] = self._closed.get(view.closed, 0) | mark
        else:
            self.takers |= mark
        for word in offered(view.offers):
            self._offering[word] = self._offering.get(word, 0) | mark

    def _disable(self, bit: int) -> None:
        view = self._views[bit]
        if view is None:
            return
        self._new_generation()
        others = ~(1 << bit)
        self.takers &= others
        if view.closed:
            self._closed[view.closed] &= others
        for word in set(offered(view.offers)):
            left = self._offering[word] & others
            if left:
                self._offering[word] = left
            else:
                del self._offering[word]

    def _new_generation(self) -> None:
        self.generation = object()
        self._standings.clear()

    # --- what placement asks ---------------------------------------------------------------------------------------------------------

    def at(self, bit: int) -> WorkerView:
        view = self._views[bit]
        assert view is not None, "a bit of a set is a worker's"
        return view

    def standing(self, needs: Sequence[str]) -> "Standing":
        """How the fleet stands to those who need all of it: known until the generation changes."""
        key = tuple(needs)
        known = self._standings.get(key)
        if known is None:
            if len(self._standings) >= REMEMBERED:
                self._standings.clear()
            known = self._standings[key] = self._standing(key)
        return known

    def _standing(self, needs: Sequence[str]) -> "Standing":
        able, refused = self.takers, {why: workers.bit_count() for why, workers in self._closed.items()}
        closed, missing = dict(self._closed), []
        rarest, fewest = "", len(self._views) + 1
        for word in needs:
            offering = self._offering.get(word, 0)
            if offering.bit_count() < fewest:
                rarest, fewest = word, offering.bit_count()
            refused[word] = (able & ~offering).bit_count()
            able &= offering
            closed = {why: workers & offering for why, workers in closed.items()}
            if not offering:
                missing.append(word)
        return Standing(
            able=able,
            refused={word: count for word, count in refused.items() if count},
            rarest=rarest,
            missing=tuple(missing),
            closed=tuple(sorted(why for why, workers in closed.items() if workers)),
        )

    def holders(self, tree: str) -> int:
        return self._holding.of(tree)

    def freed(self) -> Mapping[str, None]:
        """What the workers offer that have become free, or able, since this was asked last."""
        freed, self._freed = self._freed, {}
        return freed


def bits(workers: int) -> Iterator[int]:
    """The members of a set."""
    while workers:
        lowest = workers & -workers
        yield lowest.bit_length() - 1
        workers ^= lowest


class _Holders:
    """Who has a tree: a few by number, many as a set of bits."""

    def __init__(self) -> None:
        self._by_tree: dict[str, tuple[int, ...] | int] = {}

    def of(self, tree: str) -> int:
        holders = self._by_tree.get(tree, 0)
        if isinstance(holders, int):
            return holders
        union = 0
        for bit in holders:
            union |= 1 << bit
        return union

    def change(self, bit: int, before: Iterable[str], after: Iterable[str]) -> None:
        old, new = set(before), set(after)
        for tree in old - new:
            self._drop(tree, bit)
        for tree in new - old:
            self._add(tree, bit)

    def _add(self, tree: str, bit: int) -> None:
        holders = self._by_tree.get(tree, ())
        if isinstance(holders, int):
            self._by_tree[tree] = holders | 1 << bit
        elif len(holders) < FEW:
            self._by_tree[tree] = (*holders, bit)
        else:
            self._by_tree[tree] = self.of(tree) | 1 << bit

    def _drop(self, tree: str, bit: int) -> None:
        holders = self._by_tree[tree]
        left: tuple[int, ...] | int
        if isinstance(holders, int):
            left = holders & ~(1 << bit)
            if left.bit_count() <= FEW // 2:
                left = tuple(bits(left))
        else:
            left = tuple(each for each in holders if each != bit)
        if left:
            self._by_tree[tree] = left
        else:
            del self._by_tree[tree]
