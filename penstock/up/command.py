"""`penstock up` and `penstock down`."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import msgspec

from penstock.client.targets import targets_path
from penstock.up.datadir import DataDir, data_dir
from penstock.up.processes import Identity, is_alive, send
from penstock.up.report import wait_for_report
from penstock.up.service import why_unready
from penstock.up.supervisor import Interrupted, StartFailed
from penstock.up.system import STOPPING, AlreadyRunning, Request, System

NEXT_STEPS = """\
Penstock serves at {url}
  {penstock} execute -c task.yml -i src=. -o dist=./out   # run a task
  {penstock} builds                                       # list what ran"""


def up(
    data: Path | None = None,
    detach: bool = False,
    port: int | None = None,
    slots: int | None = None,
    sandbox: str | None = None,
    lease_seconds: float | None = None,
    store: str | None = None,
    restored: bool = False,
) -> int:
    """Run the whole system here until Ctrl-C, or in the background. Returns the exit code: 1 when it does not come up (or, in the foreground, when it
    runs already), 130 when it was interrupted before it served. Everything is said on stderr."""
    folder = data_dir(data, os.environ)
    targets = targets_path(os.environ).absolute()
    request = Request(
        data=str(folder.path),
        targets=str(targets),
        port=port,
        slots=slots,
        sandbox=sandbox,
        lease_seconds=lease_seconds,
        store=store,
        restored=restored,
    )
    return _up_detached(folder, request) if detach else _up_here(folder, request)


def _up_here(folder: DataDir, request: Request) -> int:
    try:
        System(request, _say, os.environ).serve(lambda url: _say_next(url, "Ctrl-C stops it"))
    except AlreadyRunning:
        _say_taken(folder, request)
        return 1
    except StartFailed as error:
        _say(f"Penstock does not start: {error}")
        return 1
    except Interrupted:
        _say_called_off(folder)
        return 130
    return 0


def _up_detached(folder: DataDir, request: Request) -> int:
    """The supervisor is a process of its own, which reports over a pipe until it serves."""
    try:
        folder.prepare()
        log = folder.log("supervisor").open("ab")
    except OSError as error:
        _say(f"Penstock does not start: the data folder cannot be used: {error}")
        return 1
    reader, writer = os.pipe()
    with log:
        # -P: no module of the current folder may pass for one of ours.
        command = [sys.executable, "-P", "-m", "penstock.up", str(writer), msgspec.json.encode(request).decode()]
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[writer], start_new_session=True, cwd=folder.path
        )
    os.close(writer)
    try:
        report = wait_for_report(reader, _say)
    except KeyboardInterrupt:
        _say(STOPPING)
        _end(process)
        _say_called_off(folder)
        return 130
    match report.kind:
        case "ready":
            _say_next(report.text, "{penstock} down                                         # stop it")
            return 0
        case "taken":
            process.wait()
            return 0 if _say_taken(folder, request) and not request.restored else 1
        case _:
            process.wait()
            _say(f"Penstock does not start: {report.text}")
            return 1


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Tell the supervisor to stop, again with each further Ctrl-C, and wait for its end."""
    while process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with suppress(KeyboardInterrupt):
            process.wait()


def down(data: Path | None = None) -> int:
    """Stop the system of a data folder and wait for its end. Returns the exit code: 0 also when nothing runs, 1 when it does not end."""
    folder = data_dir(data, os.environ)
    run = folder.run()
    if run is None or not send(run.supervisor, signal.SIGTERM):
        _say(f"nothing runs on {folder.path}")
        return 0
    _say(f"stopping Penstock (pid {run.supervisor.pid})")
    try:
        return _await_end(run.supervisor, folder)
    except KeyboardInterrupt:
        _say("left; it goes on stopping (`down` again: at once)")
        return 130


def _await_end(supervisor: Identity, folder: DataDir) -> int:
    deadline, told = time.monotonic() + 90.0, time.monotonic()
    while is_alive(supervisor):
        now = time.monotonic()
        if now > deadline:
            _say(f"it does not end; its log: {folder.log('supervisor')}")
            return 1
        if now - told > 5.0:
            told = now
            _say("still waiting for what runs to end")
        time.sleep(0.01)
    _say("stopped; the data stays")
    return 0


def _await_other(folder: DataDir, timeout: float = 60.0) -> str | None:
    """Where the system that has the folder listens, once all of it is ready; None when it is not within `timeout` seconds, or gone."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        run = folder.run()
        if run is None or not is_alive(run.supervisor):
            lock = folder.take()
            if lock is not None:
                os.close(lock)
                return None
        elif run.url and all(why_unready(status) is None for status in run.status.values()):
            return run.url
        time.sleep(0.05)
    return None


def _say_called_off(folder: DataDir) -> None:
    _say(f"stopped before it was ready: nothing runs, and {folder.path} stays for the next start")


def _say_taken(folder: DataDir, request: Request) -> bool:
    """Whether what runs already is ready."""
    found = _await_other(folder)
    _say(f"Penstock already runs on {folder.path}" + (f": {found}" if found else f", but is not ready; see {folder.logs}"))
    if request.restored:
        _say("nobody was told that the database was put back: stop it with `penstock down`, then start with --restored")
    return found is not None


def _say_next(url: str, end: str) -> None:
    # Whoever wraps the command (`./just penstock`) says how it is called.
    penstock = os.environ.get("PENSTOCK_COMMAND", "penstock")
    _say(f"{NEXT_STEPS}\n  {end}".format(url=url, penstock=penstock))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
