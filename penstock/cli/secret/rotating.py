"""`penstock secret rotate`."""

import base64
import secrets
from pathlib import Path

import click

from penstock.cli.running import Mistake, connect, json_option, print_json, run
from penstock.client import Client, SecretKeys
from penstock.client.private import alone, write_private


@click.command(short_help="Renew the keys.")
@click.option(
    "--master-keys",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Put a new master key first in this file, which PENSTOCK_SECRET_KEYS_FILE names to the schedulers (in a data folder: `master-keys`).",
)
@json_option
@click.pass_context
def rotate(ctx: click.Context, master_keys: Path | None, as_json: bool) -> None:
    """Renew the keys around all teams' secrets; an owner of the first team may.

    There are two kinds. Values are sealed to a key of the schedulers' on their way: this makes another one, which happens by itself each month, too;
    the one before is forgotten within two hours. And they are kept under a master key, which the schedulers are given: whenever another one
    stands first in their file, everything is encrypted anew within seconds, and this shows how far that is. An old master key may be taken out of
    the file when no value is under it any more.

    Schedulers that have a file each must all have a new key, as the last one, before it is the first for any."""
    if master_keys is not None:
        _put_first(master_keys)
    keys = run(_rotated(connect(ctx)))
    if as_json:
        print_json(keys)
        return
    click.echo(f"secrets are sealed to key {keys.sealing_version} from now on", err=True)
    others = ", ".join(f"{key}: {count}" for key, count in sorted(keys.values.items()) if key != keys.master_key)
    click.echo(f"they are kept under the master key `{keys.master_key}`{f', some yet under others ({others})' if others else ''}", err=True)


def _put_first(file: Path) -> None:
    key = base64.urlsafe_b64encode(secrets.token_bytes(32)).rstrip(b"=").decode()
    try:
        with alone(file):
            write_private(file, f"k-{secrets.token_hex(4)}:{key}\n{file.read_text(encoding='utf-8')}".encode())
    except (OSError, UnicodeDecodeError) as error:
        raise Mistake(f"cannot change {file}: {error.strerror if isinstance(error, OSError) else 'it is no text'}") from error


async def _rotated(client: Client) -> SecretKeys:
    async with client:
        return await client.rotate_secret_keys()
