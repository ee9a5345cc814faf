/* rng.c - Philox-4x32-10, Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2,
 * 3", SC 2011. The arithmetic is in rng_core.h.
 */
#include "rng.h"
#include <string.h>
#include <xxhash.h>

#define RNG_CORE static inline
#include "rng_core.h"

__extension__ typedef unsigned __int128 wide;

struct rng_key rng_key(uint64_t seed, const char *purpose)
{
    const uint64_t h = XXH3_64bits_withSeed(purpose, strlen(purpose), seed);
    return (struct rng_key){ { (uint32_t)h, (uint32_t)(h >> 32) } };
}

void rng_philox(struct rng_key key, uint64_t hi, uint64_t lo, uint32_t out[4])
{
    rng_core_philox(key, hi, lo, out);
}

double rng_uniform(struct rng_key key, uint64_t hi, uint64_t lo, int lane)
{
    uint32_t w[4];
    rng_core_philox(key, hi, lo, w);
    return rng_core_fraction(rng_core_word(w, lane));
}

double rng_uniform_at(struct rng_key key, uint64_t index)
{
    return rng_core_uniform(key, index);
}

double rng_normal_at(struct rng_key key, uint64_t index)
{
    return rng_core_normal(key, index);
}

double rng_initial_at(enum rng_init init, double scale, struct rng_key key, uint64_t index)
{
    return rng_core_initial(init, scale, key, index);
}

uint64_t rng_below(struct rng_key key, uint64_t hi, uint64_t lo, uint64_t n)
{
    uint32_t w[4];
    rng_core_philox(key, hi, lo, w);
    return (uint64_t)((wide)rng_core_word(w, 0) * n >> 64);
}
