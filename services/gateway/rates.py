"""How often those may ask whom nobody knows. Pure: the clock (monotonic seconds) is passed in."""

from collections import OrderedDict
from collections.abc import Callable

from libs.runtime.http import Problem

MANY = 10_000


class Rate:
    """`burst` requests at once from each address, and `per_second` of them after that."""

    def __init__(self, per_second: float, burst: int, clock: Callable[[], float]) -> None:
        self._per_second = per_second
        self._burst = burst
        self._clock = clock
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()
        """What each may still ask, and since when; whoever asked last is last."""

    def take(self, address: str) -> None:
        """Raises Problem 429."""
        now = self._clock()
        left, since = self._left.pop(address, (float(self._burst), now))
        left = min(float(self._burst), left + (now - since) * self._per_second)
        self._left[address] = (left - 1 if left >= 1 else left), now
        if len(self._left) > MANY:
            self._left.popitem(last=False)
        if left < 1:
            wait = max(1, round((1 - left) / self._per_second))
            raise Problem(429, "too-many", "Too many requests", "try again soon", headers={"Retry-After": str(wait)})
