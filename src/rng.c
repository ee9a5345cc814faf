/* rng.c - Philox-4x32-10, Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2,
 * 3", SC 2011. Ten rounds of two 32x32->64 bit multiplications; between rounds the key is bumped by
 * the Weyl constants. Counter words: (lo low, lo high, hi low, hi high), least significant first as
 * in the published test vectors.
 */
#include "rng.h"
#include <math.h>
#include <string.h>
#include <xxhash.h>

__extension__ typedef unsigned __int128 wide;

static uint64_t block_word(const uint32_t out[4], int lane);

struct rng_key rng_key(uint64_t seed, const char *purpose)
{
    const uint64_t h = XXH3_64bits_withSeed(purpose, strlen(purpose), seed);
    return (struct rng_key){ { (uint32_t)h, (uint32_t)(h >> 32) } };
}

void rng_philox(struct rng_key key, uint64_t hi, uint64_t lo, uint32_t out[4])
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

double rng_uniform(struct rng_key key, uint64_t hi, uint64_t lo, int lane)
{
    uint32_t w[4];
    rng_philox(key, hi, lo, w);
    return (double)(block_word(w, lane) >> 11) * 0x1p-53;
}

double rng_uniform_at(struct rng_key key, uint64_t index)
{
    return rng_uniform(key, 0, index / 2, (int)(index % 2));
}

double rng_normal_at(struct rng_key key, uint64_t index)
{
    uint32_t w[4];
    rng_philox(key, 0, index / 2, w);
    const double u = (double)(block_word(w, 0) >> 11) * 0x1p-53,
                 v = (double)(block_word(w, 1) >> 11) * 0x1p-53;
    /* 1-u lies in (0,1], so the logarithm is finite. */
    const double radius = sqrt(-2.0 * log(1.0 - u)), angle = 6.283185307179586476925286766559 * v;
    return radius * (index % 2 ? sin(angle) : cos(angle));
}

uint64_t rng_below(struct rng_key key, uint64_t hi, uint64_t lo, uint64_t n)
{
    uint32_t w[4];
    rng_philox(key, hi, lo, w);
    return (uint64_t)((wide)block_word(w, 0) * n >> 64);
}

static uint64_t block_word(const uint32_t out[4], int lane)
{
    return (uint64_t)out[2 * lane + 1] << 32 | out[2 * lane];
}
