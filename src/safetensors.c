/* safetensors.c - see safetensors.h. Here: headers, indexes, directories, reading. */
#include "safetensors.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <jansson.h>

#include "bf16.h"
#include "file.h"
#include "log.h"
#include "safetensors_internal.h"

enum { COMMAS = 16 * SAFETENSORS_TENSORS };

static const struct {
    const char *name;
    int bits, kind;
} types[] = {
    { "BF16", 16, SAFETENSORS_BF16 },    { "F16", 16, SAFETENSORS_F16 },
    { "F32", 32, SAFETENSORS_F32 },      { "F64", 64, SAFETENSORS_F64 },
    { "BOOL", 8, SAFETENSORS_OTHER },    { "U8", 8, SAFETENSORS_OTHER },
    { "I8", 8, SAFETENSORS_OTHER },      { "I16", 16, SAFETENSORS_OTHER },
    { "U16", 16, SAFETENSORS_OTHER },    { "I32", 32, SAFETENSORS_OTHER },
    { "U32", 32, SAFETENSORS_OTHER },    { "I64", 64, SAFETENSORS_OTHER },
    { "U64", 64, SAFETENSORS_OTHER },    { "C64", 64, SAFETENSORS_OTHER },
    { "F4", 4, SAFETENSORS_OTHER },      { "F6_E2M3", 6, SAFETENSORS_OTHER },
    { "F6_E3M2", 6, SAFETENSORS_OTHER }, { "F8_E5M2", 8, SAFETENSORS_OTHER },
    { "F8_E4M3", 8, SAFETENSORS_OTHER }, { "F8_E8M0", 8, SAFETENSORS_OTHER },
};
enum { TYPES = sizeof types / sizeof types[0] };

struct parsing {
    char *why;
    size_t why_size;
};

static bool fail(struct parsing *p, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
static bool fail(struct parsing *p, const char *fmt, ...)
{
    va_list args;
    va_start(args, fmt);
    vsnprintf(p->why, p->why_size, fmt, args);
    va_end(args);
    return false;
}

/* ---- JSON of a stranger -------------------------------------------------------------------- */

/* What the JSON library would answer with much memory: deep nesting and very many small values. */
static bool scan(struct parsing *p, const char *text, size_t n)
{
    int depth = 0;
    size_t opened = 0, commas = 0;
    bool string = false;
    for (size_t i = 0; i < n; i++) {
        const char c = text[i];
        if (string) {
            if (c == '\\')
                i++;
            else if (c == '"')
                string = false;
        } else if (c == '"') {
            string = true;
        } else if (c == '{' || c == '[') {
            opened++;
            if (++depth > SAFETENSORS_DEPTH)
                return fail(p, "nested deeper than %d", SAFETENSORS_DEPTH);
        } else if (c == '}' || c == ']') {
            depth--;
        } else if (c == ',') {
            commas++;
        }
    }
    if (opened > 4 * SAFETENSORS_TENSORS || commas > COMMAS)
        return fail(p, "more than %d tensors", SAFETENSORS_TENSORS);
    return true;
}

static json_t *load(struct parsing *p, const char *text, size_t n)
{
    json_error_t error;
    if (n == 0 || text[0] != '{') {
        fail(p, "does not start with '{'");
        return NULL;
    }
    if (!scan(p, text, n))
        return NULL;
    json_t *root = json_loadb(text, n, JSON_REJECT_DUPLICATES, &error);
    char shown[JSON_ERROR_TEXT_LENGTH * 4];
    if (!root)
        fail(p, "is no JSON: %s, at byte %d", printable(shown, sizeof shown, error.text),
             error.position);
    return root;
}

static bool integer(const json_t *v, int64_t *out)
{
    *out = json_is_integer(v) ? (int64_t)json_integer_value(v) : -1;
    return *out >= 0;
}

/* ---- header -------------------------------------------------------------------------------- */

static bool parse_type(struct parsing *p, const char *shown, const json_t *v,
                       struct safetensors_tensor *t, int *bits)
{
    char text[64];
    const char *name = json_string_value(v);
    for (int i = 0; name && i < TYPES; i++)
        if (strcmp(types[i].name, name) == 0) {
            snprintf(t->type, sizeof t->type, "%s", name);
            t->kind = types[i].kind;
            *bits = types[i].bits;
            return true;
        }
    return fail(p, "%s: dtype is %s%s", shown, name ? "unknown: " : "no string",
                name ? printable(text, sizeof text, name) : "");
}

static bool parse_shape(struct parsing *p, const char *shown, const json_t *v,
                        struct safetensors_tensor *t)
{
    const size_t dims = json_array_size(v);
    if (!json_is_array(v) || dims > SAFETENSORS_DIMS)
        return fail(p, "%s: shape must be a list of at most %d sizes", shown, SAFETENSORS_DIMS);
    t->ndim = (int32_t)dims;
    t->elements = 1;
    for (int i = 0; i < t->ndim; i++) {
        if (!integer(json_array_get(v, (size_t)i), &t->shape[i]))
            return fail(p, "%s: a size in shape is no integer from 0 on", shown);
        if (__builtin_mul_overflow(t->elements, t->shape[i], &t->elements))
            return fail(p, "%s: its shape has more than 2^63 elements", shown);
    }
    return true;
}

static bool parse_tensor(struct parsing *p, const char *name, json_t *entry, int64_t data,
                         struct safetensors_tensor *t)
{
    char shown[2 * SAFETENSORS_NAME];
    int64_t end, size;
    int bits = 0;
    printable(shown, sizeof shown, name);
    if (strlen(name) >= sizeof t->name)
        return fail(p, "%.200s...: a name of %zu bytes, more than %d", shown, strlen(name),
                    SAFETENSORS_NAME - 1);
    snprintf(t->name, sizeof t->name, "%s", name);
    if (!json_is_object(entry) || json_object_size(entry) != 3)
        return fail(p, "%s: must be an object of dtype, shape and data_offsets", shown);
    if (!parse_type(p, shown, json_object_get(entry, "dtype"), t, &bits) ||
        !parse_shape(p, shown, json_object_get(entry, "shape"), t))
        return false;
    const json_t *offsets = json_object_get(entry, "data_offsets");
    if (json_array_size(offsets) != 2 || !integer(json_array_get(offsets, 0), &t->at) ||
        !integer(json_array_get(offsets, 1), &end))
        return fail(p, "%s: data_offsets must be two integers from 0 on", shown);
    if (t->at > end || end > data)
        return fail(p, "%s: data_offsets [%" PRId64 ",%" PRId64 "] of %" PRId64 " bytes of data",
                    shown, t->at, end, data);
    t->bytes = end - t->at;
    if (__builtin_mul_overflow(t->elements, (int64_t)bits, &size) || size % 8 ||
        size / 8 != t->bytes)
        return fail(p, "%s: %" PRId64 " elements of %s do not fill %" PRId64 " bytes", shown,
                    t->elements, t->type, t->bytes);
    return true;
}

static int by_place(const void *a, const void *b)
{
    const struct safetensors_tensor *x = a, *y = b;
    if (x->at != y->at)
        return x->at < y->at ? -1 : 1;
    return (x->bytes > y->bytes) - (x->bytes < y->bytes);
}

/* Tensors lie side by side from the first byte of the data to the last. */
static bool check_places(struct parsing *p, struct safetensors_tensor *t, int n, int64_t data)
{
    char shown[2 * SAFETENSORS_NAME];
    int64_t end = 0;
    qsort(t, (size_t)n, sizeof *t, by_place);
    for (int i = 0; i < n; i++) {
        if (t[i].at != end)
            return fail(p,
                        "%s: %s with the tensor before it: starts at byte %" PRId64
                        ", expected %" PRId64,
                        printable(shown, sizeof shown, t[i].name),
                        t[i].at < end ? "overlaps" : "leaves a hole", t[i].at, end);
        end = t[i].at + t[i].bytes;
    }
    if (end != data)
        return fail(p, "its tensors end at byte %" PRId64 " of %" PRId64 " bytes of data", end,
                    data);
    return true;
}

bool safetensors_parse(struct safetensors *s, const char *text, size_t n, int64_t data, char *why,
                       size_t why_size)
{
    struct parsing p = { why, why_size };
    json_t *root = load(&p, text, n), *entry;
    if (!root)
        return false;
    const size_t count = json_object_size(root);
    bool ok = count <= SAFETENSORS_TENSORS || fail(&p, "more than %d tensors", SAFETENSORS_TENSORS);
    if (ok)
        s->tensor = xrealloc(s->tensor, (size_t)s->n + count, sizeof *s->tensor);
    struct safetensors_tensor *first = s->tensor + s->n;
    int added = 0;
    const char *name;
    json_object_foreach(root, name, entry)
    {
        if (!ok)
            break;
        if (strcmp(name, "__metadata__") == 0) {
            if (!json_is_object(entry))
                ok = fail(&p, "__metadata__ is no object");
            continue;
        }
        memset(&first[added], 0, sizeof *first);
        first[added].file = s->n_files;
        ok = parse_tensor(&p, name, entry, data, &first[added]);
        added++;
    }
    json_decref(root);
    if (!ok || !check_places(&p, first, added, data))
        return false;
    s->n += added;
    return true;
}

/* ---- index --------------------------------------------------------------------------------- */

/* A plain name that stays inside the directory and is no index itself. */
static bool plain_name(const char *name)
{
    static const char end[] = ".safetensors";
    const size_t n = strlen(name), e = sizeof end - 1;
    return n > e && n < SAFETENSORS_NAME && name[0] != '.' && !strchr(name, '/') &&
           strcmp(name + n - e, end) == 0;
}

static int by_file_name(const void *a, const void *b)
{
    return strverscmp(((const struct safetensors_file *)a)->name,
                      ((const struct safetensors_file *)b)->name);
}

static int find_file(const struct safetensors *s, const char *name)
{
    struct safetensors_file key = { .name = "" };
    snprintf(key.name, sizeof key.name, "%s", name);
    const struct safetensors_file *f =
        bsearch(&key, s->file, (size_t)s->n_files, sizeof key, by_file_name);
    return f ? (int)(f - s->file) : -1;
}

static bool index_files(struct parsing *p, struct safetensors *s, json_t *map)
{
    char shown[2 * SAFETENSORS_NAME], where[512];
    const char *name;
    json_t *value, *seen = json_object();
    bool ok = seen != NULL;
    json_object_foreach(map, name, value)
    {
        const char *file = json_string_value(value);
        printable(shown, sizeof shown, name);
        if (ok && strlen(name) >= SAFETENSORS_NAME)
            ok = fail(p, "%.200s...: a name of %zu bytes, more than %d", shown, strlen(name),
                      SAFETENSORS_NAME - 1);
        if (ok && (!file || !plain_name(file)))
            ok = fail(p, "%s: '%s' is no name of a .safetensors file in this directory", shown,
                      file ? printable(where, sizeof where, file) : "(no string)");
        if (ok && !json_object_get(seen, file))
            ok = json_object_set_new(seen, file, json_true()) == 0;
        if (ok && json_object_size(seen) > SAFETENSORS_FILES)
            ok = fail(p, "more than %d files", SAFETENSORS_FILES);
        if (!ok)
            break;
    }
    if (ok) {
        s->file = xcalloc(json_object_size(seen) + 1, sizeof *s->file);
        json_object_foreach(seen, name, value)
            snprintf(s->file[s->n_files++].name, sizeof s->file->name, "%s", name);
        qsort(s->file, (size_t)s->n_files, sizeof *s->file, by_file_name);
    }
    json_decref(seen);
    return ok;
}

static int by_name(const void *a, const void *b)
{
    return strcmp(((const struct safetensors_tensor *)a)->name,
                  ((const struct safetensors_tensor *)b)->name);
}

bool safetensors_parse_index(struct safetensors *s, const char *text, size_t n, char *why,
                             size_t why_size)
{
    struct parsing p = { why, why_size };
    json_t *root = load(&p, text, n), *map = json_object_get(root, "weight_map"), *value;
    const char *name;
    bool ok = root != NULL;
    if (ok && (!json_is_object(map) || json_object_size(map) == 0))
        ok = fail(&p, "no object 'weight_map' with tensors in it");
    if (ok && json_object_size(map) > SAFETENSORS_TENSORS)
        ok = fail(&p, "more than %d tensors", SAFETENSORS_TENSORS);
    ok = ok && index_files(&p, s, map);
    if (ok) {
        s->tensor = xcalloc(json_object_size(map), sizeof *s->tensor);
        json_object_foreach(map, name, value)
        {
            struct safetensors_tensor *t = &s->tensor[s->n++];
            snprintf(t->name, sizeof t->name, "%s", name);
            t->file = find_file(s, json_string_value(value));
        }
        qsort(s->tensor, (size_t)s->n, sizeof *s->tensor, by_name);
    }
    json_decref(root);
    return ok;
}

/* ---- directory ----------------------------------------------------------------------------- */

static void blame(struct errors *errors, const char *path, const char *why)
{
    char shown[2 * SAFETENSORS_PATH];
    errors_add(errors, EXIT_CHECKPOINT, "%s: error: %s", printable(shown, sizeof shown, path), why);
}

static bool read_all(int fd, void *out, size_t n, int64_t at)
{
    for (size_t done = 0; done < n;) {
        const ssize_t got = pread(fd, (char *)out + done, n - done, (off_t)(at + (int64_t)done));
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return false;
        done += (size_t)got;
    }
    return true;
}

/* A regular file for reading, and its size; -1 with why. */
static int open_file(const char *path, int64_t *bytes, char *why, size_t why_size)
{
    struct stat st;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    if (fd < 0 || fstat(fd, &st) != 0) {
        snprintf(why, why_size, "%s", strerror(errno));
    } else if (!S_ISREG(st.st_mode)) {
        snprintf(why, why_size, "not a regular file");
    } else {
        *bytes = st.st_size;
        return fd;
    }
    if (fd >= 0)
        close(fd);
    return -1;
}

/* The header of one more file; the tensors' places become those in the file. */
static bool add_file(struct safetensors *s, const char *path, char *why, size_t why_size)
{
    unsigned char head[8];
    uint64_t n = 0;
    int64_t bytes = 0;
    const int first = s->n, fd = open_file(path, &bytes, why, why_size);
    if (fd < 0)
        return false;
    bool ok = bytes >= 8 && read_all(fd, head, sizeof head, 0);
    for (int i = 7; ok && i >= 0; i--)
        n = n << 8 | head[i];
    if (!ok) {
        snprintf(why, why_size, "has %" PRId64 " bytes: no safetensors file", bytes);
    } else if (n > SAFETENSORS_HEADER || n > (uint64_t)bytes - 8) {
        snprintf(why, why_size,
                 "claims a header of %" PRIu64 " bytes in a file of %" PRId64 " (at most %d): %s",
                 n, bytes, SAFETENSORS_HEADER, "truncated, or no safetensors file");
        ok = false;
    } else {
        char *text = xmalloc((size_t)n + 1, 1), reason[1024];
        ok = read_all(fd, text, (size_t)n, 8);
        if (!ok)
            snprintf(why, why_size, "cannot read its header");
        else if (!(ok = safetensors_parse(s, text, (size_t)n, bytes - 8 - (int64_t)n, reason,
                                          sizeof reason)))
            snprintf(why, why_size, "header: %s", reason);
        free(text);
    }
    close(fd);
    for (int i = first; ok && i < s->n; i++)
        s->tensor[i].at += 8 + (int64_t)n;
    if (ok)
        s->file[s->n_files++].bytes = bytes;
    return ok;
}

/* Headers agree with the index: every tensor where the index says, and no other. */
static void compare_index(const struct safetensors *s, const struct safetensors *index,
                          struct errors *errors)
{
    char shown[2 * SAFETENSORS_NAME];
    for (int i = 0; i < index->n; i++) {
        const struct safetensors_tensor *want = &index->tensor[i],
                                        *has = safetensors_find(s, want->name);
        if (!has || has->file != want->file)
            errors_add(errors, EXIT_CHECKPOINT,
                       "%s: error: %s: the index places it in %s, which lacks it", s->directory,
                       printable(shown, sizeof shown, want->name), index->file[want->file].name);
    }
    for (int i = 0; i < s->n; i++)
        if (!safetensors_find(index, s->tensor[i].name))
            errors_add(errors, EXIT_CHECKPOINT, "%s: error: %s: is in %s but not in the index",
                       s->directory, printable(shown, sizeof shown, s->tensor[i].name),
                       s->file[s->tensor[i].file].name);
}

static void read_headers(struct safetensors *s, const struct safetensors *index,
                         struct errors *errors)
{
    char shown[2 * SAFETENSORS_NAME], why[2048];
    const int before = errors->count;
    s->file = xcalloc((size_t)index->n_files + 1, sizeof *s->file);
    for (int i = 0; i < index->n_files; i++) {
        memcpy(s->file[i].name, index->file[i].name, sizeof s->file[i].name);
        char *path = xasprintf("%s/%s", s->directory, index->file[i].name);
        if (!add_file(s, path, why, sizeof why)) {
            blame(errors, path, why);
            s->n_files = i + 1; /* the next header is the next file's */
        }
        free(path);
    }
    if (s->n > 0)
        qsort(s->tensor, (size_t)s->n, sizeof *s->tensor, by_name);
    for (int i = 1; i < s->n; i++)
        if (strcmp(s->tensor[i - 1].name, s->tensor[i].name) == 0)
            errors_add(errors, EXIT_CHECKPOINT, "%s: error: %s: is in %s and in %s", s->directory,
                       printable(shown, sizeof shown, s->tensor[i].name),
                       s->file[s->tensor[i - 1].file].name, s->file[s->tensor[i].file].name);
    if (index->n > 0 && errors->count == before)
        compare_index(s, index, errors);
}

/* Which files there are: those of the index, or the one that is there. */
static bool choose_files(struct safetensors *s, struct safetensors *index, const char *path,
                         struct errors *errors)
{
    static const char *const single[] = { "model.safetensors", "projector.safetensors" };
    char why[2048], shown[2 * SAFETENSORS_PATH];
    struct stat st;
    printable(shown, sizeof shown, path);
    if (stat(path, &st) != 0) {
        blame(errors, path, strerror(errno));
        return false;
    }
    index->file = xcalloc(1, sizeof *index->file);
    index->n_files = 1;
    if (!S_ISDIR(st.st_mode)) {
        const char *slash = strrchr(path, '/'), *name = slash ? slash + 1 : path;
        snprintf(s->directory, sizeof s->directory, "%.*s", slash ? (int)(slash - path) : 1,
                 slash ? path : ".");
        snprintf(index->file[0].name, sizeof index->file[0].name, "%s", name);
        return true;
    }
    snprintf(s->directory, sizeof s->directory, "%s", path);
    char *file = xasprintf("%s/model.safetensors.index.json", path);
    if (lstat(file, &st) == 0) { /* a link that leads nowhere is there, too: opening it tells why */
        size_t n;
        char *text = file_read(file, SAFETENSORS_HEADER, &n, why, sizeof why), reason[1500];
        free(index->file);
        *index = (struct safetensors){ .n = 0 };
        const bool ok = text && safetensors_parse_index(index, text, n, reason, sizeof reason);
        if (!text)
            errors_add(errors, EXIT_CHECKPOINT, "mimo: error: %s", why);
        else if (!ok)
            blame(errors, file, reason);
        free(text);
        free(file);
        return ok;
    }
    free(file);
    for (size_t i = 0; i < sizeof single / sizeof single[0]; i++) {
        file = xasprintf("%s/%s", path, single[i]);
        const bool here = lstat(file, &st) == 0;
        free(file);
        if (here) {
            snprintf(index->file[0].name, sizeof index->file[0].name, "%s", single[i]);
            return true;
        }
    }
    errors_add(errors, EXIT_CHECKPOINT,
               "%s: error: holds neither model.safetensors.index.json nor model.safetensors",
               shown);
    return false;
}

bool safetensors_open(struct safetensors *s, const char *path, struct errors *errors)
{
    struct safetensors index = { .n = 0 };
    const int before = errors->count;
    *s = (struct safetensors){ .n = 0 };
    if (strlen(path) >= sizeof s->directory)
        blame(errors, path, "its name is too long");
    else if (choose_files(s, &index, path, errors))
        read_headers(s, &index, errors);
    safetensors_free(&index);
    if (errors->count == before)
        return true;
    safetensors_free(s);
    return false;
}

void safetensors_free(struct safetensors *s)
{
    free(s->file);
    free(s->tensor);
    *s = (struct safetensors){ .n = 0 };
}

const struct safetensors_tensor *safetensors_find(const struct safetensors *s, const char *name)
{
    struct safetensors_tensor key = { .name = "" };
    if (strlen(name) >= sizeof key.name || s->n == 0)
        return NULL;
    snprintf(key.name, sizeof key.name, "%s", name);
    return bsearch(&key, s->tensor, (size_t)s->n, sizeof key, by_name);
}

const char *safetensors_shape(const struct safetensors_tensor *t, char *out, size_t size)
{
    size_t n = (size_t)snprintf(out, size, "[");
    for (int i = 0; i < t->ndim && n < size; i++)
        n += (size_t)snprintf(out + n, size - n, "%s%" PRId64, i ? "," : "", t->shape[i]);
    if (n < size)
        snprintf(out + n, size - n, "]");
    return out;
}

/* ---- reading ------------------------------------------------------------------------------- */

static double half_to_double(uint16_t x)
{
    const int exponent = x >> 10 & 31, mantissa = x & 1023;
    double v = exponent == 0    ? ldexp(mantissa, -24)
               : exponent == 31 ? (mantissa ? NAN : INFINITY)
                                : ldexp(1024 + mantissa, exponent - 25);
    return x >> 15 ? -v : v;
}

static void widen(int kind, const void *raw, int64_t n, double *out)
{
    for (int64_t i = 0; i < n; i++)
        switch (kind) {
        case SAFETENSORS_BF16: out[i] = bf16_to_float(((const uint16_t *)raw)[i]); break;
        case SAFETENSORS_F16: out[i] = half_to_double(((const uint16_t *)raw)[i]); break;
        case SAFETENSORS_F32: out[i] = ((const float *)raw)[i]; break;
        default: out[i] = ((const double *)raw)[i]; break;
        }
}

int safetensors_bytes(int kind)
{
    ASSERT(kind >= 0 && kind < SAFETENSORS_OTHER);
    return types[kind].bits / 8;
}

const char *safetensors_type(int kind)
{
    ASSERT(kind >= 0 && kind < SAFETENSORS_OTHER);
    return types[kind].name;
}

bool safetensors_use(struct safetensors_access *a, int file, struct errors *errors)
{
    char why[512];
    int64_t bytes = 0;
    if (!a->raw)
        a->raw = xmalloc(SAFETENSORS_RAW, 1);
    if (a->fd > 0 && a->file == file)
        return true;
    if (a->fd > 0)
        close(a->fd);
    char *path = xasprintf("%s/%s", a->s->directory, a->s->file[file].name);
    a->file = file;
    a->fd = open_file(path, &bytes, why, sizeof why);
    if (a->fd >= 0 && a->write) {
        close(a->fd);
        a->fd = open(path, O_WRONLY | O_CLOEXEC);
        snprintf(why, sizeof why, "%s", a->fd < 0 ? strerror(errno) : "");
    } else if (a->fd >= 0 && bytes != a->s->file[file].bytes) {
        snprintf(why, sizeof why, "has %" PRId64 " bytes, it had %" PRId64, bytes,
                 a->s->file[file].bytes);
        close(a->fd);
        a->fd = -1;
    }
    if (a->fd < 0) {
        a->fd = 0;
        errors_add(errors, a->write ? EXIT_WRITE : EXIT_CHECKPOINT, "%s: error: %s", path, why);
        free(path);
        return false;
    }
    free(path);
    return true;
}

bool safetensors_read(struct safetensors_access *a, const struct safetensors_tensor *t,
                      int64_t first, int64_t n, double *out, struct errors *errors)
{
    const int64_t size = safetensors_bytes(t->kind), most = SAFETENSORS_RAW / size;
    ASSERT(first >= 0 && n >= 0 && first <= t->elements - n);
    if (!safetensors_use(a, t->file, errors))
        return false;
    for (int64_t done = 0; done < n;) {
        const int64_t k = n - done < most ? n - done : most;
        log_beat();
        errno = 0;
        if (!read_all(a->fd, a->raw, (size_t)(k * size), t->at + (first + done) * size)) {
            errors_add(errors, EXIT_CHECKPOINT, "%s/%s: error: %s: cannot read: %s",
                       a->s->directory, a->s->file[t->file].name, t->name,
                       errno ? strerror(errno) : "the file became shorter");
            return false;
        }
        widen(t->kind, a->raw, k, out + done);
        done += k;
    }
    return true;
}
