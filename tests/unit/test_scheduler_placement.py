"""Placement: requirements, load, fairness, age, and what is said when nothing fits."""

from hypothesis import given, settings
from hypothesis import strategies as st

from proto.messages import Attempt, Credit, Offers
from proto.plan import Requirements
from services.scheduler.placement import WorkerView, place
from services.scheduler.queue import Queue, Queued


def queued(number, team="main", requirements=None):
    return Queued(
        attempt=Attempt(f"b{number}", "main", 1),
        team=team,
        requirements=requirements or Requirements(),
        position=number,
        queued_at=0.0,
        correlation_id="",
        event_id="",
    )


def queue_of(*items):
    queue = Queue()
    for item in items:
        queue.add(item)
    return queue


def worker(name, free=1, slots=4, **offers):
    credits = [Credit(f"{name}-{i}", b"") for i in range(free)]
    draining = offers.pop("draining", False)
    return WorkerView(worker=name, boot="1", slots=slots, offers=Offers(**offers), credits=credits, busy=slots - free, draining=draining)


def placed(placement):
    return [(a.queued.attempt.build, a.worker) for a in placement.assignments]


def test_the_oldest_goes_first_to_the_least_loaded():
    placement = place(queue_of(queued(1), queued(2), queued(3)), [worker("w1", free=1), worker("w2", free=3)], {})
    assert placed(placement) == [("b1", "w2"), ("b2", "w2"), ("b3", "w1")]
    assert [c.worker for c in placement.assignments[0].why] == ["w2", "w1"]


def test_the_team_with_the_fewest_running_goes_first():
    placement = place(queue_of(*(queued(i, "big") for i in range(5)), queued(9, "small")), [worker("w1", free=2)], {"big": 3})
    assert placed(placement) == [("b9", "w1"), ("b0", "w1")]


def test_a_requirement_that_nobody_offers_is_said_in_words():
    wants = {
        "no worker offers image_resource of type registry-image": Requirements(image="registry-image"),
        "no worker offers rootfs_uri": Requirements(image="rootfs"),
        "no worker offers run.user": Requirements(user=True),
        "no worker offers container_limits": Requirements(limits=True),
        "no worker offers platform darwin": Requirements(platform="darwin"),
        "no worker offers tag gpu": Requirements(tags=("gpu",)),
    }
    for reason, requirements in wants.items():
        placement = place(queue_of(queued(1, requirements=requirements)), [worker("w1"), worker("w2")], {})
        assert placement.assignments == []
        [deferral] = placement.deferrals
        assert deferral.reason == reason
        assert list(deferral.refused.values()) == [2]


def test_an_empty_fleet_is_said():
    assert place(queue_of(queued(1)), [], {}).deferrals[0].reason == "no worker is connected"
    assert place(queue_of(queued(1)), [worker("w", draining=True)], {}).deferrals[0].reason == "every worker is draining"


def test_a_busy_fleet_is_no_reason_only_a_wait():
    placement = place(queue_of(queued(1)), [worker("w1", free=0)], {})
    assert placement.assignments == [] and placement.deferrals == []


def test_the_fleet_given_is_left_as_it_was():
    fleet = [worker("w1", free=2)]
    place(queue_of(queued(1)), fleet, {})
    assert len(fleet[0].credits) == 2 and fleet[0].busy == 2


requirements = st.builds(Requirements, platform=st.sampled_from(["linux", "darwin"]), tags=st.sampled_from([(), ("gpu",)]), user=st.booleans())
workers = st.lists(
    st.builds(
        lambda i, free, platform, tags, user: worker(f"w{i}", free=free, platform=platform, tags=tags, user=user),
        st.integers(0, 10_000),
        st.integers(0, 4),
        st.sampled_from(["linux", "darwin"]),
        st.sampled_from([(), ("gpu",)]),
        st.booleans(),
    ),
    max_size=6,
    unique_by=lambda w: w.worker,
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["t1", "t2"]), requirements), max_size=20), workers)
def test_placement_never_exceeds_capacity_nor_breaks_a_requirement_nor_leaves_a_fitting_credit_idle(wanted, fleet):
    queue = queue_of(*(queued(i, team, needs) for i, (team, needs) in enumerate(wanted)))
    placement = place(queue, fleet, {})
    views = {w.worker: w for w in fleet}
    nonces = [a.credit.nonce for a in placement.assignments]
    assert len(nonces) == len(set(nonces)), "a credit is used once"
    assert len({a.queued.attempt for a in placement.assignments}) == len(placement.assignments)
    used = {name: sum(a.worker == name for a in placement.assignments) for name in views}
    for name, view in views.items():
        assert used[name] <= len(view.credits)

    def fits(needs, offers):
        return needs.platform == offers.platform and set(needs.tags) <= set(offers.tags) and (offers.user or not needs.user)

    for assignment in placement.assignments:
        assert fits(assignment.queued.requirements, views[assignment.worker].offers)
    left = {a.queued.attempt for a in placement.assignments}
    for item in queue.all():
        if item.attempt not in left:
            assert not any(fits(item.requirements, v.offers) and used[n] < len(v.credits) for n, v in views.items())
