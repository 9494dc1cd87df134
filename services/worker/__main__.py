"""The worker as a process."""

import os
import socket
from collections.abc import Mapping

from libs.runtime.service import run_service
from services.worker.wiring import wire


def main(environ: Mapping[str, str], sockets: Mapping[str, socket.socket]) -> None:
    run_service("worker", wire, environ, sockets)


if __name__ == "__main__":
    main(os.environ, {})
