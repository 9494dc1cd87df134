"""From a click command to the client and back: the connection, the errors as one clear line, JSON."""

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import click
import msgspec

from penstock.client import Client, Forbidden, Full, PenstockError, StreamBroken, Unauthorized

T = TypeVar("T")


class Mistake(click.ClickException):
    """A command line that cannot be meant, said in one line."""

    exit_code = 2


class Failure(click.ClickException):
    """Something went wrong, said in one line."""


class LostSight(Failure):
    """The build may go on; its events no longer reach us."""

    exit_code = 255


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run it to its end; what the client raises becomes a line on stderr and exit code 1 (255 for a broken event stream)."""
    try:
        return asyncio.run(work)
    except Unauthorized as error:
        raise Failure(f"{error}: log in with `penstock login`") from error
    except Forbidden as error:
        raise Failure(f"not allowed: {error}") from error
    except Full as error:
        quota = error.problem and error.problem.type.endswith("quota-exceeded")
        raise Failure(f"{error}: `penstock artifact rm` what is not needed, or let an owner set another --quota" if quota else str(error)) from error
    except StreamBroken as error:
        raise LostSight(str(error)) from error
    except PenstockError as error:
        problem = error.problem
        raise Failure(f"{problem.path}: {error}" if problem and problem.path and problem.path not in str(error) else str(error)) from error
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        raise Failure(f"{error.filename}: {error.strerror}" if error.filename else str(error)) from error


def connect(ctx: click.Context, team: str | None = None) -> Client:
    """A client for the target that the command line and the environment name."""
    try:
        return Client.from_target(ctx.find_root().obj, team=team)
    except PenstockError as error:
        raise Failure(str(error)) from error


def print_json(value: object) -> None:
    """One JSON value on stdout, indented for people; null and empty fields are kept."""
    click.echo(json.dumps(msgspec.to_builtins(value), indent=2, ensure_ascii=False))


Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

team_option: Decorator = click.option("--team", metavar="NAME", help="Act for this team instead of the target's.")
json_option: Decorator = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")


class BuildRef(click.ParamType[str]):
    """A build's number or id."""

    name = "build"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value).strip().removeprefix("#")
        if not text or "/" in text:
            self.fail(f"`{value}` is no build: give its number or id", param, ctx)
        return text


class Name(click.ParamType[str]):
    """A name of something on the server."""

    name = "name"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not str(value).strip():
            self.fail("it is empty", param, ctx)
        return str(value)


class Assignment(click.ParamType[tuple[str, str]]):
    """NAME=VALUE, neither of them empty."""

    name = "assignment"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        name, _, other = str(value).partition("=")
        if not name or not other:
            self.fail(f"`{value}` must be NAME=VALUE", param, ctx)
        return name, other
