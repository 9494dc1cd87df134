"""Python imports this at its start where this folder is in PYTHONPATH: so a test changes what a supervisor runs, and all that it forks."""

import os
import sys
from pathlib import Path

if "penstock.up" in sys.orig_argv:
    from tests.faults.edges.watch import watch
    from tests.faults.network import listen_at

    if edges := os.environ.get("PENSTOCK_TEST_EDGES"):
        watch(Path(edges))
    if (host := os.environ.get("PENSTOCK_TEST_HOST", "127.0.0.1")) != "127.0.0.1":
        listen_at(host)
if (clocks := os.environ.get("TEST_CLOCKS")) and {"penstock.up", "services.worker"} & {*sys.orig_argv}:
    from tests.faults.clocks import set_clocks

    set_clocks(clocks)
