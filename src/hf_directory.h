/* hf_directory.h - one Hugging Face directory that weights are taken from: its headers, which of
 * its tensors are which parameters, and the audit that accounts for every one of them both ways.
 */
#ifndef MIMO_HF_DIRECTORY_H
#define MIMO_HF_DIRECTORY_H

#include "hf_names.h"

struct hf_found {          /* one tensor by its canonical name */
    int32_t module, index; /* in s.tensor */
    char name[SAFETENSORS_NAME];
};

struct hf_directory {
    const char *path;         /* as in the deck */
    bool want[MODEL_MODULES]; /* the modules that this run takes from it */
    struct safetensors s;
    struct hf_found *found; /* [s.n] by module and name */
};

enum { HF_DIRECTORIES = MODEL_MODULES };

/* The directories that the deck names, each once; returns their number. Nothing is opened. Local.
 */
int hf_directories(const struct deck *deck, struct hf_directory out[HF_DIRECTORIES]);
/* Read headers and config.json, compare both with the deck's model and account for every tensor.
 * Mistakes are collected (EXIT_CHECKPOINT), remarks go to notes; Local. */
void hf_directory_audit(struct hf_directory *d, const struct deck *deck, struct errors *errors,
                        struct errors *notes);
/* Fill `found` from s; Local. */
void hf_directory_index(struct hf_directory *d);
void hf_directory_free(struct hf_directory *d);

/* The map of p in the spelling that the directory has most of, and its tensors (NULL = absent),
 * owned by the caller; returns how many are there. Local. */
int hf_directory_map(const struct hf_directory *d, const struct deck *deck, const struct param *p,
                     struct hf_map *m, const struct safetensors_tensor ***tensor);
/* The tensor that scales the rows of p, or NULL. Local. */
const struct safetensors_tensor *hf_directory_scale(const struct hf_directory *d,
                                                    const struct param *p);
/* NULL when absent. Local. */
const struct safetensors_tensor *hf_directory_find(const struct hf_directory *d,
                                                   enum model_module module, const char *canonical);

#endif
