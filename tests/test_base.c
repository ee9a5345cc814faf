/* test_base.c - check, log, tensor, arena, rng, timer, code, the reference table's memory
 * operations and the BLAS start. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#include "child.h"
#include "arena.h"
#include "backend.h"
#include "check.h"
#include "code.h"
#include "comm.h"
#include "cuda/cuda_sizes.h"
#include "log.h"
#include "rng.h"
#include "timer.h"

static void temporary_directory(char *path, size_t size)
{
    const char *base = getenv("TMPDIR");
    snprintf(path, size, "%s/mimo_test_XXXXXX", base ? base : "/tmp");
    assert_non_null(mkdtemp(path));
}

static void read_file(const char *path, char *text, size_t size)
{
    FILE *f = fopen(path, "r");
    assert_non_null(f);
    text[fread(text, 1, size - 1, f)] = '\0';
    fclose(f);
}

/* ---- check ---- */

static void fail_plainly(void *arg)
{
    fatal(EXIT_DATA, "src/some.c", 7, "try another file", "cannot read '%s'", "x\ny");
}

static void test_fatal_before_identify_prints_one_error_line_and_a_hint(void **state)
{
    char text[4096];
    assert_int_equal(child_run(fail_plainly, NULL, text, sizeof text), EXIT_DATA);
    assert_string_equal(
        text, "mimo: error: cannot read 'x\\x0ay' (some.c:7)\nmimo: hint: try another file\n");
}

static void fail_identified(void *directory)
{
    check_identify(3, 8, "language", directory);
    check_step(12);
    FATAL(EXIT_WRITE, "no space");
}

static void test_fatal_names_rank_role_host_iteration_and_writes_the_exit_file(void **state)
{
    char dir[256], path[300], text[4096], host[64] = "", expected[256];
    temporary_directory(dir, sizeof dir);
    assert_int_equal(child_run(fail_identified, dir, text, sizeof text), EXIT_WRITE);
    assert_int_equal(gethostname(host, sizeof host), 0);
    snprintf(expected, sizeof expected,
             "mimo: error: [rank 3 language %s] iteration 12: no space (test_base.c:", host);
    assert_memory_equal(text, expected, strlen(expected));
    assert_ptr_equal(strchr(text, '\n'), text + strlen(text) - 1);
    snprintf(path, sizeof path, "%s/EXIT", dir);
    read_file(path, text, sizeof text);
    assert_string_equal(text, "6 3 language 12 no space\n");
    unlink(path);
    rmdir(dir);
}

static void fail_second(void *directory)
{
    check_identify(1, 8, "encoder", directory);
    char path[300];
    snprintf(path, sizeof path, "%s/EXIT", (char *)directory);
    FILE *f = fopen(path, "w"); /* another rank of this run was faster */
    fputs("6 3 language 12 no space\n", f);
    fclose(f);
    FATAL(EXIT_INTERNAL, "me too");
}

static void test_only_the_rank_that_made_the_exit_file_speaks(void **state)
{
    char dir[256], path[300], text[4096];
    temporary_directory(dir, sizeof dir);
    assert_int_equal(child_run(fail_second, dir, text, sizeof text), EXIT_INTERNAL);
    assert_string_equal(text, "");
    snprintf(path, sizeof path, "%s/EXIT", dir);
    read_file(path, text, sizeof text);
    assert_string_equal(text, "6 3 language 12 no space\n");
    /* The same file, left over from an earlier run, silences nobody. */
    assert_int_equal(child_run(fail_identified, dir, text, sizeof text), EXIT_WRITE);
    assert_non_null(strstr(text, "no space"));
    unlink(path);
    rmdir(dir);
}

static void fail_system_call(void *arg)
{
    CHECK_SYS(open("/nonexistent/x", O_RDONLY) >= 0, EXIT_ENVIRONMENT, "opening %s",
              "/nonexistent/x");
}

static void fail_assertion(void *arg)
{
    ASSERT(1 + 1 == 3);
}

static void fail_overflow(void *arg)
{
    xmalloc(SIZE_MAX / 2, 3);
}

static void abort_hook(int code)
{
    _exit(40 + code);
}

static void fail_with_hook(void *arg)
{
    check_on_abort(abort_hook);
    FATAL(EXIT_DATA, "x");
}

static void test_other_ways_to_fail(void **state)
{
    char text[4096];
    assert_int_equal(child_run(fail_system_call, NULL, text, sizeof text), EXIT_ENVIRONMENT);
    assert_non_null(strstr(text, "opening /nonexistent/x: No such file or directory"));
    assert_int_equal(child_run(fail_assertion, NULL, text, sizeof text), EXIT_INTERNAL);
    assert_non_null(strstr(text, "assertion failed: 1 + 1 == 3"));
    assert_int_equal(child_run(fail_overflow, NULL, text, sizeof text), EXIT_ENVIRONMENT);
    assert_non_null(strstr(text, "out of memory"));
    assert_int_equal(child_run(fail_with_hook, NULL, text, sizeof text), 40 + EXIT_DATA);
}

static void print_errors(void *arg)
{
    errors_print(arg);
    _exit(0);
}

static void test_errors_are_collected_and_at_most_20_printed(void **state)
{
    struct errors e = { 0 };
    char text[4096];
    errors_add(&e, EXIT_DATA, "line %d\tx", 0);
    for (int i = 1; i < 25; i++)
        errors_add(&e, EXIT_DECK, "line %d", i);
    assert_int_equal(e.count, 25);
    assert_int_equal(e.worst, EXIT_DATA);
    assert_string_equal(e.line[0], "line 0\\x09x");
    child_run(print_errors, &e, text, sizeof text);
    assert_non_null(strstr(text, "line 19\n... and 5 more\n"));
    assert_null(strstr(text, "line 20"));
    errors_free(&e);
    assert_int_equal(e.count, 0);
}

static void test_printable_escapes_control_characters_and_never_overruns(void **state)
{
    char out[16];
    assert_string_equal(printable(out, sizeof out, "a\x1b[0m\x7f"), "a\\x1b[0m\\x7f");
    assert_string_equal(printable(out, 5, "ab\ncd"), "ab");
    assert_string_equal(printable(out, 1, "ab"), "");
    assert_string_equal(printable(out, sizeof out, "\xc3\xa9"), "\xc3\xa9");
}

static void warn_often(void *path)
{
    if (!log_open(path, true))
        _exit(1);
    for (int i = 0; i < 3; i++)
        log_warn("same");
    for (int i = 0; i < 30; i++)
        log_warn("number %d", i);
    log_close();
    _exit(0);
}

static void test_warnings_are_given_once_and_at_most_20_of_them(void **state)
{
    char dir[256], path[300], text[8192], file[8192];
    temporary_directory(dir, sizeof dir);
    snprintf(path, sizeof path, "%s/run.log", dir);
    assert_int_equal(child_run(warn_often, path, text, sizeof text), 0);
    read_file(path, file, sizeof file);
    assert_string_equal(text, file);
    int same = 0, lines = 0;
    for (const char *p = text; (p = strstr(p, "warning: same\n")); p++)
        same++;
    for (const char *p = text; (p = strchr(p, '\n')); p++)
        lines++;
    assert_int_equal(same, 1);
    assert_int_equal(lines, 21);
    assert_non_null(strstr(text, "warning: 11 more warnings were not shown"));
    assert_false(log_open("/nonexistent/run.log", true));
    assert_true(log_open("/nonexistent/run.log", false));
    log_close();
    unlink(path);
    rmdir(dir);
}

/* ---- tensor ---- */

static void test_tensor_views_address_the_right_elements(void **state)
{
    float x[24];
    for (int i = 0; i < 24; i++)
        x[i] = (float)i;
    const struct tensor t = tensor_view(x, DTYPE_F32, PLACE_HOST, 3, (int64_t[]){ 2, 3, 4 });
    assert_int_equal(tensor_rows(&t), 6);
    assert_int_equal(tensor_cols(&t), 4);
    assert_int_equal(tensor_numel(&t), 24);
    const struct tensor rows = tensor_row_range(&t, 2, 3), part = tensor_col_range(&rows, 1, 2);
    assert_int_equal(tensor_rows(&part), 3);
    assert_int_equal(tensor_cols(&part), 2);
    assert_int_equal(part.ld, 4);
    assert_true(((float *)part.data)[0] == 9.0f && ((float *)part.data)[part.ld + 1] == 14.0f);
    const struct tensor flat = tensor_reshape(&t, 1, (int64_t[]){ 24 });
    assert_int_equal(tensor_rows(&flat), 1);
    const struct tensor none = tensor_2d(NULL, DTYPE_BF16, PLACE_DEVICE, 5, 6),
                        below = tensor_row_range(&none, 3, 2);
    assert_null(below.data);
    assert_int_equal(dtype_bytes(DTYPE_BF16), 2);
    assert_string_equal(dtype_name(DTYPE_I64), "int64");
}

static void reshape_strided(void *arg)
{
    float x[12];
    const struct tensor t = tensor_2d(x, DTYPE_F32, PLACE_HOST, 3, 4),
                        part = tensor_col_range(&t, 0, 2);
    tensor_reshape(&part, 1, (int64_t[]){ 6 });
}

static void range_outside(void *arg)
{
    float x[12];
    const struct tensor t = tensor_2d(x, DTYPE_F32, PLACE_HOST, 3, 4);
    tensor_row_range(&t, 2, 2);
}

static void test_wrong_views_are_refused(void **state)
{
    char text[4096];
    assert_int_equal(child_run(reshape_strided, NULL, text, sizeof text), EXIT_INTERNAL);
    assert_int_equal(child_run(range_outside, NULL, text, sizeof text), EXIT_INTERNAL);
}

/* ---- arena ---- */

static void walk(struct arenas *as, struct tensor out[4])
{
    struct arena *p = &as->a[ARENA_PARAMS], *w = &as->a[ARENA_WORKSPACE];
    out[0] = arena_1d(p, "first", DTYPE_F32, 3);
    out[1] = arena_2d(p, "second", DTYPE_F64, 10, 10);
    const size_t mark = arena_mark(w);
    out[2] = arena_1d(w, "large", DTYPE_U8, 1000);
    arena_rewind(w, mark);
    out[3] = arena_1d(w, "small", DTYPE_U8, 10);
    arena_1d(&as->a[ARENA_DATA], "host", DTYPE_I64, 4);
}

static void test_arena_counts_then_carves_the_same_blocks(void **state)
{
    struct arenas as;
    struct tensor t[4];
    arenas_init(&as);
    walk(&as, t);
    assert_null(t[0].data);
    arenas_commit(&as, &backend_ref_f32);
    walk(&as, t);
    const struct arena *p = &as.a[ARENA_PARAMS], *w = &as.a[ARENA_WORKSPACE];
    assert_int_equal(p->capacity, 256 + 1024); /* 12 and 800 bytes, rounded up to 256 */
    assert_int_equal(w->capacity, 1024);       /* the larger of the two that share */
    assert_ptr_equal(t[2].data, t[3].data);
    assert_ptr_equal((char *)t[1].data - 256, t[0].data);
    assert_int_equal((uintptr_t)t[0].data % ARENA_ALIGN, 0);
    assert_int_equal(p->n_blocks, 2);
    assert_string_equal(p->block[1].name, "second");
    assert_int_equal(p->block[1].bytes, 800);
    for (int i = 0; i < 100; i++)
        assert_true(((double *)t[1].data)[i] == 0.0);
    assert_int_equal(as.a[ARENA_DATA].place, PLACE_HOST);
    assert_int_equal(as.a[ARENA_GRADS].capacity, 0);
    arenas_free(&as, &backend_ref_f32);
}

static void second_walk_differs(void *what)
{
    struct arenas as;
    struct tensor t[4];
    arenas_init(&as);
    walk(&as, t);
    arenas_commit(&as, &backend_ref_f32);
    struct arena *p = &as.a[ARENA_PARAMS];
    switch (*(int *)what) {
    case 0: arena_1d(p, "other", DTYPE_F32, 3); break;       /* name */
    case 1: arena_1d(p, "first", DTYPE_F32, 4); break;       /* size */
    case 2: arena_2d(p, "second", DTYPE_F64, 10, 10); break; /* order */
    case 3:
        walk(&as, t);
        arena_1d(p, "third", DTYPE_F32, 1);
        break;
    case 4: arena_1d(p, "huge", DTYPE_F64, INT64_MAX / 2); break;
    default: break;
    }
}

static void test_arena_refuses_a_second_walk_that_differs(void **state)
{
    char text[4096];
    for (int what = 0; what < 4; what++) {
        assert_int_equal(child_run(second_walk_differs, &what, text, sizeof text), EXIT_INTERNAL);
        assert_non_null(strstr(text, "arena params"));
    }
    assert_int_equal(child_run(second_walk_differs, &(int){ 4 }, text, sizeof text), EXIT_DECK);
    assert_int_equal(child_run(second_walk_differs, &(int){ 5 }, text, sizeof text), 0);
}

/* ---- rng ---- */

static void test_philox_matches_the_published_known_answers(void **state)
{
    /* Random123, kat_vectors: philox 4x32, 10 rounds. */
    static const struct {
        uint64_t hi, lo;
        uint32_t key[2], out[4];
    } kat[] = {
        { 0, 0, { 0, 0 }, { 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8 } },
        { UINT64_MAX,
          UINT64_MAX,
          { 0xffffffff, 0xffffffff },
          { 0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd } },
        { 0x0370734413198a2eu,
          0x85a308d3243f6a88u,
          { 0xa4093822, 0x299f31d0 },
          { 0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1 } },
    };
    for (size_t i = 0; i < sizeof kat / sizeof *kat; i++) {
        uint32_t out[4];
        rng_philox((struct rng_key){ { kat[i].key[0], kat[i].key[1] } }, kat[i].hi, kat[i].lo, out);
        assert_memory_equal(out, kat[i].out, sizeof out);
    }
}

static void test_rng_key_depends_on_seed_and_purpose(void **state)
{
    const struct rng_key a = rng_key(1234, "cpe"), b = rng_key(1234, "cpf"),
                         c = rng_key(1235, "cpe"), d = rng_key(1234, "cpe");
    assert_memory_not_equal(&a, &b, sizeof a);
    assert_memory_not_equal(&a, &c, sizeof a);
    assert_memory_equal(&a, &d, sizeof a);
}

static void test_rng_uniform_and_normal_have_their_moments(void **state)
{
    const struct rng_key key = rng_key(7, "moments");
    const int n = 200000;
    double u = 0, u2 = 0, z = 0, z2 = 0, z4 = 0;
    for (int i = 0; i < n; i++) {
        const double x = rng_uniform_at(key, (uint64_t)i), y = rng_normal_at(key, (uint64_t)i);
        assert_true(x >= 0 && x < 1 && isfinite(y));
        u += x;
        u2 += x * x;
        z += y;
        z2 += y * y;
        z4 += y * y * y * y;
    }
    /* Five standard deviations of each mean. */
    assert_true(fabs(u / n - 0.5) < 5 * sqrt(1.0 / 12 / n));
    assert_true(fabs(u2 / n - 1.0 / 3) < 5 * sqrt(4.0 / 45 / n));
    assert_true(fabs(z / n) < 5 / sqrt(n));
    assert_true(fabs(z2 / n - 1) < 5 * sqrt(2.0 / n));
    assert_true(fabs(z4 / n - 3) < 5 * sqrt(96.0 / n));
    assert_true(rng_uniform_at(key, 5) == rng_uniform(key, 0, 2, 1));
}

static void test_rng_below_covers_its_range_evenly(void **state)
{
    const struct rng_key key = rng_key(7, "below");
    int count[7] = { 0 };
    for (uint64_t i = 0; i < 70000; i++) {
        const uint64_t x = rng_below(key, 3, i, 7);
        assert_true(x < 7);
        count[x]++;
    }
    for (int i = 0; i < 7; i++)
        assert_true(abs(count[i] - 10000) < 500);
    assert_int_equal(rng_below(key, 0, 0, 1), 0);
}

/* ---- timer ---- */

static void nap(double seconds)
{
    nanosleep(&(struct timespec){ .tv_nsec = (long)(1e9 * seconds) }, NULL);
}

static void test_timer_sections_are_exclusive_and_never_exceed_the_wall(void **state)
{
    double s[TIMER_ROWS], sum = 0;
    timer_reset();
    timer_start(TIMER_FORWARD);
    nap(0.02);
    timer_start(TIMER_BRIDGE_WAIT);
    nap(0.04);
    timer_stop(TIMER_BRIDGE_WAIT);
    timer_stop(TIMER_FORWARD);
    nap(0.01);
    const double wall = timer_take_iteration(s);
    for (int i = 0; i < TIMER_SECTIONS; i++)
        sum += s[i];
    assert_true(fabs(sum - wall) < 1e-9 + 1e-6 * wall);
    assert_true(s[TIMER_BRIDGE_WAIT] >= 0.04 && s[TIMER_FORWARD] >= 0.02 && s[TIMER_IDLE] >= 0.01);
    assert_true(s[TIMER_FORWARD] < s[TIMER_FORWARD] + s[TIMER_BRIDGE_WAIT] &&
                s[TIMER_FORWARD] <= wall - 0.05);
    timer_take_iteration(s);
    assert_true(s[TIMER_FORWARD] == 0 && s[TIMER_BRIDGE_WAIT] == 0);
    struct timer_sample sample;
    timer_take_sample(&sample, 1);
    assert_int_equal(sample.calls[TIMER_FORWARD], 1);
    assert_true(sample.seconds[TIMER_BRIDGE_WAIT] >= 0.04);
    assert_true(sample.recent[TIMER_BRIDGE_WAIT] == sample.seconds[TIMER_BRIDGE_WAIT]);
    timer_take_sample(&sample, 1);
    assert_true(sample.recent[TIMER_BRIDGE_WAIT] == 0 && sample.seconds[TIMER_BRIDGE_WAIT] >= 0.04);
}

/* Parts count inside forward and backward only, and do not shorten them; a part lasts until the
 * next. */
static void test_timer_parts_are_parts_of_forward_and_backward(void **state)
{
    struct timer_sample s;
    double seconds[TIMER_ROWS];
    timer_reset();
    timer_part(TIMER_MAMBA);
    nap(0.01);
    timer_start(TIMER_FORWARD);
    timer_part(TIMER_ROUTER);
    nap(0.02);
    timer_part(TIMER_EXPERTS);
    nap(0.02);
    timer_start(TIMER_DATA_WAIT); /* pauses the section and its part */
    nap(0.03);
    timer_stop(TIMER_DATA_WAIT);
    timer_part(TIMER_NO_PART);
    nap(0.01);
    timer_stop(TIMER_FORWARD);
    timer_start(TIMER_EVAL);
    timer_part(TIMER_ROUTER);
    nap(0.01);
    timer_stop(TIMER_EVAL);
    timer_take_sample(&s, 0);
    assert_true(s.seconds[TIMER_MAMBA] == 0 && s.calls[TIMER_MAMBA] == 0);
    assert_true(s.seconds[TIMER_ROUTER] >= 0.02 && s.calls[TIMER_ROUTER] == 1);
    assert_true(s.seconds[TIMER_EXPERTS] >= 0.02 && s.seconds[TIMER_DATA_WAIT] >= 0.03);
    assert_true(s.seconds[TIMER_ROUTER] + s.seconds[TIMER_EXPERTS] <=
                s.seconds[TIMER_FORWARD] - 0.01);
    assert_true(s.seconds[TIMER_FORWARD] + s.seconds[TIMER_DATA_WAIT] + s.seconds[TIMER_EVAL] +
                    s.seconds[TIMER_IDLE] <=
                s.wall * (1 + 1e-9));
    timer_take_iteration(seconds);
    assert_true(seconds[TIMER_FORWARD] >= 0.05);
}

static void stop_another_section(void *arg)
{
    timer_start(TIMER_FORWARD);
    timer_stop(TIMER_BACKWARD);
}

static void collect(void *ctx, const char *text)
{
    strcat(strcat(ctx, text), "\n");
}

static void test_timer_table_has_min_mean_max_rank_and_a_note(void **state)
{
    static const char *const roles[] = { "encoder", "language" };
    struct timer_sample s[3] = { { .role = 0, .wall = 10 },
                                 { .role = 1, .wall = 10 },
                                 { .role = 1, .wall = 10 } };
    char text[8192] = "";
    s[0].seconds[TIMER_FORWARD] = 9;
    s[0].calls[TIMER_FORWARD] = 4;
    s[1].seconds[TIMER_FORWARD] = 5;
    s[2].seconds[TIMER_FORWARD] = 7;
    s[1].calls[TIMER_FORWARD] = s[2].calls[TIMER_FORWARD] = 4;
    s[1].seconds[TIMER_BRIDGE_WAIT] = 2;
    s[2].seconds[TIMER_BRIDGE_WAIT] = 1;
    s[1].seconds[TIMER_DISPATCH] = s[2].seconds[TIMER_DISPATCH] = 3;
    s[1].calls[TIMER_DISPATCH] = 8;
    timer_table(s, 3, roles, 2, collect, text);
    assert_non_null(strstr(text, "timers: encoder, 1 rank, 10.000 s\n"));
    assert_non_null(strstr(
        text, "forward             4       5.0000       6.0000       7.0000        2    60.0\n"));
    assert_non_null(strstr(text, "NOTE: 15 % of the language ranks' time was spent waiting for the "
                                 "encoder grid; give that one more ranks\n"));
    assert_non_null(strstr(
        text,
        "  of these:\n  moe dispatch        8       3.0000       3.0000       3.0000        1    30.0\n"));
    assert_non_null(strstr(
        text, "NOTE: 30 % of the language ranks' time was spent moving tokens to their experts"));
    assert_null(strstr(text, "of the encoder ranks' time"));
    assert_null(strstr(text, "times as long"));
    s[1].seconds[TIMER_MAMBA] = 2; /* 2 and 4.2 seconds for the same work */
    s[2].seconds[TIMER_MAMBA] = 4;
    s[2].seconds[TIMER_SHARED] = 0.2;
    timer_table(s, 3, roles, 2, collect, text);
    assert_non_null(strstr(
        text,
        "NOTE: rank 2 took 1.4 times as long as the language ranks do on average for the same work; a slow or shared host?\n"));
    /* Every cause has its line. */
    s[0].seconds[TIMER_SAVE] = 2;
    s[0].seconds[TIMER_DATA_WAIT] = 3;
    text[0] = '\0';
    timer_table(s, 3, roles, 2, collect, text);
    assert_non_null(
        strstr(text, "NOTE: 30 % of the encoder ranks' time was spent waiting for data"));
    assert_non_null(strstr(text, "NOTE: 20 % of the encoder ranks' time was spent saving"));
    assert_int_equal(child_run(stop_another_section, NULL, text, sizeof text), EXIT_INTERNAL);
}

/* ---- code, backend ---- */

static void test_features_name_version_git_and_libraries(void **state)
{
    char *text = NULL;
    size_t size = 0;
    FILE *f = open_memstream(&text, &size);
    code_print_features(f);
    fclose(f);
    static const char *const keys[] = { "version=", "\ngit=",  "\ncuda=", "\nnccl=",
                                        "\ncudnn=", "\nhdf5=", "\nmpi=" };
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++)
        assert_non_null(strstr(text, keys[i]));
    assert_non_null(strstr(text, code_version()));
    if (backend_cuda_missing())
        assert_non_null(strstr(text, "\ncuda=no\n"));
    for (const char *line = text; *line; line = strchr(line, '\n') + 1) {
        const char *equal = strchr(line, '=');
        assert_true(equal && equal < strchr(line, '\n') && equal[1] != '\n');
    }
    free(text);
}

static void test_ref_copy_respects_row_strides(void **state)
{
    float a[12], b[20];
    for (int i = 0; i < 12; i++)
        a[i] = (float)i;
    for (int i = 0; i < 20; i++)
        b[i] = -1;
    const struct tensor all = tensor_2d(a, DTYPE_F32, PLACE_HOST, 3, 4),
                        src = tensor_col_range(&all, 1, 2);
    const struct tensor big = tensor_2d(b, DTYPE_F32, PLACE_DEVICE, 4, 5),
                        wide = tensor_col_range(&big, 3, 2), dst = tensor_row_range(&wide, 1, 3);
    backend_ref_f32.copy(NULL, &src, &dst);
    assert_true(b[8] == 1 && b[9] == 2 && b[13] == 5 && b[14] == 6 && b[18] == 9 && b[19] == 10);
    assert_true(b[3] == -1 && b[7] == -1 && b[12] == -1 && b[17] == -1);
    const struct tensor line = tensor_1d(b, DTYPE_F32, PLACE_HOST, 12);
    backend_ref_f32.copy(NULL, &all, &line);
    assert_memory_equal(a, b, sizeof a);
}

static void test_ref_fill_and_cast_round_to_nearest_even(void **state)
{
    float f[4] = { 0 };
    const struct tensor t = tensor_2d(f, DTYPE_F32, PLACE_HOST, 2, 2),
                        right = tensor_col_range(&t, 1, 1);
    backend_ref_f32.fill(NULL, &right, 2.5);
    assert_true(f[0] == 0 && f[1] == 2.5f && f[2] == 0 && f[3] == 2.5f);
    int32_t i[2];
    const struct tensor ti = tensor_1d(i, DTYPE_I32, PLACE_HOST, 2);
    backend_ref_f32.fill(NULL, &ti, -7);
    assert_true(i[0] == -7 && i[1] == -7);
    /* bf16 has 8 significant bits: 1 + 2^-8 is a tie between 1 and 1 + 2^-7; a hair above it must
     * go up even where the float of it is the tie itself. */
    const double in[] = { 1 + 0x1p-8,
                          1 + 0x1p-8 + 0x1p-40,
                          1 + 3 * 0x1p-8,
                          -(1 + 0x1p-8 + 0x1p-40),
                          1e300,
                          -INFINITY,
                          NAN,
                          0x1p-133 };
    const uint16_t out[] = { 0x3f80, 0x3f81, 0x3f82, 0xbf81, 0x7f80, 0xff80, 0, 0x0001 };
    uint16_t b[8];
    float back[8];
    const struct tensor d = tensor_1d((void *)in, DTYPE_F64, PLACE_HOST, 8),
                        tb = tensor_1d(b, DTYPE_BF16, PLACE_HOST, 8),
                        tf = tensor_1d(back, DTYPE_F32, PLACE_HOST, 8);
    backend_ref_f64.cast(NULL, &d, &tb);
    backend_ref_f64.cast(NULL, &tb, &tf);
    for (int k = 0; k < 8; k++)
        if (k != 6)
            assert_int_equal(b[k], out[k]);
    assert_true(isnan(back[6]) && back[1] == 1.0078125f && back[7] == 0x1p-133f);
}

static void test_every_operation_of_both_tables_is_present(void **state)
{
    const struct backend_ops *table[] = { &backend_ref_f32, &backend_ref_f64 };
    assert_int_equal(table[0]->acc, DTYPE_F32);
    assert_int_equal(table[1]->act, DTYPE_F64);
    for (int t = 0; t < 2; t++) {
        /* From the first function pointer on, the struct holds nothing else. */
        const size_t first = offsetof(struct backend_ops, alloc);
        for (size_t at = first; at < sizeof *table[t]; at += sizeof(void *)) {
            void *entry;
            memcpy(&entry, (const char *)table[t] + at, sizeof entry);
            const bool optional = at == offsetof(struct backend_ops, grouped_act_forward) ||
                                  at == offsetof(struct backend_ops, grouped_act_backward);
            if (!entry && !optional)
                fail_msg("table %d: the entry at byte %zu is empty", t, at);
        }
    }
    void *p = table[0]->alloc(1);
    assert_int_equal((uintptr_t)p % 256, 0);
    table[0]->release(p);
}

/* The program anew with OPENBLAS_CORETYPE as given (NULL: unset) and "from stdin" on its standard
 * input. */
static void exec_with_core(void *core)
{
    int pipes[2];
    if (core)
        setenv("OPENBLAS_CORETYPE", core, 1);
    else
        unsetenv("OPENBLAS_CORETYPE");
    if (pipe(pipes) != 0 || write(pipes[1], "from stdin\n", 11) != 11)
        _exit(98);
    close(pipes[1]);
    dup2(pipes[0], STDIN_FILENO);
    execl("/proc/self/exe", "test_base", "--core", "argument", (char *)NULL);
}

/* What it then does: say which kernels it has, the warning, its arguments and its input. */
static int tell_core(int argc, char **argv)
{
    char warning[256], input[64] = "";
    const char *core = backend_blas_core(warning, sizeof warning);
    if (!fgets(input, sizeof input, stdin))
        return 97;
    fprintf(stderr, "%s|%s|%s %d|%s", core, warning, argv[argc - 1], argc, input);
    return 0;
}

static void test_blas_start_restarts_once_with_the_widest_kernels(void **state)
{
    char text[1024], core[64];
    assert_int_equal(child_run(exec_with_core, NULL, text, sizeof text), 0);
    assert_int_equal(sscanf(text, "%63[^|]", core), 1);
    assert_non_null(
        strstr(text, "||argument 3|from stdin\n")); /* no warning, arguments and input intact */
    /* A choice of the user stands, and is warned about if the CPU could do more. */
    assert_int_equal(child_run(exec_with_core, "Prescott", text, sizeof text), 0);
    if (strcmp(core, "SkylakeX") == 0 || strcmp(core, "Haswell") == 0) {
        assert_memory_equal(text, "Prescott|", 9);
        assert_non_null(strstr(text, "start with OPENBLAS_CORETYPE="));
    }
    backend_blas_threads(1);
}

/* What is planned for the longest segment must do for every shorter one, whose pieces may come
 * closer to the cap (heads * rows^2 * 2 bytes, cuda_sizes.h). */
static void test_attention_work_for_the_longest_segment_does_for_shorter_ones(void **s)
{
    static const int heads[][3] = { { 16, 16, 80 }, { 32, 8, 128 }, { 32, 32, 128 }, { 3, 3, 64 } };
    static const int64_t longest[] = { 1024, 4106, 8192, 20490, 32778, 65546 };
    for (size_t i = 0; i < sizeof heads / sizeof *heads; i++)
        for (size_t k = 0; k < sizeof longest / sizeof *longest; k++) {
            const int n = heads[i][0], g = heads[i][1], d = heads[i][2];
            const int64_t most = longest[k],
                          work = cuda_attention_work(most, 20, most, n, g, d, false);
            for (int64_t len = 128; len <= most; len += 128)
                assert_true(2 * len * len * cuda_attention_chunk(1, len, n, g) + 4 * len * n * d <=
                            work);
        }
    /* 20 packed segments of which one is long run in 32 slots. */
    assert_true(cuda_attention_work(2048, 20, 2048, 8, 8, 128, true) >= 2LL * 2048 * 2048 * 8 * 32);
}

int main(int argc, char **argv)
{
    backend_blas_start(argv);
    if (argc > 1 && strcmp(argv[1], "--core") == 0)
        return tell_core(argc, argv);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_fatal_before_identify_prints_one_error_line_and_a_hint),
        cmocka_unit_test(test_fatal_names_rank_role_host_iteration_and_writes_the_exit_file),
        cmocka_unit_test(test_only_the_rank_that_made_the_exit_file_speaks),
        cmocka_unit_test(test_other_ways_to_fail),
        cmocka_unit_test(test_errors_are_collected_and_at_most_20_printed),
        cmocka_unit_test(test_printable_escapes_control_characters_and_never_overruns),
        cmocka_unit_test(test_warnings_are_given_once_and_at_most_20_of_them),
        cmocka_unit_test(test_tensor_views_address_the_right_elements),
        cmocka_unit_test(test_wrong_views_are_refused),
        cmocka_unit_test(test_arena_counts_then_carves_the_same_blocks),
        cmocka_unit_test(test_arena_refuses_a_second_walk_that_differs),
        cmocka_unit_test(test_philox_matches_the_published_known_answers),
        cmocka_unit_test(test_rng_key_depends_on_seed_and_purpose),
        cmocka_unit_test(test_rng_uniform_and_normal_have_their_moments),
        cmocka_unit_test(test_rng_below_covers_its_range_evenly),
        cmocka_unit_test(test_timer_sections_are_exclusive_and_never_exceed_the_wall),
        cmocka_unit_test(test_timer_parts_are_parts_of_forward_and_backward),
        cmocka_unit_test(test_timer_table_has_min_mean_max_rank_and_a_note),
        cmocka_unit_test(test_features_name_version_git_and_libraries),
        cmocka_unit_test(test_ref_copy_respects_row_strides),
        cmocka_unit_test(test_ref_fill_and_cast_round_to_nearest_even),
        cmocka_unit_test(test_every_operation_of_both_tables_is_present),
        cmocka_unit_test(test_attention_work_for_the_longest_segment_does_for_shorter_ones),
        cmocka_unit_test(test_blas_start_restarts_once_with_the_widest_kernels),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
