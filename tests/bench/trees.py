"""How fast a worker places and takes trees, with an artifacts service of the tests; beside what else writes out the same files in the same run."""

import asyncio
import contextlib
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from proto.messages import Attempt, Package
from proto.plan import Stage, TaskInput
from services.worker.artifacts import Artifacts
from services.worker.cache import Cache
from services.worker.folders import FolderPool
from services.worker.mounts import private_mounts
from services.worker.placing import Means, means_here
from services.worker.workspace import Workspace
from tests.bench.figures import Figure, Goal, at_least
from tests.bench.files import edit, timed, write_tree
from tests.worker_controls import IDENTITY, step
from tests.worker_shop import TOKEN, Shop, a_shop

BYTES_EACH = 20_000
REPEATS = 5
STEP_SECONDS = 0.05
"""What the shortest step takes: by then what was placed is known by its times."""
CACHE_BYTES = 10_000_000_000
GOAL = at_least(60_000)
SRC = TaskInput(name="src")


def trees(files: int) -> list[Figure]:
    """In a process of its own, as are the mounts that it makes."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(_in_its_own, files).result()


def _in_its_own(files: int) -> list[Figure]:
    return asyncio.run(_trees(files))


async def _trees(files: int) -> list[Figure]:
    private = private_mounts()
    with tempfile.TemporaryDirectory(prefix="penstock-bench-") as name:
        folder = Path(name)
        src = folder / "in" / "src"
        write_tree(src, files, files * BYTES_EACH)
        means = means_here(folder / "trial", private)
        async with a_shop(folder) as shop:
            shop.writes = False
            figures = await _Bench(shop, folder, means, files).figures(src, REPEATS, GOAL)
            if means.name != "copy":
                figures += await _Bench(shop, folder, Means(None, False), files).figures(src, REPEATS)
        return figures + _others(folder, src, files)


class _Bench:
    """A worker's folder and cache, with one way to place trees."""

    def __init__(self, shop: Shop, folder: Path, means: Means, files: int) -> None:
        self._shop = shop
        self._means = means
        self._copies = means.name == "copy"
        self._files = files
        self._folder = folder
        self._pool = FolderPool(folder / means.name / "work", "b")
        self._cache = Cache(folder / means.name / "cache", CACHE_BYTES)
        (folder / means.name / "work").mkdir(parents=True)

    async def figures(self, src: Path, repeats: int, goal: Goal | None = None) -> list[Figure]:
        self._cache.open()
        nothing = await self._placed()
        known, unknown, one, taken, plain = [], [], [], [], []
        for number in range(repeats):
            known.append(await self._placed())
            if self._copies:
                plain.append(self._plainly(src))
            taken.append(await self._taken())
            (src / "part00").rename(src / f"part00.{number}")
            unknown.append(await self._placed())
            (src / f"part00.{number}").rename(src / "part00")
            (src / "another").write_bytes(os.urandom(BYTES_EACH))
            one.append(await self._placed())
            (src / "another").unlink()
        self._cache.close()
        what = f"inputs by {self._means.name}, {self._files:,} files"
        return [
            *self._rates(f"{what}, all cached, the tree known", known, goal),
            *self._rates(f"{what}, all cached, the tree not known", unknown, goal),
            *self._rates(f"{what}, one to fetch", one),
            *self._rates(f"{what}, nothing cached", [nothing]),
            *self._rates(f"{what}, taken as an output after one change", taken),
            *(self._rates("cp -a of them, each time after the known tree", plain) if plain else []),
        ]

    def _rates(self, what: str, took: list[float], goal: Goal | None = None) -> list[Figure]:
        median = statistics.median(took)
        return [Figure(what, self._files / median, "/s", goal), Figure("  one time", median * 1e3, "ms")]

    async def _placed(self) -> float:
        """Seconds until an input is in a new workspace."""
        async with self._workspace() as (workspace, _):
            return await _seconds(workspace.place_inputs([SRC]))

    def _plainly(self, src: Path) -> float:
        """Seconds that `cp -a` takes now, beside copies only: a disk that is busy with what was written holds up whatever comes next."""
        copied = self._folder / "copied"
        took = timed("cp", "-a", str(src), str(copied))
        shutil.rmtree(copied)
        return took

    async def _taken(self) -> float:
        """Seconds to keep it as an output, one file of it changed."""
        async with self._workspace() as (workspace, folder):
            await workspace.place_inputs([SRC])
            await asyncio.sleep(STEP_SECONDS)
            edit(folder / "src")
            return await _seconds(workspace.store("step", "src", "src"))

    @contextlib.asynccontextmanager
    async def _workspace(self) -> AsyncIterator[tuple[Workspace, Path]]:
        package = Package(
            attempt=Attempt("b", "main", 1),
            team="main",
            worker="w",
            boot="b",
            credit="c",
            lease_seconds=15.0,
            stage=Stage(name="main", steps=[step("true")]),
            inputs=self._shop.refs("src"),
            token=TOKEN,
            artifacts_url=self._shop.url,
        )
        artifacts, folders = Artifacts(self._cache, IDENTITY, time.time), self._pool.take()
        workspace = Workspace(folders, package, artifacts, self._cache, self._means)
        try:
            yield workspace, folders.workspace
        finally:
            await workspace.close()
            await self._pool.give_back(folders)
            await artifacts.close()


async def _seconds(work: Awaitable[object]) -> float:
    began = time.perf_counter()
    await work
    return time.perf_counter() - began


def _others(folder: Path, src: Path, files: int) -> list[Figure]:
    """The same files written out by what everybody has."""
    archive, figures = folder / "tree.tar", []
    timed("tar", "-C", str(src), "-cf", str(archive), ".")
    for number in range(REPEATS):
        (folder / f"untarred{number}").mkdir()
    ways = {
        "cp -al (hard links)": lambda number: timed("cp", "-al", str(src), str(folder / f"linked{number}")),
        "tar -x": lambda number: timed("tar", "-C", str(folder / f"untarred{number}"), "-xf", str(archive)),
    }
    for what, way in ways.items():
        median = statistics.median(way(number) for number in range(REPEATS))
        figures += [Figure(f"{what}, the same {files:,} files", files / median, "/s"), Figure("  one time", median * 1e3, "ms")]
    return figures
