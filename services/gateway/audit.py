"""Requests that were refused to whoever made them: a line in our log and a count, by a reason that is told to nobody else."""

import structlog
from aiohttp import web
from prometheus_client import CollectorRegistry, Counter

from libs.runtime.addresses import address_of
from libs.runtime.http import Problem
from services.gateway.auth import PRINCIPAL
from services.gateway.refusals import Denied

logger = structlog.get_logger()


class Audit:
    def __init__(self, registry: CollectorRegistry) -> None:
        self._refusals = Counter("penstock_refusals", "Requests that showed no right to what they asked", ["why"], registry=registry)

    def note(self, request: web.Request, problem: Problem) -> None:
        """That `request` was answered 401 or 403."""
        why, named = (problem.why, problem.named) if isinstance(problem, Denied) else (problem.body["title"], {})
        principal = request.get(PRINCIPAL)
        who = {"team": principal.team, "actor": principal.actor} if principal is not None else {}
        self._refusals.labels(why).inc()
        logger.warning(
            "refused", why=why, status=problem.status, method=request.method, path=request.path, address=address_of(request), **who, **named
        )
