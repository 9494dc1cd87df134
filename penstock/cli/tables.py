"""A list for people: columns that line up, a heading, and on a terminal some colour."""

from collections.abc import Mapping, Sequence

import click

from penstock.cli.terminal import Terminal


def person(actor: str) -> str:
    """Who did something, as lists say it; the log has `actor`. The token that the deployment began with is named by a digest there."""
    return "first token" if actor.startswith("token:bootstrap-") else actor


def print_table(
    heading: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    right: Sequence[str] = (),
    spare: Sequence[str] = (),
    colours: Mapping[tuple[int, str], str] | None = None,
) -> None:
    """The rows below the heading, the columns named in `right` flush right, all on stdout. A terminal that is too narrow goes without the columns of
    `spare`, one after another. `colours` are by row (from 0) and column, and wait for a terminal."""
    terminal = Terminal()
    columns = dict(zip(heading, zip(*(heading, *rows), strict=True), strict=True))
    widths = {name: max(map(len, cells)) for name, cells in columns.items()}
    left = list(spare)
    while left and terminal.columns and sum(widths.values()) + 2 * (len(widths) - 1) > terminal.columns:
        del widths[left.pop(0)]
    for n in range(len(rows) + 1):
        cells = {name: columns[name][n].rjust(width) if name in right else columns[name][n].ljust(width) for name, width in widths.items()}
        shown = [terminal.styled(cell, (colours or {}).get((n - 1, name)), dim=not n) for name, cell in cells.items()]
        click.echo("  ".join(shown).rstrip(), color=True)
