/* fuzz_image.c - any bytes as a picture: header, pixels, resize, patches.
 *
 * The limits are a megapixel and few scans, so that an input takes milliseconds. A changed PNG
 * would fail at the checksum of its chunk, so the mutator writes those anew in most of its results.
 */
#include "fuzz.h"

#include "image.h"

enum { PIXELS = 1 << 20, SIDE = 4096, SCANS = 12, PATCH = 4, PNG_HEAD = 8, CHUNK_FRAME = 12 };

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    fuzz_start();
    return 0;
}

static uint32_t big_endian(const uint8_t *p)
{
    return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3];
}

/* The checksum of a PNG chunk (CRC-32 of ISO 3309). */
static uint32_t crc(const uint8_t *p, size_t n)
{
    uint32_t c = 0xffffffff;
    for (size_t i = 0; i < n; i++) {
        c ^= p[i];
        for (int bit = 0; bit < 8; bit++)
            c = c & 1 ? 0xedb88320 ^ c >> 1 : c >> 1;
    }
    return ~c;
}

static void write_checksums(uint8_t *png, size_t size)
{
    for (size_t at = PNG_HEAD; at + CHUNK_FRAME <= size;) {
        const size_t n = big_endian(png + at);
        if (n > size - at - CHUNK_FRAME)
            return;
        const uint32_t c = crc(png + at + 4, n + 4);
        for (int i = 0; i < 4; i++)
            png[at + 8 + n + (size_t)i] = (uint8_t)(c >> (24 - 8 * i));
        at += n + CHUNK_FRAME;
    }
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned int seed)
{
    size = LLVMFuzzerMutate(data, size, max_size);
    if (seed % 8 && size > PNG_HEAD && memcmp(data, "\x89PNG\r\n\x1a\n", PNG_HEAD) == 0)
        write_checksums(data, size);
    return size;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    const struct image_limits limits = { PIXELS, SIDE, SCANS };
    struct image im = { 0 }, small = { 0 };
    char why[512] = "";
    int width = 0, height = 0;
    const bool probed = image_probe(data, size, &width, &height, why, sizeof why);
    if (!probed)
        EXPECT(strnlen(why, sizeof why) > 0 && strnlen(why, sizeof why) < sizeof why);
    else
        EXPECT(width > 0 && height > 0 && width <= IMAGE_MAX_SIDE && height <= IMAGE_MAX_SIDE &&
               (int64_t)width * height <= IMAGE_MAX_PIXELS);
    why[0] = '\0';
    if (image_decode(data, size, &limits, &im, why, sizeof why)) {
        const size_t bytes = (size_t)im.width * (size_t)im.height * 3;
        EXPECT(probed && im.width == width && im.height == height && im.capacity >= bytes);
        unsigned sum = 0;
        for (size_t i = 0; i < bytes; i++)
            sum += im.rgb[i];
        int tw, th;
        image_grid(width, height, PATCH, 4, 16, 2, &tw, &th);
        EXPECT(tw > 0 && th > 0 && tw * th <= 16);
        image_resize(&im, tw * PATCH, th * PATCH, &small);
        float *patches = xcalloc((size_t)(tw * th), 3 * PATCH * PATCH * sizeof *patches);
        EXPECT(image_patchify_f32(&small, PATCH, patches) == tw * th);
        for (int i = 0; i < tw * th * 3 * PATCH * PATCH; i++)
            EXPECT(patches[i] > -4.0f && patches[i] < 4.0f);
        free(patches);
        EXPECT(sum <= 255u * bytes);
    } else {
        EXPECT(strnlen(why, sizeof why) > 0 && im.capacity <= 3 * (size_t)PIXELS);
    }
    image_free(&im);
    image_free(&small);
    return 0;
}
