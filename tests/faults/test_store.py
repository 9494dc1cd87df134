"""A store that is full, and one whose packs are not what they were."""

import os
from pathlib import Path

import pytest

from penstock.client.errors import Failed, Full
from tests.controls import eventually
from tests.faults.conftest import Start
from tests.faults.folders import same, write
from tests.faults.storage import nothing_but_what_lives, stored
from tests.faults.system import System
from tests.faults.traffic import Traffic
from tests.faults.work import Work

READING = Work("reading", "cat src/* | sha256sum > dist/sum", outputs={"dist": {}})


def on_a_disk_of(size: str, start: Start) -> System:
    """A system whose store is on a small disk of its own, which nobody else sees."""
    system = start()
    system.down()
    mount = f'mount -t tmpfs -o size={size} tmpfs "$0" && exec "$@"'
    user = [] if os.geteuid() == 0 else ["--map-root-user"]
    system.data.blobs.mkdir(exist_ok=True)
    system.wrapped = ["unshare", "--mount", *user, "sh", "-c", mount, str(system.data.blobs)]
    system.up()
    return system


async def test_on_a_full_disk_an_upload_fails_saying_so_and_its_space_comes_back(start: Start, tmp_path: Path) -> None:
    """FAULTS 31: a store of 40 MB on a disk of its own; what was there before is sound, also meanwhile."""
    system = on_a_disk_of("40m", start)

    def free() -> int:
        """As the service sees it."""
        found = os.statvfs(f"/proc/{system.process('artifacts').pid}/root{system.data.blobs}")
        return found.f_bavail * found.f_bsize

    small, large, medium = tmp_path / "small", tmp_path / "large", tmp_path / "medium"
    write(small, {"a": b"alpha", "b": os.urandom(2 << 20)})
    write(large, {"large": os.urandom(80 << 20)})
    write(medium, {"medium": os.urandom(28 << 20)})
    async with system.client() as client:
        kept = await client.upload(small)
        artifacts = system.process("artifacts")
        for _ in range(2):
            with pytest.raises(Full, match="no room left in the store"):
                await client.upload(large)
            await client.download(kept, tmp_path / "kept")
            assert same(tmp_path / "kept", small)
            await eventually(lambda: free() > 34 << 20, timeout=20)
        artifact = await client.upload(medium)
        await client.download(artifact, tmp_path / "back")
        assert same(tmp_path / "back", medium)
        assert system.process("artifacts") == artifacts


async def test_a_full_disk_under_a_builds_output_is_an_error_that_says_so(start: Start, tmp_path: Path) -> None:
    """FAULTS 31, 53"""
    system = on_a_disk_of("24m", start)
    async with Traffic(system) as traffic:
        build = await traffic.submit(Work("too much", "head -c 60000000 /dev/urandom > dist/all", "errored", outputs={"dist": {}}))
        await traffic.ended()
        assert "There is no room left in the store" in (await traffic.client.build(build.id)).error
        again = await traffic.submit(Work("enough", "head -c 6000000 /dev/urandom > dist/all", outputs={"dist": {}}))
        await traffic.ended()
        assert (await traffic.client.build(again.id)).status == "succeeded"


async def test_a_corrupt_pack_is_named_and_the_next_upload_of_the_same_heals_it(system: System, tmp_path: Path) -> None:
    """A bit flips in the middle of a pack."""
    work = tmp_path / "work"
    write(work, {"a": b"alpha", "large": os.urandom(20 << 20)})
    async with Traffic(system) as traffic:
        client = traffic.client
        artifact = await client.upload(work)
        [pack, *_] = sorted(stored(system), key=lambda path: path.stat().st_size, reverse=True)
        flip(pack, pack.stat().st_size // 2)
        name = f"in pack {system.team}/{pack.name} is not what was stored"
        with pytest.raises(Failed, match=f"{name}.*uploading the same files again heals it"):
            await client.download(artifact, tmp_path / "broken")
        build = await traffic.submit(READING._replace(name="on what is damaged", status="errored"), artifact)
        await traffic.ended()
        error = (await client.build(build.id)).error
        assert "input `src`: 500 What was stored is damaged: blob " in error and name in error, error
        again = await client.upload(work)
        assert again.digest == artifact.digest
        for number, healed in enumerate((again, artifact)):
            await client.download(healed, tmp_path / f"healed{number}")
            assert same(tmp_path / f"healed{number}", work)
        build = await traffic.submit(READING, artifact)
        await traffic.ended()
        assert (await client.build(build.id)).status == "succeeded"
        await nothing_but_what_lives(system, client)


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        bits = file.read(1)[0]
        file.seek(at)
        file.write(bytes([bits ^ 1]))
