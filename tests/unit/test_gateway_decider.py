"""What the gateway records, by given/when/then."""

import msgspec
import pytest

from libs.runtime.decisions import Refused
from proto.events.base import ArtifactRef
from proto.events.request import BuildAbortRequested, BuildRequested
from proto.events.team import DEFAULT_POLICY, TeamCreated, TeamPolicySet, TokenIssued
from proto.plan import Plan, Run, RunStep, Stage, TaskConfig, TaskInput, TaskOutput
from services.gateway.admission import missing_input
from services.gateway.commands import AbortBuild, CreateTeam, IssueToken, RecallBuild, RequestBuild, SetPolicy, request_name
from services.gateway.decider import RequestDecider, TeamDecider
from services.gateway.references import OfArtifact, OfBuild, wanted
from tests.unit.scenario import Scenario


def step(name="run", inputs=(), outputs=(), optional=()):
    wanted = [TaskInput(name=n) for n in inputs] + [TaskInput(name=n, optional=True) for n in optional]
    return RunStep(name=name, config=TaskConfig(run=Run(path="true"), inputs=wanted, outputs=[TaskOutput(name=n) for n in outputs]))


def stage(name="main", steps=(), needs=()):
    return Stage(name=name, steps=list(steps) or [step()], needs=list(needs))


PLAN = Plan(stages=[stage()])
SRC = ArtifactRef(id="a", digest="d", size=1, files=1)
WISH = RequestBuild(request="r1", build="b1", plan=PLAN, inputs={"src": SRC}, name="n", body_mac="one")
REQUESTED = BuildRequested(build="b1", plan=PLAN, inputs={"src": SRC}, name="n", body_mac="one")


def test_a_wish_is_recorded() -> None:
    Scenario(RequestDecider()).when(WISH).then(REQUESTED)


def test_the_same_wish_again_is_the_same_build() -> None:
    """FAULTS 12"""
    again = msgspec.structs.replace(WISH, build="b2")
    scenario = Scenario(RequestDecider(), REQUESTED).when(again).then()
    assert scenario.state.build == "b1"


def test_another_wish_under_the_same_key_is_refused() -> None:
    """FAULTS 12"""
    Scenario(RequestDecider(), REQUESTED).refuses(msgspec.structs.replace(WISH, body_mac="two"), "conflict")


def test_how_long_outputs_are_kept_is_recorded() -> None:
    kept = msgspec.structs.replace(REQUESTED, keep_seconds=60)
    Scenario(RequestDecider()).when(msgspec.structs.replace(WISH, keep_seconds=60)).then(kept)


def test_a_wish_that_was_recorded_is_recalled_and_another_is_not() -> None:
    """FAULTS 12"""
    recall = RecallBuild(request="r1", body_mac="one")
    scenario = Scenario(RequestDecider(), REQUESTED).when(recall).then()
    assert scenario.state.build == "b1"
    Scenario(RequestDecider(), REQUESTED).refuses(msgspec.structs.replace(recall, body_mac="two"), "conflict")
    Scenario(RequestDecider()).refuses(recall, "missing")


def test_an_abort_is_recorded_once() -> None:
    Scenario(RequestDecider()).when(AbortBuild(build="b1")).then(BuildAbortRequested(build="b1")).when(AbortBuild(build="b1")).then()


def test_a_stream_of_other_use_is_refused() -> None:
    Scenario(RequestDecider(), REQUESTED).refuses(AbortBuild(build="b1"), "conflict")
    Scenario(RequestDecider(), BuildAbortRequested(build="b1")).refuses(WISH, "conflict")


def test_streams_of_requests_are_apart_and_fit_for_subjects() -> None:
    decider = RequestDecider()
    name = request_name("main", "a key. with > everything *")
    assert name != request_name("other", "a key. with > everything *")
    streams = {decider.stream(msgspec.structs.replace(WISH, request=name)), decider.stream(AbortBuild(build="b1"))}
    assert len(streams) == 2
    assert all(set(stream) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") for stream in streams)


def test_a_team_is_created_once() -> None:
    Scenario(TeamDecider()).when(CreateTeam(team="t")).then(TeamCreated(name="t")).when(CreateTeam(team="t")).then()


ISSUE = IssueToken(team="t", token_id="k1", sha256="ff", role="member", description="ci")


def test_a_token_is_issued_once() -> None:
    issued = TokenIssued(token_id="k1", sha256="ff", role="member", description="ci")
    Scenario(TeamDecider(), TeamCreated(name="t")).when(ISSUE).then(issued).when(ISSUE).then()


def test_a_team_that_is_not_there_issues_no_tokens() -> None:
    Scenario(TeamDecider()).refuses(ISSUE, "missing")


def test_a_policy_holds_until_another_is_set() -> None:
    policy = TeamPolicySet(input_seconds=1, output_seconds=2, quota_bytes=3)
    command = SetPolicy(team="t", input_seconds=1, output_seconds=2, quota_bytes=3)
    usual = SetPolicy(
        team="t",
        input_seconds=DEFAULT_POLICY.input_seconds,
        output_seconds=DEFAULT_POLICY.output_seconds,
        quota_bytes=DEFAULT_POLICY.quota_bytes,
    )
    Scenario(TeamDecider(), TeamCreated(name="t")).when(usual).then().when(command).then(policy).when(command).then().when(usual).then(DEFAULT_POLICY)
    Scenario(TeamDecider()).refuses(command, "missing")


@pytest.mark.parametrize("decider", [RequestDecider(), TeamDecider()])
def test_a_foreign_event_is_no_state(decider) -> None:
    foreign = TeamCreated(name="t") if isinstance(decider, RequestDecider) else BuildAbortRequested(build="b")
    with pytest.raises((TypeError, Refused)):
        decider.evolve(decider.initial, foreign)


# --- references ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("0c0ffee0-0000-4000-8000-000000000001", OfArtifact("0c0ffee0-0000-4000-8000-000000000001")),
        ("artifact:a1", OfArtifact("a1")),
        ("artifact:a1/", OfArtifact("a1")),
        ("artifact:a1/lib/a:b", OfArtifact("a1", "lib/a:b")),
        ("build:7/dist", OfBuild("7", "dist")),
        ("build:b1/dist/bin/tool", OfBuild("b1", "dist", "bin/tool")),
    ],
)
def test_a_reference_names_an_artifact_or_an_output(text: str, meant: object) -> None:
    assert wanted(text) == meant


@pytest.mark.parametrize("text", ["artifact:", "artifact:/a", "build:7", "build:7/", "build:/dist", "folder:x", ":", "Build:7/dist"])
def test_what_is_no_reference_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be"):
        wanted(text)


# --- inputs --------------------------------------------------------------------------------------------------------------------------


def test_what_is_given_is_not_missing() -> None:
    assert missing_input(Plan(stages=[stage(steps=[step(inputs=["src"])])]), ["src"]) is None


def test_a_missing_input_is_named_with_its_path() -> None:
    path, rule = missing_input(Plan(stages=[stage(steps=[step(), step("test", inputs=["lib", "src"])])]), ["lib"]) or ("", "")
    assert path == "plan.stages[0].steps[1].config.inputs[1]"
    assert "`src`" in rule


def test_an_optional_input_may_be_missing() -> None:
    assert missing_input(Plan(stages=[stage(steps=[step(optional=["src"])])]), []) is None


def test_an_output_of_an_earlier_step_or_a_needed_stage_is_an_input() -> None:
    plan = Plan(
        stages=[
            stage("last", [step(inputs=["bin", "src", "note"])], needs=["middle"]),
            stage("middle", [step(outputs=["note"])], needs=["first"]),
            stage("first", [step("make", outputs=["bin"]), step("use", inputs=["bin"])]),
        ]
    )
    assert missing_input(plan, ["src"]) is None


def test_an_output_of_a_later_step_or_of_a_stage_that_is_not_needed_is_missing() -> None:
    assert missing_input(Plan(stages=[stage(steps=[step("use", inputs=["bin"]), step("make", outputs=["bin"])])]), [])
    assert missing_input(Plan(stages=[stage("a", [step(outputs=["bin"])]), stage("b", [step(inputs=["bin"])])]), [])
