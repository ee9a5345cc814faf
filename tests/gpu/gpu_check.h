/* gpu_check.h - what the shadow tests of the CUDA operations share. A test is a small C program
 * without MPI and HDF5; it calls cuda_<op> on the device and the reference operation
 * (backend_ref_f32) on the host, on the same numbers.
 *
 *     if (!gpu_case(g, "rmsnorm_forward", "%lldx%lld %s", rows, cols, dtype_name(dtype)))
 *         return;                                      // not chosen by --only
 *     struct gpu_tensor *x = gpu_matrix(g, dtype, rows, cols), *y = gpu_matrix(...), ...;
 *     gpu_normal(g, x, 1.0);                           // what is not filled is an output: all NaN
 *     gpu_run(g)                                       // a loop: twice, more often for --time
 *         cuda_rmsnorm_forward(g->stream, &x->dev, ...);
 *     backend_ref_f32.rmsnorm_forward(g->cpu, &x->host, ...);   // may overwrite outputs' host side
 *     gpu_close(g, y, "y", gpu_rounding(dtype));
 *     gpu_report(g, bytes, 0);                         // one line; frees the case's tensors
 *
 * Found besides wrong numbers: results that differ in one bit between two runs (whose scratch holds
 * different rubbish), writes outside a view, writes to inputs, elements never written. A tensor has
 * a guarded allocation; g->pad elements follow each row of a matrix and g->offset elements precede
 * the first one, all bytes 0xFF: NaN as a number, -1 as an index.
 *
 * Times are medians of events around single calls, taken of cases with 8 MiB or more; the calls
 * rotate among copies of all tensors so that the L2 cache does not hold them. Local, all.
 */
#ifndef MIMO_GPU_CHECK_H
#define MIMO_GPU_CHECK_H

#include <stdbool.h>
#include <stdint.h>
#include "backend.h"
#include "cuda_ops.h"

struct gpu_tensor {
    struct tensor dev; /* of the dtype asked for, PLACE_DEVICE, rows ld = cols + pad */
    /* dense; floats as F32, rounded to the device's dtype when filled; data NULL with
     * gpu_device_only */
    struct tensor host;
    bool written;         /* by the operation: restored before each run, then compared */
    bool varies;          /* an output that need not repeat bit by bit */
    char *memory, *image; /* the device allocation and its contents before the operation */
    char *replica[24];    /* copies for timing; [0] is memory */
    unsigned char *got;   /* what the operation left, whole allocation, on the host */
    size_t bytes, begin;  /* of the allocation; of the first element in it */
    struct gpu_tensor *next;
};

/* Relative Frobenius error (up to twice that for few numbers); largest |got - want| / (|want| +
 * rms(want)) over the elements. */
struct gpu_bound {
    double frobenius, element;
};

struct gpu_check {
    struct stream *stream, *cpu;
    int pad, offset; /* of tensors made from now on; gpu_layout */
    struct gpu_tensor *list;
    void *state; /* gpu_check.c's */
};

/* Options: --time, --seed N, --only WORD (in the operation's name, repeatable), --quick
 * (gpu_production is false), --large (gpu_small is false). */
struct gpu_check *gpu_check_start(int argc, char **argv);
/* Prints the count; exit status. */
int gpu_check_end(struct gpu_check *g);
/* Starts a case; false when the command line leaves it out. */
bool gpu_case(struct gpu_check *g, const char *op, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
/* Whether large shapes are run; small ones. */
bool gpu_production(const struct gpu_check *g);
bool gpu_small(const struct gpu_check *g);
void gpu_layout(struct gpu_check *g, int pad, int offset);

/* Tensors of the running case; an output until filled. */
struct gpu_tensor *gpu_tensor(struct gpu_check *g, enum dtype dtype, int ndim,
                              const int64_t *shape);
/* offset, no pad */
struct gpu_tensor *gpu_vector(struct gpu_check *g, enum dtype dtype, int64_t n);
struct gpu_tensor *gpu_matrix(struct gpu_check *g, enum dtype dtype, int64_t rows, int64_t cols);
/* The same without host side: the test compares rows of it with gpu_close_rows. */
struct gpu_tensor *gpu_device_only(struct gpu_check *g, enum dtype dtype, int64_t rows,
                                   int64_t cols);

/* Random contents, another draw at each call. Floats. */
void gpu_normal(struct gpu_check *g, struct gpu_tensor *t, double sigma);
void gpu_uniform(struct gpu_check *g, struct gpu_tensor *t, double low, double high);
/* Integers low..high-1. */
void gpu_integers(struct gpu_check *g, struct gpu_tensor *t, int64_t low, int64_t high);
/* What the test has written to t->host goes to the device; floats are rounded, on the host side
 * too. */
void gpu_upload(struct gpu_check *g, struct gpu_tensor *t);
/* What lies on the device now becomes t's host side. */
void gpu_download(struct gpu_check *g, struct gpu_tensor *t);
/* Rows of `from` repeated over all rows of t (device only): production shapes whose host copy would
 * be too large. */
void gpu_repeat(struct gpu_check *g, struct gpu_tensor *t, const struct gpu_tensor *from);
/* t is filled and the operation changes it. */
void gpu_inout(struct gpu_tensor *t);
/* 64 random bits of the case's stream. */
uint64_t gpu_random(struct gpu_check *g);

#define gpu_run(g) for (gpu_run_begin(g); gpu_run_again(g);)
void gpu_run_begin(struct gpu_check *g);
bool gpu_run_again(struct gpu_check *g);

/* bf16: one rounding of a correct fp32 value; fp32: short sums. */
struct gpu_bound gpu_rounding(enum dtype dtype);
/* fp32 sums of n products in any order against the reference's. */
struct gpu_bound gpu_summing(enum dtype dtype, int64_t n);
/* t against its host side, floats. */
void gpu_close(struct gpu_check *g, struct gpu_tensor *t, const char *name, struct gpu_bound bound);
/* Rows row[0..n-1] of t against rows 0..n-1 of want (F32); all other elements must be finite. */
void gpu_close_rows(struct gpu_check *g, struct gpu_tensor *t, const char *name, const int64_t *row,
                    int64_t n, const struct tensor *want, struct gpu_bound bound);
/* Columns [first, first + cols(want)) of t against want (F32), by the relative Frobenius error. */
void gpu_close_columns(struct gpu_check *g, struct gpu_tensor *t, const char *name, int64_t first,
                       const struct tensor *want, struct gpu_bound bound);
/* Integers, bit by bit. */
void gpu_equal(struct gpu_check *g, struct gpu_tensor *t, const char *name);
/* A failure found by the test itself. */
void gpu_fail(struct gpu_check *g, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* One line for the case; bytes and flops of one call, 0 = not shown. */
void gpu_report(struct gpu_check *g, double bytes, double flops);

#endif
