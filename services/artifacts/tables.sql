-- Which attempts are over, so that their build tokens are dead: `build/stage` with the highest attempt that is over, and `build` when all are.
CREATE TABLE over (
    key text PRIMARY KEY,
    attempt bigint NOT NULL
);

-- Artifacts without a tombstone.
CREATE TABLE artifact (
    id text PRIMARY KEY,
    team text NOT NULL,
    digest text NOT NULL,
    size bigint NOT NULL,
    files bigint NOT NULL,
    upload text NOT NULL,
    due_at bigint NOT NULL
);
CREATE INDEX ON artifact (upload);
CREATE INDEX ON artifact (team, digest);
CREATE INDEX ON artifact (due_at) WHERE due_at > 0;

-- Builds that have not finished, with what they may read.
CREATE TABLE build_use (
    build text PRIMARY KEY,
    uploads jsonb NOT NULL,
    keep_seconds bigint NOT NULL
);
CREATE INDEX ON build_use USING gin (uploads);

-- What teams have set; the rest have the defaults.
CREATE TABLE policy (
    team text PRIMARY KEY,
    input_seconds bigint NOT NULL,
    output_seconds bigint NOT NULL,
    quota_bytes bigint NOT NULL
);

-- Logs of attempts that have ended, of which there is no archive (0), or one that may lack chunks.
CREATE TABLE unarchived (
    stream text PRIMARY KEY,
    team text NOT NULL,
    build text NOT NULL,
    stage text NOT NULL,
    attempt bigint NOT NULL,
    worker text NOT NULL,
    chunks bigint NOT NULL,
    lines bigint NOT NULL,
    bytes bigint NOT NULL,
    correlation_id text NOT NULL,
    event_id text NOT NULL,
    archive bigint NOT NULL,
    since bigint NOT NULL
);
CREATE INDEX ON unarchived (since);
