/* test_timer.c - timers that read a device's clock: what is booked, when, and that nothing waits
 * for it. The device is simulated: work takes time on it, the host is ahead by what it likes. What
 * needs no device is in test_base.c. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include "backend.h"
#include "check.h"
#include "timer.h"

/* Times on the device: when what was issued so far ends, and until when the host knows that. */
static struct {
    double issued, known;
    int waits, created, destroyed, asked_too_early;
} device;

static void create(struct event *e)
{
    e->native = xcalloc(1, sizeof(double));
    device.created++;
}

static void destroy(struct event *e)
{
    free(e->native);
    device.destroyed++;
}

static void record(struct event *e, struct stream *s)
{
    *(double *)e->native = device.issued;
}

static double seconds_between(const struct event *from, const struct event *to)
{
    const double *a = from->native, *b = to->native;
    device.asked_too_early += *b > device.known;
    return *b - *a;
}

static void wait_for_event(const struct event *e)
{
    device.waits++;
    device.known = fmax(device.known, *(const double *)e->native);
}

static void wait_for_stream(struct stream *s)
{
    device.waits++;
    device.known = device.issued;
}

static const struct backend_ops simulated = { .name = "simulated",
                                              .asynchronous = true,
                                              .event_create_timed = create,
                                              .event_destroy = destroy,
                                              .event_record = record,
                                              .event_seconds = seconds_between,
                                              .event_sync = wait_for_event,
                                              .stream_sync = wait_for_stream };

static struct stream stream;

static void begin(int64_t marks)
{
    memset(&device, 0, sizeof device);
    timer_reset();
    timer_use_device(&simulated, &stream, marks);
}

static void end(void)
{
    timer_leave_device();
    assert_int_equal(device.created, device.destroyed);
    assert_int_equal(device.asked_too_early, 0);
}

static bool near(double a, double b)
{
    return fabs(a - b) < 1e-9;
}

/* One iteration that takes ten times `unit` on the device, of which one in no section. */
static int64_t issue(double unit)
{
    timer_start(TIMER_FORWARD);
    timer_part(TIMER_MAMBA);
    device.issued += 3 * unit;
    timer_part(TIMER_ATTENTION);
    device.issued += unit;
    timer_start(TIMER_DATA_WAIT);
    device.issued += unit;
    timer_stop(TIMER_DATA_WAIT);
    timer_part(TIMER_NO_PART);
    timer_stop(TIMER_FORWARD);
    timer_start(TIMER_BRIDGE_WAIT);
    device.issued += 4 * unit;
    timer_stop(TIMER_BRIDGE_WAIT);
    device.issued += unit;
    return timer_mark();
}

static void test_a_section_lasts_as_long_as_its_work_on_the_device(void **state)
{
    double s[TIMER_ROWS];
    begin(64);
    timer_catch_up();
    timer_take_iteration(s);
    const int64_t mark = issue(1.0);
    device.known = device.issued;
    timer_collect(mark);
    assert_true(near(timer_take_iteration(s), 10) && near(s[TIMER_FORWARD], 4) &&
                near(s[TIMER_DATA_WAIT], 1) && near(s[TIMER_BRIDGE_WAIT], 4) &&
                near(s[TIMER_IDLE], 1) && near(s[TIMER_GRAD_SYNC], 0));
    struct timer_sample sample;
    timer_take_sample(&sample, 0);
    assert_true(near(sample.seconds[TIMER_MAMBA], 3) && near(sample.seconds[TIMER_ATTENTION], 1));
    assert_true(sample.calls[TIMER_MAMBA] == 1 && sample.calls[TIMER_FORWARD] == 1 &&
                sample.calls[TIMER_BRIDGE_WAIT] == 1);
    end();
}

/* The next iteration is issued before the numbers of the one before it are read. */
static void test_an_iteration_that_is_read_late_holds_its_own_time_and_nothing_waits(void **state)
{
    double s[TIMER_ROWS];
    struct timer_sample sample;
    begin(64);
    timer_catch_up();
    timer_take_iteration(s);
    const int waits = device.waits;
    int64_t before = issue(1.0);
    double done = device.issued;
    for (int i = 2; i < 40; i++) {
        const int64_t mark = issue((double)i);
        device.known = done;
        timer_collect(before);
        assert_true(near(timer_take_iteration(s), 10.0 * (i - 1)));
        assert_true(near(s[TIMER_FORWARD], 4.0 * (i - 1)) &&
                    near(s[TIMER_BRIDGE_WAIT], 4.0 * (i - 1)));
        timer_take_sample(&sample, 0);
        assert_true(near(sample.recent[TIMER_FORWARD], 4.0 * (i - 1)));
        assert_int_equal(sample.calls[TIMER_FORWARD], i - 1);
        before = mark;
        done = device.issued;
    }
    assert_int_equal(device.waits, waits);
    timer_catch_up();
    timer_take_sample(&sample, 0);
    assert_true(near(sample.seconds[TIMER_FORWARD], 4.0 * 39 * 40 / 2));
    assert_int_equal(sample.calls[TIMER_FORWARD], 39);
    end();
}

/* Of grad sync and optimizer, and of nothing else. */
static void test_agreement_is_a_part_of_what_comes_before_the_update(void **state)
{
    double s[TIMER_ROWS];
    begin(64);
    timer_start(TIMER_FORWARD);
    timer_part(TIMER_AGREEMENT);
    device.issued += 1;
    timer_stop(TIMER_FORWARD);
    timer_start(TIMER_GRAD_SYNC);
    device.issued += 2;
    timer_part(TIMER_AGREEMENT);
    device.issued += 4;
    timer_part(TIMER_NO_PART);
    timer_stop(TIMER_GRAD_SYNC);
    timer_start(TIMER_OPTIMIZER);
    timer_part(TIMER_AGREEMENT);
    device.issued += 8;
    timer_part(TIMER_MAMBA);
    device.issued += 16;
    timer_stop(TIMER_OPTIMIZER);
    timer_catch_up();
    timer_take_iteration(s);
    assert_true(near(s[TIMER_AGREEMENT], 12) && near(s[TIMER_GRAD_SYNC], 6) &&
                near(s[TIMER_OPTIMIZER], 24) && near(s[TIMER_FORWARD], 1) &&
                near(s[TIMER_MAMBA], 0));
    end();
}

static void test_a_full_ring_waits_and_loses_no_time(void **state)
{
    struct timer_sample sample;
    begin(5);
    for (int i = 0; i < 20; i++)
        issue(1.0);
    assert_true(device.waits > 0);
    timer_catch_up();
    timer_take_sample(&sample, 0);
    assert_true(near(sample.seconds[TIMER_FORWARD], 80) &&
                near(sample.seconds[TIMER_BRIDGE_WAIT], 80) &&
                near(sample.seconds[TIMER_DATA_WAIT], 20));
    assert_int_equal(sample.calls[TIMER_MAMBA], 20);
    end();
}

static void nap(double seconds)
{
    nanosleep(&(struct timespec){ .tv_nsec = (long)(1e9 * seconds) }, NULL);
}

/* What begins on the host and ends on the device is one call of one section. */
static void test_a_section_may_go_from_the_hosts_clock_to_the_devices_and_back(void **state)
{
    struct timer_sample sample;
    memset(&device, 0, sizeof device);
    timer_reset();
    timer_start(TIMER_START);
    nap(0.02);
    timer_use_device(&simulated, &stream, 64);
    device.issued += 100;
    timer_leave_device();
    nap(0.02);
    timer_stop(TIMER_START);
    timer_take_sample(&sample, 0);
    assert_true(sample.seconds[TIMER_START] >= 100.04 && sample.seconds[TIMER_START] < 110);
    assert_true(near(sample.wall, sample.seconds[TIMER_START] + sample.seconds[TIMER_IDLE]));
    assert_int_equal(sample.calls[TIMER_START], 1);
}

static void test_the_reference_backend_reads_the_hosts_clock(void **state)
{
    const struct backend_ops *be = &backend_ref_f32;
    struct timer_sample sample;
    struct stream s;
    be->stream_create(&s, "compute");
    timer_reset();
    timer_use_device(be, &s, 4);
    for (int i = 0; i < 3; i++) {
        timer_start(TIMER_FORWARD);
        timer_part(TIMER_DENSE);
        nap(0.01);
        timer_part(TIMER_NO_PART);
        timer_stop(TIMER_FORWARD);
        nap(0.005);
    }
    timer_catch_up();
    timer_take_sample(&sample, 0);
    assert_true(sample.seconds[TIMER_FORWARD] >= 0.03 && sample.seconds[TIMER_IDLE] >= 0.015);
    assert_true(sample.seconds[TIMER_DENSE] >= 0.03 &&
                sample.seconds[TIMER_DENSE] <= sample.seconds[TIMER_FORWARD]);
    timer_leave_device();
    be->stream_destroy(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_a_section_lasts_as_long_as_its_work_on_the_device),
        cmocka_unit_test(test_an_iteration_that_is_read_late_holds_its_own_time_and_nothing_waits),
        cmocka_unit_test(test_agreement_is_a_part_of_what_comes_before_the_update),
        cmocka_unit_test(test_a_full_ring_waits_and_loses_no_time),
        cmocka_unit_test(test_a_section_may_go_from_the_hosts_clock_to_the_devices_and_back),
        cmocka_unit_test(test_the_reference_backend_reads_the_hosts_clock),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
