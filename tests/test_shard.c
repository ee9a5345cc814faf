/* test_shard.c - finding shards, walking tar headers, refusing hostile archives (shard.h). Hostile
 * archives are built byte by byte (tar_build.h).
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#include "child.h"
#include "sample.h"
#include "shard.h"
#include "scratch.h"
#include "tar_build.h"

static int init(struct shard_set *set, const char *path, struct errors *errors)
{
    memset(errors, 0, sizeof *errors);
    shard_init(set, path, "deck.nml:1:1: error: data.train_data_path", errors);
    return errors->count;
}

/* The archive is refused with one line that holds all of the texts, and exit class 4. */
static void refused(struct tar *t, const char *a, const char *b)
{
    struct shard_set set;
    struct errors errors;
    tar_write(t, file("hostile.tar"));
    if (init(&set, file("hostile.tar"), &errors) != 1)
        fail_msg("%d errors instead of one with '%s' and '%s'", errors.count, a, b);
    assert_int_equal(errors.worst, EXIT_DATA);
    assert_non_null(strstr(errors.line[0], "hostile.tar"));
    if (!strstr(errors.line[0], a) || !strstr(errors.line[0], b))
        fail_msg("'%s' lacks '%s' or '%s'", errors.line[0], a, b);
    errors_free(&errors);
    shard_free(&set);
}

/* The last part of the sample. */
static void contains(struct shard_set *set, int64_t sample, const char *text)
{
    unsigned char *buffer = NULL;
    int64_t capacity = 0;
    char why[128];
    const struct shard_part *part = shard_parts(set, sample) + set->sample[sample].n_parts - 1;
    assert_true(shard_read(set, sample, part, 1000, &buffer, &capacity, why, sizeof why));
    assert_string_equal((char *)buffer, text);
    free(buffer);
}

static void samples_are_runs_of_members_that_agree_up_to_the_first_dot(void **state)
{
    struct tar t = { 0 };
    tar_text(&t, "a/0001.jpg", "J");
    tar_text(&t, "a/0001.json", "{}");
    tar_text(&t, "a/0001.1.jpg", "K");
    tar_text(&t, "b/0001.txt", "other directory, other sample");
    tar_text(&t, "b.d/0002.txt", "a dot of the directory does not count");
    tar_text(&t, "./c/0003.txt", "x");
    tar_end(&t);
    tar_write(&t, file("s.tar"));
    struct shard_set set;
    struct errors errors;
    assert_int_equal(init(&set, file("s.tar"), &errors), 0);
    assert_int_equal(set.n_samples, 4);
    char key[64];
    assert_string_equal(shard_key(&set, 0, key, sizeof key), "s.tar:a/0001");
    assert_string_equal(shard_key(&set, 1, key, sizeof key), "s.tar:b/0001");
    assert_string_equal(shard_key(&set, 2, key, sizeof key), "s.tar:b.d/0002");
    assert_string_equal(shard_key(&set, 3, key, sizeof key), "s.tar:c/0003");
    assert_int_equal(set.sample[0].n_parts, 3);
    assert_string_equal(shard_part_name(&set, shard_parts(&set, 0) + 2), "1.jpg");
    unsigned char *buffer = NULL;
    int64_t capacity = 0;
    char why[128];
    assert_true(
        shard_read(&set, 1, shard_parts(&set, 1), 100, &buffer, &capacity, why, sizeof why));
    assert_string_equal((char *)buffer, "other directory, other sample");
    assert_false(
        shard_read(&set, 1, shard_parts(&set, 1), 10, &buffer, &capacity, why, sizeof why));
    assert_non_null(strstr(why, "29 bytes"));
    free(buffer);
    shard_free(&set);
}

static void members_without_a_part_are_ignored_and_counted(void **state)
{
    struct tar t = { 0 };
    tar_header(&t, "dir/", '5', 0);
    tar_text(&t, "README", "no dot");
    tar_text(&t, ".hidden", "begins with a dot");
    tar_text(&t, "__meta__/x.txt", "reserved component");
    tar_text(&t, "x.txt", "sample");
    tar_end(&t);
    tar_write(&t, file("i.tar"));
    struct shard_set set;
    struct errors errors;
    assert_int_equal(init(&set, file("i.tar"), &errors), 0);
    assert_int_equal(set.n_samples, 1);
    assert_int_equal(set.ignored, 3);
    shard_free(&set);
}

static void long_names_of_gnu_ustar_and_pax_are_read(void **state)
{
    char name[200], record[256];
    memset(name, 'n', 150);
    snprintf(name + 150, sizeof name - 150, "/k.txt");
    struct tar t = { 0 };
    tar_header(&t, "././@LongLink", 'L', strlen(name) + 1);
    tar_data(&t, name, strlen(name) + 1);
    tar_text(&t, "short.txt", "gnu");
    name[0] = 'p';
    const int length = 4 + 5 + (int)strlen(name) + 1;
    snprintf(record, sizeof record, "%d path=%s\n", length, name);
    assert_int_equal(strlen(record), length);
    tar_header(&t, "PaxHeader/x", 'x', strlen(record));
    tar_data(&t, record, strlen(record));
    tar_text(&t, "short.txt", "pax");
    unsigned char *h = tar_header(&t, "k.txt", '0', 5);
    memcpy(h + 345, "prefix/of/ustar", 15);
    tar_sum(h);
    tar_data(&t, "ustar", 5);
    tar_end(&t);
    tar_write(&t, file("long.tar"));
    struct shard_set set;
    struct errors errors;
    assert_int_equal(init(&set, file("long.tar"), &errors), 0);
    assert_int_equal(set.n_samples, 3);
    char key[256];
    assert_memory_equal(shard_key(&set, 0, key, sizeof key), "long.tar:nnn", 12);
    assert_memory_equal(shard_key(&set, 1, key, sizeof key), "long.tar:pnn", 12);
    assert_string_equal(shard_key(&set, 2, key, sizeof key), "long.tar:prefix/of/ustar/k");
    for (int i = 0; i < 3; i++)
        contains(&set, i, i == 0 ? "gnu" : i == 1 ? "pax" : "ustar");
    shard_free(&set);
}

/* Whole archives of the tar that writes most shards, in every format it knows: the place of each
 * member, read from its headers alone, is where its bytes lie. */
static void archives_of_gnu_tar_are_read_in_every_format(void **state)
{
    static const char *const format[] = { "v7", "oldgnu", "gnu", "ustar", "posix" };
    char command[2048], text[64], key[512];
    snprintf(
        command, sizeof command,
        "set -e; mkdir -p '%s/in/sub' && cd '%s/in' && long=$(printf '%%090d' 7) && mkdir -p $long && "
        "for i in 1 2 3 4; do printf 'text %%d' $i > sub/$i.txt; head -c ${i}000 /dev/zero > sub/$i.jpg; done && "
        "printf 'text 5' > $long/$long.txt && : > sub/3.cls",
        dir, dir);
    assert_int_equal(system(command), 0);
    for (size_t f = 0; f < sizeof format / sizeof *format; f++) {
        const int samples = f == 0 ? 4 : 5; /* v7 has no room for the long name */
        snprintf(command, sizeof command,
                 "cd '%s/in' && tar --format=%s --sort=name -b %d -cf ../f.tar sub %s", dir,
                 format[f], f % 2 ? 1 : 20, samples == 5 ? "0*" : "");
        assert_int_equal(system(command), 0);
        struct shard_set set;
        struct errors errors;
        if (init(&set, file("f.tar"), &errors) != 0)
            fail_msg("%s: %s", format[f], errors.line[0]);
        assert_int_equal(set.n_samples, samples);
        for (int i = 0; i < samples; i++) {
            snprintf(text, sizeof text, "text %d", i + 1);
            contains(&set, i, text);
            const struct shard_part *part = shard_parts(&set, i);
            if (i < 4)
                assert_int_equal(part[i == 2].size, 1000 * (i + 1));
            assert_non_null(
                strstr(shard_key(&set, i, key, sizeof key), i < 4 ? "sub/" : "/0000000"));
        }
        shard_free(&set);
    }
}

static void a_pax_size_replaces_the_header_s(void **state)
{
    struct tar t = { 0 };
    tar_header(&t, "PaxHeader/x", 'x', 10);
    tar_data(&t, "10 size=3\n", 10);
    tar_header(&t, "x.txt", '0', 0);
    tar_data(&t, "abc", 3);
    tar_text(&t, "y.txt", "next");
    tar_end(&t);
    tar_write(&t, file("p.tar"));
    struct shard_set set;
    struct errors errors;
    assert_int_equal(init(&set, file("p.tar"), &errors), 0);
    assert_int_equal(set.n_samples, 2);
    assert_int_equal(shard_parts(&set, 0)->size, 3);
    shard_free(&set);
}

static void names_that_leave_the_archive_are_refused(void **state)
{
    struct tar t = { 0 };
    tar_text(&t, "/etc/passwd.txt", "x");
    tar_end(&t);
    refused(&t, "/etc/passwd.txt", "absolute");
    tar_text(&t, "a/../../b.txt", "x");
    tar_end(&t);
    refused(&t, "a/../../b.txt", "'..'");
    tar_text(&t, "..", "x");
    tar_end(&t);
    refused(&t, "'..'", "name holds");
    tar_text(&t, "a\033[2J.txt", "x");
    tar_end(&t);
    refused(&t, "\\x1b", "letters, digits and");
    tar_text(&t, "a b.txt", "x");
    tar_end(&t);
    refused(&t, "'a b.txt'", "letters, digits and");
    tar_text(&t, "a\xc3\xa9.txt", "x");
    tar_end(&t);
    refused(&t, "member 'a", "letters, digits and");
    tar_text(&t, "", "x");
    tar_end(&t);
    refused(&t, "empty", "member");
}

static void links_devices_and_sparse_members_are_refused(void **state)
{
    static const struct {
        char type;
        const char *word;
    } bad[] = {
        { '1', "link" }, { '2', "link" },   { '3', "device" },       { '4', "device" },
        { '6', "fifo" }, { 'S', "sparse" }, { 'D', "unknown type" }, { '~', "unknown type" },
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct tar t = { 0 };
        tar_text(&t, "good.txt", "x");
        unsigned char *h = tar_header(&t, "evil.txt", bad[i].type, 0);
        memcpy(h + 157, "/etc/passwd", 11);
        tar_sum(h);
        tar_end(&t);
        refused(&t, "evil.txt", bad[i].word);
    }
    struct tar t = { 0 };
    const char *record = "22 GNU.sparse.major=1\n";
    tar_header(&t, "PaxHeader/evil", 'x', strlen(record));
    tar_data(&t, record, strlen(record));
    tar_text(&t, "evil.txt", "x");
    tar_end(&t);
    refused(&t, "PaxHeader/evil", "sparse");
}

static void sizes_that_lie_are_refused(void **state)
{
    struct tar t = { 0 };
    unsigned char *h = tar_header(&t, "huge.txt", '0', 1);
    memcpy(h + 124, "77777777777", 12);
    tar_sum(h);
    tar_end(&t);
    refused(&t, "huge.txt", "8589934591 bytes");

    /* the first header decides what kind of file it is */
    h = tar_header(&t, "first.txt", '0', 0);
    memcpy(h + 124, "12x", 3);
    tar_sum(h);
    tar_end(&t);
    refused(&t, "byte 0", "not a tar file");

    tar_text(&t, "good.txt", "x");
    h = tar_header(&t, "base256.txt", '0', 0); /* 2^88: more than 64 bits hold */
    memset(h + 124, 0, 12);
    h[124] = 0x80;
    h[124] |= 0x01;
    tar_sum(h);
    tar_end(&t);
    refused(&t, "base256.txt", "negative or no number");

    tar_text(&t, "good.txt", "x");
    h = tar_header(&t, "minus.txt", '0', 0); /* base 256, -1 */
    memset(h + 124, 0xff, 12);
    tar_sum(h);
    tar_end(&t);
    refused(&t, "minus.txt", "negative or no number");

    tar_text(&t, "good.txt", "x");
    h = tar_header(&t, "almost.txt", '0', 0); /* base 256, 2^63 - 1 */
    memset(h + 124, 0, 12);
    h[124] = 0x80;
    h[128] = 0x7f;
    memset(h + 129, 0xff, 7);
    tar_sum(h);
    tar_end(&t);
    refused(&t, "almost.txt", "9223372036854775807 bytes");

    tar_text(&t, "good.txt", "x");
    h = tar_header(&t, "letters.txt", '0', 0);
    memcpy(h + 124, "12x", 3);
    tar_sum(h);
    tar_end(&t);
    refused(&t, "letters.txt", "no number");

    tar_header(&t, "PaxHeader/x", 'x', 11);
    tar_data(&t, "11 size=-3\n", 11);
    tar_text(&t, "x.txt", "x");
    tar_end(&t);
    refused(&t, "PaxHeader/x", "negative");

    tar_header(&t, "PaxHeader/x", 'x', 12);
    tar_data(&t, "99 path=abc\n", 12);
    tar_text(&t, "x.txt", "x");
    tar_end(&t);
    refused(&t, "PaxHeader/x", "damaged");

    tar_header(&t, "PaxHeader/g", 'g', 10);
    tar_data(&t, "10 size=3\n", 10);
    tar_text(&t, "x.txt", "x");
    tar_end(&t);
    refused(&t, "member 'x.txt'", "global");
}

/* Where readers of tar differ, an archive could show one member to this program and another to the
 * next. */
static void headers_that_readers_understand_differently_are_refused(void **state)
{
    struct tar t = { 0 };
    const char *record;
    record = "12 path=a\0b\n"; /* a NUL ends the name for some */
    tar_header(&t, "PaxHeader/x", 'x', 12);
    tar_data(&t, record, 12);
    tar_text(&t, "x.txt", "x");
    tar_end(&t);
    refused(&t, "member 'a'", "second path");

    record = "14 path=a.txt\n14 path=b.txt\n";
    tar_header(&t, "PaxHeader/x", 'x', strlen(record));
    tar_data(&t, record, strlen(record));
    tar_text(&t, "x.txt", "x");
    tar_end(&t);
    refused(&t, "member 'b.txt'", "second path");

    tar_header(&t, "PaxHeader/x", 'x', 11);
    tar_data(&t, "11 size=1k\n", 11);
    tar_text(&t, "x.txt", "x");
    tar_end(&t);
    refused(&t, "member 'x.txt'", "second size");

    record = "24 SCHILY.realsize=1000\n";
    tar_header(&t, "PaxHeader/x", 'x', strlen(record));
    tar_data(&t, record, strlen(record));
    tar_text(&t, "x.txt", "x");
    tar_end(&t);
    refused(&t, "member 'x.txt'", "sparse");

    unsigned char *h = tar_header(&t, "x.txt", '0', 1);
    /* GNU: the real size of a sparse file, in a plain one */
    memcpy(h + 257, "ustar  ", 8);
    memcpy(h + 483, "00000001000", 11);
    tar_sum(h);
    tar_data(&t, "x", 1);
    tar_end(&t);
    refused(&t, "member 'x.txt'", "contradict");

    /* some skip these bytes, some read them as a header */
    tar_header(&t, "dir/", '5', 512);
    tar_header(&t, "hidden.txt", '0', 0);
    tar_end(&t);
    refused(&t, "member 'dir/'", "contradict");

    /* types that libarchive follows or takes for plain files */
    static const char odd[] = "AVXMN";
    for (int i = 0; odd[i]; i++) {
        tar_text(&t, "good.txt", "x");
        tar_header(&t, "odd.txt", odd[i], 0);
        tar_text(&t, "x.txt", "x");
        tar_end(&t);
        refused(&t, "at byte 1024", "unknown type");
    }
    for (int i = 0; i < 40; i++) {
        tar_header(&t, "PaxHeader/x", 'x', 13);
        tar_data(&t, "13 comment=x\n", 13);
    }
    tar_text(&t, "x.txt", "x");
    tar_end(&t);
    refused(&t, "at byte 0", "PaxHeader/x");
    tar_text(&t, "good.txt", "x"); /* a header that nothing follows */
    tar_header(&t, "PaxHeader/x", 'x', 13);
    tar_data(&t, "13 comment=x\n", 13);
    tar_end(&t);
    refused(&t, "PaxHeader/x", "Damaged");
}

/* An owner's name in another character set is nobody's business here. */
static void names_of_owners_do_not_matter(void **state)
{
    struct tar t = { 0 };
    tar_header(&t, "PaxHeader/x", 'x', 15);
    tar_data(&t, "15 uname=J\xc3\xb6rg\n", 15);
    tar_text(&t, "x.txt", "pax");
    tar_header(&t, "PaxHeader/x", 'x', 14);
    tar_data(&t, "14 uname=J\xf6rg\n", 14);
    tar_text(&t, "y.txt", "latin");
    tar_end(&t);
    tar_write(&t, file("u.tar"));
    struct shard_set set;
    struct errors errors;
    if (init(&set, file("u.tar"), &errors) != 0)
        fail_msg("%s", errors.line[0]);
    assert_int_equal(set.n_samples, 2);
    contains(&set, 0, "pax");
    contains(&set, 1, "latin");
    shard_free(&set);
}

/* As GNU tar writes them. */
static void sparse_archives_of_gnu_tar_are_refused(void **state)
{
    static const char *const format[] = { "gnu", "posix --sparse-version=0.0",
                                          "posix --sparse-version=0.1",
                                          "posix --sparse-version=1.0" };
    char command[512];
    for (size_t f = 0; f < sizeof format / sizeof *format; f++) {
        snprintf(
            command, sizeof command,
            "mkdir -p '%s/holes' && cd '%s/holes' && for i in 1 2 3 4 5 6; do "
            "printf 1 | dd of=a.txt bs=1 seek=${i}00000 conv=notrunc 2>/dev/null; done && tar -S --format=%s -cf ../h.tar a.txt",
            dir, dir, format[f]);
        assert_int_equal(system(command), 0);
        struct shard_set set;
        struct errors errors;
        assert_int_equal(init(&set, file("h.tar"), &errors), 1);
        assert_int_equal(errors.worst, EXIT_DATA);
        if (!strstr(errors.line[0], "it is sparse"))
            fail_msg("%s: %s", format[f], errors.line[0]);
        errors_free(&errors);
        shard_free(&set);
    }
}

static void truncated_and_damaged_archives_are_refused(void **state)
{
    struct tar t = { 0 };
    refused(&t, "byte 0", "truncated");
    tar_text(&t, "a.txt", "x"); /* cut at a member's boundary: no end mark */
    refused(&t, "a.txt", "end-of-archive");
    tar_text(&t, "a.txt", "x");
    tar_header(&t, "b.txt", '0', 5000);
    tar_data(&t, "only this", 9);
    refused(&t, "b.txt", "truncated");
    tar_text(&t, "a.txt", "x");
    tar_text(&t, "b.txt", "x");
    t.n = 1024 + 100;
    refused(&t, "a.txt", "end-of-archive");
    tar_text(&t, "a.txt", "x");
    tar_text(&t, "b.txt", "x");
    tar_end(&t);
    t.bytes[1024 + 3] ^= 1; /* one bit of the second header */
    refused(&t, "after member 'a.txt'", "damaged header");
    memcpy(tar_room(&t, 700), "this is a letter", 16);
    refused(&t, "byte 0", "not a tar file");
    tar_text(&t, "a.txt", "x");
    tar_end(&t);
    tar_text(&t, "b.txt", "behind the end");
    tar_end(&t);
    refused(&t, "byte 2048", "joined archives");
}

static void compressed_shards_are_refused_with_the_command(void **state)
{
    static const struct {
        const char *magic;
        size_t n;
        const char *command;
    } known[] = {
        { "\x1f\x8b\x08", 3, "gunzip " },
        { "\x28\xb5\x2f\xfd", 4, "zstd -d " },
        { "\xfd"
          "7zXZ",
          5, "unxz " },
        { "BZh9", 4, "bunzip2 " },
        { "\x04\x22\x4d\x18", 4, "lz4 -d " },
    };
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        struct tar t = { 0 };
        memcpy(tar_room(&t, 600), known[i].magic, known[i].n);
        refused(&t, "compressed", known[i].command);
    }
    assert_int_equal(mkdir(file("packed"), 0777), 0);
    struct tar t = { 0 };
    tar_text(&t, "a.txt", "x");
    tar_end(&t);
    tar_write(&t, file("packed/0.tar.gz"));
    struct shard_set set;
    struct errors errors;
    assert_int_equal(init(&set, file("packed"), &errors), 1);
    assert_non_null(strstr(errors.line[0], "gunzip "));
    errors_free(&errors);
    shard_free(&set);
}

static void directories_and_patterns_give_sorted_shards(void **state)
{
    assert_int_equal(mkdir(file("d"), 0777), 0);
    for (int i = 11; i >= 8; i--) {
        struct tar t = { 0 };
        char name[64];
        snprintf(name, sizeof name, "k%d.txt", i);
        tar_text(&t, name, "x");
        tar_end(&t);
        snprintf(name, sizeof name, "d/s-%06d.tar", i);
        tar_write(&t, file(name));
    }
    struct shard_set set;
    struct errors errors;
    char key[64];
    assert_int_equal(init(&set, file("d"), &errors), 0);
    assert_int_equal(set.n_samples, 4);
    for (int i = 0; i < 4; i++) {
        char expected[64];
        snprintf(expected, sizeof expected, "s-%06d.tar:k%d", 8 + i, 8 + i);
        assert_string_equal(shard_key(&set, i, key, sizeof key), expected);
    }
    shard_free(&set);
    assert_int_equal(init(&set, file("d/s-{000009..000010}.tar"), &errors), 0);
    assert_int_equal(set.n_samples, 2);
    assert_string_equal(shard_key(&set, 1, key, sizeof key), "s-000010.tar:k10");
    shard_free(&set);
    /* 12 and 13 are missing */
    assert_int_equal(init(&set, file("d/s-{000010..000013}.tar"), &errors), 2);
    assert_non_null(strstr(errors.line[0], "s-000012.tar: error: No such file"));
    assert_int_equal(errors.worst, EXIT_DATA);
    errors_free(&errors);
    shard_free(&set);
    static const char *const bad[] = { "d/{3..1}.tar",        "d/{a..b}.tar",
                                       "d/{1..}.tar",         "d/{1.tar",
                                       "d/{0..99999999}.tar", "d/{0..999}{0..9999}.tar",
                                       "d/{-1..2}.tar" };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        assert_int_equal(init(&set, file(bad[i]), &errors), 1);
        assert_non_null(strstr(errors.line[0], "range of numbers"));
        errors_free(&errors);
        shard_free(&set);
    }
}

static void missing_data_says_make_data(void **state)
{
    struct shard_set set;
    struct errors errors;
    assert_int_equal(init(&set, "data/no/such/place", &errors), 1);
    assert_non_null(strstr(errors.line[0], "make data"));
    assert_non_null(strstr(errors.line[0], "deck.nml:1:1"));
    assert_int_equal(errors.worst, EXIT_DATA);
    errors_free(&errors);
    shard_free(&set);
    assert_int_equal(init(&set, "/no/such/place.tar", &errors), 1);
    assert_null(strstr(errors.line[0], "make data"));
    errors_free(&errors);
    shard_free(&set);
    assert_int_equal(mkdir(file("empty"), 0777), 0);
    assert_int_equal(init(&set, file("empty"), &errors), 1);
    assert_non_null(strstr(errors.line[0], "no .tar file"));
    errors_free(&errors);
    shard_free(&set);
}

static void several_bad_shards_are_all_named(void **state)
{
    assert_int_equal(mkdir(file("many"), 0777), 0);
    struct tar t = { 0 };
    tar_text(&t, "/a.txt", "x");
    tar_end(&t);
    tar_write(&t, file("many/0.tar"));
    tar_text(&t, "b.txt", "x");
    tar_end(&t);
    tar_write(&t, file("many/1.tar"));
    tar_text(&t, "c.txt", "x");
    tar_write(&t, file("many/2.tar"));
    struct shard_set set;
    struct errors errors;
    assert_int_equal(init(&set, file("many"), &errors), 2);
    assert_non_null(strstr(errors.line[0], "many/0.tar"));
    assert_non_null(strstr(errors.line[1], "many/2.tar"));
    errors_free(&errors);
    shard_free(&set);
}

static void scattered_and_doubled_parts_break_the_sample(void **state)
{
    struct tar t = { 0 };
    tar_text(&t, "a.jpg", "x");
    tar_text(&t, "b.txt", "x");
    tar_text(&t, "a.txt", "the text of a comes too late");
    tar_text(&t, "c.txt", "1");
    tar_text(&t, "c.txt", "2");
    tar_end(&t);
    tar_write(&t, file("scatter.tar"));
    struct shard_set set;
    struct errors errors;
    assert_int_equal(init(&set, file("scatter.tar"), &errors), 0);
    assert_int_equal(set.n_samples, 4);
    assert_non_null(set.sample[0].broken);
    assert_null(set.sample[1].broken);
    assert_non_null(set.sample[2].broken);
    assert_non_null(strstr(set.sample[3].broken, "twice"));
    shard_free(&set);
}

static struct sample doc;

static void random_damage_never_crashes(void **state)
{
    uint64_t x = 88172645463325252u;
    struct tar clean = { 0 };
    for (int i = 0; i < 4; i++) {
        char name[32];
        snprintf(name, sizeof name, "%d.json", i);
        tar_text(&clean, name, "{\"caption\": \"c\"}");
        snprintf(name, sizeof name, "%d.jpg", i);
        tar_text(&clean, name, "J");
    }
    tar_header(&clean, "PaxHeader/x", 'x', 15);
    tar_data(&clean, "15 path=ab.txt\n", 15);
    tar_text(&clean, "y.txt", "next");
    tar_end(&clean);
    for (int trial = 0; trial < 500; trial++) {
        struct tar t = { 0 };
        memcpy(tar_room(&t, clean.n), clean.bytes, clean.n);
        for (int k = 0; k < 1 + trial % 3; k++) {
            x ^= x << 13, x ^= x >> 7, x ^= x << 17;
            const size_t at = x % t.n;
            x ^= x << 13, x ^= x >> 7, x ^= x << 17;
            t.bytes[at] = (unsigned char)x;
            if (trial % 2)
                /* the damage passes the checksum where it hits a header */
                tar_sum(t.bytes + at / 512 * 512);
        }
        if (trial % 7 == 0)
            t.n = x % t.n;
        tar_write(&t, file("fuzz.tar"));
        struct shard_set set;
        struct errors errors;
        init(&set, file("fuzz.tar"), &errors);
        for (int64_t i = 0; i < set.n_samples; i++) {
            char why[512];
            sample_read(&doc, &set, i, "", "", why, sizeof why);
        }
        errors_free(&errors);
        shard_free(&set);
    }
    free(clean.bytes);
}

static void read_first_sample(void *set)
{
    char why[64];
    sample_read(&doc, set, 0, "", "", why, sizeof why);
}

static void a_shard_that_changes_during_the_run_ends_the_job_with_4(void **state)
{
    struct tar t = { 0 };
    struct shard_set set;
    struct errors errors;
    for (int change = 0; change < 4; change++) {
        tar_text(&t, "a.txt", "x");
        tar_end(&t);
        tar_write(&t, file("change.tar"));
        assert_int_equal(init(&set, file("change.tar"), &errors), 0);
        const struct timespec times[2] = { { 0, UTIME_OMIT }, { 1700000000, 5 } };
        if (change == 1) /* shorter */
            assert_int_equal(truncate(file("change.tar"), 512), 0);
        if (change == 2) /* other bytes, as many */
            assert_int_equal(utimensat(AT_FDCWD, file("change.tar"), times, 0), 0);
        /* a pipe: opening it must not wait for a writer */
        if (change == 3)
            assert_true(unlink(file("change.tar")) == 0 && mkfifo(file("change.tar"), 0666) == 0);
        assert_int_equal(child_run(read_first_sample, &set, NULL, 0), change == 0 ? 0 : EXIT_DATA);
        shard_free(&set);
        unlink(file("change.tar"));
    }
    sample_free(&doc);
}

static void what_is_no_file_is_refused_without_waiting(void **state)
{
    struct shard_set set;
    struct errors errors;
    assert_int_equal(mkdir(file("odd"), 0777), 0);
    assert_int_equal(mkfifo(file("odd/0.tar"), 0666), 0);
    assert_int_equal(mkdir(file("odd/1.tar"), 0777), 0);
    assert_int_equal(init(&set, file("odd"), &errors), 2);
    for (int i = 0; i < 2; i++)
        assert_non_null(strstr(errors.line[i], "not a regular file"));
    errors_free(&errors);
    shard_free(&set);
}

/* Work and memory stay in proportion to the sample. */
static void a_sample_of_too_many_parts_is_broken(void **state)
{
    struct tar t = { 0 };
    struct shard_set set;
    struct errors errors;
    char name[32];
    for (int i = 0; i < SHARD_PARTS_MAX; i++) {
        snprintf(name, sizeof name, "a.%d.png", i);
        tar_text(&t, name, "");
    }
    tar_text(&t, "b.txt", "x");
    for (int i = 0; i <= SHARD_PARTS_MAX; i++) {
        snprintf(name, sizeof name, "c.%d.png", i);
        tar_text(&t, name, "");
    }
    tar_end(&t);
    tar_write(&t, file("parts.tar"));
    assert_int_equal(init(&set, file("parts.tar"), &errors), 0);
    assert_int_equal(set.n_samples, 3);
    assert_null(set.sample[0].broken);
    assert_int_equal(set.sample[0].n_parts, SHARD_PARTS_MAX);
    assert_null(set.sample[1].broken);
    assert_non_null(strstr(set.sample[2].broken, "1024 parts"));
    assert_int_equal(set.sample[2].n_parts, SHARD_PARTS_MAX);
    shard_free(&set);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(samples_are_runs_of_members_that_agree_up_to_the_first_dot),
        cmocka_unit_test(members_without_a_part_are_ignored_and_counted),
        cmocka_unit_test(long_names_of_gnu_ustar_and_pax_are_read),
        cmocka_unit_test(archives_of_gnu_tar_are_read_in_every_format),
        cmocka_unit_test(a_pax_size_replaces_the_header_s),
        cmocka_unit_test(names_that_leave_the_archive_are_refused),
        cmocka_unit_test(links_devices_and_sparse_members_are_refused),
        cmocka_unit_test(sizes_that_lie_are_refused),
        cmocka_unit_test(headers_that_readers_understand_differently_are_refused),
        cmocka_unit_test(names_of_owners_do_not_matter),
        cmocka_unit_test(sparse_archives_of_gnu_tar_are_refused),
        cmocka_unit_test(truncated_and_damaged_archives_are_refused),
        cmocka_unit_test(compressed_shards_are_refused_with_the_command),
        cmocka_unit_test(directories_and_patterns_give_sorted_shards),
        cmocka_unit_test(missing_data_says_make_data),
        cmocka_unit_test(several_bad_shards_are_all_named),
        cmocka_unit_test(scattered_and_doubled_parts_break_the_sample),
        cmocka_unit_test(random_damage_never_crashes),
        cmocka_unit_test(a_shard_that_changes_during_the_run_ends_the_job_with_4),
        cmocka_unit_test(what_is_no_file_is_refused_without_waiting),
        cmocka_unit_test(a_sample_of_too_many_parts_is_broken),
    };
    return cmocka_run_group_tests(tests, scratch_setup, scratch_teardown);
}
