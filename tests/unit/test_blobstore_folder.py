"""The local folder of the object store: what is put is there, whichever way it went to the disk."""

import os
from pathlib import Path

import pytest

from libs.archives.pages import LARGE, PAGE, Paged, is_paged
from libs.archives.pages import paged as memory_of
from libs.blobstore.objects import Folder


def paged(data: bytes) -> memoryview:
    memory = Paged(memory_of(len(data)))
    memory.add(data)
    return memory.filled()


@pytest.mark.parametrize("size", [LARGE, LARGE + 1, LARGE + PAGE - 1, LARGE + PAGE, 8 << 20])
@pytest.mark.parametrize("behind", [[], [b"x"], [b"", os.urandom(5000), os.urandom(70_000)]])
def test_large_blobs_go_past_the_page_cache_and_all_bytes_are_there(tmp_path: Path, size: int, behind: list[bytes]) -> None:
    data = os.urandom(size)
    assert is_paged(paged(data))
    Folder(tmp_path).put("team/name", [paged(data), *behind])
    assert (tmp_path / "team/name").read_bytes() == b"".join([data, *behind])


def test_a_file_system_that_has_no_such_way_is_written_to_as_always(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "O_DIRECT", 0)
    data = os.urandom(LARGE + 1)
    Folder(tmp_path).put("team/name", [paged(data), b"x"])
    assert (tmp_path / "team/name").read_bytes() == data + b"x"
