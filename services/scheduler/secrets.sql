-- Values of secrets, encrypted under the master key `key_id` and bound to team, name and entry. Of a team's secret `entry` is new for each version, and
-- the log says which one counts; of what is kept for one build it is the name, and `build` the build's id ('' otherwise).
CREATE TABLE IF NOT EXISTS secret (
    entry text PRIMARY KEY,
    team text NOT NULL,
    name text NOT NULL,
    build text NOT NULL,
    key_id text NOT NULL,
    ciphertext bytea NOT NULL,
    stored_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX IF NOT EXISTS secret_of_build ON secret (build) WHERE build <> '';
CREATE INDEX IF NOT EXISTS secret_by_key ON secret (key_id, entry);
