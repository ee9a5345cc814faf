/* io_internal.h - what the io_*.c files share and nobody else includes: HDF5 calls that cannot fail
 * quietly, and the state and place of a checkpoint. Its tensors: io_tensors.h.
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
/* Closing writes the superblock once more. Where that failed on one rank the others would wait
 * inside HDF5 for ever: that rank ends the job. Collective over the world. */
void io_close_parallel(const char *path, hid_t file);

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
/* A complete checkpoint open for reading; -1 with a collected mistake. version NULL: another format
 * than this program's is one too; else it is returned. Local. */
hid_t io_open_checkpoint(const char *path, int64_t *version, struct errors *errors);
/* <dir>/iter_%07d; Local. */
void io_iteration_directory(char *out, size_t size, const char *dir, int64_t iteration);
/* The iteration in the tracker; -1: no tracker; -2: unreadable, `why` says how. Local. */
int64_t io_tracker_get(const char *dir, char *why, size_t why_size);

/* ---- io_find.c ----------------------------------------------------------------------------- */

/* Iterations <= most that have a directory of ours, the largest first; their number. The list is
 * the caller's. Local. */
int64_t io_list_iterations(const char *dir, int64_t most, int64_t **list);

#endif
