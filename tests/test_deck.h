/* test_deck.h - decks from text or file for the tests of the deck and the command line. */
#ifndef MIMO_TEST_DECK_H
#define MIMO_TEST_DECK_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "deck_table.h"

/* The whole file and a NUL; fails the test when there is none. */
static inline char *slurp(const char *path, size_t *length)
{
    FILE *f = fopen(path, "rb");
    if (!f)
        fail_msg("cannot open %s (tests run in the repository root)", path);
    size_t capacity = (size_t)4 << 20;
    char *text = xmalloc(capacity, 1);
    *length = fread(text, 1, capacity - 1, f);
    text[*length] = '\0';
    fclose(f);
    return text;
}

/* Read, and for ranks > 0 resolve, a deck; overrides end with NULL. */
static inline void make_deck(struct deck *deck, const char *name, const char *text, size_t length,
                             int ranks, struct errors *errors, const char *const *overrides)
{
    int n = 0;
    while (overrides && overrides[n])
        n++;
    deck_read(deck, name, text, length, n, (char *const *)overrides, errors);
    if (ranks > 0)
        deck_resolve(deck, ranks, errors);
}

static inline void make_deck_file(struct deck *deck, const char *path, int ranks,
                                  struct errors *errors, const char *const *overrides)
{
    size_t length;
    char *text = slurp(path, &length);
    make_deck(deck, path, text, length, ranks, errors, overrides);
    free(text);
}

/* What a training needs at least. */
#define TINY_TRAIN "&run train_iters = 10 /\n&language preset = 'tiny' /\n&lr lr = 1e-3 /\n"

static inline void resolve_text(struct deck *deck, const char *text, int ranks,
                                struct errors *errors, const char *const *overrides)
{
    make_deck(deck, "x.nml", text, strlen(text), ranks, errors, overrides);
}

#define OVERRIDES(...) ((const char *const[]){ __VA_ARGS__, NULL })

static inline bool has_error(const struct errors *errors, const char *part)
{
    for (int i = 0; i < errors->count; i++)
        if (strstr(errors->line[i], part))
            return true;
    return false;
}

static inline void assert_no_errors(const struct errors *errors)
{
    if (errors->count)
        fail_msg("%d errors, first: %s", errors->count, errors->line[0]);
}

static inline char *echo_text(const struct deck *deck, size_t *length)
{
    FILE *f = tmpfile();
    assert_non_null(f);
    deck_echo(deck, f);
    *length = (size_t)ftell(f);
    rewind(f);
    char *text = xmalloc(*length + 1, 1);
    assert_int_equal(fread(text, 1, *length, f), *length);
    text[*length] = '\0';
    fclose(f);
    return text;
}

#endif
