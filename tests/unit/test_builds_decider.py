"""The build aggregate, by given/when/then and by properties over whole histories."""

from hypothesis import given as for_all
from hypothesis import settings
from hypothesis import strategies as st

from libs.runtime.decisions import Early, Refused
from proto.catalogue import TAGS
from proto.events.base import ArtifactRef
from proto.events.build import (
    BuildCreated,
    BuildFinished,
    LogExtent,
    StageFinished,
    StageInterrupted,
    StageQueued,
    StepFinished,
    StepProgressed,
    StepStarted,
)
from proto.messages import ReportStageFinished, ReportStepFinished, ReportStepProgressed, ReportStepStarted
from proto.plan import Plan, Requirements, Run, RunStep, Stage, TaskConfig, TaskInput, TaskOutput
from services.builds.commands import AbortBuild, CreateBuild, LoseAttempt, RecordReports, TimeOutStep
from services.builds.decider import BuildDecider
from tests.unit.scenario import Scenario

BUILD = "b1"
SRC = ArtifactRef(id="a1", digest="d1", size=3, files=1)
DIST = ArtifactRef(id="a2", digest="d2", size=5, files=1)


def stage(name="main", needs=(), inputs=(), outputs=(), max_attempts=3, timeout=60):
    config = TaskConfig(run=Run(path="true"), inputs=[TaskInput(name=n) for n in inputs], outputs=[TaskOutput(name=n) for n in outputs])
    return Stage(name=name, needs=list(needs), max_attempts=max_attempts, steps=[RunStep(name="run", config=config, timeout=timeout)])


def plan(*stages):
    return Plan(stages=list(stages or [stage()]))


def create(a_plan, inputs=None):
    return CreateBuild(build=BUILD, plan=a_plan, inputs=inputs or {})


def reports(*bodies, first=1, attempt=1, worker="w1", leased_to="w1", of="main"):
    return RecordReports(build=BUILD, stage=of, attempt=attempt, worker=worker, leased_to=leased_to, first=first, bodies=list(bodies))


STARTED = ReportStepStarted(step="run", sandbox="none")
STEP_OK = ReportStepFinished(step="run", status="succeeded", exit_code=0)
STAGE_OK = ReportStageFinished(status="succeeded")
STEP_BAD = ReportStepFinished(step="run", status="failed", exit_code=3)
STAGE_BAD = ReportStageFinished(status="failed")


def running(a_plan=None):
    return Scenario(BuildDecider()).when(create(a_plan or plan()), reports(STARTED))


def test_a_requested_build_is_created_and_its_first_stages_queued():
    a_plan = plan(stage("a", inputs=["src"]), stage("b", needs=["a"]), stage("c"))
    Scenario(BuildDecider()).when(create(a_plan, {"src": SRC, "unused": DIST})).then(
        BuildCreated(plan=a_plan, inputs={"src": SRC, "unused": DIST}),
        StageQueued(stage="a", attempt=1, requirements=Requirements(), inputs={"src": SRC}),
        StageQueued(stage="c", attempt=1, requirements=Requirements()),
    )


def test_a_repeated_request_decides_nothing():
    Scenario(BuildDecider()).when(create(plan()), create(plan())).then()


def test_a_no_op_build_costs_six_events_on_its_stream():
    # with BuildRequested and StageLeased: the eight that ARCHITECTURE.md names
    scenario = running().when(reports(STEP_OK, STAGE_OK, first=2))
    assert [TAGS[type(event)] for event in scenario.events] == [
        "build.created",
        "stage.queued",
        "step.started",
        "step.finished",
        "stage.finished",
        "build.finished",
    ]


def test_the_last_stage_decides_the_build():
    running().when(reports(STEP_OK, STAGE_OK, first=2)).then(
        StepFinished(stage="main", attempt=1, step="run", status="succeeded", exit_code=0, report=2),
        StageFinished(stage="main", attempt=1, status="succeeded", worker="w1", report=3),
        BuildFinished(status="succeeded"),
    )


def test_outputs_of_a_stage_are_inputs_of_the_next():
    a_plan = plan(stage("a", outputs=["dist"]), stage("b", needs=["a"], inputs=["dist"]))
    done = ReportStepFinished(step="run", status="succeeded", exit_code=0, outputs={"dist": DIST})
    scenario = Scenario(BuildDecider()).when(create(a_plan), reports(STARTED, done, STAGE_OK, of="a"))
    assert scenario.new[-1] == StageQueued(stage="b", attempt=1, requirements=Requirements(), inputs={"dist": DIST})


def test_a_failed_stage_fails_the_build_and_what_needs_it_never_runs():
    a_plan = plan(stage("a"), stage("b", needs=["a"]))
    scenario = Scenario(BuildDecider()).when(create(a_plan), reports(STARTED, STEP_BAD, STAGE_BAD, of="a"))
    assert scenario.new[-1] == BuildFinished(status="failed")
    assert not any(isinstance(event, StageQueued) and event.stage == "b" for event in scenario.events)


def test_a_failed_stage_waits_for_those_beside_it():
    scenario = Scenario(BuildDecider()).when(create(plan(stage("a"), stage("b"))), reports(STARTED, STEP_BAD, STAGE_BAD, of="a"))
    assert not any(isinstance(event, BuildFinished) for event in scenario.events)
    scenario.when(reports(STARTED, STEP_OK, STAGE_OK, of="b"))
    assert scenario.new[-1] == BuildFinished(status="failed")


def test_repeated_reports_are_known_already():
    # FAULTS 49
    running().when(reports(STARTED)).then()


def test_a_report_that_overtook_another_waits():
    # FAULTS 49
    Scenario(BuildDecider()).when(create(plan())).is_early_for(reports(STEP_OK, STAGE_OK, first=2))


def test_a_report_that_repeats_its_beginning_is_recorded_from_where_it_is_new():
    running().when(reports(STARTED, STEP_OK, STAGE_OK)).then(
        StepFinished(stage="main", attempt=1, step="run", status="succeeded", exit_code=0, report=2),
        StageFinished(stage="main", attempt=1, status="succeeded", worker="w1", report=3),
        BuildFinished(status="succeeded"),
    )


def test_a_stale_worker_cannot_finish_a_stage():
    scenario = running().when(LoseAttempt(build=BUILD, stage="main", attempt=1, evidence="silent"))
    scenario.then(StageQueued(stage="main", attempt=2, requirements=Requirements()))
    scenario.refuses(reports(STEP_OK, STAGE_OK, first=2), "stale")


def test_an_attempt_that_is_taken_up_after_its_lease_changes_nothing():
    # FAULTS 47, 89
    scenario = Scenario(BuildDecider()).when(create(plan()), LoseAttempt(build=BUILD, stage="main", attempt=1, evidence="never taken"))
    scenario.refuses(reports(STARTED), "stale")
    scenario.when(reports(STARTED, attempt=2, worker="w2", leased_to="w2")).refuses(reports(STARTED, STEP_OK, STAGE_OK), "foreign")


def test_a_worker_cannot_report_on_what_was_leased_to_another():
    # FAULTS 48
    Scenario(BuildDecider()).when(create(plan())).refuses(reports(STARTED, worker="w2", leased_to="w1"), "foreign")
    Scenario(BuildDecider()).when(create(plan())).refuses(reports(STARTED, worker="w2", leased_to=""), "foreign")
    running().refuses(reports(STEP_OK, first=2, worker="w2", leased_to="w2"), "foreign")


def test_a_report_on_nothing_is_refused():
    Scenario(BuildDecider()).refuses(reports(STARTED), "unknown")
    running().refuses(reports(STARTED, of="nowhere"), "unknown")
    running().refuses(reports(STARTED, attempt=2), "unknown")
    running().refuses(reports(ReportStepStarted(step="else"), first=2), "unknown")


def test_a_stage_lost_too_often_is_errored_with_the_evidence():
    scenario = running(plan(stage(max_attempts=1))).when(LoseAttempt(build=BUILD, stage="main", attempt=1, evidence="worker w1 was silent"))
    finished = scenario.new[0]
    assert isinstance(finished, StageFinished)
    assert finished.status == "errored" and "worker w1 was silent" in finished.error
    assert finished.log == LogExtent(chunks=-1)
    assert scenario.new[1] == BuildFinished(status="errored")


def test_a_lease_that_was_never_taken_up_is_tried_again_even_where_a_stage_may_run_once():
    Scenario(BuildDecider()).when(create(plan(stage(max_attempts=1))), LoseAttempt(build=BUILD, stage="main", attempt=1, evidence="lost")).then(
        StageQueued(stage="main", attempt=2, requirements=Requirements())
    )


def test_a_stale_expiry_decides_nothing():
    lose = LoseAttempt(build=BUILD, stage="main", attempt=1, evidence="silent")
    running().when(lose, lose).then()
    running().when(reports(STEP_OK, STAGE_OK, first=2), lose).then()


def test_an_abort_before_the_start_ends_the_build_at_once():
    Scenario(BuildDecider()).when(create(plan()), AbortBuild(build=BUILD)).then(
        StageFinished(stage="main", attempt=1, status="aborted"), BuildFinished(status="aborted")
    )


def test_an_abort_of_a_running_build_interrupts_it_and_wins_over_what_its_worker_says_later():
    # FAULTS 15
    scenario = running().when(AbortBuild(build=BUILD)).then(StageInterrupted(stage="main", attempt=1, reason="aborted"))
    scenario.when(AbortBuild(build=BUILD)).then()
    scenario.when(reports(STEP_OK, STAGE_OK, first=2))
    assert scenario.new[1:] == [
        StageFinished(stage="main", attempt=1, status="aborted", worker="w1", report=3),
        BuildFinished(status="aborted"),
    ]


def test_an_abort_after_the_end_decides_nothing():
    # FAULTS 14, 15
    running().when(reports(STEP_OK, STAGE_OK, first=2), AbortBuild(build=BUILD)).then()


def test_an_aborting_build_whose_worker_is_lost_is_aborted_not_run_again():
    scenario = running().when(AbortBuild(build=BUILD), LoseAttempt(build=BUILD, stage="main", attempt=1, evidence="silent"))
    assert [type(event) for event in scenario.new] == [StageFinished, BuildFinished]
    assert scenario.new[1] == BuildFinished(status="aborted")


def test_a_timeout_interrupts_and_fails_the_build_saying_so():
    scenario = running(plan(stage(timeout=5))).when(TimeOutStep(build=BUILD, stage="main", attempt=1, step="run"))
    assert isinstance(scenario.new[0], StageInterrupted) and "5 s" in scenario.new[0].error
    scenario.when(reports(ReportStepFinished(step="run", status="failed"), STAGE_OK, first=2))
    finished = scenario.new[1]
    assert isinstance(finished, StageFinished) and finished.status == "failed" and "timeout of 5 s" in finished.error


def test_a_stale_timeout_decides_nothing():
    timeout = TimeOutStep(build=BUILD, stage="main", attempt=1, step="run")
    running().when(reports(STEP_OK, STAGE_OK, first=2), timeout).then()
    running().when(LoseAttempt(build=BUILD, stage="main", attempt=1, evidence=""), timeout).then()
    Scenario(BuildDecider()).is_early_for(timeout)


def test_a_timer_of_a_step_that_has_ended_does_not_interrupt_the_next_one():
    two = Stage(name="main", steps=[RunStep(name=name, config=TaskConfig(run=Run(path="true")), timeout=5) for name in ("run", "next")])
    timeout = TimeOutStep(build=BUILD, stage="main", attempt=1, step="run")
    running(plan(two)).when(reports(STEP_OK, ReportStepStarted(step="next"), first=2), timeout).then()


def test_progress_never_falls():
    scenario = running().when(reports(ReportStepProgressed(step="run", percent=40), ReportStepProgressed(step="run", percent=20), first=2))
    assert [event.percent for event in scenario.new if isinstance(event, StepProgressed)] == [40, 40]


attempts = st.integers(1, 3)
bodies = st.sampled_from([STARTED, ReportStepProgressed(step="run", percent=50), STEP_OK, STAGE_OK, STEP_BAD, STAGE_BAD])
commands = st.one_of(
    st.builds(AbortBuild, build=st.just(BUILD)),
    st.builds(LoseAttempt, build=st.just(BUILD), stage=st.sampled_from(["a", "b"]), attempt=attempts, evidence=st.just("e")),
    st.builds(TimeOutStep, build=st.just(BUILD), stage=st.sampled_from(["a", "b"]), attempt=attempts, step=st.just("run")),
    st.builds(
        lambda found, first, attempt, of: reports(*found, first=first, attempt=attempt, of=of),
        st.lists(bodies, min_size=1, max_size=3),
        st.integers(1, 4),
        attempts,
        st.sampled_from(["a", "b"]),
    ),
)


@settings(max_examples=300, deadline=None)
@for_all(st.lists(commands, max_size=25))
def test_whatever_is_asked_in_whatever_order_a_build_keeps_its_promises(asked):
    scenario = Scenario(BuildDecider()).when(create(plan(stage("a"), stage("b", needs=["a"]))))
    for command in asked:
        before = len(scenario.events)
        try:
            scenario.when(command)
        except (Refused, Early):
            continue
        try:
            assert not BuildDecider().decide(command, scenario.state), "a repeated command decides nothing"
        except Refused as refused:
            assert refused.kind == "stale"
        assert len(scenario.events) >= before
    ends = [i for i, event in enumerate(scenario.events) if isinstance(event, BuildFinished)]
    assert len(ends) <= 1, "at most one terminal event"
    assert not ends or ends[0] == len(scenario.events) - 1, "nothing follows it"
    for name in ("a", "b"):
        numbers = [event.attempt for event in scenario.events if isinstance(event, StageQueued) and event.stage == name]
        assert numbers == list(range(1, len(numbers) + 1)), "fencing tokens only rise"
        assert sum(isinstance(event, StageFinished) and event.stage == name for event in scenario.events) <= 1
        started = [event.attempt for event in scenario.events if isinstance(event, StepStarted) and event.stage == name]
        assert started == sorted(started)
