/* shadow.h - one operation of a table compared with the same operation of another on the same
 * numbers: what backend_shadow.c's entries are made of, and the tolerances.
 *
 *     struct shadow_call c;
 *     shadow_begin(&c, s, SHADOW_add, steps);
 *     const struct shadow_pick cols = shadow_columns(&c, n);
 *     const in_t hx = shadow_in(&c, "x", x, NULL, &cols);
 *     const out_t hy = shadow_out(&c, "y", y, NULL, &cols);
 *     c.primary->add(s, x, y);
 *     c.truth->add(&c.cpu, hx, hy);
 *     shadow_end(&c);
 *
 * `steps` decides whether all columns are compared or some. hx is a copy on the host, floats as
 * F32, bf16 widened; hy the same, and what shadow_end compares: it dies at the first element out of
 * tolerance.
 *
 * Every output begins with what is in the primary's memory, so accumulation, updates in place and
 * rows that an operation leaves alone need nothing special. A pick takes blocks of rows or columns
 * that do not depend on the others; their copies lie side by side on the host. Large operations are
 * sampled that way: blocks at both ends and two that change from call to call.
 *
 * A table's entries get no context, hence one shadow for a process: the only state is shadow.c's.
 * Local, all.
 */
#ifndef MIMO_SHADOW_H
#define MIMO_SHADOW_H

#include "backend_list.h"

#define SHADOW_NAME(op) SHADOW_##op,
enum shadow_op { BACKEND_OPS(SHADOW_NAME) SHADOW_OPS };

enum {
    SHADOW_BLOCKS = 12,
    SHADOW_OPERANDS = 16,
    SHADOW_PARTS = 3,
    SHADOW_SPREAD = 4,
    SHADOW_ROWS = 16,
    SHADOW_COLUMNS = 32
};

/* Rows or columns first[i] .. first[i]+n[i]-1 of a tensor. */
struct shadow_pick {
    int blocks;
    int64_t first[SHADOW_BLOCKS], n[SHADOW_BLOCKS];
};

struct shadow_operand {
    const char *name;
    /* host: dense, owned; after the truth ran an output's expected values */
    struct tensor dev, host;
    struct shadow_pick rows, cols; /* of dev as a matrix; a vector is one row */
    bool compare;
    int64_t length; /* of the sums behind an element */
    /* what such a sum would be if its terms had random signs; 0: the typical result */
    double terms;
    /* columns (mod period) before edge[0], edge[1]: other magnitudes, compared apart */
    int64_t period, edge[SHADOW_PARTS - 1];
    /* of integers: by how much an element may differ; NULL: not at all */
    const int64_t *slack;
};

struct shadow_call {
    const struct backend_ops *primary, *truth;
    enum shadow_op op;
    int64_t number; /* of this operation's calls */
    bool sampled, bf16;
    /* operands made from now on keep fp64 where they have it */
    bool wide;
    struct stream *stream, cpu;
    int count;
    struct shadow_operand operand[SHADOW_OPERANDS];
};

/* A stream of the shadow begins or ends; all have the same tables. The last one's end says in the
 * log what was compared. */
void shadow_attach(const struct backend_ops *primary, const struct backend_ops *truth);
void shadow_detach(void);
const struct backend_ops *shadow_primary(void);
/* Operations of more steps than this are sampled (a default is set already). */
void shadow_sample_above(double steps);
/* Calls of an operation since the first attach. */
int64_t shadow_calls(enum shadow_op op);

void shadow_begin(struct shadow_call *c, struct stream *s, enum shadow_op op, double steps);
/* n whole; or, when the call is sampled, `blocks` blocks of n. */
struct shadow_pick shadow_blocks(const struct shadow_call *c, int64_t n, int64_t block);
struct shadow_pick shadow_rows(const struct shadow_call *c, int64_t n);
struct shadow_pick shadow_columns(const struct shadow_call *c, int64_t n);
struct shadow_pick shadow_range(int64_t first, int64_t n);
/* Each entry i of pick becomes entries i*width .. (i+1)*width-1 behind `offset`. */
struct shadow_pick shadow_scaled(const struct shadow_pick *pick, int64_t width, int64_t offset);
struct shadow_pick shadow_joined(const struct shadow_pick *a, const struct shadow_pick *b);
int64_t shadow_count(const struct shadow_pick *pick);
/* t NULL: NULL. A vector's entries are picked by the pick that is given, a matrix's rows and
 * columns by both; NULL: all. */
in_t shadow_in(struct shadow_call *c, const char *name, in_t t, const struct shadow_pick *rows,
               const struct shadow_pick *cols);
out_t shadow_out(struct shadow_call *c, const char *name, out_t t, const struct shadow_pick *rows,
                 const struct shadow_pick *cols);
/* A host tensor that is only work for the truth. */
in_t shadow_work(struct shadow_call *c, enum dtype dtype, int64_t n);
/* Of the output made last: its elements are sums of so many products; the same, added to what was
 * there. */
void shadow_sums(struct shadow_call *c, int64_t length, double terms);
void shadow_adds(struct shadow_call *c, int64_t length, double terms);
void shadow_parts(struct shadow_call *c, int64_t period, int64_t first, int64_t second);
void shadow_slack(struct shadow_call *c, const int64_t *slack);
/* Root mean square of a host copy of floats; largest magnitude. */
double shadow_rms(in_t host);
double shadow_largest(in_t host);
/* What the primary has written replaces the host copy, which is not compared: the truth is to start
 * from it. */
void shadow_adopt(struct shadow_call *c, out_t host);
/* A difference found by the caller. */
_Noreturn void shadow_fail(const struct shadow_call *c, const char *tensor, int64_t row,
                           int64_t col, double primary, double truth, double tolerance,
                           const char *why);
void shadow_end(struct shadow_call *c);

#endif
