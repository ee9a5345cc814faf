/* shard.c - which files a path names, and the members of each as libarchive reads its headers
 * (POSIX.1-2001 ustar and pax, GNU long names, old tar).
 *
 * Trust: the bytes come from strangers, and libarchive, made for unpacking, takes what it can. On
 * top of it are refused, with the name of shard and member: absolute names and `..`, characters
 * outside [A-Za-z0-9._/-], links, devices, sparse members, sizes that are negative or reach beyond
 * the file, headers that different readers understand differently, a missing end mark (a copy cut
 * at a member's boundary looks whole otherwise), anything behind the end mark (joined archives,
 * whose second half other readers would see). A member's place in the file is what the library has
 * consumed when it hands out the member; it is checked against the headers before it and against
 * where the next one begins.
 */
#include "shard.h"
#include <archive.h>
#include <archive_entry.h>
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include "log.h"
#include "path_hint.h"

enum { BLOCK = 512, WINDOW = 16384, EXTENDED_MAX = 1 << 20, SHARDS_MAX = 1000000, HINT = 512 };
/* A pipe instead of a file is no reason to wait. */
enum { OPEN_FLAGS = O_RDONLY | O_CLOEXEC | O_NONBLOCK };

static const char NO_END[] = "the file ends without an end-of-archive mark: truncated?";

struct paths {
    char **v;
    int64_t n, capacity;
};

struct walk {
    struct shard_set *set;
    struct errors *errors;
    const char *path;
    int64_t shard, first_sample; /* number of this shard; first sample of it */
    int fd;
    int64_t size, at;              /* bytes of the file; where the member in work begins */
    char name[SHARD_NAME_MAX + 2]; /* of the member in work; between members, of the last one */
    unsigned char *bytes;          /* of bytes_at */
    int64_t capacity;
};

/* A member as libarchive reads it; ok = false: it does not. */
struct member {
    bool ok;
    int64_t data, size; /* place of its bytes */
};

static void expand(const char *path, const char *where, struct paths *out, struct errors *errors);
static void expand_directory(const char *path, const char *where, struct paths *out,
                             struct errors *errors);
static bool expand_pattern(const char *text, const char *where, struct paths *out,
                           struct errors *errors);
static void paths_add(struct paths *p, char *path);
static int compare_text(const void *a, const void *b);
static const char *unpack_command(const char *path, const unsigned char *head, int64_t n);
static void index_shard(struct shard_set *set, int64_t shard, struct errors *errors);
static void walk(struct walk *w);
static const char *reason(struct archive *a);
static bool walk_member(struct walk *w, struct archive *a);
static bool check_headers(struct walk *w, const struct member *m);
static bool check_pax(struct walk *w, int64_t at, int64_t n, bool global, const struct member *m,
                      bool *sized);
static bool read_number(const unsigned char *field, int n, int64_t *out);
static bool check_end(struct walk *w);
static bool check_name(struct walk *w);
static bool refuse(struct walk *w, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
static bool refuse_after(struct walk *w, const char *text);
static int64_t round_up(int64_t n);
static const unsigned char *bytes_at(struct walk *w, int64_t at, int64_t n);
static void add_member(struct walk *w, const char *name, int64_t offset, int64_t size);
static void mark_scattered(struct shard_set *set, int64_t first);
static size_t pool_add(struct shard_set *set, const char *text, size_t n);
static int open_shard(struct shard_set *set, int64_t shard);

void shard_init(struct shard_set *set, const char *path, const char *where, struct errors *errors)
{
    memset(set, 0, sizeof *set);
    for (int i = 0; i < SHARD_FILES; i++)
        set->open[i].shard = -1;
    struct paths paths = { 0 };
    expand(path, where, &paths, errors);
    if (paths.n > 0)
        qsort(paths.v, (size_t)paths.n, sizeof *paths.v, compare_text);
    set->n_shards = paths.n;
    set->shard = xcalloc((size_t)paths.n + 1, sizeof *set->shard);
    for (int64_t i = 0; i < paths.n; i++)
        set->shard[i].path = paths.v[i];
    free(paths.v);
    const int before = errors->count;
    for (int64_t i = 0; i < set->n_shards; i++)
        index_shard(set, i, errors);
    if (set->n_shards > 0 && set->n_samples == 0 && errors->count == before)
        errors_add(errors, EXIT_DATA, "%s = '%s': no sample in %" PRId64 " shards", where, path,
                   set->n_shards);
}

const char *shard_key(const struct shard_set *set, int64_t sample, char *out, size_t size)
{
    const struct shard_sample *s = &set->sample[sample];
    const char *path = set->shard[s->shard].path, *slash = strrchr(path, '/');
    char text[2 * SHARD_NAME_MAX + 16];
    snprintf(text, sizeof text, "%.*s:%s", SHARD_NAME_MAX, slash ? slash + 1 : path,
             set->pool + s->key);
    return printable(out, size, text);
}

const struct shard_part *shard_parts(const struct shard_set *set, int64_t sample)
{
    return set->part + set->sample[sample].first_part;
}

const char *shard_part_name(const struct shard_set *set, const struct shard_part *part)
{
    return set->pool + part->name;
}

bool shard_read(struct shard_set *set, int64_t sample, const struct shard_part *part, int64_t most,
                unsigned char **buffer, int64_t *capacity, char *why, size_t why_size)
{
    const int64_t shard = set->sample[sample].shard;
    char name[4 * SHARD_NAME_MAX + 1];
    printable(name, sizeof name, shard_part_name(set, part));
    if (part->size > most) {
        snprintf(why, why_size, "part %s has %" PRId64 " bytes, at most %" PRId64 " are read", name,
                 part->size, most);
        return false;
    }
    if (part->size + 1 > *capacity) {
        *capacity = part->size + 1;
        *buffer = xrealloc(*buffer, (size_t)*capacity, 1);
    }
    const int fd = open_shard(set, shard);
    for (int64_t done = 0; done < part->size;) {
        const ssize_t n =
            pread(fd, *buffer + done, (size_t)(part->size - done), (off_t)(part->offset + done));
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0) /* not a fault of the sample: other ranks may well read it */
            FATAL(EXIT_DATA, "%s: cannot be read at byte %" PRId64 ": %s", set->shard[shard].path,
                  part->offset + done, strerror(errno));
        if (n == 0)
            FATAL(EXIT_DATA, "%s: ends at byte %" PRId64 ", it was longer when the run began",
                  set->shard[shard].path, part->offset + done);
        done += n;
    }
    (*buffer)[part->size] = '\0';
    return true;
}

void shard_free(struct shard_set *set)
{
    for (int i = 0; i < SHARD_FILES; i++)
        if (set->shard && set->open[i].shard >= 0)
            close(set->open[i].fd);
    for (int64_t i = 0; i < set->n_shards; i++)
        free(set->shard[i].path);
    free(set->shard);
    free(set->sample);
    free(set->part);
    free(set->pool);
    memset(set, 0, sizeof *set);
}

/* --- which files --- */

static void expand(const char *path, const char *where, struct paths *out, struct errors *errors)
{
    struct stat st;
    char hint[HINT];
    if (strchr(path, '{') && stat(path, &st) != 0) {
        if (!expand_pattern(path, where, out, errors)) {
            for (int64_t i = 0; i < out->n; i++)
                free(out->v[i]);
            out->n = 0;
        }
    } else if (stat(path, &st) != 0) {
        const int error = errno;
        errors_add(errors, EXIT_DATA, "%s = '%s': %s%s", where, path, strerror(error),
                   path_hint(path, hint, sizeof hint));
    } else if (S_ISDIR(st.st_mode)) {
        expand_directory(path, where, out, errors);
    } else {
        paths_add(out, xstrdup(path));
    }
}

static void expand_directory(const char *path, const char *where, struct paths *out,
                             struct errors *errors)
{
    DIR *dir = opendir(path);
    char hint[HINT];
    if (!dir) {
        errors_add(errors, EXIT_DATA, "%s = '%s': %s", where, path, strerror(errno));
        return;
    }
    bool compressed = false;
    for (const struct dirent *e; errno = 0, (e = readdir(dir)) != NULL;) {
        const size_t n = strlen(e->d_name);
        if (e->d_name[0] == '.')
            continue;
        char *file = xasprintf("%s/%s", path, e->d_name);
        if (n > 4 && strcmp(e->d_name + n - 4, ".tar") == 0) {
            paths_add(out, file);
            continue;
        }
        const char *command = unpack_command(e->d_name, NULL, 0);
        if (command) {
            compressed = true;
            errors_add(errors, EXIT_DATA,
                       "%s: error: compressed shards cannot be read at an offset; unpack it: %s %s",
                       file, command, file);
        }
        free(file);
    }
    const int trouble = errno;
    closedir(dir);
    if (trouble != 0)
        errors_add(errors, EXIT_DATA, "%s = '%s': %s", where, path, strerror(trouble));
    else if (out->n == 0 && !compressed)
        errors_add(errors, EXIT_DATA, "%s = '%s': this directory holds no .tar file%s", where, path,
                   path_hint(path, hint, sizeof hint));
}

/* The first {A..B} becomes each number from A to B, with as many digits as A has; the rest is
 * expanded in turn. */
static bool expand_pattern(const char *text, const char *where, struct paths *out,
                           struct errors *errors)
{
    const char *open = strchr(text, '{');
    if (!open) {
        paths_add(out, xstrdup(text));
        return true;
    }
    char *end, *end2;
    const char *first = open + 1;
    errno = 0;
    const long long a = isdigit((unsigned char)*first) ? strtoll(first, &end, 10) : -1;
    const bool range = a >= 0 && strncmp(end, "..", 2) == 0 && isdigit((unsigned char)end[2]);
    const long long b = range ? strtoll(end + 2, &end2, 10) : -1;
    if (!range || *end2 != '}' || errno != 0 || b < a || b - a >= SHARDS_MAX || end - first > 18) {
        errors_add(errors, EXIT_DATA,
                   "%s = '%s': braces hold a range of numbers as {000000..000123}, ascending, "
                   "below %d files",
                   where, text, SHARDS_MAX);
        return false;
    }
    for (long long i = a; i <= b; i++) {
        char *one =
            xasprintf("%.*s%0*lld%s", (int)(open - text), text, (int)(end - first), i, end2 + 1);
        bool ok = expand_pattern(one, where, out, errors);
        free(one);
        if (ok && out->n > SHARDS_MAX) {
            errors_add(errors, EXIT_DATA, "%s = '%s': a range of numbers for more than %d files",
                       where, text, SHARDS_MAX);
            ok = false;
        }
        if (!ok)
            return false;
    }
    return true;
}

static void paths_add(struct paths *p, char *path)
{
    if (p->n == p->capacity) {
        p->capacity = p->capacity ? 2 * p->capacity : 64;
        p->v = xrealloc(p->v, (size_t)p->capacity, sizeof *p->v);
    }
    p->v[p->n++] = path;
}

static int compare_text(const void *a, const void *b)
{
    return strcmp(*(char *const *)a, *(char *const *)b);
}

/* The command that unpacks a compressed shard, known by its first bytes or, without them, by its
 * name; NULL = not compressed. */
static const char *unpack_command(const char *path, const unsigned char *head, int64_t n)
{
    static const struct {
        const char *magic;
        int bytes;
        const char *ending[3], *command;
    } known[] = {
        { "\x1f\x8b", 2, { ".tar.gz", ".tgz", NULL }, "gunzip" },
        { "\x28\xb5\x2f\xfd", 4, { ".tar.zst", ".tzst", NULL }, "zstd -d" },
        { "\xfd"
          "7zXZ",
          5,
          { ".tar.xz", ".txz", NULL },
          "unxz" },
        { "BZh", 3, { ".tar.bz2", ".tbz2", ".tbz" }, "bunzip2" },
        { "\x04\x22\x4d\x18", 4, { ".tar.lz4", NULL, NULL }, "lz4 -d" },
    };
    const size_t length = strlen(path);
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        if (head && n >= known[i].bytes &&
            memcmp(head, known[i].magic, (size_t)known[i].bytes) == 0)
            return known[i].command;
        for (int k = 0; !head && k < 3 && known[i].ending[k]; k++) {
            const size_t e = strlen(known[i].ending[k]);
            if (length > e && strcmp(path + length - e, known[i].ending[k]) == 0)
                return known[i].command;
        }
    }
    return NULL;
}

/* --- the walk --- */

static void index_shard(struct shard_set *set, int64_t shard, struct errors *errors)
{
    struct walk *w = xcalloc(1, sizeof *w);
    *w = (struct walk){
        .set = set, .errors = errors, .shard = shard, .first_sample = set->n_samples
    };
    w->path = set->shard[shard].path;
    struct stat st;
    w->fd = open(w->path, OPEN_FLAGS);
    if (w->fd < 0 || fstat(w->fd, &st) != 0) {
        const int error = errno;
        char hint[HINT];
        errors_add(errors, EXIT_DATA, "%s: error: %s%s", w->path, strerror(error),
                   path_hint(w->path, hint, sizeof hint));
    } else if (!S_ISREG(st.st_mode)) {
        errors_add(errors, EXIT_DATA, "%s: error: not a regular file", w->path);
    } else {
        w->size = set->shard[shard].bytes = st.st_size;
        set->shard[shard].changed = st.st_mtim;
        walk(w);
        mark_scattered(set, w->first_sample);
    }
    if (w->fd >= 0)
        close(w->fd);
    free(w->bytes);
    free(w);
}

static void walk(struct walk *w)
{
    const int64_t n = w->size < 8 ? w->size : 8;
    const unsigned char *head = bytes_at(w, 0, n);
    const char *command = head ? unpack_command(w->path, head, n) : NULL;
    if (command)
        errors_add(w->errors, EXIT_DATA,
                   "%s: error: compressed shards cannot be read at an offset; unpack it: %s %s",
                   w->path, command, w->path);
    else if (head && w->size < BLOCK)
        refuse_after(w, NO_END);
    if (!head || command || w->size < BLOCK)
        return;
    struct archive *a = archive_read_new();
    if (!a || archive_read_support_format_tar(a) != ARCHIVE_OK)
        FATAL(EXIT_ENVIRONMENT, "libarchive did not start");
    if (archive_read_open_fd(a, w->fd, WINDOW) != ARCHIVE_OK)
        refuse_after(w, archive_errno(a) == EILSEQ ? "this is not a tar file" : reason(a));
    else
        for (bool more = true; more;)
            more = walk_member(w, a);
    archive_read_free(a);
}

static const char *reason(struct archive *a)
{
    const char *text = archive_error_string(a);
    return text ? text : "damaged header";
}

/* The member that begins at w->at; moves on to the next. False at the end and after an error. */
static bool walk_member(struct walk *w, struct archive *a)
{
    if (w->at > w->size - BLOCK)
        return refuse_after(w, NO_END);
    struct archive_entry *entry;
    const int status = archive_read_next_header(a, &entry);
    const unsigned char *h = bytes_at(w, w->at, BLOCK);
    if (!h)
        return false;
    if (status == ARCHIVE_EOF && h[0] == '\0')
        return check_end(w);
    /* A warning about a character set (of an owner's name, say) changes no byte of a name. */
    const bool ok = status == ARCHIVE_OK || (status == ARCHIVE_WARN && archive_errno(a) == EILSEQ);
    if (status == ARCHIVE_EOF || status == ARCHIVE_RETRY ||
        (ok && archive_read_header_position(a) != w->at))
        return refuse_after(w, "damaged header");
    const char *name = ok ? archive_entry_pathname(entry) : NULL;
    const bool file = archive_entry_filetype(entry) == AE_IFREG;
    const struct member m = { .ok = ok, /* all before its bytes are headers */
                              .data = archive_filter_bytes(a, 0),
                              .size = file ? archive_entry_size(entry) : 0 };
    if (ok)
        snprintf(w->name, sizeof w->name, "%s", name ? name : "");
    else /* as its first header has it */
        snprintf(w->name, sizeof w->name, "%.100s", (const char *)h);
    if ((ok && !check_name(w)) || !check_headers(w, &m))
        return false;
    if (!ok)
        return refuse(w, "%s", reason(a));
    if (file)
        add_member(w, w->name, m.data, m.size);
    w->at = m.data + round_up(m.size);
    return true;
}

/* What the library lets pass although readers differ over it, and some mistakes in words: there may
 * be extended headers and then one of a plain file or directory, the bytes must follow at once and
 * end inside the file, and what the headers say of name and size must be what the library has read.
 */
static bool check_headers(struct walk *w, const struct member *m)
{
    int64_t at = w->at, n, left;
    bool sized = false; /* by a pax header */
    char type;
    for (;; at += BLOCK + round_up(n)) {
        if (at > w->size - BLOCK)
            return refuse(w, "the file ends in its headers: truncated?");
        const unsigned char *h = bytes_at(w, at, BLOCK);
        if (!h)
            return false;
        type = (char)h[156];
        left = w->size - at - BLOCK;
        if (!read_number(h + 124, 12, &n))
            return refuse(w, "its size is negative or no number");
        if (type != 'x' && type != 'g' && type != 'L' && type != 'K')
            break;
        if (n > EXTENDED_MAX || n > left)
            return refuse(w, "its extended header has %" PRId64 " bytes", n);
        if ((type == 'x' || type == 'g') && !check_pax(w, at + BLOCK, n, type == 'g', m, &sized))
            return false;
    }
    if (type != '\0' && !strchr("057", type))
        return refuse(w, "%s, only plain files and directories are accepted",
                      type == '1' || type == '2'   ? "it is a link"
                      : type == 'S'                ? "it is sparse"
                      : type == '3' || type == '4' ? "it is a device"
                      : type == '6'                ? "it is a fifo"
                                                   : "it has an unknown type");
    if (sized)
        n = m->size;
    if (n > left)
        return refuse(w, "it claims %" PRId64 " bytes, the file has %" PRId64 " left: truncated?",
                      n, left);
    if (m->ok && (n != m->size || at + BLOCK != m->data))
        return refuse(w, "its headers contradict each other");
    return true;
}

/* Records "length key=value\n" of a pax header. */
static bool check_pax(struct walk *w, int64_t at, int64_t n, bool global, const struct member *m,
                      bool *sized)
{
    static const char *const sparse[] = { "GNU.sparse.", "SUN.holesdata=", "SCHILY.realsize=" };
    const char *text = (const char *)bytes_at(w, at, n);
    if (!text)
        return false;
    char path[sizeof w->name + 8], bytes[32], *key;
    snprintf(path, sizeof path, "path=%s\n", w->name);
    snprintf(bytes, sizeof bytes, "size=%" PRId64 "\n", m->size);
    for (int64_t length, done = 0; done < n; done += length) {
        const char *record = text + done;
        errno = 0;
        length = isdigit((unsigned char)*record) ? strtoll(record, &key, 10) : 0;
        if (length <= 0 || errno != 0 || length > n - done || *key != ' ' ||
            ++key >= record + length || record[length - 1] != '\n' ||
            !memchr(key, '=', (size_t)(record + length - key)))
            return refuse(w, "its pax header is damaged");
        for (size_t i = 0; i < sizeof sparse / sizeof *sparse; i++)
            if (strncmp(key, sparse[i], strlen(sparse[i])) == 0)
                return refuse(w, "it is sparse, only plain files and directories are accepted");
        const bool is_size = strncmp(key, "size=", 5) == 0;
        if (!is_size && strncmp(key, "path=", 5) != 0)
            continue;
        const char *expected = is_size ? bytes : path;
        const size_t rest = (size_t)(record + length - key);
        if (global)
            return refuse(w, "a global pax header sets path or size");
        if (m->ok && (rest != strlen(expected) || memcmp(key, expected, rest) != 0))
            return refuse(w, "its pax header holds a damaged or second %.4s", key);
        *sized = *sized || is_size;
    }
    return true;
}

/* Octal text, or base 256 when the first bit is set; false for negative numbers, overflow and
 * anything else. */
static bool read_number(const unsigned char *field, int n, int64_t *out)
{
    uint64_t v = 0;
    int i = 0;
    if (field[0] & 0x80) {
        if (field[0] & 0x40)
            return false;
        v = field[0] & 0x3f;
        for (i = 1; i < n; i++) {
            if (v >> 55)
                return false;
            v = v << 8 | field[i];
        }
    } else {
        while (i < n && field[i] == ' ')
            i++;
        for (; i < n && field[i] >= '0' && field[i] <= '7'; i++)
            v = v << 3 | (uint64_t)(field[i] - '0');
        for (; i < n; i++)
            if (field[i] != ' ' && field[i] != '\0')
                return false;
    }
    *out = (int64_t)v;
    return true;
}

/* Behind the last member lie a zero block and nothing but zeros. False: there is no next member. */
static bool check_end(struct walk *w)
{
    for (int64_t at = w->at; at < w->size; at += WINDOW) {
        const int64_t n = w->size - at < WINDOW ? w->size - at : WINDOW;
        const unsigned char *piece = bytes_at(w, at, n);
        for (int64_t i = 0; piece && i < n; i++)
            if (piece[i]) {
                w->at = at + i;
                return refuse_after(w, "data behind the end-of-archive mark (joined archives?)");
            }
        if (!piece)
            return false;
    }
    return false;
}

/* Names are opaque keys; they are never used as paths. */
static bool check_name(struct walk *w)
{
    const char *why = NULL;
    if (!*w->name)
        why = "its name is empty";
    else if (*w->name == '/')
        why = "its name is absolute";
    else if (strlen(w->name) > SHARD_NAME_MAX)
        why = "its name is longer than 255 bytes";
    for (const char *c = w->name; !why && *c; c++) {
        const bool start = c == w->name || c[-1] == '/';
        if (start && c[0] == '.' && c[1] == '.' && (c[2] == '/' || c[2] == '\0'))
            why = "its name holds '..'";
        else if (!isascii(*c) || (!isalnum((unsigned char)*c) && !strchr("._/-", *c)))
            why = "its name holds a character other than letters, digits and . _ / -";
    }
    return !why || refuse(w, "%s", why);
}

static bool refuse(struct walk *w, const char *fmt, ...)
{
    char text[512], name[512];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    errors_add(w->errors, EXIT_DATA, "%s: error: member '%s' at byte %" PRId64 ": %s", w->path,
               printable(name, sizeof name, w->name), w->at, text);
    return false;
}

/* Between members: names the last one. */
static bool refuse_after(struct walk *w, const char *text)
{
    char name[512];
    errors_add(w->errors, EXIT_DATA, "%s: error: byte %" PRId64 "%s%s%s: %s", w->path, w->at,
               w->name[0] ? ", after member '" : "", printable(name, sizeof name, w->name),
               w->name[0] ? "'" : "", text);
    return false;
}

static int64_t round_up(int64_t n)
{
    return (n + BLOCK - 1) / BLOCK * BLOCK;
}

/* n bytes of the file, inside it, followed by a NUL; NULL after a read error (collected). The next
 * call overwrites them. */
static const unsigned char *bytes_at(struct walk *w, int64_t at, int64_t n)
{
    ASSERT(at >= 0 && n >= 0 && n <= w->size - at);
    log_beat();
    if (n + 1 > w->capacity) {
        w->capacity = n + 1;
        w->bytes = xrealloc(w->bytes, (size_t)w->capacity, 1);
    }
    for (int64_t done = 0; done < n;) {
        const ssize_t got = pread(w->fd, w->bytes + done, (size_t)(n - done), (off_t)(at + done));
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0) {
            refuse_after(w, got < 0 ? strerror(errno) : "the file became shorter");
            return NULL;
        }
        done += got;
    }
    w->bytes[n] = '\0';
    return w->bytes;
}

static void add_member(struct walk *w, const char *name, int64_t offset, int64_t size)
{
    struct shard_set *set = w->set;
    while (name[0] == '.' && name[1] == '/')
        name += 2;
    const char *slash = strrchr(name, '/'), *base = slash ? slash + 1 : name,
               *dot = strchr(base, '.');
    bool reserved = false; /* a path component __name__ */
    for (const char *c = name; c;) {
        const char *next = strchr(c, '/');
        const size_t n = next ? (size_t)(next - c) : strlen(c);
        reserved =
            reserved || (n >= 4 && strncmp(c, "__", 2) == 0 && strncmp(c + n - 2, "__", 2) == 0);
        c = next ? next + 1 : NULL;
    }
    if (reserved || !dot || dot == base || dot[1] == '\0') {
        set->ignored++;
        return;
    }
    const size_t key = (size_t)(dot - name);
    struct shard_sample *s =
        set->n_samples > w->first_sample ? &set->sample[set->n_samples - 1] : NULL;
    if (!s || strlen(set->pool + s->key) != key || memcmp(set->pool + s->key, name, key) != 0) {
        if (set->n_samples == set->sample_capacity) {
            set->sample_capacity = set->sample_capacity ? 2 * set->sample_capacity : 1024;
            set->sample = xrealloc(set->sample, (size_t)set->sample_capacity, sizeof *set->sample);
        }
        ASSERT(set->sample);
        s = &set->sample[set->n_samples++];
        *s = (struct shard_sample){ .first_part = set->n_parts,
                                    .key = pool_add(set, name, key),
                                    .shard = (int32_t)w->shard };
    }
    if (s->n_parts == SHARD_PARTS_MAX) {
        s->broken = "it has more than 1024 parts";
        return;
    }
    for (int32_t i = 0; i < s->n_parts; i++)
        if (strcmp(set->pool + set->part[s->first_part + i].name, dot + 1) == 0)
            s->broken = "a part is there twice";
    if (set->n_parts == set->part_capacity) {
        set->part_capacity = set->part_capacity ? 2 * set->part_capacity : 4096;
        set->part = xrealloc(set->part, (size_t)set->part_capacity, sizeof *set->part);
    }
    set->part[set->n_parts++] =
        (struct shard_part){ offset, size, pool_add(set, dot + 1, strlen(dot + 1)) };
    s->n_parts++;
}

struct keyed {
    const char *key;
    struct shard_sample *sample;
};

static int compare_keyed(const void *a, const void *b)
{
    return strcmp(((const struct keyed *)a)->key, ((const struct keyed *)b)->key);
}

/* A key that comes back later in the shard: its picture and its text would make two wrong samples.
 */
static void mark_scattered(struct shard_set *set, int64_t first)
{
    const int64_t n = set->n_samples - first;
    if (n < 2)
        return;
    struct keyed *list = xmalloc((size_t)n, sizeof *list);
    for (int64_t i = 0; i < n; i++)
        list[i] = (struct keyed){ set->pool + set->sample[first + i].key, &set->sample[first + i] };
    qsort(list, (size_t)n, sizeof *list, compare_keyed);
    for (int64_t i = 1; i < n; i++)
        if (strcmp(list[i].key, list[i - 1].key) == 0)
            list[i].sample->broken = list[i - 1].sample->broken =
                "its members are not consecutive in the shard";
    free(list);
}

static size_t pool_add(struct shard_set *set, const char *text, size_t n)
{
    if (set->pool_used + n + 1 > set->pool_capacity) {
        set->pool_capacity = 2 * set->pool_capacity + n + 65536;
        set->pool = xrealloc(set->pool, set->pool_capacity, 1);
    }
    const size_t at = set->pool_used;
    memcpy(set->pool + at, text, n);
    set->pool[at + n] = '\0';
    set->pool_used += n + 1;
    return at;
}

/* A few shards stay open; a shuffled data set visits them in any order. */
static int open_shard(struct shard_set *set, int64_t shard)
{
    for (int i = 0; i < SHARD_FILES; i++)
        if (set->open[i].shard == shard)
            return set->open[i].fd;
    const int slot = set->next_open;
    set->next_open = (slot + 1) % SHARD_FILES;
    if (set->open[slot].shard >= 0)
        close(set->open[slot].fd);
    set->open[slot].shard = -1;
    const char *path = set->shard[shard].path;
    struct stat st;
    const int fd = open(path, OPEN_FLAGS);
    CHECK_SYS(fd >= 0 && fstat(fd, &st) == 0, EXIT_DATA, "%s: cannot be opened again", path);
    if (st.st_size != set->shard[shard].bytes)
        FATAL(EXIT_DATA, "%s: has %" PRId64 " bytes, it had %" PRId64 " when the run began", path,
              (int64_t)st.st_size, set->shard[shard].bytes);
    const struct timespec *was = &set->shard[shard].changed;
    if (st.st_mtim.tv_sec != was->tv_sec || st.st_mtim.tv_nsec != was->tv_nsec)
        FATAL(EXIT_DATA, "%s: was written to since the run began", path);
    set->open[slot].fd = fd;
    set->open[slot].shard = shard;
    return fd;
}
