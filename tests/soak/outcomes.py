"""What the log says of how builds ended."""

from collections import Counter
from collections.abc import Sequence

from proto.envelope import Fact
from proto.events.build import BuildFinished
from proto.events.lease import LeaseExpired

ATTEMPTS = 10
"""What the plans of these builds allow."""


def ends_of(facts: Sequence[Fact]) -> dict[str, list[str]]:
    """The ends of each build."""
    ends: dict[str, list[str]] = {}
    for fact in facts:
        if isinstance(fact.event, BuildFinished):
            ends.setdefault(fact.subject_id, []).append(fact.event.status)
    return ends


def given_up(facts: Sequence[Fact]) -> set[str]:
    """Builds that ended in error, as they should, when the lease of their tenth attempt had expired, as those of the nine before."""
    expired = Counter(fact.subject_id for fact in facts if isinstance(fact.event, LeaseExpired))
    return {build for build, statuses in ends_of(facts).items() if statuses == ["errored"] and expired[build] == ATTEMPTS}
