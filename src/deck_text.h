/* deck_text.h - between the deck's reader (deck_text.c), the meaning of values (deck_value.c) and
 * the overrides (deck_override.c); for these files only. */
#ifndef MIMO_DECK_TEXT_H
#define MIMO_DECK_TEXT_H

#include "deck_table.h"

enum { DECK_ERRORS_MAX = 200, DECK_SHOWN_MAX = 60, DECK_SHOWN = DECK_SHOWN_MAX + 8 };

struct deck_place {
    int line, column;
};

struct deck_reader {
    struct deck *deck;
    struct errors *errors;
    const char *text; /* LF line ends, no BOM */
    size_t length, at;
    int line, column;
    int items, faults;
    /* an override: strings may stand without quotes, no positions in messages */
    bool command_line;
    bool stop;                 /* too many errors or items */
    bool recovering;           /* after a fault: silent until something makes sense again */
    int group_line[DECK_ROWS]; /* where a group (by its first row) was opened, 0 = not yet */
    int groups;
};

struct deck_value {
    char *token; /* as written; quoted: the contents */
    bool quoted;
    int64_t count; /* repeat count */
    struct deck_place place;
};

struct deck_values {
    struct deck_value v[DECK_LIST_MAX + 1];
    int n;
    int64_t total; /* with repeat counts, saturating */
    bool faulty;
};

/* Give the reader a text: its sizes and bytes are checked before anything is read, CR-LF becomes LF
 * in `copy` (as long as the text). False: it is no text, reported. Local. */
bool deck_text_load(struct deck_reader *r, const char *text, size_t length, char *copy);
/* The values from the cursor to the end of the text; what else stands there is reported. Local. */
void deck_text_values(struct deck_reader *r, const char *name, struct deck_values *values);
/* Report a mistake that is confined to one item. Local. */
void deck_text_fault_item(struct deck_reader *r, struct deck_place p, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
/* A piece of user text for a message: cut when long, never inside a character. Local. */
const char *deck_text_shown(char out[DECK_SHOWN], const char *text, size_t length);

/* Give the values of one item to its row, once; first..last are 1-based elements of a list, 0 = no
 * index. Local. */
void deck_value_set_item(struct deck_reader *r, int row, struct deck_place p, int64_t first,
                         int64_t last, struct deck_values *values);
/* The same without looking at what was given before. False = reported. Local. */
bool deck_value_set_list(struct deck_reader *r, int row, struct deck_place p, int64_t first,
                         int64_t last, const struct deck_values *values);
bool deck_value_set_scalar(struct deck_reader *r, int row, const struct deck_values *values);

#endif
