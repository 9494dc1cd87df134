-- What every service has in its own schema, beside its read models. Run as the service's role; safe to run again.

CREATE TABLE IF NOT EXISTS leadership (
    name   text        NOT NULL PRIMARY KEY,
    holder text        NOT NULL,
    term   bigint      NOT NULL,
    until  timestamptz NOT NULL
);

CREATE TABLE IF NOT EXISTS checkpoint (
    name         text   NOT NULL PRIMARY KEY,
    code_version text   NOT NULL,
    generation   bigint NOT NULL,
    position     bigint NOT NULL
);

CREATE TABLE IF NOT EXISTS relay_checkpoint (
    name           text   NOT NULL PRIMARY KEY,
    stream_created text   NOT NULL,
    sequence       bigint NOT NULL,
    position       bigint NOT NULL,
    term           bigint NOT NULL,
    left_out       bigint[] NOT NULL DEFAULT '{}' -- pairs: a position, and the sequence as which it was taken late, or 0
);

CREATE TABLE IF NOT EXISTS snapshot (
    name         text   NOT NULL PRIMARY KEY,
    code_version text   NOT NULL,
    position     bigint NOT NULL,
    data         bytea  NOT NULL
);
