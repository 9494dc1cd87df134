"""The commands by name, and what the process says and exits with when one of them fails.

Exit codes: 2 for a command line that cannot be meant, 1 for everything else that goes wrong, 130 for an interrupt, 141 when nobody reads stdout
any more; `execute` and `watch` add the build's own (penstock.cli.following), and `artifact diff` has those of diff.
"""

import os
import sys
from typing import NoReturn

import click

from penstock.cli.lazy import LazyGroup

NOBODY_READS = 141  # as a shell shows a death by SIGPIPE

# name → module, command, what --help says
COMMANDS: dict[str, tuple[str, str, str]] = {
    "execute": ("execute", "execute", "Upload folders, run a task on them, watch it live, get the outputs."),
    "watch": ("watch", "watch", "Watch a build live, from its start to its end."),
    "logs": ("watch", "logs", "Print what a build has written so far."),
    "download": ("download", "download", "Bring a build's outputs back, also later and elsewhere."),
    "artifact": ("artifact", "artifact", "Folders and outputs on the server: upload, list, read, compare, keep, remove."),
    "secret": ("secret", "secret", "Passwords, tokens and keys for builds: set, list, remove."),
    "abort": ("builds", "abort", "End a build."),
    "why": ("why", "why", "Say why a build waits and what is ahead of it, or why it runs where it runs."),
    "builds": ("builds", "builds", "List builds, newest first."),
    "workers": ("workers", "workers", "List the workers: status, slots, what they run."),
    "worker": ("worker", "worker", "Run a worker; add, look at, drain, revoke workers."),
    "login": ("login", "login", "Remember a Penstock and a token for it."),
    "targets": ("login", "targets", "List the Penstocks that are known here, or choose one."),
    "up": ("system", "up", "Start everything on this machine."),
    "down": ("system", "down", "Stop what `up` started; data stays."),
    "completion": ("completion", "completion", "Print a shell's completion script."),
    "version": ("version", "version", "Print the version of this program, and of the server."),
}


@click.group(cls=LazyGroup, lazy=COMMANDS, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("-t", "--target", metavar="NAME", help="Which of the known Penstocks to talk to (see `penstock targets`).")
@click.version_option(package_name="penstock", message="penstock %(version)s", help="Show this program's version and exit.")
@click.pass_context
def cli(ctx: click.Context, target: str | None) -> None:
    """Penstock runs builds: upload a folder, run a task on a worker, watch it live, take the outputs.

    \b
    penstock up --detach
    penstock execute -c task.yml -i src=. -o dist=./out
    """
    ctx.obj = target


def main() -> NoReturn:
    """The entry point."""
    _stand_in_for_closed_streams()
    try:
        code = cli.main(prog_name="penstock", standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        code = 2
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt) as error:
        click.echo(str(error) or "interrupted", err=True)
        code = 130
    except SystemExit as end:  # so click ends when nobody reads stdout, and with 0 after a completion
        code = NOBODY_READS if end.code else 0
    except OSError as error:
        code = NOBODY_READS if isinstance(error, BrokenPipeError) else 1
        if code != NOBODY_READS:
            click.echo(f"Error: {error}", err=True)
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still buffered has nowhere to go
    sys.exit(code if isinstance(code, int) else 0)


def _stand_in_for_closed_streams() -> None:
    """Or the next file or connection that is opened would be one of them."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: PTH123, SIM115
