/* yield.c - give the core away while MPI waits.
 *
 * Builds of MPICH over UCX spin in their progress loop and never yield; with more ranks than cores
 * every blocking call then costs whole scheduler slices (10 to 100 times slower). Every progress
 * loop of theirs calls ucp_worker_progress, so this definition, linked into the program in front of
 * the library, is called instead: it makes the same call and yields when nothing moved. With an MPI
 * that does not use UCX nobody calls it. Linked as an object file of its own.
 */
#include <dlfcn.h>
#include <sched.h>
#include <string.h>

unsigned ucp_worker_progress(void *worker);

unsigned ucp_worker_progress(void *worker)
{
    /* Set once to a constant: looking it up at every call would cost as much as the call. */
    static unsigned (*next)(void *);
    if (!next) {
        void *symbol = dlsym(RTLD_NEXT, "ucp_worker_progress");
        if (!symbol)
            return 0;
        memcpy(&next, &symbol, sizeof next);
    }
    const unsigned n = next(worker);
    if (!n)
        sched_yield();
    return n;
}
