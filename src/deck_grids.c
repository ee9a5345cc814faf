/* deck_grids.c - the two grids in the deck: layout 'auto', dp sizes, offset, and the rules that
 * need no process group.
 *
 * encoder ranks = encoder_tp * encoder_pp * encoder_dp from rank 0 on; language ranks = llm_tp *
 * llm_cp * llm_pp * llm_dp from llm_offset on. 'disjoint': the two spans follow each other and
 * cover the job; 'colocated': both cover it; 'language_only': there is no encoder. Exit status: a
 * deck that contradicts itself is 2, whatever the ranks (rules A1-A5, A7, A8, and A9 when
 * llm_offset leaves a gap, of parallel.md 1.5); sizes that do not multiply to the ranks present are
 * 3 (A6, A9).
 */
#include "deck_rules.h"

#include <inttypes.h>
#include <stdio.h>

#define N PRId64
#define FAIL(key, code, ...) deck_rules_fail(c, DECK_ROW(topology, key), code, __VA_ARGS__)

static int64_t common_divisor(int64_t a, int64_t b)
{
    while (b) {
        int64_t rest = a % b;
        a = b;
        b = rest;
    }
    return a;
}

/* "Possible: ..." for a number of ranks that 'auto' cannot split. */
static const char *propose(int64_t ranks, char *out, size_t size)
{
    int n = snprintf(out, size, "layout = 'colocated'");
    int shown = 0;
    for (int64_t e = ranks / 2; e >= 1 && shown < 3 && n > 0 && (size_t)n < size; e--) {
        if (ranks % e)
            continue;
        n += snprintf(out + n, size - (size_t)n,
                      "; layout = 'disjoint', encoder_dp = %" N ", llm_dp = %" N, e, ranks - e);
        shown++;
    }
    return out;
}

static void resolve_auto(struct deck_rules *c)
{
    struct deck *d = c->deck;
    int64_t w = c->size;
    char grids[400];
    for (int row = DECK_ROW(topology, encoder_tp); row <= DECK_ROW(topology, llm_expt_tp); row++)
        if (d->source[row].origin >= DECK_FROM_DECK && !deck_table_is_default(d, row)) {
            deck_rules_fail(
                c, row, EXIT_DECK,
                "with a grid key topology.layout must be given ('disjoint', 'colocated' or 'language_only')");
            return;
        }
    if (w != 1 && w % 2) {
        FAIL(layout, EXIT_ENVIRONMENT, "%" N " ranks are neither 1 nor even; possible: %s", w,
             propose(w, grids, sizeof grids));
        return;
    }
    d->topology.layout = w == 1 ? DECK_LAYOUT_COLOCATED : DECK_LAYOUT_DISJOINT;
    d->source[DECK_ROW(topology, layout)].origin = DECK_FROM_DERIVED;
    int64_t half = w == 1 ? 1 : w / 2;
    deck_rules_derive(c, DECK_ROW(topology, encoder_dp), half);
    deck_rules_derive(c, DECK_ROW(topology, llm_dp), half);
    deck_rules_derive(c, DECK_ROW(topology, llm_offset), w == 1 ? 0 : half);
    int64_t ep = d->moe.num_experts > 0 ? common_divisor(half, d->moe.num_experts) : 1;
    if (!deck_table[DECK_ROW(topology, llm_ep)].only && ep > 1)
        deck_rules_derive(c, DECK_ROW(topology, llm_ep), ep);
}

/* Derive a dp size from the ranks of its grid. */
static bool derive_dp(struct deck_rules *c, int row, int64_t ranks, int64_t unit, const char *grid,
                      const char *product)
{
    int64_t *dp = deck_integer(c->deck, row);
    if (!deck_table_is_unset(c->deck, row))
        return true;
    if (ranks < unit || ranks % unit) {
        if (!c->deck->unread)
            errors_add(c->errors, EXIT_ENVIRONMENT,
                       "%s: error: topology: %" N
                       " ranks for the %s grid are no multiple of %s = %" N,
                       c->deck->file, ranks, grid, product, unit);
        c->failed = true;
        return false;
    }
    deck_rules_derive(c, row, ranks / unit);
    return *dp > 0;
}

#define ENCODER_UNIT "encoder_tp * encoder_pp"
#define LANGUAGE_UNIT "llm_tp * llm_cp * llm_pp"

static bool resolve_disjoint(struct deck_rules *c, int64_t unit_e, int64_t unit_l)
{
    struct deck_topology *t = &c->deck->topology;
    int64_t w = c->size, e_dp = t->encoder_dp, l_dp = t->llm_dp, offset = t->llm_offset;
    bool offset_open = deck_table_is_unset(c->deck, DECK_ROW(topology, llm_offset));
    int64_t language = deck_rules_mul(l_dp, unit_l);
    int64_t encoder = e_dp > 0       ? deck_rules_mul(e_dp, unit_e)
                      : !offset_open ? offset
                      : l_dp > 0     ? w - language
                                     : w / 2;
    if (e_dp > 0 && l_dp > 0 && offset_open && encoder <= (1 << 20) && language <= (1 << 20) &&
        encoder + language != w) {
        FAIL(layout, EXIT_ENVIRONMENT,
             "the deck needs %" N " ranks (encoder %" N " = " ENCODER_UNIT
             " * encoder_dp, language %" N " = " LANGUAGE_UNIT " * llm_dp), %" N
             " %s present; start it with mpiexec -n %" N,
             encoder + language, encoder, language, w, w == 1 ? "is" : "are", encoder + language);
        return false;
    }
    if (w < 2) {
        FAIL(layout, EXIT_ENVIRONMENT,
             "two grids need at least 2 ranks, 1 is present; start it with mpiexec -n 2");
        return false;
    }
    if (e_dp == 0 && l_dp == 0 && offset_open && w % 2) {
        FAIL(layout, EXIT_ENVIRONMENT,
             "%" N " ranks have no halves; give encoder_dp, llm_dp or llm_offset", w);
        return false;
    }
    if (!offset_open && encoder != offset) {
        if (offset < encoder)
            FAIL(llm_offset, EXIT_DECK,
                 "the language ranks %" N ".. overlap the encoder ranks 0..%" N, offset,
                 encoder - 1);
        else
            FAIL(llm_offset, EXIT_DECK,
                 "ranks %" N "..%" N " belong to no grid: the encoder has ranks 0..%" N, encoder,
                 offset - 1, encoder - 1);
        return false;
    }
    if (l_dp == 0)
        language = w - encoder;
    if ((e_dp > 0 && l_dp > 0 && (encoder > w || language != w - encoder)) ||
        (e_dp > 0 && encoder >= w) || (l_dp > 0 && language >= w) ||
        (e_dp == 0 && l_dp > 0 && encoder != w - language)) {
        char sizes[2][100];
        snprintf(sizes[0], sizeof sizes[0],
                 e_dp > 0 || !offset_open ? "%" N " encoder ranks"
                                          : "at least %" N " encoder ranks",
                 e_dp > 0 || !offset_open ? encoder : unit_e);
        snprintf(sizes[1], sizeof sizes[1],
                 l_dp > 0 ? "%" N " language ranks" : "at least %" N " language ranks",
                 l_dp > 0 ? language : unit_l);
        FAIL(layout, EXIT_ENVIRONMENT,
             "the deck asks for %s (" ENCODER_UNIT " * encoder_dp) and %s (" LANGUAGE_UNIT
             " * llm_dp), %" N " ranks are present",
             sizes[0], sizes[1], w);
        return false;
    }
    if (!derive_dp(c, DECK_ROW(topology, encoder_dp), encoder, unit_e, "encoder", ENCODER_UNIT) ||
        !derive_dp(c, DECK_ROW(topology, llm_dp), language, unit_l, "language", LANGUAGE_UNIT))
        return false;
    if (offset_open)
        deck_rules_derive(c, DECK_ROW(topology, llm_offset), encoder);
    return true;
}

/* One grid over the whole job. */
static bool resolve_whole(struct deck_rules *c, int row, int64_t unit, const char *grid,
                          const char *product)
{
    int64_t *dp = deck_integer(c->deck, row), w = c->size;
    if (!derive_dp(c, row, w, unit, grid, product))
        return false;
    if (deck_rules_mul(*dp, unit) == w)
        return true;
    deck_rules_fail(c, row, EXIT_ENVIRONMENT,
                    "the %s grid has %s * dp = %" N " * %" N " = %" N " ranks, %" N
                    " %s present; start it with mpiexec -n %" N,
                    grid, product, unit, *dp, deck_rules_mul(*dp, unit), w, w == 1 ? "is" : "are",
                    deck_rules_mul(*dp, unit));
    return false;
}

static bool resolve_colocated(struct deck_rules *c, int64_t unit_e, int64_t unit_l)
{
    struct deck_topology *t = &c->deck->topology;
    if (t->llm_offset > 0) {
        FAIL(llm_offset, EXIT_DECK, "layout 'colocated' needs 0: both grids share all ranks");
        return false;
    }
    if (t->llm_pp > 1 || t->encoder_pp > 1) {
        deck_rules_fail(c,
                        t->llm_pp > 1 ? DECK_ROW(topology, llm_pp) : DECK_ROW(topology, encoder_pp),
                        EXIT_DECK, "layout 'colocated' needs 1");
        return false;
    }
    if (t->llm_offset < 0)
        deck_rules_derive(c, DECK_ROW(topology, llm_offset), 0);
    bool encoder =
        resolve_whole(c, DECK_ROW(topology, encoder_dp), unit_e, "encoder", ENCODER_UNIT);
    return resolve_whole(c, DECK_ROW(topology, llm_dp), unit_l, "language", LANGUAGE_UNIT) &&
           encoder;
}

static bool resolve_language_only(struct deck_rules *c, int64_t unit_l)
{
    struct deck *d = c->deck;
    for (int row = DECK_ROW(topology, encoder_tp); row <= DECK_ROW(topology, encoder_dp); row++)
        if (!deck_table_is_default(d, row)) {
            deck_rules_fail(c, row, EXIT_DECK, "layout 'language_only' has no encoder");
            return false;
        }
    if (d->topology.llm_offset > 0) {
        FAIL(llm_offset, EXIT_DECK, "layout 'language_only' needs 0");
        return false;
    }
    if (d->optimizer.encoder_ddp_overlap)
        deck_rules_fail(c, DECK_ROW(optimizer, encoder_ddp_overlap), EXIT_DECK,
                        "incompatible with topology.layout = 'language_only'");
    if (d->topology.llm_offset < 0)
        deck_rules_derive(c, DECK_ROW(topology, llm_offset), 0);
    return resolve_whole(c, DECK_ROW(topology, llm_dp), unit_l, "language", LANGUAGE_UNIT);
}

/* Rules between the resolved sizes. */
static void check_grids(struct deck_rules *c, int64_t unit_l)
{
    struct deck *d = c->deck;
    struct deck_topology *t = &d->topology;
    int64_t language = deck_rules_mul(unit_l, t->llm_dp);
    int64_t experts = deck_rules_mul(deck_rules_mul(t->llm_expt_tp, t->llm_ep), t->llm_pp);
    if (language % experts)
        FAIL(llm_ep, EXIT_DECK,
             "%" N " language ranks are no multiple of llm_expt_tp * llm_ep * llm_pp = %" N,
             language, experts);
    if (d->moe.num_experts % t->llm_ep)
        FAIL(llm_ep, EXIT_DECK, "must divide moe.num_experts = %" N, d->moe.num_experts);
    if (d->optimizer.encoder_ddp_overlap && !d->optimizer.overlap_grad_reduce)
        deck_rules_fail(c, DECK_ROW(optimizer, encoder_ddp_overlap), EXIT_DECK,
                        "needs overlap_grad_reduce = T");
    if (t->layout == DECK_LAYOUT_LANGUAGE_ONLY)
        return;
    if (t->llm_cp != 1)
        FAIL(llm_cp, EXIT_DECK, "only 1 is possible beside an encoder");
    int64_t mbs = d->batch.micro_batch_size, samples = deck_rules_mul(mbs, t->llm_dp);
    int64_t larger = t->encoder_dp > t->llm_dp ? t->encoder_dp : t->llm_dp;
    int64_t smaller = t->encoder_dp > t->llm_dp ? t->llm_dp : t->encoder_dp;
    if (larger % smaller)
        FAIL(encoder_dp, EXIT_DECK,
             "encoder_dp = %" N " and llm_dp = %" N " must divide one another", t->encoder_dp,
             t->llm_dp);
    else if (samples % t->encoder_dp)
        FAIL(encoder_dp, EXIT_DECK,
             "must divide micro_batch_size * llm_dp = %" N " * %" N " = %" N " samples", mbs,
             t->llm_dp, samples);
    else
        d->derived.encoder_microbatch = samples / t->encoder_dp;
}

void deck_grids_resolve(struct deck_rules *c)
{
    struct deck_topology *t = &c->deck->topology;
    for (int row = DECK_ROW(topology, layout); row <= DECK_ROW(topology, llm_expt_tp); row++)
        if (c->deck->source[row].bad)
            return;
    if (t->layout == DECK_LAYOUT_AUTO)
        resolve_auto(c);
    int64_t unit_e = deck_rules_mul(t->encoder_tp, t->encoder_pp);
    int64_t unit_l = deck_rules_mul(deck_rules_mul(t->llm_tp, t->llm_cp), t->llm_pp);
    bool sound = false;
    switch (t->layout) {
    case DECK_LAYOUT_DISJOINT: sound = resolve_disjoint(c, unit_e, unit_l); break;
    case DECK_LAYOUT_COLOCATED: sound = resolve_colocated(c, unit_e, unit_l); break;
    case DECK_LAYOUT_LANGUAGE_ONLY: sound = resolve_language_only(c, unit_l); break;
    default: break; /* 'auto' failed and has said why */
    }
    if (sound)
        check_grids(c, unit_l);
}
