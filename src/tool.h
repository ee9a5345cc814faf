/* tool.h - what mimo does besides running: options that need one process and no MPI. */
#ifndef MIMO_TOOL_H
#define MIMO_TOOL_H

#include <stdbool.h>
#include "cli.h"

/* Whether tool_run does it. Local. */
bool tool_is_local(const struct cli *cli);
/* Do it and free cli; returns the exit status. Local. */
int tool_run(struct cli *cli);

#endif
