"""The worker's decisions: credits, packages, control, leases. No clock but the numbers given here."""

from hypothesis import given
from hypothesis import strategies as st

from proto.messages import About, ArchivedLog, Attempt, Control, Held, Mode, Offers, Package
from proto.plan import Run, RunStep, Stage, TaskConfig
from services.worker.condition import FINE, Condition
from services.worker.session import Action, Followed, Forget, ForgetLog, Interrupt, Kill, Recorded, Refuse, Session, Start
from tests.controls import counter

A, B = Attempt("b1", "main", 1), Attempt("b2", "main", 1)
STAGE = Stage(name="main", steps=[RunStep(name="step", config=TaskConfig(run=Run(path="true")))])


def session(slots: int = 1, mode: Mode = "push") -> Session:
    return Session("w1", "boot1", 1, b"key", slots, Offers(), counter("nonce"), About(mode=mode))


def package(credit: str, attempt: Attempt = A, worker: str = "w1", boot: str = "boot1") -> Package:
    return Package(
        attempt=attempt,
        team="main",
        worker=worker,
        boot=boot,
        credit=credit,
        lease_seconds=15.0,
        stage=STAGE,
        inputs={},
        token="",
        artifacts_url="",
    )


def answer(
    number: int, *held: Held, boot: str = "boot1", archived: list[ArchivedLog] | None = None, challenge: bytes = b"c", drain: bool = False
) -> Control:
    return Control(boot=boot, number=number, challenge=challenge, lease_seconds=15.0, held=list(held), archived=archived or [], drain=drain)


def beat(worker: Session, now: float, condition: Condition = FINE) -> list[str]:
    return [credit.nonce for credit in worker.on_heartbeat_due(now, [], condition=condition).availability.credits]


def with_running(now: float = 0.0) -> Session:
    worker = session()
    (credit,) = beat(worker, now)
    assert worker.on_package(package(credit), now) == Start(package(credit))
    return worker


def test_a_heartbeat_offers_one_credit_a_free_slot() -> None:
    worker = session(slots=3)
    credits = beat(worker, 0)
    assert len(set(credits)) == 3
    worker.on_package(package(credits[0]), 0.1)
    assert beat(worker, 0.2) == credits[1:]


def test_a_later_boot_of_its_name_is_said_once_and_what_runs_is_lost() -> None:
    worker = with_running()
    told = answer(1, challenge=b"")
    beat(worker, 1.0)
    assert worker.on_control(answer(1, challenge=b"", boot="before")) == []
    assert worker.on_control(answer(2, challenge=b"")) == [Followed(), Kill(A, "not ours any more"), Forget(A)]
    beat(worker, 2.0)
    assert worker.on_control(answer(3, challenge=b"")) == [] == worker.on_control(told)


def test_a_credit_is_honoured_once() -> None:
    worker = session(slots=2)
    first, _ = beat(worker, 0)
    assert worker.on_package(package(first, A), 1) == Start(package(first, A))
    assert worker.on_package(package(first, B), 1) == Refuse("no such credit")


def test_a_repeated_package_of_a_running_attempt_is_ignored() -> None:
    worker = session()
    (credit,) = beat(worker, 0)
    assert worker.on_package(package(credit), 1) == Start(package(credit))
    assert worker.on_package(package(credit), 1) is None


def test_a_credit_is_honoured_only_while_it_is_young() -> None:
    worker = session()
    (credit,) = beat(worker, 0)
    assert worker.on_package(package(credit), 10.0) == Refuse("credit too old")
    assert worker.on_package(package(credit), 9.9) == Start(package(credit))


def test_an_old_credit_is_replaced_and_both_are_good_for_the_one_slot() -> None:
    worker = session()
    (old,) = beat(worker, 0)
    assert beat(worker, 3.9) == [old]
    (new,) = beat(worker, 4.0)
    assert new != old
    assert worker.on_package(package(old, A), 5.0) == Start(package(old, A))
    assert worker.on_package(package(new, B), 5.0) == Refuse("no such credit")


def test_packages_for_others_are_refused() -> None:
    """FAULTS 87: another worker; an earlier boot of this one."""
    worker = session()
    (credit,) = beat(worker, 0)
    assert worker.on_package(package(credit, worker="w2"), 0) == Refuse("another worker's")
    assert worker.on_package(package(credit, boot="boot0"), 0) == Refuse("another boot's")


def test_a_leaving_worker_offers_and_takes_nothing() -> None:
    worker = session()
    (credit,) = beat(worker, 0)
    worker.leaving = True
    heartbeat = worker.on_heartbeat_due(1, [])
    assert (heartbeat.availability.credits, heartbeat.draining) == ([], True)
    assert worker.on_package(package(credit), 1) == Refuse("leaving")


def test_a_drained_worker_offers_nothing_and_finishes_what_it_was_given() -> None:
    worker = session(slots=2)
    first, second = beat(worker, 0)
    worker.on_package(package(first, A), 0.1)
    worker.on_control(answer(1, drain=True))
    heartbeat = worker.on_heartbeat_due(1, [])
    assert (heartbeat.availability.credits, heartbeat.draining, heartbeat.busy) == ([], True, 1)
    assert worker.on_package(package(second, B), 1.1) == Start(package(second, B)), "its lease was on the way"
    assert worker.on_control(answer(2, Held(A, 0))) == [Recorded(A, 0)]
    assert worker.on_attempt_ended(A)
    assert len(beat(worker, 2)) == 1, "resumed"


def test_only_the_latest_answer_drains() -> None:
    worker = session()
    for now in range(3):
        beat(worker, now)
    worker.on_control(answer(3, drain=True))
    worker.on_control(answer(2))
    worker.on_control(answer(0))
    assert beat(worker, 3) == []


def test_a_worker_in_trouble_says_so_and_offers_nothing_until_it_is_over() -> None:
    worker = session()
    (credit,) = beat(worker, 0)
    heartbeat = worker.on_heartbeat_due(1, [], condition=Condition(trouble="disk full"))
    assert (heartbeat.availability.credits, heartbeat.trouble) == ([], "disk full")
    (fresh,) = beat(worker, 2)
    assert fresh != credit, "a lease may quote the old one: it is not offered again"


def test_a_worker_whose_engine_is_gone_offers_all_but_images_and_says_so() -> None:
    """FAULTS 50."""
    everything = Offers(images=("image",), user=True, limits=True, privileged=True, tags=("gpu",), sandbox="bubblewrap")
    worker = Session("w1", "boot", 1, b"k" * 32, 1, everything, iter("abc").__next__, About())
    gone = worker.on_heartbeat_due(0, [], condition=Condition(no_images="the container engine does not answer"))
    assert gone.availability.offers == Offers(tags=("gpu",), sandbox="bubblewrap")
    assert (len(gone.availability.credits), gone.trouble, gone.limited) == (1, "", "no images: the container engine does not answer")
    back = worker.on_heartbeat_due(1, [])
    assert (back.availability.offers, back.limited) == (everything, "")


def test_pull_offers_one_credit_at_a_time_and_only_while_work_is_wanted() -> None:
    worker = session(slots=3, mode="pull")
    (first,) = beat(worker, 0)
    assert beat(worker, 1) == [first]
    worker.on_package(package(first, A), 1.1)
    (second,) = beat(worker, 1.2)
    worker.on_package(package(second, B), 1.3)
    sated = Condition(sated="s")
    assert beat(worker, 1.4, sated) == []
    (third,) = beat(worker, 1.5)
    assert len({first, second, third}) == 3
    worker.on_package(package(third, Attempt("b3", "main", 1)), 1.6)
    assert beat(worker, 1.7) == [], "every slot is in use"


def test_a_credit_that_was_withdrawn_is_honoured_but_not_offered_again() -> None:
    worker = session(mode="pull")
    (credit,) = beat(worker, 0)
    assert beat(worker, 1, Condition(sated="s")) == []
    (fresh,) = beat(worker, 2)
    assert fresh != credit
    assert worker.on_package(package(credit), 3) == Start(package(credit))
    assert worker.on_package(package(fresh, B), 3) == Refuse("no such credit")


def test_push_offers_whatever_the_load() -> None:
    assert len(beat(session(slots=2), 0, Condition(sated="s"))) == 2


def test_a_pull_worker_says_why_it_wants_nothing() -> None:
    enough = Condition(sated="its load is 9", no_images="the engine is gone")
    assert session(mode="pull").on_heartbeat_due(0, [], condition=enough).limited == "its load is 9"
    assert session().on_heartbeat_due(0, [], condition=enough).limited == "no images: the engine is gone"


@given(
    st.sampled_from(["push", "pull"]),
    st.integers(1, 4),
    st.lists(st.tuples(st.sampled_from(["beat", "sated", "trouble", "take", "take again", "end"]), st.integers(0, 12)), max_size=60),
)
def test_never_more_runs_than_there_are_slots_and_no_credit_is_good_twice(mode: Mode, slots: int, moves: list[tuple[str, int]]) -> None:
    """Whatever the scheduler does with the credits that it has seen."""
    worker, seen, taken, running, now = session(slots, mode), [], set(), [], 0.0
    conditions = {"beat": Condition(), "sated": Condition(sated="s"), "trouble": Condition(trouble="t")}
    for number, (move, pick) in enumerate(moves):
        now += 0.7
        if move in conditions:
            offered = beat(worker, now, conditions[move])
            assert not taken.intersection(offered)
            assert len(offered) <= (slots - len(running) if mode == "push" else 1)
            seen += offered
        elif move == "end" and running:
            worker.on_attempt_ended(running.pop(pick % len(running)))
        elif move.startswith("take") and seen:
            credit, attempt = seen[-1 - pick % len(seen)], Attempt(f"b{number}", "main", 1)
            if isinstance(worker.on_package(package(credit, attempt), now), Start):
                assert credit not in taken
                taken.add(credit)
                running.append(attempt)
            assert len(running) <= slots


def test_an_attempt_that_the_answer_does_not_hold_is_killed_and_forgotten() -> None:
    """FAULTS 45: its lease is another's."""
    worker = with_running()
    heartbeat = worker.on_heartbeat_due(1, [])
    assert [r.attempt for r in heartbeat.running] == [A]
    assert worker.on_control(answer(heartbeat.number)) == [Kill(A, "not ours any more"), Forget(A)]
    assert worker.active == []
    assert len(beat(worker, 2)) == 1


def test_an_answer_to_a_heartbeat_that_did_not_list_the_attempt_says_nothing_of_it() -> None:
    worker = with_running()
    assert worker.on_control(answer(1)) == []
    assert worker.active == [A]


def test_an_early_word_means_only_what_it_lists() -> None:
    worker = with_running()
    worker.on_heartbeat_due(1, [])
    assert worker.on_control(answer(0)) == []
    assert worker.on_control(answer(0, Held(A, 0, "aborted"))) == [Recorded(A, 0), Interrupt(A, "aborted")]
    assert worker.active == [A]


def test_an_interruption_is_acted_on_once() -> None:
    worker = with_running()
    assert Interrupt(A, "timeout") in worker.on_control(answer(0, Held(A, 0, "timeout")))
    assert worker.on_control(answer(0, Held(A, 0, "timeout"))) == [Recorded(A, 0)]


def test_words_for_another_boot_change_nothing() -> None:
    worker = with_running()
    number = worker.on_heartbeat_due(1, []).number
    assert worker.on_control(answer(number, boot="boot0", archived=[ArchivedLog(A.build, A.stage, A.number)])) == []
    assert worker.active == [A]


def test_the_last_challenge_is_quoted() -> None:
    worker = session()
    assert worker.on_heartbeat_due(0, []).availability.challenge == b""
    worker.on_control(answer(1, challenge=b"one"))
    assert worker.on_heartbeat_due(1, []).availability.challenge == b"one"
    worker.on_control(answer(2, challenge=b"two"))
    worker.on_control(answer(1, challenge=b"late"))
    assert worker.on_heartbeat_due(2, []).availability.challenge == b"two"


def test_an_ended_attempt_frees_its_slot_and_is_listed_until_its_reports_are_recorded() -> None:
    worker = with_running()
    worker.on_reported(A, 3)
    assert worker.on_attempt_ended(A)
    heartbeat = worker.on_heartbeat_due(1, [])
    assert len(heartbeat.availability.credits) == 1
    assert [(r.attempt, r.reported) for r in heartbeat.running] == [(A, 3)]
    assert worker.on_control(answer(heartbeat.number, Held(A, 2))) == [Recorded(A, 2)]
    assert worker.on_control(answer(0, Held(A, 3))) == [Recorded(A, 3), Forget(A)]
    assert worker.on_heartbeat_due(2, []).running == []


def test_logs_are_forgotten_when_archived() -> None:
    log = ArchivedLog(B.build, B.stage, B.number, 7, [(2, 3)])
    assert session().on_control(answer(0, archived=[log])) == [ForgetLog(log)]


def test_without_answers_the_worker_kills_its_work_before_its_lease_is_over() -> None:
    worker = with_running(now=100.0)
    assert worker.on_time(109.9) == []
    assert worker.on_time(110.0) == [Kill(A, "no answer for too long"), Forget(A)]
    assert worker.on_time(111.0) == []


def test_an_answer_renews_from_the_time_its_heartbeat_was_sent() -> None:
    worker = with_running(now=100.0)
    number = worker.on_heartbeat_due(105.0, []).number
    assert worker.on_control(answer(number, Held(A, 0))) == [Recorded(A, 0)]
    assert worker.on_time(114.9) == []
    assert worker.on_time(115.0) == [Kill(A, "no answer for too long"), Forget(A)]


def test_a_lease_counts_from_when_its_credit_was_offered() -> None:
    """The owner's clock began no earlier than that, and a package may be slow."""
    worker = session()
    (credit,) = beat(worker, 0)
    worker.on_package(package(credit), 9.0)
    assert worker.on_time(10.0) == [Kill(A, "no answer for too long"), Forget(A)]


def test_an_old_credit_gives_a_whole_lease_to_a_worker_whose_heartbeats_are_answered() -> None:
    """The owner's clock began again with each heartbeat that it heard."""
    worker = session()
    (credit,) = beat(worker, 0)
    number = worker.on_heartbeat_due(8.0, []).number
    worker.on_control(answer(number))
    worker.on_package(package(credit), 9.0)
    assert worker.on_time(17.9) == []
    assert worker.on_time(18.0) == [Kill(A, "no answer for too long"), Forget(A)]


def test_a_worker_that_slept_kills_all_its_work() -> None:
    """FAULTS 45."""
    worker = session(slots=2)
    first, second = beat(worker, 0)
    worker.on_package(package(first, A), 0)
    worker.on_package(package(second, B), 0)
    expected: list[Action] = [Kill(A, "no answer for too long"), Forget(A), Kill(B, "no answer for too long"), Forget(B)]
    assert worker.on_time(60) == expected


def test_reports_of_an_earlier_boot_are_listed_until_they_are_of_no_use() -> None:
    worker = session()
    worker.on_replayed(B, 4)
    heartbeat = worker.on_heartbeat_due(0, [])
    assert [(r.attempt, r.reported) for r in heartbeat.running] == [(B, 4)]
    assert len(heartbeat.availability.credits) == 1
    assert worker.on_control(answer(heartbeat.number)) == [Forget(B)]


def test_what_is_cached_is_said_until_it_was_heard_and_again_when_it_is_new_or_somebody_else_asks() -> None:
    worker = session()

    def said(*cached: str) -> tuple[str, ...] | None:
        return worker.on_heartbeat_due(0, [], cached).availability.cached

    assert [said(), said()] == [(), ()]
    worker.on_control(answer(1))
    assert said() == (), "whoever gave that challenge may not have heard it"
    worker.on_control(answer(2))
    assert said() == (), "that was the answer to a heartbeat with another challenge"
    worker.on_control(answer(3))
    assert [said(), said("a"), said("a")] == [None, ("a",), ("a",)]
    worker.on_control(answer(4))
    assert said("a") == ("a",), "the heartbeat that was answered did not hold it"
    worker.on_control(answer(6))
    assert [said("a"), said("a")] == [None, None]
    worker.on_control(answer(9, challenge=b"another"))
    assert [said("a"), said("b", "a")] == [("a",), ("b", "a")]
    worker.on_control(answer(12, challenge=b"another"))
    assert [said("b", "a"), said("b")] == [None, ("b",)]
