-- The log: one table, and the one function that may append to it.

CREATE TABLE eventlog.event (
    position       bigint      NOT NULL PRIMARY KEY,
    stream         text        COLLATE "C" NOT NULL,
    version        integer     NOT NULL,
    event_id       text        COLLATE "C" NOT NULL UNIQUE,
    type           text        COLLATE "C" NOT NULL,
    data           json        NOT NULL,
    team           text        COLLATE "C" NOT NULL,
    correlation_id text        COLLATE "C" NOT NULL,
    causation_id   text        COLLATE "C" NOT NULL,
    actor          text        COLLATE "C" NOT NULL,
    recorded_at    timestamptz NOT NULL,
    UNIQUE (stream, version)
);

-- Which role may append to which category; filled from the catalogue.
CREATE TABLE eventlog.owner (
    category text COLLATE "C" NOT NULL PRIMARY KEY,
    role     name NOT NULL
);

-- Raised by an operator whenever the log has lost a tail.
CREATE TABLE eventlog.epoch (
    one    boolean NOT NULL PRIMARY KEY DEFAULT true CHECK (one),
    number bigint NOT NULL
);
INSERT INTO eventlog.epoch (number) VALUES (1);

-- Even the table's owner has to drop this deliberately before changing what was recorded.
CREATE FUNCTION eventlog.refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'the log is append-only: % refused', tg_op USING ERRCODE = 'insufficient_privilege';
END $$;

CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON eventlog.event
    FOR EACH STATEMENT EXECUTE FUNCTION eventlog.refuse_change();
ALTER TABLE eventlog.event ENABLE ALWAYS TRIGGER append_only;

-- Arrays in, one row a write out. The first six arrays have one element a write; the others one an event, `write_of` giving its write (from 1).
-- A write is recorded if its stream is at `expected` (-1: anywhere); one whose event ids are all there already is answered as it was then.
-- Positions come from under the lock, which is held until the commit: commit order is position order, and no reader skips a late commit.
-- Index lookups are forced: a plan made while the table was small must not live on in a session.
CREATE FUNCTION eventlog.append(
    streams text[], expected integer[], teams text[], correlations text[], causations text[], actors text[],
    write_of integer[], event_ids text[], types text[], datas text[]
) RETURNS TABLE (recorded boolean, version integer, "position" bigint, recorded_at timestamptz)
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off
SET plan_cache_mode = force_generic_plan
AS $$
#variable_conflict use_column
DECLARE
    head   bigint;
    moment timestamptz;
    alien  text;
    actual integer;
    added  integer;
BEGIN
    SELECT s.stream INTO alien FROM unnest(streams) AS s (stream)
    WHERE NOT EXISTS (SELECT FROM eventlog.owner o WHERE o.category = split_part(s.stream, '-', 1) AND o.role = session_user)
    LIMIT 1;
    IF FOUND AND NOT (SELECT r.rolsuper FROM pg_roles r WHERE r.rolname = session_user) THEN
        RAISE EXCEPTION '% does not own %', session_user, alien USING ERRCODE = 'insufficient_privilege';
    END IF;

    PERFORM pg_advisory_xact_lock(x'70656e73746f636b'::bigint);

    SELECT e.position INTO head FROM eventlog.event e ORDER BY e.position DESC LIMIT 1;
    head := coalesce(head, 0);
    moment := clock_timestamp();

    -- The short way for the usual call: one write, and nothing in its way.
    IF cardinality(streams) = 1 THEN
        SELECT e.version INTO actual FROM eventlog.event e WHERE e.stream = streams[1] ORDER BY e.version DESC LIMIT 1;
        actual := coalesce(actual, 0);
        IF expected[1] IN (-1, actual) AND NOT EXISTS (SELECT FROM eventlog.event e WHERE e.event_id = ANY (event_ids)) THEN
            INSERT INTO eventlog.event (position, stream, version, event_id, type, data, team, correlation_id, causation_id, actor, recorded_at)
            SELECT head + g.m, streams[1], actual + g.m, g.event_id, g.type, g.data::json, teams[1], correlations[1], causations[1], actors[1], moment
            FROM unnest(event_ids, types, datas) WITH ORDINALITY AS g (event_id, type, data, m);
            PERFORM pg_notify('eventlog', split_part(streams[1], '-', 1));
            added := cardinality(event_ids);
            RETURN QUERY SELECT true, actual + added, head + added, moment;
            RETURN;
        END IF;
    END IF;

    RETURN QUERY
    WITH write AS MATERIALIZED (
        SELECT w.*, coalesce(last.version, 0) AS actual
        FROM unnest(streams, expected, teams, correlations, causations, actors) WITH ORDINALITY
            AS w (stream, expected, team, correlation_id, causation_id, actor, n)
        LEFT JOIN LATERAL (SELECT e.version FROM eventlog.event e WHERE e.stream = w.stream ORDER BY e.version DESC LIMIT 1) last ON true
    ), given AS MATERIALIZED (
        SELECT g.*, seen.version AS seen_version, seen.position AS seen_position, seen.recorded_at AS seen_at
        FROM unnest(write_of, event_ids, types, datas) WITH ORDINALITY AS g (n, event_id, type, data, m)
        LEFT JOIN LATERAL (
            SELECT e.version, e.position, e.recorded_at FROM eventlog.event e
            WHERE e.event_id = g.event_id AND e.stream = streams[g.n] LIMIT 1
        ) seen ON true
    ), known AS MATERIALIZED (
        SELECT g.n, count(*) = count(g.seen_version) AS repeated, count(g.seen_version) = 0 AS fresh,
            max(g.seen_version) AS version, max(g.seen_position) AS position, max(g.seen_at) AS recorded_at
        FROM given g GROUP BY g.n
    ), placed AS MATERIALIZED (
        SELECT head + row_number() OVER (ORDER BY g.m) AS position, (w.actual + row_number() OVER (PARTITION BY g.n ORDER BY g.m))::integer AS version,
            g.n, g.event_id, g.type, g.data, w.stream, w.team, w.correlation_id, w.causation_id, w.actor
        FROM given g JOIN write w USING (n) JOIN known k USING (n)
        WHERE k.fresh AND w.expected IN (-1, w.actual)
    ), appended AS (
        INSERT INTO eventlog.event (position, stream, version, event_id, type, data, team, correlation_id, causation_id, actor, recorded_at)
        SELECT p.position, p.stream, p.version, p.event_id, p.type, p.data::json, p.team, p.correlation_id, p.causation_id, p.actor, moment
        FROM placed p
    )
    SELECT k.repeated OR p.n IS NOT NULL,
        CASE WHEN p.n IS NOT NULL THEN p.version WHEN k.repeated THEN k.version ELSE w.actual END,
        CASE WHEN p.n IS NOT NULL THEN p.position ELSE k.position END,
        CASE WHEN p.n IS NOT NULL THEN moment ELSE k.recorded_at END
    FROM write w JOIN known k USING (n)
    LEFT JOIN (SELECT n, max(version) AS version, max(position) AS position FROM placed GROUP BY n) p USING (n)
    ORDER BY n;

    IF EXISTS (SELECT FROM eventlog.event e WHERE e.position > head) THEN
        PERFORM pg_notify('eventlog', (SELECT string_agg(DISTINCT split_part(s.stream, '-', 1), ',') FROM unnest(streams) AS s (stream)));
    END IF;
END $$;

REVOKE ALL ON FUNCTION eventlog.append FROM PUBLIC;
REVOKE ALL ON FUNCTION eventlog.refuse_change FROM PUBLIC;
