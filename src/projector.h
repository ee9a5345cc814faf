/* projector.h - picture features [N_img, 4*Wv] to the language width H (model.md 2.7): affine y = x
 * W^T, or mlp y = relu(norm(x) W1^T)^2 W2^T with an optional RMSNorm in front. No bias. */
#ifndef MIMO_PROJECTOR_H
#define MIMO_PROJECTOR_H

#include "model.h"

struct projector_kept { /* one micro-batch */
    struct tensor rs;   /* acc [rows]; mlp with norm */
    struct tensor h;    /* [rows,4*4*Wv/t]; mlp */
};

/* Declare the parameters for features of `width`. The projector is owned by the caller. Local. */
struct projector *projector_init(struct model *m, int64_t width);
/* Kept tensors of n slots and the temporaries, `rows` each. Local. */
void projector_plan(struct model *m, struct projector *l, struct arenas *as, int64_t rows,
                    struct projector_kept *kept, int n);
/* out [rows,H] from x [rows,width]; kept sized for at least as many rows. Collective over encoder
 * tp. */
void projector_forward(struct model *m, struct projector *l, struct projector_kept *kept,
                       const struct tensor *x, const struct tensor *out);
/* dx [rows,width] (zeroed here, then accumulated; NULL when nothing upstream trains). Collective
 * over encoder tp. */
void projector_backward(struct model *m, struct projector *l, struct projector_kept *kept,
                        const struct tensor *x, const struct tensor *dout, const struct tensor *dx);
void projector_free(struct projector *l);

#endif
