/* sizes.c - memory needs of the CUDA tables (cuda_sizes.h), and tables that count but do nothing.
 * No CUDA header: every binary has this file. */
#include "cuda_sizes.h"

/* All 32 heads of a text of 8192 rows. */
static const int64_t ATTENTION_CAP = (int64_t)4 << 30;

int cuda_attention_chunk(int64_t segments, int64_t max_len, int n, int g)
{
    /* cuDNN rounds the length to its tile of 128. */
    const int64_t len = (max_len + 127) / 128 * 128, head = segments * len * len * 2;
    const int per = n / g;
    int groups = g;
    while (groups > 1 && (g % groups != 0 || groups * per * head > ATTENTION_CAP))
        groups--;
    return groups * per;
}

static void no_stream(struct stream *s, const char *name)
{
    *s = (struct stream){ .name = name };
}
static void no_stream_end(struct stream *s)
{
    *s = (struct stream){ 0 };
}
static void no_event(struct event *e)
{
    e->native = NULL;
}

#define SIZES \
    .name = "cuda", .acc = DTYPE_F32, .scratch_bytes = CUDA_SCRATCH, .ssd_work = cuda_ssd_work, \
    .stream_create = no_stream, .stream_destroy = no_stream_end, .event_create = no_event, \
    .event_destroy = no_event

const struct backend_ops backend_sizes_bf16 = { SIZES, .act = DTYPE_BF16,
                                                .attention_work = cuda_attention_work };
const struct backend_ops backend_sizes_bf16_any_order = { SIZES, .act = DTYPE_BF16,
                                                          .attention_work =
                                                              cuda_attention_work_any_order };
const struct backend_ops backend_sizes_f32 = { SIZES, .act = DTYPE_F32,
                                               .attention_work = cuda_attention_work };

/* One piece of attention.cu: statistics or slots, the deterministic backward's workspace of the
 * heads (and slots) that run at once, cuDNN's fp32 gradient of the queries, and a margin for its
 * alignment. It must do for shorter segments too, whose pieces may come closer to the cap than
 * those of max_len. */
int64_t cuda_attention_work(int64_t tokens, int64_t segments, int64_t max_len, int n, int g, int d,
                            bool causal)
{
    /* The packed form rounds lengths up to 1024 and takes as many slots as the cap allows, a power
     * of two. */
    const int64_t len = (max_len + 1023) / 1024 * 1024, square = 2 * len * len,
                  least = cuda_attention_chunk(1, max_len, n, g) * square;
    int64_t slots = 1;
    while (n == g && slots < segments)
        slots *= 2;
    int64_t squares = slots * n < ATTENTION_CAP / square ? slots * n * square : ATTENTION_CAP;
    if (squares < least)
        squares = least;
    return squares + tokens * n * (int64_t)(4 * d + 64) + 64 * (segments + 1) + ((int64_t)64 << 20);
}

/* cuDNN's fp32 gradients and corrections of every query row, twice as many when heads share keys;
 * slots; statistics of a segment. */
int64_t cuda_attention_work_any_order(int64_t tokens, int64_t segments, int64_t max_len, int n,
                                      int g, int d, bool causal)
{
    return tokens * n * (int64_t)(8 * d + 64) + 64 * (segments + 1) + ((int64_t)128 << 20);
}

/* Per chunk the states and their gradients in fp32, seven numbers of each row and head, four sums
 * of each head and an entry of the table of chunks; 256 bytes of alignment for each array. */
int64_t cuda_ssd_work(int64_t tokens, int64_t segments, int heads, int head_dim, int groups,
                      int state, int chunk)
{
    const int64_t chunks = tokens / chunk + segments + 1;
    return chunks * (2 * (int64_t)heads * head_dim * state + 7 * (int64_t)chunk * heads +
                     4 * heads + 4) +
           16 * 64;
}
