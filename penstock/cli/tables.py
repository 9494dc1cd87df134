"""A list for people: columns that line up, a heading, and on a terminal some colour."""

from collections.abc import Mapping, Sequence

import click

from penstock.cli.terminal import Terminal


def person(actor: str) -> str:
    """Who did something, as lists say it; the log has `actor`. The token that the deployment began with is named by a digest there."""
    return "first token" if actor.startswith("token:bootstrap-") else actor


def print_table(
    heading: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = (), colours: Mapping[tuple[int, str], str] | None = None
) -> None:
    """The rows below the heading, the columns named in `right` flush right, all on stdout. `colours` are by row (from 0) and column, and wait for a
    terminal."""
    terminal = Terminal()
    lines = [list(heading), *(list(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for n, line in enumerate(lines):
        cells = [cell.rjust(width) if name in right else cell.ljust(width) for cell, width, name in zip(line, widths, heading, strict=True)]
        shown = [terminal.styled(cell, (colours or {}).get((n - 1, name)), dim=not n) for cell, name in zip(cells, heading, strict=True)]
        click.echo("  ".join(shown).rstrip(), color=True)
