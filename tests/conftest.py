"""Fixtures that tests of several parts share."""

import os
import tempfile
from collections.abc import Iterator

import pytest

from tests.engine_fixture import dockerd, dockerd_of_our_own, engines
from tests.nats_fixture import fresh_nats, nats_server
from tests.postgres_fixture import database, postgres
from tests.s3_fixture import s3, s3_server

__all__ = ["database", "dockerd", "dockerd_of_our_own", "engines", "fresh_nats", "nats_server", "postgres", "s3", "s3_server"]


@pytest.fixture(scope="session", autouse=True)
def cache_of_our_own() -> Iterator[None]:
    """What the client remembers of folders goes neither into the home of whoever runs the tests nor from one run to the next."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "XDG_CACHE_HOME", folder)
        yield
