/* test_deck_echo.c - a deck written out again: the echo gives the same values back and tells where
 * each came from; the reference deck is complete and up to date.
 */
#include "test_deck.h"

static void assert_echo_reads_back(const struct deck *deck, int ranks)
{
    size_t length;
    char *echo = echo_text(deck, &length);
    struct deck back = { 0 };
    struct errors errors = { 0 };
    make_deck(&back, "echo", echo, length, ranks, &errors, NULL);
    if (!deck->derived.not_built)
        assert_no_errors(&errors);
    for (int row = 0; row < DECK_ROWS; row++)
        if (!deck_table_equal(deck, &back, row))
            fail_msg("%s.%s differs after the echo", deck_table[row].group, deck_table[row].key);
    assert_memory_equal(&deck->derived, &back.derived, sizeof back.derived);
    size_t again_length;
    char *again = echo_text(&back, &again_length);
    /* Apart from the comments the echo of the echo is the echo. */
    for (char *a = echo, *b = again; *a;) {
        size_t na = strcspn(a, "!\n"), nb = strcspn(b, "!\n");
        assert_int_equal(na, nb);
        assert_memory_equal(a, b, na);
        a = strchr(a, '\n') + 1;
        b = strchr(b, '\n') + 1;
    }
    free(again);
    free(echo);
    deck_free(&back);
    errors_free(&errors);
}

static void echo_of_every_input_deck_reads_back_to_equal_values(void **state)
{
    static const struct {
        const char *path;
        int ranks[4];
    } decks[] = {
        { "input/mock_tiny.nml", { 1, 2, 4, 16 } },
        { "input/stage1.nml", { 1, 2, 8, 48 } },
        { "input/stage2.nml", { 1, 2, 8, 48 } },
        { "input/mock_20l.nml", { 8 } },
        { "input/hel_9n.nml", { 72 } },
        { "input/hel_17n.nml", { 136 } },
        { "input/hel_33n.nml", { 264 } },
        { "input/hel_68n.nml", { 544 } },
        { "input/hel_100n.nml", { 800 } },
    };
    for (size_t i = 0; i < sizeof decks / sizeof decks[0]; i++)
        for (int k = 0; k < 4 && decks[i].ranks[k]; k++) {
            struct deck d = { 0 };
            struct errors errors = { 0 };
            make_deck_file(&d, decks[i].path, decks[i].ranks[k], &errors, NULL);
            assert_true(d.derived.complete);
            assert_echo_reads_back(&d, decks[i].ranks[k]);
            deck_free(&d);
            errors_free(&errors);
        }
}

static void echo_keeps_strings_numbers_and_lists_exactly(void **state)
{
    static const char text[] =
        "&run train_samples = 1000000000000, title = 'it''s \"quoted\" ! & / 東京', mode = 'train', seed = 4294967295 /\n"
        "&language preset = 'tiny', init_method_std = 0.1, layernorm_epsilon = 1.2345678901234567d-5 /\n"
        "&lr lr = 0.3333333333333333, min_lr = 1e-30, weight_decay_incr_style = 'linear', start_weight_decay = 0, end_weight_decay = 2 /\n"
        "&batch iterations_to_skip = 5, 3*7, 1000000000 /\n&optimizer adam_beta2 = 0.999999 /\n&run2 /";
    struct deck d = { 0 };
    struct errors errors = { 0 };
    make_deck(&d, "x", text, strlen(text) - strlen("&run2 /"), 2, &errors, NULL);
    assert_no_errors(&errors);
    assert_echo_reads_back(&d, 2);
    assert_int_equal(d.batch.iterations_to_skip.n, 5);
    deck_free(&d);
    errors_free(&errors);
}

static void echo_tells_where_each_value_came_from(void **state)
{
    struct deck d = { 0 };
    struct errors errors = { 0 };
    resolve_text(&d, TINY_TRAIN, 2, &errors, OVERRIDES("run.seed=7"));
    size_t length;
    char *echo = echo_text(&d, &length);
    static const char *const lines[][2] = {
        { "  train_iters = 10 ", "! deck:1\n" }, { "  seed = 7 ", "! command line\n" },
        { "  hidden_size = 64 ", "! preset\n" }, { "  encoder_dp = 1 ", "! derived\n" },
        { "  clip_grad = 1.0 ", "! default\n" }, { "  preset = 'tiny' ", "! deck:2\n" },
    };
    for (size_t i = 0; i < sizeof lines / sizeof lines[0]; i++) {
        char *at = strstr(echo, lines[i][0]);
        assert_non_null(at);
        assert_int_equal(strncmp(strchr(at, '!'), lines[i][1], strlen(lines[i][1])), 0);
    }
    const char *before = echo;
    for (int row = 0; row < DECK_ROWS; row++) { /* complete and in table order */
        char *needle =
            xasprintf("\n  %s%s ", strcmp(deck_table[row].key, "iterations_to_skip") ? "" : "! ",
                      deck_table[row].key);
        const char *at = strstr(before, needle);
        assert_non_null(at);
        before = at;
        free(needle);
    }
    free(echo);
    deck_free(&d);
    errors_free(&errors);
}

static void a_presets_image_token_stays_open_for_the_tokenizer(void **state)
{
    struct deck d = { 0 };
    struct errors errors = { 0 };
    make_deck_file(&d, "input/stage2.nml", 1, &errors, NULL);
    assert_int_equal(d.data.image_token_id, 499);
    assert_false(deck_given(&d, "data", "image_token_id"));
    size_t length;
    char *echo = echo_text(&d, &length);
    assert_non_null(strstr(echo, "  image_token_id = -1 "));
    struct deck back = { 0 };
    make_deck(&back, "echo", echo, length, 1, &errors, NULL);
    assert_no_errors(&errors);
    assert_int_equal(back.data.image_token_id, 499);
    assert_false(deck_given(&back, "data", "image_token_id"));
    free(echo);
    deck_free(&d);
    deck_free(&back);
    errors_free(&errors);
}

static void reference_deck_is_up_to_date(void **state)
{
    size_t length, n;
    char *file = slurp("input/reference.nml", &length), *text = NULL;
    FILE *f = open_memstream(&text, &n);
    deck_print_reference(f);
    fclose(f);
    assert_string_equal(file, text);
    for (int row = 0; row < DECK_ROWS; row++) {
        char *item = xasprintf("%s = ", deck_table[row].key);
        assert_non_null(strstr(text, item));
        assert_non_null(strstr(text, deck_table[row].help));
        free(item);
    }
    free(text);
    free(file);
}

static void reference_deck_gives_the_run_of_an_empty_deck(void **state)
{
    struct deck a = { 0 }, b = { 0 };
    struct errors errors = { 0 };
    static const char *const more[] = { "run.train_iters=5", "lr.lr=1e-3", NULL };
    make_deck_file(&a, "input/reference.nml", 2, &errors, more);
    resolve_text(&b, "&run /", 2, &errors, more);
    assert_no_errors(&errors);
    for (int row = 0; row < DECK_ROWS; row++)
        if (!deck_table_equal(&a, &b, row))
            fail_msg("%s.%s differs", deck_table[row].group, deck_table[row].key);
    deck_free(&a);
    deck_free(&b);
    errors_free(&errors);
}

struct visited {
    int count;
    bool in_order;
};

static void visit(void *ctx, const char *group, const char *key, const char *value,
                  enum deck_origin origin)
{
    struct visited *v = ctx;
    if (deck_table_find(group, key) != v->count++ || !value)
        v->in_order = false;
}

static void visit_calls_every_key_in_table_order(void **state)
{
    struct deck d = { 0 };
    struct errors errors = { 0 };
    struct visited v = { 0, true };
    resolve_text(&d, TINY_TRAIN, 1, &errors, NULL);
    deck_visit(&d, visit, &v);
    assert_int_equal(v.count, DECK_ROWS);
    assert_true(v.in_order);
    deck_free(&d);
    errors_free(&errors);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(echo_of_every_input_deck_reads_back_to_equal_values),
        cmocka_unit_test(echo_keeps_strings_numbers_and_lists_exactly),
        cmocka_unit_test(echo_tells_where_each_value_came_from),
        cmocka_unit_test(a_presets_image_token_stays_open_for_the_tokenizer),
        cmocka_unit_test(reference_deck_is_up_to_date),
        cmocka_unit_test(reference_deck_gives_the_run_of_an_empty_deck),
        cmocka_unit_test(visit_calls_every_key_in_table_order),
    };
    return cmocka_run_group_tests_name("deck echo", tests, NULL, NULL);
}
