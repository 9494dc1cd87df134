"""A supervisor over made-up services, as a program: `python -m tests.unit.supervised FOLDER SERVICE=BEHAVIOUR…`.

Behaviours: `well` ends at SIGTERM; `stubborn` does not; `dies` exits with 3 at once; `spare` is never ready, and need not be; `expelled`
need not be either, and exits with 77. The first lines of stdout are what happened."""

import http.server
import os
import signal
import socket
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

from penstock.up.service import ForkedService, ServiceSpec
from penstock.up.signals import Signals
from penstock.up.supervisor import Interrupted, StartFailed, Supervisor


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = f'{{"pid": {os.getpid()}}}'.encode()
        self.send_response(503 if os.environ["BEHAVIOUR"] == "spare" else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def behave(environ: Mapping[str, str], sockets: Mapping[str, socket.socket]) -> None:
    name, folder = environ["NAME"], Path(environ["FOLDER"])
    assert dict(os.environ) == dict(environ)
    if environ["BEHAVIOUR"] == "dies":
        print("no reason to live", file=sys.stderr)
        raise SystemExit(3)
    if environ["BEHAVIOUR"] == "expelled":
        print("it was revoked", file=sys.stderr)
        raise SystemExit(77)
    told = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: environ["BEHAVIOUR"] in ("well", "spare") and told.set())
    server = http.server.HTTPServer(("127.0.0.1", 0), Answer, bind_and_activate=False)
    server.socket = sockets["status"]
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    told.wait()
    with (folder / "ended").open("a") as file:
        file.write(f"{name}\n")


def main(folder: Path, behaviours: dict[str, str]) -> int:
    sockets = {name: {"status": socket.create_server(("127.0.0.1", 0))} for name in behaviours}
    logs = {name: folder / f"{name}.log" for name in behaviours}

    def tell(*words: object) -> None:
        print(*words, flush=True)

    with Signals() as signals:
        services = [
            ForkedService(
                ServiceSpec(
                    name=name,
                    main=behave,
                    environ={"NAME": name, "FOLDER": str(folder), "BEHAVIOUR": behaviour},
                    sockets=sockets[name],
                    log=logs[name],
                    spare=behaviour in ("spare", "expelled"),
                ),
                signals,
                not_its_own=[other["status"] for key, other in sockets.items() if key != name],
            )
            for name, behaviour in behaviours.items()
        ]
        supervisor = Supervisor(
            servers={}, prepare=lambda: services, logs=logs, signals=signals, say=lambda text: tell("say", text), changed=lambda: None
        )
        if "spare" in behaviours.values():
            supervisor.SPARE_TIMEOUT = 0.5
        try:
            supervisor.boot()
            for service in services:
                if service.running():
                    tell("ready", service.spec.name, service.pid, service.spec.status)
            tell("watching")
            supervisor.watch()
        except (StartFailed, Interrupted) as error:
            tell(type(error).__name__, error)
            return 1
        finally:
            supervisor.shut_down()
            tell("threads", threading.active_count(), "left", len(supervisor.children()))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), dict(word.split("=") for word in sys.argv[2:])))
