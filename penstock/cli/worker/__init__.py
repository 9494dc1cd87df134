"""`penstock worker`: who may run builds, and the worker itself."""

import click

from penstock.cli.lazy import LazyGroup

# name → module, command, what --help says
COMMANDS: dict[str, tuple[str, str, str]] = {
    "start": ("worker.start", "start", "Run a worker on this machine, until Ctrl-C."),
    "token": ("worker.token", "token", "Make tokens by which new workers register."),
    "ls": ("workers", "workers", "List the workers, as `penstock workers` does."),
    "show": ("worker.show", "show", "Show all that is known of a worker."),
    "drain": ("worker.standing", "drain", "Give a worker nothing new; it finishes what it runs."),
    "resume": ("worker.standing", "resume", "Give a drained worker work again."),
    "revoke": ("worker.standing", "revoke", "Cut a worker off for good; others get its work at once."),
    "rm": ("worker.standing", "rm", "Forget workers that are revoked or lost."),
}


@click.group(cls=LazyGroup, lazy=COMMANDS)
def worker() -> None:
    """Workers run the builds. `penstock workers` lists them; the commands here add one, look at it, and let it go.

    \b
      penstock worker token create                                   # here, as an owner of the first team
      penstock worker start --register - --server URL                # there, on the new machine; asks for the token
      penstock worker start                                          # there, ever after
      penstock worker drain NAME && penstock worker show NAME        # before its machine goes down
    """
