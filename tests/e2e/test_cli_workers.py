"""`penstock workers`, `penstock why` and what they ask, on a running system."""

import json
import time
from collections.abc import Callable
from typing import Any
from urllib.error import HTTPError

import pytest

from tests.e2e.conftest import Cli, System, asked


def until(ask: Callable[[], Any], timeout: float = 30.0) -> Any:
    deadline = time.monotonic() + timeout
    while not (found := ask()):
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.05)
    return found


def started(cli: Cli, script: str) -> str:
    result = cli("execute", "--detach", "-c", cli.task(script))
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def quantum(team: System) -> str:
    """The number of a build that no worker here can take."""
    step = {"step": "run", "name": "run", "config": {"run": {"path": "true"}}}
    plan = {"stages": [{"name": "main", "tags": ["quantum"], "steps": [step]}]}
    return str(asked(team, "POST", f"/api/v1/teams/{team.team}/builds", {"plan": plan})["number"])


def workers(cli: Cli) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(cli("workers", "--json").stdout)
    return found


def test_the_local_worker_is_listed_with_what_it_runs(cli: Cli) -> None:
    number = started(cli, "sleep 300")
    try:
        local = until(lambda: next((w for w in workers(cli) if w["running_builds"]), None))
        assert (local["name"], local["mode"], local["active"]) == ("local", "push", True)
        assert [str(build["number"]) for build in local["running_builds"]] == [number]
        assert local["last_checked_in"] and local["version"] and local["build_limit"] >= local["slots_in_use"] >= 1
        assert local["hostname"] == "", "the machine is the deployment's own business"
        table = cli("workers").stdout.splitlines()
        assert table[0].split()[:4] == ["worker", "status", "slots", "builds"]
        assert table[1].split()[0] == "local" and number in table[1].split()
        assert f"builds        {number} (" in cli("worker", "show", "local").stdout
        why = cli("why", number)
        assert why.stdout.splitlines()[0] == f"build {number} is started" and " on local for " in why.stdout and "why there: local" in why.stdout
    finally:
        cli("abort", number)
    until(lambda: cli("why", number).stdout == f"build {number} has ended: aborted\n")


def test_a_build_that_no_worker_can_take_says_what_is_recorded(cli: Cli, team: System) -> None:
    number = quantum(team)
    until(lambda: "recorded: no worker offers tag quantum (1 worker)" in cli("why", number).stdout)
    said = cli("why", number).stdout
    assert "it needs platform linux and tag quantum" in said
    assert "nothing is ahead of it" in said and "no worker could take it" in said
    second = quantum(team)
    until(lambda: f"ahead of it: 1 stage: build {number}" in cli("why", second).stdout)
    for build in (number, second):
        assert cli("abort", build).returncode == 0


def test_of_other_teams_only_how_many_there_are_is_told(cli: Cli, system: System, team: System) -> None:
    mine = quantum(team)
    asked(system, "PUT", f"/api/v1/teams/{team.team}-other")
    token = asked(system, "POST", f"/api/v1/teams/{team.team}-other/tokens", {"role": "owner"})["token"]
    other = System(data=system.data, url=system.url, token=token, team=f"{team.team}-other", environ={})
    path = f"/api/v1/teams/{other.team}/builds/{quantum(other)}"

    def stage() -> dict[str, Any]:
        (only,) = asked(other, "GET", f"{path}/preparation")["stages"]
        return dict(only)

    until(lambda: stage()["live"])
    assert (stage()["ahead"], stage()["ahead_builds"]) == (1, []), "it is another team's, and older"
    with pytest.raises(HTTPError, match="404"):
        asked(other, "GET", f"/api/v1/teams/{team.team}/builds/{mine}/preparation")
    asked(other, "PUT", f"{path}/abort")
    assert cli("abort", mine).returncode == 0


def test_a_watch_that_nobody_reads_any_more_ends(cli: Cli) -> None:
    watching = cli.start("workers", "--watch")
    assert watching.stdout is not None and watching.stdout.readline().startswith("worker ")
    watching.stdout.close()
    assert watching.wait(30) == 141
    assert cli("worker", "ls").stdout.startswith("worker ")


def test_what_is_not_there_is_said(cli: Cli) -> None:
    assert cli("why", "4711").stderr == "Error: there is no build `4711`\n"
    assert cli("worker", "show", "nobody").stderr == "Error: there is no worker `nobody`\n"
