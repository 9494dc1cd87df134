"""A second instance of a service of a running system: a process of its own, as a scaled-out deployment has it."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import msgspec

from penstock.up.datadir import DataDir, Ports
from penstock.up.services import Options, service_specs


@contextmanager
def second(
    data: DataDir, name: str, lease_seconds: float | None = None, environ: Mapping[str, str] | None = None
) -> Iterator["subprocess.Popen[bytes]"]:
    """It has a name of its own, so it must win its offices. `environ`: more of its environment. Killed in the end; its log is `<name>-second.log`."""
    ports = msgspec.json.decode((data.path / "ports.json").read_bytes(), type=Ports)
    options = Options(lease_seconds=lease_seconds, store=data.store(None))
    with ExitStack() as stack:
        unused = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        # What listens has its port already: nothing may be bound there again.
        specs = service_specs(data, data.secrets(), msgspec.structs.replace(ports, artifacts=0), options, unused, os.environ)
        for each in specs:
            for listening in each.sockets.values():
                stack.enter_context(listening)
        (spec,) = (each for each in specs if each.name == name)
        settings = {key: value.replace("127.0.0.1:0", f"127.0.0.1:{ports.artifacts}") for key, value in spec.environ.items()}
        own = {**settings, "PENSTOCK_INSTANCE": "second", "PYTHONPATH": os.pathsep.join(sys.path), **(environ or {})}
        log = stack.enter_context((data.logs / f"{name}-second.log").open("wb"))
        process = subprocess.Popen([sys.executable, "-P", "-m", f"services.{name}"], env=own, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            yield process
        finally:
            process.kill()
            process.wait()
