/* hf_config_internal.h - between the hf_config*.c: the table of keys, and a directory's keys as
 * facts about the deck. */
#ifndef MIMO_HF_CONFIG_INTERNAL_H
#define MIMO_HF_CONFIG_INTERNAL_H

#include <jansson.h>
#include "deck_table.h"
#include "hf_config.h"

enum hf_section { HF_TEXT, HF_ENCODER, HF_TOP, HF_SECTIONS };

struct hf_config {
    char *path;                         /* of config.json */
    json_t *root, *preprocessor;        /* owned; the second may be NULL */
    const json_t *section[HF_SECTIONS]; /* NULL = not there */
    bool vlm;
};

/* A key whose value is a deck's value. letter: only in models with this kind of layer, 0 = all.
 * loose: a difference is no contradiction. told: shapes do not show it, so it must be there. */
struct hf_key {
    enum hf_section section;
    char letter;
    const char *names; /* the first is transformers' own, then aliases */
    enum deck_row row;
    bool loose, told;
};
/* A key that must have one value (JSON) where it is given; written: by an export, too. */
struct hf_fixed {
    enum hf_section section;
    char letter;
    const char *names, *value;
    bool written;
};
extern const struct hf_key hf_keys[];
extern const struct hf_fixed hf_fixed_keys[];
extern const int hf_n_keys, hf_n_fixed_keys;

/* A value of the directory for a row of the deck. */
struct hf_fact {
    enum deck_row row;
    bool loose;
    double number;  /* of numbers and truth values */
    char text[260]; /* of the layer pattern */
    char key[96];   /* where it comes from, e.g. "text_config.hidden_size" */
};
enum { HF_FACTS = 64 };
struct hf_facts {
    struct hf_fact fact[HF_FACTS];
    int n;
};
/* Everything the wanted modules' keys say; what this program cannot do is an error. Local. */
void hf_config_facts(const struct hf_config *c, const bool want[MODEL_MODULES],
                     struct hf_facts *facts, struct errors *errors);
/* The fact of a row or NULL. Local. */
const struct hf_fact *hf_config_fact(const struct hf_facts *facts, enum deck_row row);

#endif
