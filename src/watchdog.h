/* watchdog.h - ends a job in which nobody gets on any more, and names the rank that holds it up
 * (robustness.md F26, F30).
 *
 * A rank that hangs (stopped, in an endless loop, on a dead disk or host) leaves the others in a
 * collective for ever. Each rank has a thread that counts the signs of progress of its main thread
 * (log_beat) and writes them, with where it is, now and then into its own 4 KiB of
 * <output_dir>/LIVE. The thread of a rank that has not moved for the time allowed reads all of them
 * twice: who did not write in between is dead or stopped; if none is, who is in no message is what
 * the others wait for. One error line, status 8.
 */
#ifndef MIMO_WATCHDOG_H
#define MIMO_WATCHDOG_H

#include "comm.h"

struct watchdog;

/* `seconds` without progress are too many. Collective over the world. */
struct watchdog *watchdog_start(const char *dir, struct comm *world, double seconds);
/* Ends the thread; rank 0 removes LIVE. NULL is allowed. Local. */
void watchdog_stop(struct watchdog *w);

/* What a rank last wrote of itself; tick 0: it has not written yet. "-" = none. */
struct watchdog_slot {
    /* ticks of its thread, those since its last progress; -1 = outside the loop */
    long long tick, quiet, iteration;
    char role[32], host[64], section[24], call[40], group[40];
};
/* One sentence on who holds up a job of `size` ranks that has not moved for `seconds`: before,
 * after [size] were read one after the other, long enough apart for everybody to have written in
 * between. Local. */
void watchdog_verdict(const struct watchdog_slot *before, const struct watchdog_slot *after,
                      int size, double seconds, char *text, size_t text_size);

#endif
