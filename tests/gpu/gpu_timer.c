/* gpu_timer.c - timers on a GPU: a section holds what the device did and waited for in it, not what
 * the host did; and what a mark costs.
 *
 * What is expected is measured beside it with events of its own.
 */
#include <math.h>
#include <stdio.h>
#include <string.h>
#include "backend.h"
#include "check.h"
#include "timer.h"

enum { MARKS = 4096, ROUNDS = 2000, COPIES = 8 };

static const int64_t large = (int64_t)256 << 20;

struct bench {
    const struct backend_ops *be;
    struct stream compute, other;
    struct tensor from, to;
    struct event begin, end, done;
    double copy; /* seconds of one large copy */
    int failed;
};

static void copies(struct bench *b, struct stream *s, int n)
{
    for (int i = 0; i < n; i++)
        b->be->copy(s, &b->from, &b->to);
}

static double device_seconds(struct bench *b, int n)
{
    b->be->event_record(&b->begin, &b->compute);
    copies(b, &b->compute, n);
    b->be->event_record(&b->end, &b->compute);
    b->be->event_sync(&b->end);
    return b->be->event_seconds(&b->begin, &b->end);
}

static void expect(struct bench *b, const char *what, double got, double wanted, double share)
{
    const bool ok = fabs(got - wanted) <= share * wanted;
    printf("%s - %s: %.3f ms, wanted %.3f within %.0f %%\n", ok ? "ok" : "not ok", what, 1e3 * got,
           1e3 * wanted, 100 * share);
    b->failed += !ok;
}

static void below(struct bench *b, const char *what, double got, double bound)
{
    const bool ok = got <= bound;
    printf("%s - %s: %.2f us, at most %.0f\n", ok ? "ok" : "not ok", what, 1e6 * got, 1e6 * bound);
    b->failed += !ok;
}

/* Twice as many copies backward as forward; then a wait for what the other stream does. */
static int64_t issue(struct bench *b)
{
    timer_start(TIMER_FORWARD);
    timer_part(TIMER_MAMBA);
    copies(b, &b->compute, COPIES);
    timer_part(TIMER_NO_PART);
    timer_stop(TIMER_FORWARD);
    timer_start(TIMER_BACKWARD);
    copies(b, &b->compute, 2 * COPIES);
    timer_stop(TIMER_BACKWARD);
    timer_start(TIMER_BRIDGE_WAIT);
    b->be->event_record(&b->done, &b->compute);
    b->be->stream_wait(&b->other, &b->done);
    copies(b, &b->other, 3 * COPIES);
    b->be->event_record(&b->done, &b->other);
    b->be->stream_wait(&b->compute, &b->done);
    timer_stop(TIMER_BRIDGE_WAIT);
    const int64_t mark = timer_mark();
    b->be->event_record(&b->end, &b->compute);
    return mark;
}

static void sections(struct bench *b)
{
    double s[TIMER_ROWS];
    struct timer_sample sample;
    timer_catch_up();
    timer_take_iteration(s);
    timer_take_sample(&sample, 0);
    const double before = sample.seconds[TIMER_MAMBA], host = timer_now();
    const int64_t first = issue(b);
    const double issued = timer_now() - host;
    b->be->event_sync(&b->end);
    const int64_t second = issue(b); /* under way while the first is read */
    timer_collect(first);
    const double wall = timer_take_iteration(s);
    timer_take_sample(&sample, 0);
    expect(b, "forward", s[TIMER_FORWARD], COPIES * b->copy, 0.1);
    expect(b, "backward", s[TIMER_BACKWARD], 2 * COPIES * b->copy, 0.1);
    expect(b, "a wait for another stream", s[TIMER_BRIDGE_WAIT], 3 * COPIES * b->copy, 0.1);
    expect(b, "a part", sample.seconds[TIMER_MAMBA] - before, COPIES * b->copy, 0.1);
    expect(b, "the sum of the sections",
           s[TIMER_FORWARD] + s[TIMER_BACKWARD] + s[TIMER_BRIDGE_WAIT], wall, 0.02);
    below(b, "the host while it issued them, against the device's time", issued, wall / 2);
    b->be->event_sync(&b->end);
    timer_collect(second);
    expect(b, "the next iteration", timer_take_iteration(s), wall, 0.1);
}

/* The device's and the host's time of small operations, one mark behind each or none. */
static void small(struct bench *b, bool marks, double *device, double *host)
{
    const struct tensor t = tensor_1d(b->to.data, DTYPE_F32, PLACE_DEVICE, 1024);
    timer_catch_up();
    const double start = timer_now();
    b->be->event_record(&b->begin, &b->compute);
    for (int i = 0; i < ROUNDS; i++) {
        b->be->fill(&b->compute, &t, 0.0);
        if (marks)
            timer_mark();
    }
    b->be->event_record(&b->end, &b->compute);
    *host = (timer_now() - start) / ROUNDS;
    b->be->event_sync(&b->end);
    *device = b->be->event_seconds(&b->begin, &b->end) / ROUNDS;
}

static void costs(struct bench *b)
{
    double device[2], host[2], busy[2], collect, ask;
    size_t available, total;
    for (int turn = 0; turn < 3; turn++)
        for (int marks = 0; marks < 2; marks++)
            small(b, marks, &device[marks], &host[marks]);
    below(b, "a mark between small operations, on the device", device[1] - device[0], 4e-6);
    below(b, "a mark, on the host", host[1] - host[0], 4e-6);
    /* Behind work that keeps the device busy, where only the mark itself counts. */
    for (int marks = 0; marks < 2; marks++) {
        b->be->event_record(&b->begin, &b->compute);
        for (int i = 0; i < 64; i++) {
            copies(b, &b->compute, 1);
            if (marks)
                timer_mark();
        }
        b->be->event_record(&b->end, &b->compute);
        b->be->event_sync(&b->end);
        busy[marks] = b->be->event_seconds(&b->begin, &b->end) / 64;
    }
    below(b, "a mark between large operations, on the device", busy[1] - busy[0], 4e-6);
    small(b, true, &device[1], &host[1]);
    const int64_t mark = timer_mark();
    b->be->stream_sync(&b->compute);
    double start = timer_now();
    timer_collect(mark);
    collect = (timer_now() - start) / ROUNDS;
    below(b, "reading a mark", collect, 4e-6);
    start = timer_now();
    for (int i = 0; i < 20; i++)
        b->be->memory(&available, &total);
    ask = (timer_now() - start) / 20;
    below(b, "asking for the memory in use", ask, 1e-3);
    copies(b, &b->compute, 64);
    start = timer_now();
    b->be->memory(&available, &total);
    below(b, "the same while the device works", timer_now() - start, 1e-3);
    b->be->stream_sync(&b->compute);
}

int main(void)
{
    struct bench b = { .be = &backend_cuda_bf16 };
    char why[256];
    if (!backend_cuda_start(0, false, why, sizeof why))
        FATAL(EXIT_ENVIRONMENT, "%s", why);
    b.be->stream_create(&b.compute, "compute");
    b.be->stream_create(&b.other, "bridge");
    b.from = tensor_1d(b.be->alloc((size_t)large), DTYPE_U8, PLACE_DEVICE, large);
    b.to = tensor_1d(b.be->alloc((size_t)large), DTYPE_U8, PLACE_DEVICE, large);
    b.be->event_create_timed(&b.begin);
    b.be->event_create_timed(&b.end);
    b.be->event_create(&b.done);
    timer_reset();
    timer_use_device(b.be, &b.compute, MARKS);
    device_seconds(&b, 64);
    b.copy = device_seconds(&b, 64) / 64;
    printf("# a copy of %lld MiB takes %.3f ms\n", (long long)(large >> 20), 1e3 * b.copy);
    sections(&b);
    costs(&b);
    timer_leave_device();
    b.be->event_destroy(&b.begin);
    b.be->event_destroy(&b.end);
    b.be->event_destroy(&b.done);
    b.be->release(b.from.data);
    b.be->release(b.to.data);
    b.be->stream_destroy(&b.other);
    b.be->stream_destroy(&b.compute);
    printf("# gpu_timer: %d failed\n", b.failed);
    return b.failed ? 1 : 0;
}
