/* data_pack.h - which samples share a row of S tokens (training.md 6.6).
 *
 * A stream is read in windows of data.packing_buffer_size whole samples. The samples of a window
 * are put into packs by the greedy knapsack, the packs are emitted in a random order keyed by
 * (seed, stream, window), then the next window begins. So what a stream delivers is a function of
 * the stream, and its place in it two numbers: where the window began and how many packs of it are
 * out.
 */
#ifndef MIMO_DATA_PACK_H
#define MIMO_DATA_PACK_H

#include <stdint.h>
#include "rng.h"

/* Packs of n samples of length[n] <= room tokens and pictures[n] <= frames pictures: pack p holds
 * the samples member[first[p]] .. member[first[p+1]-1]; first [n+1], member [n]. Each pack is
 * opened with `room` tokens and `frames` pictures left and takes the longest sample that still
 * fits, of equal ones the later, until none does; the packs are shuffled by (key, stream, window).
 * Returns the number of packs. Local. */
int64_t data_pack(const int64_t *length, const int64_t *pictures, int64_t n, int64_t room,
                  int64_t frames, struct rng_key key, uint64_t stream, uint64_t window,
                  int64_t *first, int64_t *member);

#endif
