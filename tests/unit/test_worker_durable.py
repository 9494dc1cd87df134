"""A worker's small files outlive a power cut: the content reaches the disk before its name does, and the name before it is relied on."""

import os
from pathlib import Path

import pytest

from services.worker.executors.docker import owner_of
from services.worker.executors.durable import write_durably


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
