/* schedule.c - building, printing and running the list of actions of one rank (parallel.md 4.2,
 * traces of 4.3).
 *
 * Stages are the pipeline stages of the encoder followed by those of the language module; `current`
 * counts from the front, warm = min(total - current - 1, m) forwards go ahead of the first
 * backward. Edges between stages carry activations forward; gradients come back over an edge only
 * if something in front of it trains, so with a frozen encoder the edge between the two grids is
 * one-way and the encoder's stages run forward only. One rank with both modules does a whole
 * micro-batch at a time.
 */
#include "schedule.h"
#include <stdlib.h>
#include <string.h>
#include "log.h"

enum { PRINT_COLUMNS = 100 };

static const char *const kind_names[SCHEDULE_KIND_COUNT] = {
#define X(kind, text) [SCHEDULE_##kind] = text,
    SCHEDULE_KINDS(X)
#undef X
};

/* What a stage does. */
struct stage {
    int module;
    bool previous, next; /* has a stage before, behind it */
    bool gradient_to_previous, gradient_from_next;
    bool trains;
    int warm, slots;
};

static struct stage stage_of(const struct schedule *s, const struct topology *t);
static void push(struct schedule *s, enum schedule_kind kind, int module, int microbatch,
                 int partner);
static void build_stage(struct schedule *s, const struct stage *g);
static void build_colocated(struct schedule *s);

void schedule_build(struct schedule *s, const struct topology *t, int n_microbatches,
                    bool forward_only, bool encoder_trains)
{
    ASSERT(n_microbatches > 0 && (t->encoder.member || t->language.member));
    memset(s, 0, sizeof *s);
    s->n_microbatches = n_microbatches;
    s->forward_only = forward_only;
    s->encoder_trains = encoder_trains;
    if (t->encoder.member && t->language.member) {
        s->encoder_slots = s->language_slots = 1;
        build_colocated(s);
    } else {
        const struct stage g = stage_of(s, t);
        *(g.module == SCHEDULE_ENCODER ? &s->encoder_slots : &s->language_slots) = g.slots;
        build_stage(s, &g);
    }
}

static const char *kind_short(enum schedule_kind kind)
{
    static const char *const text[SCHEDULE_KIND_COUNT] = {
        [SCHEDULE_ENCODER_FORWARD] = "F",
        [SCHEDULE_ENCODER_BACKWARD] = "B",
        [SCHEDULE_LANGUAGE_FORWARD] = "F",
        [SCHEDULE_LANGUAGE_BACKWARD] = "B",
        [SCHEDULE_SEND_FORWARD] = "sf",
        [SCHEDULE_RECV_FORWARD] = "rf",
        [SCHEDULE_SEND_BACKWARD] = "sb",
        [SCHEDULE_RECV_BACKWARD] = "rb",
        [SCHEDULE_SEND_FORWARD_RECV_BACKWARD] = "sfrb",
        [SCHEDULE_SEND_BACKWARD_RECV_FORWARD] = "sbrf",
        [SCHEDULE_LOCAL_FORWARD] = "lf",
        [SCHEDULE_LOCAL_BACKWARD] = "lb",
        [SCHEDULE_GRAD_SYNC] = "gs",
    };
    return text[kind];
}

void schedule_print(const struct schedule *s, FILE *out)
{
    const bool both = s->encoder_slots > 0 && s->language_slots > 0;
    int column = 0;
    for (int i = 0; i < s->n; i++) {
        const struct action *a = &s->action[i];
        const char *name = kind_short(a->kind);
        char text[64];
        if (a->kind == SCHEDULE_SEND_FORWARD_RECV_BACKWARD)
            snprintf(text, sizeof text, "%s(a%d,g%d)", name, a->microbatch, a->partner);
        else if (a->kind == SCHEDULE_SEND_BACKWARD_RECV_FORWARD)
            snprintf(text, sizeof text, "%s(g%d,a%d)", name, a->microbatch, a->partner);
        else if (a->kind == SCHEDULE_GRAD_SYNC)
            snprintf(text, sizeof text, "%s%s",
                     both ? a->module == SCHEDULE_ENCODER ? "e" : "l" : "", name);
        else if (both && a->kind != SCHEDULE_LOCAL_FORWARD && a->kind != SCHEDULE_LOCAL_BACKWARD)
            snprintf(text, sizeof text, "%s%s%d", a->module == SCHEDULE_ENCODER ? "e" : "l", name,
                     a->microbatch);
        else
            snprintf(text, sizeof text, "%s%d", name, a->microbatch);
        const int length = (int)strlen(text);
        if (column > 0 && column + 1 + length > PRINT_COLUMNS) {
            fputc('\n', out);
            column = 0;
        }
        column += fprintf(out, "%s%s", column ? " " : "", text);
    }
    fputc('\n', out);
}

const char *schedule_action_text(const struct action *a, char *out, size_t size)
{
    const char *name =
        a->kind >= 0 && a->kind < SCHEDULE_KIND_COUNT ? kind_names[a->kind] : "unknown action";
    if (a->kind == SCHEDULE_SEND_FORWARD_RECV_BACKWARD)
        snprintf(out, size, "%s(a%d,g%d)", name, a->microbatch, a->partner);
    else if (a->kind == SCHEDULE_SEND_BACKWARD_RECV_FORWARD)
        snprintf(out, size, "%s(g%d,a%d)", name, a->microbatch, a->partner);
    else if (a->kind == SCHEDULE_GRAD_SYNC)
        snprintf(out, size, "%s(%s)", name, a->module == SCHEDULE_ENCODER ? "encoder" : "language");
    else
        snprintf(out, size, "%s(%d)", name, a->microbatch);
    return out;
}

void schedule_run(const struct schedule *s, const struct schedule_calls *calls)
{
    for (int i = 0; i < s->n; i++) {
        const struct action *a = &s->action[i];
        if (!calls->call[a->kind])
            FATAL(EXIT_INTERNAL, "the schedule asks for %s, which this rank cannot do",
                  kind_names[a->kind]);
        log_beat();
        calls->call[a->kind](calls->ctx, a);
    }
}

void schedule_free(struct schedule *s)
{
    free(s->action);
    memset(s, 0, sizeof *s);
}

static struct stage stage_of(const struct schedule *s, const struct topology *t)
{
    struct stage g = { .module = t->encoder.member ? SCHEDULE_ENCODER : SCHEDULE_LANGUAGE };
    const int front = t->encoder.present ? t->encoder.pp_size : 0,
              total = front + t->language.pp_size;
    const int current =
        g.module == SCHEDULE_ENCODER ? t->encoder.pp_rank : front + t->language.pp_rank;
    g.previous = current > 0;
    g.next = current < total - 1;
    g.trains = !s->forward_only && (g.module == SCHEDULE_LANGUAGE || s->encoder_trains);
    /* The edge in front of stage `current` carries gradients if the stage before it trains. */
    g.gradient_to_previous =
        g.previous && !s->forward_only && (current > front || s->encoder_trains);
    g.gradient_from_next = g.next && g.trains;
    if (g.trains) {
        const int ahead = total - current - 1;
        g.warm = ahead < s->n_microbatches ? ahead : s->n_microbatches;
        g.slots = ahead + 1 < s->n_microbatches ? ahead + 1 : s->n_microbatches;
    } else {
        g.warm = s->n_microbatches;
        g.slots = 1;
    }
    return g;
}

static void push(struct schedule *s, enum schedule_kind kind, int module, int microbatch,
                 int partner)
{
    /* At most 7 actions a micro-batch (colocated: 6) and two synchronisations. */
    if (!s->action)
        s->action = xmalloc(7 * (size_t)s->n_microbatches + 2, sizeof *s->action);
    const int slots = module == SCHEDULE_ENCODER ? s->encoder_slots : s->language_slots;
    s->action[s->n++] = (struct action){ .kind = kind,
                                         .module = module,
                                         .microbatch = microbatch,
                                         .slot = microbatch < 0 ? -1 : microbatch % slots,
                                         .partner = partner };
}

/* 4.2; a stage that does not train has only its warm-up. */
static void build_stage(struct schedule *s, const struct stage *g)
{
    const int m = s->n_microbatches, rest = m - g->warm;
    const enum schedule_kind forward =
        g->module == SCHEDULE_ENCODER ? SCHEDULE_ENCODER_FORWARD : SCHEDULE_LANGUAGE_FORWARD;
    const enum schedule_kind backward =
        g->module == SCHEDULE_ENCODER ? SCHEDULE_ENCODER_BACKWARD : SCHEDULE_LANGUAGE_BACKWARD;
    for (int f = 0; f < g->warm; f++) {
        if (g->previous)
            push(s, SCHEDULE_RECV_FORWARD, g->module, f, -1);
        push(s, forward, g->module, f, -1);
        if (g->next)
            push(s, SCHEDULE_SEND_FORWARD, g->module, f, -1);
    }
    if (!g->trains)
        return;
    if (rest > 0 && g->previous)
        push(s, SCHEDULE_RECV_FORWARD, g->module, g->warm, -1);
    for (int b = 0; b < rest; b++) {
        const int f = g->warm + b;
        push(s, forward, g->module, f, -1);
        if (g->next)
            push(s, SCHEDULE_SEND_FORWARD_RECV_BACKWARD, g->module, f, b);
        push(s, backward, g->module, b, -1);
        if (b == rest - 1) {
            if (g->gradient_to_previous)
                push(s, SCHEDULE_SEND_BACKWARD, g->module, b, -1);
        } else if (g->gradient_to_previous) {
            push(s, SCHEDULE_SEND_BACKWARD_RECV_FORWARD, g->module, b, f + 1);
        } else if (g->previous) {
            push(s, SCHEDULE_RECV_FORWARD, g->module, f + 1, -1);
        }
    }
    for (int b = rest; b < m; b++) {
        if (g->gradient_from_next)
            push(s, SCHEDULE_RECV_BACKWARD, g->module, b, -1);
        push(s, backward, g->module, b, -1);
        if (g->gradient_to_previous)
            push(s, SCHEDULE_SEND_BACKWARD, g->module, b, -1);
    }
    push(s, SCHEDULE_GRAD_SYNC, g->module, -1, -1);
}

static void build_colocated(struct schedule *s)
{
    for (int m = 0; m < s->n_microbatches; m++) {
        push(s, SCHEDULE_ENCODER_FORWARD, SCHEDULE_ENCODER, m, -1);
        push(s, SCHEDULE_LOCAL_FORWARD, SCHEDULE_ENCODER, m, -1);
        push(s, SCHEDULE_LANGUAGE_FORWARD, SCHEDULE_LANGUAGE, m, -1);
        if (s->forward_only)
            continue;
        push(s, SCHEDULE_LANGUAGE_BACKWARD, SCHEDULE_LANGUAGE, m, -1);
        if (s->encoder_trains) {
            push(s, SCHEDULE_LOCAL_BACKWARD, SCHEDULE_LANGUAGE, m, -1);
            push(s, SCHEDULE_ENCODER_BACKWARD, SCHEDULE_ENCODER, m, -1);
        }
    }
    if (s->forward_only)
        return;
    push(s, SCHEDULE_GRAD_SYNC, SCHEDULE_LANGUAGE, -1, -1);
    if (s->encoder_trains)
        push(s, SCHEDULE_GRAD_SYNC, SCHEDULE_ENCODER, -1, -1);
}
