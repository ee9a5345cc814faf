/* test_io_kill.c - a job that dies while it saves leaves the previous checkpoint complete; a disk
 * that refuses is exit 6.
 *
 * The test starts itself under mpiexec (MPIEXEC, default mpiexec.mpich) as a job of two ranks that
 * saves one iteration after the other, kills one of its ranks at a random moment, and inspects what
 * the tracker names: every byte must be right.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include "io_internal.h"

enum { RANKS = 2, ELEMENTS = 3 << 19, TRIALS = 8 };

static char self[IO_PATH], scratch[IO_PATH];

/* ---- the job ------------------------------------------------------------------------------- */

/* Save iterations first, first + 1, ... for ever (or `count` of them), each tensor full of its
 * iteration; rank r's pid in <dir>.pid.r. file_limit: no file may grow beyond it; 0 = none. */
static int job(const char *dir, int64_t first, int64_t count, long file_limit)
{
    const struct rlimit limit = { (rlim_t)file_limit, (rlim_t)file_limit };
    static const char text[] =
        "&run backend = 'ref' train_iters = 10 /\n&language preset = 'tiny' /\n&lr lr = 1e-3 /\n";
    struct comm *world;
    struct errors e = { 0 };
    struct deck deck;
    struct topology topo;
    char why[256], path[IO_PATH];
    if (!comm_start(NULL, NULL, &world, why, sizeof why))
        return EXIT_ENVIRONMENT;
    check_on_abort(comm_abort);
    check_identify(world->rank, world->size, "test", NULL);
    signal(SIGXFSZ, SIG_IGN);
    if (file_limit > 0)
        CHECK_SYS(setrlimit(RLIMIT_FSIZE, &limit) == 0, EXIT_INTERNAL, "test");
    memset(&deck, 0, sizeof deck);
    deck_read(&deck, "test", text, strlen(text), 0, NULL, &e);
    deck_resolve(&deck, world->size, &e);
    topology_init(&topo, &deck, world->size, world->rank, &e);
    topology_connect(&topo, world);
    if (e.count)
        return EXIT_DECK;
    snprintf(path, sizeof path, "%.4000s.pid.%d", dir, world->rank);
    FILE *f = fopen(path, "w");
    CHECK_SYS(f && fprintf(f, "%ld\n", (long)getpid()) > 0 && fclose(f) == 0, EXIT_INTERNAL, "%s",
              path);

    struct param p[2] = {
        { .name = "a",
          .module = MODEL_VISION,
          .ndim = 2,
          .shape = { ELEMENTS / 512, 512 },
          .n_blocks = 1 },
        { .name = "b", .module = MODEL_LANGUAGE, .ndim = 1, .shape = { ELEMENTS }, .n_blocks = 1 }
    };
    struct model model = { .param = &p[world->rank], .n_params = 1 };
    float *data = xmalloc(ELEMENTS, sizeof *data);
    p[world->rank].value = tensor_1d(data, DTYPE_F32, PLACE_HOST, ELEMENTS);
    for (int64_t i = first; i < first + count; i++) {
        struct train_state state = { .iteration = i };
        for (int k = 0; k < ELEMENTS; k++)
            data[k] = (float)i;
        checkpoint_save(dir, &deck, &topo, &model, &state, false, true);
    }
    free(data);
    topology_free(&topo);
    deck_free(&deck);
    comm_finish(world);
    return EXIT_OK;
}

/* Start the job; returns the launcher's pid. */
static pid_t start(const char *dir, int64_t first, int64_t count, long file_limit)
{
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid)
        return pid;
    char n[16], from[32], many[32], limit[32];
    const char *mpiexec = getenv("MPIEXEC") ? getenv("MPIEXEC") : "mpiexec.mpich";
    snprintf(n, sizeof n, "%d", RANKS);
    snprintf(from, sizeof from, "%lld", (long long)first);
    snprintf(many, sizeof many, "%lld", (long long)count);
    snprintf(limit, sizeof limit, "%ld", file_limit);
    if (!freopen("/dev/null", "r", stdin) ||
        (!getenv("MIMO_TEST_VERBOSE") && !freopen("/dev/null", "w", stderr)))
        _exit(126);
    execlp(mpiexec, mpiexec, "-n", n, self, "--job", dir, from, many, limit, (char *)NULL);
    _exit(127);
}

static int finish(pid_t pid)
{
    int status;
    assert_int_equal(waitpid(pid, &status, 0), pid);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

/* ---- looking at what is left --------------------------------------------------------------- */

/* The iteration that the tracker names, after all of its checkpoint was found right; -1: no
 * tracker. */
static int64_t latest(const char *dir)
{
    char path[IO_PATH + 64];
    long long iteration = -1;
    snprintf(path, sizeof path, "%s/latest_checkpointed_iteration.txt", dir);
    FILE *f = fopen(path, "r");
    if (!f)
        return -1;
    assert_int_equal(fscanf(f, "%lld", &iteration), 1);
    fclose(f);
    snprintf(path, sizeof path, "%s/iter_%07lld/checkpoint.h5", dir, iteration);
    f = fopen("/dev/null", "w");
    assert_int_equal(io_inspect(path, f), EXIT_OK);
    fclose(f);
    hid_t file = io_open(path, false);
    float *a = xcalloc(ELEMENTS, sizeof *a), *b = xcalloc(ELEMENTS, sizeof *b);
    assert_true(io_get(file, "/model/vision/a", H5T_NATIVE_FLOAT, ELEMENTS, a) &&
                io_get(file, "/model/language/b", H5T_NATIVE_FLOAT, ELEMENTS, b));
    for (int k = 0; k < ELEMENTS; k++)
        assert_true(a[k] == (float)iteration && b[k] == (float)iteration);
    H5Fclose(file);
    free(a);
    free(b);
    return iteration;
}

/* What the tracker says, unchecked; -1 when there is none. */
static long long tracked(const char *dir)
{
    char path[IO_PATH + 64];
    long long iteration = -1;
    snprintf(path, sizeof path, "%s/latest_checkpointed_iteration.txt", dir);
    FILE *f = fopen(path, "r");
    if (f && fscanf(f, "%lld", &iteration) != 1)
        iteration = -1;
    if (f)
        fclose(f);
    return iteration;
}

static void wait_a_little(double seconds)
{
    struct timespec t = { (time_t)seconds, (long)((seconds - (double)(time_t)seconds) * 1e9) };
    nanosleep(&t, NULL);
}

static void p12_94_killed_while_saving_keeps_the_previous_checkpoint(void **unused)
{
    char dir[IO_PATH], path[IO_PATH + 64];
    int64_t done = -1, moved = 0;
    snprintf(dir, sizeof dir, "%.4000s/kill", scratch);
    srand(20);
    for (int trial = 0; trial < TRIALS; trial++) {
        long victim = 0;
        for (int r = 0; r < RANKS; r++) {
            snprintf(path, sizeof path, "%s.pid.%d", dir, r);
            unlink(path);
        }
        snprintf(path, sizeof path, "%s.pid.%d", dir, trial % RANKS);
        pid_t pid = start(dir, done + 1, 1000000, 0);
        for (int i = 0; i < 600 && victim == 0;
             i++) { /* by progress, not by time: the machine may be busy */
            FILE *f = fopen(path, "r");
            if (f && fscanf(f, "%ld", &victim) != 1)
                victim = 0;
            if (f)
                fclose(f);
            if (victim == 0)
                wait_a_little(0.05);
        }
        assert_true(victim > 1);
        /* Every other job is left alone until it has saved once, however slow the machine is. */
        for (int i = 0; trial % 2 && i < 1200 && tracked(dir) == done; i++)
            wait_a_little(0.05);
        wait_a_little(0.02 + 0.3 * rand() / RAND_MAX);
        kill((pid_t)victim, SIGKILL);
        assert_int_not_equal(finish(pid), 0);
        int64_t now = latest(dir);
        assert_true(now >= done);
        moved += now > done;
        done = now;
    }
    assert_true(moved > 0); /* the kills did not all come before the first save */
    assert_int_equal(finish(start(dir, done + 1, 1, 0)), EXIT_OK);
    assert_int_equal(latest(dir), done + 1);
    snprintf(path, sizeof path, "ls -A '%s' | grep -q '^.tmp'", dir);
    assert_int_not_equal(system(path), 0); /* what the killed jobs left is gone */
}

static void refused_write_is_exit_6_and_changes_nothing(void **unused)
{
    char dir[IO_PATH];
    snprintf(dir, sizeof dir, "%.4000s/limit", scratch);
    assert_int_equal(finish(start(dir, 3, 1, 0)), EXIT_OK);
    assert_int_equal(latest(dir), 3);
    assert_int_equal(finish(start(dir, 4, 1, 1 << 20)), EXIT_WRITE);
    assert_int_equal(latest(dir), 3);
}

int main(int argc, char **argv)
{
    char command[2 * IO_PATH];
    if (argc == 6 && strcmp(argv[1], "--job") == 0)
        return job(argv[2], atoll(argv[3]), atoll(argv[4]), atol(argv[5]));
    ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
    snprintf(scratch, sizeof scratch, "%.2000s/mimo-io-kill-XXXXXX",
             getenv("TMPDIR") ? getenv("TMPDIR") : "/tmp");
    if (n < 0 || !mkdtemp(scratch))
        return 1;
    io_start();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(p12_94_killed_while_saving_keeps_the_previous_checkpoint),
        cmocka_unit_test(refused_write_is_exit_6_and_changes_nothing),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    snprintf(command, sizeof command, "rm -rf '%s'", scratch);
    return system(command) != 0 || failed;
}
