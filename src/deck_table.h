/* deck_table.h - the parameter table of deck_params.def as data, for the files of the deck only
 * (deck*.c).
 *
 * A row is named by DECK_ROW(group, key). deck_table_* reads and writes one value of a struct deck
 * through its row, in the types of deck.h; nobody else needs to: the rest of the program uses
 * deck->group.key.
 */
#ifndef MIMO_DECK_TABLE_H
#define MIMO_DECK_TABLE_H

#include "deck.h"

#define DECK_ROW(group, key) DECK_ROW_##group##_##key
enum deck_row {
#define DECK_GROUP_BEGIN(group)
#define DECK_INTEGER(group, key, ...) DECK_ROW(group, key),
#define DECK_REAL(group, key, ...) DECK_ROW(group, key),
#define DECK_LOGICAL(group, key, ...) DECK_ROW(group, key),
#define DECK_STRING(group, key, ...) DECK_ROW(group, key),
#define DECK_CHOICE(group, key, ...) DECK_ROW(group, key),
#define DECK_INTEGERS(group, key, ...) DECK_ROW(group, key),
#define DECK_STRINGS(group, key, ...) DECK_ROW(group, key),
#define DECK_GROUP_END(group)
#include "deck_params.def"
    DECK_ROWS
};

enum deck_type {
    DECK_TYPE_INTEGER,
    DECK_TYPE_REAL,
    DECK_TYPE_LOGICAL,
    DECK_TYPE_STRING,
    DECK_TYPE_CHOICE,
    DECK_TYPE_INTEGERS,
    DECK_TYPE_STRINGS
};

struct deck_param {
    const char *group, *key;
    enum deck_type type;
    size_t offset;             /* of the field in struct deck */
    int64_t integer, min, max; /* INTEGER(S): default and range */
    double real, real_min, real_max;
    bool logical;
    const char *text;  /* STRING, CHOICE: default; lists: default words */
    size_t longest;    /* STRING */
    const char *words; /* CHOICE, STRINGS: what is allowed */
    const char *unit;
    /* NULL = built; else the values that work and the feature that is missing */
    const char *only, *feature;
    const char *help;
};

struct deck_source {
    enum deck_origin origin;
    int line, column; /* of the value, when it came from the deck */
    /* a value was given and refused: rules stay silent about this row */
    bool bad;
    uint64_t elements; /* lists: which elements were given */
    const char *where; /* text of deck_where */
};

extern const struct deck_param deck_table[DECK_ROWS];

/* What the user types in groups and keys: at most this many bytes. */
enum {
    DECK_NAME_MAX = 63,
    DECK_FILE_MAX = 1 << 20,
    DECK_LINE_MAX = 1 << 16,
    DECK_ITEMS_MAX = 10000
};

/* Row of group.key in any letter case, -1 when there is none. Local. */
int deck_table_find(const char *group, const char *key);
/* First row of a group in any letter case, -1 when there is none. Local. */
int deck_table_group(const char *group);
/* Set one row to its default. Local. */
void deck_table_default(struct deck *deck, int row);
/* Whether the row holds its default. Local. */
bool deck_table_is_default(const struct deck *deck, int row);
/* Whether the row holds a default outside its range, which says "not given". Local. */
bool deck_table_is_unset(const struct deck *deck, int row);
/* Whether two decks hold the same value in this row. Local. */
bool deck_table_equal(const struct deck *a, const struct deck *b, int row);
/* The row's value in namelist syntax, "" for an empty list; owned by the caller. Local. */
char *deck_table_format(const struct deck *deck, int row);
/* Range or words of the row as text for messages and the reference deck; owned by the caller.
 * Local. */
char *deck_table_range(int row);
/* "integer", "real", "logical", "string". Local. */
const char *deck_table_type(int row);
/* Position of `word` among blank-separated words; '' is the empty word; -1 = none. Local. */
int deck_table_word(const char *words, const char *word);
/* The n-th word, owned by the caller, NULL past the end. Local. */
char *deck_table_nth_word(const char *words, int n);
/* A copy of length bytes and a NUL, owned by the deck. Local. */
const char *deck_table_keep(struct deck *deck, const char *text, size_t length);
/* Free what deck_table_keep made. Local. */
void deck_table_release(struct deck *deck);
/* Put "; did you mean ...?" for a wrong key (or group when key is NULL) into out, "" when nothing
 * is near. Local. */
const char *deck_table_suggest(const char *group, const char *key, char *out, size_t size);
/* Insertions, deletions, changes and swaps of neighbours between two texts, letter case ignored;
 * limit+1 when more. Local. */
int deck_table_distance(const char *a, const char *b, int limit);

/* Parse the deck's text into its fields; the groups are counted. deck_text.c. Local. */
int deck_text_parse(struct deck *deck, const char *text, size_t length, struct errors *errors);
/* Parse one "group.key=value" override. deck_override.c. Local. */
void deck_override(struct deck *deck, const char *argument, struct errors *errors);
/* Fill what presets set and the user left open. deck_presets.c. Local. */
void deck_presets_apply(struct deck *deck);
/* Derived values and conditions between keys: deck_resolve. deck_rules.c. Local. */
void deck_rules_resolve(struct deck *deck, int size, struct errors *errors);

/* The field of a row. Local. */
static inline int64_t *deck_integer(struct deck *d, int row)
{
    return (int64_t *)((char *)d + deck_table[row].offset);
}
static inline double *deck_real(struct deck *d, int row)
{
    return (double *)((char *)d + deck_table[row].offset);
}
static inline bool *deck_logical(struct deck *d, int row)
{
    return (bool *)((char *)d + deck_table[row].offset);
}
static inline const char **deck_string(struct deck *d, int row)
{
    return (const char **)((char *)d + deck_table[row].offset);
}
static inline int *deck_choice(struct deck *d, int row)
{
    return (int *)((char *)d + deck_table[row].offset);
}
static inline struct deck_ints *deck_ints(struct deck *d, int row)
{
    return (struct deck_ints *)((char *)d + deck_table[row].offset);
}
static inline struct deck_strings *deck_strings(struct deck *d, int row)
{
    return (struct deck_strings *)((char *)d + deck_table[row].offset);
}

#endif
