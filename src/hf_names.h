/* hf_names.h - which tensors of a Hugging Face directory are which parameters, by one table.
 *
 * A directory spells a tensor in several ways: as published on disk, as transformers calls it in
 * memory, inside a vision-language model or alone. hf_canonical takes the prefix away and tells the
 * module; the table in hf_names.c then knows every spelling of every parameter (hf.md 2-4).
 *
 * Nothing is transposed anywhere: a parameter, seen as a matrix of rows of its last dimension, is a
 * permutation of whole rows of one or more tensors (struct hf_map). So a reader fetches just the
 * rows and columns that it holds, and a writer places any block of rows.
 */
#ifndef MIMO_HF_NAMES_H
#define MIMO_HF_NAMES_H

#include "model.h"
#include "safetensors.h"

enum { HF_PARTS = 3, HF_SPELLINGS = 4 };

/* Rows [row, row + rows) of the parameter are rows [source_row, ...) of tensor `source`. */
struct hf_run {
    int source;
    int64_t row, source_row, rows;
};

/* One tensor that a parameter consists of; name is canonical. */
struct hf_source {
    char name[SAFETENSORS_NAME];
    int ndim;
    int64_t shape[TENSOR_MAX_DIMS];
};

/* A parameter as tensors in one spelling. Rows in no run (vocabulary padding) exist here only. */
struct hf_map {
    int64_t rows, cols; /* of the parameter */
    int n_sources, n_runs;
    struct hf_source *source;
    struct hf_run *run; /* by row */
};

/* The tensor's module and, in out, its name without the prefixes that tell where it lies;
 * MODEL_MODULES when no module is known by that prefix. Local. */
enum model_module hf_canonical(const char *name, char out[SAFETENSORS_NAME]);
/* Fill m with the map of p in spelling 0, 1, ... (0 = published); false when there is no such
 * spelling. Local. */
bool hf_map_init(struct hf_map *m, const struct deck *deck, const struct param *p, int spelling);
void hf_map_free(struct hf_map *m);
/* Called for n elements that lie side by side in tensor `source` from element `first` on, and in a
 * dense box of the parameter from element `local` on. */
typedef void hf_visit(void *ctx, int source, int64_t first, int64_t local, int64_t n);
/* Every element of the box [start, start + count) of p that a tensor has. Local. */
void hf_map_walk(const struct hf_map *m, const struct param *p, const int64_t *start,
                 const int64_t *count, hf_visit *visit, void *ctx);
/* Canonical names of the tensor that scales the rows of p (RADIO's layer scale), by number from 0;
 * NULL past the last. out holds the name. Local. */
const char *hf_scale_name(const struct param *p, int number, char out[SAFETENSORS_NAME]);

/* What is known and not used. A group's word ("video embedder", "audio", ...) or NULL. Local. */
const char *hf_dropped(enum model_module module, const char *name, const char *canonical);
/* Why a tensor cannot be taken (quantised, latent experts, ...) or NULL. Local. */
const char *hf_refused(enum model_module module, const char *canonical, const char *type);

/* The published name of a canonical one; vlm: inside a vision-language model. Local. */
void hf_published(enum model_module module, const char *canonical, bool vlm,
                  char out[SAFETENSORS_NAME]);

#endif
