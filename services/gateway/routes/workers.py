"""Who may be a worker: tokens, registration, and what becomes of a worker that is there."""

import secrets
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime

import msgspec
import structlog
from aiohttp import web
from prometheus_client import Counter

from libs.runtime.addresses import address_of
from libs.runtime.commands import CommandLoop, Outcome
from libs.runtime.decisions import Cause, Refused
from libs.runtime.http import Problem, read_body, strict_json
from libs.tokens import BadSignature, BadToken, key_bytes, read_token, sign, sign_token, signature_bytes, signature_text, verify
from proto.api.bodies import ProblemDetails
from proto.api.workers import Challenge, Myself, NewRegistration, NewWorker, NoWorker, RegisteredWorker, Registration, Why, WorkerStanding
from proto.introduction import BECOME, REGISTER, STANDING, words
from proto.messages import Signed
from proto.private import Private
from services.gateway import decider
from services.gateway.auth import Principal
from services.gateway.commands import (
    DeleteWorker,
    DrainWorker,
    FleetCommand,
    IssueRegistration,
    RegisterWorker,
    ResumeWorker,
    RevokeWorker,
    UseRegistration,
    token_id_of,
)
from services.gateway.queries import Queries
from services.gateway.rates import Rate
from services.gateway.refusals import Denied, absent
from services.gateway.routes.endpoint import Endpoint, answer
from services.gateway.routes.teams import sha256_of

MAX_BODY = 16 << 10
CHALLENGE_SECONDS = 60.0

logger = structlog.get_logger()


class Site(Private, frozen=True, kw_only=True):
    """What a new worker is told. `gateway_key` is the seed that challenges and answers are signed with, by every instance of the gateway."""

    server_public_key: str
    nats_url: str
    gateway_key: str
    gateway_public_key: str


class _Challenge(msgspec.Struct, frozen=True):
    register: str
    exp: int


class WorkerRoutes:
    """Owners of `first`, the team that the deployment began with, decide about workers; whoever shows a token of theirs registers one.
    `now` is unix seconds, `begun` whether the workers that the deployment names are registered."""

    def __init__(
        self,
        *,
        fleet: CommandLoop[FleetCommand, decider.Fleet],
        queries: Queries,
        passed: Callable[[int, float], Awaitable[bool]],
        site: Site,
        first: str,
        ids: Callable[[], str],
        now: Callable[[], float],
        rate: Rate,
        registrations: Counter,
        begun: Callable[[], bool],
    ) -> None:
        self._fleet = fleet
        self._begun = begun
        self._queries = queries
        self._passed = passed
        self._site = site
        self._first = first
        self._ids = ids
        self._now = now
        self._rate = rate
        self._registrations = registrations

    def endpoints(self) -> list[Endpoint]:
        one = "/workers/{worker}"
        return [
            Endpoint(
                method="POST",
                path="/workers/tokens",
                summary="Issue a token that registers one worker; it is shown this once",
                handler=self.issue,
                least="owner",
                body=NewRegistration,
                answers={201: Registration},
            ),
            Endpoint(
                method="POST",
                path="/workers/challenge",
                summary="What a worker must sign, to register or to ask for its standing",
                handler=self.challenge,
                least=None,
                answers={200: Challenge, 429: ProblemDetails},
            ),
            Endpoint(
                method="POST",
                path="/workers/register",
                summary="Register a worker, by a token; again with the same token, name and key: the same",
                handler=self.register,
                least=None,
                body=NewWorker,
                answers={201: RegisteredWorker, 401: ProblemDetails, 409: ProblemDetails, 422: ProblemDetails, 429: ProblemDetails},
            ),
            Endpoint(
                method="POST",
                path="/workers/standing",
                summary="What has become of a worker, for itself; 404 when none has that name and key",
                handler=self.standing,
                least=None,
                body=Myself,
                answers={200: WorkerStanding, 401: ProblemDetails, 404: NoWorker, 429: ProblemDetails},
            ),
            *(
                Endpoint(
                    method="PUT",
                    path=f"{one}/{verb}",
                    summary=summary,
                    handler=handler,
                    least="owner",
                    body=Why,
                    body_required=False,
                    answers={204: None, 409: ProblemDetails},
                )
                for verb, summary, handler in (
                    ("drain", "It finishes what it runs, and gets nothing new", self.drain),
                    ("resume", "It gets work again", self.resume),
                    ("revoke", "Nothing that bears its key is heard any more; its work is given to others at once", self.revoke),
                )
            ),
            Endpoint(
                method="DELETE",
                path=one,
                summary="Forget a worker that is revoked or lost: its name is free",
                handler=self.delete,
                least="owner",
                answers={204: None, 409: ProblemDetails},
            ),
        ]

    async def issue(self, request: web.Request, principal: Principal) -> web.Response:
        self._own(principal)
        wanted = strict_json(await read_body(request, MAX_BODY), NewRegistration)
        token = "pwt_" + secrets.token_urlsafe(32)
        sha256, expires_at = sha256_of(token), float(int(self._now()) + 60 * wanted.minutes)
        command = IssueRegistration(
            token_id=token_id_of(sha256), sha256=sha256, expires_at=expires_at, tags=tuple(wanted.tags), description=wanted.description
        )
        await self._execute(command, principal.actor)
        until = datetime.fromtimestamp(expires_at, UTC)
        issued = Registration(id=command.token_id, token=token, expires_at=until, tags=wanted.tags, description=wanted.description)
        return answer(issued, status=201)

    async def challenge(self, request: web.Request, _: Principal) -> web.Response:
        self._rate.take(address_of(request))
        nonce = sign_token(self._site.gateway_key, {"register": secrets.token_urlsafe(16)}, CHALLENGE_SECONDS, self._now())
        return answer(Challenge(server=self._site.server_public_key, nonce=nonce))

    async def register(self, request: web.Request, _: Principal) -> web.Response:
        self._rate.take(address_of(request))
        wanted = strict_json(await read_body(request, MAX_BODY), NewWorker)
        sha256 = sha256_of(wanted.token)
        actor = f"registration:{token_id_of(sha256)}"
        use = UseRegistration(token_id=token_id_of(sha256), sha256=sha256, worker=wanted.name, key=wanted.key, now=self._now(), trial=True)
        enrol = RegisterWorker(worker=wanted.name, key=wanted.key, token_id=use.token_id, trial=True)
        try:
            self._check(wanted, REGISTER)
            await self._execute(use, actor)
            await self._execute(enrol, actor)
            if await self._queries.revoked_key(wanted.key) is not None:
                raise decider.key_revoked()
            used = (await self._execute(msgspec.structs.replace(use, trial=False), actor)).state
            assert isinstance(used, decider.Token)
            enrol = msgspec.structs.replace(enrol, tags=used.tags, trial=False)
            await self._execute(enrol, actor)
        except Refused as error:
            taken = error.kind in ("conflict", decider.KEY_REVOKED)
            self._registrations.labels("taken" if taken else "refused").inc()
            if not taken:
                raise _stranger("no good token", wanted) from None
            logger.warning("a worker was not registered", worker=wanted.name, address=address_of(request), why=error.message)
            raise
        except Denied:
            self._registrations.labels("refused").inc()
            raise
        self._registrations.labels("registered").inc()
        logger.info("a worker was registered", worker=wanted.name, address=address_of(request))
        site = self._site
        registered = RegisteredWorker(
            worker=wanted.name,
            server_public_key=site.server_public_key,
            gateway_public_key=site.gateway_public_key,
            nats_url=site.nats_url,
        )
        return answer(registered, status=201)

    async def standing(self, request: web.Request, _: Principal) -> web.Response:
        self._rate.take(address_of(request))
        wanted = strict_json(await read_body(request, MAX_BODY), Myself)
        self._check(wanted, STANDING, wanted.question)

        def signed(standing: str) -> str:
            told = words(wanted.question, wanted.name, wanted.key, standing)
            return signature_text(sign(self._site.gateway_key, BECOME, told).signature)

        if await self._queries.revoked_key(wanted.key) is not None:
            return answer(WorkerStanding(standing="revoked", signature=signed("revoked")))
        row = await self._queries.worker(wanted.name)
        if row is None or row.standing == "deleted" or row.key != wanted.key:
            if not self._begun():  # it may be about to be one
                raise Problem(503, "unavailable", "The workers are not all known yet", "try again")
            raise Problem(404, "worker-unknown", "There is no such worker", signature=signed("unknown"))
        return answer(WorkerStanding(standing="registered", signature=signed("registered")))

    async def drain(self, request: web.Request, principal: Principal) -> web.Response:
        return await self._change(principal, DrainWorker(worker=request.match_info["worker"], reason=await self._reason(request, principal)))

    async def resume(self, request: web.Request, principal: Principal) -> web.Response:
        await self._reason(request, principal)
        return await self._change(principal, ResumeWorker(worker=request.match_info["worker"]))

    async def revoke(self, request: web.Request, principal: Principal) -> web.Response:
        return await self._change(principal, RevokeWorker(worker=request.match_info["worker"], reason=await self._reason(request, principal)))

    async def delete(self, request: web.Request, principal: Principal) -> web.Response:
        self._own(principal)
        name = request.match_info["worker"]
        row = await self._queries.worker(name)
        return await self._change(principal, DeleteWorker(worker=name, lost=row is not None and row.life != "up"))

    async def _change(self, principal: Principal, command: DrainWorker | ResumeWorker | RevokeWorker | DeleteWorker) -> web.Response:
        if not command.worker.isascii() or not command.worker.isprintable() or len(command.worker) > 64:
            raise absent("worker", command.worker)
        try:
            await self._execute(command, principal.actor)
        except Refused as error:
            raise (absent("worker", command.worker) if error.kind == "missing" else error) from None
        return web.Response(status=204)

    async def _reason(self, request: web.Request, principal: Principal) -> str:
        self._own(principal)
        body = await read_body(request, MAX_BODY)
        return strict_json(body, Why).reason if body else ""

    def _own(self, principal: Principal) -> None:
        if principal.team != self._first:
            raise Denied(403, "This token may not do that", "workers are the first team's to decide about", why="another team")

    def _check(self, wanted: NewWorker | Myself, context: str, *more: str) -> None:
        """Whether it has the key that it names, and means this server, this very time and what `more` says. Raises Denied."""
        try:
            read_token(self._site.gateway_public_key, wanted.nonce, self._now(), _Challenge)
        except BadToken:
            raise _stranger("no good challenge", wanted) from None
        try:
            key_bytes(wanted.key)
            said = words(self._site.server_public_key, wanted.nonce, wanted.name, wanted.key, *more)
            verify(wanted.key, context, Signed(said, signature_bytes(wanted.signature)))
        except (BadSignature, ValueError):
            raise _stranger("not signed by its key", wanted) from None

    async def _execute(self, command: FleetCommand, actor: str) -> Outcome:
        cause = Cause(team=self._first, correlation_id=self._ids(), causation_id=actor, actor=actor)
        outcome = await self._fleet.execute(command, cause)
        if outcome.position:
            await self._passed(outcome.position, 1.0)
        return outcome


def _stranger(why: str, wanted: NewWorker | Myself) -> Denied:
    """The same answer whatever the reason is."""
    return Denied(
        401, "The worker cannot be registered" if isinstance(wanted, NewWorker) else "This is not signed", why=why, named={"worker": wanted.name}
    )
