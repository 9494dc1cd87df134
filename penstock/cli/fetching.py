"""Bringing a build's outputs back."""

import asyncio
from collections.abc import Mapping
from pathlib import Path

from penstock.cli.running import Failure, Mistake
from penstock.cli.terminal import Terminal
from penstock.client import Artifact, Build, Client, PenstockError


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


async def fetch(client: Client, outputs: Mapping[str, Artifact], wanted: Mapping[str, Path], terminal: Terminal) -> None:
    """Bring each named output into its folder, several at once. Raises Failure naming those that did not come whole; the others are there."""
    with terminal.bars("downloaded") as bars:

        async def one(name: str, folder: Path) -> None:
            artifact = outputs[name]
            await client.download(artifact, folder, bars.add(name, artifact.size))
            bars.done(name, artifact.size, artifact.files)

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
