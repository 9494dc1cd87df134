"""What the client raises. `str(error)` is one line for a person; what the server said is in `problem`."""

from penstock.client.model import Problem


class PenstockError(Exception):
    """Anything that went wrong between this program and Penstock."""

    problem: Problem | None = None


class NoTarget(PenstockError):
    """It is not known which Penstock to talk to, or a targets file cannot be read."""


class Unavailable(PenstockError):
    """Nobody answers, or the answer is that it cannot be done now; trying again later is right: in `retry_after` seconds, if the server says so."""

    retry_after: float = 0.0


class NotThere(Unavailable):
    """A direct address does not take us; the server itself does."""


class StreamBroken(Unavailable):
    """An event stream ended before its end and could not be taken up again."""


class Damaged(PenstockError):
    """What came back cannot be used: cut short, or a member of an archive that must not be written."""


class Unreadable(PenstockError):
    """A folder, or a file in it, cannot be taken; the message names it."""


class Changed(Unreadable):
    """A file changed while it was uploaded."""


class Unwritable(PenstockError):
    """A download cannot be written where it should; the message says where and why."""


class Answered(PenstockError):
    """The server answered with a problem."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.detail or problem.title or f"the server answered {problem.status}")
        self.problem = problem


class Unauthorized(Answered):
    """401: no token, or one that is not valid."""


class Forbidden(Answered):
    """403: the token's role does not allow it."""


class NotFound(Answered):
    """404: there is none, or it is another team's."""


class Conflict(Answered):
    """409: it is not in a state that allows it, or the idempotency key was used for something else."""


class Expired(Answered):
    """410: it was there, and has expired or was deleted."""


class Full(Answered):
    """507: the store is full, or the team's quota is used up."""


class Refused(Answered):
    """400, 413, 422 and the like: the request itself is wrong; `path` names the part when the server says it."""

    @property
    def path(self) -> str:
        return self.problem.path if self.problem else ""


class Failed(Answered):
    """5xx that is not about being unavailable."""


def error_for(problem: Problem) -> Answered | Unavailable:
    """The exception that a problem is raised as."""
    kinds: dict[int, type[Answered]] = {401: Unauthorized, 403: Forbidden, 404: NotFound, 409: Conflict, 410: Expired, 507: Full}
    if problem.status in (429, 502, 503, 504):
        error = Unavailable(problem.detail or problem.title or f"the server answered {problem.status}")
        error.problem = problem
        return error
    return kinds.get(problem.status, Failed if problem.status >= 500 else Refused)(problem)
