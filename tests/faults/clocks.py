"""Machines whose wall clocks are off: a service's own `time.time`, and nobody else's."""

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

VARIABLE = "TEST_CLOCKS"
START = str(Path(__file__).parent / "start")


def environment(ahead: Mapping[str, float]) -> dict[str, str]:
    """For a process that is, or forks, these services: by how many seconds the clock of each is ahead."""
    return {VARIABLE: ",".join(f"{name}={seconds}" for name, seconds in ahead.items()), "PYTHONPATH": os.pathsep.join([START, *sys.path])}


def set_clocks(text: str) -> None:
    """From now on, in those that this process becomes or forks."""
    import libs.runtime.service

    ahead = {name: float(seconds) for name, _, seconds in (part.partition("=") for part in text.split(","))}
    run, real = libs.runtime.service.run_service, time.time

    def known(name: str, *arguments: Any) -> None:
        if seconds := ahead.get(name):
            time.time = lambda: real() + seconds
        run(name, *arguments)

    libs.runtime.service.run_service = known
