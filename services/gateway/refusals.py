"""What the gateway says no with, in the same words everywhere."""

from datetime import UTC, datetime

from libs.runtime.http import Problem

GONE = {"expired": "has expired", "deleted": "was deleted"}


def absent(what: str, name: str) -> Problem:
    """Also the answer for what belongs to another team: it is as if it were not there (FAULTS 11, 33)."""
    return Problem(404, "not-found", "There is no such thing", f"there is no {what} `{_shown(name)}`")


def gone(what: str, name: str, why: str, expires_at: int) -> Problem:
    """For the team's own that was there until `expires_at` (unix seconds). `why` is a key of GONE."""
    when = f" on {datetime.fromtimestamp(expires_at, UTC):%Y-%m-%d at %H:%M} UTC" if why == "expired" and expires_at else ""
    return Problem(410, "expired", "It is not there any more", f"{what} `{_shown(name)}` {GONE[why]}{when}")


def invalid(path: str, rule: str) -> Problem:
    """`path` names the part of the request that breaks the rule."""
    return Problem(422, "invalid", "The request does not say what it must", f"{path}: {rule}", path=path)


def _shown(name: str) -> str:
    return name[:100].encode("utf-8", "replace").decode()
