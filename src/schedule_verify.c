/* schedule_verify.c - proof that the lists of all ranks of a job fit together, in three parts.
 *
 * 1. Each list alone: every micro-batch is received, computed, sent, differentiated exactly as
 * often as its stage demands, in ascending order, one message in flight a direction, and never more
 * live activations than slots.
 * 2. All lists together, executed by simulation. Messages have rendezvous semantics in two rounds,
 * counts and then payload: an action goes on when all its messages of a round have met their
 * counterpart, which is why a plain call against a combined one hangs. The leader of a boundary
 * lane passes on to the lane what it received. Computing and the gradient reduction are collective
 * over the stage, so they wait for all its ranks. If nobody can go on, that is the deadlock.
 * 3. All ranks of a stage have the same list, also those whose calls move no data (parallel.md 3.6,
 * rule 1).
 *
 * Only the grids and the bridge's leaders of the first topology are used; coordinates of other
 * ranks are arithmetic.
 */
#include <stdlib.h>
#include <string.h>
#include "schedule.h"

enum { ROUNDS = 2, TEXT = 96 };

/* What happens to a micro-batch at one module of one rank. */
enum stage_event { RECEIVE, FORWARD, SEND, RECEIVE_GRADIENT, BACKWARD, SEND_GRADIENT, EVENTS };

/* What its place in the pipeline demands of one module of one rank. */
struct duty {
    bool here, expected[EVENTS], syncs;
    int slots;
};

struct position {
    int stage, n_stages;
    bool has[SCHEDULE_MODULES];
};

static struct position position_of(const struct topology *t, int rank);
static void duties_of(const struct topology *t, const struct schedule *s, int rank,
                      struct duty duty[SCHEDULE_MODULES]);
static bool check_list(const struct topology *t, const struct schedule *s, int rank,
                       struct errors *errors);
static bool simulate(const struct schedule *lists, const struct topology *t, int size,
                     struct errors *errors);
static void compare_stages(const struct schedule *lists, const struct topology *t, int size,
                           struct errors *errors);

static const char *role_of(const struct topology *t, int rank)
{
    const struct position p = position_of(t, rank);
    return p.has[SCHEDULE_ENCODER] ? p.has[SCHEDULE_LANGUAGE] ? "both" : "encoder" : "language";
}

bool schedule_verify(const struct schedule *lists, const struct topology *ranks, int size,
                     struct errors *errors)
{
    const struct topology *t = &ranks[0];
    const int before = errors->count;
    int last_checked = -1;
    ASSERT(size == t->size);
    for (int r = 0; r < size; r++) {
        const struct schedule *s = &lists[r], *first = &lists[0];
        if (s->n_microbatches != first->n_microbatches || s->forward_only != first->forward_only ||
            s->encoder_trains != first->encoder_trains) {
            errors_add(errors, EXIT_INTERNAL,
                       "schedule: rank %d was built for %d micro-batches%s%s, rank 0 for %d%s%s", r,
                       s->n_microbatches, s->forward_only ? " forward only" : "",
                       s->encoder_trains ? "" : ", encoder frozen", first->n_microbatches,
                       first->forward_only ? " forward only" : "",
                       first->encoder_trains ? "" : ", encoder frozen");
            return false;
        }
        /* Neighbours of one stage have equal lists as a rule: one check serves them all. */
        const struct schedule *other = last_checked >= 0 ? &lists[last_checked] : NULL;
        if (other && position_of(t, r).stage == position_of(t, last_checked).stage &&
            other->n == s->n && other->encoder_slots == s->encoder_slots &&
            other->language_slots == s->language_slots &&
            memcmp(other->action, s->action, (size_t)s->n * sizeof *s->action) == 0)
            continue;
        check_list(t, s, r, errors);
        last_checked = r;
    }
    if (errors->count == before && simulate(lists, t, size, errors))
        compare_stages(lists, t, size, errors);
    return errors->count == before;
}

/* ---- places ---- */

static bool in_grid(const struct grid *g, int rank)
{
    return g->present && rank >= g->offset && rank < g->offset + g->size;
}

static int stage_in(const struct grid *g, int rank)
{
    return (rank - g->offset) / (g->size / g->pp_size);
}

static struct position position_of(const struct topology *t, int rank)
{
    struct position p = { .has = { in_grid(&t->encoder, rank), in_grid(&t->language, rank) } };
    const int front =
        t->encoder.present && t->layout == DECK_LAYOUT_DISJOINT ? t->encoder.pp_size : 0;
    p.n_stages = front + t->language.pp_size;
    p.stage = p.has[SCHEDULE_LANGUAGE] ? front + stage_in(&t->language, rank)
                                       : stage_in(&t->encoder, rank);
    return p;
}

static void duties_of(const struct topology *t, const struct schedule *s, int rank,
                      struct duty duty[SCHEDULE_MODULES])
{
    const struct position p = position_of(t, rank);
    const int slots[SCHEDULE_MODULES] = { s->encoder_slots, s->language_slots };
    const bool both = p.has[SCHEDULE_ENCODER] && p.has[SCHEDULE_LANGUAGE];
    memset(duty, 0, SCHEDULE_MODULES * sizeof *duty);
    for (int m = 0; m < SCHEDULE_MODULES; m++) {
        struct duty *d = &duty[m];
        const bool previous = both ? m == SCHEDULE_LANGUAGE : p.stage > 0,
                   next = both ? m == SCHEDULE_ENCODER : p.stage < p.n_stages - 1;
        const bool trains = !s->forward_only && (m == SCHEDULE_LANGUAGE || s->encoder_trains);
        /* The stage in front of a language stage belongs to the language module, or to the encoder.
         */
        const bool front_is_language =
            m == SCHEDULE_LANGUAGE && !both &&
            p.stage >
                (t->encoder.present && t->layout == DECK_LAYOUT_DISJOINT ? t->encoder.pp_size : 0);
        d->here = p.has[m];
        if (!d->here)
            continue;
        d->slots = slots[m];
        d->syncs = trains;
        d->expected[RECEIVE] = previous;
        d->expected[FORWARD] = true;
        d->expected[SEND] = next;
        d->expected[RECEIVE_GRADIENT] = next && trains;
        d->expected[BACKWARD] = trains;
        d->expected[SEND_GRADIENT] =
            previous && !s->forward_only && (front_is_language || s->encoder_trains);
    }
}

/* ---- one list ---- */

/* The events of an action: at most two. Returns how many; 0 for GRAD_SYNC and for a kind that its
 * module cannot have. */
struct happening {
    int module;
    enum stage_event event;
    int microbatch;
};

static int events_of(const struct action *a, struct happening out[2])
{
    const int own = a->module;
    switch (a->kind) {
    case SCHEDULE_ENCODER_FORWARD:
    case SCHEDULE_LANGUAGE_FORWARD:
        out[0] = (struct happening){ a->kind == SCHEDULE_ENCODER_FORWARD ? SCHEDULE_ENCODER
                                                                         : SCHEDULE_LANGUAGE,
                                     FORWARD, a->microbatch };
        return out[0].module == own;
    case SCHEDULE_ENCODER_BACKWARD:
    case SCHEDULE_LANGUAGE_BACKWARD:
        out[0] = (struct happening){ a->kind == SCHEDULE_ENCODER_BACKWARD ? SCHEDULE_ENCODER
                                                                          : SCHEDULE_LANGUAGE,
                                     BACKWARD, a->microbatch };
        return out[0].module == own;
    case SCHEDULE_SEND_FORWARD: out[0] = (struct happening){ own, SEND, a->microbatch }; return 1;
    case SCHEDULE_RECV_FORWARD:
        out[0] = (struct happening){ own, RECEIVE, a->microbatch };
        return 1;
    case SCHEDULE_SEND_BACKWARD:
        out[0] = (struct happening){ own, SEND_GRADIENT, a->microbatch };
        return 1;
    case SCHEDULE_RECV_BACKWARD:
        out[0] = (struct happening){ own, RECEIVE_GRADIENT, a->microbatch };
        return 1;
    case SCHEDULE_SEND_FORWARD_RECV_BACKWARD:
        out[0] = (struct happening){ own, SEND, a->microbatch };
        out[1] = (struct happening){ own, RECEIVE_GRADIENT, a->partner };
        return 2;
    case SCHEDULE_SEND_BACKWARD_RECV_FORWARD:
        out[0] = (struct happening){ own, SEND_GRADIENT, a->microbatch };
        out[1] = (struct happening){ own, RECEIVE, a->partner };
        return 2;
    case SCHEDULE_LOCAL_FORWARD:
        out[0] = (struct happening){ SCHEDULE_ENCODER, SEND, a->microbatch };
        out[1] = (struct happening){ SCHEDULE_LANGUAGE, RECEIVE, a->microbatch };
        return 2;
    case SCHEDULE_LOCAL_BACKWARD:
        out[0] = (struct happening){ SCHEDULE_LANGUAGE, SEND_GRADIENT, a->microbatch };
        out[1] = (struct happening){ SCHEDULE_ENCODER, RECEIVE_GRADIENT, a->microbatch };
        return 2;
    default: return 0;
    }
}

/* Is the action one that this rank can have at all, with sane numbers? Returns NULL or what is
 * wrong. */
static const char *malformed(const struct schedule *s, const struct duty duty[SCHEDULE_MODULES],
                             const struct action *a)
{
    const bool combined = a->kind == SCHEDULE_SEND_FORWARD_RECV_BACKWARD ||
                          a->kind == SCHEDULE_SEND_BACKWARD_RECV_FORWARD;
    const bool both = duty[SCHEDULE_ENCODER].here && duty[SCHEDULE_LANGUAGE].here;
    const bool local = a->kind == SCHEDULE_LOCAL_FORWARD || a->kind == SCHEDULE_LOCAL_BACKWARD;
    struct happening h[2];
    if ((unsigned)a->kind >= SCHEDULE_KIND_COUNT)
        return "is no action";
    if ((unsigned)a->module >= SCHEDULE_MODULES || !duty[a->module].here)
        return "is for a module that this rank does not have";
    if (a->kind == SCHEDULE_GRAD_SYNC)
        return !duty[a->module].syncs ? "is for a module that does not train" : NULL;
    const int n = events_of(a, h);
    if (n == 0)
        return "is for the other module";
    if (both != local && (local || h[0].event == SEND || h[0].event == RECEIVE ||
                          h[0].event == SEND_GRADIENT || h[0].event == RECEIVE_GRADIENT))
        return local ? "needs both modules on one rank" : "needs the modules on different ranks";
    if (combined ? a->partner < 0 : a->partner != -1)
        return "has a wrong partner";
    for (int i = 0; i < n; i++) {
        if (h[i].microbatch < 0 || h[i].microbatch >= s->n_microbatches)
            return "names a micro-batch that does not exist";
        if (!duty[h[i].module].expected[h[i].event])
            return "has no place on this stage";
    }
    if (duty[a->module].slots < 1 || a->slot != a->microbatch % duty[a->module].slots)
        return "names a wrong slot";
    return NULL;
}

/* Every expected event of every micro-batch exactly once. */
static bool count_events(const struct schedule *s, const struct duty duty[SCHEDULE_MODULES],
                         const char *who, struct errors *errors)
{
    static const char *const phrase[EVENTS] = {
        [RECEIVE] = "receives the activation of", [FORWARD] = "computes",
        [SEND] = "sends the activation of",       [RECEIVE_GRADIENT] = "receives the gradient of",
        [BACKWARD] = "runs backward of",          [SEND_GRADIENT] = "sends the gradient of",
    };
    const int before = errors->count, m = s->n_microbatches;
    int *count = xcalloc((size_t)SCHEDULE_MODULES * EVENTS * (size_t)m, sizeof *count),
        syncs[SCHEDULE_MODULES] = { 0 };
    for (int i = 0; i < s->n; i++) {
        struct happening h[2];
        const int n = events_of(&s->action[i], h);
        for (int k = 0; k < n; k++)
            count[(h[k].module * EVENTS + (int)h[k].event) * m + h[k].microbatch]++;
        if (s->action[i].kind == SCHEDULE_GRAD_SYNC)
            syncs[s->action[i].module]++;
    }
    for (int k = 0; k < SCHEDULE_MODULES; k++)
        for (int e = 0; e < EVENTS && duty[k].here; e++)
            for (int b = 0; b < m && duty[k].expected[e]; b++) {
                const int n = count[(k * EVENTS + e) * m + b];
                const char *fault = e == FORWARD    ? "forward"
                                    : e == BACKWARD ? "backward"
                                                    : "message";
                if (n == 0)
                    errors_add(errors, EXIT_INTERNAL, "schedule: %s %s: %s never %s micro-batch %d",
                               e == FORWARD || e == BACKWARD ? "missing" : "unmatched", fault, who,
                               phrase[e], b);
                else if (n > 1)
                    errors_add(errors, EXIT_INTERNAL,
                               "schedule: %s %s: %s %s micro-batch %d more than once",
                               e == FORWARD || e == BACKWARD ? "repeated" : "unmatched", fault, who,
                               phrase[e], b);
            }
    for (int k = 0; k < SCHEDULE_MODULES; k++)
        if (duty[k].here && syncs[k] != (duty[k].syncs ? 1 : 0))
            errors_add(errors, EXIT_INTERNAL,
                       "schedule: %s reduces the gradients of its %s module %d times", who,
                       k == SCHEDULE_ENCODER ? "encoder" : "language", syncs[k]);
    free(count);
    return errors->count == before;
}

/* Progress of one module: how many micro-batches have passed each event. */
struct progress {
    int done[EVENTS];
};

/* How many micro-batches have given their slot back. */
static int released(const struct duty duty[SCHEDULE_MODULES],
                    const struct progress p[SCHEDULE_MODULES], int module)
{
    if (duty[module].expected[BACKWARD])
        return p[module].done[BACKWARD];
    /* On one rank the language module reads the encoder's output in place. */
    if (module == SCHEDULE_ENCODER && duty[SCHEDULE_LANGUAGE].here)
        return released(duty, p, SCHEDULE_LANGUAGE);
    return p[module].done[duty[module].expected[SEND] ? SEND : FORWARD];
}

/* May event h happen now? NULL or the reason why not. One message and one gradient in flight per
 * module. */
static const char *too_early(const struct duty duty[SCHEDULE_MODULES],
                             const struct progress p[SCHEDULE_MODULES], const struct happening *h)
{
    const struct duty *d = &duty[h->module];
    const int *done = p[h->module].done, b = h->microbatch;
    const bool output_sent = !d->expected[SEND] || done[SEND] == done[FORWARD];
    const bool gradient_sent = !d->expected[SEND_GRADIENT] || done[SEND_GRADIENT] == done[BACKWARD];
    const bool slot_free = b - released(duty, p, h->module) < d->slots;
    if (b != done[h->event])
        return "wrong order of micro-batches";
    switch (h->event) {
    case RECEIVE:
        if (done[RECEIVE] != done[FORWARD])
            return "the activation received before has not been used";
        if (!slot_free)
            return "slot reused while the micro-batch in it is live";
        return output_sent ? NULL : "the output before has not been sent";
    case FORWARD:
        if (d->expected[RECEIVE] && done[RECEIVE] != b + 1)
            return "its activation has not been received";
        if (!slot_free)
            return "slot reused while the micro-batch in it is live";
        return output_sent ? NULL : "the output before has not been sent";
    case SEND: return done[FORWARD] == b + 1 ? NULL : "it has not been computed";
    case RECEIVE_GRADIENT:
        if (done[RECEIVE_GRADIENT] != done[BACKWARD])
            return "the gradient received before has not been used";
        if (!gradient_sent)
            return "the gradient before has not been sent";
        return done[SEND] > b ? NULL : "its activation has not been sent";
    case BACKWARD:
        if (done[FORWARD] <= b)
            return "it has not been computed";
        if (d->expected[RECEIVE_GRADIENT] && done[RECEIVE_GRADIENT] != b + 1)
            return "its gradient has not been received";
        return gradient_sent ? NULL : "the gradient before has not been sent";
    default: return done[BACKWARD] == b + 1 ? NULL : "it has not been differentiated";
    }
}

static const char *sync_too_early(const struct schedule *s,
                                  const struct duty duty[SCHEDULE_MODULES],
                                  const struct progress p[SCHEDULE_MODULES],
                                  const bool synced[SCHEDULE_MODULES], int module)
{
    for (int k = 0; k < SCHEDULE_MODULES; k++)
        for (int e = 0; e < EVENTS && duty[k].here; e++)
            if (duty[k].expected[e] && p[k].done[e] != s->n_microbatches)
                return "micro-batches are not finished";
    if (module == SCHEDULE_ENCODER && duty[SCHEDULE_LANGUAGE].here && !synced[SCHEDULE_LANGUAGE])
        return "the language module comes first";
    return NULL;
}

static bool check_list(const struct topology *t, const struct schedule *s, int rank,
                       struct errors *errors)
{
    struct duty duty[SCHEDULE_MODULES];
    struct progress progress[SCHEDULE_MODULES] = { 0 };
    bool synced[SCHEDULE_MODULES] = { false };
    char who[64], text[TEXT];
    duties_of(t, s, rank, duty);
    snprintf(who, sizeof who, "rank %d (%s)", rank, role_of(t, rank));
    for (int i = 0; i < s->n; i++) {
        const char *fault = malformed(s, duty, &s->action[i]);
        if (fault) {
            errors_add(errors, EXIT_INTERNAL, "schedule: %s, action %d: %s %s", who, i,
                       schedule_action_text(&s->action[i], text, sizeof text), fault);
            return false;
        }
    }
    if (!count_events(s, duty, who, errors))
        return false;
    for (int i = 0; i < s->n; i++) {
        const struct action *a = &s->action[i];
        struct happening h[2];
        const char *fault = NULL;
        const int n = events_of(a, h);
        for (int k = 0; k < n && !fault; k++)
            fault = too_early(duty, progress, &h[k]);
        if (a->kind == SCHEDULE_GRAD_SYNC)
            fault = sync_too_early(s, duty, progress, synced, a->module);
        if (fault) {
            errors_add(errors, EXIT_INTERNAL, "schedule: %s, action %d: %s: %s", who, i,
                       schedule_action_text(a, text, sizeof text), fault);
            return false;
        }
        for (int k = 0; k < n; k++)
            progress[h[k].module].done[h[k].event]++;
        if (a->kind == SCHEDULE_GRAD_SYNC)
            synced[a->module] = true;
    }
    return true;
}

/* ---- all lists ---- */

struct message {
    int peer;
    bool out, gradient, met;
    int microbatch;
};

struct actor {
    int next, round;         /* action and round that it stands at */
    struct message *message; /* [n_messages] of this action */
    int n_messages, capacity, unmet;
    bool posted;
};

struct world {
    const struct topology *t;
    const struct schedule *lists;
    struct actor *actor; /* [size] */
    int *arrived;        /* [stages] ranks that stand at a collective action */
    int *ready, n_ready; /* ranks to look at */
    int size;
};

static void add_message(struct actor *a, int peer, bool out, bool gradient, int microbatch)
{
    if (a->n_messages == a->capacity) {
        a->capacity = a->capacity ? 2 * a->capacity : 4;
        a->message = xrealloc(a->message, (size_t)a->capacity, sizeof *a->message);
    }
    a->message[a->n_messages++] = (struct message){ peer, out, gradient, false, microbatch };
    a->unmet++;
}

static void add_bridge_messages(struct world *w, int rank, bool source, bool out, bool gradient,
                                int microbatch)
{
    const struct bridge_map *b = &w->t->bridge;
    const struct grid *g = source ? &w->t->encoder : &w->t->language;
    const int lane_size = g->tp_size * g->cp_size, x = rank - g->offset,
              lane = x / lane_size % g->dp_size;
    const int leader = source ? b->source_leader[lane] : b->dest_leader[lane];
    const int own = source ? b->n_source : b->n_dest, others = source ? b->n_dest : b->n_source;
    const int *other = source ? b->dest_leader : b->source_leader;
    const int first = rank - x % lane_size;
    struct actor *a = &w->actor[rank];
    if (rank != leader) {
        if (!out)
            add_message(a, leader, false, gradient, microbatch);
        return;
    }
    if (own >= others)
        add_message(a, other[lane / (own / others)], out, gradient, microbatch);
    else
        for (int k = 0; k < others / own; k++)
            add_message(a, other[lane * (others / own) + k], out, gradient, microbatch);
    for (int i = 0; i < lane_size && !out; i++)
        if (first + i != leader)
            add_message(a, first + i, true, gradient, microbatch);
}

/* The messages of one event that crosses ranks. */
static void add_messages(struct world *w, int rank, const struct happening *h)
{
    const struct grid *g = h->module == SCHEDULE_ENCODER ? &w->t->encoder : &w->t->language;
    const int stage = stage_in(g, rank), stride = g->size / g->pp_size;
    const bool out = h->event == SEND || h->event == SEND_GRADIENT;
    const bool gradient = h->event == SEND_GRADIENT || h->event == RECEIVE_GRADIENT;
    const bool to_next = h->event == SEND || h->event == RECEIVE_GRADIENT;
    const int there = stage + (to_next ? 1 : -1);
    if (there >= 0 && there < g->pp_size)
        add_message(&w->actor[rank], rank + (to_next ? stride : -stride), out, gradient,
                    h->microbatch);
    else
        add_bridge_messages(w, rank, h->module == SCHEDULE_ENCODER, out, gradient, h->microbatch);
}

static bool is_message(enum schedule_kind kind)
{
    return kind == SCHEDULE_SEND_FORWARD || kind == SCHEDULE_RECV_FORWARD ||
           kind == SCHEDULE_SEND_BACKWARD || kind == SCHEDULE_RECV_BACKWARD ||
           kind == SCHEDULE_SEND_FORWARD_RECV_BACKWARD ||
           kind == SCHEDULE_SEND_BACKWARD_RECV_FORWARD;
}

static const struct action *action_at(const struct world *w, int rank)
{
    const int next = w->actor[rank].next;
    return next < w->lists[rank].n ? &w->lists[rank].action[next] : NULL;
}

static void make_ready(struct world *w, int rank)
{
    w->ready[w->n_ready++] = rank;
}

/* Ranks of a stage are consecutive. */
static void stage_span(const struct world *w, int rank, int *first, int *n)
{
    const struct grid *g = in_grid(&w->t->language, rank) ? &w->t->language : &w->t->encoder;
    *n = g->size / g->pp_size;
    *first = g->offset + stage_in(g, rank) * *n;
}

static void wait_text(const struct world *w, int rank, char *out, size_t size)
{
    char text[TEXT];
    const struct action *a = action_at(w, rank);
    if (a)
        snprintf(out, size, "rank %d (%s) at action %d %s", rank, role_of(w->t, rank),
                 w->actor[rank].next, schedule_action_text(a, text, sizeof text));
    else
        snprintf(out, size, "rank %d (%s), which has finished", rank, role_of(w->t, rank));
}

/* A collective action: true when the whole stage stands at it, then all of it moves on. */
static bool step_collective(struct world *w, int rank, struct errors *errors)
{
    struct actor *a = &w->actor[rank];
    const int stage = position_of(w->t, rank).stage;
    int first, n;
    stage_span(w, rank, &first, &n);
    if (!a->posted) {
        a->posted = true;
        w->arrived[stage]++;
    }
    if (w->arrived[stage] < n)
        return true;
    for (int r = first; r < first + n; r++)
        if (memcmp(action_at(w, r), action_at(w, first), sizeof(struct action)) != 0) {
            char one[192], other[192];
            wait_text(w, first, one, sizeof one);
            wait_text(w, r, other, sizeof other);
            errors_add(errors, EXIT_INTERNAL,
                       "schedule: deadlock: the ranks of a stage do not agree: %s, %s", one, other);
            return false;
        }
    w->arrived[stage] = 0;
    for (int r = first; r < first + n; r++) {
        w->actor[r].posted = false;
        w->actor[r].next++;
        make_ready(w, r);
    }
    return true;
}

static bool meet(struct world *w, int rank, struct message *own, struct errors *errors)
{
    struct actor *peer = &w->actor[own->peer];
    if (!peer->posted || !action_at(w, own->peer) || !is_message(action_at(w, own->peer)->kind))
        return true;
    for (int i = 0; i < peer->n_messages; i++) {
        struct message *other = &peer->message[i];
        if (other->met || other->peer != rank || other->out == own->out ||
            peer->round != w->actor[rank].round)
            continue;
        if (other->gradient != own->gradient || other->microbatch != own->microbatch) {
            char one[192], two[192];
            wait_text(w, rank, one, sizeof one);
            wait_text(w, own->peer, two, sizeof two);
            errors_add(errors, EXIT_INTERNAL, "schedule: wrong order of micro-batches: %s meets %s",
                       one, two);
            return false;
        }
        own->met = other->met = true;
        w->actor[rank].unmet--;
        if (--peer->unmet == 0)
            make_ready(w, own->peer);
        return true;
    }
    return true;
}

/* Let one rank go on as far as it can. False = a fault was found. */
static bool step(struct world *w, int rank, struct errors *errors)
{
    struct actor *a = &w->actor[rank];
    for (;;) {
        const struct action *action = action_at(w, rank);
        if (!action)
            return true;
        if (!is_message(action->kind)) {
            if (action->kind != SCHEDULE_LOCAL_FORWARD && action->kind != SCHEDULE_LOCAL_BACKWARD)
                return a->posted || step_collective(w, rank, errors);
            a->next++;
            continue;
        }
        if (!a->posted) {
            struct happening h[2];
            const int n = events_of(action, h);
            a->n_messages = a->unmet = 0;
            for (int k = 0; k < n; k++)
                add_messages(w, rank, &h[k]);
            a->posted = true;
            for (int i = 0; i < a->n_messages; i++)
                if (!a->message[i].met && !meet(w, rank, &a->message[i], errors))
                    return false;
        }
        if (a->unmet > 0)
            return true;
        a->posted = false;
        if (++a->round == ROUNDS) {
            a->round = 0;
            a->next++;
        }
    }
}

/* Whom `rank` waits for. */
static int awaited(const struct world *w, int rank)
{
    const struct actor *a = &w->actor[rank];
    int first, n;
    if (is_message(action_at(w, rank)->kind)) {
        for (int i = 0; i < a->n_messages; i++)
            if (!a->message[i].met)
                return a->message[i].peer;
        return rank;
    }
    stage_span(w, rank, &first, &n);
    for (int r = first; r < first + n; r++) {
        const struct action *other = action_at(w, r);
        if (!other || is_message(other->kind))
            return r;
    }
    return rank;
}

/* The chain of waiting from the first rank that cannot go on, until it closes or ends at a finished
 * rank. */
static void report_deadlock(const struct world *w, struct errors *errors)
{
    char line[1400], text[192];
    size_t used = 0;
    int rank = 0;
    while (!action_at(w, rank))
        rank++;
    wait_text(w, rank, text, sizeof text);
    used += (size_t)snprintf(line, sizeof line, "%s", text);
    bool *seen = xcalloc((size_t)w->size, sizeof *seen);
    while (!seen[rank] && action_at(w, rank) && used < sizeof line - 256) {
        seen[rank] = true;
        rank = awaited(w, rank);
        wait_text(w, rank, text, sizeof text);
        used += (size_t)snprintf(line + used, sizeof line - used, " waits for %s", text);
    }
    free(seen);
    errors_add(errors, EXIT_INTERNAL, "schedule: deadlock: %s", line);
}

static bool simulate(const struct schedule *lists, const struct topology *t, int size,
                     struct errors *errors)
{
    struct world w = { .t = t, .lists = lists, .size = size };
    const int stages = position_of(t, 0).n_stages;
    bool sound = true;
    w.actor = xcalloc((size_t)size, sizeof *w.actor);
    w.arrived = xcalloc((size_t)stages, sizeof *w.arrived);
    /* A rank is queued at the start, when its last message meets, or when its stage's collective is
     * complete: it moves before it can be queued again by the latter two, so twice its number is
     * enough. */
    w.ready = xcalloc(2 * (size_t)size + 2, sizeof *w.ready);
    for (int r = size - 1; r >= 0; r--)
        make_ready(&w, r);
    while (sound && w.n_ready > 0)
        sound = step(&w, w.ready[--w.n_ready], errors);
    for (int r = 0; r < size && sound; r++)
        if (action_at(&w, r)) {
            report_deadlock(&w, errors);
            sound = false;
        }
    for (int r = 0; r < size; r++)
        free(w.actor[r].message);
    free(w.actor);
    free(w.arrived);
    free(w.ready);
    return sound;
}

/* Ranks of a stage are neighbours: each against the one before it. */
static void compare_stages(const struct schedule *lists, const struct topology *t, int size,
                           struct errors *errors)
{
    for (int r = 1; r < size; r++) {
        const struct schedule *a = &lists[r - 1], *b = &lists[r];
        char one[TEXT], other[TEXT];
        if (position_of(t, r).stage != position_of(t, r - 1).stage)
            continue;
        for (int i = 0; i < a->n && i < b->n; i++)
            if (memcmp(&a->action[i], &b->action[i], sizeof *a->action) != 0) {
                errors_add(
                    errors, EXIT_INTERNAL,
                    "schedule: ranks %d and %d (%s) of one stage differ at action %d: %s, %s",
                    r - 1, r, role_of(t, r), i,
                    schedule_action_text(&a->action[i], one, sizeof one),
                    schedule_action_text(&b->action[i], other, sizeof other));
                break;
            }
        /* Whoever has an action more than a neighbour with the same beginning has it twice: seen in
         * part 1. */
    }
}
