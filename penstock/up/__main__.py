"""The detached supervisor: `python -m penstock.up DESCRIPTOR REQUEST`, started by `penstock up --detach`, which reads its reports."""

import os
import sys
import traceback
from datetime import UTC, datetime

import msgspec

from penstock.up.report import Report, Reporter
from penstock.up.supervisor import Interrupted, StartFailed
from penstock.up.system import AlreadyRunning, Request, System


def main(descriptor: int, request: Request) -> int:
    """What is said goes to the log (stderr) and, until all is ready, to whoever waits."""
    reporter = Reporter(descriptor)
    os.set_inheritable(descriptor, False)

    def say(text: str) -> None:
        print(datetime.now(UTC).isoformat(timespec="milliseconds"), text, file=sys.stderr, flush=True)
        reporter.send(Report("said", text))

    try:
        System(request, say, os.environ).serve(lambda url: reporter.send(Report("ready", url)))
    except AlreadyRunning:
        reporter.send(Report("taken"))
    except Interrupted:
        reporter.send(Report("failed", "it was told to stop"))
    except StartFailed as error:
        print(error, file=sys.stderr)
        reporter.send(Report("failed", str(error)))
        return 1
    except Exception as error:
        traceback.print_exc()
        reporter.send(Report("failed", f"{type(error).__name__}: {error}"))
        return 1
    return 0


sys.exit(main(int(sys.argv[1]), msgspec.json.decode(sys.argv[2], type=Request)))
