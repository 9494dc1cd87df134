"""Bring a database up to date: the log's schema, a role and a schema for each service, who owns what.

One query when nothing is to be done; alembic, which is slow to import, is loaded only when the schema version is stale.
"""

import base64
import hashlib
import hmac
import secrets
from collections.abc import Mapping
from io import StringIO
from pathlib import Path

import asyncpg
import msgspec

from proto.catalogue import OWNERS, SERVICES

_MIGRATIONS = Path(__file__).parent / "migrations"
_LOCK = 0x70656E7374
_ROLE_SETTINGS = {
    "statement_timeout": "30s",
    "lock_timeout": "12s",
    "idle_in_transaction_session_timeout": "10s",
    # Read models grow from nothing: a plan that a session made for an empty table must not scan a full one.
    "enable_seqscan": "off",
    # All queries are of the kind that one plan is right for, and planning them anew costs more than running them.
    "plan_cache_mode": "force_generic_plan",
}
_STATE = """
SELECT (SELECT version_num FROM eventlog.schema_version) AS version,
       (SELECT json_object_agg(category, role) FROM eventlog.owner)::text AS owners,
       (SELECT json_object_agg(rolname, coalesce(rolpassword, '')) FROM pg_authid WHERE rolname LIKE 'penstock\\_%')::text AS verifiers,
       (SELECT json_agg(nspname) FROM pg_namespace)::text AS schemas
"""

_RAISE = "UPDATE eventlog.epoch SET number = greatest(number + 1, extract(epoch FROM clock_timestamp())::bigint) RETURNING number"


def role_of(service: str) -> str:
    """The database role of a service."""
    return f"penstock_{service}"


async def migrate(admin_dsn: str, passwords: Mapping[str, str]) -> None:
    """Idempotent, and safe to run from several places at once. `passwords` has one for each service of the catalogue.

    The admin must be a superuser. Passwords reach the server as SCRAM verifiers only."""
    if missing := [service for service in SERVICES if service not in passwords]:
        raise ValueError(f"no password for {', '.join(missing)}")
    connection = await asyncpg.connect(admin_dsn, timeout=10, command_timeout=60)
    try:
        if await _up_to_date(connection, passwords):
            return
        async with connection.transaction():
            await connection.execute("SELECT pg_advisory_xact_lock($1)", _LOCK)
            await _upgrade(connection)
            await _admit(connection, passwords)
    finally:
        await connection.close()


async def raise_epoch(admin_dsn: str) -> int:
    """After a restore, or a failover that lost a tail: positions may now name other events, so everyone who follows starts over. The new epoch, a
    number that no log which was put back had: what is restored does not know how often it was raised since."""
    connection = await asyncpg.connect(admin_dsn, timeout=10, command_timeout=60)
    try:
        epoch: int = await connection.fetchval(_RAISE)
        return epoch
    finally:
        await connection.close()


async def _up_to_date(connection: asyncpg.Connection, passwords: Mapping[str, str]) -> bool:
    try:
        state = await connection.fetchrow(_STATE)
    except (asyncpg.InvalidSchemaNameError, asyncpg.UndefinedTableError):
        return False
    assert state is not None
    owners = msgspec.json.decode(state["owners"] or "{}", type=dict[str, str])
    verifiers = msgspec.json.decode(state["verifiers"] or "{}", type=dict[str, str])
    schemas = msgspec.json.decode(state["schemas"], type=list[str])
    return (
        state["version"] == _newest()
        and owners == {category: role_of(service) for category, service in OWNERS.items()}
        and all(service in schemas and _verifies(verifiers.get(role_of(service), ""), passwords[service]) for service in SERVICES)
    )


def _newest() -> str:
    return max(path.stem for path in _MIGRATIONS.glob("[0-9]*.sql"))


async def _upgrade(connection: asyncpg.Connection) -> None:
    await connection.execute("CREATE SCHEMA IF NOT EXISTS eventlog")
    version: str | None = None
    if await connection.fetchval("SELECT to_regclass('eventlog.schema_version') IS NOT NULL"):
        version = await connection.fetchval("SELECT version_num FROM eventlog.schema_version")
    if version != _newest():
        await connection.execute(_script(version))


def _script(version: str | None) -> str:
    """The SQL from a version to the newest, as alembic writes it for use without a driver."""
    from alembic.config import Config
    from alembic.runtime.environment import EnvironmentContext
    from alembic.script import ScriptDirectory

    directory = ScriptDirectory(str(_MIGRATIONS), version_locations=[str(_MIGRATIONS)])
    output = StringIO()
    context = EnvironmentContext(
        Config(),
        directory,
        fn=lambda revision, _: directory._upgrade_revs("head", revision),
        as_sql=True,
        starting_rev=version or "base",
        destination_rev="head",
    )
    with context:
        context.configure(
            dialect_name="postgresql",
            dialect_opts={"paramstyle": "named"},
            output_buffer=output,
            version_table="schema_version",
            version_table_schema="eventlog",
        )
        context.run_migrations()
    return output.getvalue()


async def _admit(connection: asyncpg.Connection, passwords: Mapping[str, str]) -> None:
    """A role, a schema and rights for each service; ownership as in the catalogue."""
    roles = {service: role_of(service) for service in SERVICES}
    database = await connection.fetchval("SELECT quote_ident(current_database())")
    known = {row["rolname"]: row["rolpassword"] or "" for row in await connection.fetch("SELECT rolname, rolpassword FROM pg_authid")}
    tables = (_MIGRATIONS / "service.sql").read_text(encoding="utf-8")
    for service, role in roles.items():
        if role not in known:
            await connection.execute(f"CREATE ROLE {role} LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION")
        if not _verifies(known.get(role, ""), passwords[service]):
            await connection.execute(f"ALTER ROLE {role} PASSWORD '{_verifier(passwords[service])}'")
        for name, value in {**_ROLE_SETTINGS, "search_path": service}.items():
            await connection.execute(f"ALTER ROLE {role} SET {name} = '{value}'")
        await connection.execute(
            f"CREATE SCHEMA IF NOT EXISTS {service} AUTHORIZATION {role};"
            f"SET LOCAL ROLE {role}; SET LOCAL search_path = {service}; {tables}; RESET ROLE; SET LOCAL search_path = DEFAULT;"
        )
    everyone = ", ".join(roles.values())
    await connection.execute(
        f"REVOKE ALL ON DATABASE {database} FROM PUBLIC; GRANT CONNECT ON DATABASE {database} TO {everyone};"
        f"GRANT USAGE ON SCHEMA eventlog TO {everyone}; GRANT SELECT ON eventlog.event, eventlog.epoch TO {everyone};"
        f"GRANT EXECUTE ON FUNCTION eventlog.append TO {everyone}"
    )
    await connection.execute("DELETE FROM eventlog.owner")
    await connection.executemany(
        "INSERT INTO eventlog.owner (category, role) VALUES ($1, $2)", [(category, roles[service]) for category, service in OWNERS.items()]
    )


def _verifier(password: str) -> str:
    """What Postgres keeps of a password (RFC 5803)."""
    return _scram(password, secrets.token_bytes(16), 4096)


def _verifies(verifier: str, password: str) -> bool:
    scheme, _, rest = verifier.partition("$")
    rounds, _, salt = rest.partition("$")[0].partition(":")
    if scheme != "SCRAM-SHA-256" or not rounds.isdigit():
        return False
    return hmac.compare_digest(verifier, _scram(password, base64.b64decode(salt), int(rounds)))


def _scram(password: str, salt: bytes, rounds: int) -> str:
    salted = hashlib.pbkdf2_hmac("sha256", password.encode("ascii"), salt, rounds)
    stored = hashlib.sha256(hmac.digest(salted, b"Client Key", "sha256")).digest()
    server = hmac.digest(salted, b"Server Key", "sha256")
    salt64, stored64, server64 = (base64.b64encode(part).decode() for part in (salt, stored, server))
    return f"SCRAM-SHA-256${rounds}:{salt64}${stored64}:{server64}"
