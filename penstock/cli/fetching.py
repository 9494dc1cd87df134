"""Bringing a build's outputs back."""

import asyncio
import sys
from collections.abc import Mapping
from pathlib import Path

import click

from penstock.cli.quantities import counted, readable_size
from penstock.cli.running import Failure, Mistake
from penstock.cli.terminal import Bars, Terminal
from penstock.client import Artifact, Build, Client, PenstockError

GOES_ON = "interrupted: what has come stays, and the same command goes on from there"
HUGE = 1_000_000_000  # bytes: what people want to be asked about


def output_of(build: Build, name: str) -> Artifact | None:
    """An output by name; in a build of several steps also by `step/name`."""
    if name in build.outputs:
        return build.outputs[name]
    matches = [artifact for key, artifact in build.outputs.items() if key.endswith(f"/{name}")]
    return matches[0] if len(matches) == 1 else None


def check_folders(wanted: Mapping[str, Path]) -> None:
    """Refuse at once what would fail at the end."""
    for name, folder in wanted.items():
        if folder.exists() and not folder.is_dir():
            raise Mistake(f"-o {name}={folder}: {folder} is there and is not a folder")


def received(name: str, files: int, size: int, bars: Bars) -> str:
    """What a download came to."""
    moved = bars.moved(name, "receiving") or 0
    here = "" if moved >= size else f": received {readable_size(moved)}, saved {readable_size(size - moved)}" if moved else ": all of it was here"
    return f"downloaded {name}: {counted(files, 'file')}, {readable_size(size)}{here}"


def ask_before_much(size: int, into: str, yes: bool) -> None:
    """On a terminal, have a huge download agreed to. Raises click.Abort when it is not."""
    if size > HUGE and not yes and sys.stdin.isatty() and sys.stderr.isatty():
        click.confirm(f"download {readable_size(size)} into {into}?", abort=True, err=True)


async def fetch(client: Client, outputs: Mapping[str, Artifact], wanted: Mapping[str, Path], terminal: Terminal) -> None:
    """Bring each named output into its folder, several at once. Raises Failure naming those that did not come whole; the others are there."""
    with terminal.bars() as bars:

        async def one(name: str, folder: Path) -> None:
            artifact = outputs[name]
            await client.download(artifact, folder, bars.add(name))
            bars.done(name, received(name, artifact.files, artifact.size, bars))

        results = await asyncio.gather(*(one(name, folder) for name, folder in wanted.items()), return_exceptions=True)
    faults: list[str] = []
    for (name, folder), result in zip(wanted.items(), results, strict=True):
        if isinstance(result, OSError):
            faults.append(f"output `{name}`: cannot write into {folder}: {result.strerror or result}")
        elif isinstance(result, PenstockError):
            faults.append(f"output `{name}`: {result}")
        elif isinstance(result, BaseException):
            raise result
        elif outputs[name].files == 0:
            terminal.say(f"output `{name}` is empty")
    if faults:
        raise Failure("; ".join(faults))
