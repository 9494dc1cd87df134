"""`penstock secret`: values that only builds may see."""

import click

from penstock.cli.lazy import LazyGroup

# name → module, command, what --help says
COMMANDS: dict[str, tuple[str, str, str]] = {
    "set": ("secret.setting", "set_", "Set a secret, or replace it."),
    "ls": ("secret.listing", "ls", "List the names of the team's secrets."),
    "rm": ("secret.setting", "rm", "Remove secrets, and every value that they had."),
    "rotate": ("secret.rotating", "rotate", "Renew the keys around all secrets."),
}


@click.group(cls=LazyGroup, lazy=COMMANDS)
def secret() -> None:
    """Keep passwords, tokens and keys for builds. A value goes to the server and from there to the steps that name it, encrypted on its way and
    at rest; nothing shows it again, and workers mask it in logs.

    \b
      penstock secret set npm_token                       asks for the value
      penstock secret set deploy_key --from-file id_ed25519
      pass show npm | penstock secret set npm_token --stdin

    A task takes it by its name, in its params or in the source of its image:

    \b
      params:
        NPM_TOKEN: ((npm_token))

    Params whose names look secret (password, token, key, …) are kept so without being asked, for their build alone.
    """
