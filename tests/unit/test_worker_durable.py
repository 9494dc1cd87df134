"""A worker's small files outlive a power cut: the content reaches the disk before its name does, and the name before it is relied on."""

import errno
import os
from pathlib import Path

import pytest

from services.worker.durable import write_durably
from services.worker.executors.owned import owner_of
from services.worker.folders import next_boot


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is done to the disk, in order."""
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        calls.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def replaced(old: Path, new: Path) -> None:
        calls.append(f"rename {Path(old).name} {Path(new).name}")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    return calls


def test_a_file_is_replaced_for_good(tmp_path: Path, done: list[str]) -> None:
    write_durably(tmp_path / "file", b"old")
    write_durably(tmp_path / "file", b"new")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"new"]
    assert done == ["sync file.new", "rename file.new file", f"sync {tmp_path.name}"] * 2


def test_a_worker_s_mark_is_on_the_disk_before_a_container_bears_it(tmp_path: Path, done: list[str]) -> None:
    assert owner_of(tmp_path, lambda: "mark") == owner_of(tmp_path, lambda: "another") == "mark"
    assert done == ["sync owner.new", "rename owner.new owner", f"sync {tmp_path.name}"]


def test_a_boot_begins_after_all_before_it_whatever_the_clock_says_and_that_is_on_the_disk(tmp_path: Path, done: list[str]) -> None:
    assert [next_boot(tmp_path, now) for now in (7.0015, 7.0015, 3600.0, 0.0, 7.0, 3601.0)] == [
        7001,
        7002,
        3_600_000,
        3_600_001,
        3_600_002,
        3_601_000,
    ]
    assert done == ["sync boot.new", "rename boot.new boot", f"sync {tmp_path.name}"] * 6
    (tmp_path / "boot").write_bytes(b"")
    assert next_boot(tmp_path, 8.0) == 8000


def test_a_worker_whose_disk_is_full_begins_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert next_boot(tmp_path, 7.0) == 7000

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert next_boot(tmp_path, 7.0) == 7001
    monkeypatch.undo()
    assert (tmp_path / "boot").read_text() == "7000"
