CREATE TABLE teams (
    name text PRIMARY KEY,
    builds bigint NOT NULL,
    created_at timestamptz NOT NULL,
    input_seconds bigint NOT NULL,
    output_seconds bigint NOT NULL,
    quota_bytes bigint NOT NULL,
    privileged boolean NOT NULL
);

CREATE TABLE tokens (
    sha256 text PRIMARY KEY,
    token_id text NOT NULL,
    team text NOT NULL,
    role text NOT NULL,
    description text NOT NULL
);

CREATE TABLE builds (
    id text PRIMARY KEY,
    team text NOT NULL,
    number bigint NOT NULL,
    name text NOT NULL,
    status text NOT NULL,
    percent integer NOT NULL,
    error text NOT NULL,
    reason text NOT NULL,
    exit_code integer,
    created_at timestamptz NOT NULL,
    started_at timestamptz,
    finished_at timestamptz,
    requested_by text NOT NULL,
    inputs jsonb NOT NULL,
    outputs jsonb NOT NULL,
    stages jsonb NOT NULL,
    logs jsonb NOT NULL,
    positions jsonb NOT NULL,
    position bigint NOT NULL,
    UNIQUE (team, number)
);

CREATE INDEX builds_by_status ON builds (team, status, number DESC);

CREATE TABLE artifacts (
    id text PRIMARY KEY,
    team text NOT NULL,
    kind text NOT NULL,
    name text NOT NULL,
    digest text NOT NULL,
    size bigint NOT NULL,
    files bigint NOT NULL,
    build text NOT NULL,
    build_number bigint NOT NULL,
    created_at timestamptz NOT NULL,
    expires_at bigint NOT NULL,
    pinned boolean NOT NULL,
    gone text NOT NULL,
    position bigint NOT NULL
);

CREATE INDEX artifacts_by_age ON artifacts (team, position DESC) WHERE gone = '';
CREATE INDEX artifacts_by_name ON artifacts (team, name, position DESC) WHERE gone = '';
CREATE INDEX artifacts_by_build ON artifacts (build, position DESC) WHERE gone = '' AND build <> '';

CREATE TABLE workers (
    name text PRIMARY KEY,
    key text NOT NULL,
    tags jsonb NOT NULL,
    standing text NOT NULL,
    reason text NOT NULL,
    life text NOT NULL,
    lost text NOT NULL,
    boot text NOT NULL,
    since bigint NOT NULL,
    slots bigint NOT NULL,
    offers jsonb NOT NULL,
    about jsonb NOT NULL,
    registered_at timestamptz,
    changed_at timestamptz NOT NULL,
    build_started_at timestamptz,
    build_finished_at timestamptz
);

CREATE TABLE revoked_keys (
    key text PRIMARY KEY,
    worker text NOT NULL
);

CREATE TABLE leases (
    key text PRIMARY KEY,
    build text NOT NULL,
    number bigint NOT NULL,
    team text NOT NULL,
    stage text NOT NULL,
    attempt bigint NOT NULL,
    worker text NOT NULL,
    since timestamptz NOT NULL
);

CREATE INDEX leases_by_worker ON leases (worker);

CREATE TABLE secrets (
    id text PRIMARY KEY,
    team text NOT NULL,
    name text NOT NULL,
    version bigint NOT NULL,
    set_at timestamptz NOT NULL,
    set_by text NOT NULL
);

CREATE INDEX secrets_by_name ON secrets (team, name);

CREATE TABLE sealing_keys (
    id text PRIMARY KEY,
    version bigint NOT NULL,
    entry text NOT NULL,
    key text NOT NULL
);
