/* header.c - see header.h. The deck's fingerprint is SHA-256 (FIPS 180-4), so that sha256sum of the
 * deck file gives the same. */
#include "header.h"
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/statvfs.h>
#include <unistd.h>
#include "backend.h"
#include "check.h"
#include "code.h"
#include "log.h"

enum { HOST_BYTES = 64, HOSTS_SHOWN = 512 };

/* ---- SHA-256 --------------------------------------------------------------------------------- */

static const uint32_t sha_k[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2
};

static uint32_t rotate(uint32_t x, int n)
{
    return x >> n | x << (32 - n);
}

static void sha_block(uint32_t h[8], const unsigned char *p)
{
    uint32_t w[64], v[8];

    for (int i = 0; i < 16; i++)
        w[i] = (uint32_t)p[4 * i] << 24 | (uint32_t)p[4 * i + 1] << 16 |
               (uint32_t)p[4 * i + 2] << 8 | p[4 * i + 3];
    for (int i = 16; i < 64; i++) {
        uint32_t a = w[i - 15], b = w[i - 2];
        w[i] = w[i - 16] + (rotate(a, 7) ^ rotate(a, 18) ^ a >> 3) + w[i - 7] +
               (rotate(b, 17) ^ rotate(b, 19) ^ b >> 10);
    }
    memcpy(v, h, sizeof v);
    for (int i = 0; i < 64; i++) {
        uint32_t s1 = rotate(v[4], 6) ^ rotate(v[4], 11) ^ rotate(v[4], 25);
        uint32_t t1 = v[7] + s1 + ((v[4] & v[5]) ^ (~v[4] & v[6])) + sha_k[i] + w[i];
        uint32_t s0 = rotate(v[0], 2) ^ rotate(v[0], 13) ^ rotate(v[0], 22);
        uint32_t t2 = s0 + ((v[0] & v[1]) ^ (v[0] & v[2]) ^ (v[1] & v[2]));
        memmove(v + 1, v, 7 * sizeof *v);
        v[4] += t1;
        v[0] = t1 + t2;
    }
    for (int i = 0; i < 8; i++)
        h[i] += v[i];
}

static void sha256(const void *data, size_t n, char hex[65])
{
    uint32_t h[8] = { 0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                      0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19 };
    unsigned char last[128] = { 0 };
    size_t whole = n / 64 * 64, rest = n - whole, end = rest < 56 ? 64 : 128;

    for (size_t i = 0; i < whole; i += 64)
        sha_block(h, (const unsigned char *)data + i);
    if (rest > 0)
        memcpy(last, (const unsigned char *)data + whole, rest);
    last[rest] = 0x80;
    for (int i = 0; i < 8; i++)
        last[end - 1 - (size_t)i] = (unsigned char)((uint64_t)n * 8 >> 8 * i);
    for (size_t i = 0; i < end; i += 64)
        sha_block(h, last + i);
    for (int i = 0; i < 8; i++)
        snprintf(hex + 8 * i, 9, "%08x", h[i]);
}

/* ---- machine --------------------------------------------------------------------------------- */

int header_cores(void)
{
    cpu_set_t set;

    return sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set)
                                                       : (int)sysconf(_SC_NPROCESSORS_ONLN);
}

static int compare_hosts(const void *a, const void *b)
{
    return strcmp(a, b);
}

/* Length of the part of a host name before its trailing number. */
static size_t stem_length(const char *host)
{
    size_t n = strlen(host);

    while (n > 0 && host[n - 1] >= '0' && host[n - 1] <= '9')
        n--;
    return n;
}

/* "n01 n02 n03 login" -> "login,n[01-03]": runs of consecutive numbers of equal width. */
static void compress_hosts(char (*host)[HOST_BYTES], int n, char *out, size_t size)
{
    size_t used = 0;

    qsort(host, (size_t)n, sizeof *host, compare_hosts);
    out[0] = '\0';
    for (int i = 0; i < n && used + 2 * HOST_BYTES < size;) {
        size_t stem = stem_length(host[i]), length = strlen(host[i]);
        int last = i;
        for (int j = i + 1; j < n; j++) {
            if (strcmp(host[j], host[last]) == 0)
                continue;
            if (strlen(host[j]) != length || stem == length ||
                strncmp(host[j], host[i], stem) != 0 || stem_length(host[j]) != stem ||
                strtol(host[j] + stem, NULL, 10) != strtol(host[last] + stem, NULL, 10) + 1)
                break;
            last = j;
        }
        if (strcmp(host[i], host[last]) == 0)
            used += (size_t)snprintf(out + used, size - used, "%s%s", used ? "," : "", host[i]);
        else
            used += (size_t)snprintf(out + used, size - used, "%s%.*s[%s-%s]", used ? "," : "",
                                     (int)stem, host[i], host[i] + stem, host[last] + stem);
        const char *end = host[last];
        while (i < n && strcmp(host[i], end) <= 0)
            i++;
    }
}

static void print_fact(void *ctx, const char *key, const char *value)
{
    log_line("%s: %s", key, value);
}

static const char *variable(const char *name)
{
    const char *value = getenv(name);

    return value && *value ? value : "none";
}

static void print_machine(const struct topology *topo, char (*host)[HOST_BYTES], int node_size,
                          int n_nodes, int threads)
{
    char list[HOSTS_SHOWN], warning[256], shown[4 * HOSTS_SHOWN];

    compress_hosts(host, topo->size, list, sizeof list);
    log_line("hosts: %s (%d)", printable(shown, sizeof shown, list), n_nodes);
    log_line("ranks: %d, %d on the first host, %d cores there for rank 0", topo->size, node_size,
             header_cores());
    log_line("blas: %s kernels, %d thread%s a rank", backend_blas_core(warning, sizeof warning),
             threads, threads == 1 ? "" : "s");
    if (*warning)
        log_warn("%s", warning);
    log_line("slurm job: %s, restart %s", variable("SLURM_JOB_ID"),
             variable("SLURM_RESTART_COUNT"));
}

void header_print(const struct deck *deck, const struct topology *topo, const char *deck_text,
                  size_t deck_bytes, int threads, const char *start)
{
    char own[HOST_BYTES] = "", hash[65], (*host)[HOST_BYTES] = NULL;
    int node_size, node_rank, n_nodes;
    struct statvfs fs;

    comm_node(topo->world, &node_size, &node_rank, &n_nodes);
    if (gethostname(own, sizeof own - 1) != 0)
        snprintf(own, sizeof own, "unknown");
    if (topo->rank == 0)
        host = xcalloc((size_t)topo->size, sizeof *host);
    comm_host_gather(topo->world, own, sizeof own, host, 0);
    if (topo->rank != 0)
        return;
    log_line("program: mimo");
    code_visit(print_fact, NULL);
    print_machine(topo, host, node_size, n_nodes, threads);
    free(host);
    sha256(deck_text, deck_bytes, hash);
    log_line("deck: %s sha256 %s", deck->file, hash);
    if (statvfs(deck->run.output_dir, &fs) == 0)
        log_line("run directory: %s, %.1f GiB free", deck->run.output_dir,
                 (double)fs.f_bavail * (double)fs.f_frsize / 0x1p30);
    if (*deck->run.title)
        log_line("title: %s", deck->run.title);
    log_line("start: %s", start);
}
