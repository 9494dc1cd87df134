"""What the store and the worker of a system hold, and that nothing else does."""

from pathlib import Path

from penstock.client import Client
from tests.controls import eventually, files_in
from tests.faults.system import System
from tests.faults.work import archive


def stored(system: System, parts: bool = False) -> list[Path]:
    """Every pack that is in the store, whole; with `parts`, also what is not."""
    return sorted(system.data.blobs / name for name in files_in(system.data.blobs) if parts or not name.endswith(".part"))


async def nothing_but_what_lives(system: System, client: Client) -> None:
    """FAULTS 32: when no upload is under way, an hour later (as far as uploads can tell), the store has just what the index says, and of that
    everything is held by an artifact that is there, or by a log."""
    database = await system.database()
    try:
        await database.execute("UPDATE artifacts.upload SET seen_at = seen_at - 7200")
        # what is deleted wakes the janitor, who would come round within a minute
        await client.delete(await client.upload(archive({"last": b"words"})))

        async def tidy() -> bool:
            """One snapshot of the index; the files may be a moment behind."""
            async with database.transaction(isolation="repeatable_read"):
                packs = {f"{row['team']}/{row['name']}": row["bytes"] for row in await database.fetch("SELECT * FROM artifacts.pack")}
                unheld = await database.fetch("SELECT name FROM artifacts.pack p WHERE NOT EXISTS (SELECT FROM artifacts.hold WHERE pack = p.id)")
                strange = await database.fetch(
                    "SELECT DISTINCT holder FROM artifacts.hold WHERE holder NOT LIKE 'log:%' "
                    "AND NOT EXISTS (SELECT FROM artifacts.artifact WHERE 'upload:' || upload = holder)"
                )
                uploads = await database.fetch("SELECT id, sealing FROM artifacts.upload")
            files = files_in(system.data.blobs)
            assert (unheld, strange, uploads) == ([], [], []), (unheld, strange, uploads)
            assert files == packs, (files, packs)
            return True

        await eventually(tidy, timeout=30)
    finally:
        await database.close()


async def nothing_of_attempts(system: System, folder: Path | None = None, pid: int = 0) -> None:
    """When nothing runs, all that is below the worker's folders for attempts is empty ones of its present life, for those to come; nothing
    is mounted there, no process is noted, and the journals of earlier lives are gone. The local worker is meant, or that of `folder` and `pid`."""
    folder = folder or system.data.path / "workers" / "local"

    def gone() -> bool:
        work, spool = folder / "work", folder / "spool"
        found = {path.relative_to(work).as_posix() for path in work.rglob("*")}
        roots = {path for path in found if "/" not in path}
        assert found == roots | {f"{root}/{name}" for root in roots for name in ("workspace", "home", "tmp")}, found
        assert len({root.partition("-")[0] for root in roots}) <= 1, roots
        assert str(work) not in Path(f"/proc/{pid or system.process('worker').pid}/mountinfo").read_text()
        assert files_in(spool / "processes") == {}
        assert len(list(spool.glob("*.journal"))) <= 1, list(spool.glob("*.journal"))
        return True

    await eventually(gone, timeout=30)
