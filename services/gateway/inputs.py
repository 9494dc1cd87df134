"""A build's inputs, found by what names them: each must be there when the build is asked for."""

import uuid
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode

import msgspec

from libs.runtime.http import Problem, unavailable
from proto.api.builds import ENDED
from proto.events.base import ArtifactRef
from services.gateway.artifacts import ArtifactsClient, Whose
from services.gateway.auth import Principal
from services.gateway.projection import ArtifactRow, BuildRow
from services.gateway.queries import Queries
from services.gateway.references import OfArtifact, OfBuild, Wanted, wanted
from services.gateway.refusals import GONE, invalid

_PARTS = uuid.UUID("5c0a1d1e-7d0f-4a55-9a3b-2f6e8f0c7b11")
_decode = msgspec.json.Decoder(ArtifactRef).decode


class Part(msgspec.Struct, frozen=True):
    """What lies at `path` in an artifact, which becomes the artifact `id`; `place` is where the request names it."""

    id: str
    place: str
    row: ArtifactRow
    path: str


class Inputs:
    """Finds them."""

    def __init__(self, queries: Queries, artifacts: ArtifactsClient) -> None:
        self._queries = queries
        self._artifacts = artifacts

    async def find(self, wanted_by: Mapping[str, str], request: str, principal: Principal) -> dict[str, ArtifactRef | Part]:
        """The trees that the references name, by input; nothing is made yet. A part's id is the same however often the `request` (which must tell one
        body from another) asks for it. Raises Problem 422 naming the input, 503."""
        found = {name: await self._find(f"inputs.{name}", reference, request, principal) for name, reference in wanted_by.items()}
        for part in found.values():
            if isinstance(part, Part):
                await self._look(part, principal)
        return found

    async def _find(self, place: str, reference: str, request: str, principal: Principal) -> ArtifactRef | Part:
        try:
            meant = wanted(reference)
        except ValueError as error:
            raise invalid(place, str(error)) from None
        row = await self._artifact(place, meant, principal)
        if row.gone:
            raise invalid(place, _gone(row, row.gone))
        if not meant.path:
            return ArtifactRef(id=row.id, digest=row.digest, size=row.size, files=row.files)
        return Part(str(uuid.uuid5(_PARTS, "\0".join((principal.team, request, row.id, meant.path)))), place, row, meant.path)

    async def _look(self, part: Part, principal: Principal) -> None:
        """Whether it has something at the path."""
        query = urlencode({"path": part.path, "limit": 1})
        async with self._artifacts.ask("see", Whose(principal.team, part.row.id, principal.actor), "GET", "/tree", query=query) as answer:
            body = await answer.read()
        if answer.status != 200:
            raise _refused(part, answer.status, body)

    async def _artifact(self, place: str, meant: Wanted, principal: Principal) -> ArtifactRow:
        match meant:
            case OfArtifact():
                artifact = meant.artifact
            case OfBuild():
                artifact = await self._output(place, meant, principal)
        row = await self._queries.artifact(artifact)
        if row is None or row.team != principal.team:
            raise invalid(place, f"there is no artifact `{artifact}`")
        return row

    async def _output(self, place: str, meant: OfBuild, principal: Principal) -> str:
        build = await self._queries.build_of_team(principal.team, meant.build)
        if build is None:
            raise invalid(place, f"there is no build `{meant.build}`")
        if meant.output not in build.outputs:
            raise invalid(place, _no_output(build, meant.output))
        return build.outputs[meant.output].id

    async def make(self, part: Part, principal: Principal) -> ArtifactRef:
        """The part as an artifact of its own; the one that is there when it was made before. Raises Problem 422 naming the input, 429, 503, 507."""
        query = urlencode({"from": part.row.id, "path": part.path, "name": part.path.rpartition("/")[2][:200], "kind": "part"})
        async with self._artifacts.ask("put", Whose(principal.team, part.id, principal.actor), "POST", query=query) as answer:
            body = await answer.read()
        if answer.status != 201:
            raise _refused(part, answer.status, body)
        return _decode(body)


def _refused(part: Part, status: int, body: bytes) -> Problem:
    """What the artifacts service has against it, in terms of the request."""
    match status:
        case 404:
            return invalid(part.place, f"there is no `{part.path}` in artifact `{part.row.id}`")
        case 410:
            return invalid(part.place, _gone(part.row, "expired"))
        case 413 | 422:
            return invalid(part.place, _detail(body) or f"`{part.path}` cannot be an input")
        case 429 | 507:
            return Problem(status, "refused", "The input cannot be made now", f"{part.place}: {_detail(body)}", headers={"Retry-After": "1"})
    return unavailable(f"the artifacts service answered {status}")


def _gone(row: ArtifactRow, why: str) -> str:
    """Says what to do about it."""
    what = f"artifact `{row.id}`" + (f" (`{row.name}`)" if row.name else "")
    if row.kind == "output":
        return f"{what} {GONE[why]}: run build {row.build_number} again, and keep what it makes longer (`keep`, or pin it)"
    return f"{what} {GONE[why]}: upload it again (POST /api/v1/teams/{row.team}/user-artifacts), and keep it longer (`keep=`, or pin it)"


def _no_output(build: BuildRow, output: str) -> str:
    made = f"it has made {', '.join(f'`{name}`' for name in build.outputs)}" if build.outputs else "it has made none"
    return f"build {build.number} has no output `{output}`" + (f"; {made}" if build.status in ENDED else f" yet: it is {build.status}, and {made}")


def _detail(body: bytes) -> str:
    try:
        found: dict[str, Any] = msgspec.json.decode(body, type=dict)
    except msgspec.DecodeError:
        return ""
    return str(found.get("detail", ""))
