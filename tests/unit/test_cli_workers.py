"""What people read about workers and about what waits for them."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from penstock.cli.why import _details, _state
from penstock.cli.worker.show import _facts
from penstock.cli.worker.start import start
from penstock.cli.workers import print_workers
from penstock.client import Candidate, Holder, Preparation, RunningBuild, Waiting, Worker
from penstock.client.joining import Membership, new_membership, write_membership

NOW = 1_800_000_000.0
MOMENT = datetime.fromtimestamp(NOW, UTC)


def running(*numbers: int) -> list[RunningBuild]:
    return [RunningBuild(id=f"b{n}", number=n, stage="main", attempt=1, since=MOMENT - timedelta(seconds=30)) for n in numbers]


BUSY = Worker(
    name="build-host-12",
    status="busy",
    running_builds=running(104, 105, 106, 107),
    other_builds=2,
    last_checked_in=MOMENT - timedelta(seconds=1),
    build_limit=16,
    slots_in_use=16,
    mode="pull",
    version="0.1.0",
    cache_used=12_300_000_000,
    cache_limit=50_000_000_000,
    routes=["linux", "gpu"],
)
FULL = Worker(name="w2", status="error", reason="disk full: 3 MiB free", build_limit=4)


def test_the_table_of_workers_lines_up_and_fits_80_columns(capfd: Any) -> None:
    print_workers([BUSY, FULL], NOW)
    out, err = capfd.readouterr()
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[1].split() == ["build-host-12", "busy", "16/16", "104", "105", "106", "+3", "now", "pull", "12.3", "GB", "0.1.0"]
    assert err == "w2: disk full: 3 MiB free\n"


def test_nothing_that_a_worker_says_moves_the_cursor(capfd: Any) -> None:
    print_workers([Worker(name="w", version="\x1b[2J", status="error", reason="a\nb\x07")], NOW)
    out, err = capfd.readouterr()
    assert "\x1b" not in out + err and "\x07" not in err and len(err.splitlines()) == 1


def test_one_worker_has_all_its_facts() -> None:
    facts = dict(_facts(BUSY, NOW))
    assert facts["builds"] == "104 (main, 30 s), 105 (main, 30 s), 106 (main, 30 s), 107 (main, 30 s), 2 of other teams"
    assert facts["cache"] == "12.3 GB of 50.0 GB"
    assert facts["slots"] == "16 of 16 in use"
    assert "host" not in facts
    assert dict(_facts(FULL, NOW))["status"] == "error: disk full: 3 MiB free"


QUEUED = Preparation(stage="main", state="queued", attempt=1, since=MOMENT - timedelta(minutes=3), live=True, requires=["platform linux", "tag gpu"])


def changed(**more: Any) -> Preparation:
    return msgspec.structs.replace(QUEUED, **more)


def test_a_stage_that_no_worker_can_take() -> None:
    stage = changed(reason="no worker offers tag gpu", refused={"tag gpu": 2})
    assert _state(stage, NOW) == "has waited 3 min for a worker"
    assert list(_details(stage)) == [
        "it needs platform linux and tag gpu",
        "recorded: no worker offers tag gpu (2 workers)",
        "nothing is ahead of it",
        "no worker could take it",
    ]


def test_what_became_of_the_attempt_before() -> None:
    assert next(iter(_details(changed(attempt=2, lost="worker w1 was silent for 15 s")))) == "attempt 1 was lost: worker w1 was silent for 15 s"


def test_several_reasons_have_their_counts() -> None:
    stage = changed(reason="no worker offers platform linux or tag gpu", refused={"draining": 1, "tag gpu": 2})
    assert "recorded: no worker offers platform linux or tag gpu (1 worker is draining and 2 workers lack tag gpu)" in _details(stage)


def test_what_was_recorded_and_is_not_so_any_more_is_not_said() -> None:
    stage = changed(reason="no worker offers tag gpu", refused={"tag gpu": 2}, able=1, holders=[Holder(worker="w3", slots=1, others=1)])
    assert list(_details(stage))[1:] == ["nothing is ahead of it", "1 worker could take it:", "  w3: 1 slot, used by 1 stage of other teams"]


def test_what_is_ahead_and_who_has_the_slots() -> None:
    ahead = [Waiting(build=5, stage="main"), Waiting(build=6, stage="test")]
    holders = [Holder(worker="w1", slots=4, builds=[3], others=3), Holder(worker="w2", slots=1, others=1), Holder(worker="w3", slots=1)]
    assert list(_details(changed(ahead=4, ahead_builds=ahead, able=3, holders=holders)))[1:] == [
        "ahead of it: 4 stages: build 5, build 6 (test) and 2 more",
        "3 workers could take it:",
        "  w1: 4 slots, used by build 3 and 3 more",
        "  w2: 1 slot, used by 1 stage of other teams",
        "  w3: 1 slot, none in use, and offers none now",
    ]
    assert "ahead of it: at least 1,000 stages, of other teams" in _details(changed(ahead=1000, more=True))


def test_without_a_scheduler_what_was_recorded_is_said() -> None:
    stage = changed(live=False, requires=[], reason="no worker is connected")
    assert list(_details(stage)) == ["recorded: no worker is connected", "no scheduler answers: what is ahead of it is not known now"]


def test_why_a_stage_runs_where_it_runs() -> None:
    why = [Candidate(worker="w1", load=0.25), Candidate(worker="w2", load=0.0, missing=12_000_000)]
    stage = Preparation(stage="main", state="leased", attempt=2, worker="w1", leased_at=MOMENT, started_at=MOMENT - timedelta(seconds=12), why=why)
    assert _state(stage, NOW) == "has run on w1 for 12 s, attempt 2"
    assert list(_details(stage)) == ["why there: w1 had 25% of its slots in use; w2 had 0% of its slots in use and lacked 12.0 MB"]


def test_a_stage_waits_for_others() -> None:
    assert _state(Preparation(stage="two", state="blocked", needs=["one"]), NOW) == "waits for one"


@pytest.mark.parametrize("way", ["stdin", "environment"])
def test_a_registration_token_need_not_be_an_argument(tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments are in the list of processes."""
    shown: list[str] = []

    async def joined(wanted: Membership, token: str) -> Membership:
        shown.append(token)
        return msgspec.structs.replace(wanted, nats_url="nats://127.0.0.1:1", server_public_key="k", gateway_public_key="k")

    began: list[dict[str, str]] = []
    monkeypatch.setattr("penstock.cli.worker.start.join", joined)
    monkeypatch.setattr("penstock.cli.worker.start._become", began.append)
    told = ["--register", "-"] if way == "stdin" else []
    environ = {"PENSTOCK_REGISTRATION_TOKEN": "pwt_x"} if way == "environment" else {}
    result = CliRunner().invoke(start, ["--dir", str(tmp_path), *told, "--server", "http://127.0.0.1:1"], input="pwt_x\n", env=environ)
    assert result.exit_code == 0, result.output
    assert shown == ["pwt_x"] and "pwt_x" not in str(began) + result.output
    result = CliRunner().invoke(start, ["--dir", str(tmp_path)], env=environ)
    assert result.exit_code == 0 and shown == ["pwt_x"], "it is good once, and may stay where it is"
    assert "there is no token" in CliRunner().invoke(start, ["--dir", str(tmp_path), "--register", "-", "--server", "http://x"], input="\n").output


def test_a_worker_that_was_registered_before_the_server_signed_is_told_to_do_so_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.cli.worker.start._become", lambda _: None)
    member = msgspec.structs.replace(new_membership("one", "http://127.0.0.1:1"), nats_url="nats://127.0.0.1:1", server_public_key="k")
    write_membership(tmp_path / "worker.json", member)
    result = CliRunner().invoke(start, ["--dir", str(tmp_path)])
    assert result.exit_code == 2 and "register anew with --register - --server http://127.0.0.1:1" in result.output


def test_a_registered_workers_key_is_not_lost_to_a_registration_under_another_name(tmp_path: Path) -> None:
    member = msgspec.structs.replace(new_membership("one", "http://127.0.0.1:1"), nats_url="nats://127.0.0.1:1")
    write_membership(tmp_path / "worker.json", member)
    before = (tmp_path / "worker.json").read_bytes()
    result = CliRunner().invoke(start, ["--dir", str(tmp_path), "--register", "x", "--server", member.url, "--name", "two"])
    assert result.exit_code == 2 and "is `one`: use another --dir" in result.output
    assert (tmp_path / "worker.json").read_bytes() == before
