/* code.c - see code.h. Libraries are asked for their version at run time through the dynamic
 * linker, so this file needs none of their headers and a library that is not linked is simply
 * absent ("no").
 */
#include "code.h"
#include <ctype.h>
#include <dlfcn.h>
#include <string.h>
#include "backend.h"
#include "comm.h"

enum { TEXT_MAX = 256, PCRE2_VERSION_QUERY = 11 };

static bool find(void *function, size_t size, const char *symbol);
static void version_of_string(char *text, const char *symbol);
static void version_of_number(char *text, const char *symbol, int major_unit, int minor_unit);
static void version_of_output(char *text, const char *symbol, int major_unit, int minor_unit);
static void hdf5_version(char *text);
static void cudnn_version(char *text);
static void webp_version(char *text);
static void pcre2_version(char *text);
static void blas_version(char *text);
static void print_pair(void *ctx, const char *key, const char *value);

void code_visit(void (*visit)(void *ctx, const char *key, const char *value), void *ctx)
{
    char text[TEXT_MAX];
    const char *missing = backend_cuda_missing();
    visit(ctx, "version", MIMO_VERSION);
    visit(ctx, "git", MIMO_GIT);
    snprintf(text, sizeof text, "%s%s", isdigit((unsigned char)__VERSION__[0]) ? "gcc " : "",
             __VERSION__);
    visit(ctx, "compiler", text);
    visit(ctx, "flags", MIMO_CFLAGS);
    visit(ctx, "mpi", comm_library());
    hdf5_version(text);
    visit(ctx, "hdf5", text);
    blas_version(text);
    visit(ctx, "blas", text);
    version_of_output(text, "cudaRuntimeGetVersion", 1000, 10);
    visit(ctx, "cuda", missing ? "no" : text);
    version_of_output(text, "ncclGetVersion", 10000, 100);
    visit(ctx, "nccl", missing ? "no" : text);
    cudnn_version(text);
    visit(ctx, "cudnn", missing ? "no" : text);
    version_of_string(text, "zlibVersion");
    visit(ctx, "zlib", text);
    version_of_string(text, "png_get_libpng_ver");
    visit(ctx, "libpng", text);
    webp_version(text);
    visit(ctx, "libwebp", text);
    pcre2_version(text);
    visit(ctx, "pcre2", text);
    version_of_string(text, "jansson_version_str");
    visit(ctx, "jansson", text);
    version_of_number(text, "archive_version_number", 1000000, 1000);
    visit(ctx, "libarchive", text);
    version_of_number(text, "XXH_versionNumber", 10000, 100);
    visit(ctx, "xxhash", text);
    version_of_string(text, "gnu_get_libc_version");
    visit(ctx, "libc", text);
}

void code_print_features(FILE *out)
{
    code_visit(print_pair, out);
}

const char *code_version(void)
{
    return MIMO_VERSION;
}

const char *code_git(void)
{
    return MIMO_GIT;
}

/* Store the address of a function of any loaded library through `function`, a pointer to a function
 * pointer. */
static bool find(void *function, size_t size, const char *symbol)
{
    void *address = dlsym(RTLD_DEFAULT, symbol);
    if (!address || size != sizeof address)
        return false;
    memcpy(function, &address, size);
    return true;
}

/* const char *f(void), or one that ignores its pointer argument. */
static void version_of_string(char *text, const char *symbol)
{
    const char *(*get)(const void *);
    snprintf(text, TEXT_MAX, "%s", find(&get, sizeof get, symbol) ? get(NULL) : "no");
}

static void print_number(char *text, long n, int major_unit, int minor_unit)
{
    if (minor_unit > 10)
        snprintf(text, TEXT_MAX, "%ld.%ld.%ld", n / major_unit, n % major_unit / minor_unit,
                 n % minor_unit);
    else
        snprintf(text, TEXT_MAX, "%ld.%ld", n / major_unit, n % major_unit / minor_unit);
}

/* unsigned f(void). */
static void version_of_number(char *text, const char *symbol, int major_unit, int minor_unit)
{
    unsigned (*get)(void);
    snprintf(text, TEXT_MAX, "no");
    if (find(&get, sizeof get, symbol))
        print_number(text, (long)get(), major_unit, minor_unit);
}

/* int f(int *version), zero = success. */
static void version_of_output(char *text, const char *symbol, int major_unit, int minor_unit)
{
    int (*get)(int *);
    int n = 0;
    snprintf(text, TEXT_MAX, "no");
    if (find(&get, sizeof get, symbol) && get(&n) == 0)
        print_number(text, n, major_unit, minor_unit);
}

static void hdf5_version(char *text)
{
    int (*get)(unsigned *, unsigned *, unsigned *), (*no_cleanup)(void);
    unsigned v[3] = { 0 };
    snprintf(text, TEXT_MAX, "no");
    if (find(&no_cleanup, sizeof no_cleanup, "H5dont_atexit"))
        /* counts only before the first other call, which may be this one: see io_start */
        no_cleanup();
    if (find(&get, sizeof get, "H5get_libversion") && get(&v[0], &v[1], &v[2]) >= 0)
        snprintf(text, TEXT_MAX, "%u.%u.%u%s", v[0], v[1], v[2],
                 dlsym(RTLD_DEFAULT, "H5Pset_fapl_mpio") ? " parallel" : "");
}

static void cudnn_version(char *text)
{
    size_t (*get)(void);
    snprintf(text, TEXT_MAX, "no");
    if (find(&get, sizeof get, "cudnnGetVersion"))
        print_number(text, (long)get(), 10000, 100);
}

static void webp_version(char *text)
{
    int (*get)(void);
    snprintf(text, TEXT_MAX, "no");
    if (find(&get, sizeof get, "WebPGetDecoderVersion"))
        snprintf(text, TEXT_MAX, "%d.%d.%d", get() >> 16 & 255, get() >> 8 & 255, get() & 255);
}

static void pcre2_version(char *text)
{
    int (*get)(uint32_t, void *);
    char version[TEXT_MAX] = "no";
    /* The needed size is asked first: the library does not take one. */
    if (find(&get, sizeof get, "pcre2_config_8")) {
        const int n = get(PCRE2_VERSION_QUERY, NULL);
        if (n > 0 && n < TEXT_MAX)
            get(PCRE2_VERSION_QUERY, version);
    }
    snprintf(text, TEXT_MAX, "%s", version);
}

static void blas_version(char *text)
{
    char *(*get)(void);
    char config[TEXT_MAX] = "no";
    if (find(&get, sizeof get, "openblas_get_config"))
        snprintf(config, sizeof config, "%s", get());
    else if (dlsym(RTLD_DEFAULT, "bli_info_get_version_str"))
        version_of_string(config, "bli_info_get_version_str");
    else if (dlsym(RTLD_DEFAULT, "cblas_sgemm"))
        snprintf(config, sizeof config, "of unknown make");
    size_t n = strlen(config);
    while (n > 0 && config[n - 1] == ' ')
        config[--n] = '\0';
    memcpy(text, config, TEXT_MAX);
}

static void print_pair(void *ctx, const char *key, const char *value)
{
    fprintf(ctx, "%s=%s\n", key, value);
}
