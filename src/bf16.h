/* bf16.h - bfloat16, the upper half of an fp32 number, as uint16_t. Rounding is to nearest, ties to
 * even, once. */
#ifndef MIMO_BF16_H
#define MIMO_BF16_H

#include <math.h>
#include <stdint.h>
#include <string.h>

/* Local, all of them. */
static inline float bf16_to_float(uint16_t x)
{
    const uint32_t bits = (uint32_t)x << 16;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

static inline uint16_t bf16_from_float(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u)
        return (uint16_t)(bits >> 16 | 0x40); /* NaN stays one */
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

/* Two roundings (double to float to bf16) can differ from one; rounding the float to odd first
 * makes them agree. */
static inline uint16_t bf16_from_double(double x)
{
    float f = (float)x;
    uint32_t bits;
    if (!isfinite(f) || (double)f == x)
        return bf16_from_float(f);
    memcpy(&bits, &f, sizeof bits);
    if (x < 0 ? (double)f < x : (double)f > x)
        bits--; /* back towards zero: truncation of x */
    bits |= 1;
    memcpy(&f, &bits, sizeof f);
    return bf16_from_float(f);
}

#endif
