"""Who may be a worker, by given/when/then."""

from msgspec.structs import replace

from proto.events.fleet import (
    RegistrationTokenIssued,
    RegistrationTokenUsed,
    WorkerDeleted,
    WorkerDrained,
    WorkerRegistered,
    WorkerResumed,
    WorkerRevoked,
)
from services.gateway.commands import (
    DeleteWorker,
    DrainWorker,
    IssueRegistration,
    RegisterWorker,
    ResumeWorker,
    RevokeWorker,
    UseRegistration,
)
from services.gateway.decider import FleetDecider
from tests.unit.scenario import Scenario

ISSUE = IssueRegistration(token_id="t", sha256="5a", expires_at=100.0, tags=("gpu",), description="d")
ISSUED = RegistrationTokenIssued(token_id="t", sha256="5a", expires_at=100.0, tags=("gpu",), description="d")
USE = UseRegistration(token_id="t", sha256="5a", worker="w", key="k", now=99.0)
USED = RegistrationTokenUsed(worker="w", key="k")
REGISTER = RegisterWorker(worker="w", key="k", tags=("gpu",), token_id="t")
REGISTERED = WorkerRegistered(worker="w", key="k", tags=("gpu",), token_id="t")
BY_NAME = RegisterWorker(worker="w", key="k")


def given(*events):
    return Scenario(FleetDecider(), *events)


def test_a_token_is_used_once_and_by_the_same_worker_as_often_as_its_answer_is_lost():
    # FAULTS 85
    given().when(ISSUE).then(ISSUED)
    given(ISSUED).when(USE).then(USED)
    given(ISSUED, USED).when(USE).then()
    given(ISSUED, USED).refuses(replace(USE, worker="other"), "unknown")
    given(ISSUED, USED).refuses(replace(USE, key="other"), "unknown")


def test_a_token_that_is_unknown_another_or_too_old_is_of_no_use():
    given().refuses(USE, "unknown")
    given(ISSUED).refuses(replace(USE, sha256="5b"), "unknown")
    given(ISSUED).refuses(replace(USE, now=100.0), "unknown")
    given(ISSUED, USED).refuses(replace(USE, now=100.0), "unknown")


def test_a_trial_records_nothing_and_is_refused_as_the_thing_itself():
    given(ISSUED).when(replace(USE, trial=True)).then()
    given().refuses(replace(USE, trial=True), "unknown")
    given().when(replace(REGISTER, trial=True)).then()
    given(REGISTERED).refuses(replace(REGISTER, key="other", trial=True), "conflict")


def test_a_name_has_one_key():
    given().when(REGISTER).then(REGISTERED)
    given(REGISTERED).when(REGISTER).then()
    given(REGISTERED).refuses(replace(REGISTER, key="other"), "conflict")


def test_a_worker_that_was_revoked_is_for_good_until_it_is_deleted_and_registered_anew():
    revoked = WorkerRevoked(reason="stolen")
    given(REGISTERED).when(RevokeWorker(worker="w", reason="stolen")).then(revoked)
    given(REGISTERED, revoked).when(RevokeWorker(worker="w")).then()
    for command in (REGISTER, BY_NAME, DrainWorker(worker="w"), ResumeWorker(worker="w")):
        given(REGISTERED, revoked).refuses(command, "conflict")
    given(REGISTERED, revoked).when(DeleteWorker(worker="w", lost=False)).then(WorkerDeleted())
    other = replace(REGISTERED, key="k2", token_id="t2")
    given(REGISTERED, revoked, WorkerDeleted()).when(replace(REGISTER, key="k2", token_id="t2")).then(other)
    for command in (REGISTER, replace(REGISTER, trial=True), replace(REGISTER, key="k2")):
        given(REGISTERED, revoked, WorkerDeleted()).refuses(command, "conflict")


def test_a_key_that_was_revoked_never_comes_back_and_one_that_was_only_removed_does():
    again, revoked, gone = replace(REGISTER, token_id="t2"), WorkerRevoked(), WorkerDeleted()
    given(REGISTERED, gone).when(again).then(replace(REGISTERED, token_id="t2"))
    given(REGISTERED, revoked, gone).refuses(again, "key-revoked")
    given(REGISTERED, revoked, gone).refuses(replace(again, trial=True), "key-revoked")
    other = replace(REGISTERED, key="k2", token_id="t2")
    given(REGISTERED, revoked, gone, other, gone).refuses(replace(again, token_id="t3"), "key-revoked")


def test_a_start_of_the_gateway_does_not_bring_back_whom_the_owner_deleted():
    given().when(BY_NAME).then(WorkerRegistered(worker="w", key="k"))
    given(REGISTERED, WorkerRevoked(), WorkerDeleted()).refuses(BY_NAME, "conflict")


def test_only_a_worker_that_is_revoked_or_lost_is_deleted():
    given(REGISTERED).refuses(DeleteWorker(worker="w", lost=False), "conflict")
    given(REGISTERED).when(DeleteWorker(worker="w", lost=True)).then(WorkerDeleted())
    given(REGISTERED, WorkerDeleted()).refuses(DeleteWorker(worker="w", lost=True), "missing")


def test_draining_and_resuming_are_recorded_when_they_change_something():
    given(REGISTERED).when(DrainWorker(worker="w", reason="disk")).then(WorkerDrained(reason="disk"))
    given(REGISTERED, WorkerDrained()).when(DrainWorker(worker="w")).then()
    given(REGISTERED, WorkerDrained()).when(ResumeWorker(worker="w")).then(WorkerResumed())
    given(REGISTERED).when(ResumeWorker(worker="w")).then()


def test_there_is_nothing_to_decide_about_who_is_no_worker():
    for command in (DrainWorker(worker="w"), ResumeWorker(worker="w"), RevokeWorker(worker="w"), DeleteWorker(worker="w", lost=True)):
        given().refuses(command, "missing")
