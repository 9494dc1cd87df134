"""Removing several things by name."""

from collections.abc import Awaitable, Callable, Sequence

from penstock.cli.terminal import Terminal
from penstock.client import Conflict, NotFound


async def remove_each(names: Sequence[str], remove: Callable[[str], Awaitable[None]]) -> int:
    """Remove one after another. A fault with one is said and does not stop the others; gives how many there were."""
    terminal = Terminal()
    faults = 0
    for name in names:
        try:
            await remove(name)
        except (NotFound, Conflict) as error:
            terminal.say(f"Error: {error}" if name in str(error) else f"Error: {name}: {error}", "red")
            faults += 1
        else:
            terminal.say(f"{name}: removed")
    return faults
