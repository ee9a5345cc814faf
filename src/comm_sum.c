/* comm_sum.c - see comm_sum.h. Blocks of BLOCK elements so that the accumulators stay in the first
 * cache. */
#include "comm_sum.h"
#include <math.h>
#include <string.h>
#include "bf16.h"

enum { BLOCK = 512 };

static double combine_real(enum comm_op op, double a, double b)
{
    if (op == COMM_SUM)
        return a + b;
    if (isnan(a) || isnan(b))
        return NAN;
    return op == COMM_MAX ? (a > b ? a : b) : (a < b ? a : b);
}

static int64_t combine_integer(enum comm_op op, int64_t a, int64_t b)
{
    if (op == COMM_SUM)
        return (int64_t)((uint64_t)a + (uint64_t)b);
    return op == COMM_MAX ? (a > b ? a : b) : (a < b ? a : b);
}

static void widen(enum dtype dtype, const void *part, int64_t first, int count, double *real,
                  int64_t *integer)
{
    for (int i = 0; i < count; i++)
        switch (dtype) {
        case DTYPE_F32: real[i] = ((const float *)part)[first + i]; break;
        case DTYPE_F64: real[i] = ((const double *)part)[first + i]; break;
        case DTYPE_BF16: real[i] = bf16_to_float(((const uint16_t *)part)[first + i]); break;
        case DTYPE_I32: integer[i] = ((const int32_t *)part)[first + i]; break;
        case DTYPE_I64: integer[i] = ((const int64_t *)part)[first + i]; break;
        case DTYPE_U8: integer[i] = ((const uint8_t *)part)[first + i]; break;
        }
}

static void narrow(enum dtype dtype, void *out, int64_t first, int count, const double *real,
                   const int64_t *integer)
{
    for (int i = 0; i < count; i++)
        switch (dtype) {
        case DTYPE_F32: ((float *)out)[first + i] = (float)real[i]; break;
        case DTYPE_F64: ((double *)out)[first + i] = real[i]; break;
        case DTYPE_BF16: ((uint16_t *)out)[first + i] = bf16_from_double(real[i]); break;
        case DTYPE_I32:
            ((int32_t *)out)[first + i] = (int32_t)(uint32_t)(uint64_t)integer[i];
            break;
        case DTYPE_I64: ((int64_t *)out)[first + i] = integer[i]; break;
        case DTYPE_U8: ((uint8_t *)out)[first + i] = (uint8_t)(uint64_t)integer[i]; break;
        }
}

void comm_sum(enum dtype dtype, enum comm_op op, const void *parts, int n_parts, int64_t n,
              void *out)
{
    const bool is_real = dtype == DTYPE_F32 || dtype == DTYPE_F64 || dtype == DTYPE_BF16;
    const size_t width = dtype_bytes(dtype);
    for (int64_t first = 0; first < n; first += BLOCK) {
        const int count = (int)(n - first < BLOCK ? n - first : BLOCK);
        double real[BLOCK], real_next[BLOCK];
        int64_t integer[BLOCK], integer_next[BLOCK];
        widen(dtype, parts, first, count, real, integer);
        for (int p = 1; p < n_parts; p++) {
            widen(dtype, (const char *)parts + (size_t)p * (size_t)n * width, first, count,
                  real_next, integer_next);
            if (is_real && op == COMM_SUM)
                for (int i = 0; i < count; i++)
                    real[i] += real_next[i];
            else if (is_real)
                for (int i = 0; i < count; i++)
                    real[i] = combine_real(op, real[i], real_next[i]);
            else
                for (int i = 0; i < count; i++)
                    integer[i] = combine_integer(op, integer[i], integer_next[i]);
        }
        narrow(dtype, out, first, count, real, integer);
    }
}
