"""What is said of a build while it runs."""

from collections.abc import AsyncIterator

import pytest

from penstock.cli.following import follow
from penstock.cli.terminal import Terminal
from penstock.client import Build, BuildEnded, BuildStatus, Stage


class Told:
    """A client whose stream of events is these builds, the last of them at its end."""

    def __init__(self, *builds: Build) -> None:
        self._builds = builds

    async def events(self, _: str) -> AsyncIterator[BuildStatus | BuildEnded]:
        for build in self._builds[:-1]:
            yield BuildStatus("1", build)
        yield BuildEnded("2", self._builds[-1])


def seen(status, *stages: Stage) -> Build:
    return Build(id="b", number=1, status=status, stages=list(stages))


async def test_a_stage_that_lost_its_worker_says_so_and_why_it_waits_again(capfd: pytest.CaptureFixture[str]) -> None:
    waits, runs = Stage(name="main", attempt=1, reason="no worker offers tag gpu"), Stage(name="main", attempt=1, worker="w1", sandbox="bubblewrap")
    again, waits_again = Stage(name="main", attempt=2), Stage(name="main", attempt=2, reason="no worker offers tag gpu")
    runs_again = Stage(name="main", attempt=2, worker="w2", sandbox="bubblewrap")
    pending, *others = seen("pending", waits), *(seen("started", stage) for stage in (runs, again, waits_again, waits_again, runs_again))
    await follow(Told(pending, *others, seen("succeeded", runs_again)), pending, Terminal())
    assert capfd.readouterr().err.splitlines() == [
        "waiting: no worker offers tag gpu",
        "running on w1, sandbox bubblewrap",
        "attempt 1 was lost with its worker, w1; attempt 2 follows",
        "waiting: no worker offers tag gpu",
        "running on w2, sandbox bubblewrap, attempt 2",
    ]


async def test_of_several_stages_each_says_why_it_waits_also_while_others_run(capfd: pytest.CaptureFixture[str]) -> None:
    one = Stage(name="one", attempt=1, worker="w1", sandbox="bubblewrap")
    build = seen("started", one, Stage(name="two", attempt=1, reason="no worker offers tag gpu"))
    await follow(Told(build, build), build, Terminal())
    assert capfd.readouterr().err.splitlines() == ["one: running on w1, sandbox bubblewrap", "two: waiting: no worker offers tag gpu"]
