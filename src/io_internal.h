/* io_internal.h - what the io_*.c files share and nobody else includes: HDF5 calls that cannot fail
 * quietly, and logical tensors cut into slabs.
 *
 * Writing: metadata (groups, datasets, attributes) is laid out by world rank 0 alone through the
 * serial driver; afterwards every rank opens the finished layout through MPI-IO and only overwrites
 * raw data with independent transfers. So no rank can be left inside a collective HDF5 call by the
 * failure of another (robustness.md 0.11): the rank that fails ends the job. Reading: every rank
 * opens the file read-only through the serial driver and reads its slabs; mistakes are collected.
 * This header is the only one that shows hdf5.h.
 */
#ifndef MIMO_IO_INTERNAL_H
#define MIMO_IO_INTERNAL_H

#include <hdf5.h>
#include "io_hdf5.h"

enum {
    IO_TRACE_VERSION = 1,
    IO_CHECKPOINT_VERSION = 1,
    IO_BATCHES_VERSION = 1,
    IO_PATH = 4096,
    IO_TENSOR_PATH = 192
};

/* ---- io_hdf5.c: HDF5 with one way to fail -------------------------------------------------- */

/* Silence HDF5's own error printing and forbid plugins; first call of every entry point. Local. */
void io_start(void);
/* What HDF5 or the system said about the last failure, in one printable line. Local. */
const char *io_reason(char *out, size_t size);
/* Return `status`, or end the job with EXIT_WRITE naming `path` and `what` when it is negative.
 * Local. */
int64_t io_written(int64_t status, const char *file, int line, const char *path, const char *what);
#define IO_WRITE(path, what, call) io_written((int64_t)(call), __FILE__, __LINE__, path, what)

/* Serial driver. create: truncates; checksummed: the newest format, whose metadata carries
 * checksums (a live reader needs the oldest). open: negative on failure. No file locks: network
 * file systems refuse them and a live reader must not stop a run. Local. */
hid_t io_create(const char *path, bool checksummed);
hid_t io_open(const char *path, bool write);
/* MPI-IO driver, read and write. Collective over the world. */
hid_t io_open_parallel(const char *path, struct comm *world);

/* HDF5 type of a dtype (bfloat16: a 16-bit float that h5py reads as float32); the caller closes it.
 * Local. */
hid_t io_type(enum dtype dtype);
const char *io_type_name(enum dtype dtype); /* "float32", "bfloat16", ... */

/* These write or end the job; Local. `path` is the file, for messages. */
hid_t io_group(const char *path, hid_t at, const char *name);
/* Contiguous, space reserved at once, never filled, no times; data may be NULL (layout only). units
 * and description may be NULL. */
void io_put(const char *path, hid_t at, const char *name, hid_t type, int ndim,
            const int64_t *shape, const void *data, const char *units, const char *description);
/* A scalar dataset. */
void io_put_string(const char *path, hid_t at, const char *name, const char *value,
                   const char *description);
void io_attr_string(const char *path, hid_t at, const char *name, const char *value);
void io_attr_strings(const char *path, hid_t at, const char *name, int n, const char *const *value);
void io_attr_i64(const char *path, hid_t at, const char *name, int64_t value);
void io_attr_u64(const char *path, hid_t at, const char *name, uint64_t value);
/* Root attributes format and format_version, groups /code and /deck. */
void io_put_header(const char *path, hid_t file, const char *format, int64_t version,
                   const struct deck *deck);
char *io_deck_text(const struct deck *deck); /* the echo, owned by the caller */

/* These read or return false (value untouched). Strings are cut to size, fixed and variable length
 * are both read; Local. */
bool io_get_attr_string(hid_t at, const char *name, char *out, size_t size);
bool io_get_attr_i64(hid_t at, const char *name, int64_t *out);
bool io_get_attr_u64(hid_t at, const char *name, uint64_t *out);
bool io_get_string(hid_t at, const char *name, char *out, size_t size); /* scalar dataset */
/* Shape of a dataset: number of dimensions, or -1 when it is absent or has more than
 * TENSOR_MAX_DIMS. */
int io_get_shape(hid_t at, const char *name, int64_t *shape);
/* A whole dataset of exactly `elements` elements, converted to the memory type. */
bool io_get(hid_t at, const char *name, hid_t type, int64_t elements, void *out);
/* Box of a dataset; ndim must be the dataset's. */
bool io_get_box(hid_t set, hid_t type, int ndim, const int64_t *start, const int64_t *count,
                void *out);
void io_write_box(const char *path, const char *name, hid_t set, hid_t type, int ndim,
                  const int64_t *start, const int64_t *count, const void *data);

/* Files. Local. */
void io_sync(const char *path); /* fsync a file or directory, or end the job with EXIT_WRITE */
void io_make_directories(const char *path); /* mkdir -p, or end the job with EXIT_WRITE */
/* "": a regular file that can be read; else the reason why not (absent, symbolic link, directory,
 * ...). */
const char *io_why_not_regular(const char *path);
/* host and process id as part of a file name; unique among live processes. */
const char *io_nonce(char *out, size_t size);
/* Elements of a box. */
int64_t io_volume(int ndim, const int64_t *count);

/* ---- io_tensors.c: logical tensors, who owns which part, checksums ------------------------- */

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

/* ---- io_checkpoint.c, io_restore.c --------------------------------------------------------- */

/* The scalars of struct train_state as datasets below /state, in file order: one list for writing,
 * reading, hashing, printing. */
enum io_state_kind { IO_STATE_I64, IO_STATE_F64, IO_STATE_INT };
struct io_state_field {
    const char *name;
    size_t offset;
    enum io_state_kind kind;
    const char *description;
};
extern const struct io_state_field io_state_fields[];
extern const int io_n_state_fields;
/* The job's layout in one clause; equal text = equal layout. Local. */
void io_layout_text(const struct topology *topo, char *out, size_t size);
/* All of /state, its checksum verified; the positions are the caller's to free, also on failure.
 * Local. */
bool io_state_get(hid_t file, struct train_state *s, char *layout, size_t layout_size);
/* A complete checkpoint open for reading; -1 with a collected mistake. Local. */
hid_t io_open_checkpoint(const char *path, struct errors *errors);
/* Compare the file's tensors with the wanted ones, both ways, and the manifest with both; every
 * mistake is collected. Local. */
void io_audit_tensors(const char *path, hid_t file, const struct io_tensors *want,
                      bool with_optimizer, struct errors *errors);
/* <dir>/iter_%07d; Local. */
void io_iteration_directory(char *out, size_t size, const char *dir, int64_t iteration);
/* The iteration in the tracker; -1: no tracker; -2: unreadable, `why` says how. Local. */
int64_t io_tracker_get(const char *dir, char *why, size_t why_size);

/* ---- io_find.c ----------------------------------------------------------------------------- */

/* Iterations <= most that have a directory of ours, the largest first; their number. The list is
 * the caller's. Local. */
int64_t io_list_iterations(const char *dir, int64_t most, int64_t **list);
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
