"""Runs the command that it is given, and ends with SIGTERM, or with whoever started it, and with all that the command has ever started.

A Docker engine's helpers slip away from it on purpose. They become this process's children: a worker under test, which kills what it takes for
orphans of its steps, must not adopt them.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys

from services.worker.executors.processes import adopt_orphans, descendants, send

PR_SET_PDEATHSIG = 1


def end(*_: object) -> None:
    while left := [seen for seen in descendants([os.getpid()]) if seen.state != "Z"]:
        for seen in left:
            send(seen.pid, signal.SIGKILL)
    os._exit(0)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, end)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    adopt_orphans(True)
    subprocess.Popen(sys.argv[1:])
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()
