"""Uploading folders."""

import asyncio
from collections.abc import Mapping
from typing import Literal

import click

from penstock.cli.quantities import counted, readable_size
from penstock.cli.terminal import Bars, Terminal
from penstock.client import Artifact, Client, Selection


async def send(
    client: Client, folders: Mapping[str, Selection], terminal: Terminal, keep: int | Literal["forever"] | None = None
) -> dict[str, Artifact]:
    """Upload all folders at once, by the name that they were given under. When cancelled it raises click.Abort, which says what becomes of what was
    sent."""
    with terminal.bars() as bars:

        async def one(name: str, selection: Selection) -> Artifact:
            artifact = await client.upload(selection, name, bars.add(name), keep)
            bars.done(name, sent(name, artifact, bars))
            return artifact

        try:
            async with asyncio.TaskGroup() as group:
                uploads = {name: group.create_task(one(name, selection)) for name, selection in folders.items()}
        except BaseExceptionGroup as faults:
            raise faults.exceptions[0] from None  # the others were cancelled for it
        except asyncio.CancelledError:
            begun = any(bars.moved(name, "sending") is not None for name in folders)
            later = "what was sent is kept for an hour, and the same command goes on from there" if begun else "nothing was sent"
            raise click.Abort(f"interrupted: {later}") from None
    return {name: upload.result() for name, upload in uploads.items()}


def sent(name: str, artifact: Artifact, bars: Bars) -> str:
    """What an upload came to."""
    hashed, moved = bars.moved(name, "hashing"), bars.moved(name, "sending") or 0
    saved = max(artifact.size - moved, 0)
    parts = [f"hashed {readable_size(hashed)}"] if hashed else []
    parts.append(f"sent {readable_size(moved)}" if moved else "sent nothing")
    parts += [f"saved {readable_size(saved)}"] if saved else []
    return f"uploaded {name}: {counted(artifact.files, 'file')}, {readable_size(artifact.size)}: {', '.join(parts)}"
