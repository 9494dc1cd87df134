-- Uploads that have not come to their end. `id` is new for each: what an upload needs of the store is held by `upload:<id>`, while there is this row
-- or, afterwards, an artifact that came with it. `tree` is '' until it is known. `seal` is the command that makes the artifact (JSON); it will be kept
-- for `lifetime` seconds (0: for ever).
CREATE TABLE IF NOT EXISTS upload (
    id text PRIMARY KEY,
    team text NOT NULL,
    artifact text NOT NULL,
    tree text NOT NULL,
    seal bytea NOT NULL,
    lifetime bigint NOT NULL,
    sealing boolean NOT NULL DEFAULT false,
    seen_at double precision NOT NULL
);
CREATE UNIQUE INDEX IF NOT EXISTS upload_of_tree ON upload (team, artifact) WHERE tree <> '';
