/* manual.h - mimo --man: the manual page, made from the tables of options and keys. */
#ifndef MIMO_MANUAL_H
#define MIMO_MANUAL_H

#include <stdio.h>

/* The page in the man macros of roff. Local. */
void manual_print(FILE *out);

#endif
