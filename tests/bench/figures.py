"""A figure, its goal, and the table of them."""

from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec


class Goal(msgspec.Struct, frozen=True):
    """`at least` for rates, `at most` for times and sizes. Half of a goal is half the rate, or twice the time."""

    bound: Literal["at least", "at most"]
    value: float

    def reached(self, measured: float, half: bool = False) -> bool:
        if self.bound == "at least":
            return measured >= self.value * (0.5 if half else 1.0)
        return measured <= self.value * (2.0 if half else 1.0)

    def __str__(self) -> str:
        return f"{'≥' if self.bound == 'at least' else '≤'} {number(self.value)}"


def at_least(value: float) -> Goal:
    return Goal("at least", value)


def at_most(value: float) -> Goal:
    return Goal("at most", value)


class Figure(msgspec.Struct, frozen=True):
    """Something measured."""

    name: str
    measured: float
    unit: str
    goal: Goal | None = None


def number(value: float) -> str:
    """Three significant digits, thousands apart; a whole number as it is."""
    if abs(value) >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def table(figures: Iterable[Figure]) -> str:
    """Figure, measured, goal, and whether the goal, or half of it, is reached."""
    rows = [("figure", "measured", "goal", "")]
    for each in figures:
        verdict = (
            "" if each.goal is None else "reached" if each.goal.reached(each.measured) else "half" if each.goal.reached(each.measured, True) else "no"
        )
        rows.append((each.name, f"{number(each.measured)} {each.unit}".strip(), str(each.goal or ""), verdict))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join((row[0].ljust(widths[0]), row[1].rjust(widths[1]), row[2].rjust(widths[2]), row[3])).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest rank."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(len(ranked) * share))]
