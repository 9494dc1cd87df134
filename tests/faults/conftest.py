"""A system for each test, made quickly; when a test fails, what the system's logs say is in the report."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.faults.system import System, running

Start = Callable[..., System]
_STARTED = pytest.StashKey[list[System]]()


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder after its first start."""
    system = System(tmp_path_factory.mktemp("template"))
    system.up()
    system.down()
    assert system.leftovers() == []
    return system.data.path


@pytest.fixture
def start(template: Path, request: pytest.FixtureRequest) -> Iterator[Start]:
    """Start a system of one's own, with options of one's own."""
    started = request.node.stash[_STARTED] = []
    with ExitStack() as stack:

        def go(**options: Any) -> System:
            started.append(stack.enter_context(running(template, **options)))
            return started[-1]

        yield go


@pytest.fixture
def system(start: Start) -> System:
    """A running system, as `penstock up` makes it but for a short lease."""
    return start()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    if report.failed:
        for system in item.stash.get(_STARTED, []):
            report.sections.append((f"logs of {system.home}", system.last_words()))
    return report
