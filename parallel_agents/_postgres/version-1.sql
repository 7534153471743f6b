-- Version 1. Whatever belongs together is one function or procedure, called as one statement: the server ends it by
-- itself, so that a client that stands still in the middle holds up nobody. Each statement in it sees what was committed
-- before (READ COMMITTED), and these rules keep it together:
--
-- - A ticket is entered under advisory locks on the resources that it touches, taken in order of their keys: of two that
--   are in each other's way, the one with the smaller number was there first, and the other sees it.
-- - A ticket that has to wait watches one that is before it, as in ClaimQueue. It locks that row FOR KEY SHARE, so that
--   whoever deletes it comes later, and sees who waits.
-- - Tickets are deleted in one transaction and those behind them looked at in the next: who looks may wait for those who
--   delete, and not the other way round. What a crash leaves between the two is found by tend().
-- - A session that has expired is locked before it is deleted: a renewal or a commit is before that, or fails.
-- - Who is let in at a limit is decided under a lock on its row. Locks are taken on sessions first, then on limits in
--   order of their names, then on places.

CREATE TABLE meta (version integer NOT NULL, database text NOT NULL DEFAULT gen_random_uuid()::text);
INSERT INTO meta (version) VALUES (0);

CREATE TABLE sessions (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    worker text NOT NULL,
    channel text NOT NULL,
    expires timestamptz NOT NULL
);

CREATE SEQUENCE numbers;
CREATE SEQUENCE tokens;
CREATE TABLE tickets (
    number bigint PRIMARY KEY,
    name text NOT NULL UNIQUE,
    session bigint NOT NULL REFERENCES sessions (id),
    holder text NOT NULL,
    token bigint,
    waits_for bigint,
    since timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX tickets_by_session ON tickets (session);
CREATE INDEX tickets_by_holder ON tickets USING hash (holder);
CREATE INDEX tickets_that_wait ON tickets (waits_for) WHERE waits_for IS NOT NULL;

CREATE TABLE notes (
    ticket bigint NOT NULL REFERENCES tickets (number) ON DELETE CASCADE,
    claim integer NOT NULL,
    resource text NOT NULL,
    key bigint NOT NULL,
    how smallint NOT NULL
);
CREATE INDEX notes_by_ticket ON notes (ticket);
CREATE INDEX notes_by_key ON notes (key, how, ticket);

CREATE TABLE executions (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name text NOT NULL,
    group_id text NOT NULL,
    started timestamptz NOT NULL DEFAULT clock_timestamp(),
    finished timestamptz
);
CREATE UNIQUE INDEX executions_by_name ON executions (md5(name));

CREATE TABLE attempts (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name text NOT NULL UNIQUE,
    execution bigint NOT NULL REFERENCES executions (id),
    step bigint NOT NULL,
    group_id text NOT NULL,
    task_id text NOT NULL,
    agent_id text NOT NULL,
    fingerprint text NOT NULL,
    session bigint,
    ticket bigint,
    started timestamptz NOT NULL DEFAULT clock_timestamp(),
    ended timestamptz,
    status text NOT NULL DEFAULT 'started',
    content text,
    input_tokens bigint NOT NULL DEFAULT 0,
    output_tokens bigint NOT NULL DEFAULT 0,
    requests bigint NOT NULL DEFAULT 0,
    cost double precision NOT NULL DEFAULT 0
);
CREATE INDEX attempts_by_step ON attempts (execution, step);

-- What drivers share: how many agents run at once, and what they may spend. The numbers come with each who asks.
CREATE TABLE limits (
    name text PRIMARY KEY,
    cost numeric NOT NULL DEFAULT 0,
    tokens bigint NOT NULL DEFAULT 0
);

-- An agent at a limit: waits (no answer), runs (granted), or is told that the budget is spent (refused). One that was
-- granted and has no session any more has spent nobody knows what: what was reserved for it, at least, for ever.
CREATE TABLE places (
    number bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name text NOT NULL UNIQUE,
    at_limit text NOT NULL REFERENCES limits (name),
    session bigint REFERENCES sessions (id) ON DELETE SET NULL,
    answer text,
    max_concurrency bigint,
    max_cost numeric,
    max_tokens bigint,
    reserved_cost numeric NOT NULL,
    reserved_tokens bigint NOT NULL,
    spent_cost numeric NOT NULL DEFAULT 0,
    spent_tokens bigint NOT NULL DEFAULT 0
);
CREATE INDEX places_by_limit ON places (at_limit, answer, number);
CREATE INDEX places_by_session ON places (session);

-- How a ticket is noted at a resource, as in ClaimQueue: it claims the resource itself (0), shares it (1), claims
-- something below it (2), shares something below it (3).
CREATE FUNCTION not_beside(how smallint) RETURNS smallint[] LANGUAGE sql IMMUTABLE AS $$
    SELECT (CASE how WHEN 0 THEN '{0,1,2,3}' WHEN 1 THEN '{0,2}' WHEN 2 THEN '{0,1}' ELSE '{0}' END)::smallint[]
$$;

-- The newest ticket that is in the way of one, and over which of its claims.
CREATE FUNCTION newest_before(p_number bigint, OUT number bigint, OUT claim integer) LANGUAGE plpgsql AS $$
BEGIN
    SELECT found.ticket, mine.claim INTO number, claim
    FROM tickets AS me
    JOIN notes AS mine ON mine.ticket = me.number
    CROSS JOIN LATERAL unnest(not_beside(mine.how)) AS other (how)
    CROSS JOIN LATERAL (
        SELECT theirs.ticket
        FROM notes AS theirs JOIN tickets ON tickets.number = theirs.ticket
        WHERE theirs.key = mine.key AND theirs.how = other.how AND theirs.resource = mine.resource
            AND theirs.ticket < me.number AND tickets.holder <> me.holder
        ORDER BY theirs.ticket DESC LIMIT 1
    ) AS found
    WHERE me.number = p_number
    ORDER BY found.ticket DESC LIMIT 1;
END $$;

-- The oldest one.
CREATE FUNCTION oldest_before(p_number bigint, OUT number bigint, OUT claim integer) LANGUAGE plpgsql AS $$
BEGIN
    SELECT found.ticket, mine.claim INTO number, claim
    FROM tickets AS me
    JOIN notes AS mine ON mine.ticket = me.number
    CROSS JOIN LATERAL unnest(not_beside(mine.how)) AS other (how)
    CROSS JOIN LATERAL (
        SELECT theirs.ticket
        FROM notes AS theirs JOIN tickets ON tickets.number = theirs.ticket
        WHERE theirs.key = mine.key AND theirs.how = other.how AND theirs.resource = mine.resource
            AND theirs.ticket < me.number AND tickets.holder <> me.holder
        ORDER BY theirs.ticket ASC LIMIT 1
    ) AS found
    WHERE me.number = p_number
    ORDER BY found.ticket ASC LIMIT 1;
END $$;

-- Grants a ticket if nothing before it is in its way; has it watch what is, otherwise.
CREATE FUNCTION look(p_number bigint) RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
    v_before bigint;
    v_locked bigint;
    v_token bigint;
BEGIN
    LOOP
        SELECT before.number INTO v_before FROM newest_before(p_number) AS before;
        IF v_before IS NULL THEN
            UPDATE tickets SET token = nextval('tokens'), waits_for = NULL, since = clock_timestamp()
            WHERE number = p_number RETURNING token INTO v_token;
            RETURN v_token;
        ELSIF v_before = v_locked THEN
            UPDATE tickets SET waits_for = v_before WHERE number = p_number;
            RETURN NULL;
        END IF;
        PERFORM 1 FROM tickets WHERE number = v_before FOR KEY SHARE;
        v_locked := v_before;
    END LOOP;
END $$;

-- Looks again at those that watch such tickets, and tells those whose turn it is.
CREATE FUNCTION look_behind(p_numbers bigint[]) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    v_ticket record;
    v_token bigint;
BEGIN
    FOR v_ticket IN
        SELECT tickets.number, tickets.name, sessions.channel
        FROM tickets JOIN sessions ON sessions.id = tickets.session
        WHERE waits_for = ANY (p_numbers) ORDER BY tickets.number FOR NO KEY UPDATE OF tickets
    LOOP
        v_token := look(v_ticket.number);
        IF v_token IS NOT NULL THEN
            PERFORM pg_notify(v_ticket.channel, v_ticket.name || ' ' || v_token);
        END IF;
    END LOOP;
END $$;

-- Deletes sessions that have expired, with all that they held: others may have it now.
CREATE FUNCTION bury() RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    v_dead bigint[] := ARRAY(
        SELECT id FROM sessions WHERE expires < clock_timestamp() ORDER BY id FOR UPDATE SKIP LOCKED
    );
BEGIN
    IF v_dead <> '{}' THEN
        PERFORM 1 FROM tickets WHERE session = ANY (v_dead) ORDER BY number FOR UPDATE;
        DELETE FROM tickets WHERE session = ANY (v_dead);
        PERFORM 1 FROM limits
        WHERE name IN (SELECT at_limit FROM places WHERE session = ANY (v_dead)) ORDER BY name FOR NO KEY UPDATE;
        PERFORM 1 FROM places WHERE session = ANY (v_dead) ORDER BY number FOR NO KEY UPDATE;
        DELETE FROM sessions WHERE id = ANY (v_dead);
    END IF;
END $$;

-- Lets in those whose turn it is at a limit, the row of which the caller has locked, and tells them.
CREATE FUNCTION look_at_limit(p_limit text) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    v_now record;
    v_place record;
    v_answer text;
BEGIN
    DELETE FROM places WHERE at_limit = p_limit AND answer IS DISTINCT FROM 'granted' AND session IS NULL;
    -- sure is what is spent whatever those who run will do
    SELECT count(session) AS running,
        limits.cost + coalesce(sum(greatest(reserved_cost, spent_cost)), 0) AS cost,
        limits.tokens + coalesce(sum(greatest(reserved_tokens, spent_tokens)), 0) AS tokens,
        limits.cost + coalesce(
            sum(CASE WHEN session IS NULL THEN greatest(reserved_cost, spent_cost) ELSE spent_cost END), 0
        ) AS sure_cost,
        limits.tokens + coalesce(
            sum(CASE WHEN session IS NULL THEN greatest(reserved_tokens, spent_tokens) ELSE spent_tokens END), 0
        ) AS sure_tokens
    INTO v_now
    FROM limits LEFT JOIN places ON at_limit = limits.name AND answer = 'granted'
    WHERE limits.name = p_limit GROUP BY limits.name;
    FOR v_place IN
        SELECT places.*, channel FROM places JOIN sessions ON sessions.id = session
        WHERE at_limit = p_limit AND answer IS NULL ORDER BY number
    LOOP
        IF (v_now.sure_cost + v_place.reserved_cost > v_place.max_cost) IS TRUE
            OR (v_now.sure_tokens + v_place.reserved_tokens > v_place.max_tokens) IS TRUE
        THEN
            v_answer := 'refused';
        ELSIF (v_now.running >= v_place.max_concurrency) IS TRUE
            OR (v_now.cost + v_place.reserved_cost > v_place.max_cost) IS TRUE
            OR (v_now.tokens + v_place.reserved_tokens > v_place.max_tokens) IS TRUE
        THEN
            RETURN; -- first come, first served
        ELSE
            v_answer := 'granted';
            v_now.running := v_now.running + 1;
            v_now.cost := v_now.cost + v_place.reserved_cost;
            v_now.tokens := v_now.tokens + v_place.reserved_tokens;
        END IF;
        UPDATE places SET answer = v_answer WHERE number = v_place.number;
        PERFORM pg_notify(v_place.channel, v_place.name || ' ' || v_answer);
    END LOOP;
END $$;

-- Takes over from the dead; and the safety net under notifications.
CREATE PROCEDURE tend() LANGUAGE plpgsql AS $$
DECLARE
    v_limit text;
BEGIN
    PERFORM bury();
    COMMIT;
    PERFORM look_behind(ARRAY(
        SELECT waits_for FROM tickets
        WHERE waits_for IS NOT NULL
            AND NOT EXISTS (SELECT FROM tickets AS before WHERE before.number = tickets.waits_for)
    ));
    FOR v_limit IN SELECT DISTINCT at_limit FROM places WHERE answer IS NULL ORDER BY 1 LOOP
        PERFORM 1 FROM limits WHERE name = v_limit FOR NO KEY UPDATE;
        PERFORM look_at_limit(v_limit);
    END LOOP;
END $$;

-- Asks for a place at a limit; returns the answer, or NULL if one has to wait for it.
CREATE FUNCTION enter_limit(
    p_name text, p_session bigint, p_limit text,
    p_max_concurrency bigint, p_max_cost double precision, p_max_tokens bigint,
    p_cost double precision, p_tokens bigint
) RETURNS text LANGUAGE plpgsql AS $$
BEGIN
    PERFORM 1 FROM sessions WHERE id = p_session FOR KEY SHARE;
    IF NOT FOUND THEN
        RAISE foreign_key_violation USING MESSAGE = 'the session was taken over';
    END IF;
    INSERT INTO limits (name) VALUES (p_limit) ON CONFLICT (name) DO NOTHING;
    PERFORM 1 FROM limits WHERE name = p_limit FOR NO KEY UPDATE;
    INSERT INTO places (
        name, at_limit, session, max_concurrency, max_cost, max_tokens, reserved_cost, reserved_tokens
    ) VALUES (
        p_name, p_limit, p_session, p_max_concurrency, p_max_cost::numeric, p_max_tokens, p_cost::numeric, p_tokens
    ) ON CONFLICT (name) DO UPDATE SET session = p_session; -- the answer to this very call was lost
    PERFORM look_at_limit(p_limit);
    RETURN (SELECT answer FROM places WHERE name = p_name);
END $$;

-- Leaves it, and says what was spent: whoever comes late with that knows it better than anybody.
CREATE FUNCTION leave_limit(p_name text, p_cost double precision, p_tokens bigint) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    v_limit text;
BEGIN
    SELECT at_limit INTO v_limit FROM places WHERE name = p_name;
    PERFORM 1 FROM limits WHERE name = v_limit FOR NO KEY UPDATE;
    DELETE FROM places WHERE name = p_name;
    IF FOUND THEN
        UPDATE limits SET cost = cost + p_cost::numeric, tokens = tokens + p_tokens WHERE name = v_limit;
        PERFORM look_at_limit(v_limit);
    END IF;
END $$;

CREATE FUNCTION state_of_limit(
    p_limit text,
    OUT running bigint, OUT waiting bigint, OUT cost double precision, OUT tokens bigint,
    OUT reserved_cost double precision, OUT reserved_tokens bigint,
    OUT unknown_cost double precision, OUT unknown_tokens bigint
) LANGUAGE sql AS $$
    SELECT count(session) FILTER (WHERE answer = 'granted'),
        count(session) FILTER (WHERE answer IS NULL),
        coalesce((SELECT cost FROM limits WHERE name = p_limit), 0)
            + coalesce(sum(spent_cost) FILTER (WHERE session IS NOT NULL), 0),
        coalesce((SELECT tokens FROM limits WHERE name = p_limit), 0)
            + coalesce(sum(spent_tokens) FILTER (WHERE session IS NOT NULL), 0)::bigint,
        coalesce(
            sum(greatest(reserved_cost - spent_cost, 0)) FILTER (WHERE session IS NOT NULL AND answer = 'granted'), 0
        ),
        coalesce(
            sum(greatest(reserved_tokens - spent_tokens, 0)) FILTER (WHERE session IS NOT NULL AND answer = 'granted'), 0
        )::bigint,
        coalesce(sum(greatest(reserved_cost, spent_cost)) FILTER (WHERE session IS NULL AND answer = 'granted'), 0),
        coalesce(
            sum(greatest(reserved_tokens, spent_tokens)) FILTER (WHERE session IS NULL AND answer = 'granted'), 0
        )::bigint
    FROM places WHERE at_limit = p_limit
$$;

-- Takes what the lost have spent for known.
CREATE FUNCTION settle_unknown(p_limit text, p_cost double precision, p_tokens bigint) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    PERFORM 1 FROM limits WHERE name = p_limit FOR NO KEY UPDATE;
    DELETE FROM places WHERE at_limit = p_limit AND session IS NULL;
    UPDATE limits SET cost = cost + p_cost::numeric, tokens = tokens + p_tokens WHERE name = p_limit;
    PERFORM look_at_limit(p_limit);
END $$;

-- What an agent has spent that still runs.
CREATE FUNCTION spend_at_limits(
    p_names text[], p_input bigint[], p_output bigint[], p_requests bigint[], p_cost double precision[]
) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    PERFORM 1 FROM places WHERE name = ANY (p_names) ORDER BY number FOR NO KEY UPDATE;
    UPDATE places SET spent_tokens = spent_tokens + told.i + told.o, spent_cost = spent_cost + told.c::numeric
    FROM unnest(p_names, p_input, p_output, p_cost) AS told (place, i, o, c)
    WHERE name = told.place;
END $$;

CREATE FUNCTION enter(
    p_name text, p_session bigint, p_holder text, p_waits boolean,
    p_claims integer[], p_resources text[], p_hows smallint[],
    OUT ticket bigint, OUT granted bigint, OUT claim integer, OUT before text, OUT some_expired boolean
) LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    v_number bigint;
    v_before bigint;
    v_note record;
BEGIN
    SELECT number, token INTO v_number, granted FROM tickets WHERE name = p_name;
    IF v_number IS NULL THEN -- otherwise the answer to this very call was lost
        FOR v_note IN
            SELECT hashtextextended(resource, 0) AS key, min(how) AS how
            FROM unnest(p_resources, p_hows) AS note (resource, how) GROUP BY 1 ORDER BY 1
        LOOP
            IF v_note.how < 2 THEN
                PERFORM pg_advisory_xact_lock(v_note.key);
            ELSE -- two that are noted below a folder are never in each other's way there
                PERFORM pg_advisory_xact_lock_shared(v_note.key);
            END IF;
        END LOOP;
        v_number := nextval('numbers');
        INSERT INTO tickets (number, name, session, holder) VALUES (v_number, p_name, p_session, p_holder);
        INSERT INTO notes (ticket, claim, resource, key, how)
        SELECT v_number, note.claim, note.resource, hashtextextended(note.resource, 0), note.how
        FROM unnest(p_claims, p_resources, p_hows) AS note (claim, resource, how);
        granted := look(v_number);
    END IF;
    IF granted IS NULL THEN
        SELECT oldest.number, oldest.claim INTO v_before, claim FROM oldest_before(v_number) AS oldest;
        SELECT holder INTO before FROM tickets WHERE number = v_before;
        some_expired := EXISTS (SELECT FROM sessions WHERE expires < clock_timestamp());
        IF NOT p_waits THEN
            DELETE FROM tickets WHERE number = v_number; -- nobody has seen it
        END IF;
    END IF;
    ticket := v_number;
END $$;

CREATE PROCEDURE leave(p_name text) LANGUAGE plpgsql AS $$
DECLARE
    v_number bigint;
BEGIN
    DELETE FROM tickets WHERE name = p_name RETURNING number INTO v_number;
    COMMIT;
    PERFORM look_behind(ARRAY[v_number]);
END $$;

CREATE FUNCTION holds(p_resource text, p_holder text) RETURNS boolean LANGUAGE sql AS $$
    SELECT EXISTS (
        SELECT FROM notes JOIN tickets ON tickets.number = notes.ticket
        WHERE notes.key = hashtextextended(p_resource, 0) AND notes.resource = p_resource AND notes.how < 2
            AND tickets.holder = p_holder AND tickets.token IS NOT NULL
    )
$$;

-- Who has a resource, given with the folders above it, or something that is in its way.
CREATE FUNCTION holder_of(p_resources text[], p_hows smallint[]) RETURNS text LANGUAGE sql AS $$
    SELECT tickets.holder
    FROM unnest(p_resources, p_hows) AS mine (resource, how)
    CROSS JOIN LATERAL unnest(not_beside(mine.how)) AS other (how)
    JOIN notes AS theirs ON theirs.key = hashtextextended(mine.resource, 0) AND theirs.how = other.how
        AND theirs.resource = mine.resource
    JOIN tickets ON tickets.number = theirs.ticket
    JOIN sessions ON sessions.id = tickets.session
    WHERE tickets.token IS NOT NULL AND sessions.expires > clock_timestamp()
    ORDER BY tickets.number LIMIT 1
$$;

-- Tells the session of a ticket that it was taken away.
CREATE FUNCTION tell_taken(p_numbers bigint[]) RETURNS void LANGUAGE sql AS $$
    SELECT pg_notify(channel, name || ' ') FROM tickets JOIN sessions ON sessions.id = tickets.session
    WHERE number = ANY (p_numbers)
$$;

-- Takes one resource from a holder; whether it had it.
CREATE PROCEDURE release(p_resource text, p_holder text, INOUT p_had boolean) LANGUAGE plpgsql AS $$
DECLARE
    v_numbers bigint[] := ARRAY(
        SELECT DISTINCT tickets.number
        FROM notes JOIN tickets ON tickets.number = notes.ticket
        WHERE notes.key = hashtextextended(p_resource, 0) AND notes.resource = p_resource AND notes.how < 2
            AND tickets.holder = p_holder AND tickets.token IS NOT NULL
    );
    v_empty bigint[];
BEGIN
    PERFORM 1 FROM tickets WHERE number = ANY (v_numbers) ORDER BY number FOR UPDATE;
    DELETE FROM notes AS gone
    USING notes AS claimed
    WHERE claimed.ticket = ANY (v_numbers) AND claimed.resource = p_resource AND claimed.how < 2
        AND gone.ticket = claimed.ticket AND gone.claim = claimed.claim;
    v_empty := ARRAY(
        SELECT number FROM tickets
        WHERE number = ANY (v_numbers) AND NOT EXISTS (SELECT FROM notes WHERE ticket = number)
    );
    PERFORM tell_taken(v_empty);
    DELETE FROM tickets WHERE number = ANY (v_empty);
    COMMIT;
    PERFORM look_behind(v_numbers);
    p_had := v_numbers <> '{}';
END $$;

-- Takes all from a holder, in whatever session it is; how many resources that were.
CREATE PROCEDURE release_all(p_holder text, INOUT p_count integer) LANGUAGE plpgsql AS $$
DECLARE
    v_numbers bigint[] := ARRAY(SELECT number FROM tickets WHERE holder = p_holder AND token IS NOT NULL);
BEGIN
    SELECT count(DISTINCT resource) INTO p_count FROM notes WHERE ticket = ANY (v_numbers) AND how < 2;
    PERFORM 1 FROM tickets WHERE number = ANY (v_numbers) ORDER BY number FOR UPDATE;
    PERFORM tell_taken(v_numbers);
    DELETE FROM tickets WHERE number = ANY (v_numbers);
    COMMIT;
    PERFORM look_behind(v_numbers);
END $$;

-- Starts a step, unless it is done or a session that is alive is at it.
CREATE FUNCTION start(
    p_name text, p_session bigint, p_ticket bigint,
    p_execution text, p_group text, p_task text, p_agent text, p_fingerprint text,
    OUT attempt bigint, OUT content text, OUT reason text,
    OUT input_tokens bigint, OUT output_tokens bigint, OUT requests bigint, OUT cost double precision,
    OUT busy_worker text, OUT busy_until double precision
) LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    v_step bigint := hashtextextended(p_group || chr(1) || p_task, 0);
    v_execution bigint;
    v_last record;
    v_same record;
BEGIN
    PERFORM pg_advisory_xact_lock(hashtextextended(p_execution, v_step));
    PERFORM 1 FROM sessions WHERE id = p_session FOR KEY SHARE;
    IF NOT FOUND THEN
        RAISE foreign_key_violation USING MESSAGE = 'the session was taken over';
    END IF;
    INSERT INTO executions (name, group_id) VALUES (p_execution, p_group) ON CONFLICT ((md5(name))) DO NOTHING;
    SELECT id INTO v_execution FROM executions WHERE md5(name) = md5(p_execution);

    SELECT id, status, session INTO v_last FROM attempts
    WHERE execution = v_execution AND step = v_step AND group_id = p_group AND task_id = p_task AND name <> p_name
    ORDER BY id DESC LIMIT 1;
    IF v_last.status = 'started' AND v_last.session <> p_session THEN
        PERFORM bury();
        SELECT worker, extract(epoch FROM expires) INTO busy_worker, busy_until
        FROM sessions WHERE id = v_last.session;
        IF FOUND THEN
            RETURN;
        END IF;
    END IF;
    PERFORM 1 FROM attempts WHERE id = v_last.id FOR UPDATE; -- an ending is before this, or comes too late

    SELECT coalesce(sum(input_tokens), 0), coalesce(sum(output_tokens), 0), coalesce(sum(requests), 0),
        coalesce(sum(cost), 0)
    INTO input_tokens, output_tokens, requests, cost
    FROM attempts
    WHERE execution = v_execution AND step = v_step AND group_id = p_group AND task_id = p_task AND name <> p_name;
    SELECT status, content INTO v_same FROM attempts
    WHERE execution = v_execution AND step = v_step AND group_id = p_group AND task_id = p_task AND name <> p_name
        AND fingerprint = p_fingerprint
    ORDER BY status NOT IN ('started', 'failed') DESC, id DESC LIMIT 1;
    IF v_same.status NOT IN ('started', 'failed') THEN
        content := v_same.content;
        reason := 'recorded';
        RETURN;
    END IF;
    reason := CASE
        WHEN v_last.id IS NULL THEN NULL
        WHEN v_same.status IS NULL THEN 'changed'
        WHEN v_same.status = 'failed' THEN 'failed'
        ELSE 'interrupted'
    END;
    SELECT id INTO attempt FROM attempts WHERE name = p_name; -- the answer to this very call was lost
    IF attempt IS NULL THEN
        INSERT INTO attempts (name, execution, step, group_id, task_id, agent_id, fingerprint, session, ticket)
        VALUES (p_name, v_execution, v_step, p_group, p_task, p_agent, p_fingerprint, p_session, p_ticket)
        RETURNING id INTO attempt;
    END IF;
END $$;

CREATE FUNCTION spend(
    p_attempts bigint[], p_input bigint[], p_output bigint[], p_requests bigint[], p_cost double precision[]
) RETURNS void LANGUAGE sql AS $$
    UPDATE attempts SET input_tokens = input_tokens + spent.i, output_tokens = output_tokens + spent.o,
        requests = requests + spent.r, cost = cost + spent.c
    FROM unnest(p_attempts, p_input, p_output, p_requests, p_cost) AS spent (attempt, i, o, r, c)
    WHERE id = spent.attempt AND ended IS NULL
$$;

-- Ends an attempt, if it may still be ended; why not, otherwise. What was spent is kept in any case.
CREATE FUNCTION finish_attempt(
    p_attempt bigint, p_status text, p_content text,
    p_input bigint, p_output bigint, p_requests bigint, p_cost double precision
) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    v_attempt record;
    v_refusal text;
BEGIN
    SELECT * INTO v_attempt FROM attempts WHERE id = p_attempt;
    -- What is locked here is not taken over before this is committed.
    PERFORM 1 FROM sessions WHERE id = v_attempt.session FOR KEY SHARE;
    IF NOT FOUND THEN
        v_refusal := 'its session was taken over, because it was not renewed in time';
    ELSIF v_attempt.ticket IS NOT NULL THEN
        PERFORM 1 FROM tickets WHERE number = v_attempt.ticket FOR KEY SHARE;
        IF NOT FOUND THEN
            v_refusal := 'its claims were taken over';
        END IF;
    END IF;
    SELECT * INTO v_attempt FROM attempts WHERE id = p_attempt FOR UPDATE;
    IF v_attempt.ended IS NOT NULL THEN -- the answer to this very call was lost
        RETURN CASE WHEN (v_attempt.status, v_attempt.content) = (p_status, p_content) THEN NULL
            ELSE v_attempt.content END;
    END IF;
    IF v_refusal IS NULL AND EXISTS (
        SELECT FROM attempts
        WHERE execution = v_attempt.execution AND step = v_attempt.step AND group_id = v_attempt.group_id
            AND task_id = v_attempt.task_id AND id > p_attempt
    ) THEN
        v_refusal := 'it was started again since';
    END IF;
    UPDATE attempts SET ended = clock_timestamp(),
        status = CASE WHEN v_refusal IS NULL THEN p_status ELSE 'failed' END,
        content = CASE WHEN v_refusal IS NULL THEN p_content ELSE v_refusal END,
        input_tokens = p_input, output_tokens = p_output, requests = p_requests, cost = p_cost
    WHERE id = p_attempt;
    RETURN v_refusal;
END $$;
