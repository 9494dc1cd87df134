"""A network of its own for a worker, which can be cut: two namespaces, one of them a router, so that what is sent into the cut is swallowed
without a word, as where a switch has died."""

import contextlib
import os
import secrets
import socket
import subprocess
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

_HOME, _NEAR, _FAR, _AWAY = 1, 2, 5, 6
_NAME = "penstock-"


class Network:
    """`host` is this side's address, which only the namespace `away` can reach."""

    def __init__(self) -> None:
        # the kernel says who made it, so that what a killed run left behind is found
        self._name = f"{_NAME}{os.getpid()}-{secrets.token_hex(2)}"
        self._router, self.away, self._link = f"{self._name}-r", f"{self._name}-w", f"pk-{secrets.token_hex(4)}"
        self._net = f"10.{secrets.randbelow(256)}.{secrets.randbelow(256)}"
        self.host = f"{self._net}.{_HOME}"

    def cut(self) -> None:
        _ip("-n", self._router, "link", "set", "far", "down")

    def heal(self) -> None:
        _ip("-n", self._router, "link", "set", "far", "up")

    def make(self) -> None:
        net, router, away, link = self._net, self._router, self.away, self._link
        for namespace in (router, away):
            _ip("netns", "add", namespace)
            _ip("-n", namespace, "link", "set", "lo", "up")
        _ip("link", "add", link, "type", "veth", "peer", "name", "near", "netns", router)
        _ip("-n", router, "link", "add", "far", "type", "veth", "peer", "name", "eth0", "netns", away)
        for where, device, number in (("", link, _HOME), (router, "near", _NEAR), (router, "far", _FAR), (away, "eth0", _AWAY)):
            inside = ("-n", where) if where else ()
            _ip(*inside, "addr", "add", f"{net}.{number}/30", "dev", device)
            _ip(*inside, "link", "set", device, "up")
        _ip("route", "add", f"{net}.4/30", "via", f"{net}.{_NEAR}")
        _ip("-n", away, "route", "add", "default", "via", f"{net}.{_FAR}")
        _ip("netns", "exec", router, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")

    def remove(self) -> None:
        """What ran in them goes on, without a network; links go with their namespaces."""
        for namespace in (self.away, self._router):
            subprocess.run(["ip", "netns", "delete", namespace], capture_output=True, check=False)


@contextlib.contextmanager
def network() -> Iterator[Network]:
    """As root. What an earlier run could not remove goes too."""
    for line in _ip("netns", "list").splitlines():
        maker = line.removeprefix(_NAME).partition("-")[0]
        if line.startswith(_NAME) and maker.isdigit() and not os.path.exists(f"/proc/{maker}"):
            subprocess.run(["ip", "netns", "delete", line.split()[0]], capture_output=True, check=False)
    made = Network()
    try:
        made.make()
        yield made
    finally:
        made.remove()


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


def listen_at(host: str) -> None:
    """In the supervisor: the bus and the artifacts service listen at this address, and all others are told so."""
    import penstock.up.services
    import penstock.up.system

    config, specs = penstock.up.system.server_config, penstock.up.services.service_specs

    def moved(data: Any, secrets: Any, ports: Any, *others: Any) -> Any:
        def elsewhere(environ: Mapping[str, str]) -> dict[str, str]:
            told = dict(environ)
            for name, value in environ.items():
                for port in (ports.nats, ports.artifacts):
                    told[name] = told[name].replace(f"127.0.0.1:{port}", f"{host}:{port}") if name.endswith("_URL") else value
            return told

        found = []
        for spec in specs(data, secrets, ports, *others):
            sockets = dict(spec.sockets)
            if spec.name == "artifacts":
                sockets["http"].close()
                sockets["http"] = socket.create_server((host, ports.artifacts), backlog=1024)
            found.append(msgspec.structs.replace(spec, environ=elsewhere(spec.environ), sockets=sockets))
        return found

    penstock.up.system.server_config = lambda **options: config(**{**options, "listen_host": host})
    penstock.up.services.service_specs = moved
