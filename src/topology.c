/* topology.c - grids, groups and the bridge map as arithmetic on rank numbers
 * (parallel.md 1.2, 1.3, 3.1).
 *
 * A group over a set X of dims fixes the other coordinates and varies those in X. Members are in
 * ascending world rank, which is the mixed-radix order of the X coordinates because a slower dim
 * has the larger stride. Nothing here needs another rank: only topology_connect communicates, and
 * it asks for every communicator in one globally identical order: encoder, language, bridge; inside
 * a grid in the order of TOPOLOGY_FAMILIES.
 */
#include "topology.h"
#include <limits.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

enum { DIMS = 4, PRINT_GROUPS = 4, PRINT_MEMBERS = 8 };

struct family {
    const char *name;
    size_t offset;
    int view;
    bool varies[DIMS];
};

static const struct family families[] = {
#define X(name_, view_, ...) { #name_, offsetof(struct grid, name_), view_, { __VA_ARGS__ } },
    TOPOLOGY_FAMILIES(X)
#undef X
};
enum { N_FAMILIES = sizeof families / sizeof *families };

struct storage {
    int *member;         /* all member lists, one after the other */
    struct comm **owned; /* [n_owned] communicators made by topology_connect */
    int n_owned;
    const struct comm_ops *device; /* set by topology_attach */
};

static void check_specs(const struct topology_spec *specs, int n_specs, int size,
                        struct errors *errors);
static void check_edge(const struct topology_spec *encoder, const struct topology_spec *language,
                       bool colocated, struct errors *errors);
static void no_member(struct grid *g, const char *name);
static void describe_grid(struct grid *g, const struct topology_spec *spec, int rank, int **next);
static void describe_bridge(struct topology *t, int **next);
static size_t members_needed(const struct topology_spec *specs, int n_specs);
static void view_sizes(const struct grid *g, int view, int sizes[DIMS]);
static int family_size(const struct grid *g, const struct family *f);
static int list_members(const struct grid *g, const struct family *f, int rank, int *member,
                        int *position, int *index);
static struct group *group_of(struct grid *g, const struct family *f);
static void connect_grid(struct topology *t, struct grid *g);
static struct comm *make_comm(struct topology *t, int color, const char *first, const char *second);

void topology_describe(struct topology *t, const struct topology_spec *specs, int n_specs, int size,
                       int rank, struct errors *errors)
{
    const int before = errors->count;
    ASSERT(size > 0 && rank >= 0 && rank < size);
    memset(t, 0, sizeof *t);
    t->size = size;
    t->rank = rank;
    no_member(&t->encoder, "encoder");
    no_member(&t->language, "language");
    t->bridge.leaders.rank = t->bridge.source_lane.rank = t->bridge.dest_lane.rank = -1;
    check_specs(specs, n_specs, size, errors);
    if (errors->count > before)
        return;
    struct storage *storage = xcalloc(1, sizeof *storage);
    int *next = storage->member = xmalloc(members_needed(specs, n_specs), sizeof *storage->member);
    t->storage = storage;
    for (int i = 0; i < n_specs; i++)
        describe_grid(strcmp(specs[i].name, "language") == 0 ? &t->language : &t->encoder,
                      &specs[i], rank, &next);
    if (!t->encoder.present)
        t->layout = DECK_LAYOUT_LANGUAGE_ONLY;
    else if (t->encoder.offset == t->language.offset)
        t->layout = DECK_LAYOUT_COLOCATED;
    else
        t->layout = DECK_LAYOUT_DISJOINT;
    if (t->encoder.present)
        describe_bridge(t, &next);
    /* Last rank of the pp line that holds the smallest language rank. */
    t->token_source =
        t->language.offset + (t->language.pp_size - 1) * (t->language.size / t->language.pp_size);
}

static int product(const int64_t *factors, int n)
{
    int64_t p = 1;
    for (int i = 0; i < n; i++)
        if (factors[i] < 1 || __builtin_mul_overflow(p, factors[i], &p) || p > INT_MAX)
            return INT_MAX;
    return (int)p;
}

void topology_init(struct topology *t, const struct deck *deck, int size, int rank,
                   struct errors *errors)
{
    static const char *const layouts[] = { "auto", "disjoint", "colocated", "language_only" };
    const struct deck_topology *d = &deck->topology;
    const int encoder_ranks =
        product((int64_t[]){ d->encoder_tp, d->encoder_pp, d->encoder_dp }, 3);
    const int language_ranks =
        product((int64_t[]){ d->llm_tp, d->llm_cp, d->llm_pp, d->llm_dp }, 4);
    const struct topology_spec specs[] = {
        { "encoder", encoder_ranks, 0, (int)d->encoder_tp, 1, (int)d->encoder_pp, 1, 1 },
        { "language", language_ranks, (int)d->llm_offset, (int)d->llm_tp, (int)d->llm_cp,
          (int)d->llm_pp, (int)d->llm_ep, (int)d->llm_expt_tp },
    };
    const bool alone = d->layout == DECK_LAYOUT_LANGUAGE_ONLY;
    const int before = errors->count;
    topology_describe(t, alone ? specs + 1 : specs, alone ? 1 : 2, size, rank, errors);
    if (errors->count == before && t->layout != d->layout)
        errors_add(errors, EXIT_DECK,
                   "topology.layout = '%s' but the grids are %s: "
                   "encoder ranks %d-%d, language ranks %d-%d",
                   layouts[d->layout], layouts[t->layout], t->encoder.offset,
                   t->encoder.offset + t->encoder.size - 1, t->language.offset,
                   t->language.offset + t->language.size - 1);
}

void topology_connect(struct topology *t, struct comm *world)
{
    struct storage *storage = t->storage;
    struct bridge_map *b = &t->bridge;
    ASSERT(storage && !t->world && world->size == t->size && world->rank == t->rank);
    t->world = world;
    storage->owned =
        xcalloc(2 * N_FAMILIES + 3,
                sizeof *storage->owned); /* NOLINT(bugprone-sizeof-expression): pointers */
    if (t->encoder.present)
        connect_grid(t, &t->encoder);
    connect_grid(t, &t->language);
    if (!t->encoder.present)
        return;
    if (b->leaders.size > 0)
        b->leaders.comm = make_comm(t, b->leaders.rank >= 0 ? 0 : -1, "bridge", "leaders");
    if (t->encoder.tp_size * t->encoder.cp_size > 1)
        b->source_lane.comm = make_comm(t, b->source_lane.rank >= 0 ? t->encoder.dp_rank : -1,
                                        "bridge", "source_lane");
    if (t->layout == DECK_LAYOUT_DISJOINT && t->language.tp_size * t->language.cp_size > 1)
        b->dest_lane.comm =
            make_comm(t, b->dest_lane.rank >= 0 ? t->language.dp_rank : -1, "bridge", "dest_lane");
}

static void attach(struct topology *t, struct comm *comm)
{
    const struct storage *storage = t->storage;
    if (comm && !comm->device)
        storage->device->attach(comm);
}

void topology_attach(struct topology *t, const struct comm_ops *ops)
{
    struct storage *storage = t->storage;
    storage->device = ops;
    /* One order for all ranks; families that share a communicator attach it once. */
    for (const struct grid *g = &t->encoder; g; g = g == &t->encoder ? &t->language : NULL) {
        attach(t, g->tp.comm);
        attach(t, g->dp_cp.comm);
        attach(t, g->tp_cp.comm);
        attach(t, g->tp_dp_cp.comm);
        attach(t, g->ep.comm);
        if (g->expt_tp_size > 1)
            attach(t, g->tp_ep.comm);
        attach(t, g->expt_dp.comm);
    }
    attach(t, t->bridge.leaders.comm);
    attach(t, t->bridge.source_lane.comm);
    if (t->size > 1)
        attach(t, t->world);
}

static void print_grid(const struct grid *g, FILE *out)
{
    fprintf(out, "grid %-8s ranks %d-%d: tp %d cp %d dp %d pp %d, ep %d expt_tp %d expt_dp %d\n",
            g->name, g->offset, g->offset + g->size - 1, g->tp_size, g->cp_size, g->dp_size,
            g->pp_size, g->ep_size, g->expt_tp_size, g->expt_dp_size);
    int *member = xmalloc((size_t)g->size, sizeof *member);
    for (int f = 0; f < N_FAMILIES; f++) {
        const int n = family_size(g, &families[f]);
        if (n == 1)
            continue;
        const int groups = g->size / n;
        int printed = 0;
        fprintf(out, "  %-9s %4d groups of %-4d", families[f].name, groups, n);
        /* A group is printed at its first member. */
        for (int r = g->offset; r < g->offset + g->size && printed < PRINT_GROUPS; r++) {
            list_members(g, &families[f], r, member, NULL, NULL);
            if (member[0] != r)
                continue;
            fputs(" [", out);
            for (int i = 0; i < n && i < PRINT_MEMBERS; i++)
                fprintf(out, "%s%d", i ? "," : "", member[i]);
            fputs(n > PRINT_MEMBERS ? ",...]" : "]", out);
            printed++;
        }
        fputs(printed < groups ? " ...\n" : "\n", out);
    }
    free(member);
}

void topology_print(const struct topology *t, FILE *out)
{
    static const char *const layouts[] = { "auto", "disjoint", "colocated", "language_only" };
    const struct bridge_map *b = &t->bridge;
    fprintf(out, "layout %s, %d rank%s\n", layouts[t->layout], t->size, t->size == 1 ? "" : "s");
    if (t->encoder.present)
        print_grid(&t->encoder, out);
    if (t->language.present)
        print_grid(&t->language, out);
    if (t->layout == DECK_LAYOUT_DISJOINT ||
        (t->layout == DECK_LAYOUT_COLOCATED && b->n_source != b->n_dest)) {
        const bool in = b->n_source > b->n_dest;
        fprintf(out, "bridge %d encoder lane%s -> %d language lane%s, %d leaders\n", b->n_source,
                b->n_source == 1 ? "" : "s", b->n_dest, b->n_dest == 1 ? "" : "s", b->leaders.size);
        const int lanes = in ? b->n_dest : b->n_source;
        for (int l = 0; l < lanes && l < PRINT_GROUPS; l++) {
            if (!in)
                fprintf(out, "  %d ->", b->source_leader[l]);
            for (int k = 0; k < b->fan && k < PRINT_MEMBERS; k++)
                fprintf(out, "%s%d", k || !in ? " " : "  ",
                        (in ? b->source_leader : b->dest_leader)[l * b->fan + k]);
            fputs(b->fan > PRINT_MEMBERS ? " ..." : "", out);
            if (in)
                fprintf(out, " -> %d", b->dest_leader[l]);
            fputc('\n', out);
        }
        if (lanes > PRINT_GROUPS)
            fputs("  ...\n", out);
    }
    if (t->language.present)
        fprintf(out, "token count from rank %d\n", t->token_source);
}

int topology_members(const struct grid *grid, const char *name, int rank, int *member)
{
    for (int f = 0; f < N_FAMILIES; f++)
        if (strcmp(families[f].name, name) == 0) {
            if (!grid->present || rank < grid->offset || rank >= grid->offset + grid->size)
                return 0;
            return list_members(grid, &families[f], rank, member, NULL, NULL);
        }
    FATAL(EXIT_INTERNAL,
          "grid %s has no group family '%s': neither its dense view (tp cp dp pp) "
          "nor its expert view (expt_tp ep expt_dp pp) makes one",
          grid->name, name);
}

const char *topology_role(const struct topology *t)
{
    if (t->encoder.member && t->language.member)
        return "both";
    return t->encoder.member ? "encoder" : "language";
}

void topology_free(struct topology *t)
{
    struct storage *storage = t->storage;
    if (storage) {
        if (storage->device && t->world)
            storage->device->detach(t->world);
        for (int i = storage->n_owned - 1; i >= 0; i--) {
            if (storage->device)
                storage->device->detach(storage->owned[i]);
            comm_free(storage->owned[i]);
        }
        free(storage->owned);
        free(storage->member);
        free(storage);
    }
    memset(t, 0, sizeof *t);
}

/* ---- rules ---- */

/* Sizes of one grid; false when later rules cannot be asked. */
static bool check_spec(const struct topology_spec *s, struct errors *errors)
{
    const int before = errors->count;
    if (s->num_ranks < 1 || s->tp < 1 || s->cp < 1 || s->pp < 1 || s->ep < 1 || s->expt_tp < 1) {
        errors_add(
            errors, EXIT_DECK,
            "%s grid: sizes must be positive: %d ranks, tp %d, cp %d, pp %d, ep %d, expt_tp %d",
            s->name, s->num_ranks, s->tp, s->cp, s->pp, s->ep, s->expt_tp);
        return false;
    }
    if (s->offset < 0)
        errors_add(errors, EXIT_DECK, "%s grid: its first rank is %d, must not be negative",
                   s->name, s->offset);
    const int dense = product((int64_t[]){ s->tp, s->cp, s->pp }, 3);
    const int expert = product((int64_t[]){ s->expt_tp, s->ep, s->pp }, 3);
    if (s->num_ranks % dense != 0)
        errors_add(errors, EXIT_DECK,
                   "%s grid: %d ranks are not a multiple of tp*cp*pp = %d*%d*%d = %d", s->name,
                   s->num_ranks, s->tp, s->cp, s->pp, dense);
    if (s->num_ranks % expert != 0)
        errors_add(errors, EXIT_DECK,
                   "%s grid: %d ranks are not a multiple of expt_tp*ep*pp = %d*%d*%d = %d", s->name,
                   s->num_ranks, s->expt_tp, s->ep, s->pp, expert);
    return errors->count == before;
}

/* "encoder 0-3, language 4-7" */
static void spans_text(const struct topology_spec *specs, int n_specs, char *text, size_t size)
{
    size_t used = 0;
    text[0] = '\0';
    for (int i = 0; i < n_specs && used < size; i++)
        used +=
            (size_t)snprintf(text + used, size - used, "%s%s %d-%lld", i ? ", " : "", specs[i].name,
                             specs[i].offset, (long long)specs[i].offset + specs[i].num_ranks - 1);
}

static void check_specs(const struct topology_spec *specs, int n_specs, int size,
                        struct errors *errors)
{
    const struct topology_spec *encoder = NULL, *language = NULL;
    char spans[256];
    int n_language = 0, n_encoder = 0, covered = 0;
    bool sound = true;
    if (n_specs < 1) {
        errors_add(errors, EXIT_DECK, "no grid: at least one is needed");
        return;
    }
    for (int i = 0; i < n_specs; i++) {
        if (strcmp(specs[i].name, "language") == 0) {
            n_language++;
            language = &specs[i];
        } else if (strcmp(specs[i].name, "encoder") == 0) {
            n_encoder++;
            encoder = &specs[i];
        } else {
            errors_add(errors, EXIT_DECK, "a grid is named '%s': must be 'encoder' or 'language'",
                       specs[i].name);
            sound = false;
        }
        sound = check_spec(&specs[i], errors) && sound;
    }
    if (n_language != 1)
        errors_add(errors, EXIT_DECK, "%d grids are named 'language': exactly one must be",
                   n_language);
    if (n_encoder > 1)
        errors_add(errors, EXIT_DECK, "%d grids are named 'encoder': at most one may be",
                   n_encoder);
    if (!sound || n_language != 1 || n_encoder > 1)
        return;
    spans_text(specs, n_specs, spans, sizeof spans);
    bool colocated = false, overlap = false;
    int64_t end = (int64_t)language->offset + language->num_ranks;
    covered = language->num_ranks;
    if (encoder) {
        const int64_t encoder_end = (int64_t)encoder->offset + encoder->num_ranks;
        colocated = encoder->offset == language->offset && encoder_end == end;
        overlap = !colocated && encoder->offset < end && language->offset < encoder_end;
        if (!colocated && __builtin_add_overflow(covered, encoder->num_ranks, &covered))
            covered = INT_MAX;
        end = encoder_end > end ? encoder_end : end;
    }
    if (overlap)
        errors_add(errors, EXIT_DECK, "grids must fully share their ranks or be disjoint: %s",
                   spans);
    else if (covered == end && end != size)
        errors_add(errors, EXIT_ENVIRONMENT, "the grids need %d ranks but %d were started: %s",
                   covered, size, spans);
    else if (covered != end || end != size)
        errors_add(errors, EXIT_DECK, "grids must cover ranks 0-%d with no gaps: %s", size - 1,
                   spans);
    if (encoder && !overlap)
        check_edge(encoder, language, colocated, errors);
}

/* What moving embeddings between two grids demands (3.1 and 3.7). */
static void check_edge(const struct topology_spec *encoder, const struct topology_spec *language,
                       bool colocated, struct errors *errors)
{
    const int source = encoder->num_ranks / (encoder->tp * encoder->cp * encoder->pp);
    const int dest = language->num_ranks / (language->tp * language->cp * language->pp);
    if (encoder->cp != 1 || language->cp != 1)
        errors_add(errors, EXIT_DECK,
                   "context parallelism beside an encoder must be 1: encoder cp %d, language cp %d",
                   encoder->cp, language->cp);
    if (source % dest != 0 && dest % source != 0)
        errors_add(
            errors, EXIT_DECK,
            "%d encoder lanes (dp) and %d language lanes (dp): one must be a multiple of the other",
            source, dest);
    if (colocated && (encoder->pp != 1 || language->pp != 1))
        errors_add(errors, EXIT_DECK,
                   "colocated grids must have pp 1: encoder pp %d, language pp %d", encoder->pp,
                   language->pp);
}

/* ---- description ---- */

/* A grid as a rank outside it sees it. */
static void no_member(struct grid *g, const char *name)
{
    *g = (struct grid){ .name = name,
                        .tp_rank = -1,
                        .cp_rank = -1,
                        .dp_rank = -1,
                        .pp_rank = -1,
                        .ep_rank = -1,
                        .expt_tp_rank = -1,
                        .expt_dp_rank = -1 };
    for (int f = 0; f < N_FAMILIES; f++)
        group_of(g, &families[f])->rank = -1;
}

static void describe_grid(struct grid *g, const struct topology_spec *s, int rank, int **next)
{
    g->present = true;
    g->offset = s->offset;
    g->size = s->num_ranks;
    g->member = rank >= g->offset && rank < g->offset + g->size;
    g->tp_size = s->tp;
    g->cp_size = s->cp;
    g->pp_size = s->pp;
    g->dp_size = g->size / (s->tp * s->cp * s->pp);
    g->ep_size = s->ep;
    g->expt_tp_size = s->expt_tp;
    g->expt_dp_size = g->size / (s->expt_tp * s->ep * s->pp);
    if (g->member) {
        const int x = rank - g->offset;
        g->tp_rank = x % g->tp_size;
        g->cp_rank = x / g->tp_size % g->cp_size;
        g->dp_rank = x / (g->tp_size * g->cp_size) % g->dp_size;
        g->pp_rank = x / (g->tp_size * g->cp_size * g->dp_size);
        g->expt_tp_rank = x % g->expt_tp_size;
        g->ep_rank = x / g->expt_tp_size % g->ep_size;
        g->expt_dp_rank = x / (g->expt_tp_size * g->ep_size) % g->expt_dp_size;
    }
    for (int f = 0; f < N_FAMILIES; f++) {
        struct group *group = group_of(g, &families[f]);
        if (!g->member)
            continue;
        group->member = *next;
        group->size = list_members(g, &families[f], rank, *next, &group->rank, NULL);
        *next += group->size;
    }
}

static int rank_at(const struct grid *g, int tp, int cp, int dp, int pp)
{
    return g->offset + tp + g->tp_size * (cp + g->cp_size * (dp + g->dp_size * pp));
}

/* tp x cp ranks of one lane at one stage: consecutive. */
static void describe_lane(struct group *lane, const struct grid *g, int stage, int rank, int **next)
{
    if (!g->member || g->pp_rank != stage)
        return;
    lane->size = g->tp_size * g->cp_size;
    lane->member = *next;
    const int first = rank_at(g, 0, 0, g->dp_rank, stage);
    for (int i = 0; i < lane->size; i++)
        *(*next)++ = first + i;
    lane->rank = rank - first;
}

static int compare_ranks(const void *a, const void *b)
{
    return *(const int *)a - *(const int *)b;
}

/* The ranks that exchange messages: sorted, those that lead on both sides once. */
static void list_leaders(struct bridge_map *b, int rank, int **next)
{
    int *member = *next;
    memcpy(member, b->source_leader, (size_t)b->n_source * sizeof *member);
    memcpy(member + b->n_source, b->dest_leader, (size_t)b->n_dest * sizeof *member);
    qsort(member, (size_t)b->n_source + (size_t)b->n_dest, sizeof *member, compare_ranks);
    for (int i = 0; i < b->n_source + b->n_dest; i++) {
        if (i > 0 && member[i] == member[b->leaders.size - 1])
            continue;
        if (member[i] == rank)
            b->leaders.rank = b->leaders.size;
        member[b->leaders.size++] = member[i];
    }
    b->leaders.member = member;
    *next += b->leaders.size;
}

static void describe_bridge(struct topology *t, int **next)
{
    struct bridge_map *b = &t->bridge;
    const struct grid *e = &t->encoder, *l = &t->language;
    const bool colocated = t->layout == DECK_LAYOUT_COLOCATED;
    b->n_source = e->dp_size;
    b->n_dest = l->dp_size;
    b->fan = b->n_source > b->n_dest ? b->n_source / b->n_dest : b->n_dest / b->n_source;
    b->source_leader = *next;
    for (int d = 0; d < b->n_source; d++)
        *(*next)++ = rank_at(e, colocated ? 0 : e->tp_size - 1, e->cp_size - 1, d, e->pp_size - 1);
    b->dest_leader = *next;
    for (int d = 0; d < b->n_dest; d++)
        *(*next)++ = rank_at(l, 0, 0, d, 0);
    if (!colocated || b->n_source > b->n_dest)
        list_leaders(b, t->rank, next);
    describe_lane(&b->source_lane, e, e->pp_size - 1, t->rank, next);
    if (!colocated)
        describe_lane(&b->dest_lane, l, 0, t->rank, next);
}

/* Enough ints for every list of one rank: each family has at most the grid's ranks. */
static size_t members_needed(const struct topology_spec *specs, int n_specs)
{
    size_t n = 0;
    for (int i = 0; i < n_specs; i++)
        n += (size_t)specs[i].num_ranks * (N_FAMILIES + 3);
    return n;
}

static void view_sizes(const struct grid *g, int view, int sizes[DIMS])
{
    sizes[0] = view == 0 ? g->tp_size : g->expt_tp_size;
    sizes[1] = view == 0 ? g->cp_size : g->ep_size;
    sizes[2] = view == 0 ? g->dp_size : g->expt_dp_size;
    sizes[3] = g->pp_size;
}

static int family_size(const struct grid *g, const struct family *f)
{
    int sizes[DIMS], n = 1;
    view_sizes(g, f->view, sizes);
    for (int d = 0; d < DIMS; d++)
        n *= f->varies[d] ? sizes[d] : 1;
    return n;
}

/* The group of `rank`: members ascending, its position, and the number of the group among those of
 * the family. */
static int list_members(const struct grid *g, const struct family *f, int rank, int *member,
                        int *position, int *index)
{
    int sizes[DIMS], x = rank - g->offset, stride = 1, n = 1, at = 0, which = 0, groups = 1,
                     base = 0;
    int strides[DIMS];
    view_sizes(g, f->view, sizes);
    for (int d = 0; d < DIMS; d++) {
        const int coordinate = x % sizes[d];
        x /= sizes[d];
        strides[d] = stride;
        if (f->varies[d]) {
            at += coordinate * n;
            n *= sizes[d];
        } else {
            base += coordinate * stride;
            which += coordinate * groups;
            groups *= sizes[d];
        }
        stride *= sizes[d];
    }
    for (int i = 0; i < n; i++) {
        int rest = i, r = g->offset + base;
        for (int d = 0; d < DIMS; d++)
            if (f->varies[d]) {
                r += rest % sizes[d] * strides[d];
                rest /= sizes[d];
            }
        member[i] = r;
    }
    if (position)
        *position = at;
    if (index)
        *index = which;
    return n;
}

static struct group *group_of(struct grid *g, const struct family *f)
{
    return (struct group *)((char *)g + f->offset);
}

/* ---- communicators ---- */

/* Two families of one view that vary the same dims of more than one rank are the same groups: one
 * communicator serves both. The views stay apart even where their groups agree, because experts and
 * dense layers communicate at the same time. */
static int first_equal_family(const struct grid *g, int f)
{
    int sizes[DIMS];
    view_sizes(g, families[f].view, sizes);
    for (int other = 0; other < f; other++) {
        bool equal = families[other].view == families[f].view;
        for (int d = 0; d < DIMS; d++)
            equal = equal && (sizes[d] == 1 || families[other].varies[d] == families[f].varies[d]);
        if (equal)
            return other;
    }
    return f;
}

static void connect_grid(struct topology *t, struct grid *g)
{
    int *member = xmalloc((size_t)g->size, sizeof *member);
    for (int f = 0; f < N_FAMILIES; f++) {
        if (family_size(g, &families[f]) == 1)
            continue;
        struct group *group = group_of(g, &families[f]);
        const int equal = first_equal_family(g, f);
        if (equal < f) {
            group->comm = group_of(g, &families[equal])->comm;
            continue;
        }
        int index = -1;
        if (g->member)
            list_members(g, &families[f], t->rank, member, NULL, &index);
        group->comm = make_comm(t, index, g->name, families[f].name);
        ASSERT(!g->member ||
               (group->comm->size == group->size && group->comm->rank == group->rank));
    }
    free(member);
}

static struct comm *make_comm(struct topology *t, int color, const char *first, const char *second)
{
    struct storage *storage = t->storage;
    char name[64];
    snprintf(name, sizeof name, "%s.%s", first, second);
    struct comm *c = comm_split(t->world, color, name);
    if (c)
        storage->owned[storage->n_owned++] = c;
    return c;
}
