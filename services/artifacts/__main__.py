"""The artifacts service: `python -m services.artifacts`, configured by PENSTOCK_… (see wiring.Settings)."""

import os
import socket
from collections.abc import Mapping

from libs.runtime.service import run_service
from services.artifacts.wiring import wire


def main(environ: Mapping[str, str], sockets: Mapping[str, socket.socket]) -> None:
    """Run until told to stop."""
    run_service("artifacts", wire, environ, sockets)


if __name__ == "__main__":
    main(os.environ, {})
