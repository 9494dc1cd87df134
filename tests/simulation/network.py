"""What is on its way: it may be lost, come twice, late, and in any order."""

import random
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Network(Generic[T]):
    """Messages on their way. `loss` and `repeats` are probabilities; where `loss` is 0, everything arrives some day."""

    def __init__(self, chance: random.Random, loss: float, repeats: float) -> None:
        self._chance = chance
        self._loss, self._repeats = loss, repeats
        self._under_way: list[T] = []

    def __len__(self) -> int:
        return len(self._under_way)

    def send(self, message: T) -> None:
        self._under_way.append(message)

    def deliver(self, to: Callable[[T], bool]) -> None:
        """Some, in any order, more when there are many; `to` says whether one is done with."""
        for _ in range(1 + len(self._under_way) // 3):
            self._deliver(to)

    def _deliver(self, to: Callable[[T], bool]) -> None:
        chosen = self._chance.randrange(len(self._under_way))
        message, self._under_way[chosen] = self._under_way[chosen], self._under_way[-1]
        self._under_way.pop()
        if self._chance.random() < self._loss:
            return
        if not to(message) or self._chance.random() < self._repeats:
            self._under_way.append(message)

    def heal(self) -> None:
        """From now on nothing is lost, and nothing comes twice."""
        self._loss = self._repeats = 0.0

    def deliver_all(self, to: Callable[[T], bool]) -> None:
        """All that is there now, in order, but for what is lost."""
        messages, self._under_way = self._under_way, []
        self._under_way += [message for message in messages if self._chance.random() >= self._loss and not to(message)]
