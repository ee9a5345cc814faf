/* plan.c - see plan.h. */
#include "plan.h"
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include "bridge.h"
#include "ddp.h"
#include "io_hf.h"
#include "model.h"
#include "moe.h"
#include "optim.h"
#include "schedule.h"
#include "step.h"

enum { SCHEDULE_LINES = 6, ROLES_MAX = 64 };

static void print_counts(const struct deck *deck, FILE *out)
{
    struct model_counts c = model_count(deck);

    fprintf(out, "parameters\n");
    fprintf(out, "  %-46s %18" PRId64 "\n", "language", c.language);
    fprintf(out, "  %-46s %18" PRId64 "\n", "language, active per token", c.language_active);
    fprintf(out, "  %-46s %18" PRId64 "\n", "language, active without input embedding",
            c.language_active_no_embedding);
    fprintf(out, "  %-46s %18" PRId64 "\n", "vision", c.vision);
    fprintf(out, "  %-46s %18" PRId64 "\n", "projector", c.projector);
    fprintf(out, "  %-46s %18" PRId64 "\n\n", "total", c.total);
}

static const struct grid *grid_of(const struct topology *t)
{
    return t->language.member ? &t->language : &t->encoder;
}

static bool same_role(const struct topology *a, const struct topology *b)
{
    return a->language.member == b->language.member && grid_of(a)->pp_rank == grid_of(b)->pp_rank;
}

/* Ranks that differ in nothing but which samples they see share a role: the first of each pipeline
 * stage of each grid stands for it. */
static int find_roles(const struct topology *all, int size, int role[ROLES_MAX])
{
    int n = 0;

    for (int r = 0; r < size && n < ROLES_MAX; r++) {
        const struct grid *g = grid_of(&all[r]);
        if (g->dp_rank == 0 && g->tp_rank == 0 && g->cp_rank == 0)
            role[n++] = r;
    }
    return n;
}

/* Returns the MiB of it that lie on the device. */
static double print_memory_row(const struct deck *deck, const struct topology *t, FILE *out)
{
    const struct backend_ops *be = backend_sizing(deck);
    struct stream stream = { .name = "none" };
    struct bridge *bridge = NULL;
    struct arenas arenas;
    struct model model;
    struct optim optim;
    double total = 0.0, device = 0.0;

    model_init(&model, deck, t, be, &stream);
    optim_init(&optim, deck, t, &model, be, comm_select(deck), &stream);
    if (t->encoder.present)
        bridge = bridge_init(deck, t, comm_select(deck), be, &stream);
    struct step step = { .deck = deck, .model = &model, .bridge = bridge };
    arenas_init(&arenas);
    model_plan(&model, &arenas);
    optim_plan(&optim, &arenas);
    step_plan(&step, &arenas);
    fprintf(out, "  %-10s %5d", topology_role(t), t->rank);
    for (int i = 0; i < ARENA_COUNT; i++) {
        double mib = (double)arenas.a[i].high / 0x1p20;
        fprintf(out, " %12.2f", mib);
        total += mib;
        device += arenas.a[i].place == PLACE_DEVICE ? mib : 0.0;
        free(arenas.a[i].block);
    }
    fprintf(out, " %12.2f\n", total);
    bridge_free(bridge);
    model_free(&model);
    return device;
}

/* The fullest GPU where the ranks, on one host, share as few GPUs as run.ranks_per_gpu allows. */
static void print_shared(const struct deck *deck, const struct topology *all, const int *role,
                         int n_roles, const double *mib, FILE *out)
{
    const int most = (int)deck->run.ranks_per_gpu, gpus = (all[0].size + most - 1) / most;
    int fullest = 0;
    double largest = 0.0;

    for (int g = 0; g < gpus; g++) {
        double sum = 0.0;
        for (int r = g; r < all[0].size; r += gpus)
            for (int i = 0; i < n_roles; i++)
                sum += same_role(&all[r], &all[role[i]]) ? mib[i] : 0.0;
        if (sum > largest) {
            largest = sum;
            fullest = g;
        }
    }
    fprintf(out, "\nmemory, MiB a GPU, %d ranks on %d GPU%s of one host\n  fullest GPU %d, ranks",
            all[0].size, gpus, gpus == 1 ? "" : "s", fullest);
    for (int r = fullest; r < all[0].size; r += gpus)
        fprintf(out, " %d", r);
    fprintf(out, ": %.2f\n", largest);
}

static void print_buffers(const struct deck *deck, const struct topology *t, FILE *out)
{
    const struct backend_ops *be = backend_sizing(deck);
    struct stream stream = { .name = "none" };
    struct model model;

    model_init(&model, deck, t, be, &stream);
    for (int i = 0; i < model.ddp->n; i++) {
        const struct ddp_buffer *b = &model.ddp->buffer[i];
        int64_t parameters = 0;
        for (int k = 0; k < b->n_slots; k++)
            parameters += b->slot[k].numel;
        fprintf(out, "  %-10s %5d %-18s %6d %15" PRId64 " %15" PRId64 " %15" PRId64 " %8d  %s\n",
                topology_role(t), t->rank, b->name, b->group->size, parameters, b->numel,
                b->shard_numel, b->n_buckets,
                b->overlap_reduce   ? b->overlap_gather ? "both" : "reduce"
                : b->overlap_gather ? "gather"
                                    : "none");
    }
    model_free(&model);
}

static void print_memory(const struct deck *deck, const struct topology *all, const int *role,
                         int n_roles, FILE *out)
{
    double mib[ROLES_MAX];

    fprintf(out, "memory, MiB a rank\n  %-10s %5s", "role", "rank");
    for (int i = 0; i < ARENA_COUNT; i++)
        fprintf(out, " %12s", arena_names[i]);
    fprintf(out, " %12s\n", "total");
    for (int i = 0; i < n_roles; i++)
        mib[i] = print_memory_row(deck, &all[role[i]], out);
    if (deck->run.ranks_per_gpu > 1)
        print_shared(deck, all, role, n_roles, mib, out);
    fprintf(out, "\ngradient buffers\n  %-10s %5s %-18s %6s %15s %15s %15s %8s  %s\n", "role",
            "rank", "of", "shards", "parameters", "elements", "owned", "buckets", "overlap");
    for (int i = 0; i < n_roles; i++)
        print_buffers(deck, &all[role[i]], out);
    fputc('\n', out);
}

/* The first lines of a list; long ones repeat themselves. */
static void print_schedule(const struct schedule *s, FILE *out)
{
    char *text = NULL, *line;
    size_t bytes = 0;
    int n = 0;
    FILE *f = open_memstream(&text, &bytes);

    CHECK_SYS(f != NULL, EXIT_ENVIRONMENT, "schedule");
    schedule_print(s, f);
    fclose(f);
    for (line = text; *line && n < SCHEDULE_LINES; n++) {
        size_t length = strcspn(line, "\n");
        fprintf(out, "    %.*s\n", (int)length, line);
        line += length + (line[length] == '\n');
    }
    if (*line)
        fprintf(out, "    ... %d actions in all\n", s->n);
    free(text);
}

static void print_schedules(const struct deck *deck, const struct topology *all, int size,
                            const int *role, int n_roles, FILE *out, struct errors *errors)
{
    struct schedule *list = xcalloc((size_t)size, sizeof *list);
    int nmb = (int)deck->derived.num_microbatches;
    bool encoder_trains = !deck->derived.freeze_encoder || !deck->derived.freeze_projector;

    for (int r = 0; r < size; r++)
        schedule_build(&list[r], &all[r], nmb, false, encoder_trains);
    bool sound = schedule_verify(list, all, size, errors);
    fprintf(out, "schedule, %d micro-batches, %s for all %d ranks\n", nmb,
            sound ? "verified" : "NOT SOUND", size);
    for (int i = 0; i < n_roles; i++) {
        const struct schedule *s = &list[role[i]];
        fprintf(out, "  %s, rank %d, activation slots: %d encoder, %d language\n",
                topology_role(&all[role[i]]), role[i], s->encoder_slots, s->language_slots);
        print_schedule(s, out);
    }
    if (strchr(deck->derived.pattern, 'E'))
        moe_print_order(deck, out);
    for (int r = 0; r < size; r++)
        schedule_free(&list[r]);
    free(list);
}

void plan_print(const struct deck *deck, int size, FILE *out, struct errors *errors)
{
    struct topology *all;
    int role[ROLES_MAX], n_roles, before = errors->count;

    deck_echo(deck, out);
    fputc('\n', out);
    if (deck->derived.no_backend)
        fprintf(out, "note: this deck is for GPUs, it is sized for them: %s\n",
                deck->derived.no_backend);
    if (!deck->derived.complete)
        return;
    print_counts(deck, out);
    all = xcalloc((size_t)size, sizeof *all);
    for (int r = 0; r < size && errors->count == before; r++)
        topology_init(&all[r], deck, size, r, errors);
    if (errors->count == before) {
        topology_print(&all[0], out);
        fputc('\n', out);
        n_roles = find_roles(all, size, role);
        print_memory(deck, all, role, n_roles, out);
        if (import_wanted(deck))
            import_print(deck, all, role, n_roles, out, errors);
        print_schedules(deck, all, size, role, n_roles, out, errors);
        for (int r = 0; r < size; r++)
            topology_free(&all[r]);
    }
    free(all);
}
