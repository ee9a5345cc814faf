/* mpi_world.h - how every test under mpiexec starts. */
#ifndef MIMO_MPI_WORLD_H
#define MIMO_MPI_WORLD_H

#include <stdio.h>
#include "comm.h"

/* All ranks of the launch; NULL, said on stderr, without an MPI that works. comm_finish ends it. */
static inline struct comm *mpi_world(int *argc, char ***argv)
{
    struct comm *world;
    char why[512];
    if (!comm_start(argc, argv, &world, why, sizeof why)) {
        fprintf(stderr, "%s\n", why);
        return NULL;
    }
    check_on_abort(comm_abort);
    check_identify(world->rank, world->size, "test", NULL);
    return world;
}

#endif
