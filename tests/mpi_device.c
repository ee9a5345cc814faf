/* ranks: 1 2 4 8 */
/* mpi_device.c - ranks that share GPUs, without any: who shares with whom, the environment that
 * NCCL finds, and whether what they all need fits. A failure is a failed ASSERT, which ends all
 * ranks.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "arena.h"
#include "backend.h"
#include "check.h"
#include "comm.h"
#include "device.h"
#include "mpi_world.h"

static const char *const variables[] = { "NCCL_HOSTID", "NCCL_NET", "NCCL_SOCKET_IFNAME",
                                         "NCCL_MNNVL_ENABLE" };
enum { VARIABLES = sizeof variables / sizeof *variables };

static void clear(void)
{
    for (int i = 0; i < VARIABLES; i++)
        unsetenv(variables[i]);
}

static bool is(const char *name, const char *value)
{
    const char *now = getenv(name);
    return now && strcmp(now, value) == 0;
}

/* Whatever run.ranks_per_gpu allows. */
static void test_a_gpu_each_changes_nothing(struct comm *world)
{
    for (int allowed = 1; allowed <= 2; allowed++) {
        struct device d;
        char why[512] = "";
        clear();
        ASSERT(device_arrange(&d, world, world->size, allowed, why, sizeof why) && !*why);
        ASSERT(d.gpu == world->rank && d.slot == 0 && d.most == 1 && d.gpus == world->size &&
               !d.sharers);
        for (int i = 0; i < VARIABLES; i++)
            ASSERT(!getenv(variables[i]));
        device_free(&d);
    }
}

static void test_ranks_that_share_are_hosts_of_their_own_to_nccl(struct comm *world)
{
    for (int gpus = 1; gpus < world->size; gpus++) {
        struct device d;
        char why[512] = "", host[256] = "", id[300];
        clear();
        ASSERT(device_arrange(&d, world, gpus, world->size, why, sizeof why) && !*why);
        ASSERT(d.gpu == world->rank % gpus && d.slot == world->rank / gpus && d.gpus == gpus);
        ASSERT(d.most == (world->size + gpus - 1) / gpus);
        ASSERT(d.sharers && d.sharers->rank == d.slot);
        ASSERT(d.sharers->size == (world->size - d.gpu + gpus - 1) / gpus);
        int64_t same[2] = { d.gpu, -d.gpu };
        comm_host_reduce_i64(d.sharers, same, 2, COMM_MAX);
        ASSERT(same[0] == d.gpu && same[1] == -d.gpu);
        ASSERT(gethostname(host, sizeof host - 1) == 0);
        snprintf(id, sizeof id, "%s-%d", host, d.slot);
        ASSERT(is("NCCL_HOSTID", id) && is("NCCL_NET", "Socket") &&
               is("NCCL_SOCKET_IFNAME", "lo") && is("NCCL_MNNVL_ENABLE", "0"));
        device_free(&d);
        ASSERT(!d.sharers && d.gpu == -1);
    }
}

static void test_what_the_user_has_set_stays(struct comm *world)
{
    struct device d;
    char why[512];
    for (int i = 0; i < VARIABLES; i++)
        setenv(variables[i], "mine", 1);
    ASSERT(device_arrange(&d, world, 1, world->size, why, sizeof why));
    for (int i = 0; i < VARIABLES; i++)
        ASSERT(is(variables[i], "mine"));
    device_free(&d);
    clear();
}

/* One rank that sees no GPU, or too few, stops all, and only who has a reason says it. */
static void test_a_rank_without_a_place_stops_all(struct comm *world)
{
    struct device d;
    char why[512] = "none is visible";
    clear();
    ASSERT(!device_arrange(&d, world, world->rank == 0 ? 0 : world->size, 1, why, sizeof why));
    ASSERT(strcmp(why, world->rank == 0 ? "none is visible" : "") == 0);
    ASSERT(d.gpu == -1 && !d.sharers);
    if (world->size > 1) {
        ASSERT(!device_arrange(&d, world, 1, world->size - 1, why, sizeof why));
        ASSERT(strstr(why, "run.ranks_per_gpu") && d.gpu == -1 && !d.sharers);
    }
    for (int i = 0; i < VARIABLES; i++)
        ASSERT(!getenv(variables[i]));
    device_free(&d);
}

enum { BLOCK = 1024 * ARENA_ALIGN }; /* what each rank wants */

/* Free: what `blocks` ranks want. */
static void memory_of(size_t blocks, size_t *available, size_t *total)
{
    *available = blocks * BLOCK;
    *total = 16 * (size_t)BLOCK;
}

static void three(size_t *available, size_t *total)
{
    memory_of(3, available, total);
}
static void four(size_t *available, size_t *total)
{
    memory_of(4, available, total);
}
static void unknown(size_t *available, size_t *total)
{
    *available = *total = SIZE_MAX;
}

static bool fits(struct comm *sharers, void (*memory)(size_t *, size_t *), char *why,
                 size_t why_size)
{
    struct backend_ops be = backend_ref_f32;
    struct arenas as;
    be.memory = memory;
    arenas_init(&as);
    arena_1d(&as.a[ARENA_PARAMS], "half", DTYPE_U8, BLOCK / 2);
    arena_1d(&as.a[ARENA_GRADS], "other half", DTYPE_U8, BLOCK / 2);
    arena_1d(&as.a[ARENA_DATA], "on the host", DTYPE_U8, 100 * BLOCK);
    const bool good = arenas_fit(&as, &be, sharers, why, why_size);
    arenas_free(&as, &be);
    return good;
}

static void test_what_sharers_want_is_added_up(struct comm *world)
{
    char why[1024];
    ASSERT(fits(NULL, four, why, sizeof why));
    ASSERT(fits(world, unknown, why, sizeof why));
    ASSERT(fits(world, four, why, sizeof why) == (world->size <= 4));
    ASSERT(fits(world, world->rank == 0 ? three : four, why, sizeof why) == (world->size <= 3));
    if (world->size > 3) {
        char wanted[64];
        snprintf(wanted, sizeof wanted, "the %d ranks on this GPU need ", world->size);
        ASSERT(strncmp(why, wanted, strlen(wanted)) == 0 && strstr(why, "params") &&
               strstr(why, "grads"));
    }
}

int main(int argc, char **argv)
{
    struct comm *world = mpi_world(&argc, &argv);
    if (!world)
        return EXIT_ENVIRONMENT;
    static const struct {
        const char *name;
        void (*run)(struct comm *);
    } tests[] = {
#define TEST(name) { #name, name }
        TEST(test_a_gpu_each_changes_nothing),
        TEST(test_ranks_that_share_are_hosts_of_their_own_to_nccl),
        TEST(test_what_the_user_has_set_stays),
        TEST(test_a_rank_without_a_place_stops_all),
        TEST(test_what_sharers_want_is_added_up),
    };
    const size_t n = sizeof tests / sizeof *tests;
    if (world->rank == 0)
        printf("1..%zu\n", n);
    for (size_t i = 0; i < n; i++) {
        tests[i].run(world); /* a failure ends the job with its line */
        comm_host_barrier(world);
        if (world->rank == 0) {
            printf("ok %zu - %s\n", i + 1, tests[i].name);
            fflush(stdout);
        }
    }
    comm_finish(world);
    return 0;
}
