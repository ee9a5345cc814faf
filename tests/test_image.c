/* test_image.c - decoding, bicubic resize, grid rule, patches: image.h against training.md 6.8.
 *
 * Pictures are encoded here with the libraries' own encoders, then read back, cut short, or changed
 * in single bytes. `test_image --jobs FILE` is the driver of regression/oracle/image_resize.py:
 * each line of FILE is "picture width height out"; the picture is decoded, resized (0 0: not at
 * all) and written as raw RGB; "broken: why" or "ok width height" is printed.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>
#include <jpeglib.h>
#include <png.h>
#include <sys/resource.h>
#include <webp/encode.h>
#include "image.h"

struct bytes {
    uint8_t *data;
    size_t n;
};

static int pixel(int x, int y, int c)
{
    return (x * 37 + y * 11 + c * 71 + (x ^ y) * 5) & 255;
}

static void fill(struct image *im, int width, int height)
{
    im->width = width;
    im->height = height;
    im->capacity = (size_t)width * (size_t)height * 3;
    im->rgb = malloc(im->capacity);
    for (size_t i = 0; i < im->capacity; i++) {
        const int at = (int)(i / 3);
        im->rgb[i] = (uint8_t)pixel(at % width, at / width, (int)(i % 3));
    }
}

/* --- encoders --- */

static struct bytes make_jpeg(int width, int height, J_COLOR_SPACE space, int components,
                              bool progressive)
{
    struct jpeg_compress_struct c;
    struct jpeg_error_mgr error;
    unsigned char *data = NULL;
    unsigned long n = 0;
    c.err = jpeg_std_error(&error);
    jpeg_create_compress(&c);
    jpeg_mem_dest(&c, &data, &n);
    c.image_width = (JDIMENSION)width;
    c.image_height = (JDIMENSION)height;
    c.input_components = components;
    c.in_color_space = space;
    jpeg_set_defaults(&c);
    jpeg_set_quality(&c, 95, TRUE);
    if (progressive)
        jpeg_simple_progression(&c);
    jpeg_start_compress(&c, TRUE);
    uint8_t *row = malloc((size_t)(width * components));
    for (int y = 0; y < height; y++) {
        for (int x = 0; x < width; x++)
            for (int i = 0; i < components; i++)
                row[x * components + i] = (uint8_t)(i < 3 ? 40 + 8 * i + 2 * x + y : 200 + x);
        JSAMPROW rows = row;
        jpeg_write_scanlines(&c, &rows, 1);
    }
    jpeg_finish_compress(&c);
    jpeg_destroy_compress(&c);
    free(row);
    return (struct bytes){ data, n };
}

static void png_append(png_structp png, png_bytep data, png_size_t n)
{
    struct bytes *b = png_get_io_ptr(png);
    b->data = realloc(b->data, b->n + n);
    memcpy(b->data + b->n, data, n);
    b->n += n;
}

static void png_flush_nothing(png_structp png)
{
    (void)png;
}

/* Row bytes come from `row_of`; palette and transparency only for palette pictures. */
static struct bytes make_png(int width, int height, int depth, int type, bool interlaced,
                             void (*row_of)(int y, uint8_t *row))
{
    struct bytes b = { 0 };
    png_structp png = png_create_write_struct(PNG_LIBPNG_VER_STRING, NULL, NULL, NULL);
    png_infop info = png_create_info_struct(png);
    if (setjmp(png_jmpbuf(png)))
        abort();
    png_set_write_fn(png, &b, png_append, png_flush_nothing);
    png_set_IHDR(png, info, (png_uint_32)width, (png_uint_32)height, depth, type,
                 interlaced ? PNG_INTERLACE_ADAM7 : PNG_INTERLACE_NONE,
                 PNG_COMPRESSION_TYPE_DEFAULT, PNG_FILTER_TYPE_DEFAULT);
    if (type == PNG_COLOR_TYPE_PALETTE) {
        const png_color palette[4] = {
            { 1, 2, 3 }, { 250, 128, 7 }, { 9, 200, 100 }, { 255, 255, 255 }
        };
        const uint8_t alpha[2] = { 0, 128 };
        png_set_PLTE(png, info, palette, 4);
        png_set_tRNS(png, info, alpha, 2, NULL);
    }
    png_write_info(png, info);
    uint8_t row[4096], *rows[64];
    uint8_t *all = malloc(64 * sizeof row);
    for (int y = 0; y < height; y++) {
        rows[y] = all + (size_t)y * sizeof row;
        row_of(y, rows[y]);
    }
    png_write_image(png, rows);
    png_write_end(png, NULL);
    png_destroy_write_struct(&png, &info);
    free(all);
    return b;
}

static void row_rgb(int y, uint8_t *row)
{
    for (int x = 0; x < 13; x++)
        for (int c = 0; c < 3; c++)
            row[3 * x + c] = (uint8_t)pixel(x, y, c);
}

static void row_rgba(int y, uint8_t *row)
{
    for (int x = 0; x < 13; x++) {
        for (int c = 0; c < 3; c++)
            row[4 * x + c] = (uint8_t)pixel(x, y, c);
        row[4 * x + 3] = (uint8_t)(17 * y);
    }
}

static void row_rgb16(int y, uint8_t *row)
{
    for (int x = 0; x < 13; x++)
        for (int c = 0; c < 3; c++) {
            row[6 * x + 2 * c] = (uint8_t)pixel(x, y, c);
            row[6 * x + 2 * c + 1] = (uint8_t)(200 + x);
        }
}

static void row_grey(int y, uint8_t *row)
{
    for (int x = 0; x < 13; x++)
        row[x] = (uint8_t)pixel(x, y, 0);
}

static void row_grey16(int y, uint8_t *row)
{
    for (int x = 0; x < 13; x++) {
        row[2 * x] = (uint8_t)pixel(x, y, 0);
        row[2 * x + 1] = 255;
    }
}

static void row_packed(int y, uint8_t *row)
{
    memset(row, 0, 4);
    for (int x = 0; x < 13; x++) /* two bits a pixel */
        row[x / 4] |= (uint8_t)(((x + y) & 3) << (6 - 2 * (x % 4)));
}

static struct bytes make_webp(int width, int height, bool lossless)
{
    struct image im = { 0 };
    fill(&im, width, height);
    uint8_t *data = NULL;
    const size_t n = lossless ? WebPEncodeLosslessRGB(im.rgb, width, height, width * 3, &data)
                              : WebPEncodeRGB(im.rgb, width, height, width * 3, 90, &data);
    image_free(&im);
    struct bytes b = { malloc(n), n };
    memcpy(b.data, data, n);
    WebPFree(data);
    return b;
}

static void decode_ok(struct bytes b, struct image *im)
{
    char why[256] = "";
    if (!image_decode(b.data, b.n, NULL, im, why, sizeof why))
        fail_msg("%s", why);
}

/* Must fail, with a sentence that holds `part`. */
static void decode_fails(const uint8_t *data, size_t n, const char *part)
{
    struct image im = { 0 };
    char why[256] = "";
    uint8_t *copy = malloc(n ? n : 1); /* exact size, so that a sanitizer sees any read behind it */
    memcpy(copy, data, n);
    assert_false(image_decode(copy, n, NULL, &im, why, sizeof why));
    if (!*why || !strstr(why, part))
        fail_msg("expected '%s' in '%s'", part, why);
    free(copy);
    image_free(&im);
}

/* --- decoding --- */

static void png_rgb_is_exact_and_interlaced_agrees(void **state)
{
    for (int interlaced = 0; interlaced < 2; interlaced++) {
        struct bytes b = make_png(13, 9, 8, PNG_COLOR_TYPE_RGB, interlaced, row_rgb);
        struct image im = { 0 };
        decode_ok(b, &im);
        assert_int_equal(im.width, 13);
        assert_int_equal(im.height, 9);
        for (int i = 0; i < 13 * 9 * 3; i++)
            assert_int_equal(im.rgb[i], pixel(i / 3 % 13, i / 39, i % 3));
        image_free(&im);
        free(b.data);
    }
}

static void png_alpha_is_dropped(void **state)
{
    struct bytes b = make_png(13, 9, 8, PNG_COLOR_TYPE_RGBA, false, row_rgba);
    struct image im = { 0 };
    decode_ok(b, &im);
    for (int i = 0; i < 13 * 9 * 3; i++)
        assert_int_equal(im.rgb[i], pixel(i / 3 % 13, i / 39, i % 3));
    image_free(&im);
    free(b.data);
}

static void png_16_bit_keeps_the_high_byte(void **state)
{
    struct bytes b = make_png(13, 9, 16, PNG_COLOR_TYPE_RGB, false, row_rgb16);
    struct bytes g = make_png(13, 9, 16, PNG_COLOR_TYPE_GRAY, false, row_grey16);
    struct image im = { 0 };
    decode_ok(b, &im);
    for (int i = 0; i < 13 * 9 * 3; i++)
        assert_int_equal(im.rgb[i], pixel(i / 3 % 13, i / 39, i % 3));
    decode_ok(g, &im);
    for (int i = 0; i < 13 * 9 * 3; i++)
        assert_int_equal(im.rgb[i], pixel(i / 3 % 13, i / 39, 0));
    image_free(&im);
    free(b.data);
    free(g.data);
}

static void png_grey_and_palette_become_rgb(void **state)
{
    static const uint8_t palette[4][3] = {
        { 1, 2, 3 }, { 250, 128, 7 }, { 9, 200, 100 }, { 255, 255, 255 }
    };
    struct bytes g8 = make_png(13, 9, 8, PNG_COLOR_TYPE_GRAY, false, row_grey);
    struct bytes g2 = make_png(13, 9, 2, PNG_COLOR_TYPE_GRAY, true, row_packed);
    struct bytes p2 = make_png(13, 9, 2, PNG_COLOR_TYPE_PALETTE, false, row_packed);
    struct image im = { 0 };
    decode_ok(g8, &im);
    for (int i = 0; i < 13 * 9 * 3; i++)
        assert_int_equal(im.rgb[i], pixel(i / 3 % 13, i / 39, 0));
    decode_ok(g2, &im);
    for (int i = 0; i < 13 * 9 * 3; i++)
        assert_int_equal(im.rgb[i], 85 * ((i / 3 % 13 + i / 39) & 3));
    decode_ok(p2, &im);
    for (int i = 0; i < 13 * 9 * 3; i++)
        assert_int_equal(im.rgb[i], palette[(i / 3 % 13 + i / 39) & 3][i % 3]);
    image_free(&im);
    free(g8.data);
    free(g2.data);
    free(p2.data);
}

static void jpeg_colour_grey_and_progressive_are_close(void **state)
{
    struct bytes colour = make_jpeg(33, 17, JCS_RGB, 3, false),
                 progressive = make_jpeg(33, 17, JCS_RGB, 3, true);
    struct bytes grey = make_jpeg(33, 17, JCS_GRAYSCALE, 1, false);
    struct image a = { 0 }, b = { 0 };
    decode_ok(colour, &a);
    decode_ok(progressive, &b);
    assert_int_equal(a.width, 33);
    assert_int_equal(a.height, 17);
    for (int i = 0; i < 33 * 17 * 3; i++) {
        assert_in_range(a.rgb[i] + 6 - (40 + 8 * (i % 3) + 2 * (i / 3 % 33) + i / 99), 0, 12);
        assert_int_equal(a.rgb[i], b.rgb[i]); /* the same coefficients */
    }
    decode_ok(grey, &a);
    for (int i = 0; i < 33 * 17 * 3; i++) {
        assert_in_range(a.rgb[i] + 4 - (40 + 2 * (i / 3 % 33) + i / 99), 0, 8);
        assert_int_equal(a.rgb[i], a.rgb[i - i % 3]);
    }
    image_free(&a);
    image_free(&b);
    free(colour.data);
    free(progressive.data);
    free(grey.data);
}

static void jpeg_cmyk_is_read_as_inverted_ink(void **state)
{
    struct bytes b = make_jpeg(33, 17, JCS_CMYK, 4, false);
    struct image im = { 0 };
    decode_ok(b, &im);
    for (int i = 0; i < 33 * 17 * 3; i++) {
        const int x = i / 3 % 33, raw = 40 + 8 * (i % 3) + 2 * x + i / 99, k = 200 + x;
        const int expected = k - (255 - raw) * k / 255;
        assert_in_range(im.rgb[i] + 8 - expected, 0, 16);
    }
    image_free(&im);
    free(b.data);
}

static void webp_lossless_is_exact_and_lossy_is_close(void **state)
{
    struct bytes exact = make_webp(21, 10, true), lossy = make_webp(21, 10, false);
    struct image im = { 0 };
    decode_ok(exact, &im);
    assert_int_equal(im.width, 21);
    assert_int_equal(im.height, 10);
    for (int i = 0; i < 21 * 10 * 3; i++)
        assert_int_equal(im.rgb[i], pixel(i / 3 % 21, i / 63, i % 3));
    decode_ok(lossy, &im);
    assert_int_equal(im.width, 21);
    image_free(&im);
    free(exact.data);
    free(lossy.data);
}

static void probe_reads_sizes_without_pixels(void **state)
{
    struct bytes b[3] = { make_jpeg(33, 17, JCS_RGB, 3, true),
                          make_png(13, 9, 8, PNG_COLOR_TYPE_RGB, false, row_rgb),
                          make_webp(21, 10, true) };
    static const int expected[3][2] = { { 33, 17 }, { 13, 9 }, { 21, 10 } };
    for (int i = 0; i < 3; i++) {
        int width = 0, height = 0;
        char why[128];
        /* half of the file holds the header */
        assert_true(image_probe(b[i].data, i == 0 ? b[i].n - 50 : b[i].n / 2, &width, &height, why,
                                sizeof why));
        assert_int_equal(width, expected[i][0]);
        assert_int_equal(height, expected[i][1]);
        free(b[i].data);
    }
}

static void one_buffer_serves_pictures_of_any_size(void **state)
{
    struct bytes big = make_webp(40, 30, true),
                 small = make_png(13, 9, 8, PNG_COLOR_TYPE_RGB, false, row_rgb);
    struct image im = { 0 };
    decode_ok(big, &im);
    const size_t capacity = im.capacity;
    decode_ok(small, &im);
    assert_int_equal(im.capacity, capacity);
    assert_int_equal(im.width, 13);
    image_free(&im);
    free(big.data);
    free(small.data);
}

/* --- broken pictures --- */

static void every_truncation_is_broken_with_a_reason(void **state)
{
    struct bytes b[5] = { make_jpeg(33, 17, JCS_RGB, 3, false), make_jpeg(33, 17, JCS_RGB, 3, true),
                          make_png(13, 9, 8, PNG_COLOR_TYPE_RGB, true, row_rgb),
                          make_webp(21, 10, true), make_webp(40, 30, false) };
    for (int i = 0; i < 5; i++) {
        for (size_t n = 0; n < b[i].n; n++)
            if (i < 3 || n + 1 < b[i].n || b[i].n % 2 == 0) /* RIFF pads to even length */
                decode_fails(b[i].data, n, "");
        free(b[i].data);
    }
}

static void flipped_bytes_never_crash(void **state)
{
    struct bytes b[5] = { make_jpeg(33, 17, JCS_RGB, 3, false),
                          make_jpeg(33, 17, JCS_CMYK, 4, true),
                          make_png(13, 9, 2, PNG_COLOR_TYPE_PALETTE, true, row_packed),
                          make_webp(21, 10, true), make_webp(40, 30, false) };
    for (int i = 0; i < 5; i++) {
        int broken = 0;
        for (size_t at = 0; at < b[i].n; at++) {
            static const uint8_t flip[] = { 0x01, 0x80, 0xff };
            for (int f = 0; f < 3; f++) {
                struct image im = { 0 };
                char why[256] = "";
                const struct image_limits limits = { 1 << 20, 4096, 100 };
                b[i].data[at] ^= flip[f];
                const bool ok = image_decode(b[i].data, b[i].n, &limits, &im, why, sizeof why);
                assert_int_equal(ok, *why == '\0');
                broken += !ok;
                b[i].data[at] ^= flip[f];
                image_free(&im);
            }
        }
        assert_true(broken > 10);
        free(b[i].data);
    }
}

static void empty_and_foreign_bytes_are_named(void **state)
{
    decode_fails((const uint8_t *)"", 0, "empty (0 bytes)");
    decode_fails((const uint8_t *)"GIF89a........", 14, "4749463839612e2e");
    decode_fails((const uint8_t *)"\xff", 1, "ff");
    decode_fails((const uint8_t *)"\0\0\0\0", 4, "00000000");
    decode_fails((const uint8_t *)"RIFF\x10\0\0\0WEBPVP8 ", 16, "broken WebP");
}

static uint32_t crc_of(const uint8_t *data, size_t n)
{
    uint32_t crc = 0xffffffff;
    for (size_t i = 0; i < n; i++) {
        crc ^= data[i];
        for (int k = 0; k < 8; k++)
            crc = crc & 1 ? 0xedb88320 ^ crc >> 1 : crc >> 1;
    }
    return ~crc;
}

static void put_big(uint8_t *at, uint32_t value)
{
    for (int i = 0; i < 4; i++)
        at[i] = (uint8_t)(value >> (24 - 8 * i));
}

/* A picture of a few hundred bytes whose header claims 60000 x 60000: refused before anything of
 * that size is allocated. */
static void absurd_sizes_are_refused_before_allocation(void **state)
{
    struct bytes png = make_png(13, 9, 8, PNG_COLOR_TYPE_RGB, false, row_rgb);
    static const uint32_t claim[][2] = {
        { 60000, 60000 }, { 70000, 1 }, { 1, 0x7fffffff }, { 0, 9 }, { 16384, 4097 }
    };
    for (size_t i = 0; i < sizeof claim / sizeof *claim; i++) {
        put_big(png.data + 16, claim[i][0]);
        put_big(png.data + 20, claim[i][1]);
        put_big(png.data + 29, crc_of(png.data + 12, 17));
        decode_fails(png.data, png.n, claim[i][0] && claim[i][1] ? "the header claims" : "");
    }
    free(png.data);

    struct bytes jpeg = make_jpeg(33, 17, JCS_RGB, 3, false);
    size_t sof = 0;
    while (jpeg.data[sof] != 0xff || jpeg.data[sof + 1] != 0xc0)
        sof++;
    jpeg.data[sof + 5] = jpeg.data[sof + 7] = 60000 >> 8;
    jpeg.data[sof + 6] = jpeg.data[sof + 8] = 60000 & 255;
    decode_fails(jpeg.data, jpeg.n, "the header claims 60000 x 60000 pixels");
    int width, height;
    char why[256];
    assert_false(image_probe(jpeg.data, jpeg.n, &width, &height, why, sizeof why));
    free(jpeg.data);
}

static void limits_of_the_caller_hold(void **state)
{
    struct bytes b = make_webp(40, 30, true);
    struct image im = { 0 };
    char why[256] = "";
    const struct image_limits side = { 1 << 20, 39, 100 }, pixels = { 1199, 100, 100 },
                              exact = { 1200, 40, 100 };
    assert_false(image_decode(b.data, b.n, &side, &im, why, sizeof why));
    assert_non_null(strstr(why, "39 a side"));
    assert_false(image_decode(b.data, b.n, &pixels, &im, why, sizeof why));
    assert_null(im.rgb);
    assert_true(image_decode(b.data, b.n, &exact, &im, why, sizeof why));
    image_free(&im);
    free(b.data);
}

/* 10000 scans of a progressive JPEG: the last scan of a real one repeated. */
static void scans_of_a_progressive_jpeg_are_bounded(void **state)
{
    struct bytes b = make_jpeg(33, 17, JCS_RGB, 3, true);
    size_t last = b.n - 2;
    while (b.data[last] != 0xff || b.data[last + 1] != 0xda)
        last--;
    const size_t scan = b.n - 2 - last, repeats = 10000;
    struct bytes bomb = { malloc(b.n + scan * repeats), last };
    memcpy(bomb.data, b.data, last);
    for (size_t i = 0; i < repeats; i++, bomb.n += scan)
        memcpy(bomb.data + bomb.n, b.data + last, scan);
    memcpy(bomb.data + bomb.n, "\xff\xd9", 2);
    bomb.n += 2;
    struct image im = { 0 };
    char why[256] = "";
    assert_false(image_decode(bomb.data, bomb.n, NULL, &im, why, sizeof why));
    assert_true(strstr(why, "scans") || strstr(why, "broken JPEG"));
    const struct image_limits few = { 1 << 20, 4096, 3 };
    assert_false(image_decode(b.data, b.n, &few, &im, why, sizeof why));
    assert_non_null(strstr(why, "more than 3 scans"));
    image_free(&im);
    free(b.data);
    free(bomb.data);
}

static void wrong_checksum_breaks_a_png(void **state)
{
    struct bytes b = make_png(13, 9, 8, PNG_COLOR_TYPE_RGB, false, row_rgb);
    b.data[b.n - 12 - 1] ^= 1; /* CRC of the last IDAT */
    decode_fails(b.data, b.n, "broken PNG");
    free(b.data);
}

/* 120 text chunks, each unpacking to 8 MB, make no pixel: reading them would take 1 GB and
 * seconds. */
static void packed_texts_of_a_png_are_not_unpacked(void **state)
{
    enum { TEXT = (8 << 20) - 64, COPIES = 120, HEADER = 33 }; /* signature and IHDR */
    struct bytes small = { 0 }, plain = make_png(13, 9, 8, PNG_COLOR_TYPE_RGB, false, row_rgb);
    char *text = malloc(TEXT + 1);
    memset(text, 'a', TEXT);
    text[TEXT] = '\0';
    png_structp png = png_create_write_struct(PNG_LIBPNG_VER_STRING, NULL, NULL, NULL);
    png_infop info = png_create_info_struct(png);
    if (setjmp(png_jmpbuf(png)))
        abort();
    png_set_write_fn(png, &small, png_append, png_flush_nothing);
    png_set_IHDR(png, info, 1, 1, 8, PNG_COLOR_TYPE_RGB, PNG_INTERLACE_NONE,
                 PNG_COMPRESSION_TYPE_DEFAULT, PNG_FILTER_TYPE_DEFAULT);
    const png_text packed = {
        .compression = PNG_TEXT_COMPRESSION_zTXt, .key = "key", .text = text, .text_length = TEXT
    };
    png_set_text(png, info, &packed, 1);
    png_write_info(png, info);
    png_destroy_write_struct(&png, &info);
    free(text);

    const size_t chunk = small.n - HEADER;
    assert_memory_equal(small.data + HEADER + 4, "zTXt", 4);
    assert_in_range(chunk, 1000, 20000);
    struct bytes bomb = { malloc(plain.n + COPIES * chunk), plain.n + COPIES * chunk };
    memcpy(bomb.data, plain.data, HEADER);
    for (size_t i = 0; i < COPIES; i++)
        memcpy(bomb.data + HEADER + i * chunk, small.data + HEADER, chunk);
    memcpy(bomb.data + HEADER + COPIES * chunk, plain.data + HEADER, plain.n - HEADER);
    struct image im = { 0 };
    struct rusage before, after;
    getrusage(RUSAGE_SELF, &before);
    decode_ok(bomb, &im);
    getrusage(RUSAGE_SELF, &after);
    assert_int_equal(im.width, 13);
    assert_true(after.ru_maxrss - before.ru_maxrss < 64 << 10); /* kilobytes */
    image_free(&im);
    free(bomb.data);
    free(plain.data);
    free(small.data);
}

static void animated_webp_is_refused(void **state)
{
    static const uint8_t header[] = "RIFF\x2c\0\0\0WEBPVP8X\x0a\0\0\0\x02\0\0\0\x0f\0\0\x0f\0\0ANIM"
                                    "\x06\0\0\0\xff\xff\xff\xff\0\0ANMF\0\0\0";
    decode_fails(header, sizeof header - 1, "WebP");
}

/* --- resize --- */

static void check_row(const int *in, int n_in, const int *expected, int n_out)
{
    for (int vertical = 0; vertical < 2; vertical++) {
        struct image im = { 0 }, out = { 0 };
        fill(&im, vertical ? 1 : n_in, vertical ? n_in : 1);
        for (int i = 0; i < 3 * n_in; i++)
            im.rgb[i] = (uint8_t)in[i / 3];
        image_resize(&im, vertical ? 1 : n_out, vertical ? n_out : 1, &out);
        for (int i = 0; i < 3 * n_out; i++)
            assert_int_equal(out.rgb[i], expected[i / 3]);
        image_free(&im);
        image_free(&out);
    }
}

static void resize_vectors_of_the_specification(void **state)
{
    check_row((int[]){ 0, 255, 0, 255, 10, 200, 30, 90 }, 8, (int[]){ 109, 132, 116, 76 }, 4);
    check_row((int[]){ 0, 255, 100 }, 3, (int[]){ 0, 25, 153, 255, 204, 117, 85 }, 7);
    check_row((int[]){ 10, 20, 30, 40, 50 }, 5, (int[]){ 19, 41 }, 2);
}

/* CRCs of raw pixels made by the Python imaging library 9.4: Image.frombytes('RGB', ...).resize((w,
 * h), Image.BICUBIC). */
static void resize_equals_the_imaging_library(void **state)
{
    static const struct {
        int in_w, in_h, w, h;
        uint32_t crc;
    } vector[] = {
        { 13, 9, 26, 18, 0x1ff0cb7cu },  { 13, 9, 7, 5, 0x3ee55740u },
        { 64, 48, 17, 48, 0x7a2a93b6u }, { 64, 48, 64, 11, 0x5d3217e8u },
        { 100, 3, 30, 40, 0xaf918ed3u }, { 200, 150, 33, 25, 0xdcd04a62u },
        { 5, 200, 60, 10, 0x7fd8ec72u }, { 1, 1, 9, 4, 0x84720a72u },
        { 97, 61, 96, 60, 0x2cf0397fu }, { 300, 2, 4, 4, 0xdb9d6c0fu },
        { 31, 31, 128, 8, 0x6322b376u },
    };
    for (size_t i = 0; i < sizeof vector / sizeof *vector; i++) {
        struct image im = { 0 }, out = { 0 };
        fill(&im, vector[i].in_w, vector[i].in_h);
        image_resize(&im, vector[i].w, vector[i].h, &out);
        assert_int_equal(out.width, vector[i].w);
        assert_int_equal(out.height, vector[i].h);
        assert_int_equal(crc_of(out.rgb, (size_t)vector[i].w * (size_t)vector[i].h * 3),
                         vector[i].crc);
        image_free(&im);
        image_free(&out);
    }
}

static void resize_to_the_same_size_copies(void **state)
{
    struct image im = { 0 }, out = { 0 };
    fill(&im, 17, 5);
    image_resize(&im, 17, 5, &out);
    assert_memory_equal(im.rgb, out.rgb, 17 * 5 * 3);
    image_free(&im);
    image_free(&out);
}

/* --- grid --- */

static void grid_vectors_of_the_specification(void **state)
{
    static const struct {
        int width, height, least, most, tw, th;
    } v[] = {
        { 512, 512, 4, 8192, 32, 32 },
        { 528, 528, 4, 8192, 34, 34 },
        { 800, 600, 4, 8192, 50, 38 },
        { 1920, 1080, 4, 8192, 120, 68 },
        { 4000, 3000, 4, 8192, 104, 78 },
        { 40, 1000, 4, 8192, 4, 64 },
        { 10, 10, 4, 8192, 2, 2 },
        { 3000, 20, 4, 8192, 188, 2 },
        { 500, 333, 1024, 13312, 40, 26 },
        { 224, 224, 1024, 13312, 32, 32 },
        { 6000, 4000, 1024, 13312, 140, 94 },
        /* embeddings of hf.md 7 times four: 276, 256, 512, 512, 1024, 2304, 2040 */
        { 64, 32, 1024, 13312, 46, 24 },
        { 1000, 500, 1024, 13312, 64, 32 },
        { 500, 1000, 1024, 13312, 32, 64 },
        { 1024, 1024, 1024, 13312, 64, 64 },
        { 1536, 1536, 1024, 13312, 96, 96 },
        { 1920, 1080, 1024, 13312, 120, 68 },
    };
    for (size_t i = 0; i < sizeof v / sizeof *v; i++) {
        int tw = 0, th = 0;
        image_grid(v[i].width, v[i].height, 16, v[i].least, v[i].most, 2, &tw, &th);
        assert_int_equal(tw, v[i].tw);
        assert_int_equal(th, v[i].th);
    }
}

static void grid_without_merge_or_limit(void **state)
{
    int tw, th;
    image_grid(33, 16, 16, 1, 0, 1, &tw,
               &th); /* 33/16 + .5 = 2.56 -> 3; 16/16 + .5 = 1.5 -> 2 (half to even) */
    assert_int_equal(tw, 3);
    assert_int_equal(th, 2);
    image_grid(60000, 60000, 16, 4, 0, 2, &tw, &th); /* 3750.5 -> 3750, even */
    assert_int_equal(tw, 3750);
    assert_int_equal(th, 3750);
}

static void m6_36_grid_keeps_its_promises_for_any_picture(void **state)
{
    static const int merges[] = { 1, 2, 4 };
    uint32_t r = 1;
    for (int i = 0; i < 200000; i++) {
        int draw[6];
        for (int k = 0; k < 6; k++) {
            r = r * 1664525u + 1013904223u;
            draw[k] = (int)(r >> 8);
        }
        const int merge = merges[draw[0] % 3], patch = draw[1] % 20 + 1;
        const int width = draw[2] % (1 << (1 + draw[2] / 7 % 16)) + 1,
                  height = draw[3] % (1 << (1 + draw[3] / 7 % 16)) + 1;
        const int64_t most = merge * merge + draw[4] % (i % 2 ? 40 : 4000),
                      least = draw[5] % 300 + 1;
        int tw = 0, th = 0;
        image_grid(width, height, patch, least, most, merge, &tw, &th);
        assert_true(tw >= merge && th >= merge && tw % merge == 0 && th % merge == 0 &&
                    (int64_t)tw * th <= most);
    }
}

/* --- patches --- */

static void patches_are_row_major_channel_first_and_normalised(void **state)
{
    static const double mean[3] = { .48145466, .4578275, .40821073 },
                        deviation[3] = { .26862954, .26130258, .27577711 };
    struct image im = { 0 };
    fill(&im, 12, 8);
    static double wide[6 * 48];
    static float narrow[6 * 48];
    assert_int_equal(image_patchify_f64(&im, 4, wide), 6);
    assert_int_equal(image_patchify_f32(&im, 4, narrow), 6);
    for (int i = 0; i < 6 * 48; i++) {
        const int patch = i / 48, c = i / 16 % 3, y = patch / 3 * 4 + i / 4 % 4,
                  x = patch % 3 * 4 + i % 4;
        const double expected = (pixel(x, y, c) / 255.0 - mean[c]) / deviation[c];
        assert_true(wide[i] == expected);
        assert_true(narrow[i] == (float)expected);
    }
    image_free(&im);
}

/* --- driver of the oracle --- */

static int run_jobs(const char *path)
{
    FILE *jobs = fopen(path, "r");
    if (!jobs)
        return 1;
    char picture[512], out[512];
    int width, height;
    struct image im = { 0 }, resized = { 0 };
    while (fscanf(jobs, "%511s %d %d %511s", picture, &width, &height, out) == 4) {
        FILE *f = fopen(picture, "rb");
        if (!f)
            return 1;
        fseek(f, 0, SEEK_END);
        const size_t n = (size_t)ftell(f);
        uint8_t *data = malloc(n + 1);
        rewind(f);
        const size_t got = fread(data, 1, n, f);
        fclose(f);
        char why[256];
        if (!image_decode(data, got, NULL, &im, why, sizeof why)) {
            printf("broken: %s\n", why);
        } else {
            const struct image *result = &im;
            if (width > 0) {
                image_resize(&im, width, height, &resized);
                result = &resized;
            }
            f = fopen(out, "wb");
            if (!f ||
                fwrite(result->rgb, 3, (size_t)result->width * (size_t)result->height, f) == 0)
                return 1;
            fclose(f);
            printf("ok %d %d\n", result->width, result->height);
        }
        free(data);
    }
    fclose(jobs);
    image_free(&im);
    image_free(&resized);
    return 0;
}

int main(int argc, char **argv)
{
    if (argc == 3 && !strcmp(argv[1], "--jobs"))
        return run_jobs(argv[2]);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(png_rgb_is_exact_and_interlaced_agrees),
        cmocka_unit_test(png_alpha_is_dropped),
        cmocka_unit_test(png_16_bit_keeps_the_high_byte),
        cmocka_unit_test(png_grey_and_palette_become_rgb),
        cmocka_unit_test(jpeg_colour_grey_and_progressive_are_close),
        cmocka_unit_test(jpeg_cmyk_is_read_as_inverted_ink),
        cmocka_unit_test(webp_lossless_is_exact_and_lossy_is_close),
        cmocka_unit_test(probe_reads_sizes_without_pixels),
        cmocka_unit_test(one_buffer_serves_pictures_of_any_size),
        cmocka_unit_test(every_truncation_is_broken_with_a_reason),
        cmocka_unit_test(flipped_bytes_never_crash),
        cmocka_unit_test(empty_and_foreign_bytes_are_named),
        cmocka_unit_test(absurd_sizes_are_refused_before_allocation),
        cmocka_unit_test(limits_of_the_caller_hold),
        cmocka_unit_test(scans_of_a_progressive_jpeg_are_bounded),
        cmocka_unit_test(wrong_checksum_breaks_a_png),
        cmocka_unit_test(packed_texts_of_a_png_are_not_unpacked),
        cmocka_unit_test(animated_webp_is_refused),
        cmocka_unit_test(resize_vectors_of_the_specification),
        cmocka_unit_test(resize_equals_the_imaging_library),
        cmocka_unit_test(resize_to_the_same_size_copies),
        cmocka_unit_test(grid_vectors_of_the_specification),
        cmocka_unit_test(grid_without_merge_or_limit),
        cmocka_unit_test(m6_36_grid_keeps_its_promises_for_any_picture),
        cmocka_unit_test(patches_are_row_major_channel_first_and_normalised),
    };
    return cmocka_run_group_tests_name("image", tests, NULL, NULL);
}
