"""Builds: submit, look, list, abort."""

import asyncio
import re
from collections.abc import Awaitable, Callable
from typing import get_args

import msgspec
from aiohttp import web

from libs.eventlog.log import EventLog, LogUnavailable
from libs.runtime.commands import CommandLoop
from libs.runtime.decisions import Cause, Refused
from libs.runtime.http import Problem, read_body, strict_json
from proto.api.bodies import ProblemDetails
from proto.api.builds import ENDED, Build, BuildPage, BuildStatus, Submission
from proto.catalogue import encode
from proto.events.base import ArtifactRef
from proto.plan import Plan, plan_problem
from proto.secrets import misplaced, plan_references
from proto.topology import MAX_EVENT
from services.gateway.admission import missing_input, privileged_step
from services.gateway.auth import Principal
from services.gateway.commands import AbortBuild, RecallBuild, RequestBuild, RequestCommand, request_name
from services.gateway.decider import Request, requested
from services.gateway.feed import LogFeed
from services.gateway.inputs import Inputs, Part
from services.gateway.projection import BuildRow
from services.gateway.queries import Queries
from services.gateway.references import names_part
from services.gateway.refusals import absent, invalid
from services.gateway.routes.endpoint import PAGE, Endpoint, Parameter, answer, page
from services.gateway.secrecy import is_name, set_apart
from services.gateway.secrets import SecretKeeper

MAX_BODY = MAX_EVENT + (64 << 10)
MAX_WAIT = 300
"""Seconds that `Prefer: wait` may ask for."""
PATIENCE = 4.5
"""Seconds within which a submission is recorded, or is answered 503."""

_LARGEST = ArtifactRef(id="0" * 36, digest="0" * 64, size=2**63 - 1, files=2**63 - 1)
"""Stands for a part that is not made yet: no part takes more room."""
_WAIT = re.compile(r"(?:^|[,;\s])wait=(\d{1,9})(?:$|[,;\s])")


class BuildRoutes:
    """What is asked of builds. `passed(position, timeout)` waits for the gateway's own read models; `mac` is a keyed digest of a body."""

    def __init__(
        self,
        *,
        queries: Queries,
        inputs: Inputs,
        requests: CommandLoop[RequestCommand, Request],
        log: EventLog,
        passed: Callable[[int, float], Awaitable[bool]],
        feed: LogFeed,
        view: Callable[[BuildRow], Build],
        ids: Callable[[], str],
        secrets: SecretKeeper,
        mac: Callable[[bytes], str],
        most_at_once: int,
    ) -> None:
        self._queries = queries
        self._inputs = inputs
        self._requests = requests
        self._log = log
        self._passed = passed
        self._feed = feed
        self._view = view
        self._ids = ids
        self._secrets = secrets
        self._mac = mac
        self._most_at_once = most_at_once
        self._at_once = 0

    def endpoints(self) -> list[Endpoint]:
        builds, one = "/teams/{team}/builds", "/teams/{team}/builds/{build}"
        return [
            Endpoint(
                method="POST",
                path=builds,
                summary="Run a plan. Answers once the wish is recorded: the build will exist and end exactly once",
                handler=self.submit,
                least="member",
                parameters=(
                    Parameter(
                        name="Idempotency-Key",
                        place="header",
                        about="names the wish: the same key and body are the same build, another body is a conflict",
                    ),
                    Parameter(name="Prefer", place="header", about=f"`wait=N`: answer at the build's end, or after N seconds (at most {MAX_WAIT})"),
                ),
                body=Submission,
                answers={202: Build, 200: Build, 409: ProblemDetails, 429: ProblemDetails, 507: ProblemDetails},
            ),
            Endpoint(
                method="GET",
                path=builds,
                summary="The team's builds, newest first",
                handler=self.list,
                parameters=(*PAGE, Parameter(name="status", about="only those of this status", schema=BuildStatus)),
                answers={200: BuildPage},
            ),
            Endpoint(method="GET", path=one, summary="A build, by id or number", handler=self.get, answers={200: Build}),
            Endpoint(
                method="PUT",
                path=one + "/abort",
                summary="Stop a build; 409 when it has ended",
                handler=self.abort,
                least="member",
                answers={202: Build, 409: ProblemDetails},
            ),
        ]

    async def get(self, request: web.Request, principal: Principal) -> web.Response:
        return answer(self._view(await self.find(request, principal)))

    async def find(self, request: web.Request, principal: Principal) -> BuildRow:
        """The build that the path names. Raises Problem 404."""
        row = await self._queries.build_of_team(principal.team, request.match_info["build"])
        if row is None:
            raise absent("build", request.match_info["build"])
        return row

    async def list(self, request: web.Request, principal: Principal) -> web.Response:
        limit, below = page(request)
        status = request.query.get("status") or None
        if status is not None and status not in get_args(BuildStatus):
            raise invalid("status", f"one of {', '.join(get_args(BuildStatus))}")
        rows = await self._queries.builds(principal.team, limit + 1, below, status)
        following = str(rows[limit - 1].number) if len(rows) > limit else None
        return answer(BuildPage(items=[self._view(row) for row in rows[:limit]], next=following))

    async def abort(self, request: web.Request, principal: Principal) -> web.Response:
        row = await self.find(request, principal)
        if row.status in ENDED:
            raise Problem(409, "conflict", "The build has ended", f"build {row.number} {row.status}")
        await self._execute(AbortBuild(build=row.id), row.id, principal)
        return answer(self._view(row), status=202)

    async def submit(self, request: web.Request, principal: Principal) -> web.Response:
        if self._at_once >= self._most_at_once:
            raise Problem(429, "too-many", "Too many submissions at once", "try again soon", headers={"Retry-After": "1"})
        wait = _wait(request)
        self._at_once += 1
        try:
            body = await read_body(request, MAX_BODY)
            submission = strict_json(body, Submission)
            if problem := plan_problem(submission.plan):
                raise invalid(f"plan.{problem[0]}", problem[1])
            if path := privileged_step(submission.plan):
                team = await self._queries.team(principal.team)
                if team is None or not team.privileged:
                    raise invalid(path, f"the policy of `{principal.team}` does not let its steps be privileged (see `penstock artifact policy`)")
            if missing := missing_input(submission.plan, submission.inputs):
                raise invalid(*missing)
            if problem := misplaced(submission.plan):
                raise invalid(f"plan.{problem[0]}", problem[1])
            build, position = await self._record(submission, self._mac(body), request.headers.get("Idempotency-Key"), principal)
        finally:
            self._at_once -= 1
        row = await self._row(build, position)
        if row is None:  # recorded, but the read model is behind: the number is not known yet
            return answer({"id": build, "number": 0, "team": principal.team, "status": "pending", "url": "", "created_at": None}, status=202)
        if wait:
            row = await self._until_ended(row, wait)
        headers = {"Location": self._view(row).url} | ({"Preference-Applied": f"wait={wait}"} if wait else {})
        return answer(self._view(row), status=200 if wait and row.status in ENDED else 202, headers=headers)

    async def _record(self, submission: Submission, mac: str, key: str | None, principal: Principal) -> tuple[str, int]:
        """(the build, a position after its request). What was recorded under the key before is the answer, even when its inputs are gone since.
        Parts of artifacts are made last, when nothing else can be wrong: a request that is refused, or repeated, makes nothing."""
        request, build = request_name(principal.team, key) if key else self._ids(), self._ids()
        recalled = False
        if key and any(names_part(text) for text in submission.inputs.values()):
            recalled = True
            if (before := await self._recall(request, mac, build, principal)) is not None:
                return before
        try:
            await self._check_secrets(submission.plan, principal)
            found = await self._inputs.find(submission.inputs, f"{request} {mac}", principal)
        except Problem:
            if key is None or recalled or (before := await self._recall(request, mac, build, principal)) is None:
                raise
            return before
        plan, values = set_apart(submission.plan, build)
        if values and key and not recalled and (before := await self._recall(request, mac, build, principal)) is not None:
            return before
        command = RequestBuild(
            request=request,
            build=build,
            plan=plan,
            inputs={name: _LARGEST if isinstance(one, Part) else one for name, one in found.items()},
            name=submission.name,
            body_mac=mac,
            keep_seconds=-1 if submission.keep == "forever" else submission.keep,
        )
        if values:
            _check_size(command)
            await self._secrets.keep(principal.team, build, values)
        if parts := {name: one for name, one in found.items() if isinstance(one, Part)}:
            _check_size(command)
            made = {name: await self._inputs.make(part, principal) for name, part in parts.items()}
            command = msgspec.structs.replace(command, inputs=command.inputs | made)
        return await self._execute(command, build, principal)

    async def _check_secrets(self, plan: Plan, principal: Principal) -> None:
        """Whether the team has what the plan refers to. Raises Problem 422 naming the place."""
        for path, name in plan_references(plan):
            if not is_name(name) or await self._queries.secret(f"{principal.team}/{name}") is None:
                raise invalid(f"plan.{path}", f"the team has no secret `{name}`: an owner can set it with `penstock secret set {name}`")

    async def _recall(self, request: str, mac: str, build: str, principal: Principal) -> tuple[str, int] | None:
        """What was recorded under the request before, if anything was. Raises Refused when it came with another body."""
        try:
            return await self._execute(RecallBuild(request=request, body_mac=mac), build, principal)
        except Refused as refused:
            if refused.kind == "missing":
                return None
            raise

    async def _execute(self, command: RequestCommand, build: str, principal: Principal) -> tuple[str, int]:
        """(the build that the request stands for, a position after it). Raises LogUnavailable within PATIENCE."""
        cause = Cause(team=principal.team, correlation_id=build, causation_id=build, actor=principal.actor)
        try:
            async with asyncio.timeout(PATIENCE):
                outcome = await self._requests.execute(command, cause)
                return outcome.state.build, outcome.position or await self._log.head()
        except TimeoutError:
            raise LogUnavailable(f"nothing within {PATIENCE} s") from None

    async def _row(self, build: str, position: int) -> BuildRow | None:
        """The build in the read models, or None when they have not come so far in a second: it is recorded all the same."""
        await self._passed(position, 1.0)
        try:
            async with asyncio.timeout(1.0):
                return await self._queries.build(build)
        except (LogUnavailable, TimeoutError):
            return None

    async def _until_ended(self, row: BuildRow, seconds: int) -> BuildRow:
        """The build when it has ended, or as it is after `seconds`."""
        try:
            async with asyncio.timeout(seconds), self._feed.build(row.id) as watch:
                position = watch.position
                while row.status not in ENDED:
                    if await self._passed(position, 1.0):
                        row = await self._queries.build(row.id) or row
                        if row.status not in ENDED:
                            position = await watch.wait()
        except (TimeoutError, LogUnavailable):
            pass
        return row


def _check_size(command: RequestBuild) -> None:
    """As the log does, before it is asked. Raises Refused."""
    if (size := len(encode(requested(command)))) > MAX_EVENT:
        raise Refused("too-large", f"the request is {size} bytes, over the limit of {MAX_EVENT}")


def _wait(request: web.Request) -> int:
    """Seconds of `Prefer: wait=N` (RFC 7240), 0 without."""
    match = _WAIT.search(request.headers.get("Prefer", ""))
    return min(int(match[1]), MAX_WAIT) if match else 0
