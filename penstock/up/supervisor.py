"""Starts servers and services in order, brings back what dies, and ends all of it in order."""

import gc
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Protocol

from libs.embedded.nats import NatsFailed
from libs.embedded.postgres import PostgresFailed
from penstock.up.logfiles import bound, last_lines
from penstock.up.service import ForkedService
from penstock.up.signals import Signals
from proto.introduction import EXPELLED

FAILURES = (PostgresFailed, NatsFailed, OSError)
Say = Callable[[str], None]


class StartFailed(Exception):
    """Something did not come up; the text says what, and ends with its last log lines."""


class Interrupted(Exception):
    """Asked to stop before all was up."""


class Part(Protocol):
    """What the supervisor keeps running."""

    @property
    def pid(self) -> int: ...
    def running(self) -> bool: ...


class Server(Part, Protocol):
    """Postgres or NATS: `start` returns once it can be used, and calls `pause` while it waits for that; it stops by itself, cleanly, and within
    bounds, also when it has not come up."""

    def start(self, *, pause: Callable[[float], None]) -> None: ...
    def stop(self, timeout: float) -> None: ...


class Backoff:
    """How long to wait before starting again what died: 0.1 s, doubling to 5 s; from the start again once it has been well for 30 s."""

    def __init__(self) -> None:
        self._deaths = 0
        self._started = 0.0

    def started(self, now: float) -> None:
        self._started = now

    def died(self, now: float) -> float:
        """When to start again."""
        self._deaths = 1 if now - self._started >= 30.0 else self._deaths + 1
        return now + float(min(0.1 * 2 ** min(self._deaths - 1, 10), 5.0))


class Supervisor:
    """`servers` (by name, in order of starting) come first, then `prepare` is called for the services, which are forked all at once. `changed` is
    called whenever a process comes or goes. One thread, no event loop: it is what every service is forked from."""

    START_TIMEOUT = 60.0
    SPARE_TIMEOUT = 10.0
    """Seconds that are waited for a service that the system may serve without, once all others are ready."""
    DEATHS_AT_START = 3
    DRAIN = 15.0
    """Seconds that a service may take to end."""

    def __init__(
        self,
        *,
        servers: Mapping[str, Server],
        prepare: Callable[[], Sequence[ForkedService]],
        logs: Mapping[str, Path],
        signals: Signals,
        say: Say,
        changed: Callable[[], None],
    ) -> None:
        self._servers = servers
        self._services: dict[str, ForkedService] = {}
        self._prepare = prepare
        self._logs = logs
        self._signals = signals
        self._say = say
        self._changed = changed
        self._parts: dict[str, Part] = {}
        self._starts: dict[str, Callable[[], None]] = {}
        self._backoff: dict[str, Backoff] = {}
        self._due: dict[str, float] = {}
        self._deaths: dict[str, int] = {}
        self.gone: set[str] = set()
        """Services that left for good."""

    def children(self) -> dict[str, int]:
        """The pids of what runs now."""
        return {name: part.pid for name, part in self._parts.items() if part.running()}

    def boot(self) -> None:
        """Start everything; returns when every service is ready. Raises StartFailed, or Interrupted when asked to stop; then `shut_down` is due."""
        for name, server in self._servers.items():
            self._start(name, server, partial(server.start, pause=self._pause))
        try:
            services = self._prepare()
        except OSError as error:  # a port that another has taken meanwhile, above all
            raise StartFailed(f"the services cannot be prepared: {error}") from error
        gc.collect()
        gc.freeze()  # what is in memory by now stays shared with the children instead of being copied by their collectors
        for service in services:
            self._services[service.spec.name] = service
            self._start(service.spec.name, service, service.start)
        deadline = time.monotonic() + self.START_TIMEOUT
        for name, service in sorted(self._services.items(), key=lambda each: each[1].spec.spare):
            patience = time.monotonic() + self.SPARE_TIMEOUT if service.spec.spare else deadline
            while name not in self.gone and (why := service.unready()) is not None:
                if service.spec.spare and time.monotonic() > patience:
                    self._say(f"{name} is not ready: {why}; all else is (its log: {self._logs[name]})")
                    break
                self._continue_booting(name, f"{name} is not ready after {self.START_TIMEOUT:g} s: {why}", max(deadline, patience))

    def _start(self, name: str, part: Part, start: Callable[[], None]) -> None:
        if self._signals.stops:
            raise Interrupted
        try:
            start()
        except FAILURES as error:
            raise StartFailed(f"{name} does not start: {error}") from error
        self._parts[name], self._starts[name] = part, start
        self._backoff[name] = Backoff()
        self._backoff[name].started(time.monotonic())
        self._changed()

    def _pause(self, seconds: float) -> None:
        """Wait, and be interrupted."""
        self._signals.wait(seconds)
        if self._signals.stops:
            raise Interrupted

    def _continue_booting(self, name: str, verdict: str, deadline: float) -> None:
        if self._signals.stops:
            raise Interrupted
        if time.monotonic() > deadline:
            raise StartFailed(f"{verdict}\n{self._tail(name)}")
        self._bring_back()
        for dead, deaths in self._deaths.items():
            if deaths >= self.DEATHS_AT_START:
                raise StartFailed(f"{dead} does not stay up\n{self._tail(dead)}")
        self._pause(0.02)

    def watch(self) -> None:
        """Bring back what dies; returns when asked to stop."""
        with suppress(Interrupted):
            self._watch()

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._signals.stops:
            self._bring_back()
            now = time.monotonic()
            if now - looked >= 5.0:
                looked = now
                for log in self._logs.values():
                    bound(log)
            self._signals.wait(max(0.0, min([looked + 5.0, *self._due.values()]) - now))

    def _bring_back(self) -> None:
        now = time.monotonic()
        for name, part in self._parts.items():
            if name in self.gone:
                continue
            if name in self._due:
                if now < self._due[name]:
                    continue
                try:
                    self._starts[name]()
                except FAILURES as error:
                    self._died(name, f"does not start: {error}")
                    continue
                del self._due[name]
                self._backoff[name].started(time.monotonic())
                self._say(f"{name} is back (pid {part.pid})")
                self._changed()
            elif not part.running():
                service = self._services.get(name)
                code = service.exit_code if service is not None else None
                if service is not None and service.spec.spare and code == EXPELLED:
                    self.gone.add(name)
                    why = last_lines(self._logs[name], 1)
                    self._say(f"{name} has left for good, and is not started again; all else goes on (its log: {self._logs[name]}): {why}")
                    self._changed()
                    continue
                self._died(name, "died" if code is None else f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}")

    def _died(self, name: str, how: str) -> None:
        now = time.monotonic()
        self._deaths[name] = self._deaths.get(name, 0) + 1
        self._due[name] = self._backoff[name].died(now)
        self._say(f"{name} {how}; starting it again in {self._due[name] - now:.1f} s")
        self._changed()

    def shut_down(self) -> None:
        """End the services (the gateway first, so that nobody is told of what its end does to the others), then the servers, last started first. A
        further signal forces: what still runs is killed."""
        patience = self._signals.stops + 1
        first = [name for name in self._services if name == "gateway"]
        self._end(first, patience)
        self._end([name for name in self._services if name not in first], patience)
        for server in reversed(list(self._servers.values())):
            forced = self._signals.stops >= patience
            server.stop(timeout=0.5 if forced else 10.0)
        self._changed()

    def _end(self, names: Sequence[str], patience: int) -> None:
        for name in names:
            self._services[name].send(signal.SIGTERM)
        deadline = time.monotonic() + self.DRAIN
        while running := [name for name in names if self._services[name].running()]:
            if time.monotonic() > deadline or self._signals.stops >= patience:
                for name in running:
                    self._say(f"{name} does not end; killing it")
                    self._services[name].send(signal.SIGKILL)
                deadline = time.monotonic() + self.DRAIN
            self._signals.wait(0.5)

    def _tail(self, name: str) -> str:
        log = self._logs.get(name)
        lines = last_lines(log) if log else ""
        return f"--- the end of {log} ---\n{lines}" if lines else f"({log} is empty)"
