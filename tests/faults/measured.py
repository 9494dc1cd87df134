"""`python -m tests.faults.measured FILE ARGUMENT...`: the command line `penstock ARGUMENT...`; its peak of memory goes into the file, in bytes."""

import sys
from pathlib import Path

from penstock.cli.main import main


def peak(pid: int | str) -> int:
    """Bytes of memory that a process has had at most."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:")), 0)


if __name__ == "__main__":
    report = Path(sys.argv[1])
    del sys.argv[1]
    try:
        main()
    finally:
        report.write_text(str(peak("self")))
