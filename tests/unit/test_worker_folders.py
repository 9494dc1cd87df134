"""Folders of attempts are used again when a step left them as it found them."""

from pathlib import Path

import pytest

from services.worker.executors.sandboxes import Bubblewrap, Folders
from services.worker.folders import FolderPool

MOUNTED = Path("home/somebody/clone/.venv")


@pytest.fixture
def taken(tmp_path: Path) -> tuple[FolderPool, Folders]:
    pool = FolderPool(tmp_path, "boot", [MOUNTED, Path("tmp/never/made")])
    folders = pool.take()
    (folders.root / MOUNTED).mkdir(parents=True)
    return pool, folders


async def test_what_a_sandbox_made_to_mount_on_is_nothing_that_a_step_left(taken: tuple[FolderPool, Folders]) -> None:
    pool, folders = taken
    await pool.give_back(folders)
    assert pool.take() == folders
    assert list(folders.home.iterdir()) == []


@pytest.mark.parametrize("left", [MOUNTED / "file", MOUNTED.parent / "file", MOUNTED.parent.parent / "file"])
async def test_what_a_step_left_beside_it_goes_with_the_folders(taken: tuple[FolderPool, Folders], left: Path) -> None:
    pool, folders = taken
    (folders.root / left).touch()
    await pool.give_back(folders)
    assert not folders.root.exists() and pool.take() != folders


async def test_a_link_in_its_place_leads_nowhere(taken: tuple[FolderPool, Folders], tmp_path: Path) -> None:
    pool, folders = taken
    outside = tmp_path / "outside" / "clone" / ".venv"
    outside.mkdir(parents=True)
    (folders.home / "somebody").rename(folders.home / "else")
    (folders.home / "somebody").symlink_to(tmp_path / "outside")
    await pool.give_back(folders)
    assert outside.is_dir() and not folders.root.exists()


def test_a_sandbox_says_what_it_makes_in_an_attempts_folders(tmp_path: Path) -> None:
    (shown := tmp_path / "clone").mkdir()
    assert shown.is_relative_to("/tmp") is (shown.relative_to("/") in Bubblewrap(tmp_path / "etc", [shown, Path("/usr/lib")]).mounted)
