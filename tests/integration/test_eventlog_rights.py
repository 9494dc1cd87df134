"""What each role may do to the log, and what nobody may."""

import time

import asyncpg
import pytest

from libs.eventlog.log import NewEvent, NotOwner
from libs.eventlog.migrate import migrate, raise_epoch, role_of
from libs.eventlog.postgres import open_postgres_log
from proto.catalogue import CATEGORIES, SERVICES
from tests.controls import write
from tests.postgres_fixture import PASSWORDS, Database

CHANGES = (
    "UPDATE eventlog.event SET type = 'forged'",
    "DELETE FROM eventlog.event",
    "TRUNCATE eventlog.event",
)
FORBIDDEN = (
    *CHANGES,
    "INSERT INTO eventlog.event SELECT * FROM eventlog.event",
    "UPDATE eventlog.epoch SET number = 2",
    "UPDATE eventlog.owner SET role = current_user",
    "ALTER TABLE eventlog.event DISABLE TRIGGER ALL",
    "DROP TABLE eventlog.event",
    "CREATE TABLE eventlog.mine ()",
    "SET session_replication_role = replica",
    "CREATE SCHEMA mine",
    "CREATE ROLE mine",
)


@pytest.mark.parametrize("service", SERVICES)
async def test_a_service_cannot_change_what_was_recorded(database: Database, service: str) -> None:
    """FAULTS 75"""
    connection = await asyncpg.connect(database.url(service))
    try:
        for statement in FORBIDDEN:
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.execute(statement)
    finally:
        await connection.close()


@pytest.mark.parametrize("service", SERVICES)
async def test_a_service_appends_to_its_own_categories_only(database: Database, service: str) -> None:
    """FAULTS 75"""
    async with open_postgres_log(database.url(service)) as log:
        for category in CATEGORIES:
            new = write(f"{category.name}-1", NewEvent(f"{category.name}-1", "t", b"{}"))
            if category.owner == service:
                await log.append([new])
            else:
                with pytest.raises(NotOwner):
                    await log.append([new])
        assert {recorded.stream for recorded in await log.read(0, 100)} == {f"{c.name}-1" for c in CATEGORIES if c.owner == service}


@pytest.mark.parametrize("service", SERVICES)
async def test_a_service_reaches_no_other_services_tables(database: Database, service: str) -> None:
    connection = await asyncpg.connect(database.url(service))
    try:
        await connection.fetch("SELECT * FROM checkpoint")
        for other in SERVICES:
            if other != service:
                with pytest.raises(asyncpg.InsufficientPrivilegeError):
                    await connection.execute(f"SELECT * FROM {other}.checkpoint")
                with pytest.raises(asyncpg.InsufficientPrivilegeError):
                    await connection.execute(f"SET ROLE {role_of(other)}")
    finally:
        await connection.close()


@pytest.mark.parametrize("statement", CHANGES)
async def test_even_the_tables_owner_has_to_drop_the_guard_first(database: Database, statement: str) -> None:
    connection = await asyncpg.connect(database.url("postgres"))
    try:
        with pytest.raises(asyncpg.InsufficientPrivilegeError, match="append-only"):
            await connection.execute(statement)
        await connection.execute("SET session_replication_role = replica")
        with pytest.raises(asyncpg.InsufficientPrivilegeError, match="append-only"):
            await connection.execute(statement)
    finally:
        await connection.close()


async def test_a_service_cannot_hide_the_logs_objects_behind_its_own(database: Database) -> None:
    """The append function runs with its owner's rights, so what it calls must not be found on the caller's search path."""
    connection = await asyncpg.connect(database.url("builds"))
    try:
        await connection.execute("CREATE FUNCTION builds.pg_advisory_xact_lock(bigint) RETURNS void LANGUAGE sql AS 'SELECT 1/0'")
        await connection.execute("CREATE TEMP TABLE pg_roles AS SELECT current_user AS rolname, true AS rolsuper")
        await connection.execute("SET search_path = pg_temp, builds, pg_catalog")
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.fetch("SELECT * FROM eventlog.append('{team-1}', '{-1}', '{t}', '{c}', '{c}', '{a}', '{1}', '{e}', '{t}', array['{}'])")
    finally:
        await connection.close()


async def test_migrating_again_changes_nothing_and_a_new_password_replaces_the_old(database: Database) -> None:
    admin = database.url("postgres")
    await migrate(admin, PASSWORDS)
    try:
        await migrate(admin, {**PASSWORDS, "builds": "changed"})
        with pytest.raises(asyncpg.InvalidPasswordError):
            await asyncpg.connect(database.url("builds"))
        await (await asyncpg.connect(database.cluster.dsn(role_of("builds"), "changed", database.name))).close()
    finally:
        await migrate(admin, PASSWORDS)
    await (await asyncpg.connect(database.url("builds"))).close()


async def test_a_missing_password_is_named(database: Database) -> None:
    with pytest.raises(ValueError, match="scheduler"):
        await migrate(database.url("postgres"), {service: "x" for service in SERVICES if service != "scheduler"})


async def test_an_operator_raises_the_epoch_and_everyone_sees_it(database: Database) -> None:
    """FAULTS 73"""
    async with open_postgres_log(database.url("gateway")) as log:
        assert await log.epoch() == 1
        raised = await raise_epoch(database.url("postgres"))
        assert await log.epoch() == raised > time.time() / 60 - 2, "a dump that knows of fewer rises can be raised to none of theirs"
        assert await raise_epoch(database.url("postgres")) > raised
