-- Where blobs lie, by team and digest. Not a projection: when it is lost it is made again from the packs' own indexes.

CREATE TABLE IF NOT EXISTS blob (
    team   text   NOT NULL,
    digest bytea  NOT NULL,
    size   bigint NOT NULL,
    pack   text   NOT NULL,
    start  bigint NOT NULL,
    PRIMARY KEY (team, digest)
);

CREATE INDEX IF NOT EXISTS blob_by_pack ON blob (team, pack);

-- Instances that may be writing packs. A pack in no row of `blob` is garbage once its writer is gone from here.

CREATE TABLE IF NOT EXISTS blob_writer (
    writer  text        NOT NULL PRIMARY KEY,
    seen_at timestamptz NOT NULL
);
