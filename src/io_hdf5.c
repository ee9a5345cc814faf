/* io_hdf5.c - HDF5 calls that write or end the job, and calls that read or say no; see
 * io_internal.h.
 *
 * A write that fails is one line with HDF5's innermost reason and EXIT_WRITE, on the rank that saw
 * it. A read returns false and the caller collects a sentence. Files to be read are not trusted: no
 * plugins, no filters, no links out of the file, sizes checked.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <mpi.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include "code.h"
#include "io_internal.h"
#include "log.h"

enum { INTERRUPTED_MAX = 100 };

void io_start(void)
{
    /* What a failed run has left open must stay alone: closing it at exit would fail again, or
     * crash. */
    H5dont_atexit();
    H5Eset_auto2(H5E_DEFAULT, NULL, NULL);
    H5PLset_loading_state(0);
}

/* The innermost entry of HDF5's stack holds what the system said. */
static herr_t first_reason(unsigned n, const H5E_error2_t *e, void *ctx)
{
    char *out = ctx;
    if (out[0] == 0 && e->desc && e->desc[0])
        snprintf(out, 1024, "%s", e->desc);
    return 0;
}

const char *io_reason(char *out, size_t size)
{
    char raw[1024] = "";
    H5Ewalk2(H5E_DEFAULT, H5E_WALK_UPWARD, first_reason, raw);
    if (raw[0] == 0)
        snprintf(raw, sizeof raw, "%s", errno ? strerror(errno) : "no reason given");
    char *quote = strstr(raw, "error message = '"), *text = raw;
    if (quote) {
        text = quote + strlen("error message = '");
        char *end = strchr(text, '\'');
        if (end)
            *end = 0;
    }
    for (char *c = text; *c; c++)
        if (*c == '\n')
            *c = ' ';
    return printable(out, size, text);
}

int64_t io_written(int64_t status, const char *file, int line, const char *path, const char *what)
{
    if (status >= 0)
        return status;
    char why[1200];
    fatal(EXIT_WRITE, file, line,
          "look at free space, quota and permissions there; complete checkpoints and valid trace "
          "rows are intact",
          "%s: cannot write %s: %s", path, what, io_reason(why, sizeof why));
}

/* ---- files --------------------------------------------------------------------------------- */

static hid_t access_list(bool checksummed)
{
    hid_t fapl = H5Pcreate(H5P_FILE_ACCESS);
    H5Pset_file_locking(fapl, 0, 1);
    H5Pset_fclose_degree(fapl, H5F_CLOSE_SEMI);
    if (checksummed)
        H5Pset_libver_bounds(fapl, H5F_LIBVER_V110, H5F_LIBVER_V110);
    return fapl;
}

hid_t io_create(const char *path, bool checksummed)
{
    hid_t fapl = access_list(checksummed);
    hid_t file = IO_WRITE(path, "a new file", H5Fcreate(path, H5F_ACC_TRUNC, H5P_DEFAULT, fapl));
    H5Pclose(fapl);
    return file;
}

hid_t io_open(const char *path, bool write)
{
    hid_t fapl = access_list(false);
    if (!write)
        H5Pset_fclose_degree(fapl, H5F_CLOSE_STRONG);
    hid_t file = H5Fopen(path, write ? H5F_ACC_RDWR : H5F_ACC_RDONLY, fapl);
    hid_t reason = H5Eget_current_stack(); /* every further call would forget why */
    H5Pclose(fapl);
    H5Eset_current_stack(reason);
    return file;
}

hid_t io_open_parallel(const char *path, struct comm *world)
{
    hid_t fapl = access_list(false);
    MPI_Comm comm = *(MPI_Comm *)comm_mpi_handle(world);
    IO_WRITE(path, "through MPI-IO", H5Pset_fapl_mpio(fapl, comm, MPI_INFO_NULL));
    hid_t file = IO_WRITE(path, "an existing file", H5Fopen(path, H5F_ACC_RDWR, fapl));
    H5Pclose(fapl);
    return file;
}

static void end_of_file_failed(MPI_File *file, int *code, ...)
{
    char why[MPI_MAX_ERROR_STRING] = "";
    int length;
    MPI_Error_string(*code, why, &length);
    const char *last = strrchr(why, '\n'); /* the system's reason, below MPI's own words */
    fatal(EXIT_WRITE, __FILE__, __LINE__, NULL,
          "cannot write the end of an HDF5 file that is being closed: %s", last ? last + 1 : why);
}

void io_close_parallel(const char *path, hid_t file)
{
    void *handle = NULL;
    MPI_Errhandler handler;
    IO_WRITE(path, "through MPI-IO", H5Fget_vfd_handle(file, H5P_DEFAULT, &handle));
    MPI_File_create_errhandler(end_of_file_failed, &handler);
    MPI_File_set_errhandler(*(MPI_File *)handle, handler);
    MPI_Errhandler_free(&handler);
    IO_WRITE(path, "metadata", H5Fclose(file));
}

void io_sync(const char *path)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    CHECK_SYS(fd >= 0, EXIT_WRITE, "%s: cannot open to sync", path);
    CHECK_SYS(fsync(fd) == 0, EXIT_WRITE, "%s: cannot sync to disk", path);
    CHECK_SYS(close(fd) == 0, EXIT_WRITE, "%s: cannot close", path);
}

void io_make_directories(const char *path)
{
    char part[IO_PATH];
    int n = snprintf(part, sizeof part, "%s", path);
    if (n < 0 || n >= (int)sizeof part)
        FATAL(EXIT_WRITE, "directory name of %d bytes is too long", n);
    for (char *c = part + 1;; c++) {
        if (*c && *c != '/')
            continue;
        char keep = *c;
        *c = 0;
        CHECK_SYS(mkdir(part, 0777) == 0 || errno == EEXIST, EXIT_WRITE,
                  "%s: cannot make the directory", part);
        if (!keep)
            break;
        *c = keep;
    }
    struct stat st;
    CHECK_SYS(stat(path, &st) == 0, EXIT_WRITE, "%s: cannot look at the directory", path);
    if (!S_ISDIR(st.st_mode))
        FATAL(EXIT_WRITE, "%s: is there but is no directory", path);
}

const char *io_why_not_regular(const char *path)
{
    struct stat st;
    if (lstat(path, &st) != 0)
        return strerror(errno);
    if (S_ISLNK(st.st_mode))
        return "is a symbolic link, which is not followed";
    if (!S_ISREG(st.st_mode))
        return "is no regular file";
    if (access(path, R_OK) != 0)
        return strerror(errno);
    return "";
}

const char *io_nonce(char *out, size_t size)
{
    char host[HOST_NAME_MAX + 1] = "host";
    gethostname(host, sizeof host - 1);
    host[sizeof host - 1] = 0;
    snprintf(out, size, "%s-%ld", host, (long)getpid());
    return out;
}

/* ---- types --------------------------------------------------------------------------------- */

hid_t io_type(enum dtype dtype)
{
    switch (dtype) {
    case DTYPE_F32: return H5Tcopy(H5T_IEEE_F32LE);
    case DTYPE_F64: return H5Tcopy(H5T_IEEE_F64LE);
    case DTYPE_I32: return H5Tcopy(H5T_STD_I32LE);
    case DTYPE_I64: return H5Tcopy(H5T_STD_I64LE);
    case DTYPE_U8: return H5Tcopy(H5T_STD_U8LE);
    case DTYPE_BF16: {
        /* sign at 15, exponent of 8 bits from 7, mantissa of 7 bits from 0, bias 127; fields first,
         * they need the room of 32 bits */
        hid_t t = H5Tcopy(H5T_IEEE_F32LE);
        H5Tset_fields(t, 15, 7, 8, 0, 7);
        H5Tset_size(t, 2);
        H5Tset_ebias(t, 127);
        return t;
    }
    }
    FATAL(EXIT_INTERNAL, "dtype %d has no HDF5 type", (int)dtype);
}

const char *io_type_name(enum dtype dtype)
{
    static const char *const name[] = {
        [DTYPE_F32] = "float32", [DTYPE_F64] = "float64", [DTYPE_BF16] = "bfloat16",
        [DTYPE_I32] = "int32",   [DTYPE_I64] = "int64",   [DTYPE_U8] = "uint8"
    };
    ASSERT(dtype >= 0 && (size_t)dtype < sizeof name / sizeof name[0]);
    return name[dtype];
}

int64_t io_volume(int ndim, const int64_t *count)
{
    int64_t n = 1;
    for (int i = 0; i < ndim; i++)
        n *= count[i];
    return n;
}

/* ---- writing ------------------------------------------------------------------------------- */

hid_t io_group(const char *path, hid_t at, const char *name)
{
    hid_t gcpl = H5Pcreate(H5P_GROUP_CREATE);
    H5Pset_obj_track_times(gcpl, false);
    hid_t g = IO_WRITE(path, name, H5Gcreate2(at, name, H5P_DEFAULT, gcpl, H5P_DEFAULT));
    H5Pclose(gcpl);
    return g;
}

static hid_t space_of(int ndim, const int64_t *shape)
{
    hsize_t dims[TENSOR_MAX_DIMS];
    ASSERT(ndim >= 0 && ndim <= TENSOR_MAX_DIMS);
    for (int i = 0; i < ndim; i++)
        dims[i] = (hsize_t)shape[i];
    return ndim ? H5Screate_simple(ndim, dims, NULL) : H5Screate(H5S_SCALAR);
}

void io_put(const char *path, hid_t at, const char *name, hid_t type, int ndim,
            const int64_t *shape, const void *data, const char *units, const char *description)
{
    hid_t space = IO_WRITE(path, name, space_of(ndim, shape)), dcpl = H5Pcreate(H5P_DATASET_CREATE),
          lcpl = H5Pcreate(H5P_LINK_CREATE);
    H5Pset_layout(dcpl, H5D_CONTIGUOUS);
    H5Pset_alloc_time(dcpl, H5D_ALLOC_TIME_EARLY);
    H5Pset_fill_time(dcpl, H5D_FILL_TIME_NEVER);
    H5Pset_obj_track_times(dcpl, false);
    H5Pset_create_intermediate_group(lcpl, 1);
    hid_t set = IO_WRITE(path, name, H5Dcreate2(at, name, type, space, lcpl, dcpl, H5P_DEFAULT));
    if (units)
        io_attr_string(path, set, "units", units);
    if (description)
        io_attr_string(path, set, "description", description);
    if (data && io_volume(ndim, shape) > 0)
        IO_WRITE(path, name, H5Dwrite(set, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, data));
    IO_WRITE(path, name, H5Dclose(set));
    H5Pclose(lcpl);
    H5Pclose(dcpl);
    H5Sclose(space);
}

void io_put_string(const char *path, hid_t at, const char *name, const char *value,
                   const char *description)
{
    hid_t type = H5Tcopy(H5T_C_S1);
    H5Tset_size(type, strlen(value) + 1);
    H5Tset_cset(type, H5T_CSET_UTF8);
    io_put(path, at, name, type, 0, NULL, value, "text", description);
    H5Tclose(type);
}

static void put_attr(const char *path, hid_t at, const char *name, hid_t type, int ndim,
                     const int64_t *shape, const void *data)
{
    hid_t space = space_of(ndim, shape);
    hid_t attr = IO_WRITE(path, name, H5Acreate2(at, name, type, space, H5P_DEFAULT, H5P_DEFAULT));
    IO_WRITE(path, name, H5Awrite(attr, type, data));
    H5Aclose(attr);
    H5Sclose(space);
}

void io_attr_strings(const char *path, hid_t at, const char *name, int n, const char *const *value)
{
    hid_t type = H5Tcopy(H5T_C_S1); /* variable length: h5py hands them out as str */
    H5Tset_size(type, H5T_VARIABLE);
    H5Tset_cset(type, H5T_CSET_UTF8);
    int64_t shape[1] = { n };
    put_attr(path, at, name, type, n < 0 ? 0 : 1, shape, value);
    H5Tclose(type);
}

void io_attr_string(const char *path, hid_t at, const char *name, const char *value)
{
    io_attr_strings(path, at, name, -1, &value);
}

void io_attr_i64(const char *path, hid_t at, const char *name, int64_t value)
{
    put_attr(path, at, name, H5T_STD_I64LE, 0, NULL, &value);
}

void io_attr_u64(const char *path, hid_t at, const char *name, uint64_t value)
{
    put_attr(path, at, name, H5T_STD_U64LE, 0, NULL, &value);
}

struct header_ctx {
    const char *path;
    hid_t group;
};

static void put_code(void *ctx, const char *key, const char *value)
{
    struct header_ctx *c = ctx;
    io_attr_string(c->path, c->group, key, value);
}

static void put_deck(void *ctx, const char *group, const char *key, const char *value,
                     enum deck_origin origin)
{
    struct header_ctx *c = ctx;
    char name[256];
    snprintf(name, sizeof name, "%s.%s", group, key);
    io_attr_string(c->path, c->group, name, value);
}

char *io_deck_text(const struct deck *deck)
{
    char *text = NULL;
    size_t size = 0;
    FILE *f = open_memstream(&text, &size);
    CHECK_SYS(f != NULL, EXIT_ENVIRONMENT, "no memory for the deck's echo");
    deck_echo(deck, f);
    CHECK_SYS(fclose(f) == 0, EXIT_ENVIRONMENT, "no memory for the deck's echo");
    return text;
}

void io_put_header(const char *path, hid_t file, const char *format, int64_t version,
                   const struct deck *deck)
{
    io_attr_string(path, file, "format", format);
    io_attr_i64(path, file, "format_version", version);
    struct header_ctx c = { path, io_group(path, file, "code") };
    code_visit(put_code, &c);
    H5Gclose(c.group);
    c.group = io_group(path, file, "deck");
    deck_visit(deck, put_deck, &c);
    char *text = io_deck_text(deck);
    io_put_string(path, c.group, "text", text, "the complete deck of the run, as in deck.nml");
    free(text);
    H5Gclose(c.group);
}

/* Select a box of a dataset's space; the pair of spaces must be closed. */
static bool select_box(hid_t set, int ndim, const int64_t *start, const int64_t *count,
                       hid_t *memory, hid_t *space)
{
    hsize_t s[TENSOR_MAX_DIMS], c[TENSOR_MAX_DIMS];
    for (int i = 0; i < ndim; i++) {
        s[i] = (hsize_t)start[i];
        c[i] = (hsize_t)count[i];
    }
    *space = H5Dget_space(set);
    *memory = ndim ? H5Screate_simple(ndim, c, NULL) : H5Screate(H5S_SCALAR);
    if (*space < 0 || *memory < 0 || H5Sget_simple_extent_ndims(*space) != ndim)
        return false;
    return ndim == 0 || H5Sselect_hyperslab(*space, H5S_SELECT_SET, s, NULL, c, NULL) >= 0;
}

static void close_box(hid_t memory, hid_t space)
{
    if (memory >= 0)
        H5Sclose(memory);
    if (space >= 0)
        H5Sclose(space);
}

void io_write_box(const char *path, const char *name, hid_t set, hid_t type, int ndim,
                  const int64_t *start, const int64_t *count, const void *data)
{
    hid_t memory, space;
    char why[1200];
    log_beat();
    bool ok = select_box(set, ndim, start, count, &memory, &space);
    IO_WRITE(path, name, ok ? 0 : -1);
    herr_t status = -1;
    for (int tries = 0; tries < INTERRUPTED_MAX && status < 0; tries++) {
        status = H5Dwrite(set, type, memory, space, H5P_DEFAULT, data);
        /* MPI-IO, unlike HDF5's own driver, gives up when a signal comes; the same bytes again do
         * no harm. */
        if (status < 0 && !strstr(io_reason(why, sizeof why), strerror(EINTR)))
            break;
    }
    IO_WRITE(path, name, status);
    close_box(memory, space);
}

/* ---- reading ------------------------------------------------------------------------------- */

/* Text of a string attribute (dataset = false) or scalar string dataset, of fixed or variable
 * length. */
static bool get_string(hid_t object, bool dataset, char *out, size_t size)
{
    hid_t type = dataset ? H5Dget_type(object) : H5Aget_type(object);
    hid_t space = dataset ? H5Dget_space(object) : H5Aget_space(object);
    bool ok = type >= 0 && space >= 0 && H5Tget_class(type) == H5T_STRING &&
              H5Sget_simple_extent_npoints(space) == 1;
    if (ok && H5Tis_variable_str(type) > 0) {
        char *text = NULL;
        hid_t memory = H5Tcopy(H5T_C_S1);
        H5Tset_size(memory, H5T_VARIABLE);
        H5Tset_cset(memory, H5Tget_cset(type));
        ok = (dataset ? H5Dread(object, memory, H5S_ALL, H5S_ALL, H5P_DEFAULT, &text)
                      : H5Aread(object, memory, &text)) >= 0 &&
             text;
        if (ok)
            snprintf(out, size, "%s", text);
        if (text)
            H5free_memory(text);
        H5Tclose(memory);
    } else if (ok) {
        size_t bytes = H5Tget_size(type);
        ok = bytes > 0 && bytes < ((size_t)1 << 24);
        char *text = ok ? xcalloc(bytes + 1, 1) : NULL;
        ok = ok && (dataset ? H5Dread(object, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, text)
                            : H5Aread(object, type, text)) >= 0;
        if (ok)
            snprintf(out, size, "%s", text);
        free(text);
    }
    if (type >= 0)
        H5Tclose(type);
    if (space >= 0)
        H5Sclose(space);
    return ok;
}

bool io_get_attr_string(hid_t at, const char *name, char *out, size_t size)
{
    hid_t attr = H5Aexists(at, name) > 0 ? H5Aopen(at, name, H5P_DEFAULT) : -1;
    if (attr < 0)
        return false;
    bool ok = get_string(attr, false, out, size);
    H5Aclose(attr);
    return ok;
}

static bool get_attr_integer(hid_t at, const char *name, hid_t memory, void *out)
{
    hid_t attr = H5Aexists(at, name) > 0 ? H5Aopen(at, name, H5P_DEFAULT) : -1;
    if (attr < 0)
        return false;
    hid_t type = H5Aget_type(attr), space = H5Aget_space(attr);
    bool ok = type >= 0 && space >= 0 && H5Tget_class(type) == H5T_INTEGER &&
              H5Sget_simple_extent_npoints(space) == 1 && H5Aread(attr, memory, out) >= 0;
    if (type >= 0)
        H5Tclose(type);
    if (space >= 0)
        H5Sclose(space);
    H5Aclose(attr);
    return ok;
}

bool io_get_attr_i64(hid_t at, const char *name, int64_t *out)
{
    return get_attr_integer(at, name, H5T_NATIVE_INT64, out);
}

bool io_get_attr_u64(hid_t at, const char *name, uint64_t *out)
{
    return get_attr_integer(at, name, H5T_NATIVE_UINT64, out);
}

/* A dataset below `at`; every link on the way must be a hard link. */
static hid_t open_set(hid_t at, const char *name)
{
    char part[IO_PATH];
    snprintf(part, sizeof part, "%s", name);
    for (char *c = part + 1;; c++) {
        if (*c && *c != '/')
            continue;
        char keep = *c;
        *c = 0;
        H5L_info_t info;
        if (H5Lexists(at, part, H5P_DEFAULT) <= 0 ||
            H5Lget_info(at, part, &info, H5P_DEFAULT) < 0 || info.type != H5L_TYPE_HARD)
            return -1;
        if (!keep)
            break;
        *c = keep;
    }
    return H5Dopen2(at, name, H5P_DEFAULT);
}

bool io_get_string(hid_t at, const char *name, char *out, size_t size)
{
    hid_t set = open_set(at, name);
    if (set < 0)
        return false;
    bool ok = get_string(set, true, out, size);
    H5Dclose(set);
    return ok;
}

int io_get_shape(hid_t at, const char *name, int64_t *shape)
{
    hid_t set = open_set(at, name);
    if (set < 0)
        return -1;
    hid_t space = H5Dget_space(set);
    hsize_t dims[TENSOR_MAX_DIMS] = { 0 };
    int ndim = space >= 0 ? H5Sget_simple_extent_ndims(space) : -1;
    if (ndim > TENSOR_MAX_DIMS)
        ndim = -1;
    if (ndim > 0)
        H5Sget_simple_extent_dims(space, dims, NULL);
    for (int i = 0; i < ndim; i++)
        shape[i] = (int64_t)dims[i];
    if (space >= 0)
        H5Sclose(space);
    H5Dclose(set);
    return ndim;
}

bool io_get(hid_t at, const char *name, hid_t type, int64_t elements, void *out)
{
    hid_t set = open_set(at, name);
    if (set < 0)
        return false;
    hid_t space = H5Dget_space(set);
    bool ok = space >= 0 && H5Sget_simple_extent_npoints(space) == (hssize_t)elements &&
              (elements == 0 || H5Dread(set, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, out) >= 0);
    if (space >= 0)
        H5Sclose(space);
    H5Dclose(set);
    return ok;
}

bool io_get_box(hid_t set, hid_t type, int ndim, const int64_t *start, const int64_t *count,
                void *out)
{
    hid_t memory, space;
    log_beat();
    bool ok = select_box(set, ndim, start, count, &memory, &space) &&
              H5Dread(set, type, memory, space, H5P_DEFAULT, out) >= 0;
    hid_t reason = H5Eget_current_stack();
    close_box(memory, space);
    H5Eset_current_stack(reason);
    return ok;
}
