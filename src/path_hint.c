/* path_hint.c - see path_hint.h. */
#include "path_hint.h"
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include "deck_table.h"

enum { NAMES_MAX = 10000 }; /* of a directory looked at */

/* The name in `directory` nearest to `name`, owned by the caller; NULL = none is near. */
static char *nearest(const char *directory, const char *name)
{
    int best = 1 + ((int)strlen(name) + 1) / 3;
    char *found = NULL;
    DIR *d = opendir(directory);
    struct dirent *e;
    for (int n = 0; d && n < NAMES_MAX && (e = readdir(d)) != NULL; n++) {
        if (e->d_name[0] == '.')
            continue;
        const int distance = deck_table_distance(name, e->d_name, best);
        if (distance >= best)
            continue;
        best = distance;
        free(found);
        found = xstrdup(e->d_name);
    }
    if (d)
        closedir(d);
    return found;
}

const char *path_hint(const char *path, char *out, size_t size)
{
    char *meant = xstrdup(""), *text = NULL; /* the path so far, each part of it exists */
    bool changed = false;
    struct stat st;
    for (const char *part = path; !text && *part;) {
        const size_t slashes = strspn(part, "/"), n = strcspn(part + slashes, "/");
        char *name = xasprintf("%.*s", (int)n, part + slashes);
        char *next = xasprintf("%s%.*s%s", meant, (int)slashes, part, name);
        part += slashes + n;
        if (n > 0 && stat(next, &st) != 0) {
            char *directory = xasprintf("%s%s", meant, slashes ? "/" : *meant ? "" : ".");
            char *near = nearest(directory, name);
            char *better = near ? xasprintf("%.*s%s", (int)(strlen(next) - n), next, near) : NULL;
            changed = true;
            if (!near && strncmp(path, "data/", 5) == 0)
                text = xstrdup(" (run `make data`)");
            else if (!near)
                text = *part ? xasprintf("; there is no directory %s", next) : xstrdup("");
            else {
                free(next);
                next = xstrdup(better);
            }
            free(directory);
            free(near);
            free(better);
        }
        free(name);
        free(meant);
        meant = next;
    }
    if (!text && changed)
        text = xasprintf("; did you mean %s?", meant);
    else if (!text)
        text = xstrdup(strncmp(path, "data/", 5) == 0 ? " (run `make data`)" : "");
    printable(out, size, text);
    free(meant);
    free(text);
    return out;
}
