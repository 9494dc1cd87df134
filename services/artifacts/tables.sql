-- Which attempts are over, so that their build tokens are dead: `build/stage` with the highest attempt that is over, and `build` when all are.

CREATE TABLE over (
    key text PRIMARY KEY,
    attempt bigint NOT NULL
);
