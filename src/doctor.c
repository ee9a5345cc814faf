/* doctor.c - see doctor.h. Everything is read from the system and the environment; nothing is
 * started, and of the environment only named variables are shown (it may hold secrets).
 */
#include "doctor.h"
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/resource.h>
#include <sys/statfs.h>
#include <unistd.h>
#include "backend.h"
#include "check.h"
#include "code.h"
#include "header.h"

enum { TEXT_BYTES = 512, OPEN_FILES = 1024, SHM_MIB_PER_CORE = 8 };

struct page {
    FILE *out;
    int warnings;
};

static void warn(struct page *p, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
static void warn(struct page *p, const char *fmt, ...)
{
    va_list ap;

    fputs("  warning: ", p->out);
    va_start(ap, fmt);
    vfprintf(p->out, fmt, ap);
    va_end(ap);
    fputc('\n', p->out);
    p->warnings++;
}

static const char *variable(const char *name)
{
    const char *value = getenv(name);

    return value && *value ? value : NULL;
}

/* First line of a file without its newline; false when there is none. */
static bool first_line(const char *path, char *line, size_t size)
{
    FILE *f = fopen(path, "re");
    bool got = f && fgets(line, (int)size, f);

    if (f)
        fclose(f);
    if (got)
        line[strcspn(line, "\n")] = '\0';
    return got;
}

static double gib(double bytes)
{
    return bytes / 0x1p30;
}

/* ---- machine --------------------------------------------------------------------------------- */

static void print_machine(struct page *p)
{
    char host[256] = "unknown", line[TEXT_BYTES];
    double total = 0.0, available = 0.0, limit;
    long cores = sysconf(_SC_NPROCESSORS_ONLN);
    FILE *f = fopen("/proc/meminfo", "re");

    gethostname(host, sizeof host - 1);
    fprintf(p->out, "host: %s\n", host);
    fprintf(p->out, "cores: %d of %ld\n", header_cores(), cores);
    if (header_cores() == 1 && cores > 1)
        warn(
            p,
            "this process may use one core only; a launcher that binds ranks to cores shows this when it is asked for one rank");
    while (f && fgets(line, sizeof line, f))
        if (sscanf(line, "MemTotal: %lf", &total) != 1)
            sscanf(line, "MemAvailable: %lf", &available);
    if (f)
        fclose(f);
    fprintf(p->out, "memory: %.1f GiB, %.1f GiB available\n", gib(1024 * total),
            gib(1024 * available));
    if (first_line("/sys/fs/cgroup/memory.max", line, sizeof line) &&
        sscanf(line, "%lf", &limit) == 1 && limit < 1024 * total)
        fprintf(p->out, "memory limit of this job: %.1f GiB\n", gib(limit));
}

static const char *file_system(const char *path)
{
    static const struct {
        unsigned long magic;
        const char *name;
    } known[] = {
        { 0xef53, "ext4" },       { 0x58465342, "xfs" },     { 0x9123683e, "btrfs" },
        { 0x01021994, "tmpfs" },  { 0x794c7630, "overlay" }, { 0x6969, "nfs" },
        { 0x0bd00bd0, "lustre" }, { 0x47504653, "gpfs" },    { 0x2fc12fc1, "zfs" },
        { 0x19830326, "beegfs" }, { 0xc36400, "ceph" },      { 0x61756673, "aufs" },
    };
    struct statfs fs;

    if (statfs(path, &fs) != 0)
        return "unknown";
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (known[i].magic == (unsigned long)fs.f_type)
            return known[i].name;
    return "of another kind";
}

static double free_bytes(const char *path)
{
    struct statfs fs;

    return statfs(path, &fs) == 0 ? (double)fs.f_bavail * (double)fs.f_bsize : 0.0;
}

/* Where a run started here would write: room, permission, locks. */
static void print_disk(struct page *p)
{
    char name[] = ".mimo-doctor-XXXXXX", here[TEXT_BYTES] = ".", shown[4 * TEXT_BYTES];
    double shm = free_bytes("/dev/shm");
    int fd;

    if (!getcwd(here, sizeof here))
        snprintf(here, sizeof here, ".");
    fprintf(p->out, "disk: %s, %s, %.1f GiB free\n", printable(shown, sizeof shown, here),
            file_system("."), gib(free_bytes(".")));
    fd = mkostemp(name, O_CLOEXEC);
    if (fd < 0) {
        warn(p, "nothing can be written here: %s", strerror(errno));
    } else {
        if (flock(fd, LOCK_EX | LOCK_NB) != 0)
            warn(
                p,
                "files cannot be locked here (%s): two runs in one directory would not notice each other",
                strerror(errno));
        unlink(name);
        close(fd);
    }
    fprintf(p->out, "shared memory: %.1f GiB free in /dev/shm\n", gib(shm));
    if (shm < (double)SHM_MIB_PER_CORE * 0x1p20 * header_cores())
        warn(p, "ranks of one host exchange messages there; a container may need --shm-size=1g");
}

/* ---- limits ---------------------------------------------------------------------------------- */

static void print_limit(struct page *p, const char *name, rlim_t value, bool last)
{
    if (value == RLIM_INFINITY)
        fprintf(p->out, "%s unlimited%s", name, last ? "\n" : ", ");
    else
        fprintf(p->out, "%s %llu%s", name, (unsigned long long)value, last ? "\n" : ", ");
}

static void print_limits(struct page *p)
{
    static const struct {
        int resource;
        const char *name;
    } asked[] = { { RLIMIT_NOFILE, "open files" },
                  { RLIMIT_FSIZE, "file bytes" },
                  { RLIMIT_MEMLOCK, "locked bytes" },
                  { RLIMIT_AS, "address space" },
                  { RLIMIT_STACK, "stack bytes" } };
    enum { ASKED = sizeof asked / sizeof *asked };
    struct rlimit limit[ASKED];

    fputs("limits: ", p->out);
    for (int i = 0; i < ASKED; i++) {
        if (getrlimit((__rlimit_resource_t)asked[i].resource, &limit[i]) != 0)
            limit[i].rlim_cur = RLIM_INFINITY;
        print_limit(p, asked[i].name, limit[i].rlim_cur, i == ASKED - 1);
    }
    if (limit[0].rlim_cur < OPEN_FILES)
        warn(p, "a run with many shards opens more files: ulimit -n %d", OPEN_FILES);
    if (limit[1].rlim_cur != RLIM_INFINITY)
        warn(p, "a larger checkpoint ends the run with 6: ulimit -f unlimited");
    if (limit[3].rlim_cur != RLIM_INFINITY)
        warn(p, "MPI and CUDA reserve much address space: ulimit -v unlimited");
}

/* ---- libraries ------------------------------------------------------------------------------- */

static void print_pair(void *ctx, const char *key, const char *value)
{
    fprintf(((struct page *)ctx)->out, "%s: %s\n", key, value);
}

static void print_blas(struct page *p)
{
    char warning[TEXT_BYTES];
    const char *threads = variable("OPENBLAS_NUM_THREADS");

    fprintf(p->out, "blas kernels: %s\n", backend_blas_core(warning, sizeof warning));
    if (*warning)
        warn(p, "%s", warning);
    fprintf(p->out, "blas threads a rank: %s\n", threads ? threads : "cores / ranks of the host");
}

static void print_hdf5(struct page *p)
{
    const char *locking = variable("HDF5_USE_FILE_LOCKING");

    fprintf(p->out, "hdf5 parallel: %s, file locking %s\n",
            dlsym(RTLD_DEFAULT, "H5Pset_fapl_mpio") ? "yes" : "no",
            locking ? locking : "as the library does it");
    if (!dlsym(RTLD_DEFAULT, "H5Pset_fapl_mpio"))
        warn(
            p,
            "this HDF5 cannot write one file from many ranks: HDF5_CFLAGS and HDF5_LIBS in Makefile.inc name a parallel one");
}

/* ---- launcher -------------------------------------------------------------------------------- */

/* The program of that name on the search path, or NULL. */
static const char *find_program(const char *name, char path[TEXT_BYTES])
{
    const char *all = variable("PATH");

    for (const char *p = all; p;) {
        const char *end = strchr(p, ':');
        int n = end ? (int)(end - p) : (int)strlen(p);
        if (n > 0 && snprintf(path, TEXT_BYTES, "%.*s/%s", n, p, name) < TEXT_BYTES &&
            access(path, X_OK) == 0)
            return path;
        p = end ? end + 1 : NULL;
    }
    return NULL;
}

static void print_launchers(struct page *p)
{
    static const char *const names[] = { "mpiexec.mpich", "mpiexec.hydra", "mpiexec", "mpirun",
                                         "srun" };
    char path[TEXT_BYTES];
    int found = 0;

    fputs("launchers:", p->out);
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        const char *at = find_program(names[i], path);
        if (at)
            fprintf(p->out, "%s %s", found++ > 0 ? "," : "", at);
    }
    fputs(found ? "\n" : " none\n", p->out);
    if (!found)
        warn(p, "neither mpiexec nor srun is on PATH: only runs on one rank can be started");
}

static void print_launcher(struct page *p)
{
    const char *mpi_size = variable("PMI_SIZE"), *other = variable("OMPI_COMM_WORLD_SIZE"),
               *tasks = variable("SLURM_NTASKS");
    const char *job = variable("SLURM_JOB_ID"), *step = variable("SLURM_STEP_ID"),
               *size = mpi_size ? mpi_size
                       : other  ? other
                                : tasks;

    if (!size)
        fputs("launcher: none, one rank\n", p->out);
    else
        fprintf(p->out, "launcher: %s, %s ranks%s%s\n",
                step       ? "srun"
                : mpi_size ? "mpiexec"
                : other    ? "Open MPI's mpiexec"
                           : "Slurm",
                size, job ? ", Slurm job " : "", job ? job : "");
    if (other && !dlsym(RTLD_DEFAULT, "ompi_mpi_comm_world"))
        warn(
            p,
            "Open MPI's launcher starts a program that is linked with another MPI: every rank will believe to be alone");
    if (!other && mpi_size && dlsym(RTLD_DEFAULT, "ompi_mpi_comm_world"))
        warn(
            p,
            "this program is linked with Open MPI, the launcher belongs to another one: every rank will believe to be alone");
    if (step && !variable("SLURM_KILL_BAD_EXIT"))
        warn(
            p,
            "start with srun --kill-on-bad-exit=1 (or export SLURM_KILL_BAD_EXIT=1): else a dead rank leaves the others waiting");
}

static void print_mpi(struct page *p)
{
    bool ucx = dlsym(RTLD_DEFAULT, "ucp_worker_create") != NULL;

    fprintf(p->out, "yield: %s\n",
            ucx ? "ranks that wait give their core away (UCX)" : "as the MPI library does it");
    if (!variable("HWLOC_PLUGINS_PATH"))
        fputs(
            "hwloc: plug-ins may slow the start of MPI; HWLOC_PLUGINS_PATH=/nonexistent leaves them out\n",
            p->out);
    print_launchers(p);
    print_launcher(p);
}

/* ---- GPUs ------------------------------------------------------------------------------------ */

static void print_gpus(struct page *p)
{
    static const char folder[] = "/proc/driver/nvidia/gpus";
    const char *missing = backend_cuda_missing();
    char path[TEXT_BYTES], line[TEXT_BYTES], why[TEXT_BYTES];
    const struct dirent *entry;
    DIR *d = opendir(folder);
    int n = 0;

    while (d && (entry = readdir(d))) {
        if (entry->d_name[0] == '.')
            continue;
        snprintf(path, sizeof path, "%s/%.200s/information", folder, entry->d_name);
        if (!first_line(path, line, sizeof line))
            continue;
        const char *model = strchr(line, ':');
        fprintf(p->out, "gpu %d: %s\n", n++, model ? model + 1 + strspn(model + 1, " \t") : line);
    }
    if (d)
        closedir(d);
    if (first_line("/proc/driver/nvidia/version", line, sizeof line))
        fprintf(p->out, "gpu driver: %s\n", line);
    fprintf(p->out, "gpu: %s, %s\n", n == 0 ? "none in this machine" : "present",
            missing ? missing : "this binary has the CUDA backend");
    if (n > 0 && missing)
        warn(p, "runs will use the CPU: build with CUDA (make help)");
    if (n > 0 && !missing &&
        (!backend_cuda_count(why, sizeof why) || !backend_cuda_start(0, false, why, sizeof why)))
        warn(p, "%s", why);
}

void doctor_print(FILE *out)
{
    const char *rank = variable("PMI_RANK")               ? variable("PMI_RANK")
                       : variable("OMPI_COMM_WORLD_RANK") ? variable("OMPI_COMM_WORLD_RANK")
                                                          : variable("SLURM_PROCID");
    struct page p = { .out = out };

    if (rank && strcmp(rank, "0") != 0)
        return;
    code_visit(print_pair, &p);
    print_machine(&p);
    print_disk(&p);
    print_limits(&p);
    print_blas(&p);
    print_hdf5(&p);
    print_mpi(&p);
    print_gpus(&p);
    if (p.warnings == 0)
        fputs("no warnings\n", out);
    else
        fprintf(out, "%d warning%s\n", p.warnings, p.warnings == 1 ? "" : "s");
}
