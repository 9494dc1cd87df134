"""Placement alone: what a decision costs, by fleet and queue, with the trees that workers have; and what its indexes weigh."""

import random
import time
import tracemalloc

from msgspec.structs import replace

from proto.events.base import ArtifactRef
from proto.messages import MAX_HINTS, TREE_HINT, Attempt, Credit, Offers
from proto.plan import Requirements
from services.scheduler.placement import Assignment, place
from services.scheduler.pool import Pool, WorkerView
from services.scheduler.queue import Queue, Queued
from tests.bench.figures import Figure, at_most, percentile

SLOTS = 4
TEAMS = 50
TAGS = 10
RESOURCES = 20
TREES = 2_000
GOAL = at_most(2000)
FLAT = at_most(1.2)


def placement(fleets: tuple[int, ...], queues: tuple[int, ...], decisions: int) -> list[Figure]:
    """Two cases: a full fleet where one slot becomes free (what a deep queue is like), and a fleet all of whose workers are free, so that the best of
    all of them is wanted (what a queue that has just come is like, and the dearest)."""
    figures: list[Figure] = []
    for size in fleets:
        medians: dict[int, float] = {}
        for length in queues:
            bench = _Bench(size, length)
            figures.append(bench.weight)
            what = f"{size:,} workers, {length:,} queued, {RESOURCES} trees each"
            for case, took in (("one slot becomes free", bench.full(decisions)), ("every worker is free", bench.idle(decisions))):
                medians[length] = medians.get(length, 0.0) + percentile(took, 0.5)
                figures.append(Figure(f"placement, {what}, {case}, p50", percentile(took, 0.5), "µs", GOAL))
                figures.append(Figure(f"placement, {what}, {case}, p99", percentile(took, 0.99), "µs", GOAL))
        growth = medians[queues[-1]] / medians[queues[1]]
        figures.append(Figure(f"placement, {size:,} workers, {queues[-1]:,} queued ÷ {queues[1]:,}, both cases", growth, "×", FLAT))
    return figures


class _Bench:
    """A fleet and a queue, and decisions with all that follows from them in both."""

    def __init__(self, workers: int, length: int) -> None:
        self._random = random.Random(7)
        self._trees = [f"{self._random.getrandbits(256):064x}" for _ in range(TREES)]
        self._hints = [tree[:TREE_HINT] for tree in self._trees]
        self._number = 0
        waiting = [self._queued() for _ in range(length)]
        tracemalloc.start()
        self.pool = Pool()
        self._views = [self._worker(n) for n in range(workers)]
        for view in self._views:
            self.pool.put(view)
        self.queue = Queue()
        for queued in waiting:
            self.queue.add(queued)
        weight, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        self.weight = Figure(f"placement, indexes of {workers:,} workers with {MAX_HINTS} trees each, and of {length:,} queued", weight / 1e6, "MB")

    def full(self, decisions: int) -> list[float]:
        """Microseconds of this processor for each: a slot is given back, and away again."""
        for view in self._views:
            self.pool.put(replace(view, credits=[], busy=SLOTS))
        while self.queue.awake:
            place(self.queue, self.pool, 0.0, 0)
        return [self._timed(self._able()) for _ in range(decisions)]

    def idle(self, decisions: int) -> list[float]:
        for view in self._views:
            self.pool.put(view)
        place(self.queue, self.pool, 0.0, 0)
        return [self._timed(None) for _ in range(decisions)]

    def _timed(self, freed: WorkerView | None) -> float:
        arriving = self._queued()
        began = time.thread_time()
        self.queue.add(arriving)
        if freed is not None:
            self.pool.put(replace(freed, credits=freed.credits[:1], busy=SLOTS - 1))
        [assignment] = place(self.queue, self.pool, float(self._number), 1)
        self._lease(assignment)
        return (time.thread_time() - began) * 1e6

    def _able(self) -> WorkerView:
        """A worker that can take the one that arrives next."""
        return self._views[self._random.randrange(len(self._views) // TAGS) * TAGS + (self._number + 1) % TAGS]

    def _lease(self, assignment: Assignment) -> None:
        self.queue.remove(assignment.queued.attempt, leased_at=float(self._number))
        self.queue.count(assignment.queued.team, 1)
        view = self.pool.at(int(assignment.worker[1:]))
        self.pool.put(replace(view, credits=view.credits[:-1], busy=view.busy + 1))

    def _worker(self, number: int) -> WorkerView:
        name = f"w{number}"
        return WorkerView(
            worker=name,
            boot="1",
            slots=SLOTS,
            offers=Offers(tags=(f"tag{number % TAGS}", f"host-{name}"), user=True),
            credits=[Credit(f"{name}-{n}", b"") for n in range(SLOTS)],
            cached=tuple(self._random.sample(self._hints, MAX_HINTS)),
        )

    def _queued(self) -> Queued:
        self._number += 1
        number = self._number
        sizes = {tree: self._random.randrange(1, 1 << 30) for tree in self._random.sample(self._trees, RESOURCES)}
        return Queued(
            attempt=Attempt(f"b{number}", "main", 1),
            team=f"team{number % TEAMS}",
            requirements=Requirements(tags=(f"tag{number % TAGS}",) if number % 2 else ()),
            position=number,
            queued_at=float(number),
            correlation_id="",
            event_id="",
            inputs={f"i{n}": ArtifactRef(id="", digest=tree, size=size) for n, (tree, size) in enumerate(sizes.items())},
        )
