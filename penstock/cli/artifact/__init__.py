"""`penstock artifact`: what is stored on the server, folders that were uploaded and outputs of builds."""

import click

from penstock.cli.lazy import LazyGroup

# name → module, command, what --help says
COMMANDS: dict[str, tuple[str, str, str]] = {
    "upload": ("artifact.upload", "upload", "Store a folder, sending only what the server lacks; print its id."),
    "ls": ("artifact.listing", "ls", "List artifacts, or what is in one."),
    "cat": ("artifact.content", "cat", "Print files of an artifact."),
    "download": ("artifact.content", "download", "Bring an artifact back, or a part of it."),
    "diff": ("artifact.diff", "diff", "Compare two artifacts, or one with a folder here."),
    "pin": ("artifact.keeping", "pin", "Keep artifacts until they are unpinned."),
    "unpin": ("artifact.keeping", "unpin", "Let artifacts expire again."),
    "touch": ("artifact.keeping", "touch", "Keep artifacts for longer."),
    "rm": ("artifact.keeping", "rm", "Remove artifacts."),
    "usage": ("artifact.limits", "usage", "Print how much the team stores."),
    "policy": ("artifact.limits", "policy", "Print or set how long things are kept, and how much may be stored."),
}


@click.group(cls=LazyGroup, lazy=COMMANDS)
def artifact() -> None:
    """Work with what is stored on the server: folders that were uploaded, and outputs of builds. Both are trees of files that never change.

    A REF names one, or with a path a folder or a file in it:

    \b
      ID[/path]              by id, as `upload` and `ls` print it (also artifact:ID[/path])
      build:7/dist[/path]    an output of a build, by the build's number

    \b
      penstock artifact upload . --keep 7d
      penstock artifact ls build:7/dist
      penstock artifact cat build:7/dist/report.txt
      penstock artifact diff build:6/dist build:7/dist
      penstock execute -c task.yml -i src=build:7/dist
    """
