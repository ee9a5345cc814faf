/* image.h - pictures: bytes of a JPEG, PNG or WebP file to patches (training.md 6.8).
 *
 * Decode to 8-bit RGB, resize with the 8-bit bicubic of the Python imaging library (bit for bit),
 * cut into patches, normalise. Conventions, those of that library's `Image.open(f).convert('RGB')`
 * but for the two marked DEV:
 *   - the format is read from the first bytes, never from a name;
 *   - alpha is dropped, not composited: the colours under transparent pixels show; a PNG's
 *     transparent colour likewise;
 *   - an EXIF rotation is NOT applied, gamma and colour profiles are ignored;
 *   - 16-bit PNG: the high byte. DEV: of grey too, which that library clamps to 255, so that such a
 *     picture turns white;
 *   - CMYK JPEG: Adobe's inverted values; k - (255-c)*k/255 for raw c and k; YCbCr upsampling is
 *     libjpeg's default (fancy);
 *   - DEV: an animated WebP is refused instead of showing its first frame.
 * A broken picture is data, not a fault of the program: every reader returns false and writes one
 * sentence. A JPEG whose decoder warns of lost data (premature end, bad code, lost restart marker)
 * counts as broken, and so does a PNG with a wrong checksum. Nothing is allocated for pixels before
 * the header was checked against the limits.
 */
#ifndef MIMO_IMAGE_H
#define MIMO_IMAGE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* What a header may ask for: 64 Mpixel are 192 MB decoded. Scans: of a progressive JPEG. */
enum { IMAGE_MAX_PIXELS = 64 << 20, IMAGE_MAX_SIDE = 65535, IMAGE_MAX_SCANS = 100 };

struct image_limits {
    int64_t pixels;
    int32_t side;
    int32_t scans;
};

/* A decoded picture. The buffer grows and is reused; zero the struct before its first use. */
struct image {
    uint8_t *rgb; /* [height, width, 3], owned */
    int32_t width, height;
    size_t capacity; /* bytes allocated */
};

/* Width and height from the header alone, within the built-in limits; false with `why`. Local. */
bool image_probe(const uint8_t *bytes, size_t n, int *width, int *height, char *why,
                 size_t why_size);
/* The pixels; `limits` may be NULL (the built-in ones). On false the contents of *out are undefined
 * but still to be freed. Local. */
bool image_decode(const uint8_t *bytes, size_t n, const struct image_limits *limits,
                  struct image *out, char *why, size_t why_size);
/* Bicubic resize of `in` to width x height >= 1 into `out` (another struct); equal sizes copy.
 * Local. */
void image_resize(const struct image *in, int width, int height, struct image *out);
void image_free(struct image *im); /* Local. */

/* Dynamic resolution: columns tw and rows th of patches for a picture of width x height >= 1
 * pixels. `merge`: both become multiples of it (2 for pixel shuffle, 1 none). min >= 1; max_patches
 * >= merge^2 or 0 = no limit. Always tw*th <= max_patches, also for thin pictures and where min >
 * max: the longer side gives way. Resize to (tw*patch, th*patch). Local. */
void image_grid(int width, int height, int patch, int64_t min_patches, int64_t max_patches,
                int merge, int *tw, int *th);

/* Of the channels of pictures in 0..1: the RADIO/CLIP constants. */
extern const double image_mean[3], image_deviation[3];

/* Normalised patches (u8/255 - mean)/deviation: [n_patches, 3*patch*patch],
 * patches row by row, each one (channel, y, x). Width and height must be multiples of `patch`.
 * Returns n_patches. Local. */
int64_t image_patchify_f32(const struct image *im, int patch, float *out);
int64_t image_patchify_f64(const struct image *im, int patch, double *out);

#endif
