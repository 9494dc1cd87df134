"""What the gateway says no with, in the same words everywhere."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Literal

from libs.runtime.http import Problem

GONE = {"expired": "has expired", "deleted": "was deleted"}


class Denied(Problem):
    """Whoever asks may not, or is nobody that we know (401, 403). `why`, and who it is by its own word (`named`), are for our own log."""

    def __init__(self, status: Literal[401, 403], title: str, detail: str = "", *, why: str, named: Mapping[str, str] = {}) -> None:
        headers = {"WWW-Authenticate": 'Bearer realm="penstock"'} if status == 401 else None
        super().__init__(status, "unauthorized" if status == 401 else "forbidden", title, detail, headers)
        self.why = why
        self.named = named


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
