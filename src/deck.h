/* deck.h - the input deck as a struct: fields generated from the one parameter table,
 * deck_params.def.
 *
 * deck->group.key for every row of the table. Types: INTEGER int64_t, REAL double, LOGICAL bool,
 * STRING const char * (never NULL, "" when empty), CHOICE int (constants DECK_<KEY>_<VALUE> below),
 * lists: struct { n; v[] }. The text is read by rank 0 and parsed by every rank from the same
 * bytes: no struct is broadcast. deck_resolve fills presets and derived values; afterwards the deck
 * is const for the rest of the program, and every value that a layer needs (patterns, widths,
 * sizes) is in it explicitly: no layer looks at a preset name.
 */
#ifndef MIMO_DECK_H
#define MIMO_DECK_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include "check.h"

enum deck_origin {
    DECK_FROM_DEFAULT,
    DECK_FROM_PRESET,
    DECK_FROM_DERIVED,
    DECK_FROM_DECK,
    DECK_FROM_COMMAND_LINE
};

enum { DECK_LIST_MAX = 64 };
struct deck_ints {
    int n;
    int64_t v[DECK_LIST_MAX];
};
struct deck_strings {
    int n;
    const char *v[DECK_LIST_MAX];
};

/* Choices: DECK_<KEY>_<VALUE>; the order is that of the words in the table (checked by a test). */
enum { DECK_MODE_TRAIN, DECK_MODE_EVAL };
enum { DECK_BACKEND_AUTO, DECK_BACKEND_REF, DECK_BACKEND_CUDA, DECK_BACKEND_SHADOW };
enum { DECK_PRECISION_AUTO, DECK_PRECISION_FP32, DECK_PRECISION_BF16, DECK_PRECISION_FP64 };
enum { DECK_EXIT_SIGNAL_TERM, DECK_EXIT_SIGNAL_USR1 };
enum { DECK_LAYOUT_AUTO, DECK_LAYOUT_DISJOINT, DECK_LAYOUT_COLOCATED, DECK_LAYOUT_LANGUAGE_ONLY };
enum {
    DECK_LANGUAGE_NEMOTRON_20L,
    DECK_LANGUAGE_NEMOTRON_54L,
    DECK_LANGUAGE_NEMOTRON3_NANO,
    DECK_LANGUAGE_TINY,
    DECK_LANGUAGE_CUSTOM
};
enum { DECK_VISION_RADIO_VIT_H, DECK_VISION_TINY, DECK_VISION_CUSTOM };
enum { DECK_RECOMPUTE_NONE, DECK_RECOMPUTE_FULL, DECK_RECOMPUTE_SELECTIVE };
enum { DECK_BALANCING_SEQ_AUX_LOSS, DECK_BALANCING_NONE };
enum { DECK_PROJECTION_AFFINE, DECK_PROJECTION_MLP };
enum { DECK_PROJECTION_NORM_NONE, DECK_PROJECTION_NORM_RMSNORM };
enum { DECK_PROVIDER_MOCK, DECK_PROVIDER_WEBDATASET };
enum { DECK_TAG_NONE, DECK_TAG_INTERNVL, DECK_TAG_NVLM };
enum { DECK_PIXELS_NORMAL, DECK_PIXELS_ZEROS };
enum { DECK_NON_FINITE_ABORT, DECK_NON_FINITE_SKIP };
enum { DECK_LR_CONSTANT, DECK_LR_LINEAR, DECK_LR_COSINE, DECK_LR_INVERSE_SQUARE_ROOT, DECK_LR_WSD };
enum { DECK_WSD_EXPONENTIAL, DECK_WSD_LINEAR, DECK_WSD_COSINE, DECK_WSD_MINUS_SQRT };
enum { DECK_WD_CONSTANT, DECK_WD_LINEAR, DECK_WD_COSINE };
enum { DECK_ABLATION_NONE, DECK_ABLATION_ROTATE, DECK_ABLATION_ZERO };

/* The structs below are generated: struct deck_run run; struct deck_topology topology; ... one per
 * group of the table. */
#define DECK_GROUP_BEGIN(group) struct deck_##group {
#define DECK_INTEGER(group, key, ...) int64_t key;
#define DECK_REAL(group, key, ...) double key;
#define DECK_LOGICAL(group, key, ...) bool key;
#define DECK_STRING(group, key, ...) const char *key;
#define DECK_CHOICE(group, key, ...) int key;
#define DECK_INTEGERS(group, key, ...) struct deck_ints key;
#define DECK_STRINGS(group, key, ...) struct deck_strings key;
#define DECK_GROUP_END(group) \
    } \
    ;
#include "deck_params.def"

struct deck_source; /* per row: origin, line, column; deck.c only */

struct deck {
#define DECK_GROUP_BEGIN(group) struct deck_##group group;
#define DECK_INTEGER(...)
#define DECK_REAL(...)
#define DECK_LOGICAL(...)
#define DECK_STRING(...)
#define DECK_CHOICE(...)
#define DECK_INTEGERS(...)
#define DECK_STRINGS(...)
#define DECK_GROUP_END(group)
#include "deck_params.def"
    /* Derived, no keys of their own (set by deck_resolve). */
    struct {
        int64_t padded_vocab;     /* Vp */
        int64_t num_layers;       /* pattern length without '|' */
        char pattern[257];        /* the pattern without '|', NUL-terminated */
        int64_t num_microbatches; /* of the language grid, per iteration */
        /* samples per encoder rank and micro-batch: mbs*llm_dp/encoder_dp; 0 without encoder */
        int64_t encoder_microbatch;
        int64_t train_iterations;
        int64_t data_streams; /* resolved from data.data_streams */
        bool fp64, bf16;      /* resolved from run.precision and run.backend */
        /* resolved from the stage and the freeze_* keys */
        bool freeze_encoder, freeze_projector, freeze_language;
        /* For --check: everything above is set, and the errors of deck_resolve, if any, only say
         * that not_built values ask for a feature that does not exist yet. */
        bool complete;
        int not_built;
        /* what this binary or machine lacks for the backend, NULL = nothing: an error only where
         * the deck is to run (deck_need_backend) */
        const char *no_backend;
    } derived;
    struct deck_source *source; /* [rows of the table] */
    char *file;                 /* name for messages: path or "<stdin>" */
    struct deck_text *text;     /* owned strings */
    /* mistakes made the reader skip parts of the text: rules would talk about what they cannot
     * see */
    bool unread;
};

/* Parse `text` (length bytes, need not end in NUL) and then the overrides "group.key=value"; all
 * errors are collected with file:line:column. Values not given keep the table's default. Local. */
void deck_read(struct deck *deck, const char *file, const char *text, size_t length,
               int n_overrides, char *const *overrides, struct errors *errors);
/* Presets, derived values and every cross-parameter rule for a job of `size` ranks, errors
 * collected (see deck_rules.c for the list). After it without errors the deck is complete. May
 * follow a deck_read that reported errors: what the reader refused is not complained about again.
 * Local. */
void deck_resolve(struct deck *deck, int size, struct errors *errors);
/* The error of a deck that is to run where its backend is missing (EXIT_ENVIRONMENT); after
 * deck_resolve. Local. */
void deck_need_backend(const struct deck *deck, struct errors *errors);
/* The complete, re-readable echo, in table order, every line with its origin. Local. */
void deck_echo(const struct deck *deck, FILE *out);
/* The reference deck: every group and key with type, default, range, unit and help. Local. */
void deck_print_reference(FILE *out);
/* Calls visit for every key in table order with its value as text (for HDF5 attributes). Local. */
void deck_visit(const struct deck *deck,
                void (*visit)(void *ctx, const char *group, const char *key, const char *value,
                              enum deck_origin origin),
                void *ctx);
/* Where the value of group.key came from, e.g. "input/x.nml:7:12" or "command line"; for errors
 * found later. Local. */
const char *deck_where(const struct deck *deck, const char *group, const char *key);
/* Whether the user gave group.key (deck or command line). Local. */
bool deck_given(const struct deck *deck, const char *group, const char *key);
/* Whether selective recomputation covers this word of language.recompute_modules. Local. */
bool deck_recomputes(const struct deck *deck, const char *module);
void deck_free(struct deck *deck);

#endif
