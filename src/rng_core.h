/* rng_core.h - the arithmetic of rng.h, for the host and for kernels: who includes it says in
 * RNG_CORE what its functions are (static inline; in CUDA also __host__ __device__). Local, all.
 *
 * Ten rounds of two 32x32->64 bit multiplications; between rounds the key is bumped by the Weyl
 * constants. Counter words: (lo low, lo high, hi low, hi high), least significant first as in the
 * published test vectors.
 */
#ifndef MIMO_RNG_CORE_H
#define MIMO_RNG_CORE_H

#include <math.h>
#include "rng.h"

RNG_CORE void rng_core_philox(struct rng_key key, uint64_t hi, uint64_t lo, uint32_t out[4])
{
    uint32_t c0 = (uint32_t)lo, c1 = (uint32_t)(lo >> 32), c2 = (uint32_t)hi,
             c3 = (uint32_t)(hi >> 32);
    uint32_t k0 = key.k[0], k1 = key.k[1];
    for (int round = 0; round < 10; round++) {
        const uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
        c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
        c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c1 = (uint32_t)p1;
        c3 = (uint32_t)p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    out[0] = c0;
    out[1] = c1;
    out[2] = c2;
    out[3] = c3;
}

RNG_CORE uint64_t rng_core_word(const uint32_t out[4], int lane)
{
    return (uint64_t)out[2 * lane + 1] << 32 | out[2 * lane];
}

/* [0,1) with 53 bits. */
RNG_CORE double rng_core_fraction(uint64_t word)
{
    return (double)(word >> 11) * 0x1p-53;
}

RNG_CORE double rng_core_uniform(struct rng_key key, uint64_t index)
{
    uint32_t w[4];
    rng_core_philox(key, 0, index / 2, w);
    return rng_core_fraction(rng_core_word(w, (int)(index % 2)));
}

RNG_CORE double rng_core_normal(struct rng_key key, uint64_t index)
{
    uint32_t w[4];
    rng_core_philox(key, 0, index / 2, w);
    const double u = rng_core_fraction(rng_core_word(w, 0)),
                 v = rng_core_fraction(rng_core_word(w, 1));
    /* 1-u lies in (0,1], so the logarithm is finite. */
    const double radius = sqrt(-2.0 * log(1.0 - u)), angle = 6.283185307179586476925286766559 * v;
    return radius * (index % 2 ? sin(angle) : cos(angle));
}

RNG_CORE double rng_core_initial(enum rng_init init, double scale, struct rng_key key,
                                 uint64_t index)
{
    switch (init) {
    case RNG_ONES: return 1.0;
    case RNG_ZEROS: return 0.0;
    case RNG_NORMAL: return scale * rng_core_normal(key, index);
    case RNG_UNIFORM: return scale * (2.0 * rng_core_uniform(key, index) - 1.0);
    case RNG_A_LOG: return log(1.0 + 15.0 * rng_core_uniform(key, index));
    case RNG_DT_BIAS: {
        const double lo = log(0.001), hi = log(0.1);
        const double dt = fmax(exp(rng_core_uniform(key, index) * (hi - lo) + lo), 1e-4);
        return dt + log(-expm1(-dt));
    }
    }
    return 0.0;
}

#endif
