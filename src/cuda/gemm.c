/* gemm.c - the dense matrix product on cuBLASLt.
 *
 * Row-major matrices are the column-major transposes of themselves, so D = op(A) op(B) is asked for
 * as D^T = op(B)^T op(A)^T: the operands change places and keep their transposition.
 *
 * Inputs are both BF16 or both F32 (true fp32: no TF32), accumulation is fp32. F32 times BF16 is a
 * product of BF16 matrices as well: three terms of BF16 hold all digits of an F32 number
 * (multiply_terms). What cuBLASLt cannot do - F32 inputs with a BF16 result, c and d of different
 * types, no inner dimension - goes through an fp32 product in scratch, rows at a time, and one pass
 * that adds beta*c and rounds (cuda_gemm_finish).
 *
 * Repeatability: the first algorithm of the library's own ranking is taken, once per form of
 * product, and kept; nothing is timed. Products split along k may only be summed in fp32 in the
 * workspace by a separate kernel, in fixed order. The alignment that the library may count on is
 * what the pointers really have, up to 16 bytes: the choice does not depend on where an arena
 * happens to lie.
 */
#include <stdlib.h>
#include <string.h>
#include <cublasLt.h>
#include "cuda_ops.h"
#include "cuda_sizes.h"
#include "cuda_util.h"

#define CHECK_CUBLAS(call) check_cublas((call), #call, __FILE__, __LINE__)

enum { ALIGNMENT = 16, FIRST_SLOTS = 256 };

/* Everything the choice of an algorithm depends on. No padding: compared and hashed as bytes. */
struct form {
    int64_t m, n, k, lda, ldb, ldc, ldd;
    int32_t ta, tb, accumulate, in, out;
    int32_t align_a, align_b, align_c, align_d, used;
};

struct plan {
    struct form form;
    cublasLtMatmulDescOpaque_t product;
    cublasLtMatrixLayoutOpaque_t a, b, c, d;
    cublasLtMatmulAlgo_t algorithm;
};

struct cuda_gemm {
    cublasLtHandle_t handle;
    struct plan *plan; /* [slots], open addressing; used at most half */
    size_t slots, used;
};

static void check_cublas(cublasStatus_t status, const char *call, const char *file, int line);
static void multiply(struct stream *s, bool ta, bool tb, double alpha, in_t a, in_t b, double beta,
                     in_t c, out_t d);
static void multiply_in_scratch(struct stream *s, bool ta, bool tb, double alpha, in_t a, in_t b,
                                double beta, in_t c, out_t d);
static void multiply_terms(struct stream *s, bool ta, bool tb, double alpha, in_t a, in_t b,
                           double beta, in_t c, out_t d);
static struct plan *plan_of(struct cuda_context *context, const struct form *form);

void cuda_gemm(struct stream *s, bool ta, bool tb, double alpha, in_t a, in_t b, double beta,
               in_t c, out_t d)
{
    const int64_t m = tensor_rows(d), n = tensor_cols(d), k = ta ? tensor_rows(a) : tensor_cols(a);
    ASSERT(tensor_rows(a) == (ta ? k : m) && tensor_cols(a) == (ta ? m : k));
    ASSERT(tensor_rows(b) == (tb ? n : k) && tensor_cols(b) == (tb ? k : n));
    ASSERT((a->dtype == b->dtype || a->dtype == DTYPE_F32) &&
           (b->dtype == DTYPE_BF16 || b->dtype == DTYPE_F32));
    ASSERT(d->dtype == DTYPE_BF16 || d->dtype == DTYPE_F32);
    ASSERT(beta == 0.0 || (c && tensor_rows(c) == m && tensor_cols(c) == n));
    if (beta == 0.0)
        c = NULL;
    if (m == 0 || n == 0)
        return;
    if (k == 0)
        cuda_gemm_finish(s, NULL, beta, c, d);
    else if (a->dtype != b->dtype)
        multiply_terms(s, ta, tb, alpha, a, b, beta, c, d);
    else if ((a->dtype == DTYPE_F32 && d->dtype == DTYPE_BF16) || (c && c->dtype != d->dtype))
        multiply_in_scratch(s, ta, tb, alpha, a, b, beta, c, d);
    else
        multiply(s, ta, tb, alpha, a, b, beta, c ? c : d, d);
}

void cuda_gemm_free(struct cuda_gemm *g)
{
    if (!g)
        return;
    CHECK_CUBLAS(cublasLtDestroy(g->handle));
    free(g->plan);
    free(g);
}

static void check_cublas(cublasStatus_t status, const char *call, const char *file, int line)
{
    if (status != CUBLAS_STATUS_SUCCESS)
        fatal(EXIT_INTERNAL, file, line, NULL, "%s: %s (%s)", call, cublasLtGetStatusString(status),
              cublasLtGetStatusName(status));
}

/* In bytes: the largest power of two up to ALIGNMENT that divides the address. */
static int32_t alignment_of(in_t t)
{
    const uintptr_t p = (uintptr_t)t->data | ALIGNMENT;
    return (int32_t)(p & -p);
}

/* The stride of a single row is nobody's: views may hold anything there. */
static int64_t stride_of(in_t t)
{
    return tensor_rows(t) == 1 ? tensor_cols(t) : t->ld;
}

static void multiply(struct stream *s, bool ta, bool tb, double alpha, in_t a, in_t b, double beta,
                     in_t c, out_t d)
{
    struct cuda_context *context = cuda_context_of(s);
    const struct form form = {
        .m = tensor_rows(d),
        .n = tensor_cols(d),
        .k = ta ? tensor_rows(a) : tensor_cols(a),
        .lda = stride_of(a),
        .ldb = stride_of(b),
        .ldc = stride_of(c),
        .ldd = stride_of(d),
        .ta = ta,
        .tb = tb,
        .accumulate = beta != 0.0,
        .in = (int32_t)a->dtype,
        .out = (int32_t)d->dtype,
        .align_a = alignment_of(a),
        .align_b = alignment_of(b),
        .align_c = alignment_of(c),
        .align_d = alignment_of(d),
        .used = 1,
    };
    struct plan *p = plan_of(context, &form);
    const float scale = (float)alpha, keep = (float)beta;
    CHECK_CUBLAS(cublasLtMatmul(context->gemm->handle, &p->product, &scale, b->data, &p->b, a->data,
                                &p->a, &keep, c->data, &p->c, d->data, &p->d, &p->algorithm,
                                cuda_scratch(s, CUDA_GEMM_WORKSPACE), CUDA_GEMM_WORKSPACE,
                                context->stream));
}

/* Rows first..first+n-1 of op(t), t as it lies. */
static struct tensor part_of(in_t t, bool transposed, int64_t first, int64_t n)
{
    return transposed ? tensor_col_range(t, first, n) : tensor_row_range(t, first, n);
}

/* The fp32 product lies behind the library's workspace. */
static void multiply_in_scratch(struct stream *s, bool ta, bool tb, double alpha, in_t a, in_t b,
                                double beta, in_t c, out_t d)
{
    const int64_t m = tensor_rows(d), n = tensor_cols(d);
    char *memory = (char *)cuda_scratch(s, CUDA_SCRATCH) + CUDA_GEMM_WORKSPACE;
    const int64_t fit = (CUDA_SCRATCH - CUDA_GEMM_WORKSPACE) / (n * (int64_t)sizeof(float)),
                  step = fit < m ? fit : m;
    if (step < 1)
        FATAL(EXIT_INTERNAL, "a product with rows of %lld elements is too wide for the scratch",
              (long long)n);
    for (int64_t first = 0; first < m; first += step) {
        const int64_t rows = m - first < step ? m - first : step;
        const struct tensor product = tensor_2d(memory, DTYPE_F32, PLACE_DEVICE, rows, n);
        const struct tensor part = part_of(a, ta, first, rows),
                            to = tensor_row_range(d, first, rows);
        multiply(s, ta, tb, alpha, &part, b, 0.0, &product, &product);
        if (c) {
            const struct tensor from = tensor_row_range(c, first, rows);
            cuda_gemm_finish(s, product.data, beta, &from, &to);
        } else
            cuda_gemm_finish(s, product.data, 0.0, NULL, &to);
    }
}

/* Rows of d at a time: the largest multiple of 8 (any number below 8) of which each takes `each`
 * bytes of what is left. */
static int64_t rows_that_fit(int64_t m, int64_t each, int64_t taken)
{
    const int64_t room = (CUDA_SCRATCH - CUDA_GEMM_WORKSPACE - taken) / each,
                  fit = room < 8 ? room : room / 8 * 8;
    if (fit < 1)
        FATAL(
            EXIT_INTERNAL,
            "a product of fp32 and bf16 that takes %lld bytes for a row is too wide for the scratch",
            (long long)each);
    return fit < m ? fit : m;
}

/* a's three terms lie one behind the other. For d in fp32 as rows of a, so that their products are
 * added up in the end; in BF16, where few terms are summed (the router's experts), along the inner
 * dimension, with three copies of b. */
static void multiply_terms(struct stream *s, bool ta, bool tb, double alpha, in_t a, in_t b,
                           double beta, in_t c, out_t d)
{
    const bool apart = d->dtype == DTYPE_F32;
    const int64_t m = tensor_rows(d), n = tensor_cols(d), k = ta ? tensor_rows(a) : tensor_cols(a);
    char *memory = (char *)cuda_scratch(s, CUDA_SCRATCH) + CUDA_GEMM_WORKSPACE;
    const int64_t copies = apart ? 0 : (2 * 3 * n * k + 255) / 256 * 256;
    const int64_t step =
        rows_that_fit(m, 3 * 2 * k + (apart ? 3 * 4 * n : 0), copies + (apart ? 256 : 0));
    const struct tensor stacked = tb ? tensor_2d(memory, DTYPE_BF16, PLACE_DEVICE, n, 3 * k)
                                     : tensor_2d(memory, DTYPE_BF16, PLACE_DEVICE, 3 * k, n);
    const struct tensor *right = apart ? b : &stacked;
    ASSERT(!c || c->dtype == d->dtype);
    if (!apart)
        cuda_gemm_terms(s, b, memory, tb ? k : n * k, tensor_cols(&stacked));
    for (int64_t first = 0; first < m; first += step) {
        const int64_t rows = m - first < step ? m - first : step, high = apart ? 3 * rows : rows,
                      deep = apart ? k : 3 * k;
        const struct tensor from = part_of(a, ta, first, rows),
                            to = tensor_row_range(d, first, rows);
        const struct tensor addend = c ? tensor_row_range(c, first, rows) : to;
        const struct tensor left = tensor_2d(memory + copies, DTYPE_BF16, PLACE_DEVICE,
                                             ta ? deep : high, ta ? high : deep);
        /* Terms follow each other along left's rows or along its columns. */
        cuda_gemm_terms(s, &from, left.data, apart == ta ? tensor_cols(&from) : rows * k,
                        tensor_cols(&left));
        if (apart) {
            const struct tensor product = tensor_2d(memory + (2 * 3 * rows * k + 255) / 256 * 256,
                                                    DTYPE_F32, PLACE_DEVICE, high, n);
            multiply(s, ta, tb, alpha, &left, right, 0.0, &product, &product);
            cuda_gemm_add_terms(s, product.data, beta, c ? &addend : NULL, &to);
        } else
            multiply(s, ta, tb, alpha, &left, right, beta, &addend, &to);
    }
}

/* ---- plans ---- */

static cudaDataType_t type_of(int32_t dtype)
{
    return dtype == DTYPE_BF16 ? CUDA_R_16BF : CUDA_R_32F;
}

static void plan_make(struct plan *p, cublasLtHandle_t handle, const struct form *f)
{
    const cublasOperation_t first = f->tb ? CUBLAS_OP_T : CUBLAS_OP_N,
                            second = f->ta ? CUBLAS_OP_T : CUBLAS_OP_N;
    const uint64_t workspace = CUDA_GEMM_WORKSPACE;
    const uint32_t reduction = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
    const uint32_t align_a = (uint32_t)f->align_a, align_b = (uint32_t)f->align_b,
                   align_c = (uint32_t)f->align_c, align_d = (uint32_t)f->align_d;
    const uint64_t m = (uint64_t)f->m, n = (uint64_t)f->n, k = (uint64_t)f->k;
    cublasLtMatmulPreferenceOpaque_t preference;
    cublasLtMatmulHeuristicResult_t found;
    int count = 0;
    p->form = *f;
    CHECK_CUBLAS(cublasLtMatmulDescInit(&p->product, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    CHECK_CUBLAS(cublasLtMatmulDescSetAttribute(&p->product, CUBLASLT_MATMUL_DESC_TRANSA, &first,
                                                sizeof first));
    CHECK_CUBLAS(cublasLtMatmulDescSetAttribute(&p->product, CUBLASLT_MATMUL_DESC_TRANSB, &second,
                                                sizeof second));
    /* Column-major shapes of the matrices as they lie: the library's first operand is b. */
    CHECK_CUBLAS(
        cublasLtMatrixLayoutInit(&p->b, type_of(f->in), f->tb ? k : n, f->tb ? n : k, f->ldb));
    CHECK_CUBLAS(
        cublasLtMatrixLayoutInit(&p->a, type_of(f->in), f->ta ? m : k, f->ta ? k : m, f->lda));
    CHECK_CUBLAS(cublasLtMatrixLayoutInit(&p->c, type_of(f->out), n, m, f->ldc));
    CHECK_CUBLAS(cublasLtMatrixLayoutInit(&p->d, type_of(f->out), n, m, f->ldd));
    CHECK_CUBLAS(cublasLtMatmulPreferenceInit(&preference));
#define PREFER(attribute, value) \
    CHECK_CUBLAS(cublasLtMatmulPreferenceSetAttribute( \
        &preference, CUBLASLT_MATMUL_PREF_##attribute, &(value), sizeof(value)))
    PREFER(MAX_WORKSPACE_BYTES, workspace);
    PREFER(REDUCTION_SCHEME_MASK, reduction);
    PREFER(MIN_ALIGNMENT_A_BYTES, align_b);
    PREFER(MIN_ALIGNMENT_B_BYTES, align_a);
    PREFER(MIN_ALIGNMENT_C_BYTES, align_c);
    PREFER(MIN_ALIGNMENT_D_BYTES, align_d);
#undef PREFER
    const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(
        handle, &p->product, &p->b, &p->a, &p->c, &p->d, &preference, 1, &found, &count);
    if (status != CUBLAS_STATUS_SUCCESS || count < 1 || found.state != CUBLAS_STATUS_SUCCESS)
        FATAL(
            EXIT_INTERNAL,
            "cuBLASLt has no algorithm for a product of %lld x %lld x %lld, transposed %d %d, types %s to %s, rows "
            "%lld %lld %lld %lld apart: %s",
            (long long)f->m, (long long)f->n, (long long)f->k, f->ta, f->tb,
            dtype_name((enum dtype)f->in), dtype_name((enum dtype)f->out), (long long)f->lda,
            (long long)f->ldb, (long long)f->ldc, (long long)f->ldd,
            cublasLtGetStatusString(status));
    p->algorithm = found.algo;
}

/* FNV-1a over the form's 64-bit words. */
static size_t hash(const struct form *f)
{
    uint64_t word[sizeof *f / sizeof(uint64_t)], h = 0xcbf29ce484222325u;
    memcpy(word, f, sizeof word);
    for (size_t i = 0; i < sizeof word / sizeof *word; i++)
        h = (h ^ word[i]) * 0x100000001b3u;
    return (size_t)(h ^ h >> 32);
}

static struct plan *slot_of(struct plan *plan, size_t slots, const struct form *form)
{
    size_t i = hash(form) & (slots - 1);
    while (plan[i].form.used && memcmp(&plan[i].form, form, sizeof *form) != 0)
        i = (i + 1) & (slots - 1);
    return &plan[i];
}

static struct plan *plan_of(struct cuda_context *context, const struct form *form)
{
    _Static_assert(sizeof(struct form) % sizeof(uint64_t) == 0, "hashed by 64-bit words");
    struct cuda_gemm *g = context->gemm;
    if (!g) {
        g = context->gemm = xcalloc(1, sizeof *g);
        g->slots = FIRST_SLOTS;
        g->plan = xcalloc(g->slots, sizeof *g->plan);
        CHECK_CUBLAS(cublasLtCreate(&g->handle));
    }
    struct plan *p = slot_of(g->plan, g->slots, form);
    if (p->form.used)
        return p;
    if (2 * (g->used + 1) > g->slots) {
        struct plan *old = g->plan;
        const size_t slots = g->slots;
        g->slots *= 2;
        g->plan = xcalloc(g->slots, sizeof *g->plan);
        for (size_t i = 0; i < slots; i++)
            if (old[i].form.used)
                *slot_of(g->plan, g->slots, &old[i].form) = old[i];
        free(old);
        p = slot_of(g->plan, g->slots, form);
    }
    plan_make(p, g->handle, form);
    g->used++;
    return p;
}
