"""Fixtures that tests of several parts share."""

from tests.nats_fixture import fresh_nats, nats_server
from tests.postgres_fixture import database, postgres
from tests.s3_fixture import s3, s3_server

__all__ = ["database", "fresh_nats", "nats_server", "postgres", "s3", "s3_server"]
