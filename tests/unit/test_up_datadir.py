"""The data folder of `penstock up`, and what it knows of processes."""

import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from penstock.up.datadir import USUAL_PORT, DataDir, OtherStore, Run, data_dir
from penstock.up.logfiles import bound, last_lines
from penstock.up.processes import Identity, free_port, identify, is_alive, send
from penstock.up.supervisor import Backoff


def folder(tmp_path: Path) -> DataDir:
    data = DataDir(tmp_path / "data")
    data.prepare()
    return data


def test_secrets_are_made_once_and_for_their_owner_alone(tmp_path: Path) -> None:
    first = folder(tmp_path).secrets()
    assert folder(tmp_path).secrets() == first
    assert stat.S_IMODE((tmp_path / "data" / "secrets.json").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "data").stat().st_mode) == 0o700
    assert first.token.startswith("pst_") and len(first.token) == 47
    every = [*first.database.values(), *first.bus_keys.values(), first.callout_key, first.grant_key, first.server_key, first.worker_key, first.token]
    assert len(set(every)) == len(every)


def test_spoilt_secrets_are_not_made_anew(tmp_path: Path) -> None:
    data = folder(tmp_path)
    (tmp_path / "data" / "secrets.json").write_text('{"database": ')
    with pytest.raises(msgspec.DecodeError):
        data.secrets()


def test_only_one_has_the_folder(tmp_path: Path) -> None:
    data = folder(tmp_path)
    lock = data.take()
    assert lock is not None
    assert data.take() is None
    os.close(lock)
    again = data.take()
    assert again is not None
    os.close(again)


def test_ports_stay_the_same_until_one_is_taken(tmp_path: Path) -> None:
    data = folder(tmp_path)
    gateway = free_port(set())
    first = data.ports(gateway)
    assert first.gateway == gateway
    assert data.ports(gateway) == first
    with socket.create_server(("127.0.0.1", first.nats)):
        moved = data.ports(gateway)
    assert moved.nats != first.nats
    assert (moved.postgres, moved.artifacts) == (first.postgres, first.artifacts)


def test_the_gateway_moves_when_the_usual_port_is_taken(tmp_path: Path) -> None:
    try:
        taken = socket.create_server(("127.0.0.1", USUAL_PORT))
    except OSError:
        taken = socket.socket()  # somebody else has it already
    with taken:
        ports = folder(tmp_path).ports(None)
    assert ports.gateway != USUAL_PORT
    assert len({ports.gateway, ports.nats, ports.postgres, ports.artifacts}) == 4


def test_a_free_port_is_none_that_an_outgoing_connection_can_be_given() -> None:
    low, high = (int(word) for word in Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    port = free_port(set())
    assert not low <= port <= high


def test_a_process_is_told_from_a_later_one_with_its_pid() -> None:
    me = identify(os.getpid())
    assert me is not None and is_alive(me)
    imposter = Identity(me.pid, "another boot:1")
    assert not is_alive(imposter)
    assert not send(imposter, signal.SIGKILL)


def test_a_zombie_counts_as_gone() -> None:
    child = subprocess.Popen([sys.executable, "-S", "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert identify(child.pid) is None
    child.wait()


def test_a_data_folder_keeps_the_store_of_its_first_start(tmp_path: Path) -> None:
    ours = folder(tmp_path)
    assert ours.store(None) == ours.blobs.as_uri()
    with pytest.raises(OtherStore, match="not in s3://other"):
        ours.store("s3://other")
    elsewhere = folder(tmp_path / "elsewhere")
    assert elsewhere.store("s3://bucket/ci") == "s3://bucket/ci"
    assert elsewhere.store(None) == "s3://bucket/ci"


def test_a_spoilt_run_file_is_as_good_as_none(tmp_path: Path) -> None:
    data = folder(tmp_path)
    assert data.run() is None
    run = Run(supervisor=Identity(1, "boot:1"), url="http://127.0.0.1:1", status={"gateway": "127.0.0.1:2"})
    data.write_run(run)
    assert data.run() == run
    (tmp_path / "data" / "run.json").write_text("{")
    assert data.run() is None


def test_the_data_folder_is_named_by_option_environment_or_home(tmp_path: Path) -> None:
    assert data_dir(tmp_path / "a", {"PENSTOCK_DATA": "/b"}).path == tmp_path / "a"
    assert data_dir(None, {"PENSTOCK_DATA": "/b"}).path == Path("/b")
    assert data_dir(None, {"XDG_DATA_HOME": "/x"}).path == Path("/x/penstock")
    assert data_dir(None, {}).path == Path.home() / ".local" / "share" / "penstock"


def test_a_long_log_is_moved_aside_and_its_writer_goes_on(tmp_path: Path) -> None:
    log = tmp_path / "gateway.log"
    with log.open("ab", buffering=0) as writer:
        writer.write(b"old line\n" * 100)
        bound(log, limit=100)
        writer.write(b"new line\n")
    assert log.read_text() == "new line\n"
    assert (tmp_path / "gateway.log.1").read_text() == "old line\n" * 100
    bound(log, limit=100)
    assert last_lines(log) == "new line"
    assert last_lines(tmp_path / "nothing.log") == ""


def test_a_restart_waits_longer_each_time_until_all_was_well_for_a_while() -> None:
    backoff = Backoff()
    pauses = []
    now = 1000.0
    for _ in range(8):
        backoff.started(now)
        now += 1.0
        pauses.append(round(backoff.died(now) - now, 3))
    assert pauses == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
    backoff.started(now)
    assert round(backoff.died(now + 30.0) - now - 30.0, 3) == 0.1
