"""The worker as a process."""

import os
import socket
from collections.abc import Mapping
from functools import partial

from libs.runtime.service import run_service
from services.worker.mounts import private_mounts
from services.worker.wiring import wire


def main(environ: Mapping[str, str], sockets: Mapping[str, socket.socket]) -> None:
    run_service("worker", partial(wire, private=private_mounts()), environ, sockets)


if __name__ == "__main__":
    main(os.environ, {})
