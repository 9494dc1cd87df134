"""How fast a worker places and takes trees, without a server: `python -m tests.bench.bench_trees [--folder PLACE]`."""

import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from proto.messages import Attempt, Package
from proto.plan import Stage, TaskInput
from services.worker.artifacts import Artifacts
from services.worker.cache import Cache
from services.worker.executors.sandboxes import Folders
from services.worker.folders import FolderPool
from services.worker.mounts import private_mounts
from services.worker.placing import Means, means_here
from services.worker.workspace import Workspace
from tests.worker_controls import step
from tests.worker_shop import TOKEN, Shop, a_shop

FILES, BYTES = 5000, 20_000
SRC = TaskInput(name="src")


def a_tree(root: Path) -> None:
    for number in range(FILES):
        folder = root / f"d{number % 50}" / f"e{number % 10}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"file{number}").write_bytes(number.to_bytes(4, "big") * (BYTES // 4))


async def placed(shop: Shop, pool: FolderPool, cache: Cache, means: Means, what: str, then: Callable[[Path], None] | None = None) -> None:
    package = Package(
        attempt=Attempt("b", "main", 1), team="main", worker="w", boot="b", credit="c", lease_seconds=15,
        stage=Stage(name="main", steps=[step("true")]),
        inputs=shop.refs("src"), token=TOKEN, artifacts_url=shop.url,
    )  # fmt: skip
    artifacts = Artifacts(cache)
    folders: Folders = pool.take()
    workspace = Workspace(folders, package, artifacts, cache, means)
    start = time.perf_counter()
    await workspace.place_inputs([SRC])
    took = time.perf_counter() - start
    print(f"{means.name:8} {what:42} {took * 1000:8.1f} ms {FILES / took:9.0f} files/s")
    if then is not None:
        then(folders.workspace / "src")
        sent = shop.received
        start = time.perf_counter()
        await workspace.store("step", "src", "src")
        took = time.perf_counter() - start
        print(f"{means.name:8} {'  taken after one change':42} {took * 1000:8.1f} ms {FILES / took:9.0f} files/s ({shop.received - sent} blobs sent)")
    start = time.perf_counter()
    await workspace.close()
    await pool.give_back(folders)
    print(f"{means.name:8} {'  closed':42} {(time.perf_counter() - start) * 1000:8.1f} ms")
    await artifacts.close()


def change(src: Path) -> None:
    time.sleep(0.05)
    (src / "d1" / "e1" / "file1").write_bytes(os.urandom(BYTES))


async def main(place: str | None) -> None:
    private = private_mounts()
    with tempfile.TemporaryDirectory(dir=place) as name, ExitStack():
        folder = Path(name)
        a_tree(folder / "in" / "src")
        best = means_here(folder / "trial", private)
        for means in (best, Means(None, False)):
            work = folder / means.name / "work"
            work.mkdir(parents=True)
            cache = Cache(folder / means.name / "cache", 10 << 30)
            cache.open()
            pool = FolderPool(work, "b")
            async with a_shop(folder) as shop:
                shop.writes = False
                await placed(shop, pool, cache, means, "nothing cached")
                await placed(shop, pool, cache, means, "all cached, tree known")
                await placed(shop, pool, cache, means, "all cached, tree known (again)", change)
                (folder / "in" / "src" / "new").write_bytes(os.urandom(BYTES))
                await placed(shop, pool, cache, means, "one missing, tree not known")
                (folder / "in" / "src" / "new").unlink()
                (folder / "in" / "src" / "d1").rename(folder / "in" / "src" / "d1x")
                await placed(shop, pool, cache, means, "all cached, tree not known")
                (folder / "in" / "src" / "d1x").rename(folder / "in" / "src" / "d1")
            cache.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[2] if "--folder" in sys.argv else None))
