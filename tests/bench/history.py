"""A synthetic log: builds that were requested, leased, run and finished, as the services write them."""

from collections.abc import Iterator, Sequence

from libs.eventlog.log import NewEvent, Write
from proto.catalogue import TAGS, encode
from proto.events.base import Event
from proto.events.build import BuildCreated, BuildFinished, LogExtent, StageFinished, StageQueued, StepFinished, StepStarted
from proto.events.lease import Candidate, StageLeased
from proto.events.request import BuildRequested
from proto.plan import Plan, Requirements, Run, RunStep, Stage, TaskConfig

EVENTS_A_BUILD = 8
PLAN = Plan(stages=[Stage(name="main", steps=[RunStep(name="task", config=TaskConfig(run=Run(path="true")))])])


def history(builds: int, group: int) -> Iterator[list[Write]]:
    """Calls of `append`, `group` builds side by side: each goes as far as one service takes it at a time."""
    for first in range(0, builds, group):
        names = [f"{number:032x}" for number in range(first, min(first + group, builds))]
        yield [_write("request", name, 0, [BuildRequested(build=name, plan=PLAN, body_mac="0" * 64)]) for name in names]
        queued = StageQueued(stage="main", attempt=1, requirements=Requirements())
        yield [_write("build", name, 0, [BuildCreated(plan=PLAN), queued]) for name in names]
        why = [Candidate(worker="local", load=0.5)]
        yield [
            _write("lease", n, 0, [StageLeased(stage="main", attempt=1, worker="local", boot="0" * 16, credit=n[:16], term=1, why=why)])
            for n in names
        ]
        started = StepStarted(stage="main", attempt=1, step="task", worker="local", sandbox="none", timeout=86400, report=1)
        yield [_write("build", name, 2, [started]) for name in names]
        over: list[Event] = [
            StepFinished(stage="main", attempt=1, step="task", status="succeeded", exit_code=0, report=2),
            StageFinished(stage="main", attempt=1, status="succeeded", worker="local", log=LogExtent(chunks=1, lines=1, bytes=30), report=3),
            BuildFinished(status="succeeded"),
        ]
        yield [_write("build", name, 3, over) for name in names]


def _write(category: str, name: str, expected: int, events: Sequence[Event]) -> Write:
    new = [NewEvent(f"{category[0]}{expected + i}{name}", TAGS[type(event)], encode(event)) for i, event in enumerate(events)]
    return Write(
        stream=f"{category}-{name}", expected=expected, events=new, team="main", correlation_id=name, causation_id=name, actor="token:00000000"
    )
