/* A model of a round's end, for the model checker spin: "make model".
 *
 * Covered: three nodes that run a round and go on to the next one. Any of them may stand still at any point and for any
 * time, which is the same as being frozen, cut off or dead. Requests and their replies take any time. The keeper kills
 * the workers at the end of their lease. Races: several nodes that end the round at once, for a failure, for a member
 * that the monitor misses, or for a monitor that a member misses; several leaders that close the next round at once,
 * as after a takeover.
 *
 * Checked: workers never run beside those of another round. All nodes act on one reason for a round's end, and on one
 * composition of the next round. No pair of phase and message is left over (assertions).
 *
 * Not covered: that the job goes on (liveness); requests that are carried out twice; resets that arrive late; the
 * agreement on a failure's cause, on success and on a common step; spares and newcomers; a store that forgets; clocks
 * that run at different speeds. The simulation has all of these, but tries only some schedules.
 *
 * Time is a number of ticks. DEADLINE and MARGIN are as in Settings; a monitor polls within a tick or is late.
 */
#ifndef NODES
#define NODES 3
#endif
#ifndef DEADLINE
#define DEADLINE 2
#endif
#define MARGIN 1
#define ALL ((1 << NODES) - 1)
#define HAS(set, node) (((set) >> (node)) & 1)
#define MONITOR 0 /* the node with group rank 0 */

#define RUNNING 0
#define JOINING 1 /* knows why the round has ended, and has no workers any more */
#define STARTED 2 /* in the next round */

/* the store */
byte end = 0;    /* who ended the round, from 1; 0: nobody. Created once */
byte gone = 0;   /* the nodes that it gave up, in the same record */
byte joined = 0; /* who waits for the next round */
byte closed = 0; /* the members of the next round. Created once */
byte counter[NODES];

/* the nodes. All times are ticks since something, up to DEADLINE */
byte phase[NODES];
bool alive[NODES];     /* its workers of the first round */
byte beat[NODES];      /* its heartbeat: 0 none, 1 on its way, 2 the reply is */
bool was_reset[NODES]; /* what the reply says of the counter */
byte sent[NODES];      /* since the heartbeat was sent */
bool was_due[NODES];   /* whether the monitor had been silent for too long when it was sent */
byte answered[NODES];  /* since the last heartbeat that was answered had been sent */
byte monitored[NODES]; /* since it learned that somebody polls */

/* who polls: the monitor in the round, a leader after it */
byte ask[NODES];   /* its poll: 0 none, 1 on its way, 2 the reply is */
byte asked[NODES]; /* since it was sent */
byte grown[NODES]; /* which counters had grown */
byte polled[NODES];
typedef Row { byte since[NODES] };
Row silent[NODES]; /* by who polls: since it saw a node's counter change */
byte followed_end[NODES];
byte followed_closed[NODES];
byte lost[NODES]; /* whom a leader has given up */

/* The workers' lease: a node's from its last answered heartbeat, the monitor's from its last poll as well. */
#ifdef BROKEN_LEASE /* counts from the reply, not from the request */
#define OVER(node) (since_reply[node] >= DEADLINE - MARGIN)
byte since_reply[NODES];
#else
#define OVER(node) (answered[node] >= DEADLINE - MARGIN || (node == MONITOR && polled[node] >= DEADLINE - MARGIN))
#endif

inline older(age) {
    if
    :: age < DEADLINE -> age++
    :: else
    fi
}

inline create_end(node, who) {
#ifdef BROKEN_CREATE /* the last one wins */
    end = node + 1; gone = who
#else
    if
    :: end == 0 -> end = node + 1; gone = who
    :: else
    fi
#endif
}

#define POLLS(node) ((node == MONITOR && phase[node] == RUNNING && !end) || (phase[node] == JOINING && !closed))

#if NODES > 2
#define SOME_ALIVE (alive[0] || alive[1] || alive[2])
#else
#define SOME_ALIVE (alive[0] || alive[1])
#endif

/* Time passes, as long as workers of the first round live: afterwards nothing can go wrong. */
proctype Clock() {
    byte i, j;
    do
    :: atomic {
        SOME_ALIVE ->
        /* Only times that something depends on: the others would make more states. */
        for (i : 0 .. NODES - 1) {
            if
            :: alive[i] && OVER(i) -> alive[i] = false; answered[i] = 0; polled[i] = 0 /* its keeper, as late as it may be */
            :: alive[i] && !OVER(i) ->
                older(answered[i]);
#ifdef BROKEN_LEASE
                older(since_reply[i]);
#endif
                if
                :: i == MONITOR -> older(polled[i])
                :: else
                fi
            :: else
            fi;
            if
            :: i != MONITOR && phase[i] == RUNNING && !end -> older(monitored[i])
            :: else -> monitored[i] = 0
            fi;
            if
            :: beat[i] && alive[i] -> older(sent[i])
            :: else -> sent[i] = 0
            fi;
            if
            :: ask[i] -> older(asked[i])
            :: else
            fi;
            for (j : 0 .. NODES - 1) {
                if
                :: i != j && POLLS(i) && !HAS(joined | gone, j) -> older(silent[i].since[j])
                :: else -> silent[i].since[j] = 0
                fi
            }
        }
        i = 0; j = 0
    }
    od
}

proctype Node(byte me) {
    byte i, found;
    do
    /* a heartbeat: sent, carried out, answered */
    :: atomic { phase[me] == RUNNING && beat[me] == 0 && (alive[me] || !end) ->
        beat[me] = 1; sent[me] = 0; was_due[me] = (monitored[me] >= DEADLINE) }
    :: atomic { beat[me] == 1 ->
        beat[me] = 2; was_reset[me] = (counter[me] == 0); counter[me] = 1 }
    :: atomic { beat[me] == 2 ->
        beat[me] = 0; answered[me] = sent[me]; sent[me] = 0;
#ifdef BROKEN_LEASE
        since_reply[me] = 0;
#endif
        if
        :: was_reset[me] -> monitored[me] = 0
        :: !was_reset[me] && was_due[me] && me != MONITOR && phase[me] == RUNNING -> create_end(me, 1 << MONITOR)
        :: else
        fi;
        was_reset[me] = false; was_due[me] = false }

    /* a poll */
    :: atomic { ask[me] == 0 && POLLS(me) ->
        ask[me] = 1; asked[me] = 0 }
    :: atomic { ask[me] == 1 ->
        ask[me] = 2; grown[me] = 0;
        for (i : 0 .. NODES - 1) {
            grown[me] = grown[me] | (counter[i] << i)
        }
        i = 0 }
    :: atomic { ask[me] == 2 ->
        ask[me] = 0; found = 0;
        if
        :: me == MONITOR && phase[me] == RUNNING -> polled[me] = asked[me]
        :: else
        fi;
        for (i : 0 .. NODES - 1) {
            if
            :: HAS(grown[me], i) -> silent[me].since[i] = 0; counter[i] = 0
            :: !HAS(grown[me], i) && i != me && silent[me].since[i] - asked[me] >= DEADLINE -> found = found | (1 << i)
            :: else
            fi
        }
        if
        :: found && phase[me] == RUNNING -> create_end(me, found)
        :: found && phase[me] == JOINING -> lost[me] = lost[me] | found
        :: else
        fi;
        i = 0; found = 0; asked[me] = 0; grown[me] = 0 }

    /* a worker fails */
    :: atomic { phase[me] == RUNNING && alive[me] && end == 0 -> create_end(me, 0) }

    /* the end: the workers are stopped, and the node joins */
    :: atomic { phase[me] == RUNNING && end ->
        alive[me] = false; followed_end[me] = end * (ALL + 1) + gone;
        for (i : 0 .. NODES - 1) {
            assert(followed_end[i] == 0 || followed_end[i] == followed_end[me]) /* one reason */
        }
        phase[me] = JOINING; joined = joined | (1 << me);
        ask[me] = 0; asked[me] = 0; grown[me] = 0;
        for (i : 0 .. NODES - 1) {
            silent[me].since[i] = 0
        }
        i = 0 }

    /* a leader closes the next round, when all have joined whom it has not given up. Any node may lead: takeover */
    :: atomic { phase[me] == JOINING && closed == 0 && ((joined | gone | lost[me]) == ALL) -> closed = joined }

    /* the next round */
    :: atomic { phase[me] == JOINING && closed ->
        followed_closed[me] = closed; phase[me] = STARTED;
        for (i : 0 .. NODES - 1) {
            assert(!(HAS(closed, me) && alive[i])); /* one generation at a time */
            assert(followed_closed[i] == 0 || followed_closed[i] == closed) /* one composition */
        }
        i = 0 }
    :: atomic { phase[me] == STARTED && beat[me] == 0 && ask[me] == 0 -> break }
    :: atomic { phase[me] == STARTED && ask[me] -> ask[me] = 0; asked[me] = 0; grown[me] = 0 }
    od
}

init {
    byte n;
    atomic {
        for (n : 0 .. NODES - 1) {
            alive[n] = true;
            run Node(n)
        }
        run Clock();
        n = 0
    }
}
