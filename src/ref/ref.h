/* ref.h - the reference backend's inner header. Every file of this folder but backend_ref.c is
 * compiled twice, with `real` = float (suffix f32) and `real` = double (suffix f64); REF(name) is
 * the symbol of this compilation. Plain loops, GEMM through CBLAS; sums accumulate in double. No
 * pragmas, no intrinsics. Local, all.
 */
#ifndef MIMO_REF_H
#define MIMO_REF_H

#include <cblas.h>
#include "backend_list.h"

#define REF_CAT2(a, b) a##b
#define REF_CAT(a, b) REF_CAT2(a, b)
#define REF(name) REF_CAT(ref_##name##_, ref_suffix)

/* cblas_sgemm or cblas_dgemm of this compilation: REF_GEMM(order, ta, tb, m, n, k, alpha, a, lda,
 * b, ldb, beta, c, ldc) */
#define ref_blas_gemm_f32 cblas_sgemm
#define ref_blas_gemm_f64 cblas_dgemm
#define REF_GEMM REF_CAT(ref_blas_gemm_, ref_suffix)

/* Every operation that this folder implements in both precisions. */
#define REF_OPS(X) BACKEND_MATH_OPS(X)

/* The prototypes are those of the table's members. */
#define X(op) extern __typeof__(*((struct backend_ops *)0)->op) ref_##op##_f32, ref_##op##_f64;
REF_OPS(X)
#undef X
extern __typeof__(*((struct backend_ops *)0)->ssd_work) ref_ssd_work_f32, ref_ssd_work_f64;
extern __typeof__(*((struct backend_ops *)0)->attention_work) ref_attention_work_f32,
    ref_attention_work_f64;

#endif
