/* test_io_damage.c - a checkpoint with one flipped bit anywhere, or cut anywhere, is refused or
 * harmless: never silently wrong, never a crash (robustness.md F13, F14; an unprotected file was
 * silently wrong in 393 of 400 flips).
 *
 * Half the flips hit numbers, half what lies between them: HDF5's own metadata. Each damaged file
 * is loaded in a child process into a model full of zeros; what loads without an error must be bit
 * for bit what was saved.
 */
#include <signal.h>
#include <sys/wait.h>
#include "io_fixture.h"

enum { FLIPS = 400, CUTS = 100, SILENT = 99, SECONDS = 60 };

static const struct checkpoint_options plain = { false, false, false };
static struct job saved, loaded;
static char directory[IO_PATH], file[IO_PATH];
static int64_t bytes;

/* Numbers of the file as runs of bytes. */
static struct extent {
    int64_t at, end;
} * extent;
static int64_t n_extents;

static void find_extents(void)
{
    struct io_manifest m = { 0 };
    struct errors e = { 0 };
    const hid_t f = io_open(file, false);
    assert_true(f >= 0 && io_manifest_get(file, f, &m, &e));
    extent = xcalloc((size_t)m.n_paths, sizeof *extent);
    for (int64_t i = 0; i < m.n_paths; i++) {
        const hid_t set = H5Dopen2(f, m.path[i], H5P_DEFAULT);
        const haddr_t at = H5Dget_offset(set);
        assert_true(at != HADDR_UNDEF);
        extent[n_extents++] =
            (struct extent){ (int64_t)at, (int64_t)(at + H5Dget_storage_size(set)) };
        H5Dclose(set);
    }
    H5Fclose(f);
    io_manifest_free(&m);
}

static bool is_number(int64_t at)
{
    for (int64_t i = 0; i < n_extents; i++)
        if (at >= extent[i].at && at < extent[i].end)
            return true;
    return false;
}

static bool equal(struct job *a, struct job *b)
{
    for (int k = 0; k < a->model.n_params; k++)
        for (int part = 0; part < 4; part++) {
            const struct tensor *x = part_of(&a->model.param[k], part),
                                *y = part_of(&b->model.param[k], part);
            if (x->data &&
                memcmp(x->data, y->data, (size_t)tensor_numel(x) * dtype_bytes(x->dtype)))
                return false;
        }
    for (int i = 0; i < io_n_state_fields; i++)
        if (memcmp((char *)&a->state + io_state_fields[i].offset,
                   (char *)&b->state + io_state_fields[i].offset,
                   io_state_fields[i].kind == IO_STATE_INT ? sizeof(int) : 8))
            return false;
    return memcmp(a->train_position, b->train_position, sizeof a->train_position) == 0 &&
           memcmp(a->valid_position, b->valid_position, sizeof a->valid_position) == 0;
}

/* What becomes of the file as it lies there: EXIT_OK (as saved), EXIT_CHECKPOINT (refused), SILENT,
 * or minus a signal. */
static int outcome(void)
{
    int status;
    fflush(NULL);
    const pid_t pid = fork();
    if (pid == 0) {
        struct errors e = { 0 };
        bool has_optimizer = false;
        alarm(SECONDS);
        check_on_abort(NULL);
        signal(SIGSEGV, SIG_DFL); /* cmocka's would go on with the next test */
        checkpoint_load(directory, 7, &loaded.deck, &loaded.topo, &loaded.model, &loaded.state,
                        &plain, &has_optimizer, &e);
        /* the inspector may find it whole, but must live */
        if (e.count && freopen("/dev/null", "w", stderr))
            io_inspect(file, fopen("/dev/null", "w"));
        _exit(e.count ? (int)e.worst : has_optimizer && equal(&saved, &loaded) ? EXIT_OK : SILENT);
    }
    assert_int_equal(waitpid(pid, &status, 0), pid);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

static int set_up(void **state)
{
    struct stat st;
    job_open(&saved, world, "");
    scribble(&saved, 1);
    checkpoint_save(in_scratch(directory, "damaged"), &saved.deck, &saved.topo, &saved.model,
                    &saved.state, true, true);
    checkpoint_file(file, "damaged", 7);
    if (stat(file, &st))
        return -1;
    bytes = st.st_size;
    job_open(&loaded, world, "");
    for (int k = 0; k < loaded.model.n_params; k++)
        for (int part = 0; part < 4; part++) {
            struct tensor *t = part_of(&loaded.model.param[k], part);
            if (t->data)
                memset(t->data, 0, (size_t)tensor_numel(t) * dtype_bytes(t->dtype));
        }
    memset(loaded.train_position, 0, sizeof loaded.train_position);
    memset(loaded.valid_position, 0, sizeof loaded.valid_position);
    loaded.state = (struct train_state){ .n_train_streams = 3,
                                         .n_valid_streams = 2,
                                         .train_position = loaded.train_position,
                                         .valid_position = loaded.valid_position };
    find_extents();
    return 0;
}

static int clean_up(void **state)
{
    free(extent);
    job_close(&saved);
    job_close(&loaded);
    return 0;
}

static void the_whole_file_loads(void **state)
{
    assert_int_equal(outcome(), EXIT_OK);
    assert_true(n_extents > 100 && bytes > 1 << 20);
}

static void F14_no_flipped_bit_is_silent(void **state)
{
    int refused[2] = { 0 }, harmless[2] = { 0 }, wrong = 0;
    const int fd = open(file, O_RDWR);
    assert_true(fd >= 0);
    srandom(14);
    for (int i = 0; i < FLIPS; i++) {
        const bool number = i % 2;
        int64_t at;
        do
            at = (int64_t)(((uint64_t)random() << 20 ^ (uint64_t)random()) % (uint64_t)bytes);
        while (is_number(at) != number);
        unsigned char byte;
        assert_int_equal(pread(fd, &byte, 1, at), 1);
        const unsigned char flipped = byte ^ (unsigned char)(1u << random() % 8);
        assert_int_equal(pwrite(fd, &flipped, 1, at), 1);
        const int got = outcome();
        assert_int_equal(pwrite(fd, &byte, 1, at), 1);
        refused[number] += got == EXIT_CHECKPOINT;
        harmless[number] += got == EXIT_OK;
        if (got != EXIT_CHECKPOINT && got != EXIT_OK) {
            print_message("byte %lld of %lld, %02x to %02x: %d\n", (long long)at, (long long)bytes,
                          byte, flipped, got);
            wrong++;
        }
    }
    close(fd);
    print_message("numbers: %d refused, %d harmless; metadata: %d refused, %d harmless; %d wrong\n",
                  refused[1], harmless[1], refused[0], harmless[0], wrong);
    assert_int_equal(wrong, 0);
    assert_int_equal(refused[1], FLIPS / 2);
    assert_int_equal(outcome(), EXIT_OK);
}

static void F13_no_cut_is_silent(void **state)
{
    char kept[IO_PATH + 8], command[3 * IO_PATH];
    int wrong = 0;
    snprintf(kept, sizeof kept, "%s.kept", file);
    snprintf(command, sizeof command, "cp '%s' '%s'", file, kept);
    assert_int_equal(system(command), 0);
    srandom(13);
    for (int i = 0; i < CUTS; i++) {
        /* Also just before the end, and to nothing. */
        const int64_t at =
            i < 20 ? bytes - 1 - i
            : i == 20
                ? 0
                : (int64_t)(((uint64_t)random() << 20 ^ (uint64_t)random()) % (uint64_t)bytes);
        assert_int_equal(truncate(file, at), 0);
        const int got = outcome();
        if (got != EXIT_CHECKPOINT) {
            print_message("cut to %lld of %lld bytes: %d\n", (long long)at, (long long)bytes, got);
            wrong++;
        }
        snprintf(command, sizeof command, "dd if='%s' of='%s' bs=64k status=none conv=notrunc",
                 kept, file);
        assert_int_equal(system(command), 0);
    }
    assert_int_equal(wrong, 0);
    assert_int_equal(outcome(), EXIT_OK);
}

int main(int argc, char **argv)
{
    if (!fixture_start(&argc, &argv))
        return 1;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_whole_file_loads),
        cmocka_unit_test(F14_no_flipped_bit_is_silent),
        cmocka_unit_test(F13_no_cut_is_silent),
    };
    return fixture_finish(cmocka_run_group_tests(tests, set_up, clean_up));
}
