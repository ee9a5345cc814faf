/* io_hf.h - weights from and to Hugging Face directories (hf.md). */
#ifndef MIMO_IO_HF_H
#define MIMO_IO_HF_H

#include <stdio.h>
#include "model.h"

/* ---- import: checkpoint.import_language, import_vision, import_projector ------------------------
 */

/* Whether the deck asks for weights of a module. Local. */
bool import_wanted(const struct deck *deck);
/* Replace the values of the imported modules by what the directories hold; every rank reads what it
 * holds. Both ways strict: tensors that are missing, not expected or of another shape, keys of
 * config.json that contradict the deck and numbers that are not finite are all listed
 * (EXIT_CHECKPOINT). The caller refreshes the masters. Collective over the world. */
void import_weights(struct model *model, struct errors *errors);
/* For --check: what an import would read, directory by directory, from headers alone; `all` are the
 * ranks' topologies and role the ranks to print. A directory that is not there is a note. Local. */
void import_print(const struct deck *deck, const struct topology *all, const int *role, int n_roles,
                  FILE *out, struct errors *errors);

/* ---- export: mimo --export DIR checkpoint.h5 ------------------------------------------------- */

struct export_options {
    const char *dtype;   /* "bf16", "fp32" or "fp64"; NULL = BF16 of a bf16 run, else F32 */
    int64_t shard_bytes; /* of tensors in a file; 0 = the Hub's usual 5 GB */
};
/* Write the model of a checkpoint as a directory that transformers loads; what was done is said on
 * out. The directory appears when it is complete. Mistakes are collected. Local (one process). */
void export_checkpoint(const char *directory, const char *checkpoint,
                       const struct export_options *options, FILE *out, struct errors *errors);

#endif
