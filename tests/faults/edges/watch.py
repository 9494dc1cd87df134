"""Wraps what crosses the edge of a process."""

import asyncio
import functools
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from yarl import URL

from tests.faults.edges.control import Watched

FILES = ("fsync", "fdatasync", "rename", "replace", "link", "symlink", "mkdir", "rmdir", "unlink", "pwrite", "writev", "write", "read", "pread")
PROCESSES = ("kill", "killpg", "pidfd_open", "waitpid", "posix_spawn")
OURS = ("services.", "libs.")
_LOOP = "libs.runtime.service"
_STATUS = ("/livez", "/readyz", "/metrics")
_RESTARTS_SECONDS = 0.05
_COMINGS = 100_000
_AGAIN_SECONDS = {"builds-reactions": 0.25, "builds-reports": 0.25}
"""Whom a message was told that died before the ack is told it again when back, before what came meanwhile."""
_ANYBODYS = ("sql connects", "bus connects")
"""Whoever comes first does it, so its name would be chance."""

About = Callable[..., "str | None"]
"""What an edge is called for these arguments; None: it is none of ours."""


def watch(folder: Path) -> None:
    """From now on, in this process and in those that it forks."""
    import aiodocker.stream
    import aiohttp
    import asyncpg
    from aiohttp import web
    from aiohttp.web_protocol import RequestHandler

    import libs.bus.connection
    import libs.bus.streams
    import libs.bus.wire
    import libs.eventlog.postgres
    import libs.runtime.service
    import penstock.up.supervisor
    import services.scheduler.fleet
    import services.worker.mounts

    edge = Edges(Watched(folder))
    for name in ("fetch", "fetchrow", "fetchval", "execute", "executemany"):
        edge.wrap(asyncpg.Connection, name, lambda *_, **__: None if _calls("libs.eventlog.postgres", "append") else "sql")
    edge.wrap(asyncpg.connect_utils, "_connect", lambda *_, **__: "sql connects")
    edge.wrap_each(libs.eventlog.postgres.PostgresLog, "append", _appended)
    edge.wrap(libs.bus.connection.Connection, "write", lambda _, subject, *__, **___: f"bus says {_shape(subject)}", flush=True)
    edge.wrap(libs.bus.wire.Wire, "_process_msg", lambda _, sid, subject, *__: f"bus tells {_shape(subject)}")
    edge.wrap(libs.bus.connection.Connection, "_connect", lambda *_: "bus connects")
    edge.wrap(web.Application, "_handle", lambda _, request: _http("handles", request))
    edge.wrap(RequestHandler, "finish_response", lambda _, request, *__, **___: _http("answers", request))
    edge.wrap(aiohttp.ClientSession, "_request", _asks)
    edge.wrap(aiodocker.stream.Stream, "read_out", lambda *_: "engine tells output")
    for name in FILES:
        edge.wrap(os, name, lambda *_, name=name, **__: f"disk {name}" if _caller() else None)
    for name in PROCESSES:
        edge.wrap(os, name, lambda *_, name=name, **__: f"process {name}" if _caller() else None)
    edge.wrap(subprocess.Popen, "__init__", lambda *_, **__: "process spawn")
    edge.wrap(services.worker.mounts, "_mount", lambda *_: "mount")
    edge.wrap(services.worker.mounts, "unmount", lambda *_: "unmount")

    _tell_again(libs.bus.streams.Streams)
    run = libs.runtime.service.run_service

    def known(name: str, *arguments: Any) -> None:
        edge.watched.begin(name)
        run(name, *arguments)

    libs.runtime.service.run_service = known
    # Who dies a hundred times in a row is not to be kept waiting for it.
    penstock.up.supervisor.Backoff.died = lambda _, now: now + _RESTARTS_SECONDS  # type: ignore[method-assign]
    services.scheduler.fleet.COMINGS = _COMINGS


class Edges:
    def __init__(self, watched: Watched) -> None:
        self.watched = watched

    def wrap(self, where: Any, name: str, about: About, flush: bool = False) -> None:
        """Calls of `where.name` are crossed before and after. `flush`: what was said goes out before one dies of it."""
        self.wrap_each(where, name, lambda *args, **options: [what] if (what := about(*args, **options)) else [], flush)

    def wrap_each(self, where: Any, name: str, about: Callable[..., list[str]], flush: bool = False) -> None:
        """Each of what `about` names is crossed."""
        inner = getattr(where, name)

        def before(*args: Any, **options: Any) -> list[str]:
            named = []
            if self.watched.on:
                named = [what if what in _ANYBODYS else f"{what}{_by()}" for what in about(*args, **options)]
                for each in named:
                    if self.watched.crossed(f"{each}: before"):
                        self.watched.die()
            return named

        def after(named: list[str], this: Any) -> None:
            for each in named:
                if self.watched.crossed(f"{each}: after"):
                    if flush:
                        this._write_out()
                    self.watched.die()

        @functools.wraps(inner)
        async def awaited(*args: Any, **options: Any) -> Any:
            named = before(*args, **options)
            result = await inner(*args, **options)
            after(named, args[0] if args else None)
            return result

        @functools.wraps(inner)
        def called(*args: Any, **options: Any) -> Any:
            named = before(*args, **options)
            result = inner(*args, **options)
            after(named, args[0] if args else None)
            return result

        setattr(where, name, awaited if inspect.iscoroutinefunction(inner) else called)


def _tell_again(bus: Any) -> None:
    create = bus._create_consumer
    bus._create_consumer = lambda self, consumer: create(self, consumer._replace(ack_wait=_AGAIN_SECONDS.get(consumer.name, consumer.ack_wait)))


def _appended(_: Any, writes: Any) -> list[str]:
    return sorted({f"append {event.type}" for write in writes for event in write.events})


def _shape(subject: str | bytes) -> str:
    """A subject without its ids, which have digits."""
    words = (subject.decode() if isinstance(subject, bytes) else subject).split(".")
    if words[:2] == ["$JS", "ACK"]:
        return f"ack {words[3] if not re.search('[0-9]', words[3]) else '*'}"
    return ".".join("*" if re.search("[0-9]", word) else word for word in words)


def _path(path: str) -> str:
    return "/".join("*" if re.search("[0-9]", word) and word != "v1" else word for word in path.split("/"))


def _http(what: str, request: Any) -> str | None:
    return None if request.path in _STATUS else f"http {what} {request.method} {_path(request.path)}"


def _asks(_: Any, method: str, url: Any, **__: Any) -> str:
    """What a container engine is asked stands in the path, after its version."""
    asked = URL(url)
    return f"engine {method} {_path(asked.path).removeprefix('/*')}" if asked.host == "engine" else f"http asks {method}"


def _calls(module: str, function: str) -> bool:
    frame = _caller()
    while frame is not None:
        if frame.f_globals.get("__name__") == module and frame.f_code.co_name == function:
            return True
        frame = frame.f_back
    return False


def _caller() -> FrameType | None:
    """The innermost frame that is ours; what turns the event loop does not count."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith(OURS):
            return None if module == _LOOP else frame
        frame = frame.f_back
    return None


def _by() -> str:
    """The innermost function of ours that is public, else the innermost, and the task."""
    frame = found = _caller()
    while frame is not None and (module := frame.f_globals.get("__name__", "")) != _LOOP:
        if module.startswith(OURS) and not any(word.startswith("_") for word in _words(frame)):
            found = frame
            break
        frame = frame.f_back
    return f", {found.f_globals['__name__']}.{'.'.join(_words(found))}{_task()}" if found else _task()


def _words(frame: FrameType) -> list[str]:
    return [word for word in frame.f_code.co_qualname.split(".") if word != "<locals>"]


def _task() -> str:
    try:
        task = asyncio.current_task()
    except RuntimeError:
        return " in a thread"
    named = re.match(r"[a-z ]+", task.get_name()) if task else None
    return f" in {named.group().strip()}" if named else ""
