"""Trees up and down through the whole system, beside what others do with the same files in the same run."""

import os
import shutil
import statistics
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from penstock.client import Artifact, Client
from penstock.up.datadir import DataDir
from tests.bench.figures import Figure, at_least, at_most
from tests.bench.files import edit, hash_and_write, rsync, tar_zstd, write_tree
from tests.bench.machine import peak
from tests.bench.system import System

FILES, BYTES = 5000, 100_000_000
REPEATS = 5


async def artifacts(system: System, large: int) -> list[Figure]:
    """A tree of 5,000 files and 100 MB, then one file of `large` bytes. Uploads are timed inside a client that runs already, as in an editor or
    a CI agent; the command line's own start is a figure of its own."""
    with tempfile.TemporaryDirectory(prefix="penstock-bench-") as name:
        folder = Path(name)
        write_tree(folder / "tree", FILES, BYTES)
        size = sum(path.stat().st_size for path in (folder / "tree").rglob("*") if path.is_file())
        async with Client(system.url, system.token, system.team) as client:
            figures = await _uploads(system, client, folder, size)
            figures += await _downloads(client, folder, size)
            if shutil.which("rsync") and shutil.which("zstd"):
                figures += _others(folder, size)
            return figures + await _one_file(system, client, folder, large)


async def _uploads(system: System, client: Client, folder: Path, size: int) -> list[Figure]:
    tree = folder / "tree"
    moved = _received(system)
    first = await _seconds(lambda: client.upload(tree))
    first_moved, moved = _received(system) - moved, _received(system)
    again = [await _seconds(lambda: client.upload(tree)) for _ in range(REPEATS)]
    again_moved, moved = (_received(system) - moved) / REPEATS, _received(system)
    edited = []
    for _ in range(REPEATS):
        edit(tree)
        edited.append(await _seconds(lambda: client.upload(tree)))
    edited_moved = (_received(system) - moved) / REPEATS
    system.penstock("artifact", "upload", str(tree))
    whole = [_command(system, tree) for _ in range(REPEATS)]
    return [
        Figure(f"upload {FILES:,} files, {size / 1e6:.0f} MB: first", first * 1e3, "ms"),
        Figure("  moved, of the bytes", first_moved / size * 100, "%"),
        Figure("  again, unchanged", statistics.median(again) * 1e3, "ms", at_most(50)),
        Figure("  moved, of the bytes", again_moved / size * 100, "%", at_most(1)),
        Figure("  after one edit", statistics.median(edited) * 1e3, "ms", at_most(80)),
        Figure("  moved, of the bytes", edited_moved / size * 100, "%", at_most(1)),
        Figure("  unchanged, by the command, its start included", statistics.median(whole) * 1e3, "ms"),
    ]


async def _downloads(client: Client, folder: Path, size: int) -> list[Figure]:
    artifact = await client.upload(folder / "tree")
    into = folder / "down"
    whole = await _seconds(lambda: client.download(artifact, into))
    again = await _seconds(lambda: client.download(artifact, into))
    return [
        Figure(f"download {FILES:,} files into a folder", size / whole / 1e6, "MB/s"),
        Figure("  again, everything is there", again * 1e3, "ms"),
    ]


def _others(folder: Path, size: int) -> list[Figure]:
    """The same tree by tar and rsync, where they are installed: what fly and scripts do, without any network."""
    tree, packed = folder / "tree", folder / "tree.tar.zst"
    first = tar_zstd(tree, packed)
    edit(tree)
    after_edit = tar_zstd(tree, packed)
    copied = rsync(tree, folder / "copy"), rsync(tree, folder / "copy")
    edit(tree)
    return [
        Figure("tar | zstd -1 of the same tree into a file", first * 1e3, "ms"),
        Figure("  after one edit", after_edit * 1e3, "ms"),
        Figure("  moved, of the bytes", packed.stat().st_size / size * 100, "%"),
        Figure("rsync -a of the same tree into a folder", copied[0] * 1e3, "ms"),
        Figure("  again, unchanged", copied[1] * 1e3, "ms"),
        Figure("  after one edit", rsync(tree, folder / "copy") * 1e3, "ms"),
    ]


async def _one_file(system: System, client: Client, folder: Path, large: int) -> list[Figure]:
    """One large file: as a stream of tar (one pass), as a folder (hashed first, then sent), and back; beside the least that storing it takes."""
    source = folder / "large"
    source.mkdir()
    with (source / "file").open("wb") as file:
        for _ in range(large >> 20):
            file.write(os.urandom(1 << 20))
    bare = [hash_and_write(source / "file", folder / "copied")]
    as_folder = await _seconds(lambda: client.upload(source))
    with (source / "file").open("r+b") as file:  # other bytes, or they are there already
        for at in range(0, large, 4 << 20):
            file.seek(at)
            file.write(os.urandom(16))
    bare.append(hash_and_write(source / "file", folder / "copied"))
    (folder / "copied").unlink()
    as_tar = await _seconds(lambda: client.upload(_tar(source / "file")))
    newest = await anext(client.artifacts())
    down = await _seconds(lambda: client.download(newest, folder / "back"))
    plain = large / min(bare) / 1e6
    return [
        Figure(f"read, sha256, write and fsync {large >> 20} MiB: what storing takes at least", plain, "MB/s"),
        Figure("upload of it as a tar, stored", large / as_tar / 1e6, "MB/s", at_least(min(600, 0.85 * plain))),
        Figure("upload of it as a folder, hashed before it is sent", large / as_folder / 1e6, "MB/s", at_least(min(600, 0.85 * plain))),
        Figure("download of it into a folder", large / down / 1e6, "MB/s"),
        Figure("most memory that the artifacts service has had", peak(system.pids["artifacts"]), "MB", at_most(150)),
    ]


async def _tar(path: Path) -> AsyncIterator[bytes]:
    import tarfile

    entry = tarfile.TarInfo("file")
    entry.size = path.stat().st_size
    yield entry.tobuf()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(1 << 20):
            yield piece
    yield bytes(-entry.size % 512 + 1024)


async def _seconds(work: Callable[[], Awaitable[Artifact | int]]) -> float:
    began = time.monotonic()
    await work()
    return time.monotonic() - began


def _command(system: System, tree: Path) -> float:
    began = time.monotonic()
    said = system.penstock("artifact", "upload", str(tree))
    assert said.returncode == 0, said.stderr
    return time.monotonic() - began


def _received(system: System) -> float:
    """Bytes of bodies that the artifacts service has taken in."""
    run = DataDir(system.data).run()
    assert run is not None
    with urllib.request.urlopen(f"http://{run.status['artifacts']}/metrics", timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("penstock_artifacts_bytes_total") and 'direction="in"' in line)
