"""Whether a worker can take work, and whether it wants any. No machine but the numbers given here."""

from pathlib import Path

from msgspec.structs import replace

from services.worker.condition import DISK_NEEDED, DISK_WANTED, Measured, measure, sated, trouble

FINE = Measured(load=0.5, disk_free=10 << 30, disk_size=100 << 30)


def test_a_worker_wants_work_while_its_load_is_below_its_limit_and_its_disk_has_room() -> None:
    assert sated(FINE, 2.0) == ""
    assert sated(FINE, 0.5) == f"its load is {FINE.load:.1f}, and it wants work below 0.5"
    assert sated(replace(FINE, disk_free=DISK_WANTED - 1), 2.0) == "its disk has 1023 MiB free, and it wants work from 1024 MiB on"


def test_a_full_disk_is_trouble() -> None:
    """FAULTS 53."""
    assert trouble(FINE) == ""
    assert trouble(replace(FINE, disk_free=DISK_NEEDED - 1)) == "disk full: 63 MiB free"
    assert trouble(replace(FINE, disk_free=DISK_NEEDED)) == ""


def test_of_a_small_disk_less_is_needed() -> None:
    assert trouble(Measured(load=0.0, disk_free=1 << 20, disk_size=20 << 20)) == ""
    assert trouble(Measured(load=0.0, disk_free=(1 << 20) - 1, disk_size=20 << 20)) == "disk full: 0 MiB free"


def test_the_machine_is_measured(tmp_path: Path) -> None:
    measured = measure(tmp_path)
    assert measured.load >= 0 and 0 < measured.disk_free <= measured.disk_size
