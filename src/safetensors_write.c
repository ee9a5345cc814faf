/* safetensors_write.c - new files: laid out whole before the first number is written, then filled
 * in any order, so that nothing has to be held in memory. Inside a file the tensors of wider types
 * come first, then by name, which keeps every tensor aligned (readers map the file). */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "safetensors_internal.h"

static int by_file_and_type(const void *a, const void *b)
{
    const struct safetensors_tensor *x = a, *y = b;
    if (x->file != y->file)
        return x->file < y->file ? -1 : 1;
    if (x->kind != y->kind && safetensors_bytes(x->kind) != safetensors_bytes(y->kind))
        return safetensors_bytes(x->kind) > safetensors_bytes(y->kind) ? -1 : 1;
    return strcmp(x->name, y->name);
}

static int by_name(const void *a, const void *b)
{
    return strcmp(((const struct safetensors_tensor *)a)->name,
                  ((const struct safetensors_tensor *)b)->name);
}

/* Cut the list into files and name these. */
static void cut(struct safetensors *s, const char *single, int64_t shard_bytes)
{
    int64_t used = 0;
    int file = 0;
    for (int i = 0; i < s->n; i++) {
        struct safetensors_tensor *t = &s->tensor[i];
        t->elements = 1;
        for (int d = 0; d < t->ndim; d++)
            t->elements *= t->shape[d];
        t->bytes = t->elements * safetensors_bytes(t->kind);
        snprintf(t->type, sizeof t->type, "%s", safetensors_type(t->kind));
        if (!single && used > 0 && used + t->bytes > shard_bytes) {
            used = 0;
            file++;
        }
        t->file = file;
        used += t->bytes;
    }
    s->n_files = file + 1;
    s->file = xcalloc((size_t)s->n_files, sizeof *s->file);
    for (int i = 0; i < s->n_files; i++)
        if (s->n_files == 1)
            snprintf(s->file[i].name, sizeof s->file[i].name, "%s",
                     single ? single : "model.safetensors");
        else
            snprintf(s->file[i].name, sizeof s->file[i].name, "model-%05d-of-%05d.safetensors",
                     i + 1, s->n_files);
}

/* The header of tensors [first, end), 8 bytes of length and padding included; places become those
 * in the file. The names are ours: nothing in them needs escaping. */
static char *make_header(struct safetensors_tensor *t, int first, int end, size_t *n,
                         int64_t *bytes)
{
    char *text = NULL;
    int64_t at = 0;
    FILE *f = open_memstream(&text, n);
    CHECK_SYS(f != NULL, EXIT_ENVIRONMENT, "no memory for a header");
    fprintf(f, "%8s{\"__metadata__\":{\"format\":\"pt\"}", "");
    for (int i = first; i < end; i++) {
        char shape[160];
        t[i].at = at;
        at += t[i].bytes;
        fprintf(
            f, ",\"%s\":{\"dtype\":\"%s\",\"shape\":%s,\"data_offsets\":[%" PRId64 ",%" PRId64 "]}",
            t[i].name, t[i].type, safetensors_shape(&t[i], shape, sizeof shape), t[i].at, at);
    }
    fputc('}', f);
    while (ftell(f) % 8)
        fputc(' ', f);
    CHECK_SYS(fclose(f) == 0, EXIT_ENVIRONMENT, "no memory for a header");
    for (int i = 0; i < 8; i++)
        text[i] = (char)(unsigned char)((uint64_t)(*n - 8) >> 8 * i);
    for (int i = first; i < end; i++)
        t[i].at += (int64_t)*n;
    *bytes = (int64_t)*n + at;
    return text;
}

static bool write_all(int fd, const void *from, size_t n, int64_t at)
{
    for (size_t done = 0; done < n;) {
        const ssize_t put =
            pwrite(fd, (const char *)from + done, n - done, (off_t)(at + (int64_t)done));
        if (put < 0 && errno == EINTR)
            continue;
        if (put <= 0)
            return false;
        done += (size_t)put;
    }
    return true;
}

static bool blame(struct errors *errors, const struct safetensors *s, const char *name,
                  const char *what)
{
    errors_add(errors, EXIT_WRITE, "%s/%s: error: cannot %s: %s", s->directory, name, what,
               strerror(errno));
    return false;
}

/* A new file of that content, `bytes` long: what lies behind the content is reserved. */
static bool create_file(const struct safetensors *s, const char *name, const char *content,
                        size_t n, int64_t bytes, struct errors *errors)
{
    char *path = xasprintf("%s/%s", s->directory, name);
    int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    bool ok = fd >= 0 || blame(errors, s, name, "create");
    free(path);
    if (ok && bytes > 0 && fallocate(fd, 0, 0, (off_t)bytes) != 0 &&
        (errno == ENOSPC || errno == EDQUOT || errno == EFBIG || ftruncate(fd, (off_t)bytes) != 0))
        ok = blame(errors, s, name, "reserve its space"); /* not every file system can reserve */
    if (ok && !write_all(fd, content, n, 0))
        ok = blame(errors, s, name, "write");
    if (ok && fsync(fd) != 0)
        ok = blame(errors, s, name, "sync");
    if (fd >= 0 && close(fd) != 0 && ok)
        ok = blame(errors, s, name, "close");
    return ok;
}

static bool write_index(const struct safetensors *s, struct errors *errors)
{
    char *text = NULL;
    size_t n = 0;
    int64_t total = 0;
    FILE *f = open_memstream(&text, &n);
    CHECK_SYS(f != NULL, EXIT_ENVIRONMENT, "no memory for an index");
    for (int i = 0; i < s->n; i++)
        total += s->tensor[i].bytes;
    fprintf(f, "{\n  \"metadata\": {\n    \"total_size\": %" PRId64 "\n  },\n  \"weight_map\": {\n",
            total);
    for (int i = 0; i < s->n; i++)
        fprintf(f, "    \"%s\": \"%s\"%s\n", s->tensor[i].name, s->file[s->tensor[i].file].name,
                i < s->n - 1 ? "," : "");
    fputs("  }\n}\n", f);
    CHECK_SYS(fclose(f) == 0, EXIT_ENVIRONMENT, "no memory for an index");
    const bool ok = create_file(s, "model.safetensors.index.json", text, n, 0, errors);
    free(text);
    return ok;
}

bool safetensors_create(struct safetensors *s, const char *single, int64_t shard_bytes,
                        struct errors *errors)
{
    cut(s, single, shard_bytes);
    qsort(s->tensor, (size_t)s->n, sizeof *s->tensor, by_file_and_type);
    bool ok = true;
    for (int i = 0, first = 0; i < s->n_files && ok; i++) {
        int end = first;
        size_t n = 0;
        while (end < s->n && s->tensor[end].file == i)
            end++;
        char *header = make_header(s->tensor, first, end, &n, &s->file[i].bytes);
        ok = create_file(s, s->file[i].name, header, n, s->file[i].bytes, errors);
        free(header);
        first = end;
    }
    qsort(s->tensor, (size_t)s->n, sizeof *s->tensor, by_name);
    return ok && (s->n_files == 1 || write_index(s, errors));
}

bool safetensors_write(struct safetensors_access *a, const struct safetensors_tensor *t,
                       int64_t first, int64_t n, const void *from, struct errors *errors)
{
    const int64_t size = safetensors_bytes(t->kind);
    ASSERT(a->write && first >= 0 && n >= 0 && first <= t->elements - n);
    if (!safetensors_use(a, t->file, errors))
        return false;
    return write_all(a->fd, from, (size_t)(n * size), t->at + first * size) ||
           blame(errors, a->s, a->s->file[t->file].name, "write");
}

bool safetensors_close(struct safetensors_access *a, struct errors *errors)
{
    bool ok = true;
    for (int i = 0; a->write && i < a->s->n_files && ok; i++)
        if ((ok = safetensors_use(a, i, errors)) && fsync(a->fd) != 0)
            ok = blame(errors, a->s, a->s->file[i].name, "sync");
    if (a->fd > 0 && close(a->fd) != 0 && a->write && ok)
        ok = blame(errors, a->s, a->s->file[a->file].name, "close");
    free(a->raw);
    a->fd = 0;
    a->raw = NULL;
    return ok;
}
