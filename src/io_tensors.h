/* io_tensors.h - the tensors of a checkpoint, for the io_*.c files only: which box of which dataset
 * a rank holds, who writes it, and checksums of every block.
 *
 * A tensor in the file has its full, logical shape. A rank's shard is a few boxes of it (slabs);
 * the first of its data-parallel replicas writes them, one block of the manifest each.
 */
#ifndef MIMO_IO_TENSORS_H
#define MIMO_IO_TENSORS_H

#include "io_internal.h"

enum io_part { IO_VALUE, IO_MASTER, IO_EXP_AVG, IO_EXP_AVG_SQ, IO_PARTS };

/* A box of the logical tensor that lies densely in this rank's shard from element `local` on. */
struct io_slab {
    int64_t start[TENSOR_MAX_DIMS], count[TENSOR_MAX_DIMS], local;
};
/* Slabs of this rank's shard of p by the coordinates in g (tp; ep and expt_tp for experts); returns
 * their number. Pure. Local. */
int io_slabs(const struct param *p, const struct grid *g, struct io_slab slab[PARAM_MAX_BLOCKS]);
/* Whether this rank writes its shard of p: the first of the data-parallel replicas. Pure. Local. */
bool io_owner(const struct param *p, const struct grid *g);
/* The run of n elements from `first` on of a shard given as slabs, as slabs whose local counts from
 * the run's start; returns their number, at most IO_RUN_SLABS for each slab. Pure. Local. */
enum { IO_RUN_SLABS = 2 * TENSOR_MAX_DIMS - 1, IO_MAX_SLABS = PARAM_MAX_BLOCKS * IO_RUN_SLABS };
int io_run_slabs(const struct io_slab *shard, int n_shard, int ndim, int64_t first, int64_t n,
                 struct io_slab out[IO_MAX_SLABS]);

struct io_tensor {             /* one dataset of a checkpoint */
    char path[IO_TENSOR_PATH]; /* /model/<module>/<name> or /optimizer/<module>/<name>/<part> */
    int32_t dtype, ndim;
    int64_t shape[TENSOR_MAX_DIMS], elements;
};
struct io_tensors { /* ordered by path, numbers in natural order */
    struct io_tensor *tensor;
    int count;
};

/* One checksummed part of a dataset, as its writer cut it. */
struct io_block {
    int64_t tensor, start[TENSOR_MAX_DIMS], count[TENSOR_MAX_DIMS];
    uint64_t xxh3;
};
struct io_manifest {
    char (*path)[IO_TENSOR_PATH];
    int64_t n_paths;
    struct io_block *block;
    int64_t n_blocks;
};

/* Every tensor of the job's model over all ranks, each covered exactly once by its owners
 * (checked). Collective over the world. */
void io_tensors_init(struct io_tensors *t, const struct topology *topo, const struct model *model,
                     bool with_optimizer);
/* The values of the whole model that model_describe has filled. Local. */
void io_tensors_whole(struct io_tensors *t, const struct model *model);
void io_tensors_free(struct io_tensors *t);
/* NULL when absent. Local. */
struct io_tensor *io_tensors_find(const struct io_tensors *t, const char *path);
/* Write what this rank owns into the open file; its blocks come back in m (only block, n_blocks).
 * Local. */
void io_tensors_write(const char *path, hid_t file, const struct io_tensors *t,
                      const struct topology *topo, const struct model *model, bool with_optimizer,
                      struct io_manifest *m);
/* Read this rank's shards, every block verified; mistakes are collected. Local. */
void io_tensors_read(const char *path, hid_t file, const struct io_manifest *m,
                     const struct topology *topo, struct model *model, bool with_optimizer,
                     struct errors *errors);
/* Blocks of all ranks to rank 0, ordered. Collective over the world. */
void io_manifest_gather(struct io_manifest *m, const struct topology *topo);
/* Group /manifest with its own checksum; a missing or damaged one is collected. Local, both. */
void io_manifest_put(const char *path, hid_t file, const struct io_tensors *t,
                     const struct io_manifest *m);
bool io_manifest_get(const char *path, hid_t file, struct io_manifest *m, struct errors *errors);
void io_manifest_free(struct io_manifest *m);
/* Read block b of an open dataset of that dtype into buf (room for it) and compare its checksum; a
 * mistake is collected. Local. */
bool io_block_verify(const char *path, hid_t set, const char *name, enum dtype dtype, int ndim,
                     const struct io_block *b, void *buf, struct errors *errors);

/* ---- io_restore.c ---------------------------------------------------------------------------- */

/* Compare the file's tensors with the wanted ones, both ways, and the manifest with both; every
 * mistake is collected. Local. */
void io_audit_tensors(const char *path, hid_t file, const struct io_tensors *want,
                      bool with_optimizer, struct errors *errors);

/* ---- io_find.c ------------------------------------------------------------------------------- */

/* A tensor as a file holds it. */
struct io_stored {
    const char *path, *name; /* of the file and in it, for messages; the caller's */
    hid_t set;
    enum dtype dtype;
    int ndim;
    int64_t shape[TENSOR_MAX_DIMS];
};
/* Open a tensor of one of our types, any other is collected; the caller closes s->set. Local. */
bool io_stored_open(struct io_stored *s, const char *path, hid_t file, const char *name,
                    struct errors *errors);
/* Read a block of the manifest and compare its checksum; a mistake is collected. Local. */
bool io_stored_verify(const struct io_stored *s, const struct io_block *b, struct errors *errors);

#endif
