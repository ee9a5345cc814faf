/* test_tokenizer.c - byte-level BPE from small hand-made tokenizer.json files (training.md 6.11).
 *
 * `test_tokenizer --encode TOKENIZER FILE` is the driver of regression/oracle/tokenizer_oracle.py:
 * FILE holds texts as a 4-byte little-endian length and the bytes; one line of ids per text is
 * printed, and to stderr the seconds that loading took.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#include <cmocka.h>
#include "tokenizer.h"
#include "tokenizer_internal.h"

/* The 256 byte tokens, ids 0..255 in the order of the bytes, then what the test wants; ids of
 * `more` start at 256. */
struct parts {
    const char *more, *merges, *added, *pre, *rest;
};

static const char *const byte_level =
    "{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"use_regex\":false}";
static const char *const pattern_b =
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\\\r\\\\n\\\\p{L}\\\\p{N}]?\\\\p{L}+|\\\\p{N}{1,3}| "
    "?[^\\\\s\\\\p{L}\\\\p{N}]+[\\\\r\\\\n]*"
    "|\\\\s*[\\\\r\\\\n]+|\\\\s+(?!\\\\S)|\\\\s+";

static void write_byte_tokens(FILE *f)
{
    int next = 256;
    for (int b = 0; b < 256; b++) {
        const int printable = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
        fprintf(f, "%s\"\\u%04x\":%d", b ? "," : "", printable ? b : next++, b);
    }
}

static void path_of(char *path, const char *name)
{
    sprintf(path, "/tmp/test_tokenizer_%ld%s", (long)getpid(), name);
}

static void write_tokenizer(const char *path, const struct parts *p)
{
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    fprintf(f,
            "{\"version\":\"1.0\",\"added_tokens\":[%s],\"normalizer\":null,\"pre_tokenizer\":%s,",
            p->added ? p->added : "", p->pre ? p->pre : byte_level);
    fprintf(f, "\"model\":{\"type\":\"BPE\",%s\"vocab\":{", p->rest ? p->rest : "");
    write_byte_tokens(f);
    fprintf(f, "%s%s},\"merges\":[%s]}}", p->more ? "," : "", p->more ? p->more : "",
            p->merges ? p->merges : "");
    fclose(f);
}

static struct tokenizer *open_parts(struct parts p)
{
    char path[64], why[512] = "";
    path_of(path, ".json");
    write_tokenizer(path, &p);
    struct tokenizer *t = tokenizer_open(path, why, sizeof why);
    unlink(path);
    if (!t)
        fail_msg("%s", why);
    return t;
}

/* expected: ids, closed by -1 */
static void check_ids(struct tokenizer *t, const char *text, size_t n, const int64_t *expected)
{
    int64_t *ids = NULL, capacity = 0;
    char why[256] = "";
    const int64_t count = tokenizer_encode(t, text, n, &ids, &capacity, why, sizeof why);
    if (count < 0)
        fail_msg("%s", why);
    for (int64_t i = 0; i < count; i++)
        assert_int_equal(ids[i], expected[i]);
    assert_int_equal(expected[count], -1);
    free(ids);
}

#define IDS(...) ((const int64_t[]){ __VA_ARGS__, -1 })
#define CHECK_IDS(t, text, ...) check_ids(t, text, sizeof text - 1, IDS(__VA_ARGS__))

/* "Gx" below stands for U+0120, the spelling of a blank. */
#define BLANK "\\u0120"

/* --- merging --- */

static void lowest_rank_goes_first_and_leftmost_of_equals(void **state)
{
    /* ab < bc: "abc" = ab c; "xbc" = x bc; aaa = aa a; aaaa = aaaa in two rounds */
    struct tokenizer *t = open_parts(
        (struct parts){ .more = "\"ab\":256,\"bc\":257,\"aa\":258,\"aaaa\":259,\"abab\":260",
                        .merges = "\"a b\",\"b c\",\"a a\",\"aa aa\",\"ab ab\"" });
    CHECK_IDS(t, "abc", 256, 'c');
    CHECK_IDS(t, "xbc", 'x', 257);
    CHECK_IDS(t, "aaa", 258, 'a');
    CHECK_IDS(t, "aaaa", 259);
    CHECK_IDS(t, "aaaaaaa", 259, 258, 'a');
    CHECK_IDS(t, "ababab", 260, 256);
    CHECK_IDS(t, "aab", 'a', 256);
    tokenizer_free(t);
}

static void both_spellings_of_merges_agree(void **state)
{
    struct tokenizer *a = open_parts(
        (struct parts){ .more = "\"ab\":256,\"abc\":257", .merges = "\"a b\",\"ab c\"" });
    struct tokenizer *b = open_parts((struct parts){ .more = "\"ab\":256,\"abc\":257",
                                                     .merges = "[\"a\",\"b\"],[\"ab\",\"c\"]" });
    struct tokenizer *c = open_parts((struct parts){
        .more = "\"ab\":256,\"abc\":257", .merges = "\"#version: 0.2\",\"a b\",\"ab c\"" });
    struct tokenizer *all[3] = { a, b, c };
    for (int i = 0; i < 3; i++) {
        CHECK_IDS(all[i], "abcab", 257, 256);
        tokenizer_free(all[i]);
    }
}

static void a_pair_given_twice_keeps_the_later_rank(void **state)
{
    struct tokenizer *t = open_parts(
        (struct parts){ .more = "\"ab\":256,\"bc\":257", .merges = "\"a b\",\"b c\",\"a b\"" });
    CHECK_IDS(t, "abc", 'a', 257);
    tokenizer_free(t);
}

static void ignore_merges_takes_whole_pieces(void **state)
{
    const char *pre = "{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"use_regex\":true}";
    struct parts p = { .more = "\"" BLANK "word\":256,\"wo\":257,\"rd\":258",
                       .merges = "\"w o\",\"r d\"",
                       .pre = pre };
    struct tokenizer *t = open_parts(p);
    CHECK_IDS(t, "word word", 257, 258, ' ', 257, 258);
    tokenizer_free(t);
    p.rest = "\"ignore_merges\":true,";
    t = open_parts(p);
    CHECK_IDS(t, "word word", 257, 258, 256);
    CHECK_IDS(t, "word words", 257, 258, ' ', 257, 258, 's');
    tokenizer_free(t);
}

static void every_byte_survives_the_round_trip(void **state)
{
    struct tokenizer *t = open_parts((struct parts){ .more = "\"ab\":256", .merges = "\"a b\"" });
    char text[2000] = "";
    size_t n = 0;
    for (int c = 0; c < 0x80; c++)
        text[n++] = (char)c;
    for (int c = 0x80; c < 0x400; c += 1) {
        text[n++] = (char)(0xc0 | c >> 6);
        text[n++] = (char)(0x80 | (c & 63));
    }
    memcpy(text + n,
           "\xf0\x9f\x8d\x92"
           "ab\xef\xbf\xbd",
           9);
    n += 9;
    int64_t *ids = NULL, capacity = 0;
    char why[128], back[2100];
    const int64_t count = tokenizer_encode(t, text, n, &ids, &capacity, why, sizeof why);
    assert_int_equal(count, n - 2); /* "ab" is one token, twice: in ASCII and at the end */
    assert_int_equal(tokenizer_decode(t, ids, count, back, sizeof back), n);
    assert_memory_equal(text, back, n);
    /* single tokens are bytes */
    for (int b = 0; b < 256; b++) {
        const int64_t id = b;
        assert_int_equal(tokenizer_decode(t, &id, 1, back, sizeof back), 1);
        assert_int_equal((unsigned char)back[0], b);
    }
    free(ids);
    tokenizer_free(t);
}

static void long_pieces_take_no_quadratic_time(void **state)
{
    struct tokenizer *t =
        open_parts((struct parts){ .more = "\"aa\":256,\"aaaa\":257,\"aaaaaaaa\":258",
                                   .merges = "\"a a\",\"aa aa\",\"aaaa aaaa\"" });
    const size_t n = 4 << 20;
    char *text = malloc(n), why[128];
    memset(text, 'a', n);
    int64_t *ids = NULL, capacity = 0;
    assert_int_equal(tokenizer_encode(t, text, n, &ids, &capacity, why, sizeof why), n / 8);
    free(ids);
    free(text);
    tokenizer_free(t);
}

/* --- pre-tokenizers --- */

static void pattern_b_splits_as_published(void **state)
{
    char pre[1024];
    snprintf(pre, sizeof pre,
             "{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Split\",\"pattern\":{\"Regex\":"
             "\"%s\"},"
             "\"behavior\":\"Isolated\",\"invert\":false},%s]}",
             pattern_b, byte_level);
    /* all pairs of neighbours that could merge across a wrong boundary */
    struct tokenizer *t = open_parts((struct parts){
        .more = "\"12\":256,\"34\":257,\"" BLANK BLANK "\":258,\"'s\":259,\"S'\":260,\"" BLANK
                "b\":261,\"!" BLANK "\":262,"
                "\"!\\u010a\":263",
        .merges = "\"1 2\",\"3 4\",\"" BLANK " " BLANK "\",\"' s\",\"S '\",\"" BLANK
                  " b\",\"! " BLANK "\",\"! \\u010a\"",
        .pre = pre });
    CHECK_IDS(t, "12341", 256, '3', '4', '1'); /* three digits at most */
    CHECK_IDS(t, "a   b", 'a', 258, 261);      /* the last blank belongs to the word */
    CHECK_IDS(t, "S's", 'S', 259);
    CHECK_IDS(t, "! b", '!', 261);
    CHECK_IDS(t, "!\n", 263);
    tokenizer_free(t);
}

static void behaviours_of_split(void **state)
{
    static const struct {
        const char *behaviour, *invert;
        int64_t expected[12];
    } v[] = {
        { "Isolated", "false", { 'a', 'b', '-', '-', 'c', -1 } },
        { "Removed", "false", { 'a', 'b', 'c', -1 } },
        { "Removed", "true", { '-', '-', -1 } },
        { "Contiguous", "false", { 'a', 'b', 257, 'c', -1 } },
        { "MergedWithPrevious", "false", { 'a', 256, '-', 'c', -1 } },
        { "MergedWithNext", "false", { 'a', 'b', '-', 258, -1 } },
    };
    for (size_t i = 0; i < sizeof v / sizeof *v; i++) {
        char pre[512];
        snprintf(pre, sizeof pre,
                 "{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Split\",\"pattern\":{"
                 "\"String\":\"-\"},"
                 "\"behavior\":\"%s\",\"invert\":%s},%s]}",
                 v[i].behaviour, v[i].invert, byte_level);
        struct tokenizer *t = open_parts((struct parts){ .more = "\"b-\":256,\"--\":257,\"-c\":258",
                                                         .merges = "\"b -\",\"- -\",\"- c\"",
                                                         .pre = pre });
        check_ids(t, "ab--c", 5, v[i].expected);
        tokenizer_free(t);
    }
}

static void byte_level_prefix_space_and_regex(void **state)
{
    const char *pre =
        "{\"type\":\"ByteLevel\",\"add_prefix_space\":true,\"trim_offsets\":true}"; /* use_regex:
                                                                                       true */
    struct tokenizer *t =
        open_parts((struct parts){ .more = "\"" BLANK "a\":256,\"ab\":257",
                                   .merges = "\"" BLANK " a\",\"a b\"",
                                   .pre = pre,
                                   .added = "{\"id\":300,\"content\":\"<x>\",\"special\":true}" });
    CHECK_IDS(t, "a", 256);
    CHECK_IDS(t, " a", 256);
    CHECK_IDS(t, "a<x>a", 256, 300, 256);
    CHECK_IDS(t, "a1", 256, '1');
    tokenizer_free(t);
}

/* \s is Unicode White_Space: U+180E is none, U+0085 is one. */
static void space_class_is_white_space(void **state)
{
    const char *pre = "{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Split\",\"pattern\":{"
                      "\"Regex\":\"\\\\s+\"},\"behavior\":"
                      "\"Removed\",\"invert\":false},{\"type\":\"ByteLevel\",\"add_prefix_space\":"
                      "false,\"use_regex\":false}]}";
    struct tokenizer *t = open_parts((struct parts){ .pre = pre });
    CHECK_IDS(t,
              "a\xc2\x85"
              "b",
              'a', 'b');
    CHECK_IDS(t,
              "a\xe1\xa0\x8e"
              "b",
              'a', 0xe1, 0xa0, 0x8e, 'b');
    tokenizer_free(t);
}

/* --- added tokens --- */

static void longest_added_token_wins_and_is_cut_out_verbatim(void **state)
{
    struct tokenizer *t = open_parts((struct parts){
        .more = "\"<\\u012a\":256,\"ab\":257",
        .merges = "\"a b\"",
        .added = "{\"id\":300,\"content\":\"<im\",\"special\":true},{\"id\":301,\"content\":\"<"
                 "image>\",\"special\":true},"
                 "{\"id\":302,\"content\":\"a b\",\"special\":false,\"normalized\":true}" });
    CHECK_IDS(t, "a<image>b", 'a', 301, 'b');
    CHECK_IDS(t, "<imag>", 300, 'a', 'g', '>');
    CHECK_IDS(t, "<image><image>", 301, 301);
    CHECK_IDS(t, "a b", 302);
    CHECK_IDS(t, "ab", 257);
    assert_int_equal(tokenizer_id(t, "<image>"), 301);
    assert_int_equal(tokenizer_id(t, "<imagine>"), -1);
    assert_int_equal(tokenizer_size(t), 303);
    assert_true(tokenizer_is_added(t, 301));
    assert_false(tokenizer_is_added(t, 'a'));
    assert_false(tokenizer_is_added(t, 299));
    assert_false(tokenizer_is_added(t, -1));
    assert_false(tokenizer_is_added(t, 303));
    tokenizer_free(t);
}

/* A token that is not normalized is looked for before any that is, whatever their places and
 * lengths. */
static void tokens_not_normalized_are_found_first(void **state)
{
    struct tokenizer *t = open_parts((struct parts){
        .added = "{\"id\":300,\"content\":\"abcd\",\"special\":false,\"normalized\":true},"
                 "{\"id\":301,\"content\":\"cd\",\"special\":true,\"normalized\":false}" });
    CHECK_IDS(t, "abcd", 'a', 'b', 301);
    tokenizer_free(t);
}

static void strip_and_single_word_flags(void **state)
{
    struct tokenizer *t = open_parts((struct parts){
        .added = "{\"id\":300,\"content\":\"<l>\",\"special\":true,\"lstrip\":true},"
                 "{\"id\":301,\"content\":\"<r>\",\"special\":true,\"rstrip\":true},"
                 "{\"id\":302,\"content\":\"cat\",\"special\":true,\"single_word\":true}" });
    CHECK_IDS(t, "a \t\xe3\x80\x80<l> b", 'a', 300, ' ', 'b');
    CHECK_IDS(t, "a <r> \n b", 'a', ' ', 301, 'b');
    CHECK_IDS(t, "<r>  <l>", 301, 300);
    CHECK_IDS(t, "cat", 302);
    CHECK_IDS(t, "a cat.", 'a', ' ', 302, '.');
    CHECK_IDS(t, "cats", 'c', 'a', 't', 's');
    CHECK_IDS(t,
              "\xc3\xa9"
              "cat",
              0xc3, 0xa9, 'c', 'a', 't');
    CHECK_IDS(t, "_cat", '_', 'c', 'a', 't');
    tokenizer_free(t);
}

static void decode_gives_added_tokens_verbatim(void **state)
{
    struct tokenizer *t = open_parts(
        (struct parts){ .more = "\"" BLANK "a\":256",
                        .added = "{\"id\":300,\"content\":\"<a \xc3\xa9>\",\"special\":true}" });
    char out[32];
    assert_int_equal(tokenizer_decode(t, IDS(256, 300, 298, 999, -5), 5, out, sizeof out), 8);
    assert_string_equal(out, " a<a \xc3\xa9>");
    /* too small a buffer: cut, closed, full length told */
    assert_int_equal(tokenizer_decode(t, IDS(256, 300), 2, out, 4), 8);
    assert_string_equal(out, " a<");
    tokenizer_free(t);
}

static void empty_text_has_no_tokens(void **state)
{
    struct tokenizer *t = open_parts((struct parts){ 0 });
    int64_t *ids = NULL, capacity = 0;
    char why[64];
    assert_int_equal(tokenizer_encode(t, "", 0, &ids, &capacity, why, sizeof why), 0);
    tokenizer_free(t);
}

/* --- bad input --- */

static void bad_texts_are_errors(void **state)
{
    struct tokenizer *t = open_parts((struct parts){ 0 });
    static const char *const bad[] = {
        "a\xff", "\xc3", "\xc0\x80", "\xed\xa0\x80", "\xf4\x90\x80\x80", "\xe2\x82", "\x80"
    };
    int64_t *ids = NULL, capacity = 0;
    char why[128] = "";
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        char *exact = malloc(strlen(bad[i]));
        memcpy(exact, bad[i], strlen(bad[i]));
        assert_int_equal(
            tokenizer_encode(t, exact, strlen(bad[i]), &ids, &capacity, why, sizeof why), -1);
        assert_string_equal(why, "the text is not UTF-8");
        free(exact);
    }
    free(ids);
    tokenizer_free(t);
}

static void expensive_patterns_give_up_with_a_sentence(void **state)
{
    const char *pre = "{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Split\",\"pattern\":{"
                      "\"Regex\":\"(?:a+)+b\"},\"behavior\":"
                      "\"Isolated\",\"invert\":false},{\"type\":\"ByteLevel\",\"add_prefix_space\":"
                      "false,\"use_regex\":false}]}";
    struct tokenizer *t = open_parts((struct parts){ .pre = pre });
    int64_t *ids = NULL, capacity = 0;
    char why[256] = "", text[64];
    memset(text, 'a', sizeof text);
    text[63] = 'b';
    text[40] = 'c';
    const int64_t count = tokenizer_encode(t, text, sizeof text, &ids, &capacity, why, sizeof why);
    assert_int_equal(count, -1);
    assert_non_null(strstr(why, "gave up"));
    free(ids);
    tokenizer_free(t);
}

/* Each broken in one way; the sentence must name it. */
static void malformed_files_are_refused_with_their_place(void **state)
{
    static const struct {
        struct parts p;
        const char *part;
    } v[] = {
        { { .rest = "\"byte_fallback\":true," }, "byte_fallback" },
        { { .rest = "\"dropout\":0.1," }, "dropout" },
        { { .rest = "\"end_of_word_suffix\":\"</w>\"," }, "end_of_word_suffix" },
        { { .rest = "\"ignore_merges\":1," }, "ignore_merges" },
        { { .more = "\"zz\":-1" }, "model.vocab['zz']" },
        { { .more = "\"zz\":1e3" }, "model.vocab['zz']" },
        { { .more = "\"zz\":99999999999" }, "model.vocab['zz']" },
        { { .more = "\"zz\":99999999999999999999" }, "line 1" },
        { { .more = "\"zz\":7" }, "id 7 is used twice" },
        { { .more = "\"a\":300" }, "duplicate" },
        { { .merges = "\"a b\"" }, "model.merges[0]: the merged token" },
        { { .more = "\"ab\":256", .merges = "\"a b\",\"ab q q\"" }, "model.merges[1]" },
        { { .more = "\"ab\":256", .merges = "[\"a\",\"b\",\"c\"]" }, "model.merges[0]" },
        { { .more = "\"ab\":256", .merges = "[\"a\",7]" }, "model.merges[0]" },
        { { .more = "\"ab\":256", .merges = "\"\\u2603 b\"" }, "its first token" },
        { { .added = "{\"id\":300}" }, "added_tokens[0]" },
        { { .added = "{\"id\":-1,\"content\":\"<x>\"}" }, "added_tokens[0]" },
        { { .added = "{\"id\":300,\"content\":\"a\"}" }, "'a' has id 300 here and 97 before" },
        { { .added = "{\"id\":97,\"content\":\"<x>\"}" }, "another token's" },
        { { .added = "{\"id\":300,\"content\":\"<x>\",\"lstrip\":\"yes\"}" },
          "added_tokens[0].lstrip" },
        { { .added = "7" }, "added_tokens[0]" },
        { { .pre = "null" }, "pre_tokenizer" },
        { { .pre = "{\"type\":\"Metaspace\"}" }, "'Metaspace' is not supported" },
        { { .pre = "{\"type\":\"Sequence\",\"pretokenizers\":[]}" }, "no ByteLevel" },
        { { .pre = "{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"ByteLevel\"},{\"type\":"
                   "\"ByteLevel\"}]}" },
          "after ByteLevel" },
        { { .pre =
                "{\"type\":\"Split\",\"pattern\":{\"Regex\":\"(a\"},\"behavior\":\"Isolated\"}" },
          "does not compile" },
        { { .pre = "{\"type\":\"Split\",\"pattern\":{\"Regex\":\"(*UTF)a\"},\"behavior\":"
                   "\"Isolated\"}" },
          "a verb" },
        { { .pre = "{\"type\":\"Split\",\"pattern\":{\"Regex\":\"[a&&b]\"},\"behavior\":"
                   "\"Isolated\"}" },
          "intersection" },
        { { .pre = "{\"type\":\"Split\",\"pattern\":{\"Regex\":\"[a[b]]\"},\"behavior\":"
                   "\"Isolated\"}" },
          "class inside a class" },
        { { .pre = "{\"type\":\"Split\",\"pattern\":{\"Regex\":\"a{2}+\"},\"behavior\":"
                   "\"Isolated\"}" },
          "counter" },
        { { .pre = "{\"type\":\"Split\",\"pattern\":{\"Regex\":\"\\\\h\"},\"behavior\":"
                   "\"Isolated\"}" },
          "escape" },
        { { .pre = "{\"type\":\"Split\",\"pattern\":{\"Regex\":\"a\"},\"behavior\":\"Sideways\"}" },
          "'Sideways'" },
        { { .pre = "{\"type\":\"Split\",\"pattern\":\"a\",\"behavior\":\"Isolated\"}" },
          "Split.pattern" },
        { { .pre = "{\"type\":\"Split\",\"pattern\":{\"Regex\":\"\"},\"behavior\":\"Isolated\"}" },
          "0 bytes" },
    };
    char path[64];
    path_of(path, ".json");
    for (size_t i = 0; i < sizeof v / sizeof *v; i++) {
        char why[512] = "";
        write_tokenizer(path, &v[i].p);
        assert_null(tokenizer_open(path, why, sizeof why));
        if (!strstr(why, v[i].part))
            fail_msg("case %zu: expected '%s' in '%s'", i, v[i].part, why);
    }
    unlink(path);
}

static void check_text_refused(const char *path, const char *text, size_t n, const char *part)
{
    FILE *f = fopen(path, "w");
    fwrite(text, 1, n, f);
    fclose(f);
    char why[512] = "";
    assert_null(tokenizer_open(path, why, sizeof why));
    if (!*why || !strstr(why, part))
        fail_msg("expected '%s' in '%s'", part, why);
}

static void foreign_files_are_refused(void **state)
{
    char path[64], why[512];
    path_of(path, ".json");
    check_text_refused(path, "", 0, "line");
    check_text_refused(path, "{", 1, "line 1");
    check_text_refused(path, "[]", 2, "tokenizer.json");
    check_text_refused(path, "{}", 2, "tokenizer.json");
    check_text_refused(path, "\x89PNG\r\n", 6, "line 1");
    check_text_refused(path, "{\"model\":{\"type\":\"Unigram\"}}", 28, "'Unigram'");
    check_text_refused(path, "{\"model\":{\"vocab\":[]}}", 22, "model.vocab");
    check_text_refused(path, "{\"model\":{\"vocab\":{\"a\":0}}}", 27, "model.merges");
    check_text_refused(path, "{\"normalizer\":{\"type\":\"NFC\"},\"model\":{}}", 40,
                       "normalizer 'NFC'");
    char *deep = malloc(200000);
    memset(deep, '[', 200000);
    check_text_refused(path, deep, 200000, "line 1");
    free(deep);
    unlink(path);
    assert_null(tokenizer_open(path, why, sizeof why));
    assert_non_null(strstr(why, "No such file"));
    assert_null(tokenizer_open("/dev/null", why, sizeof why));
    assert_non_null(strstr(why, "not a regular file"));
}

/* Any byte of a file cut off or changed: an answer, never a crash (the sanitizers watch). */
static void damaged_files_never_crash(void **state)
{
    char path[64], why[512];
    path_of(path, ".json");
    char pre[1024];
    snprintf(pre, sizeof pre,
             "{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Split\",\"pattern\":{\"Regex\":"
             "\"%s\"},"
             "\"behavior\":\"Isolated\",\"invert\":false},%s]}",
             pattern_b, byte_level);
    write_tokenizer(
        path, &(struct parts){ .more = "\"ab\":256",
                               .merges = "\"a b\"",
                               .pre = pre,
                               .added = "{\"id\":300,\"content\":\"<x>\",\"single_word\":true}" });
    static char text[16384];
    FILE *f = fopen(path, "r");
    const size_t n = fread(text, 1, sizeof text, f);
    fclose(f);
    uint32_t r = 1;
    for (int i = 0; i < 1500; i++) {
        r = r * 1664525u + 1013904223u;
        const size_t at = (r >> 8) % n;
        const char old = text[at];
        text[at] = (char)(i % 3 == 0 ? '"' : i % 3 == 1 ? '0' + i % 10 : (char)(r >> 24));
        f = fopen(path, "w");
        fwrite(text, 1, i % 10 == 0 ? at : n, f);
        fclose(f);
        text[at] = old;
        *why = '\0';
        struct tokenizer *t = tokenizer_open(path, why, sizeof why);
        assert_true(t || *why);
        if (t) {
            int64_t *ids = NULL, capacity = 0;
            tokenizer_encode(t, "ab <x> 1234 ab's\n", 17, &ids, &capacity, why, sizeof why);
            free(ids);
        }
        tokenizer_free(t);
    }
    unlink(path);
}

static void a_directory_stands_for_its_file(void **state)
{
    char directory[64], path[96], why[512] = "";
    path_of(directory, ".d");
    assert_int_equal(mkdir(directory, 0700), 0);
    sprintf(path, "%s/tokenizer.json", directory);
    assert_null(tokenizer_open(directory, why, sizeof why));
    assert_non_null(strstr(why, "tokenizer.json: No such file"));
    write_tokenizer(path, &(struct parts){ 0 });
    struct tokenizer *t = tokenizer_open(directory, why, sizeof why);
    assert_non_null(t);
    tokenizer_free(t);
    unlink(path);
    rmdir(directory);
}

static void unknown_bytes_become_unk_or_an_error(void **state)
{
    char path[64], why[512] = "";
    path_of(path, ".json");
    FILE *f = fopen(path, "w");
    fprintf(f,
            "{\"pre_tokenizer\":%s,\"model\":{\"vocab\":{\"a\":0,\"?\":1},\"merges\":[],\"unk_"
            "token\":\"?\"}}",
            byte_level);
    fclose(f);
    struct tokenizer *t = tokenizer_open(path, why, sizeof why);
    assert_non_null(t);
    CHECK_IDS(t, "aba", 0, 1, 0);
    tokenizer_free(t);
    f = fopen(path, "w");
    fprintf(f, "{\"pre_tokenizer\":%s,\"model\":{\"vocab\":{\"a\":0},\"merges\":[]}}", byte_level);
    fclose(f);
    t = tokenizer_open(path, why, sizeof why);
    assert_non_null(t);
    int64_t *ids = NULL, capacity = 0;
    assert_int_equal(tokenizer_encode(t, "ab", 2, &ids, &capacity, why, sizeof why), -1);
    assert_string_equal(why, "the tokenizer has no token for the byte 0x62");
    free(ids);
    tokenizer_free(t);
    unlink(path);
}

/* --- driver of the oracle --- */

static int encode_file(const char *tokenizer, const char *path)
{
    char why[512] = "";
    struct timespec start, end;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &start);
    struct tokenizer *t = tokenizer_open(tokenizer, why, sizeof why);
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &end);
    if (!t) {
        fprintf(stderr, "%s\n", why);
        return 1;
    }
    fprintf(stderr, "loaded in %.3f s\n",
            (double)(end.tv_sec - start.tv_sec) + 1e-9 * (double)(end.tv_nsec - start.tv_nsec));
    FILE *f = fopen(path, "rb");
    if (!f)
        return 1;
    uint32_t n;
    int64_t *ids = NULL, capacity = 0;
    while (fread(&n, sizeof n, 1, f) == 1) {
        char *text = malloc(n + 1), *back = malloc(n + 2);
        if (fread(text, 1, n, f) != n)
            return 1;
        const int64_t count = tokenizer_encode(t, text, n, &ids, &capacity, why, sizeof why);
        if (count < 0)
            printf("error: %s", why);
        for (int64_t i = 0; i < count; i++)
            printf(i ? " %lld" : "%lld", (long long)ids[i]);
        printf("\n");
        free(text);
        free(back);
    }
    fclose(f);
    free(ids);
    tokenizer_free(t);
    return 0;
}

static void an_empty_token_may_be_the_first(void **state)
{
    struct vocab v = { 0 };
    assert_true(vocab_add(&v, "", 0, 3));
    assert_int_equal(vocab_find(&v, "", 0), 3);
    assert_int_equal(vocab_find(&v, "a", 1), -1);
    assert_true(vocab_add(&v, "a", 1, 0));
    assert_int_equal(vocab_find(&v, "a", 1), 0);
    vocab_free(&v);
}

int main(int argc, char **argv)
{
    if (argc == 4 && !strcmp(argv[1], "--encode"))
        return encode_file(argv[2], argv[3]);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(an_empty_token_may_be_the_first),
        cmocka_unit_test(lowest_rank_goes_first_and_leftmost_of_equals),
        cmocka_unit_test(both_spellings_of_merges_agree),
        cmocka_unit_test(a_pair_given_twice_keeps_the_later_rank),
        cmocka_unit_test(ignore_merges_takes_whole_pieces),
        cmocka_unit_test(every_byte_survives_the_round_trip),
        cmocka_unit_test(long_pieces_take_no_quadratic_time),
        cmocka_unit_test(pattern_b_splits_as_published),
        cmocka_unit_test(behaviours_of_split),
        cmocka_unit_test(byte_level_prefix_space_and_regex),
        cmocka_unit_test(space_class_is_white_space),
        cmocka_unit_test(longest_added_token_wins_and_is_cut_out_verbatim),
        cmocka_unit_test(tokens_not_normalized_are_found_first),
        cmocka_unit_test(strip_and_single_word_flags),
        cmocka_unit_test(decode_gives_added_tokens_verbatim),
        cmocka_unit_test(empty_text_has_no_tokens),
        cmocka_unit_test(bad_texts_are_errors),
        cmocka_unit_test(expensive_patterns_give_up_with_a_sentence),
        cmocka_unit_test(malformed_files_are_refused_with_their_place),
        cmocka_unit_test(foreign_files_are_refused),
        cmocka_unit_test(damaged_files_never_crash),
        cmocka_unit_test(a_directory_stands_for_its_file),
        cmocka_unit_test(unknown_bytes_become_unk_or_an_error),
    };
    return cmocka_run_group_tests_name("tokenizer", tests, NULL, NULL);
}
