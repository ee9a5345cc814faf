/* fuzz_hf_directory.c - any bytes as a whole Hugging Face directory: an index, up to three weight
 * files and links between them, audited against a small deck and, when it passes, read.
 *
 * Input: one byte of flags (1: there is an index; 2: it links to itself; 4: the second file is a
 * link to the first; 8: the last file is cut in its data; 16: only the language model is wanted);
 * then four parts, each with its length in two bytes: the index, three headers, a header behind
 * four bytes that say how much data follows it. The data are zeros that take no memory.
 */
#include "fuzz.h"

#include <sys/stat.h>

#include "hf_directory.h"

enum { FILES = 3, INDEX = FILES, PARTS };
enum { HAS_INDEX = 1, INDEX_LOOPS = 2, LINKED = 4, CUT = 8, LANGUAGE_ONLY = 16 };

static struct deck deck;
static char directory[64];
static int memory[PARTS];
static const char *const names[PARTS] = { "model.safetensors", "model-00001-of-00002.safetensors",
                                          "model-00002-of-00002.safetensors",
                                          "model.safetensors.index.json" };

static const char *path_of(const char *name)
{
    static char path[128];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    return path;
}

static void leave(void)
{
    for (int k = 0; k < PARTS; k++)
        unlink(path_of(names[k]));
    unlink(path_of("config.json"));
    rmdir(directory);
}

/* The configuration that agrees with the deck: what is fuzzed here are the weights. */
static void write_config(void)
{
    static const char text[] =
        "{\"llm_config\":{\"hybrid_override_pattern\":\"M*E\",\"hidden_size\":8,\"num_attention_heads\":4,"
        "\"num_key_value_heads\":2,\"head_dim\":2,\"intermediate_size\":8,\"vocab_size\":16,"
        "\"layer_norm_epsilon\":1e-5,\"mamba_num_heads\":4,\"mamba_head_dim\":2,\"n_groups\":2,"
        "\"ssm_state_size\":4,\"conv_kernel\":4,\"n_routed_experts\":2,\"num_experts_per_tok\":1,"
        "\"routed_scaling_factor\":2.5,\"moe_intermediate_size\":4,\"moe_shared_expert_intermediate_size\":4},"
        "\"vision_config\":{\"hidden_size\":8,\"num_hidden_layers\":1,\"num_attention_heads\":2,\"mlp_ratio\":2.0,"
        "\"patch_size\":4,\"max_img_size\":16,\"num_cls_tokens\":1,\"num_registers\":1},"
        "\"img_context_token_id\":15}";
    FILE *f = fopen(path_of("config.json"), "w");
    EXPECT(f && fputs(text, f) >= 0 && fclose(f) == 0);
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    static const char text[] =
        "&run train_iters = 1 /\n&lr lr = 1 /\n"
        "&language preset = 'custom' hybrid_layer_pattern = 'M*E' hidden_size = 8 num_attention_heads = 4\n"
        " num_query_groups = 2 kv_channels = 2 ffn_hidden_size = 8 vocab_size = 16 seq_length = 16\n"
        " make_vocab_size_divisible_by = 16 /\n"
        "&moe num_experts = 2 moe_router_topk = 1 moe_ffn_hidden_size = 4 moe_shared_expert_intermediate_size = 4\n"
        " moe_router_topk_scaling_factor = 2.5 moe_router_enable_expert_bias = T /\n"
        "&mamba mamba_num_heads = 4 mamba_head_dim = 2 mamba_num_groups = 2 mamba_state_dim = 4 linear_conv_kernel_dim = 4\n"
        " mamba_chunk_size = 4 /\n"
        "&vision preset = 'custom' num_layers = 1 hidden_size = 8 num_attention_heads = 2 ffn_hidden_size = 16 patch_dim = 4\n"
        " max_img_h = 16 max_img_w = 16 class_token_len = 2 final_layernorm = T dynamic_resolution_min_patches = 4\n"
        " dynamic_resolution_max_patches = 16 /\n"
        "&projector vision_projection_type = 'mlp' projection_normalization = 'rmsnorm' /\n"
        "&data image_token_id = 15 pad_token_id = 0 image_seq_length = 4 num_image_tiles = 1 /\n";
    struct errors errors = { 0 };
    fuzz_start();
    deck_read(&deck, "fuzz", text, strlen(text), 0, NULL, &errors);
    deck_resolve(&deck, 1, &errors);
    for (int i = 0; i < errors.count; i++)
        fprintf(stderr, "%s\n", errors.line[i]);
    EXPECT(errors.count == 0);
    snprintf(directory, sizeof directory, "/tmp/mimo_fuzz_XXXXXX");
    EXPECT(mkdtemp(directory) && atexit(leave) == 0);
    write_config();
    for (int k = 0; k < PARTS; k++) {
        char link[64];
        EXPECT((memory[k] = memfd_create("fuzz", MFD_CLOEXEC)) >= 0);
        snprintf(link, sizeof link, "/proc/self/fd/%d", memory[k]);
        EXPECT(symlink(link, path_of(names[k])) == 0);
    }
    return 0;
}

/* Where a name leads to, changed only when another input wants it otherwise. */
static void link_to(int part, int target)
{
    static int now[PARTS] = { 0, 1, 2, 3 };
    char link[64];
    if (now[part] == target)
        return;
    now[part] = target;
    unlink(path_of(names[part]));
    if (target < 0)
        return;
    if (target == PARTS)
        snprintf(link, sizeof link, "%s", names[part]);
    else
        snprintf(link, sizeof link, "/proc/self/fd/%d", memory[target]);
    EXPECT(symlink(link, path_of(names[part])) == 0);
}

/* The next part of the input: its bytes and length. */
static const uint8_t *take(const uint8_t **at, size_t *left, size_t *n)
{
    *n = *left >= 2 ? (size_t)((*at)[0] + 256 * (*at)[1]) : 0;
    *at += *left >= 2 ? 2 : *left;
    *left -= *left >= 2 ? 2 : *left;
    *n = *n < *left ? *n : *left;
    const uint8_t *part = *at;
    *at += *n;
    *left -= *n;
    return part;
}

static void put_file(int k, const uint8_t *part, size_t n, bool cut)
{
    uint8_t head[8] = { 0 };
    uint64_t data = 0;
    EXPECT(ftruncate(memory[k], 0) == 0);
    if (n < 4)
        return;
    for (int i = 3; i >= 0; i--)
        data = data << 8 | part[i];
    for (int i = 0; i < 8; i++)
        head[i] = (uint8_t)((n - 4) >> 8 * i);
    EXPECT(pwrite(memory[k], head, 8, 0) == 8 &&
           pwrite(memory[k], part + 4, n - 4, 8) == (ssize_t)(n - 4));
    EXPECT(ftruncate(memory[k], (off_t)(8 + (n - 4) + data - (cut && data > 0))) == 0);
}

struct seen {
    const struct safetensors_tensor *const *tensor;
    struct safetensors_access *access;
    struct errors *errors;
    int64_t numbers, size;
};

static void see(void *ctx, int source, int64_t first, int64_t local, int64_t n)
{
    struct seen *s = ctx;
    double x[4096];
    EXPECT(s->tensor[source] && first >= 0 && n > 0 && first + n <= s->tensor[source]->elements);
    EXPECT(local >= 0 && local + n <= s->size && n <= 4096);
    EXPECT(safetensors_read(s->access, s->tensor[source], first, n, x, s->errors));
    s->numbers += n;
}

/* A directory without a mistake has every number of every wanted parameter. */
static void read_everything(struct hf_directory *d, struct errors *errors)
{
    struct safetensors_access access = { .s = &d->s };
    struct topology topo;
    struct model model;
    model_describe(&model, &topo, &deck);
    for (int i = 0; i < model.n_params; i++) {
        const struct param *p = &model.param[i];
        const struct safetensors_tensor **tensor;
        struct hf_map m;
        int64_t start[TENSOR_MAX_DIMS] = { 0 };
        if (!d->want[p->module])
            continue;
        const int n = hf_directory_map(d, &deck, p, &m, &tensor);
        struct seen seen = { tensor, &access, errors, 0, m.rows * m.cols };
        if (n > 0) {
            hf_map_walk(&m, p, start, p->shape, see, &seen);
            EXPECT(n == m.n_sources && seen.numbers == seen.size);
        } else {
            EXPECT(strncmp(p->name, "decoder.final_layernorm.", 24) == 0);
        }
        const struct safetensors_tensor *scale = hf_directory_scale(d, p);
        EXPECT(!scale || scale->elements == p->shape[0]);
        hf_map_free(&m);
        free(tensor);
    }
    model_free(&model);
    safetensors_close(&access, errors);
    EXPECT(errors->count == 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct errors errors = { 0 }, notes = { 0 };
    if (size == 0)
        return 0;
    const int flags = *data++;
    size_t left = size - 1, n;
    const uint8_t *index = take(&data, &left, &n);
    EXPECT(ftruncate(memory[INDEX], 0) == 0 && pwrite(memory[INDEX], index, n, 0) == (ssize_t)n);
    link_to(INDEX, !(flags & HAS_INDEX) ? -1 : flags & INDEX_LOOPS ? PARTS : INDEX);
    link_to(2, flags & LINKED ? 1 : 2);
    for (int k = 0; k < FILES; k++) {
        const uint8_t *part = take(&data, &left, &n);
        put_file(k, part, n, k == FILES - 1 && flags & CUT);
    }
    struct hf_directory d = { .path = directory };
    for (int m = 0; m < MODEL_MODULES; m++)
        d.want[m] = m == MODEL_LANGUAGE || !(flags & LANGUAGE_ONLY);
    hf_directory_audit(&d, &deck, &errors, &notes);
    EXPECT(errors.count == 0 || errors.worst == EXIT_CHECKPOINT);
    fuzz_expect_errors(&errors);
    for (int i = 0; i < notes.count; i++)
        fuzz_expect_line(notes.line[i], 1 << 16);
    if (errors.count == 0)
        read_everything(&d, &errors);
    hf_directory_free(&d);
    errors_free(&errors);
    errors_free(&notes);
    return 0;
}
