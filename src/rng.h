/* rng.h - counter-based random numbers: Philox-4x32-10 (Salmon et al. 2011, "Parallel random
 * numbers: as easy as 1, 2, 3").
 *
 * A number is a function of (key, counter) only, so nothing depends on ranks, threads or order of
 * evaluation. A key is made from the run's seed and a purpose string
 * ("init:decoder.layers.0.mixer.D", "cpe", "mock:text"); the counter is the global element or
 * sample index. Local, all.
 */
#ifndef MIMO_RNG_H
#define MIMO_RNG_H

#include <stdint.h>

struct rng_key {
    uint32_t k[2];
};

/* How an initial value of a parameter is made (model.md 3). */
enum rng_init { RNG_ONES, RNG_ZEROS, RNG_NORMAL, RNG_UNIFORM, RNG_A_LOG, RNG_DT_BIAS };

/* XXH3-64 of the purpose, seeded with seed */
struct rng_key rng_key(uint64_t seed, const char *purpose);
/* The four 32-bit words at counter (hi, lo). */
void rng_philox(struct rng_key key, uint64_t hi, uint64_t lo, uint32_t out[4]);
/* Uniform [0,1) with 53 bits, from words (2*lane, 2*lane+1) of the block; lane 0 or 1. */
double rng_uniform(struct rng_key key, uint64_t hi, uint64_t lo, int lane);
/* Uniform number `index` of the stream: block index/2, lane index%2, hi = 0. */
double rng_uniform_at(struct rng_key key, uint64_t index);
/* Standard normal number `index` of the stream (Box-Muller on block index/2: cos for even, sin for
 * odd index). */
double rng_normal_at(struct rng_key key, uint64_t index);
/* Initial value `index`; scale = standard deviation (normal) or half-width (uniform). */
double rng_initial_at(enum rng_init init, double scale, struct rng_key key, uint64_t index);
/* Uniform integer in [0, n) from the block at (hi, lo), n < 2^63, by 64-bit multiply-high (bias <
 * 2^-32 for n < 2^32). */
uint64_t rng_below(struct rng_key key, uint64_t hi, uint64_t lo, uint64_t n);

#endif
