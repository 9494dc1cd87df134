CREATE TABLE timers (
    key text PRIMARY KEY,
    due_at timestamptz NOT NULL,
    payload json NOT NULL,
    position bigint NOT NULL
);

CREATE INDEX timers_by_due_at ON timers (due_at);
