/* test_safetensors.c - reading hostile headers, indexes and shards (robustness.md 5.1), the four
 * float types, and files that this program writes. Files are made byte by byte.
 */
#include <inttypes.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>
#include <sys/stat.h>
#include <unistd.h>
#include "bf16.h"
#include "safetensors.h"
#include "scratch.h"

static void put(const char *name, const void *bytes, size_t n)
{
    FILE *f = fopen(file(name), "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(bytes, 1, n, f), n);
    assert_int_equal(fclose(f), 0);
}

static void put_text(const char *name, const char *text)
{
    put(name, text, strlen(text));
}

/* A safetensors file: length, header, data. */
static void put_tensors(const char *name, const char *header, const void *data, size_t bytes)
{
    const size_t n = strlen(header);
    unsigned char *all = calloc(8 + n + bytes, 1);
    for (int i = 0; i < 8; i++)
        all[i] = (unsigned char)(n >> 8 * i);
    memcpy(all + 8, header, n);
    if (bytes)
        memcpy(all + 8 + n, data, bytes);
    put(name, all, 8 + n + bytes);
    free(all);
}

/* ---- headers --------------------------------------------------------------------------------- */

static void refused(const char *header, int64_t data, const char *word)
{
    struct safetensors s = { .n = 0 };
    char why[2048] = "";
    if (safetensors_parse(&s, header, strlen(header), data, why, sizeof why))
        fail_msg("accepted: %.200s", header);
    if (!strstr(why, word))
        fail_msg("'%s' does not say '%s' of %.200s", why, word, header);
    assert_int_equal(s.n, 0);
    safetensors_free(&s);
}

#define T(type, shape, from, to) \
    "{\"dtype\":\"" type "\",\"shape\":[" shape "],\"data_offsets\":[" from "," to "]}"

static void a_header_is_read_whatever_its_order(void **state)
{
    static const char header[] =
        "{\"b\":" T("F32", "2,3", "8", "32") ",\"__metadata__\":{\"format\":\"pt\"},\"empty\":" T(
            "BF16", "0,4", "8", "8") ",\"scalar\":" T("I64", "", "0", "8") "}   ";
    struct safetensors s = { .n = 0 };
    char why[2048], shape[64];
    if (!safetensors_parse(&s, header, strlen(header), 32, why, sizeof why))
        fail_msg("%s", why);
    assert_int_equal(s.n, 3); /* in the order of the data */
    assert_string_equal(s.tensor[0].name, "scalar");
    assert_string_equal(s.tensor[1].name, "empty");
    assert_string_equal(s.tensor[2].name, "b");
    assert_string_equal(safetensors_shape(&s.tensor[2], shape, sizeof shape), "[2,3]");
    assert_int_equal(s.tensor[2].elements, 6);
    assert_int_equal(s.tensor[2].kind, SAFETENSORS_F32);
    assert_int_equal(s.tensor[0].kind, SAFETENSORS_OTHER);
    assert_string_equal(s.tensor[0].type, "I64");
    safetensors_free(&s);
}

static void damaged_json_is_refused(void **state)
{
    refused("", 0, "start with '{'");
    refused(" {}", 0, "start with '{'");
    refused("[]", 0, "start with '{'");
    refused("{", 0, "no JSON");
    refused("{}x", 0, "no JSON");
    refused("{\"a\":" T("F32", "1", "0", "4") "} {}", 4, "no JSON");
    refused("{\"a\xff\":" T("F32", "1", "0", "4") "}", 4, "no JSON");
    refused("{\"a\\u0000b\":" T("F32", "1", "0", "4") "}", 4, "no JSON");
    char deep[64] = "{\"a\":";
    memset(deep + 5, '[', 40);
    refused(deep, 0, "deeper than 8");
}

static void duplicate_names_are_refused(void **state)
{
    refused("{\"a\":" T("F32", "1", "0", "4") ",\"a\":" T("F32", "1", "4", "8") "}", 8,
            "duplicate");
    refused("{\"a\":" T("F32", "1", "0", "4") ",\"\\u0061\":" T("F32", "1", "4", "8") "}", 8,
            "duplicate");
    refused("{\"a\":{\"dtype\":\"F32\",\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4,
            "duplicate");
}

static void wrong_entries_are_refused(void **state)
{
    refused("{\"a\":1}", 0, "must be an object");
    refused("{\"a\":{\"dtype\":\"F32\",\"shape\":[1]}}", 4, "must be an object");
    refused("{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4],\"more\":1}}", 4,
            "must be an object");
    refused("{\"__metadata__\":1}", 0, "__metadata__");
    refused("{\"a\":" T("F31", "1", "0", "4") "}", 4, "unknown: F31");
    refused("{\"a\":{\"dtype\":7,\"shape\":[1],\"data_offsets\":[0,4]}}", 4, "no string");
    refused("{\"a\\u001b[31m\":" T("X", "1", "0", "4") "}", 4, "a\\x1b[31m");
    refused("{\"a\":" T("F32", "-1", "0", "4") "}", 4, "size in shape");
    refused("{\"a\":" T("F32", "1.0", "0", "4") "}", 4, "size in shape");
    refused("{\"a\":" T("F32", "1,1,1,1,1,1,1", "0", "4") "}", 4, "list of at most");
    refused("{\"a\":{\"dtype\":\"F32\",\"shape\":{},\"data_offsets\":[0,4]}}", 4,
            "list of at most");
    char name[400] = "{\"";
    memset(name + 2, 'n', 300);
    strcpy(name + 302, "\":" T("F32", "1", "0", "4") "}");
    refused(name, 4, "300 bytes");
}

static void hostile_sizes_are_refused(void **state)
{
    refused("{\"a\":" T("F32", "4294967296,4294967296", "0", "0") "}", 0, "more than 2^63");
    refused("{\"a\":" T("F64", "2305843009213693952", "0", "0") "}", 0, "do not fill 0 bytes");
    refused("{\"a\":" T("F32", "9223372036854775808", "0", "0") "}", 0, "no JSON");
    refused("{\"a\":" T("F32", "2", "0", "4") "}", 4, "do not fill 4 bytes");
    refused("{\"a\":" T("F4", "3", "0", "1") "}", 1, "do not fill");
    refused("{\"a\":" T("F32", "1", "NaN", "4") "}", 4, "no JSON");
    refused("{\"a\":" T("F32", "1", "0", "4.0") "}", 4, "two integers");
    refused("{\"a\":" T("F32", "1", "-4", "0") "}", 4, "two integers");
    refused("{\"a\":" T("F32", "1", "\"0\"", "4") "}", 4, "two integers");
    refused("{\"a\":" T("F32", "1", "1e0", "5") "}", 8, "two integers");
    refused("{\"a\":" T("F32", "1", "4", "0") "}", 4, "data_offsets [4,0]");
    refused("{\"a\":" T("F32", "1", "4", "8") "}", 4, "of 4 bytes of data");
    refused("{\"a\":" T("F32", "1", "0", "18446744073709551620") "}", 4, "no JSON");
}

static void overlaps_and_holes_are_refused(void **state)
{
    refused("{\"a\":" T("F32", "1", "4", "8") "}", 8, "hole");
    refused("{\"a\":" T("F32", "1", "0", "4") "}", 8, "end at byte 4 of 8");
    refused("{\"a\":" T("F32", "2", "0", "8") ",\"b\":" T("F32", "2", "4", "12") "}", 12,
            "overlaps");
    refused("{\"a\":" T("F32", "1", "0", "4") ",\"b\":" T("F32", "1", "8", "12") "}", 12, "hole");
    refused("{\"a\":" T("F32", "2", "0", "8") ",\"b\":" T("F32", "2", "0", "8") "}", 8, "overlaps");
}

/* Very many values take much memory in a JSON library: they are counted before it sees them. */
static void swarms_of_values_are_refused(void **state)
{
    enum { MANY = 8 << 20 };
    char *text = malloc(2 * MANY + 64);
    size_t n = (size_t)sprintf(text, "{\"a\":[1");
    for (int i = 0; i < MANY; i++)
        n += (size_t)sprintf(text + n, ",1");
    strcpy(text + n, "]}");
    refused(text, 0, "more than");
    free(text);
}

/* ---- files ----------------------------------------------------------------------------------- */

static void open_refused(const char *path, int lines, const char *word)
{
    struct safetensors s;
    struct errors e = { 0 };
    assert_false(safetensors_open(&s, file(path), &e));
    if (e.count != lines)
        errors_print(&e);
    assert_int_equal(e.count, lines);
    assert_int_equal(e.worst, EXIT_CHECKPOINT);
    if (!strstr(e.line[0], word))
        fail_msg("'%s' does not say '%s'", e.line[0], word);
    assert_null(s.tensor);
    errors_free(&e);
}

static void damaged_files_are_refused(void **state)
{
    static const unsigned char huge[16] = { 255, 255, 255, 255, 255, 255, 255, 255, '{', '}' },
                               long_header[10] = { 3, 0, 0, 0, 0, 0, 0, 0, '{', '}' };
    open_refused("absent", 1, "No such file");
    put("short", "1234567", 7);
    open_refused("short", 1, "has 7 bytes");
    put("huge", huge, sizeof huge);
    open_refused("huge", 1, "claims a header of 18446744073709551615");
    put("cut", long_header, sizeof long_header);
    open_refused("cut", 1, "claims a header of 3 bytes in a file of 10");
    put_tensors("truncated", "{\"a\":" T("F32", "2", "0", "8") "}", "1234567", 7);
    open_refused("truncated", 1, "of 7 bytes of data");
    assert_int_equal(mkdir(file("nothing"), 0777), 0);
    open_refused("nothing", 1, "neither");
    assert_int_equal(mkfifo(file("fifo"), 0666), 0);
    open_refused("fifo", 1, "not a regular file");
    char path[1200];
    memset(path, 'p', sizeof path - 1);
    path[sizeof path - 1] = '\0';
    struct safetensors s;
    struct errors e = { 0 };
    assert_false(safetensors_open(&s, path, &e));
    assert_non_null(strstr(e.line[0], "too long"));
    errors_free(&e);
}

static void put_shards(const char *map)
{
    static const float a[2] = { 1, 2 }, b[1] = { 3 };
    mkdir(file("d"), 0777);
    put_tensors("d/model-1.safetensors", "{\"a\":" T("F32", "2", "0", "8") "}", a, sizeof a);
    put_tensors("d/model-2.safetensors", "{\"b\":" T("F32", "1", "0", "4") "}", b, sizeof b);
    char *index = xasprintf("{\"metadata\":{\"total_size\":12},\"weight_map\":{%s}}", map);
    put_text("d/model.safetensors.index.json", index);
    free(index);
}

static void shards_are_joined_by_their_index(void **state)
{
    put_shards("\"b\":\"model-2.safetensors\",\"a\":\"model-1.safetensors\"");
    struct safetensors s;
    struct errors e = { 0 };
    if (!safetensors_open(&s, file("d"), &e))
        errors_print(&e);
    assert_int_equal(s.n, 2);
    assert_int_equal(s.n_files, 2);
    struct safetensors_access a = { .s = &s };
    double x[2] = { 0 };
    assert_true(safetensors_read(&a, safetensors_find(&s, "b"), 0, 1, x, &e));
    assert_true(x[0] == 3);
    assert_true(safetensors_read(&a, safetensors_find(&s, "a"), 1, 1, x, &e));
    assert_true(x[0] == 2);
    assert_null(safetensors_find(&s, "c"));
    /* A file that changed while the run was going on. */
    assert_int_equal(truncate(file("d/model-2.safetensors"), 50), 0);
    assert_false(safetensors_read(&a, safetensors_find(&s, "b"), 0, 1, x, &e));
    assert_non_null(strstr(e.line[0], "it had"));
    safetensors_close(&a, &e);
    safetensors_free(&s);
    errors_free(&e);
}

static void index_and_shards_must_agree(void **state)
{
    put_shards("\"a\":\"model-1.safetensors\",\"b\":\"model-1.safetensors\"");
    open_refused("d", 1, "b: the index places it in model-1.safetensors");
    put_shards("\"a\":\"model-2.safetensors\",\"b\":\"model-1.safetensors\"");
    open_refused("d", 2, "the index places it");
    put_shards(
        "\"a\":\"model-1.safetensors\",\"b\":\"model-2.safetensors\",\"c\":\"model-2.safetensors\"");
    open_refused("d", 1, "c: the index places it");
    put_shards("\"b\":\"model-2.safetensors\"");
    struct safetensors s;
    struct errors e = { 0 };
    assert_true(safetensors_open(&s, file("d"),
                                 &e)); /* a file that the index does not name is not part of it */
    assert_int_equal(s.n, 1);
    safetensors_free(&s);
    put_shards("\"a\":\"model-1.safetensors\",\"b\":\"model-3.safetensors\"");
    open_refused("d", 1, "model-3.safetensors: error: No such file");
    put_shards("\"a\":\"model-1.safetensors\",\"b\":\"model-2.safetensors\"");
    put_tensors("d/model-2.safetensors", "{\"a\":" T("F32", "1", "0", "4") "}", "abcd", 4);
    open_refused("d", 1, "a: is in model-1.safetensors and in model-2.safetensors");
}

static void an_index_cannot_leave_its_directory(void **state)
{
    static const char *const names[] = { "model.safetensors.index.json",
                                         "../d/model-1.safetensors",
                                         "/etc/passwd",
                                         "",
                                         ".safetensors",
                                         "..safetensors",
                                         "x/model-1.safetensors",
                                         "model-1.safetensors/",
                                         "model-1.bin" };
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        char *map = xasprintf("\"a\":\"%s\"", names[i]);
        put_shards(map);
        open_refused("d", 1, "is no name of a .safetensors file");
        free(map);
    }
    put_shards("\"a\":3");
    open_refused("d", 1, "(no string)");
    put_shards("\"a\":\"model-1.safetensors\",\"a\":\"model-2.safetensors\"");
    open_refused("d", 1, "duplicate");
    put_shards("");
    open_refused("d", 1, "no object 'weight_map'");
    put_text("d/model.safetensors.index.json", "[]");
    open_refused("d", 1, "start with '{'");
    /* Files that are links in a ring, an index that is a link to itself. */
    unlink(file("d/model-1.safetensors"));
    put_shards("\"a\":\"model-1.safetensors\"");
    unlink(file("d/model-1.safetensors"));
    assert_int_equal(symlink("model-1.safetensors", file("d/model-1.safetensors")), 0);
    open_refused("d", 1, "Too many levels");
    unlink(file("d/model.safetensors.index.json"));
    unlink(file("d/model-1.safetensors"));
}

/* ---- numbers --------------------------------------------------------------------------------- */

static void the_four_types_are_widened_exactly(void **state)
{
    /* 1, -2, 65504, smallest subnormal, inf of fp16; the same idea in the others */
    static const uint16_t half[6] = { 0x3c00, 0xc000, 0x7bff, 0x0001, 0x7c00, 0x7e00 },
                          bf[4] = { 0x3f80, 0xc000, 0x7f7f, 0x0001 };
    static const double half_is[5] = { 1, -2, 65504, 0x1p-24, INFINITY },
                        bf_is[4] = { 1, -2, 0x1.fep127, 0x1p-133 };
    static const float single[3] = { 0.1f, -0.0f, 0x1p-149f };
    static const double twice[2] = { 0.1, -0x1p-1074 };
    char data[12 + 8 + 12 + 16];
    memcpy(data, half, 12);
    memcpy(data + 12, bf, 8);
    memcpy(data + 20, single, 12);
    memcpy(data + 32, twice, 16);
    put_tensors("four",
                "{\"half\":" T("F16", "6", "0", "12") ",\"bf\":" T(
                    "BF16", "2,2", "12",
                    "20") ",\"single\":" T("F32", "3", "20", "32") ",\"twice\":" T("F64", "2", "32",
                                                                                   "48") "}",
                data, sizeof data);
    struct safetensors s;
    struct errors e = { 0 };
    double x[6];
    assert_true(safetensors_open(&s, file("four"), &e));
    struct safetensors_access a = { .s = &s };
    assert_true(safetensors_read(&a, safetensors_find(&s, "half"), 0, 6, x, &e));
    for (int i = 0; i < 5; i++)
        assert_true(x[i] == half_is[i]);
    assert_true(isnan(x[5]));
    assert_true(safetensors_read(&a, safetensors_find(&s, "bf"), 0, 4, x, &e));
    for (int i = 0; i < 4; i++)
        assert_true(x[i] == bf_is[i]);
    assert_true(safetensors_read(&a, safetensors_find(&s, "single"), 1, 2, x, &e));
    assert_true(x[0] == 0 && signbit(x[0]) && x[1] == (double)single[2]);
    assert_true(safetensors_read(&a, safetensors_find(&s, "twice"), 0, 2, x, &e));
    assert_memory_equal(x, twice, sizeof twice);
    safetensors_close(&a, &e);
    safetensors_free(&s);
}

/* Against the definition: the nearest of the two neighbours, the even one in a tie. */
static void bf16_rounds_once_to_nearest_even(void **state)
{
    static const double x[] = { 1 + 0x1p-8,
                                1 + 0x1p-8 + 0x1p-40,
                                1 + 3 * 0x1p-8,
                                1 + 0x1p-8 - 0x1p-40,
                                -(1 + 0x1p-8 + 0x1p-52),
                                0x1p-134,
                                0x1.8p-133,
                                3e38,
                                3.4e38,
                                1e300 };
    static const double want[] = { 1, 1 + 0x1p-7, 1 + 0x1p-6, 1,        -(1 + 0x1p-7),
                                   0, 0x1p-132,   0x1.c4p127, INFINITY, INFINITY };
    for (size_t i = 0; i < sizeof x / sizeof *x; i++)
        if (bf16_to_float(bf16_from_double(x[i])) != (float)want[i])
            fail_msg("%a became %a, not %a", x[i], (double)bf16_to_float(bf16_from_double(x[i])),
                     want[i]);
    assert_true(isnan(bf16_to_float(bf16_from_double(NAN))));
    for (uint32_t i = 0; i < 65536; i++)
        if (!isnan(bf16_to_float((uint16_t)i)))
            assert_int_equal(bf16_from_double(bf16_to_float((uint16_t)i)), i);
}

/* ---- writing --------------------------------------------------------------------------------- */

static void describe(struct safetensors_tensor *t, const char *name, int kind, int ndim, int64_t a,
                     int64_t b)
{
    *t = (struct safetensors_tensor){ .kind = kind, .ndim = ndim, .shape = { a, b } };
    snprintf(t->name, sizeof t->name, "%s", name);
}

/* Written in pieces out of order, then read by the strict reader. */
static void write_and_read(const char *name, const char *single, int64_t shard_bytes, int n_files)
{
    mkdir(file(name), 0777);
    struct safetensors s = { .n = 4, .tensor = xcalloc(4, sizeof *s.tensor) }, r;
    struct errors e = { 0 };
    snprintf(s.directory, sizeof s.directory, "%s", file(name));
    describe(&s.tensor[0], "odd", SAFETENSORS_BF16, 1, 3, 0);
    describe(&s.tensor[1], "wide", SAFETENSORS_F64, 2, 2, 3);
    describe(&s.tensor[2], "matrix", SAFETENSORS_F32, 2, 5, 4);
    describe(&s.tensor[3], "scalar", SAFETENSORS_F32, 0, 0, 0);
    const bool made = safetensors_create(&s, single, shard_bytes, &e);
    if (!made)
        errors_print(&e);
    assert_true(made);
    assert_int_equal(s.n_files, n_files);
    struct safetensors_access w = { .s = &s, .write = true }, a = { .s = &r };
    static const uint16_t odd[3] = { 0x3f80, 0x4000, 0x4040 };
    static const double wide[6] = { 0.1, 0.2, 0.3, 0.4, 0.5, 0.6 };
    float matrix[20], scalar = 7;
    for (int i = 0; i < 20; i++)
        matrix[i] = (float)i;
    assert_true(safetensors_write(&w, safetensors_find(&s, "matrix"), 12, 8, matrix + 12, &e));
    assert_true(safetensors_write(&w, safetensors_find(&s, "odd"), 0, 3, odd, &e));
    assert_true(safetensors_write(&w, safetensors_find(&s, "wide"), 0, 6, wide, &e));
    assert_true(safetensors_write(&w, safetensors_find(&s, "scalar"), 0, 1, &scalar, &e));
    assert_true(safetensors_write(&w, safetensors_find(&s, "matrix"), 0, 12, matrix, &e));
    assert_true(safetensors_close(&w, &e));
    if (!safetensors_open(&r, file(name), &e))
        errors_print(&e);
    assert_int_equal(e.count, 0);
    assert_int_equal(r.n, 4);
    assert_int_equal(r.n_files, n_files);
    for (int i = 0; i < r.n; i++) {
        assert_string_equal(r.tensor[i].name, s.tensor[i].name);
        assert_int_equal(r.tensor[i].at, s.tensor[i].at);
        if (r.tensor[i].elements > 0)
            assert_int_equal(r.tensor[i].at % (r.tensor[i].bytes / r.tensor[i].elements), 0);
    }
    double x[20];
    assert_true(safetensors_read(&a, safetensors_find(&r, "matrix"), 0, 20, x, &e));
    for (int i = 0; i < 20; i++)
        assert_true(x[i] == i);
    assert_true(safetensors_read(&a, safetensors_find(&r, "odd"), 0, 3, x, &e));
    assert_true(x[0] == 1 && x[1] == 2 && x[2] == 3);
    assert_true(safetensors_read(&a, safetensors_find(&r, "wide"), 0, 6, x, &e));
    assert_memory_equal(x, wide, sizeof wide);
    safetensors_close(&a, &e);
    safetensors_free(&s);
    safetensors_free(&r);
}

static void what_is_written_is_read_back(void **state)
{
    write_and_read("one", NULL, INT64_MAX, 1);
    assert_int_equal(access(file("one/model.safetensors"), F_OK), 0);
    write_and_read("named", "projector.safetensors", 1, 1);
    assert_int_equal(access(file("named/projector.safetensors"), F_OK), 0);
    write_and_read("many", NULL, 1, 4);
    assert_int_equal(access(file("many/model-00004-of-00004.safetensors"), F_OK), 0);
    write_and_read("two", NULL, 90, 2);
}

static void nothing_is_overwritten(void **state)
{
    struct safetensors s = { .n = 1, .tensor = xcalloc(1, sizeof *s.tensor) };
    struct errors e = { 0 };
    snprintf(s.directory, sizeof s.directory, "%s", file("one"));
    describe(&s.tensor[0], "x", SAFETENSORS_F32, 1, 1, 0);
    assert_false(safetensors_create(&s, NULL, INT64_MAX, &e));
    assert_int_equal(e.worst, EXIT_WRITE);
    assert_non_null(strstr(e.line[0], "File exists"));
    safetensors_free(&s);
    errors_free(&e);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_header_is_read_whatever_its_order),
        cmocka_unit_test(damaged_json_is_refused),
        cmocka_unit_test(duplicate_names_are_refused),
        cmocka_unit_test(wrong_entries_are_refused),
        cmocka_unit_test(hostile_sizes_are_refused),
        cmocka_unit_test(overlaps_and_holes_are_refused),
        cmocka_unit_test(swarms_of_values_are_refused),
        cmocka_unit_test(damaged_files_are_refused),
        cmocka_unit_test(shards_are_joined_by_their_index),
        cmocka_unit_test(index_and_shards_must_agree),
        cmocka_unit_test(an_index_cannot_leave_its_directory),
        cmocka_unit_test(the_four_types_are_widened_exactly),
        cmocka_unit_test(bf16_rounds_once_to_nearest_even),
        cmocka_unit_test(what_is_written_is_read_back),
        cmocka_unit_test(nothing_is_overwritten),
    };
    return cmocka_run_group_tests(tests, scratch_setup, scratch_teardown);
}
