/* hf_config.h - config.json of a Hugging Face directory and the deck: compared key by key, a deck
 * made from it, and written for an export (hf.md 6). All three use one table of keys.
 *
 * Language keys lie in text_config or llm_config of a vision-language model, or at the top of a
 * language model's file; encoder keys in vision_config or at the top. Which of the two a file is,
 * its content decides: the label (architectures, model_type) is not looked at.
 */
#ifndef MIMO_HF_CONFIG_H
#define MIMO_HF_CONFIG_H

#include <stdio.h>
#include "model.h"
#include "safetensors.h"

struct hf_config;

/* config.json and preprocessor_config.json of a directory; NULL with an error (EXIT_CHECKPOINT)
 * when the first cannot be read. Infinity and NaN are taken as values, repeated keys as their last.
 * Local. */
struct hf_config *hf_config_open(const char *directory, struct errors *errors);
/* Compare the keys of the wanted modules with the deck: what contradicts the deck's model, or is a
 * feature that this program lacks, is an error (EXIT_CHECKPOINT); what only deserves to be known is
 * added to notes. Local. */
void hf_config_check(const struct hf_config *c, const struct deck *deck,
                     const bool want[MODEL_MODULES], struct errors *errors, struct errors *notes);
/* Print the deck that fits `directory`. Mistakes are collected (EXIT_CHECKPOINT). Local. */
void hf_config_print_deck(const char *directory, FILE *out, struct errors *errors);

enum hf_kind { HF_LANGUAGE, HF_VISION, HF_VLM };
/* The text of config.json for an export, owned by the caller; dtype as torch calls it ("float32");
 * image_token -1 = unknown; special: a config to take token ids from, or NULL. Local. */
char *hf_config_text(const struct deck *deck, enum hf_kind kind, const char *dtype,
                     int64_t image_token, const struct hf_config *special);
void hf_config_free(struct hf_config *c);

#endif
