/* tensorboard.c - see tensorboard.h.
 *
 * A file is a sequence of records: u64 length, u32 masked CRC-32C of those 8 bytes, payload, u32
 * masked CRC-32C of the payload, all little-endian (TFRecord). A payload is one protobuf message
 * Event; only the fields that scalars need are written:
 *   Event   { double wall_time = 1; int64 step = 2; string file_version = 3; Summary summary = 5; }
 *   Summary { repeated Value value = 1; }   Value { string tag = 1; float simple_value = 2; }
 * Each write(2) ends with a whole record; after one that failed half-way the file is cut back to
 * the last whole record.
 */
#include "tensorboard.h"
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include "check.h"
#include "log.h"
#include "run.h"

enum {
    PATH_BYTES = 4096,
    HOST_BYTES = 64,
    VALUES_MAX = 64,
    TAG_MAX = 96,
    RECORD_MAX = VALUES_MAX * (TAG_MAX + 16) + 64
};
enum { WIRE_VARINT = 0, WIRE_64 = 1, WIRE_BYTES = 2, WIRE_32 = 5 };

static const char stem[] = "events.out.tfevents.";

struct bytes {
    unsigned char data[RECORD_MAX];
    size_t n;
};

struct tensorboard {
    int fd;      /* -1 after a failure */
    off_t whole; /* bytes of whole records */
    struct {
        char tag[TAG_MAX];
        float value;
        bool both;
    } value[VALUES_MAX];
    int n;
    char path[PATH_BYTES];
};

/* ---- protobuf and records -------------------------------------------------------------------- */

/* CRC-32C (Castagnoli), bit by bit: a few hundred bytes an iteration need no table. */
static uint32_t crc32c(const unsigned char *data, size_t n)
{
    uint32_t crc = ~0u;

    for (size_t i = 0; i < n; i++) {
        crc ^= data[i];
        for (int bit = 0; bit < 8; bit++)
            crc = crc >> 1 ^ (crc & 1 ? 0x82f63b78u : 0u);
    }
    return ~crc;
}

static uint32_t masked_crc(const unsigned char *data, size_t n)
{
    uint32_t crc = crc32c(data, n);

    return (crc >> 15 | crc << 17) + 0xa282ead8u;
}

static void put_bytes(struct bytes *b, const void *data, size_t n)
{
    ASSERT(b->n + n <= sizeof b->data);
    memcpy(b->data + b->n, data, n);
    b->n += n;
}

static void put_little(struct bytes *b, uint64_t v, int n_bytes)
{
    unsigned char little[8];

    for (int i = 0; i < n_bytes; i++)
        little[i] = (unsigned char)(v >> 8 * i);
    put_bytes(b, little, (size_t)n_bytes);
}

static void put_varint(struct bytes *b, uint64_t v)
{
    for (; v >= 0x80; v >>= 7)
        put_little(b, v | 0x80, 1);
    put_little(b, v, 1);
}

static void put_key(struct bytes *b, int field, int wire)
{
    put_varint(b, (uint64_t)(field << 3 | wire));
}

static void put_text(struct bytes *b, int field, const void *data, size_t n)
{
    put_key(b, field, WIRE_BYTES);
    put_varint(b, n);
    put_bytes(b, data, n);
}

static void put_time_and_step(struct bytes *b, int64_t step)
{
    struct timespec now;
    double seconds;
    uint64_t bits;

    clock_gettime(CLOCK_REALTIME, &now);
    seconds = (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
    memcpy(&bits, &seconds, sizeof bits);
    put_key(b, 1, WIRE_64);
    put_little(b, bits, 8);
    put_key(b, 2, WIRE_VARINT);
    put_varint(b, (uint64_t)step);
}

/* One value of a summary. */
static void put_scalar(struct bytes *summary, const char *tag, float value)
{
    struct bytes one = { .n = 0 };
    uint32_t bits;

    memcpy(&bits, &value, sizeof bits);
    put_text(&one, 1, tag, strlen(tag));
    put_key(&one, 2, WIRE_32);
    put_little(&one, bits, 4);
    put_text(summary, 1, one.data, one.n);
}

/* ---- the file -------------------------------------------------------------------------------- */

/* No more events: the file keeps its whole records. */
static void give_up(struct tensorboard *t)
{
    int error = errno, cut = ftruncate(t->fd, t->whole);

    log_warn("%s: %s; TensorBoard gets no more values%s", t->path, strerror(error),
             cut == 0 ? "" : ", its last record is broken");
    close(t->fd);
    t->fd = -1;
}

static void write_record(struct tensorboard *t, const struct bytes *payload)
{
    struct bytes record = { .n = 0 };
    size_t done = 0;

    put_little(&record, payload->n, 8);
    put_little(&record, masked_crc(record.data, 8), 4);
    put_bytes(&record, payload->data, payload->n);
    put_little(&record, masked_crc(payload->data, payload->n), 4);
    while (t->fd >= 0 && done < record.n) {
        ssize_t wrote = write(t->fd, record.data + done, record.n - done);
        if (wrote < 0 && errno == EINTR)
            continue;
        if (wrote < 0)
            give_up(t);
        else
            done += (size_t)wrote;
    }
    if (t->fd >= 0)
        t->whole += (off_t)record.n;
}

static bool holds_events(const char *dir)
{
    DIR *d = opendir(dir);
    const struct dirent *entry;
    bool found = false;

    while (d && !found && (entry = readdir(d)))
        found = strncmp(entry->d_name, stem, sizeof stem - 1) == 0;
    if (d)
        closedir(d);
    return found;
}

/* A new file with a name that no other process and no earlier start has; its name is left in
 * path. */
static int create(const char *dir, char path[PATH_BYTES])
{
    char host[HOST_BYTES] = "unknown";
    int fd = -1;

    gethostname(host, sizeof host - 1);
    for (int i = 0; fd < 0; i++) {
        int length = snprintf(path, PATH_BYTES, "%s/%s%lld.%s.%ld.%d", dir, stem,
                              (long long)time(NULL), host, (long)getpid(), i);
        if (length >= PATH_BYTES)
            errno = ENAMETOOLONG;
        else
            fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0666);
        if (fd < 0 && errno != EEXIST)
            break;
    }
    return fd;
}

struct tensorboard *tensorboard_open(const char *dir, bool continues)
{
    static const char version[] = "brain.Event:2";
    struct tensorboard *t;
    struct bytes first = { .n = 0 };
    bool shared;

    if (!*dir)
        return NULL;
    shared = !continues && holds_events(dir);
    t = xcalloc(1, sizeof *t);
    t->fd = run_make_directories(dir) ? create(dir, t->path) : -1;
    if (t->fd < 0) {
        log_warn("log.tensorboard_dir = '%s': %s; TensorBoard gets no values", dir,
                 strerror(errno));
        free(t);
        return NULL;
    }
    if (shared)
        log_warn(
            "log.tensorboard_dir = '%s' holds events of another run: TensorBoard draws both as one curve",
            dir);
    put_time_and_step(&first, 0);
    put_text(&first, 3, version, sizeof version - 1);
    write_record(t, &first);
    log_line("tensorboard: %s", t->path);
    return t;
}

void tensorboard_put(struct tensorboard *t, const char *tag, enum tensorboard_axis axis,
                     double value)
{
    if (!t)
        return;
    ASSERT(t->n < VALUES_MAX && strlen(tag) + sizeof " vs samples" <= TAG_MAX);
    snprintf(t->value[t->n].tag, TAG_MAX, "%s", tag);
    t->value[t->n].value = (float)value;
    t->value[t->n++].both = axis == TENSORBOARD_BOTH;
}

/* One event with every kept value that belongs to the axis. */
static void write_axis(struct tensorboard *t, int64_t step, bool samples)
{
    struct bytes event = { .n = 0 }, summary = { .n = 0 };
    char tag[TAG_MAX + sizeof " vs samples"];

    for (int i = 0; i < t->n; i++) {
        if (samples && !t->value[i].both)
            continue;
        snprintf(tag, sizeof tag, "%s%s", t->value[i].tag, samples ? " vs samples" : "");
        put_scalar(&summary, tag, t->value[i].value);
    }
    if (summary.n == 0)
        return;
    put_time_and_step(&event, step);
    put_text(&event, 5, summary.data, summary.n);
    write_record(t, &event);
}

void tensorboard_write(struct tensorboard *t, int64_t iteration, int64_t samples)
{
    if (!t)
        return;
    if (t->fd >= 0)
        write_axis(t, iteration, false);
    if (t->fd >= 0)
        write_axis(t, samples, true);
    t->n = 0;
}

void tensorboard_close(struct tensorboard *t)
{
    if (!t)
        return;
    if (t->fd >= 0)
        close(t->fd);
    free(t);
}
