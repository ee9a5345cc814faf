/* safetensors.h - the weight files of Hugging Face: a directory of them read strictly, and written.
 *
 * A file: u64 little-endian header length; a JSON object {name: {dtype, shape, data_offsets}}
 * padded with spaces; the data. Offsets count from the end of the header. Tensors lie side by side
 * without holes and end with the file; no name comes twice. Several files (shards) belong together
 * by model.safetensors.index.json, whose weight_map names the file of every tensor.
 *
 * Files are foreign: lengths, depths and products are bounded before they size anything
 * (robustness.md 5.1), and a file name in an index stays inside the directory. Opening reads
 * headers only. The structs hold no pointers but their arrays, so one rank can read and broadcast
 * them.
 */
#ifndef MIMO_SAFETENSORS_H
#define MIMO_SAFETENSORS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include "check.h"

enum {
    SAFETENSORS_HEADER = 25 << 20, /* bytes of a header or index */
    SAFETENSORS_DEPTH = 8,         /* of its JSON */
    SAFETENSORS_TENSORS = 1 << 18, /* of a header */
    SAFETENSORS_FILES = 4096,
    SAFETENSORS_DIMS = 6,
    SAFETENSORS_NAME = 232, /* bytes of a name with its NUL */
    SAFETENSORS_PATH = 1024 /* of a directory */
};

/* The four that hold weights; every other type of the format is kept by name for messages. */
enum safetensors_kind {
    SAFETENSORS_BF16,
    SAFETENSORS_F16,
    SAFETENSORS_F32,
    SAFETENSORS_F64,
    SAFETENSORS_OTHER
};

struct safetensors_tensor {
    char name[SAFETENSORS_NAME];
    char type[8]; /* as in the file: "BF16", "F32", "I64", ... */
    int32_t kind, file, ndim;
    int64_t shape[SAFETENSORS_DIMS], elements;
    int64_t at, bytes; /* offset in its file */
};

struct safetensors_file {
    char name[SAFETENSORS_NAME]; /* below the directory */
    int64_t bytes;
};

struct safetensors {
    char directory[SAFETENSORS_PATH];
    struct safetensors_file *file;
    struct safetensors_tensor *tensor; /* by name */
    int n_files, n;
};

/* Parse the header `text` of n bytes that `data` bytes of tensors follow; tensors are appended to s
 * with `at` counted from the data's first byte and file = n_files. False with `why`. Pure; Local.
 */
bool safetensors_parse(struct safetensors *s, const char *text, size_t n, int64_t data, char *why,
                       size_t why_size);
/* Parse an index: the file of every tensor, sorted by name, and the files in natural order. False
 * with `why`. Pure; Local. */
bool safetensors_parse_index(struct safetensors *s, const char *text, size_t n, char *why,
                             size_t why_size);
/* Headers of everything in `path`: a directory with an index, with model.safetensors or with
 * projector.safetensors (the first that is there), or one file. Mistakes are collected
 * (EXIT_CHECKPOINT); then nothing is open. Local. */
bool safetensors_open(struct safetensors *s, const char *path, struct errors *errors);
void safetensors_free(struct safetensors *s);
/* NULL when absent. Local. */
const struct safetensors_tensor *safetensors_find(const struct safetensors *s, const char *name);
/* "[4,8]"; Local. */
const char *safetensors_shape(const struct safetensors_tensor *t, char *out, size_t size);

/* ---- numbers ------------------------------------------------------------------------------------
 */

/* Reads and writes parts of tensors; keeps one file open. Zeroed but for s and write = start. */
struct safetensors_access {
    const struct safetensors *s;
    bool write;
    int fd, file; /* of the file that is open; fd = 0: none */
    void *raw;    /* scratch */
};
/* Elements [first, first + n) of a tensor of the four kinds, widened to double (exact). A mistake
 * is collected (EXIT_CHECKPOINT). Local. */
bool safetensors_read(struct safetensors_access *a, const struct safetensors_tensor *t,
                      int64_t first, int64_t n, double *out, struct errors *errors);
/* The n elements in `from`, of the tensor's own type, at element `first`. A mistake is collected
 * (EXIT_WRITE). Local. */
bool safetensors_write(struct safetensors_access *a, const struct safetensors_tensor *t,
                       int64_t first, int64_t n, const void *from, struct errors *errors);
/* Sync what was written and close; Local. */
bool safetensors_close(struct safetensors_access *a, struct errors *errors);

/* Lay out new files for the n tensors in s->tensor (name, kind, ndim, shape set; order kept, at
 * most shard_bytes of data a file but at least one tensor) below s->directory: model.safetensors,
 * or shards and their index, or `single` when that is a name. Fills everything else, writes the
 * headers and reserves the space; the tensors are then sorted by name. Mistakes are collected
 * (EXIT_WRITE). Local. */
bool safetensors_create(struct safetensors *s, const char *single, int64_t shard_bytes,
                        struct errors *errors);

#endif
