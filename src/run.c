/* run.c - see run.h.
 *
 * Lock: in output_dir and in checkpoint.save. flock on LOCK is exact on one host and vanishes with
 * the process; its content (host, pid, job) decides where flock cannot: a file that names another
 * host is stale only if it belongs to this very job (requeued). A lock taken over is said.
 *
 * Signals: the handler must not need a global. It only puts the default action back for both
 * signals, so that a second one ends the process at once, and "the default action is installed" is
 * what the loop reads as "a signal arrived".
 *
 * Starts: each has its line in progress.txt, with the code that the one before ended with; a batch
 * system that submits again what cannot go on is found there.
 */
#include "run.h"
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#include "check.h"
#include "log.h"
#include "timer.h"

enum { PATH_BYTES = 4096 + 64, STARTS_WITHOUT_PROGRESS = 3 };

static const char *const kept_files[] = { "trace.h5", "run.log", "progress.txt", "deck.nml",
                                          "batches.h5" };
enum { KEPT_FILES = sizeof kept_files / sizeof kept_files[0] };

/* One line in progress.txt: time, job, ranks, text. Rank 0 writes. */
static void progress(const struct run *r, const char *fmt, ...)
    __attribute__((format(printf, 2, 3)));

static const char *path_of(const char *dir, const char *name, char path[PATH_BYTES])
{
    snprintf(path, PATH_BYTES, "%s/%s", dir, name);
    return path;
}

static const char *job_id(void)
{
    const char *id = getenv("SLURM_JOB_ID");

    return id && *id ? id : "-";
}

/* ---- directory and lock ---------------------------------------------------------------------- */

bool run_make_directories(const char *dir)
{
    char path[PATH_BYTES];

    snprintf(path, sizeof path, "%s", dir);
    for (char *p = path + 1; *p; p++) {
        if (*p != '/')
            continue;
        *p = '\0';
        if (mkdir(path, 0777) != 0 && errno != EEXIST)
            return false;
        *p = '/';
    }
    struct stat st;
    if (mkdir(path, 0777) != 0 && errno != EEXIST)
        return false;
    if (stat(path, &st) != 0)
        return false;
    errno = ENOTDIR;
    return S_ISDIR(st.st_mode);
}

bool run_same_directory(const char *a, const char *b)
{
    struct stat sa, sb;

    return strcmp(a, b) == 0 || (stat(a, &sa) == 0 && stat(b, &sb) == 0 && sa.st_dev == sb.st_dev &&
                                 sa.st_ino == sb.st_ino);
}

/* Who the lock file names; false when it is empty or not ours to read. */
static bool read_owner(int fd, char host[256], long *pid, char job[128])
{
    char text[512];
    ssize_t n = pread(fd, text, sizeof text - 1, 0);

    if (n <= 0)
        return false;
    text[n] = '\0';
    return sscanf(text, "host: %255s pid: %ld job: %127s", host, pid, job) == 3;
}

/* Take <dir>/LOCK. Returns its descriptor, or -1 with one sentence in `why`. */
static int take_lock(const char *dir, bool *cannot_write, char *why, size_t size)
{
    char path[PATH_BYTES], own[256] = "", host[256] = "", job[128] = "", text[512];
    struct stat by_name, by_fd;
    long pid = 0;
    int fd;

    path_of(dir, "LOCK", path);
    if (gethostname(own, sizeof own - 1) != 0)
        snprintf(own, sizeof own, "unknown");
    for (;;) {
        fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0666);
        if (fd < 0) {
            *cannot_write = true;
            snprintf(why, size, "%s: %s; this must be a directory that can be written", path,
                     strerror(errno));
            return -1;
        }
        if (flock(fd, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK) {
            bool known = read_owner(fd, host, &pid, job);
            snprintf(why, size, "%s: the directory belongs to a live run (host %s, pid %ld)", path,
                     known ? host : "unknown", pid);
            close(fd);
            return -1;
        }
        /* A lock on a file that its owner has just removed is worth nothing. */
        if (fstat(fd, &by_fd) == 0 && stat(path, &by_name) == 0 && by_fd.st_ino == by_name.st_ino)
            break;
        close(fd);
    }
    if (read_owner(fd, host, &pid, job)) {
        if (strcmp(host, own) != 0 && (strcmp(job, "-") == 0 || strcmp(job, job_id()) != 0)) {
            snprintf(
                why, size,
                "%s: the directory may belong to a live run on host %s (pid %ld, job %s); remove LOCK if it is dead",
                path, host, pid, job);
            close(fd);
            return -1;
        }
        log_line("%s: left by a run that has ended (host %s, pid %ld); taken over", path, host,
                 pid);
    }
    int n =
        snprintf(text, sizeof text, "host: %s\npid: %ld\njob: %s\n", own, (long)getpid(), job_id());
    if (ftruncate(fd, 0) != 0 || TEMP_FAILURE_RETRY(pwrite(fd, text, (size_t)n, 0)) != n) {
        *cannot_write = true;
        snprintf(why, size, "%s: %s", path, strerror(errno));
        close(fd);
        return -1;
    }
    return fd;
}

static void drop_lock(const char *dir, int fd)
{
    char path[PATH_BYTES];

    unlink(path_of(dir, "LOCK", path));
    close(fd);
}

/* Make and lock the directory that a key of the deck names: its lock, or -1 with the mistake. */
static int own_directory(const struct deck *deck, const char *group, const char *key,
                         const char *dir, struct errors *errors)
{
    char why[PATH_BYTES + 256] = "";
    bool cannot_write = false;
    int fd = -1;

    if (!run_make_directories(dir))
        errors_add(errors, EXIT_WRITE, "%s: error: %s.%s = '%s': %s", deck_where(deck, group, key),
                   group, key, dir, strerror(errno));
    else if ((fd = take_lock(dir, &cannot_write, why, sizeof why)) < 0)
        errors_add(errors, cannot_write ? EXIT_WRITE : EXIT_ENVIRONMENT, "mimo: error: %s", why);
    return fd;
}

/* ---- signals --------------------------------------------------------------------------------- */

static void stop_requested(int number)
{
    signal(SIGTERM, SIG_DFL);
    signal(SIGUSR1, SIG_DFL);
}

static bool default_action(int number)
{
    struct sigaction now;

    return sigaction(number, NULL, &now) == 0 && now.sa_handler == SIG_DFL;
}

/* SIGUSR1 always; SIGTERM only if it is the deck's exit_signal, else it ends the process as
 * usual. */
static void catch_signals(bool term)
{
    struct sigaction a;

    memset(&a, 0, sizeof a);
    a.sa_handler = stop_requested;
    a.sa_flags = SA_RESTART;
    sigemptyset(&a.sa_mask);
    if (term)
        sigaction(SIGTERM, &a, NULL);
    sigaction(SIGUSR1, &a, NULL);
    /* A closed pipe on stdout is an error of a write, not the end of the process. */
    signal(SIGPIPE, SIG_IGN);
}

static bool exists(const char *dir, const char *name)
{
    char path[PATH_BYTES];

    return access(path_of(dir, name, path), F_OK) == 0;
}

/* A new file of that name, whatever lay or pointed there before. */
static FILE *create(const char *path)
{
    unlink(path);
    int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0666);
    FILE *f = fd >= 0 ? fdopen(fd, "w") : NULL;

    CHECK_SYS(f != NULL, EXIT_WRITE, "%s", path);
    return f;
}

/* The code of an EXIT file, -1 when there is none to read. */
static int read_code(const char *path)
{
    FILE *f = fopen(path, "re");
    int code = -1;

    if (f && fscanf(f, "%d", &code) != 1)
        code = -1;
    if (f)
        fclose(f);
    return code;
}

/* ---- life of a run --------------------------------------------------------------------------- */

void run_init(struct run *r, const struct deck *deck, struct comm *world, struct errors *errors)
{
    const char *save = deck->run.mode == DECK_MODE_TRAIN ? deck->checkpoint.save : "";
    char path[PATH_BYTES];
    int64_t ours = 1;

    *r = (struct run){ .deck = deck,
                       .world = world,
                       .dir = deck->run.output_dir,
                       .lock = -1,
                       .save_lock = -1,
                       .start = timer_now(),
                       .earlier_end = -1 };
    catch_signals(deck->run.exit_signal == DECK_EXIT_SIGNAL_TERM);
    if (world->rank == 0) {
        r->lock = own_directory(deck, "run", "output_dir", r->dir, errors);
        if (r->lock >= 0) {
            /* two runs that save into one directory would mix their checkpoints */
            if (*save && !run_same_directory(save, r->dir))
                r->save_lock = own_directory(deck, "checkpoint", "save", save, errors);
            r->earlier_end = read_code(path_of(r->dir, "EXIT", path));
            unlink(path);
            if (exists(r->dir, "STOP"))
                errors_add(
                    errors, EXIT_DECK,
                    "mimo: error: %s lies there and would end the run at once; remove it first",
                    path_of(r->dir, "STOP", path));
        }
        ours = r->lock >= 0;
    }
    comm_host_reduce_i64(world, &ours, 1, COMM_MIN);
    r->ours = ours == 1;
}

/* The next number that no earlier file carries. */
static int next_number(const char *dir)
{
    char path[PATH_BYTES + 16], name[64];

    for (int n = 1;; n++) {
        bool used = false;
        for (int i = 0; i < KEPT_FILES; i++) {
            snprintf(name, sizeof name, "%s.%d", kept_files[i], n);
            used |= access(path_of(dir, name, path), F_OK) == 0;
        }
        if (!used)
            return n;
    }
}

static void keep_file(const char *dir, const char *name, int number)
{
    char from[PATH_BYTES], to[PATH_BYTES + 16];

    path_of(dir, name, from);
    snprintf(to, sizeof to, "%s.%d", from, number);
    CHECK_SYS(rename(from, to) == 0, EXIT_WRITE, "%s: cannot keep it as %s", from, to);
}

/* What the lines of progress.txt tell of the starts before this one. */
struct history {
    int64_t starts, first; /* how many, and the iteration of the first, where the trace begins */
    /* iteration of the last, and how many at the end began there with the one before ended by
     * itself */
    int64_t last, streak;
};

static struct history read_progress(const char *dir)
{
    static const char start[] = "Starting job\tIteration: ", gave_up[] = "Gave up\t";
    char path[PATH_BYTES], line[512];
    struct history h = { .last = -1 };
    FILE *f = fopen(path_of(dir, "progress.txt", path), "re");

    while (f && fgets(line, sizeof line, f)) {
        const char *at = strstr(line, start);
        long long here;
        int end = -1;
        if (strstr(line, gave_up))
            h.last = -1;
        if (!at || sscanf(at + sizeof start - 1, "%lld\tEarlier end: %d", &here, &end) < 1)
            continue;
        if (h.starts++ == 0)
            h.first = here;
        h.streak = here == h.last && end >= 0 ? h.streak + 1 : 1;
        h.last = here;
    }
    if (f)
        fclose(f);
    return h;
}

static char *echo_text(const struct deck *deck, size_t *bytes)
{
    char *text = NULL;
    FILE *f = open_memstream(&text, bytes);

    CHECK_SYS(f != NULL, EXIT_ENVIRONMENT, "deck echo");
    deck_echo(deck, f);
    CHECK_SYS(fclose(f) == 0, EXIT_ENVIRONMENT, "deck echo");
    return text;
}

bool run_same_deck(const struct run *r)
{
    char path[PATH_BYTES];
    size_t bytes;
    char *text = echo_text(r->deck, &bytes), *before = xcalloc(bytes + 1, 1);
    FILE *f = fopen(path_of(r->dir, "deck.nml", path), "re");
    bool same = f && fread(before, 1, bytes + 1, f) == bytes && memcmp(before, text, bytes) == 0;

    if (f)
        fclose(f);
    free(before);
    free(text);
    return same;
}

void run_check_progress(const struct run *r, int64_t iteration, bool resumed, struct errors *errors)
{
    struct history h;

    if (r->lock < 0 || !resumed || iteration >= r->deck->derived.train_iterations ||
        r->earlier_end < 0 || !run_same_deck(r))
        return;
    h = read_progress(r->dir);
    if (h.last != iteration || h.streak < STARTS_WITHOUT_PROGRESS)
        return;
    errors_add(
        errors, EXIT_CHECKPOINT,
        "mimo: error: no progress in %lld starts: each of this deck began at iteration %lld and ended (the last with %d) before anything "
        "newer was saved; %s/run.log says how; submit once more to try again",
        (long long)h.streak, (long long)iteration, r->earlier_end, r->dir);
    progress(r, "Gave up\tIteration: %lld", (long long)iteration);
}

/* deck.nml of this start; on a resumed run an earlier one with other content is kept. */
static void write_echo(const struct run *r, int number)
{
    char path[PATH_BYTES], temporary[PATH_BYTES], *text;
    size_t bytes;
    FILE *f;

    if (run_same_deck(r))
        return;
    if (exists(r->dir, "deck.nml")) {
        keep_file(r->dir, "deck.nml", number);
        log_line("the deck differs from the earlier start's, which is kept as deck.nml.%d", number);
    }
    text = echo_text(r->deck, &bytes);
    path_of(r->dir, "deck.nml", path);
    path_of(r->dir, "deck.nml.tmp", temporary);
    f = create(temporary);
    CHECK_SYS(fwrite(text, 1, bytes, f) == bytes && fclose(f) == 0, EXIT_WRITE, "%s", temporary);
    CHECK_SYS(rename(temporary, path) == 0, EXIT_WRITE, "%s", path);
    free(text);
}

/* training.md 3.9: what the lines of progress.txt tell of the starts before, and of this one. */
static void read_flops(struct run *r, int64_t iteration)
{
    static const char saved[] = "Saved checkpoint\tIteration: ",
                      operations[] = "Floating-point operations: ";
    char path[PATH_BYTES], line[512];
    double last = 0.0;
    FILE *f = fopen(path_of(r->dir, "progress.txt", path), "re");

    while (f && fgets(line, sizeof line, f)) {
        const char *save = strstr(line, saved), *flops = strstr(line, operations),
                   *ranks = strstr(line, "# ranks: ");
        struct tm tm = { .tm_isdst = -1 };
        if (save && flops) {
            last = strtod(flops + sizeof operations - 1, NULL);
            if (strtoll(save + sizeof saved - 1, NULL, 10) == iteration)
                r->flops_before = last;
        }
        if (r->first_start || !strstr(line, "\tStarting job\t") || !ranks ||
            strtol(ranks + strlen("# ranks: "), NULL, 10) != r->world->size ||
            !strptime(line, "%Y-%m-%d %H:%M:%S", &tm))
            continue;
        r->first_start = mktime(&tm);
        r->flops_first = last;
    }
    if (f)
        fclose(f);
}

void run_begin(struct run *r, int64_t iteration, bool resumed)
{
    char path[PATH_BYTES], kept[256] = "";
    int64_t agreed[3] = { 0, 0, 0 };

    if (r->world->rank == 0) {
        int number = next_number(r->dir);
        r->continues = resumed && exists(r->dir, "trace.h5");
        struct history h = read_progress(r->dir);
        r->first_iteration = r->continues ? h.first : iteration;
        r->starts = h.starts;
        if (r->first_iteration > iteration || r->starts == 0) {
            r->continues = false;
            r->first_iteration = iteration;
        }
        r->starts = r->continues ? r->starts + 1 : 1;
        for (int i = 0; i < KEPT_FILES && !r->continues; i++) {
            if (!exists(r->dir, kept_files[i]))
                continue;
            keep_file(r->dir, kept_files[i], number);
            snprintf(kept + strlen(kept), sizeof kept - strlen(kept), " %s.%d", kept_files[i],
                     number);
        }
        path_of(r->dir, "run.log", path);
        CHECK_SYS(log_open(path, true), EXIT_WRITE, "%s", path);
        if (*kept)
            log_line("files of an earlier run in %s are kept as%s", r->dir, kept);
        write_echo(r, number);
        agreed[0] = r->continues;
        agreed[1] = r->first_iteration;
        agreed[2] = r->starts;
    } else {
        log_open(NULL, false);
    }
    comm_host_broadcast(r->world, agreed, sizeof agreed, 0);
    r->continues = agreed[0] != 0;
    r->first_iteration = agreed[1];
    r->starts = agreed[2];
    progress(r, "Starting job\tIteration: %lld\tEarlier end: %d", (long long)iteration,
             r->earlier_end);
    if (r->world->rank == 0)
        read_flops(r, iteration);
    r->watchdog = watchdog_start(r->dir, r->world, 60.0 * r->deck->run.distributed_timeout_minutes);
}

void run_poll(void *run, bool *request)
{
    struct run *r = run;
    double limit = 60.0 * r->deck->run.exit_duration_in_mins;

    for (int i = 0; i < STEP_REQUESTS; i++)
        request[i] = false;
    /* Whichever was caught put back both. */
    request[STEP_STOP_SIGNAL] = default_action(SIGUSR1);
    if (r->world->rank != 0)
        return;
    request[STEP_STOP_FILE] = exists(r->dir, "STOP");
    request[STEP_SAVE_FILE] = exists(r->dir, "SAVE");
    request[STEP_STOP_TIME] = limit > 0.0 && timer_now() - r->start > limit;
}

void run_save_served(struct run *r)
{
    char path[PATH_BYTES];

    if (r->world->rank == 0)
        unlink(path_of(r->dir, "SAVE", path));
}

/* On rank 0: a run whose directory has been taken away ends instead of writing to nowhere. */
static void check_directory(const struct run *r)
{
    char path[PATH_BYTES];
    struct stat by_name, by_fd;

    if (fstat(r->lock, &by_fd) == 0 && stat(path_of(r->dir, "LOCK", path), &by_name) == 0 &&
        by_fd.st_ino == by_name.st_ino)
        return;
    FATAL(EXIT_WRITE, "%s: the run directory or its lock was removed while the run was live", path);
}

static void progress(const struct run *r, const char *fmt, ...)
{
    char path[PATH_BYTES], stamp[32];
    time_t t = time(NULL);
    struct tm tm;
    va_list ap;
    FILE *f;

    if (r->world->rank != 0)
        return;
    check_directory(r);
    f = fopen(path_of(r->dir, "progress.txt", path), "ae");
    CHECK_SYS(f != NULL, EXIT_WRITE, "%s", path);
    strftime(stamp, sizeof stamp, "%Y-%m-%d %H:%M:%S", localtime_r(&t, &tm));
    fprintf(f, "%s\tJob ID: %s\t# ranks: %d\t", stamp, job_id(), r->world->size);
    va_start(ap, fmt);
    vfprintf(f, fmt, ap);
    va_end(ap);
    fputc('\n', f);
    CHECK_SYS(fclose(f) == 0, EXIT_WRITE, "%s", path);
}

void run_progress_saved(const struct run *r, int64_t iteration, double flops, int devices,
                        double tokens)
{
    const double seconds = timer_now() - r->start, since = difftime(time(NULL), r->first_start),
                 all = r->flops_before + flops;

    progress(r,
             "Saved checkpoint\tIteration: %lld\tJob throughput: %.1f TFLOP/s/GPU\t"
             "Cumulative throughput: %.1f TFLOP/s/GPU\tFloating-point operations: %.2e\t"
             "Tokens (in billions): %.2f",
             (long long)iteration, 1e-12 * flops / (seconds * devices),
             1e-12 * (all - r->flops_first) / ((since > seconds ? since : seconds) * devices), all,
             1e-9 * tokens);
}

void run_note_data(const struct run *r, const char *fingerprint)
{
    static const char mark[] = "Training data\t";
    char path[PATH_BYTES], line[512], before[256] = "";
    FILE *f;

    if (r->world->rank != 0 || !*fingerprint)
        return;
    f = fopen(path_of(r->dir, "progress.txt", path), "re");
    while (f && fgets(line, sizeof line, f)) {
        const char *at = strstr(line, mark);
        if (at)
            snprintf(before, sizeof before, "%.*s", (int)strcspn(at + sizeof mark - 1, "\n"),
                     at + sizeof mark - 1);
    }
    if (f)
        fclose(f);
    if (strcmp(before, fingerprint) == 0)
        return;
    if (*before)
        log_warn(
            "the training data are not those of the start before: there were %s, there are %s; from here on the samples are others",
            before, fingerprint);
    progress(r, "%s%s", mark, fingerprint);
}

static void write_exit(const char *dir, int code, int64_t iteration, const char *text)
{
    char path[PATH_BYTES], temporary[PATH_BYTES];
    FILE *f = create(path_of(dir, "EXIT.tmp", temporary));

    fprintf(f, "%d 0 - %lld %s\n", code, (long long)iteration, text);
    CHECK_SYS(fclose(f) == 0, EXIT_WRITE, "%s", temporary);
    CHECK_SYS(rename(temporary, path_of(dir, "EXIT", path)) == 0, EXIT_WRITE, "%s", path);
}

int run_finish(struct run *r, int code, int64_t iteration, const char *text)
{
    char path[PATH_BYTES];

    watchdog_stop(r->watchdog);
    r->watchdog = NULL;
    /* Nobody may still be writing when the directory is declared finished. */
    comm_host_barrier(r->world);
    if (r->lock >= 0) {
        check_directory(r);
        unlink(path_of(r->dir, "STOP", path));
        write_exit(r->dir, code, iteration, text);
        drop_lock(r->dir, r->lock);
        r->lock = -1;
    }
    if (r->save_lock >= 0) {
        drop_lock(r->deck->checkpoint.save, r->save_lock);
        r->save_lock = -1;
    }
    return code;
}

void run_refuse(const char *dir, int code, const char *text)
{
    char why[PATH_BYTES + 256];
    struct stat st;
    int fd;
    bool cannot_write;

    if (stat(dir, &st) != 0 || !S_ISDIR(st.st_mode))
        return;
    fd = take_lock(dir, &cannot_write, why, sizeof why);
    if (fd < 0)
        return;
    write_exit(dir, code, -1, text);
    drop_lock(dir, fd);
}

int run_status(const char *dir, FILE *out)
{
    char path[PATH_BYTES], line[4096];
    int code = EXIT_RANK_DIED;
    FILE *f = fopen(path_of(dir, "EXIT", path), "re");

    if (!f) {
        fprintf(out, "%d - - - no EXIT file in %s: %s\n", code, dir,
                exists(dir, "LOCK") ? "the run is live or was killed from outside"
                                    : "no run has ended there");
        return code;
    }
    if (!fgets(line, sizeof line, f) || sscanf(line, "%d", &code) != 1) {
        fprintf(out, "%d - - - %s is empty or not readable\n", code, path);
    } else {
        fputs(line, out);
    }
    fclose(f);
    return code;
}
