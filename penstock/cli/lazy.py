"""A group of commands that imports one when it is called; their names and one line each are known without, so that help and completion answer at
once."""

import importlib
from collections.abc import Mapping
from typing import Any

import click

_ALSO = {"delete": "rm", "remove": "rm", "list": "ls"}
"""What other programs call it."""


class LazyGroup(click.Group):
    """`lazy`: module below penstock.cli, command in it, and what the list of commands says, by name."""

    def __init__(self, *args: Any, lazy: Mapping[str, tuple[str, str, str]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lazy = lazy

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self._lazy:
            return None
        module, attribute, _ = self._lazy[cmd_name]
        command: click.Command = getattr(importlib.import_module(f"penstock.cli.{module}"), attribute)
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self._lazy and not args[0].startswith("-"):
            from difflib import get_close_matches

            near = [_ALSO[args[0]]] if _ALSO.get(args[0]) in self._lazy else get_close_matches(args[0], self._lazy, n=1)
            ctx.fail(f"there is no command `{args[0]}`" + (f": did you mean `{near[0]}`?" if near else ""))
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, _, line) in self._lazy.items()])
