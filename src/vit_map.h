/* vit_map.h - which rows and which position-grid points the encoder's tokens use: index arithmetic
 * on the host, no tensors.
 *
 * Tiles are given as {height, width} in PATCHES, one after the other; patch (py, px) of a tile is
 * its row py*width + px. Encoder rows are, tile by tile, the class tokens and then the patches
 * (model.md 2.4). Every map is an int32 array that backend_ops.gather_rows, attention_* or
 * vit_assemble_* reads as it is. All functions are pure; nothing is modified in place.
 */
#ifndef MIMO_VIT_MAP_H
#define MIMO_VIT_MAP_H

#include <stdbool.h>
#include <stdint.h>

/* Uniform numbers of a tile in [0,1) -> out = scale_x, scale_y, off_x, off_y of the position
 * augmentation (model.md 2.3 3). Local. */
void vit_map_cpe(double u1, double u2, double u3x, double u3y, double out[4]);

/* Position of each patch of one h x w tile as four points of the gh x gw grid, row-major: index and
 * weight [h*w, 4].
 *   - h = gh, w = gw: the grid itself, whatever cpe is;
 *   - cpe = NULL (evaluation or frozen encoder): bilinear resize without aligned corners to m x m,
 *     m = max(h,w), top-left window; where width*m^2 >= 2^31-1 the grid is cropped to the tile's
 *     aspect ratio and resized to h x w;
 *   - cpe = out of vit_map_cpe (training): bilinear sampling of that part of the grid with aligned
 *     corners, zero outside.
 * Every index is inside the grid; what does not contribute has weight 0. `width` is the encoder's.
 * Local. */
void vit_map_positions(int h, int w, int gh, int gw, int64_t width, const double *cpe,
                       int32_t *index, double *weight);

/* Patches and encoder rows (with c class tokens a tile) of all tiles. Local. */
int64_t vit_map_patches(const int32_t (*tile)[2], int64_t tiles);
int64_t vit_map_rows(const int32_t (*tile)[2], int64_t tiles, int c);

/* First encoder rows of the tiles, with c class tokens each: cu [tiles+1]; returns the rows of the
 * largest one. Local. */
int64_t vit_map_cu(const int32_t (*tile)[2], int64_t tiles, int c, int32_t *cu);

/* row_source [rows] of vit_assemble_*: the patch of each encoder row, or -1-j for class token j.
 * Local. */
void vit_map_sources(const int32_t (*tile)[2], int64_t tiles, int c, int32_t *row_source);

/* Output embeddings of the encoder: 4 patches each with the pixel shuffle (h and w even), else 1
 * row each. Local. */
int64_t vit_map_outputs(const int32_t (*tile)[2], int64_t tiles, int c, bool drop, bool shuffle);
/* Removal of the class tokens and pixel shuffle in one map: row[i*per+k] is the encoder row that
 * piece k of output i is, per = 4 with the shuffle (pieces (0,0) (0,1) (1,0) (1,1) of a 2x2 block,
 * blocks row-major in the tile; model.md 2.6), else 1. The shuffle needs the class tokens dropped.
 * The output [N, per*C] is gather_rows into the view [N*per, C]. Local. */
void vit_map_output_rows(const int32_t (*tile)[2], int64_t tiles, int c, bool drop, bool shuffle,
                         int32_t *row);

/* inverse[map[i]] = i for i < n and -1 where nothing points: the map of the backward gather.
 * Negative entries of `map` (class tokens) are skipped; no two entries may be equal. inverse
 * [size]. Local. */
void vit_map_invert(const int32_t *map, int64_t n, int64_t size, int32_t *inverse);

#endif
