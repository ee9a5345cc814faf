/* test_deck.c - the deck's grammar, probe by probe: tests/decks/bad with the exact messages,
 * tests/decks/good with the values read, and what no text may do (crash). Each deck is one test. A
 * first line "! ranks: N" also resolves the deck for N ranks. `test_deck --values` is the driver of
 * regression/oracle/deck_readers.py: for each path on standard input it prints the values that the
 * deck gives, or that it is refused.
 */
#include "test_deck.h"

#include <dirent.h>

static int ranks_of(const char *text)
{
    int ranks = 0;
    return sscanf(text, "! ranks: %d", &ranks) == 1 ? ranks : 0;
}

static void bad_deck_gives_exactly_its_messages(void **state)
{
    const char *path = *state, *name = strrchr(path, '/') + 1;
    char *golden_path = xasprintf("%.*s.expect", (int)(strlen(path) - 4), path), *got = NULL;
    size_t length, golden_length, n;
    char *text = slurp(path, &length), *golden = slurp(golden_path, &golden_length);
    struct deck deck = { 0 };
    struct errors errors = { 0 };
    make_deck(&deck, name, text, length, ranks_of(text), &errors, NULL);
    FILE *f = open_memstream(&got, &n);
    for (int i = 0; i < errors.count; i++)
        fprintf(f, "%s\n", errors.line[i]);
    fprintf(f, "exit %d\n", errors.worst);
    fclose(f);
    assert_true(errors.count > 0);
    assert_string_equal(got, golden);
    free(got);
    free(text);
    free(golden);
    free(golden_path);
    deck_free(&deck);
    errors_free(&errors);
}

static void good_deck_reads_to_its_values(void **state)
{
    const char *path = *state;
    char *golden_path = xasprintf("%.*s.expect", (int)(strlen(path) - 4), path);
    size_t length, golden_length;
    char *text = slurp(path, &length), *golden = slurp(golden_path, &golden_length);
    struct deck deck = { 0 };
    struct errors errors = { 0 };
    make_deck(&deck, path, text, length, ranks_of(text), &errors, NULL);
    assert_no_errors(&errors);
    int lines = 0;
    for (char *line = strtok(golden, "\n"); line; line = strtok(NULL, "\n"), lines++) {
        char group[DECK_NAME_MAX + 1], key[DECK_NAME_MAX + 1];
        int at = 0;
        assert_int_equal(sscanf(line, "%63[^.].%63s %n", group, key, &at), 2);
        int row = deck_table_find(group, key);
        assert_true(row >= 0);
        char *value = deck_table_format(&deck, row);
        assert_string_equal(value, line + at);
        free(value);
    }
    assert_true(lines > 0);
    free(text);
    free(golden);
    free(golden_path);
    deck_free(&deck);
    errors_free(&errors);
}

/* No text may crash the reader or the rules (the sanitizers look on), and none may pass both
 * silently and partly. */
static void survive(const char *text, size_t length)
{
    struct deck deck = { 0 };
    struct errors errors = { 0 };
    char *exact = xmalloc(length ? length : 1, 1); /* no byte behind the text */
    memcpy(exact, text, length);
    make_deck(&deck, "x", exact, length, 2, &errors, NULL);
    if (deck.unread)
        assert_true(errors.count > 0);
    assert_false(deck.derived.complete && deck.unread);
    free(exact);
    deck_free(&deck);
    errors_free(&errors);
}

static void every_prefix_of_a_good_deck_survives(void **state)
{
    size_t length;
    char *text = slurp(*state, &length);
    for (size_t n = 0; n <= length; n++)
        survive(text, n);
    free(text);
}

static void every_single_byte_deletion_survives(void **state)
{
    size_t length;
    char *text = slurp("input/stage2.nml", &length);
    for (size_t n = 0; n < length; n++) {
        char *less = xmalloc(length, 1);
        memcpy(less, text, n);
        memcpy(less + n, text + n + 1, length - n - 1);
        survive(less, length - 1);
        free(less);
    }
    free(text);
}

static void every_single_byte_change_survives(void **state)
{
    static const char bytes[] = { 0,   '\n', '\'', '"', '&', '/',  '*',       '(',
                                  ',', '=',  '!',  '9', '%', '\r', (char)0xFF };
    size_t length;
    char *text = slurp("tests/decks/good/strings.nml", &length);
    for (size_t n = 0; n < length; n++)
        for (size_t b = 0; b < sizeof bytes; b++) {
            char kept = text[n];
            text[n] = bytes[b];
            survive(text, length);
            text[n] = kept;
        }
    free(text);
}

static void file_limit_is_one_mebibyte(void **state)
{
    size_t length = DECK_FILE_MAX + 1;
    char *text = xmalloc(length, 1);
    memset(text, '\n', length);
    memcpy(text, "&run seed=5 /", 13);
    struct deck deck = { 0 };
    struct errors errors = { 0 };
    make_deck(&deck, "x", text, length - 1, 0, &errors, NULL);
    assert_no_errors(&errors);
    assert_int_equal(deck.run.seed, 5);
    deck_free(&deck);
    make_deck(&deck, "x", text, length, 0, &errors, NULL);
    assert_true(has_error(&errors, "x:1:1: error: the deck is larger than 1048576 bytes"));
    assert_int_equal(deck.run.seed, 1234);
    deck_free(&deck);
    errors_free(&errors);
    free(text);
}

static void two_megabyte_string_is_refused(void **state)
{
    size_t length = 2000000;
    char *text = xmalloc(length, 1);
    memset(text, 'x', length);
    memcpy(text, "&run title='", 12);
    memcpy(text + length - 3, "' /", 3);
    struct deck deck = { 0 };
    struct errors errors = { 0 };
    make_deck(&deck, "x", text, length, 0, &errors, NULL);
    assert_int_equal(errors.count, 1);
    assert_int_equal(errors.worst, EXIT_DECK);
    deck_free(&deck);
    errors_free(&errors);
    free(text);
}

static void file_name_with_control_characters_is_printed_safely(void **state)
{
    struct deck deck = { 0 };
    struct errors errors = { 0 };
    make_deck(&deck, "a\x1b[31m\nb", "x", 1, 0, &errors, NULL);
    assert_int_equal(errors.count, 1);
    assert_null(strpbrk(errors.line[0], "\x1b\n"));
    size_t length;
    char *echo = echo_text(&deck, &length);
    assert_null(strchr(echo, '\x1b'));
    assert_int_equal(strncmp(strchr(echo, '\n'), "\n\n&run", 6), 0); /* one line of header */
    free(echo);
    deck_free(&deck);
    errors_free(&errors);
}

/* One test per *.nml file of a directory. */
static int by_name(const void *a, const void *b)
{
    return strcmp(*(char *const *)a, *(char *const *)b);
}

static char **list_decks(const char *directory, int *count)
{
    DIR *d = opendir(directory);
    char **path = xcalloc(1000, sizeof *path);
    *count = 0;
    if (!d)
        return path;
    for (struct dirent *e; (e = readdir(d)) && *count < 1000;) {
        size_t n = strlen(e->d_name);
        if (n > 4 && !strcmp(e->d_name + n - 4, ".nml"))
            path[(*count)++] = xasprintf("%s/%s", directory, e->d_name);
    }
    closedir(d);
    qsort(path, (size_t)*count, sizeof *path, by_name);
    return path;
}

static int run_decks(const char *group, const char *directory, int least, const char *prefix,
                     CMUnitTestFunction test)
{
    int count;
    char **path = list_decks(directory, &count);
    struct CMUnitTest *tests = xcalloc((size_t)count + 1, sizeof *tests);
    for (int i = 0; i < count; i++)
        tests[i] = (struct CMUnitTest){ xasprintf("%s %s", prefix, strrchr(path[i], '/') + 1), test,
                                        NULL, NULL, path[i] };
    int failed = count < least;
    if (failed)
        fprintf(stderr, "%s: %d decks, at least %d expected (tests run in the repository root)\n",
                directory, count, least);
    failed += _cmocka_run_group_tests(group, tests, (size_t)count, NULL, NULL);
    for (int i = 0; i < count; i++) {
        free((void *)(uintptr_t)tests[i].name);
        free(path[i]);
    }
    free(tests);
    free(path);
    return failed;
}

/* --- driver of the oracle --- */

static int print_values(void)
{
    char path[4096];
    while (fgets(path, sizeof path, stdin)) {
        path[strcspn(path, "\n")] = '\0';
        size_t length;
        char *text = slurp(path, &length);
        struct deck deck = { 0 };
        struct errors errors = { 0 };
        make_deck(&deck, path, text, length, 0, &errors, NULL);
        printf("%s %s\n", errors.count ? "refused" : "accepted", path);
        for (int row = 0; row < DECK_ROWS && errors.count == 0; row++) {
            char *value = deck_table_format(&deck, row);
            if (deck.source[row].origin == DECK_FROM_DECK)
                printf(" %s.%s %s\n", deck_table[row].group, deck_table[row].key, value);
            free(value);
        }
        free(text);
        deck_free(&deck);
        errors_free(&errors);
    }
    return 0;
}

int main(int argc, char **argv)
{
    if (argc == 2 && !strcmp(argv[1], "--values"))
        return print_values();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_single_byte_deletion_survives),
        cmocka_unit_test(every_single_byte_change_survives),
        cmocka_unit_test(file_limit_is_one_mebibyte),
        cmocka_unit_test(two_megabyte_string_is_refused),
        cmocka_unit_test(file_name_with_control_characters_is_printed_safely),
    };
    int failed = run_decks("bad decks", "tests/decks/bad", 150,
                           "exact messages:", bad_deck_gives_exactly_its_messages);
    failed += run_decks("good decks", "tests/decks/good", 20,
                        "exact values:", good_deck_reads_to_its_values);
    failed += run_decks("prefixes", "tests/decks/good", 20,
                        "every prefix survives:", every_prefix_of_a_good_deck_survives);
    failed += cmocka_run_group_tests_name("robustness", tests, NULL, NULL);
    return failed != 0;
}
