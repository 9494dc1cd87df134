"""The life of one process: start, be asked how it is, drain, end."""

import asyncio
import contextlib
import ctypes
import gc
import logging
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Any, TypeVar

import structlog
from aiohttp import web
from prometheus_client import CollectorRegistry, generate_latest

from libs.runtime.settings import BadSettings

logger = structlog.get_logger()

T = TypeVar("T")
_PR_SET_DUMPABLE = 4


class GivenUp(Exception):
    """What a background task raises, or a Service is told, to have the process say `text` and end with `code`: to go on is of no use."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


Wire = Callable[["Service", Mapping[str, str], Mapping[str, socket.socket]], Awaitable[web.Application | None]]


class Service:
    """What wiring builds on: parts start in order and end in reverse; background tasks that die end the process, so that its supervisor knows."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.registry = CollectorRegistry()
        self.draining = asyncio.Event()
        self.starting = False
        self._stack = AsyncExitStack()
        self._checks: dict[str, Callable[[], str | None]] = {}
        self._warnings: dict[str, Callable[[], object]] = {}
        self._died: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def depends(self, name: str, check: Callable[[], str | None]) -> None:
        """Count `name` among what readiness needs; `check` says why it is not well, or None."""
        self._checks[name] = check

    def warns(self, name: str, check: Callable[[], object]) -> None:
        """Have `/readyz` show under `name` what `check` says, unless that is None: something stands still, and the rest is of use nevertheless."""
        self._warnings[name] = check

    async def enter(self, part: AbstractAsyncContextManager[T]) -> T:
        """Start a part; it ends in its turn."""
        return await self._stack.enter_async_context(part)

    def spawn(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        """Run a background task that should never end by itself."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        task.add_done_callback(self._ended)
        self._stack.push_async_callback(_cancelled, task)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            self.give_up(task.exception() or RuntimeError(f"{task.get_name()} ended by itself"))

    def give_up(self, error: BaseException) -> None:
        """End the process, because of this; what came first counts."""
        if not self._died.done():
            self._died.set_exception(error)

    def problems(self) -> dict[str, str]:
        """Why the service is not ready, by dependency."""
        found = {name: why for name, check in self._checks.items() if (why := check()) is not None}
        if self.starting:
            found["service"] = "is starting"
        if self.draining.is_set():
            found["service"] = "is draining"
        return found

    def warnings(self) -> dict[str, str]:
        """What somebody must look at, though the service is ready."""
        return {name: str(what) for name, check in self._warnings.items() if (what := check()) is not None}

    def on_drain(self, callback: Callable[[], Awaitable[None]]) -> None:
        """Await `callback` when the service ends, in its turn: after what was started later has ended."""
        self._stack.push_async_callback(callback)

    async def until_told(self) -> None:
        """Wait for SIGTERM or SIGINT, or for a background task's death, which is raised."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.draining.set)
        self._died.add_done_callback(lambda _: self.draining.set())
        await self.draining.wait()
        if self._died.done():
            self._died.result()

    async def aclose(self) -> None:
        await self._stack.aclose()
        if self._died.done() and not self._died.cancelled():
            self._died.exception()


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError, Exception):
        await task


def status_application(service: Service) -> web.Application:
    """`/livez` (the loop turns), `/readyz` (503 with reasons by dependency; with 200, too, what stands still), `/metrics` (Prometheus text)."""

    async def livez(_: web.Request) -> web.Response:
        return web.json_response({"service": service.name})

    async def readyz(_: web.Request) -> web.Response:
        problems = service.problems()
        return web.json_response((problems or {"service": "ready"}) | service.warnings(), status=503 if problems else 200)

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(service.registry), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    app = web.Application()
    app.add_routes([web.get("/livez", livez), web.get("/readyz", readyz), web.get("/metrics", metrics)])
    return app


def bind(address: str) -> socket.socket:
    """A listening socket on `host:port` (port 0: a free one)."""
    host, _, port = address.rpartition(":")
    return socket.create_server((host or "127.0.0.1", int(port)), backlog=1024)


async def listen(app: web.Application, sock: socket.socket) -> AbstractAsyncContextManager[None]:
    """Serve an application on a bound socket until the context ends; open requests get a few seconds."""

    @contextlib.asynccontextmanager
    async def serving() -> Any:
        from libs.runtime.http import runner

        running = runner(app)
        await running.setup()
        await web.SockSite(running, sock).start()
        try:
            yield
        finally:
            await running.cleanup()

    return serving()


async def _serve(name: str, wire: Wire, environ: Mapping[str, str], sockets: Mapping[str, socket.socket]) -> None:
    service = Service(name)
    service.starting = True
    own = dict(environ)
    status, main = own.pop("PENSTOCK_STATUS_LISTEN", "127.0.0.1:0"), own.pop("PENSTOCK_LISTEN", "127.0.0.1:0")
    try:
        await service.enter(await listen(status_application(service), sockets.get("status") or bind(status)))
        app = await wire(service, own, sockets)
        if app is not None:
            await service.enter(await listen(app, sockets.get("http") or bind(main)))
        service.starting = False
        logger.info("started")
        await service.until_told()
        logger.info("draining")
    finally:
        await service.aclose()
    logger.info("stopped")


def configure_logging(name: str) -> None:
    """JSON lines on stderr, each with the service's name and what is bound in context (correlation ids); on a terminal lines for people."""
    people = sys.stderr.isatty()
    # Tracebacks are plain: what a prettier one shows of variables may be secret.
    lines = structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%H:%M:%S" if people else "iso", utc=not people),
            *([lines] if people else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=False,
    )
    structlog.contextvars.bind_contextvars(service=name)


def collect_seldom() -> None:
    """Almost everything a service makes dies by its reference count. Looking for cycles as often as by default costs some percent of its time, and a
    third of a projection's that is built anew."""
    gc.set_threshold(20_000, 20, 20)


def keep_to_oneself() -> None:
    """No other process of this user (a step may be one) can read this one's environment or memory, which hold keys and secrets; it leaves no core.
    Programs that it starts are as they would be."""
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def run_service(name: str, wire: Wire, environ: Mapping[str, str], sockets: Mapping[str, socket.socket]) -> None:
    """Run a service until it is told to stop. Exits 2 for bad settings, as a part says that gives up, and 1 when a part of it dies."""
    configure_logging(name)
    collect_seldom()
    keep_to_oneself()
    try:
        asyncio.run(_serve(name, wire, environ, sockets))
    except BadSettings as error:
        print(f"{name}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except GivenUp as error:
        print(f"{name}: {error}", file=sys.stderr)
        raise SystemExit(error.code) from None
    except Exception as error:
        logger.error("the service dies", exc_info=error)
        raise SystemExit(1) from None
