"""Trees and files of any size go through the whole system in bounded memory, and sparse files stay sparse."""

import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.measured import peak
from tests.faults.processes import concerned
from tests.faults.system import System

MOST = 200_000_000
"""Bytes of memory for each process, the client's included."""
FILES = 200_000
SIZE = 50 << 30
PARTS = 8
PART = 3 << 20

Penstock = Callable[..., str]


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """One that is not kept: it is too large."""
    with tempfile.TemporaryDirectory(prefix="penstock-large-") as folder:
        yield Path(folder)


@pytest.fixture
def peaks() -> dict[str, int]:
    """Bytes of memory by command and service."""
    return {}


@pytest.fixture
def penstock(system: System, tmp_path: Path, peaks: dict[str, int]) -> Penstock:
    """The command line, each in a process of its own, whose memory is looked at in the end."""

    def run(*arguments: str | Path) -> str:
        report = tmp_path / "peak"
        command = [sys.executable, "-P", "-m", "tests.faults.measured", report, *arguments]
        done = subprocess.run(command, env=system.environ, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=150)
        assert done.returncode == 0, done.stderr
        peaks[f"penstock {' '.join(map(str, arguments))}"] = int(report.read_text())
        return done.stdout

    return run


def task(folder: Path, script: str) -> Path:
    content = {"platform": "linux", "inputs": [{"name": "src"}], "outputs": [{"name": "dist"}], "run": {"path": "sh", "args": ["-ec", script]}}
    path = folder / "task.json"
    path.write_text(json.dumps(content))
    return path


def assert_bounded(system: System, peaks: dict[str, int]) -> None:
    """The commands, and every process that runs of the system."""
    names = {who.pid: name for name, who in system.run().children.items()}
    peaks |= {names.get(process.pid, str(process)): peak(process.pid) for process in concerned(str(system.home))}
    report = "\n".join(f"{peaks[name] / 1e6:.0f} MB: {name[:80]}" for name in sorted(peaks, key=lambda name: -peaks[name]))
    print(report)
    assert all(size < MOST for size in peaks.values()), report


@pytest.mark.timeout(300)
def test_a_tree_of_200_000_files_takes_bounded_memory_everywhere(system: System, penstock: Penstock, peaks: dict[str, int], tmp_path: Path) -> None:
    work, back, made = tmp_path / "work", tmp_path / "back", tmp_path / "made"
    for number in range(FILES):
        if number % 1000 == 0:
            (work / f"{number // 1000:03}").mkdir(parents=True)
        (work / f"{number // 1000:03}/file{number:06}").write_bytes(b"%d\n" % number)
    artifact = penstock("artifact", "upload", work).strip()
    # as many come out, and every file of them is new
    script = (
        f"test $(find src -type f | wc -l) = {FILES}; "
        "for n in $(seq 100 299); do mkdir dist/$n; seq -f x%.0f ${n}000 ${n}999 | (cd dist/$n; split -a 4 -d -l 1 - new); done"
    )
    penstock("execute", "-c", task(tmp_path, script), "-i", f"src=artifact:{artifact}")
    penstock("artifact", "download", artifact, back)
    assert subprocess.run(["diff", "-r", work, back]).returncode == 0
    penstock("artifact", "download", "build:1/dist/142", made)
    assert sorted(path.name for path in made.iterdir()) == [f"new{number:04}" for number in range(1000)]
    assert (made / "new0042").read_bytes() == b"x142042\n"
    assert_bounded(system, peaks)


@pytest.mark.timeout(120)
def test_a_sparse_file_of_50_gb_comes_back_as_it_was(system: System, penstock: Penstock, peaks: dict[str, int], tmp_path: Path) -> None:
    chance = random.Random(50)
    (tmp_path / "work").mkdir()
    with (tmp_path / "work/disk").open("wb") as file:
        file.truncate(SIZE)
        for _ in range(PARTS):
            file.seek(chance.randrange(SIZE - PART))
            file.write(chance.randbytes(PART))
    artifact = penstock("artifact", "upload", "work").strip()
    penstock("artifact", "download", artifact, "back")
    # written to where it is, so that the worker has to find what changed
    script = "printf changed | dd of=src/disk bs=1 seek=1000 conv=notrunc status=none; mv src/disk dist"
    penstock("execute", "-c", task(tmp_path, script), "-i", f"src=artifact:{artifact}", "-o", "dist=made")
    work, back, made = (tmp_path / name / "disk" for name in ("work", "back", "made"))
    assert_same(work, back)
    with work.open("r+b") as file:
        file.seek(1000)
        file.write(b"changed")
    assert_same(work, made)
    for path in (back, made):
        assert path.stat().st_blocks * 512 < 2 * PARTS * (16 << 20), "it is sparse"
    assert_bounded(system, peaks)


def assert_same(one: Path, other: Path) -> None:
    """Equal, where either has data."""
    assert one.stat().st_size == other.stat().st_size
    with one.open("rb") as first, other.open("rb") as second:
        for start, end in {*data_in(first.fileno()), *data_in(second.fileno())}:
            for at in range(start, end, 1 << 20):
                length = min(1 << 20, end - at)
                assert os.pread(first.fileno(), length, at) == os.pread(second.fileno(), length, at)


def data_in(file: int) -> Iterator[tuple[int, int]]:
    at, size = 0, os.fstat(file).st_size
    while at < size:
        try:
            at = os.lseek(file, at, os.SEEK_DATA)
        except OSError:  # only a hole is left
            return
        end = os.lseek(file, at, os.SEEK_HOLE)
        yield at, end
        at = end
