"""The API is what its description says: whatever is sent, the answer's status, media type and body are among those described."""

import asyncio
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import CHECKS

from libs.tokens import new_seed
from tests.gateway_fixture import TOKEN, Gateway, running_gateway
from tests.secrets_fixture import keeping_secrets

DESCRIBED = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
)
ENDLESS = ("/api/v1/events", "/api/v1/teams/{team}/builds/{build}/events")
BYTES = ("application/x-tar", "application/gzip", "application/zstd", "application/vnd.penstock.tree", "application/vnd.penstock.blobs")


@schemathesis.serializer(*BYTES)
def as_bytes(_: Any, value: Any) -> bytes:
    return value if isinstance(value, bytes) else repr(value).encode()


@pytest.mark.parametrize("role", ["owner", "viewer"])
async def test_the_api_is_what_its_description_says(database, nats_server, role: str) -> None:
    keys = f"k1:{new_seed()}"
    async with keeping_secrets(database, nats_server.url, keys), running_gateway(database, nats_server.url) as gateway:
        token = TOKEN if role == "owner" else await gateway.token("main", role)
        described = await gateway.json("GET", "/openapi.json", 200)
        await gateway.submit()
        for path, operations in described["paths"].items():
            for method in operations:
                if path not in ENDLESS:
                    artifact = (await gateway.json("POST", "/teams/main/user-artifacts", 201, data=b"x"))["id"]
                    names = {"team": "main", "build": "1", "artifact": artifact, "secret": "s", "worker": "w1"}
                    await asyncio.to_thread(_ask, gateway, described, path, method, names, token)


async def test_what_may_keep_bytes_from_coming_and_going_is_described(database, nats_server) -> None:
    async with running_gateway(database, nats_server.url) as gateway:
        paths = (await gateway.json("GET", "/openapi.json", 200))["paths"]
    artifacts = "/api/v1/teams/{team}/user-artifacts"
    one = artifacts + "/{artifact}"
    for path, method in ((artifacts, "post"), (one + "/blobs", "put"), (one + "/blobs", "post"), (one, "get"), (one, "head"), (one + "/tree", "get")):
        described = paths[path][method]["responses"].keys()
        assert {"410", "429", "500", "503"} <= described
        assert ("507" in described) == (method == "put" or path == artifacts)
    assert {"429", "507"} <= paths["/api/v1/teams/{team}/builds"]["post"]["responses"].keys()


def _ask(gateway: Gateway, described: Any, path: str, method: str, names: dict[str, str], token: str) -> None:
    operation = schemathesis.openapi.from_dict(described)[path][method]
    assert set(DESCRIBED) <= {check.__name__ for check in CHECKS.get_all()}
    excluded = [check for check in CHECKS.get_all() if check.__name__ not in DESCRIBED]

    @settings(max_examples=6, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
    @given(case=operation.as_strategy())
    def ask(case: Any) -> None:
        case.path_parameters = {name: names[name] for name in case.path_parameters or {}}
        if case.headers:
            case.headers.pop("Prefer", None)  # it may ask to wait for minutes
        answer = case.call(base_url=gateway.url, headers={"Authorization": f"Bearer {token}"}, timeout=20)
        case.validate_response(answer, excluded_checks=excluded)

    ask()
