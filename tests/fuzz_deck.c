/* fuzz_deck.c - any bytes as a deck: read, resolve, echo.
 *
 * A first line `! ranks: N` resolves for N ranks (2 without it), lines `! override:
 * group.key=value` become overrides of the command line. Whatever is accepted must come back from
 * its echo with the same values.
 */
#include "fuzz.h"

#include "deck_table.h"

enum { OVERRIDES = 4, OVERRIDE_BYTES = 400 };

struct overrides {
    char text[OVERRIDES][OVERRIDE_BYTES], *v[OVERRIDES];
    int n;
};

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    FILE *out = fopen("/dev/null", "w");
    fuzz_start();
    EXPECT(out);
    deck_print_reference(out);
    fclose(out);
    return 0;
}

/* The comment lines that name overrides; they stay in the text, where they mean nothing. */
static void find_overrides(const char *text, size_t size, struct overrides *o)
{
    static const char mark[] = "! override: ";
    o->n = 0;
    for (size_t i = 0; i + sizeof mark - 1 < size && o->n < OVERRIDES; i++) {
        if ((i > 0 && text[i - 1] != '\n') || memcmp(text + i, mark, sizeof mark - 1) != 0)
            continue;
        const char *start = text + i + sizeof mark - 1;
        const size_t left = size - (size_t)(start - text);
        const char *end = memchr(start, '\n', left);
        size_t n = end ? (size_t)(end - start) : left;
        if (n >= OVERRIDE_BYTES)
            n = OVERRIDE_BYTES - 1;
        memcpy(o->text[o->n], start, n);
        o->text[o->n][n] = '\0';
        o->v[o->n] = o->text[o->n];
        o->n++;
    }
}

static char *echo(const struct deck *deck, size_t *size)
{
    char *text = NULL;
    FILE *out = open_memstream(&text, size);
    EXPECT(out);
    deck_echo(deck, out);
    fclose(out);
    return text;
}

/* The echo reads to the same values, and its own echo is the same but for the origins. */
static void expect_round_trip(const struct deck *deck, int ranks)
{
    size_t size;
    char *text = echo(deck, &size);
    struct deck again = { 0 };
    struct errors errors = { 0 };
    deck_read(&again, "echo", text, size, 0, NULL, &errors);
    deck_resolve(&again, ranks, &errors);
    for (int i = 0; i < errors.count; i++)
        fprintf(stderr, "%s\n", errors.line[i]);
    EXPECT(errors.count == 0 && again.derived.complete);
    for (int row = 0; row < DECK_ROWS; row++) {
        char *a = deck_table_format(deck, row), *b = deck_table_format(&again, row);
        const bool id = row == DECK_ROW(data, image_token_id); /* gives way to the tokenizer */
        if (!id && strcmp(a, b) != 0)
            fprintf(stderr, "%s.%s: %s became %s\n", deck_table[row].group, deck_table[row].key, a,
                    b);
        EXPECT(id || strcmp(a, b) == 0);
        free(a);
        free(b);
    }
    free(text);
    deck_free(&again);
    errors_free(&errors);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct deck deck = { 0 };
    struct errors errors = { 0 };
    struct overrides o;
    char head[32] = "";
    int ranks = 2;
    memcpy(head, data, size < sizeof head ? size : sizeof head - 1);
    if (sscanf(head, "! ranks: %d", &ranks) != 1 || ranks < 1 || ranks > 4096)
        ranks = 2;
    find_overrides((const char *)data, size, &o);

    deck_read(&deck, "x", (const char *)data, size, o.n, o.v, &errors);
    const int refused = errors.count;
    EXPECT(!deck.unread || refused > 0);
    deck_resolve(&deck, ranks, &errors);
    fuzz_expect_errors(&errors);
    EXPECT(!(deck.derived.complete && deck.unread));
    size_t bytes;
    free(echo(&deck, &bytes)); /* also of a refused deck: --check prints it */
    if (errors.count == 0) {
        EXPECT(deck.derived.complete);
        EXPECT(deck.derived.train_iterations > 0 || deck.run.mode == DECK_MODE_EVAL);
        expect_round_trip(&deck, ranks);
    }
    deck_free(&deck);
    errors_free(&errors);
    return 0;
}
