"""`penstock worker start`: a worker in the foreground, registered first if need be."""

import os
import re
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import click
import msgspec

from penstock.cli.running import Failure, Mistake, run
from penstock.client import Conflict, Unauthorized
from penstock.client.joining import Membership, join, new_membership, read_membership, write_membership

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_ITS_OWN = ("PENSTOCK_WORKER_", "PENSTOCK_GRACE_", "PENSTOCK_LOG_LIMIT_", "PENSTOCK_STATUS_")
"""Settings of the environment that are the worker's; others are the command line's."""
TOKEN_VARIABLE = "PENSTOCK_REGISTRATION_TOKEN"  # noqa: S105


@click.command(short_help="Run a worker here.")
@click.option(
    "--register",
    "token",
    metavar="-|TOKEN",
    help="Register first, by a token of `penstock worker token create`: `-` reads it from stdin; PENSTOCK_REGISTRATION_TOKEN will do, too. As an"
    " argument, every user of this machine can see it.",
)
@click.option("--server", "url", metavar="URL", help="Where to register, like https://penstock.example.")
@click.option("--name", help="What to be called; this machine's name by default.")
@click.option(
    "--dir",
    "folder",
    type=click.Path(path_type=Path, file_okay=False),
    envvar="PENSTOCK_WORKER_DIR",
    help="Where the worker keeps its key, its cache and its work.  [default: ~/.local/share/penstock/worker]",
)
@click.option("--slots", type=click.IntRange(1, 4096), help="How many stages to run at once; 4 by default.")
@click.option("--tag", "tags", multiple=True, metavar="TAG", help="What builds may choose it by, unless its token says so. Repeatable.")
@click.option("--mode", type=click.Choice(["push", "pull"]), help="push: offer every free slot; pull: one at a time, when there is room for it.")
@click.option("--sandbox", type=click.Choice(["auto", "bwrap", "unshare", "none"]), help="What steps run in; the first that works by default.")
def start(
    token: str | None,
    url: str | None,
    name: str | None,
    folder: Path | None,
    slots: int | None,
    tags: tuple[str, ...],
    mode: str | None,
    sandbox: str | None,
) -> None:
    """Run a worker on this machine until Ctrl-C, which gives back what it runs and says goodbye.

    The first time it needs a token and the server's URL: it makes a key, which never leaves --dir, and registers it. From then on the key is all
    that it needs, after days offline too. While it is not admitted to the bus it says why, and tries again; it ends with 77 when the server says that
    it was revoked or removed.

    \b
      penstock worker start --register - --server https://penstock.example --name rack-1 --slots 8 < token
      penstock worker start --slots 8

    More can be set in the environment: PENSTOCK_WORKER_CACHE_BYTES, PENSTOCK_WORKER_EXECUTORS, PENSTOCK_GRACE_SECONDS and so on.
    """
    folder = (folder or _usual_folder(os.environ)).absolute()
    member = _member(folder / "worker.json", _read(token), url, name, os.environ)
    given = {
        "PENSTOCK_NATS_URL": member.nats_url,
        "PENSTOCK_WORKER_NAME": member.name,
        "PENSTOCK_WORKER_KEY": member.key,
        "PENSTOCK_SERVER_PUBLIC_KEY": member.server_public_key,
        "PENSTOCK_GATEWAY_PUBLIC_KEY": member.gateway_public_key,
        "PENSTOCK_SERVER_URL": member.url,
        "PENSTOCK_WORKER_DIR": str(folder),
        **({"PENSTOCK_WORKER_BUILD_LIMIT": str(slots)} if slots else {}),
        **({"PENSTOCK_WORKER_TAGS": ",".join(tags)} if tags else {}),
        **({"PENSTOCK_WORKER_QUEUE_MODE": mode} if mode else {}),
        **({"PENSTOCK_WORKER_SANDBOX": sandbox} if sandbox else {}),
    }
    click.echo(f"worker {member.name} serves {member.url}; Ctrl-C stops it", err=True)
    _become({**_environment(os.environ), **given})


def _read(given: str | None) -> str | None:
    """What --register was given; - means stdin."""
    if given != "-":
        return given
    token: str = click.prompt("Token", hide_input=True, err=True) if sys.stdin.isatty() else sys.stdin.readline()
    if not token.strip():
        raise Mistake("--register -: there is no token on stdin")
    return token.strip()


def _member(path: Path, token: str | None, url: str | None, name: str | None, environ: Mapping[str, str]) -> Membership:
    """Who this worker is: registered now, or before. The environment's token is for who is not yet: it stays there, and is good once."""
    try:
        known = read_membership(path)
        if token is None and (known is None or not known.nats_url):
            token = environ.get(TOKEN_VARIABLE) or None
        if known is not None and known.nats_url and name not in (None, known.name):
            raise Mistake(f"the worker in {path.parent} is `{known.name}`: use another --dir for another worker")
        if token is None:
            if known is None or not known.nats_url:
                raise Mistake(f"no worker is registered in {path.parent}: give --register - --server URL")
            if not known.gateway_public_key:
                raise Mistake(f"{path} does not say what the server signs by: register anew with --register - --server {known.url}")
            return known
        if not url:
            raise Mistake("--server is missing: where is the Penstock to register with?")
        if not url.startswith(("http://", "https://")):
            raise Mistake(f"--server {url}: must start with http:// or https://")
        if known is not None and known.nats_url and known.url != url.rstrip("/"):
            raise Mistake(f"the worker in {path.parent} is registered with {known.url}: use another --dir, or remove {path}")
        name = name or (known.name if known else re.sub(r"[^A-Za-z0-9_-]+", "-", socket.gethostname())[:64].strip("-")) or "worker"
        if not _NAME.fullmatch(name):
            raise Mistake(f"--name {name}: letters, digits, `_` and `-`; at most 64")
        # The key is kept before it is shown to anybody: what was registered is never lost.
        wanted = known if known is not None and known.name == name and known.url == url.rstrip("/") else new_membership(name, url)
        write_membership(path, wanted)
        member = run(_joined(wanted, token))
        write_membership(path, member)
        return member
    except msgspec.MsgspecError as error:
        raise Failure(f"{path} is spoilt ({error}): remove it, and register anew with --register - --server URL") from error
    except OSError as error:
        raise Failure(f"{error.filename or path}: {error.strerror}") from error


async def _joined(wanted: Membership, token: str) -> Membership:
    try:
        return await join(wanted, token)
    except Unauthorized as error:
        raise Failure(f"{wanted.url} does not take this token: it was used, is too old, or another server's; have another made") from error
    except Conflict as error:
        if error.problem and error.problem.type.endswith("key-revoked"):
            raise Failure(f"{wanted.url}: {error}; remove worker.json, so that the worker makes another") from error
        raise Failure(f"{wanted.url} has another worker of the name `{wanted.name}`: choose another --name") from error


def _usual_folder(environ: Mapping[str, str]) -> Path:
    home = Path(environ["XDG_DATA_HOME"]) if environ.get("XDG_DATA_HOME") else Path.home() / ".local" / "share"
    return home / "penstock" / "worker"


def _environment(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environ.items() if not name.startswith("PENSTOCK_") or name.startswith(_ITS_OWN)}


def _become(environ: Mapping[str, str]) -> NoReturn:
    """This process is the worker from now on: signals reach it, and its end is ours."""
    sys.stdout.flush()
    sys.stderr.flush()
    # -P: no module of the current folder may pass for one of ours.
    os.execve(sys.executable, [sys.executable, "-P", "-m", "services.worker"], dict(environ))  # noqa: S606
