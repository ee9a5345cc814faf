/* image_decode.c - JPEG, PNG and WebP files to RGB; see image.h for what counts as broken.
 *
 * libjpeg and libpng report errors by a long jump. All that must survive one lives in a struct
 * outside the function that calls setjmp, so no local variable can be clobbered and one place frees
 * the decoder on every way out. Bounds against hostile files: pixels and sides from the header
 * before any buffer; the decoder's own memory; scans of a progressive JPEG (each one walks over the
 * whole picture, so large pictures may have fewer); of a PNG only the chunks that make the pixels
 * are read. That the machine has no memory left is no fault of the picture and ends the job: other
 * ranks would find the picture whole.
 */
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <jpeglib.h>
#include <jerror.h>
#include <png.h>
#include <webp/decode.h>
#include "check.h"
#include "image.h"

enum { JPEG_MARKERS_BYTES = 16 << 20 };
enum {
    SCANS_ANY_SIZE = 16
}; /* a progressive JPEG of the largest size may have so many scans (usual: 10) */

/* One picture being read: what the three decoders share. */
struct reading {
    const uint8_t *bytes;
    size_t n, at; /* at: read position (PNG) */
    struct image_limits limits;
    struct image *out; /* NULL: the header only */
    int64_t width, height;
    char *why;
    size_t why_size;
};

static const char *format_of(const uint8_t *bytes, size_t n);
static bool read_any(struct reading *r);
static bool accept_size(struct reading *r, int64_t width, int64_t height);
static uint8_t *reserve(struct reading *r);
static bool read_jpeg(struct reading *r);
static bool read_png(struct reading *r);
static bool read_webp(struct reading *r);

bool image_probe(const uint8_t *bytes, size_t n, int *width, int *height, char *why,
                 size_t why_size)
{
    struct reading r = { .bytes = bytes,
                         .n = n,
                         .limits = { IMAGE_MAX_PIXELS, IMAGE_MAX_SIDE, IMAGE_MAX_SCANS },
                         .why = why,
                         .why_size = why_size };
    if (!read_any(&r))
        return false;
    *width = (int)r.width;
    *height = (int)r.height;
    return true;
}

bool image_decode(const uint8_t *bytes, size_t n, const struct image_limits *limits,
                  struct image *out, char *why, size_t why_size)
{
    struct reading r = { .bytes = bytes,
                         .n = n,
                         .limits = { IMAGE_MAX_PIXELS, IMAGE_MAX_SIDE, IMAGE_MAX_SCANS },
                         .out = out,
                         .why = why,
                         .why_size = why_size };
    if (limits)
        r.limits = *limits;
    return read_any(&r);
}

void image_free(struct image *im)
{
    free(im->rgb);
    memset(im, 0, sizeof *im);
}

static const char *format_of(const uint8_t *bytes, size_t n)
{
    if (n >= 3 && !memcmp(bytes, "\xff\xd8\xff", 3))
        return "JPEG";
    if (n >= 8 && !memcmp(bytes, "\x89PNG\r\n\x1a\n", 8))
        return "PNG";
    if (n >= 12 && !memcmp(bytes, "RIFF", 4) && !memcmp(bytes + 8, "WEBP", 4))
        return "WebP";
    return NULL;
}

static bool read_any(struct reading *r)
{
    if (r->n == 0) {
        snprintf(r->why, r->why_size, "the picture is empty (0 bytes)");
        return false;
    }
    const char *format = format_of(r->bytes, r->n);
    if (!format) {
        char first[24] = "";
        for (size_t i = 0; i < r->n && i < 8; i++)
            snprintf(first + 2 * i, sizeof first - 2 * i, "%02x", r->bytes[i]);
        snprintf(r->why, r->why_size, "neither JPEG, PNG nor WebP (it begins with the bytes %s)",
                 first);
        return false;
    }
    return format[0] == 'J' ? read_jpeg(r) : format[0] == 'P' ? read_png(r) : read_webp(r);
}

/* The header's size against the limits; false with `why`. */
static bool accept_size(struct reading *r, int64_t width, int64_t height)
{
    r->width = width;
    r->height = height;
    if (width < 1 || height < 1) {
        snprintf(r->why, r->why_size, "the header claims %lld x %lld pixels", (long long)width,
                 (long long)height);
        return false;
    }
    if (width > r->limits.side || height > r->limits.side || width * height > r->limits.pixels) {
        snprintf(r->why, r->why_size,
                 "the header claims %lld x %lld pixels; the limits are %ld a side and %lld in all",
                 (long long)width, (long long)height, (long)r->limits.side,
                 (long long)r->limits.pixels);
        return false;
    }
    return true;
}

/* Room for the accepted size in the caller's picture. */
static uint8_t *reserve(struct reading *r)
{
    struct image *out = r->out;
    const size_t bytes = (size_t)r->width * (size_t)r->height * 3;
    if (out->capacity < bytes) {
        out->rgb = xrealloc(out->rgb, bytes, 1);
        out->capacity = bytes;
    }
    out->width = (int32_t)r->width;
    out->height = (int32_t)r->height;
    return out->rgb;
}

/* --- JPEG --- */

struct jpeg_reading {
    struct reading *r;
    struct jpeg_decompress_struct cinfo;
    struct jpeg_error_mgr error;
    struct jpeg_progress_mgr progress;
    jmp_buf escape;
    int scans;     /* allowed */
    uint8_t *cmyk; /* one row */
};

static void jpeg_describe(struct jpeg_reading *j, j_common_ptr cinfo)
{
    char text[JMSG_LENGTH_MAX];
    if (cinfo->err->msg_code == JERR_OUT_OF_MEMORY)
        FATAL(EXIT_ENVIRONMENT, "out of memory in a JPEG of %lld x %lld pixels",
              (long long)j->r->width, (long long)j->r->height);
    j->error.format_message(cinfo, text);
    snprintf(j->r->why, j->r->why_size, "broken JPEG: %s", text);
}

static void jpeg_on_error(j_common_ptr cinfo)
{
    struct jpeg_reading *j = cinfo->client_data;
    jpeg_describe(j, cinfo);
    longjmp(j->escape, 1);
}

/* Level -1 is a warning. Those that lose no picture data are common in the wild and pass. */
static void jpeg_on_message(j_common_ptr cinfo, int level)
{
    if (level >= 0)
        return;
    switch (cinfo->err->msg_code) {
    case JWRN_EXTRANEOUS_DATA:
    case JWRN_TOO_MUCH_DATA:
    case JWRN_ADOBE_XFORM:
    case JWRN_JFIF_MAJOR: return;
    default: jpeg_on_error(cinfo);
    }
}

static void jpeg_no_output(j_common_ptr cinfo)
{
    (void)cinfo; /* libjpeg would print to stderr */
}

static void jpeg_on_progress(j_common_ptr cinfo)
{
    struct jpeg_reading *j = cinfo->client_data;
    if (j->cinfo.input_scan_number <= j->scans)
        return;
    snprintf(j->r->why, j->r->why_size,
             "progressive JPEG of %lld x %lld pixels with more than %d scans",
             (long long)j->r->width, (long long)j->r->height, j->scans);
    longjmp(j->escape, 1);
}

/* PIL's CMYK with Adobe's convention: the file stores 255 - ink. */
static void cmyk_to_rgb(const uint8_t *cmyk, int64_t width, uint8_t *rgb)
{
    for (int64_t x = 0; x < width; x++, cmyk += 4, rgb += 3)
        for (int c = 0; c < 3; c++) {
            const int product = (255 - cmyk[c]) * cmyk[3] + 128; /* rounded division by 255 */
            rgb[c] = (uint8_t)(cmyk[3] - (((product >> 8) + product) >> 8));
        }
}

/* Everything that may jump out. */
static bool jpeg_run(struct jpeg_reading *j)
{
    struct jpeg_decompress_struct *c = &j->cinfo;
    if (setjmp(j->escape))
        return false;
    jpeg_create_decompress(c);
    c->mem->max_memory_to_use = (long)(8 * j->r->limits.pixels + JPEG_MARKERS_BYTES);
    jpeg_mem_src(c, j->r->bytes, (unsigned long)j->r->n);
    jpeg_read_header(c, TRUE);
    if (!accept_size(j->r, c->image_width, c->image_height))
        return false;
    if (!j->r->out)
        return true;

    const int64_t roomy = SCANS_ANY_SIZE * j->r->limits.pixels / (j->r->width * j->r->height);
    j->scans = roomy < j->r->limits.scans ? (int)roomy : j->r->limits.scans;
    j->progress.progress_monitor = jpeg_on_progress;
    c->progress = &j->progress;
    const bool cmyk = c->jpeg_color_space == JCS_CMYK || c->jpeg_color_space == JCS_YCCK;
    c->out_color_space = cmyk ? JCS_CMYK : JCS_RGB;
    jpeg_start_decompress(c);
    uint8_t *rgb = reserve(j->r);
    if (cmyk)
        j->cmyk = xmalloc((size_t)j->r->width, 4);
    while (c->output_scanline < c->output_height) {
        uint8_t *to = rgb + (size_t)c->output_scanline * (size_t)j->r->width * 3;
        JSAMPROW row = cmyk ? j->cmyk : to;
        jpeg_read_scanlines(c, &row, 1);
        if (cmyk)
            cmyk_to_rgb(j->cmyk, j->r->width, to);
    }
    jpeg_finish_decompress(c);
    return true;
}

static bool read_jpeg(struct reading *r)
{
    struct jpeg_reading *j = xcalloc(1, sizeof *j);
    j->r = r;
    j->cinfo.err = jpeg_std_error(&j->error);
    j->cinfo.client_data = j;
    j->error.error_exit = jpeg_on_error;
    j->error.emit_message = jpeg_on_message;
    j->error.output_message = jpeg_no_output;
    const bool ok = jpeg_run(j);
    jpeg_destroy_decompress(&j->cinfo);
    free(j->cmyk);
    free(j);
    return ok;
}

/* --- PNG --- */

struct png_reading {
    struct reading *r;
    png_structp png;
    png_infop info;
    png_bytep *row; /* [height] */
    jmp_buf escape;
};

static void png_on_error(png_structp png, png_const_charp message)
{
    struct png_reading *p = png_get_error_ptr(png);
    snprintf(p->r->why, p->r->why_size, "broken PNG: %s", message);
    longjmp(p->escape, 1);
}

static void png_on_warning(png_structp png, png_const_charp message)
{
    (void)png; /* no picture data is lost */
    (void)message;
}

static png_voidp png_get_memory(png_structp png, png_alloc_size_t n)
{
    return xmalloc(n, 1);
}

static void png_release(png_structp png, png_voidp p)
{
    free(p);
}

static void png_on_read(png_structp png, png_bytep to, png_size_t n)
{
    struct png_reading *p = png_get_io_ptr(png);
    if (n > p->r->n - p->r->at)
        png_error(png, "the file ends too early");
    memcpy(to, p->r->bytes + p->r->at, n);
    p->r->at += n;
}

static bool png_run(struct png_reading *p)
{
    png_structp png = p->png;
    if (setjmp(p->escape))
        return false;
    /* The library's own limit would give a sentence without the numbers, so it is the format's;
     * ours follows at once. */
    png_set_user_limits(png, 0x7fffffff, 0x7fffffff);
    /* Texts and profiles unpack to megabytes each. */
    png_set_keep_unknown_chunks(png, PNG_HANDLE_CHUNK_NEVER, NULL, -1);
    png_set_read_fn(png, p, png_on_read);
    png_read_info(png, p->info);
    if (!accept_size(p->r, png_get_image_width(png, p->info), png_get_image_height(png, p->info)))
        return false;
    if (!p->r->out)
        return true;

    png_set_strip_16(png); /* the high byte */
    png_set_packing(png);
    if (png_get_color_type(png, p->info) == PNG_COLOR_TYPE_PALETTE)
        png_set_palette_to_rgb(png);
    else if (!(png_get_color_type(png, p->info) & PNG_COLOR_MASK_COLOR)) {
        png_set_expand_gray_1_2_4_to_8(png);
        png_set_gray_to_rgb(png);
    }
    png_set_strip_alpha(png);
    png_set_interlace_handling(png);
    png_read_update_info(png, p->info);
    if (png_get_rowbytes(png, p->info) != (size_t)p->r->width * 3)
        png_error(png, "its rows cannot be turned into RGB");
    uint8_t *rgb = reserve(p->r);
    p->row = xmalloc((size_t)p->r->height, sizeof *p->row);
    for (int64_t y = 0; y < p->r->height; y++)
        p->row[y] = rgb + (size_t)y * (size_t)p->r->width * 3;
    png_read_image(png, p->row);
    png_read_end(png, NULL);
    return true;
}

static bool read_png(struct reading *r)
{
    struct png_reading *p = xcalloc(1, sizeof *p);
    p->r = r;
    p->png = png_create_read_struct_2(PNG_LIBPNG_VER_STRING, p, png_on_error, png_on_warning, NULL,
                                      png_get_memory, png_release);
    p->info = p->png ? png_create_info_struct(p->png) : NULL;
    bool ok = false;
    if (p->info)
        ok = png_run(p);
    else
        snprintf(r->why, r->why_size, "libpng did not start (header %s, library %s)",
                 PNG_LIBPNG_VER_STRING, png_get_libpng_ver(NULL));
    png_destroy_read_struct(&p->png, &p->info, NULL);
    free(p->row);
    free(p);
    return ok;
}

/* --- WebP --- */

static const char *webp_reason(VP8StatusCode status)
{
    switch (status) {
    case VP8_STATUS_NOT_ENOUGH_DATA:
    case VP8_STATUS_SUSPENDED: return "the file ends too early";
    case VP8_STATUS_OUT_OF_MEMORY: FATAL(EXIT_ENVIRONMENT, "out of memory in a WebP");
    case VP8_STATUS_UNSUPPORTED_FEATURE: return "a feature that libwebp does not decode";
    default: return "invalid data";
    }
}

static bool read_webp(struct reading *r)
{
    WebPDecoderConfig config;
    if (!WebPInitDecoderConfig(&config)) {
        snprintf(r->why, r->why_size, "libwebp did not start (its header and library differ)");
        return false;
    }
    VP8StatusCode status = WebPGetFeatures(r->bytes, r->n, &config.input);
    if (status != VP8_STATUS_OK) {
        snprintf(r->why, r->why_size, "broken WebP: %s", webp_reason(status));
        return false;
    }
    if (!accept_size(r, config.input.width, config.input.height))
        return false;
    if (config.input.has_animation) {
        snprintf(r->why, r->why_size, "animated WebP: still pictures only");
        return false;
    }
    if (!r->out)
        return true;
    config.output.colorspace = MODE_RGB;
    config.output.is_external_memory = 1;
    config.output.u.RGBA.rgba = reserve(r);
    config.output.u.RGBA.stride = (int)r->width * 3;
    config.output.u.RGBA.size = (size_t)r->width * (size_t)r->height * 3;
    status = WebPDecode(r->bytes, r->n, &config);
    WebPFreeDecBuffer(&config.output);
    if (status != VP8_STATUS_OK) {
        snprintf(r->why, r->why_size, "broken WebP: %s", webp_reason(status));
        return false;
    }
    return true;
}
