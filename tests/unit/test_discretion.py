"""What a process holds and others must not know is in nothing that it shows by accident: not in a repr, a traceback, a log, a core."""

import inspect
import os
import pty
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import msgspec
import pytest
import structlog

from libs.bus.wire import Login
from penstock.client.fleet import Registration
from penstock.client.joining import Membership
from penstock.client.model import Direct
from penstock.client.targets import Target
from proto.messages import Attempt
from proto.private import Private
from services.worker.executors.executor import Job
from services.worker.executors.process import ProcessExecutor
from tests.worker_controls import a_system, step

HOLDERS = {
    "proto.api.artifacts": ("Direct",),
    "proto.api.secrets": ("SecretValue",),
    "proto.api.teams": ("Token",),
    "proto.api.workers": ("Registration", "NewWorker"),
    "proto.messages": ("Package", "SecretValues"),
    "proto.plan": ("TaskConfig", "ImageResource"),
    "services.artifacts.wiring": ("Settings",),
    "services.builds.wiring": ("Settings",),
    "services.gateway.wiring": ("Settings",),
    "services.scheduler.wiring": ("Settings",),
    "services.worker.wiring": ("Settings",),
    "services.gateway.routes.workers": ("Site",),
    "services.scheduler.vault": ("Given",),
    "penstock.up.datadir": ("Secrets",),
    "penstock.up.service": ("ServiceSpec",),
}


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in HOLDERS.items() for name in names])
def test_what_holds_secrets_shows_none(module: str, name: str) -> None:
    cls = getattr(import_module(module), name)
    assert issubclass(cls, Private)
    shown = cls(**{field.name: "hunter2" for field in msgspec.structs.fields(cls)})
    assert f"{shown}{shown!r}{[shown]}" == f"{name}(…){name}(…)[{name}(…)]"
    assert list(shown.__rich_repr__()) == []


def test_what_the_command_line_and_the_bus_log_in_with_is_not_shown() -> None:
    holders = (
        Target(url="u", token="hunter2"),
        Direct(url="u", token="hunter2"),
        Membership(name="n", key="hunter2", url="u"),
        msgspec.convert({"id": "u", "token": "hunter2", "expires_at": "2026-11-22T00:00:00Z"}, Registration),
    )
    for holder in (*holders, Login("u", "hunter2", "n")):
        assert "hunter2" not in repr(holder) and "'u'" in repr(holder)
    assert "hunter2" not in str([list(holder.__rich_repr__()) for holder in holders])


FAILS = """
import ctypes, sys
from libs.runtime.service import run_service

async def wire(service, environ, sockets):
    password = environ["PENSTOCK_" + "X"]
    print("dumpable", ctypes.CDLL(None).prctl(3, 0, 0, 0, 0), file=sys.stderr)
    raise RuntimeError("this is all")

run_service("x", wire, {"PENSTOCK_X": "hun" + "ter2"}, {})
"""


@pytest.mark.parametrize("terminal", [False, True])
def test_a_service_that_dies_shows_its_traceback_without_its_variables_and_leaves_no_core(terminal: bool) -> None:
    """On a terminal, too, where Rich would show them. What cannot be dumped, others cannot read in /proc either."""
    ours, theirs = pty.openpty() if terminal else os.pipe()
    process = subprocess.Popen([sys.executable, "-c", FAILS], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, stderr=theirs)
    os.close(theirs)
    said = b""
    while piece := _read(ours):
        said += piece
    os.close(ours)
    assert process.wait() == 1
    assert b"dumpable 0" in said and b"this is all" in said and b"in wire" in said
    assert b"hunter2" not in said


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:  # so ends a terminal
        return b""


def test_the_prettier_traceback_would_show_them() -> None:
    """Or the test above shows nothing."""
    formatter = inspect.signature(structlog.dev.ConsoleRenderer).parameters["exception_formatter"].default
    assert getattr(formatter, "show_locals", False)


async def test_what_breaks_the_workers_own_code_is_logged_with_the_secrets_masked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def start(_: object, job: Job) -> None:
        raise RuntimeError(f"cannot do with {job.step.config.params}")

    monkeypatch.setattr(ProcessExecutor, "start", start)
    async with a_system(tmp_path) as (scheduler, _):
        attempt = Attempt("b", "main", 1)
        package = await scheduler.package(attempt, step("true", params={"A": "((word))"}), secrets={"word": "hunter2!"})
        with structlog.testing.capture_logs() as logged:
            await scheduler.bus.send("execute_build_package.w1", package)
            ended = await scheduler.finished(attempt)
    assert (ended.status, ended.error) == ("errored", "worker: RuntimeError")
    (trace,) = [entry["exception"] for entry in logged if "worker's own code" in entry["event"]]
    assert "cannot do with {'A': '***'}" in trace and "hunter2!" not in str(logged)
