/* test_topology.c - grids, groups, the bridge map and their rules as pure arithmetic: the worked
 * examples of parallel.md 1.4 and 3.1, the production layouts of 11.2, and items of its section 12
 * (p12_<nn>). No communication.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "child.h"
#include "timer.h"
#include "topology.h"

/* name, num_ranks, offset, tp, cp, pp, ep, expt_tp */
static const struct topology_spec encoder_2x2 = { "encoder", 4, 0, 2, 1, 1, 1, 1 };
static const struct topology_spec language_2x2_ep4 = { "language", 4, 4, 2, 1, 1, 4, 1 };

/* Describe and expect no errors. */
static struct topology sound(const struct topology_spec *specs, int n_specs, int size, int rank)
{
    struct topology t;
    struct errors e = { 0 };
    topology_describe(&t, specs, n_specs, size, rank, &e);
    if (e.count > 0)
        fail_msg("%s", e.line[0]);
    return t;
}

/* Describe and expect exactly these faults: one substring each, in order. */
static void unsound(const struct topology_spec *specs, int n_specs, int size, enum exit_code code,
                    int n, const char *const *parts)
{
    struct topology t;
    struct errors e = { 0 };
    topology_describe(&t, specs, n_specs, size, 0, &e);
    if (e.count != n)
        fail_msg("%d faults instead of %d; first: %s", e.count, n, e.count ? e.line[0] : "none");
    for (int i = 0; i < n; i++)
        if (!strstr(e.line[i], parts[i]))
            fail_msg("'%s' is not in '%s'", parts[i], e.line[i]);
    assert_int_equal(e.worst, code);
    assert_false(t.encoder.present || t.language.present);
    assert_null(t.storage);
    topology_free(&t);
    errors_free(&e);
}

#define UNSOUND(specs, n_specs, size, code, ...) \
    unsound(specs, n_specs, size, code, \
            (int)(sizeof((const char *[]){ __VA_ARGS__ }) / sizeof(char *)), \
            (const char *[]){ __VA_ARGS__ })

/* All groups of one family as text: "[4,5][6,7]". */
static void family_text(const struct grid *g, const char *name, char *out, size_t size)
{
    int *member = calloc((size_t)g->size, sizeof *member);
    size_t used = 0;
    out[0] = '\0';
    for (int r = g->offset; r < g->offset + g->size; r++) {
        const int n = topology_members(g, name, r, member);
        if (member[0] != r)
            continue;
        for (int i = 0; i < n; i++)
            used += (size_t)snprintf(out + used, size - used, "%c%d%s", i ? ',' : '[', member[i],
                                     i == n - 1 ? "]" : "");
    }
    free(member);
}

static void expect_family(const struct grid *g, const char *name, const char *expected)
{
    char text[1024];
    family_text(g, name, text, sizeof text);
    if (strcmp(text, expected) != 0)
        fail_msg("%s.%s: %s instead of %s", g->name, name, text, expected);
}

/* ---- groups ---- */

static void test_p12_04_groups_of_the_example_tp2_dp2_pp2(void **state)
{
    const struct topology_spec specs[] = { { "encoder", 4, 0, 1, 1, 1, 1, 1 },
                                           { "language", 8, 4, 2, 1, 2, 2, 1 } };
    struct topology t = sound(specs, 2, 12, 0);
    const struct grid *g = &t.language;
    expect_family(g, "tp", "[4,5][6,7][8,9][10,11]");
    expect_family(g, "dp", "[4,6][5,7][8,10][9,11]");
    expect_family(g, "pp", "[4,8][5,9][6,10][7,11]");
    expect_family(g, "mp", "[4,5,8,9][6,7,10,11]");
    expect_family(g, "tp_dp", "[4,5,6,7][8,9,10,11]");
    expect_family(g, "all", "[4,5,6,7,8,9,10,11]");
    assert_int_equal(g->expt_dp_size, 2);
    expect_family(g, "ep", "[4,5][6,7][8,9][10,11]");
    expect_family(g, "expt_dp", "[4,6][5,7][8,10][9,11]");
    expect_family(g, "tp_ep_pp", "[4,5,8,9][6,7,10,11]");
    assert_int_equal(t.token_source, 8);
    topology_free(&t);
}

static void test_p12_04_groups_of_the_8_gpu_recipe(void **state)
{
    const struct topology_spec specs[] = { encoder_2x2, language_2x2_ep4 };
    struct topology t = sound(specs, 2, 8, 5);
    expect_family(&t.language, "ep", "[4,5,6,7]");
    expect_family(&t.language, "expt_dp", "[4][5][6][7]");
    expect_family(&t.encoder, "tp", "[0,1][2,3]");
    expect_family(&t.encoder, "dp", "[0,2][1,3]");
    expect_family(&t.encoder, "ep", "[0][1][2][3]");
    expect_family(&t.encoder, "expt_tp", "[0][1][2][3]");
    expect_family(&t.encoder, "expt_dp", "[0,1,2,3]");
    assert_int_equal(t.layout, DECK_LAYOUT_DISJOINT);
    assert_true(t.language.member && !t.encoder.member);
    assert_int_equal(t.language.tp_rank, 1);
    assert_int_equal(t.language.dp_rank, 0);
    assert_int_equal(t.language.ep_rank, 1);
    assert_int_equal(t.encoder.tp_rank, -1);
    assert_int_equal(t.language.tp.size, 2);
    assert_int_equal(t.language.tp.rank, 1);
    assert_int_equal(t.encoder.tp.size, 0);
    assert_string_equal(topology_role(&t), "language");
    topology_free(&t);
}

static void test_p12_01_dp_sizes_are_derived_and_expt_tp_is_its_own(void **state)
{
    const struct topology_spec spec = { "language", 16, 0, 4, 1, 2, 2, 1 };
    struct topology t = sound(&spec, 1, 16, 0);
    assert_int_equal(t.language.dp_size, 2);
    assert_int_equal(t.language.expt_tp_size, 1);
    assert_int_equal(t.language.expt_dp_size, 4);
    topology_free(&t);
}

/* Every family of every rank: the right size, contains the rank at its position, ascending, agreed
 * on by all members. */
static void check_partition(const struct topology_spec *specs, int n_specs, int size)
{
    static const struct {
        const char *name;
        int view;
        int varies[4];
        size_t offset;
    } families[] = {
#define X(name_, view_, ...) { #name_, view_, { __VA_ARGS__ }, offsetof(struct grid, name_) },
        TOPOLOGY_FAMILIES(X)
#undef X
    };
    int *member = calloc((size_t)size, sizeof *member);
    for (int rank = 0; rank < size; rank++) {
        struct topology t = sound(specs, n_specs, size, rank);
        const struct grid *grids[] = { &t.encoder, &t.language };
        for (int k = 0; k < 2; k++) {
            const struct grid *g = grids[k];
            if (!g->member)
                continue;
            const int dense[] = { g->tp_size, g->cp_size, g->dp_size, g->pp_size };
            const int expert[] = { g->expt_tp_size, g->ep_size, g->expt_dp_size, g->pp_size };
            assert_int_equal(
                rank, g->offset + g->tp_rank +
                          g->tp_size *
                              (g->cp_rank + g->cp_size * (g->dp_rank + g->dp_size * g->pp_rank)));
            assert_int_equal(
                rank, g->offset + g->expt_tp_rank +
                          g->expt_tp_size *
                              (g->ep_rank +
                               g->ep_size * (g->expt_dp_rank + g->expt_dp_size * g->pp_rank)));
            for (size_t f = 0; f < sizeof families / sizeof *families; f++) {
                const struct group *group =
                    (const struct group *)((const char *)g + families[f].offset);
                int expected = 1;
                for (int d = 0; d < 4; d++)
                    expected *= families[f].varies[d] ? (families[f].view ? expert : dense)[d] : 1;
                assert_int_equal(group->size, expected);
                assert_int_equal(group->member[group->rank], rank);
                assert_null(group->comm);
                for (int i = 0; i < group->size; i++) {
                    assert_true(i == 0 || group->member[i] > group->member[i - 1]);
                    assert_true(group->member[i] >= g->offset &&
                                group->member[i] < g->offset + g->size);
                    assert_int_equal(
                        topology_members(g, families[f].name, group->member[i], member),
                        group->size);
                    assert_memory_equal(member, group->member,
                                        (size_t)group->size * sizeof *member);
                }
            }
        }
        topology_free(&t);
    }
    free(member);
}

static void test_p12_03_groups_partition_their_span_for_every_rank(void **state)
{
    check_partition((struct topology_spec[]){ encoder_2x2, language_2x2_ep4 }, 2, 8);
    check_partition((struct topology_spec[]){ { "encoder", 8, 0, 2, 1, 2, 1, 1 },
                                              { "language", 24, 8, 2, 1, 3, 2, 2 } },
                    2, 32);
    check_partition((struct topology_spec[]){ { "language", 64, 0, 2, 2, 2, 4, 2 } }, 1, 64);
    check_partition((struct topology_spec[]){ { "encoder", 16, 0, 4, 1, 1, 1, 1 },
                                              { "language", 16, 0, 2, 1, 1, 8, 1 } },
                    2, 16);
    check_partition((struct topology_spec[]){ { "encoder", 6, 12, 1, 1, 1, 1, 1 },
                                              { "language", 12, 0, 2, 1, 2, 3, 1 } },
                    2, 18);
}

static void ask_for_unknown_family(void *grid)
{
    int member[8];
    topology_members(grid, "gtp_remat", 4, member);
}

static void test_p12_12_a_family_that_no_view_has_is_an_error(void **state)
{
    struct topology t = sound((struct topology_spec[]){ encoder_2x2, language_2x2_ep4 }, 2, 8, 0);
    int member[8];
    assert_int_equal(topology_members(&t.language, "ep", 4, member), 4);
    assert_int_equal(topology_members(&t.language, "ep", 3, member), 0);
    assert_int_equal(child_run(ask_for_unknown_family, &t.language, NULL, 0), EXIT_INTERNAL);
    topology_free(&t);
}

/* ---- rules ---- */

static void test_p12_02_indivisible_products_are_refused_with_the_numbers(void **state)
{
    UNSOUND(((struct topology_spec[]){ { "language", 6, 0, 4, 1, 1, 1, 1 } }), 1, 6, EXIT_DECK,
            "language grid: 6 ranks are not a multiple of tp*cp*pp = 4*1*1 = 4");
    UNSOUND(((struct topology_spec[]){ { "language", 6, 0, 2, 1, 1, 4, 1 } }), 1, 6, EXIT_DECK,
            "language grid: 6 ranks are not a multiple of expt_tp*ep*pp = 1*4*1 = 4");
    UNSOUND(((struct topology_spec[]){ { "encoder", 3, 0, 2, 1, 1, 1, 1 },
                                       { "language", 5, 3, 2, 1, 1, 3, 1 } }),
            2, 8, EXIT_DECK, "encoder grid: 3 ranks",
            "language grid: 5 ranks are not a multiple of tp",
            "language grid: 5 ranks are not a multiple of expt");
    UNSOUND(((struct topology_spec[]){ { "language", 8, 0, 0, 1, 1, -1, 1 } }), 1, 8, EXIT_DECK,
            "sizes must be positive");
    UNSOUND(((struct topology_spec[]){ { "language", 8, 0, 1 << 30, 1 << 30, 4, 1, 1 } }), 1, 8,
            EXIT_DECK, "not a multiple of tp");
    UNSOUND(((struct topology_spec[]){ { "language", 8, -2, 1, 1, 1, 1, 1 } }), 1, 8, EXIT_DECK,
            "its first rank is -2");
}

static void test_p12_05_15_rules_L1_to_L4_name_spans_and_counts(void **state)
{
    UNSOUND(NULL, 0, 8, EXIT_DECK, "at least one"); /* L1 */
    UNSOUND(((struct topology_spec[]){ encoder_2x2 }), 1, 4, EXIT_DECK,
            "0 grids are named 'language'"); /* L2 */
    UNSOUND(((struct topology_spec[]){ language_2x2_ep4, language_2x2_ep4 }), 2, 8, EXIT_DECK,
            "2 grids are named 'language'");
    UNSOUND(((struct topology_spec[]){ language_2x2_ep4, { "audio", 4, 0, 1, 1, 1, 1, 1 } }), 2, 8,
            EXIT_DECK, "a grid is named 'audio'");
    UNSOUND(((struct topology_spec[]){ encoder_2x2, { "language", 4, 2, 2, 1, 1, 1, 1 } }), 2, 8,
            EXIT_DECK, /* L3 */
            "fully share their ranks or be disjoint: encoder 0-3, language 2-5");
    UNSOUND(((struct topology_spec[]){ encoder_2x2, { "language", 2, 0, 2, 1, 1, 1, 1 } }), 2, 4,
            EXIT_DECK, "fully share their ranks or be disjoint: encoder 0-3, language 0-1");
    UNSOUND(((struct topology_spec[]){ encoder_2x2, { "language", 4, 5, 2, 1, 1, 1, 1 } }), 2, 9,
            EXIT_DECK, /* L4: a gap */
            "cover ranks 0-8 with no gaps: encoder 0-3, language 5-8");
    UNSOUND(((struct topology_spec[]){ { "language", 4, 4, 2, 1, 1, 1, 1 } }), 1, 8, EXIT_DECK,
            "cover ranks 0-7 with no gaps: language 4-7");
    /* L4: too many or too few ranks were started: not the deck's fault alone. */
    UNSOUND(((struct topology_spec[]){ encoder_2x2, language_2x2_ep4 }), 2, 9, EXIT_ENVIRONMENT,
            "need 8 ranks but 9 were started");
    UNSOUND(((struct topology_spec[]){ encoder_2x2, language_2x2_ep4 }), 2, 4, EXIT_ENVIRONMENT,
            "need 8 ranks but 4 were started");
    UNSOUND(((struct topology_spec[]){ { "encoder", 4, 0, 1, 1, 1, 1, 1 },
                                       { "language", 4, 0, 2, 1, 1, 1, 1 } }),
            2, 8, EXIT_ENVIRONMENT, "need 4 ranks but 8 were started");
}

static void test_p12_28_bridge_and_colocated_rules(void **state)
{
    UNSOUND(((struct topology_spec[]){ { "encoder", 4, 0, 1, 1, 1, 1, 1 },
                                       { "language", 6, 4, 1, 1, 1, 1, 1 } }),
            2, 10, EXIT_DECK, "4 encoder lanes (dp) and 6 language lanes (dp)");
    UNSOUND(((struct topology_spec[]){ { "encoder", 4, 0, 1, 1, 1, 1, 1 },
                                       { "language", 4, 4, 1, 2, 1, 1, 1 } }),
            2, 8, EXIT_DECK, "encoder cp 1, language cp 2");
    UNSOUND(((struct topology_spec[]){ { "encoder", 4, 0, 1, 1, 1, 1, 1 },
                                       { "language", 4, 0, 1, 1, 2, 1, 1 } }),
            2, 4, EXIT_DECK, "colocated grids must have pp 1: encoder pp 1, language pp 2");
    UNSOUND(((struct topology_spec[]){ { "encoder", 6, 0, 2, 1, 1, 1, 1 },
                                       { "language", 6, 0, 3, 1, 1, 1, 1 } }),
            2, 6, EXIT_DECK, "3 encoder lanes (dp) and 2 language lanes (dp)");
}

/* ---- the deck ---- */

static void fill(struct deck *d, int layout, int etp, int epp, int edp, int offset, int tp, int cp,
                 int pp, int dp, int ep)
{
    memset(d, 0, sizeof *d);
    d->topology.layout = layout;
    d->topology.encoder_tp = etp;
    d->topology.encoder_pp = epp;
    d->topology.encoder_dp = edp;
    d->topology.llm_offset = offset;
    d->topology.llm_tp = tp;
    d->topology.llm_cp = cp;
    d->topology.llm_pp = pp;
    d->topology.llm_dp = dp;
    d->topology.llm_ep = ep;
    d->topology.llm_expt_tp = 1;
}

static void test_p12_09_the_deck_maps_to_the_canonical_grids(void **state)
{
    struct deck d;
    struct topology t;
    struct errors e = { 0 };
    fill(&d, DECK_LAYOUT_DISJOINT, 2, 1, 2, 4, 2, 1, 1, 2, 4);
    topology_init(&t, &d, 8, 6, &e);
    assert_int_equal(e.count, 0);
    assert_int_equal(t.encoder.offset, 0);
    assert_int_equal(t.encoder.size, 4);
    assert_int_equal(t.language.offset, 4);
    assert_int_equal(t.language.ep_size, 4);
    assert_int_equal(t.language.dp_rank, 1);
    topology_free(&t);
    fill(&d, DECK_LAYOUT_COLOCATED, 1, 1, 4, 0, 2, 1, 1, 2, 1);
    topology_init(&t, &d, 4, 3, &e);
    assert_int_equal(e.count, 0);
    assert_int_equal(t.layout, DECK_LAYOUT_COLOCATED);
    assert_string_equal(topology_role(&t), "both");
    assert_int_equal(t.bridge.n_source, 4);
    assert_int_equal(t.bridge.n_dest, 2);
    topology_free(&t);
}

static void test_p12_11_language_only_has_one_grid_that_covers_the_world(void **state)
{
    struct deck d;
    struct topology t;
    struct errors e = { 0 };
    fill(&d, DECK_LAYOUT_LANGUAGE_ONLY, 1, 1, 1, 0, 2, 1, 1, 4, 1);
    topology_init(&t, &d, 8, 7, &e);
    assert_int_equal(e.count, 0);
    assert_false(t.encoder.present);
    assert_int_equal(t.layout, DECK_LAYOUT_LANGUAGE_ONLY);
    topology_free(&t);
    fill(&d, DECK_LAYOUT_LANGUAGE_ONLY, 1, 1, 1, 2, 2, 1, 1, 4, 1);
    topology_init(&t, &d, 10, 7, &e);
    assert_int_equal(e.count, 1);
    assert_non_null(strstr(e.line[0], "no gaps"));
    errors_free(&e);
}

static void test_rule_L5_layout_and_grids_must_agree(void **state)
{
    struct deck d;
    struct topology t;
    struct errors e = { 0 };
    fill(&d, DECK_LAYOUT_COLOCATED, 1, 1, 4, 4, 1, 1, 1, 4, 1);
    topology_init(&t, &d, 8, 0, &e);
    assert_int_equal(e.count, 1);
    assert_non_null(strstr(e.line[0], "topology.layout = 'colocated' but the grids are disjoint: "
                                      "encoder ranks 0-3, language ranks 4-7"));
    topology_free(&t);
    errors_free(&e);
    fill(&d, DECK_LAYOUT_DISJOINT, 1048576, 1048576, 1048576, 4, 1048576, 1048576, 1048576, 1048576,
         1);
    topology_init(&t, &d, 8, 0, &e);
    assert_true(e.count > 0);
    errors_free(&e);
}

static void test_p12_14_every_rank_has_one_role_or_both(void **state)
{
    for (int r = 0; r < 8; r++) {
        struct topology t =
            sound((struct topology_spec[]){ encoder_2x2, language_2x2_ep4 }, 2, 8, r);
        assert_true(t.encoder.member == (r < 4) && t.language.member == (r >= 4));
        topology_free(&t);
    }
}

/* ---- bridge ---- */

static void expect_ranks(const int *got, int n_got, int n, const int *expected)
{
    assert_int_equal(n_got, n);
    assert_memory_equal(got, expected, (size_t)n * sizeof *got);
}

#define EXPECT(got, n_got, ...) \
    expect_ranks(got, n_got, (int)(sizeof((int[]){ __VA_ARGS__ }) / sizeof(int)), \
                 (int[]){ __VA_ARGS__ })

static void test_p12_22_leaders_of_the_worked_examples(void **state)
{
    struct topology t = sound((struct topology_spec[]){ encoder_2x2, language_2x2_ep4 }, 2, 8, 0);
    EXPECT(t.bridge.source_leader, t.bridge.n_source, 1, 3);
    EXPECT(t.bridge.dest_leader, t.bridge.n_dest, 4, 6);
    EXPECT(t.bridge.leaders.member, t.bridge.leaders.size, 1, 3, 4, 6);
    EXPECT(t.bridge.source_lane.member, t.bridge.source_lane.size, 0, 1);
    assert_int_equal(t.bridge.fan, 1);
    assert_int_equal(t.bridge.leaders.rank, -1);
    topology_free(&t);
    /* Encoder 1x2, language tp 2 dp 4 pp 2 on ranks 2-17. */
    t = sound((struct topology_spec[]){ { "encoder", 2, 0, 1, 1, 1, 1, 1 },
                                        { "language", 16, 2, 2, 1, 2, 1, 1 } },
              2, 18, 9);
    EXPECT(t.bridge.source_leader, t.bridge.n_source, 0, 1);
    EXPECT(t.bridge.dest_leader, t.bridge.n_dest, 2, 4, 6, 8);
    EXPECT(t.bridge.dest_lane.member, t.bridge.dest_lane.size, 8, 9);
    assert_int_equal(t.bridge.dest_lane.rank, 1);
    assert_int_equal(t.bridge.fan, 2);
    topology_free(&t);
    /* pp on the source: the last stage sends. */
    t = sound((struct topology_spec[]){ { "encoder", 8, 0, 2, 1, 2, 1, 1 },
                                        { "language", 8, 8, 4, 1, 2, 1, 1 } },
              2, 16, 5);
    EXPECT(t.bridge.source_leader, t.bridge.n_source, 5, 7);
    EXPECT(t.bridge.dest_leader, t.bridge.n_dest, 8);
    assert_int_equal(t.bridge.leaders.rank, 0);
    topology_free(&t);
}

static void lane_text(const struct topology_spec *specs, int size, bool source, char *out,
                      size_t bytes)
{
    size_t used = 0;
    out[0] = '\0';
    for (int r = 0; r < size; r++) {
        struct topology t = sound(specs, 2, size, r);
        const struct group *g = source ? &t.bridge.source_lane : &t.bridge.dest_lane;
        for (int i = 0; i < g->size && g->member[0] == r; i++)
            used += (size_t)snprintf(out + used, bytes - used, "%c%d%s", i ? ',' : '[',
                                     g->member[i], i == g->size - 1 ? "]" : "");
        topology_free(&t);
    }
}

static void test_p12_23_boundary_lanes_are_the_tp_ranks_of_the_boundary_stage(void **state)
{
    char text[256];
    const struct topology_spec specs[] = { { "encoder", 8, 0, 2, 1, 2, 1, 1 },
                                           { "language", 16, 8, 4, 1, 2, 1, 1 } };
    lane_text(specs, 24, true, text, sizeof text);
    assert_string_equal(text, "[4,5][6,7]");
    lane_text(specs, 24, false, text, sizeof text);
    assert_string_equal(text, "[8,9,10,11][12,13,14,15]");
}

/* The embeddings of a language lane meet on its tp rank 0, which is in one of the encoder lanes
 * that feed it. */
static void test_p12_85_colocated_lanes_of_different_widths(void **state)
{
    struct topology t = sound((struct topology_spec[]){ { "encoder", 8, 0, 2, 1, 1, 1, 1 },
                                                        { "language", 8, 0, 4, 1, 1, 1, 1 } },
                              2, 8, 6);
    EXPECT(t.bridge.source_leader, t.bridge.n_source, 0, 2, 4, 6);
    EXPECT(t.bridge.dest_leader, t.bridge.n_dest, 0, 4);
    EXPECT(t.bridge.leaders.member, t.bridge.leaders.size, 0, 2, 4, 6);
    EXPECT(t.bridge.source_lane.member, t.bridge.source_lane.size, 6, 7);
    assert_int_equal(t.bridge.leaders.rank, 3);
    assert_int_equal(t.bridge.fan, 2);
    assert_int_equal(t.bridge.dest_lane.size, 0);
    topology_free(&t);
    t = sound((struct topology_spec[]){ { "encoder", 8, 0, 4, 1, 1, 1, 1 },
                                        { "language", 8, 0, 2, 1, 1, 1, 1 } },
              2, 8, 6);
    EXPECT(t.bridge.source_leader, t.bridge.n_source, 0, 4);
    EXPECT(t.bridge.dest_leader, t.bridge.n_dest, 0, 2, 4, 6);
    EXPECT(t.bridge.source_lane.member, t.bridge.source_lane.size, 4, 5, 6, 7);
    assert_int_equal(t.bridge.leaders.size, 0);
    assert_int_equal(t.bridge.leaders.rank, -1);
    assert_int_equal(t.bridge.source_lane.rank, 2);
    topology_free(&t);
}

static void test_p12_24_the_bridge_holds_exactly_the_leaders_for_every_fan(void **state)
{
    static const int dp[][2] = { { 4, 1 }, { 1, 4 }, { 2, 2 }, { 2, 8 }, { 8, 2 } };
    for (size_t k = 0; k < sizeof dp / sizeof *dp; k++) {
        const int e = dp[k][0] * 2, l = dp[k][1] * 2, size = e + l;
        const struct topology_spec specs[] = { { "encoder", e, 0, 2, 1, 1, 1, 1 },
                                               { "language", l, e, 2, 1, 1, 1, 1 } };
        int members = 0;
        for (int r = 0; r < size; r++) {
            struct topology t = sound(specs, 2, size, r);
            const bool leader = r < e ? r % 2 == 1 : r % 2 == 0;
            assert_int_equal(t.bridge.leaders.rank >= 0, leader);
            assert_int_equal(t.bridge.leaders.size, dp[k][0] + dp[k][1]);
            assert_int_equal(t.bridge.fan,
                             dp[k][0] > dp[k][1] ? dp[k][0] / dp[k][1] : dp[k][1] / dp[k][0]);
            members += t.bridge.leaders.rank >= 0;
            topology_free(&t);
        }
        assert_int_equal(members, dp[k][0] + dp[k][1]);
    }
}

/* ---- production sizes ---- */

static void test_production_layouts_have_the_derived_numbers(void **state)
{
    /* parallel.md 11.2: nodes, encoder ranks, ep, llm_dp, expt_dp, bridge leaders, lanes per
     * encoder rank */
    static const struct {
        int ranks, encoder, ep, dp, expt_dp, leaders, fan;
    } layout[] = {
        { 72, 8, 16, 32, 4, 40, 4 },      { 136, 8, 8, 64, 16, 72, 8 },
        { 264, 8, 8, 128, 32, 136, 16 },  { 544, 32, 8, 256, 64, 288, 8 },
        { 800, 32, 8, 384, 96, 416, 12 },
    };
    for (size_t k = 0; k < sizeof layout / sizeof *layout; k++) {
        const int w = layout[k].ranks, e = layout[k].encoder;
        const struct topology_spec specs[] = { { "encoder", e, 0, 1, 1, 1, 1, 1 },
                                               { "language", w - e, e, 2, 1, 1, layout[k].ep, 1 } };
        struct topology t = sound(specs, 2, w, w - 1);
        assert_int_equal(t.language.dp_size, layout[k].dp);
        assert_int_equal(t.language.expt_dp_size, layout[k].expt_dp);
        assert_int_equal(t.bridge.leaders.size, layout[k].leaders);
        assert_int_equal(t.bridge.fan, layout[k].fan);
        assert_int_equal(t.token_source, e);
        /* Encoder rank r feeds offset + 2*(r*L + j). */
        for (int j = 0; j < t.bridge.fan; j++)
            assert_int_equal(t.bridge.dest_leader[3 * t.bridge.fan + j],
                             e + 2 * (3 * t.bridge.fan + j));
        topology_free(&t);
    }
}

static void test_describing_one_rank_of_800_takes_less_than_a_millisecond(void **state)
{
    const struct topology_spec specs[] = { { "encoder", 32, 0, 1, 1, 1, 1, 1 },
                                           { "language", 768, 32, 2, 1, 1, 8, 1 } };
    double best = 1e9;
    for (int round = 0; round < 5; round++) {
        const double start = timer_now();
        for (int r = 0; r < 800; r++) {
            struct topology t = sound(specs, 2, 800, r);
            topology_free(&t);
        }
        const double seconds = (timer_now() - start) / 800;
        best = seconds < best ? seconds : best;
    }
    printf("describing one rank of 800: %.1f us\n", 1e6 * best);
    assert_true(best < 1e-3);
}

static void test_printing_names_grids_groups_and_the_bridge(void **state)
{
    char *text = NULL;
    size_t size = 0;
    struct topology t = sound(
        (struct topology_spec[]){ encoder_2x2, { "language", 8, 4, 2, 1, 1, 4, 1 } }, 2, 12, 0);
    FILE *f = open_memstream(&text, &size);
    topology_print(&t, f);
    fclose(f);
    assert_non_null(strstr(text, "layout disjoint, 12 ranks\n"));
    assert_non_null(strstr(text, "grid encoder  ranks 0-3: tp 2 cp 1 dp 2 pp 1"));
    assert_non_null(strstr(text, "ep 4 expt_tp 1 expt_dp 2"));
    assert_non_null(strstr(text, "  tp           4 groups of 2    [4,5] [6,7] [8,9] [10,11]\n"));
    assert_non_null(strstr(
        text, "bridge 2 encoder lanes -> 4 language lanes, 6 leaders\n  1 -> 4 6\n  3 -> 8 10\n"));
    assert_non_null(strstr(text, "token count from rank 4\n"));
    free(text);
    topology_free(&t);
}

/* ---- ranks ---- */

static void test_p12_13_membership_is_a_boolean(void **state)
{
    _Static_assert(_Generic(((struct grid *)0)->member, bool : 1, default : 0) &&
                       _Generic(((struct grid *)0)->present, bool : 1, default : 0),
                   "membership predicates are bool");
    for (int r = 0; r < 8; r++) {
        struct topology t =
            sound((struct topology_spec[]){ encoder_2x2, language_2x2_ep4 }, 2, 8, r);
        const struct grid *in = r < 4 ? &t.encoder : &t.language,
                          *out = r < 4 ? &t.language : &t.encoder;
        assert_true(in->member && in->present && !out->member && out->present);
        assert_true(in->tp.rank == r % 2 && in->all.rank == r % 4);
        assert_true(out->tp_rank == -1 && out->pp_rank == -1 && out->all.rank == -1);
        topology_free(&t);
    }
}

/* From the grid alone, the same on every rank of the world: the last stage's first rank. Another
 * choice of tensor-, context- or data-parallel sizes moves it only with the stage. */
static void test_p12_64_the_token_source_follows_from_the_grid_on_every_rank(void **state)
{
    static const struct {
        int ranks, tp, cp, pp, source;
    } grids[] = { { 4, 1, 1, 1, 2 }, { 4, 2, 1, 1, 2 }, { 8, 2, 1, 2, 6 },
                  { 8, 1, 2, 2, 6 }, { 8, 1, 1, 4, 8 }, { 6, 1, 1, 3, 6 } };
    for (size_t k = 0; k < sizeof grids / sizeof *grids; k++) {
        const struct topology_spec specs[] = { { "encoder", 2, 0, 1, 1, 1, 1, 1 },
                                               { "language", grids[k].ranks, 2, grids[k].tp,
                                                 grids[k].cp, grids[k].pp, 1, 1 } };
        const int n = grids[k].cp > 1 ? 1 : 2, first = 2 - n; /* an encoder excludes cp */
        const int size = grids[k].ranks + (n == 2 ? 2 : 0);
        struct topology_spec alone = specs[1];
        alone.offset = 0;
        for (int r = 0; r < size; r++) {
            struct topology t = sound(first ? &alone : specs, n, size, r);
            assert_int_equal(t.token_source, grids[k].source - (first ? 2 : 0));
            if (r == t.token_source)
                assert_true(t.language.tp_rank == 0 && t.language.cp_rank == 0 &&
                            t.language.dp_rank == 0 &&
                            t.language.pp_rank == t.language.pp_size - 1);
            topology_free(&t);
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_p12_04_groups_of_the_example_tp2_dp2_pp2),
        cmocka_unit_test(test_p12_04_groups_of_the_8_gpu_recipe),
        cmocka_unit_test(test_p12_01_dp_sizes_are_derived_and_expt_tp_is_its_own),
        cmocka_unit_test(test_p12_03_groups_partition_their_span_for_every_rank),
        cmocka_unit_test(test_p12_12_a_family_that_no_view_has_is_an_error),
        cmocka_unit_test(test_p12_02_indivisible_products_are_refused_with_the_numbers),
        cmocka_unit_test(test_p12_05_15_rules_L1_to_L4_name_spans_and_counts),
        cmocka_unit_test(test_p12_28_bridge_and_colocated_rules),
        cmocka_unit_test(test_p12_09_the_deck_maps_to_the_canonical_grids),
        cmocka_unit_test(test_p12_11_language_only_has_one_grid_that_covers_the_world),
        cmocka_unit_test(test_rule_L5_layout_and_grids_must_agree),
        cmocka_unit_test(test_p12_14_every_rank_has_one_role_or_both),
        cmocka_unit_test(test_p12_22_leaders_of_the_worked_examples),
        cmocka_unit_test(test_p12_23_boundary_lanes_are_the_tp_ranks_of_the_boundary_stage),
        cmocka_unit_test(test_p12_85_colocated_lanes_of_different_widths),
        cmocka_unit_test(test_p12_24_the_bridge_holds_exactly_the_leaders_for_every_fan),
        cmocka_unit_test(test_production_layouts_have_the_derived_numbers),
        cmocka_unit_test(test_describing_one_rank_of_800_takes_less_than_a_millisecond),
        cmocka_unit_test(test_printing_names_grids_groups_and_the_bridge),
        cmocka_unit_test(test_p12_13_membership_is_a_boolean),
        cmocka_unit_test(test_p12_64_the_token_source_follows_from_the_grid_on_every_rank),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
