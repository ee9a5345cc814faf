/* gpu_graph.c - forward and backward of the language module in a CUDA graph: captured once,
 * replayed for other micro-batches, the same bits.
 *
 *     gpu_graph [DECK [group.key=value ...]]      default: a tiny text-only model in bf16
 *
 * Two micro-batches by plain calls, twice, then twice by replaying one graph after loading each.
 * Compared bit by bit: all gradients, the loss, the balancing metric, the experts' counts. Then
 * both ways are timed.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include "arena.h"
#include "cuda_util.h"
#include "data.h"
#include "deck.h"
#include "model.h"

enum { MICROBATCHES = 2, REPEATS = 10 };

struct job {
    struct deck deck;
    struct topology topo;
    const struct backend_ops *be;
    struct stream stream;
    struct arenas arenas;
    struct model model;
    struct data data;
    struct text_batch text[MICROBATCHES];
    struct tensor image;
};

static const char tiny[] =
    "&run seed = 7 train_iters = 1 backend = 'cuda' /\n&topology layout = 'language_only' /\n"
    "&language preset = 'tiny' /\n&batch micro_batch_size = 2 global_batch_size = 4 /\n&lr lr = 1e-3 /\n";

static char *read_file(const char *path, size_t *n)
{
    FILE *f = fopen(path, "re");
    char *text = xcalloc(1 << 20, 1);
    CHECK_SYS(f != NULL, EXIT_DECK, "%s", path);
    *n = fread(text, 1, (1 << 20) - 1, f);
    fclose(f);
    return text;
}

static void job_open(struct job *j, int argc, char **argv)
{
    struct errors e = { 0 };
    char why[256], *text = NULL;
    size_t n = sizeof tiny - 1;
    memset(j, 0, sizeof *j);
    if (!backend_cuda_count(why, sizeof why) || !backend_cuda_start(0, false, why, sizeof why))
        FATAL(EXIT_ENVIRONMENT, "%s", why);
    if (argc > 1)
        text = read_file(argv[1], &n);
    deck_read(&j->deck, argc > 1 ? argv[1] : "tiny", text ? text : tiny, n, argc > 2 ? argc - 2 : 0,
              argv + 2, &e);
    deck_resolve(&j->deck, 1, &e);
    if (e.count == 0)
        topology_init(&j->topo, &j->deck, 1, 0, &e);
    if (e.count == 0)
        data_init(&j->data, &j->deck, DATA_TRAIN, &e);
    errors_print(&e);
    ASSERT(e.count == 0 && !j->topo.encoder.present);
    j->be = backend_select(&j->deck);
    j->be->stream_create(&j->stream, "compute");
    model_init(&j->model, &j->deck, &j->topo, j->be, &j->stream);
    arenas_init(&j->arenas);
    for (int pass = 0; pass < 2; pass++) {
        model_plan(&j->model, &j->arenas);
        if (pass == 0)
            arenas_commit(&j->arenas, j->be);
    }
    model_initialise(&j->model);
    for (int m = 0; m < MICROBATCHES; m++) {
        text_batch_init(&j->text[m], &j->data.limits, j->deck.batch.micro_batch_size);
        data_text(&j->data, 0, m, 0, 1, &j->text[m]);
    }
    j->image = tensor_2d(NULL, j->model.act, PLACE_DEVICE, 0, j->deck.language.hidden_size);
    free(text);
}

/* What the device is told for a micro-batch once it is loaded. */
static void compute(struct job *j)
{
    model_language_compute(&j->model, 0, &j->image, true);
    model_language_backward(&j->model, 0, false);
}

/* Every micro-batch, by calls or (graph) by replaying. */
static void iteration(struct job *j, cudaGraphExec_t graph)
{
    for (int m = 0; m < MICROBATCHES; m++) {
        model_language_load(&j->model, 0, &j->text[m], &j->image);
        if (graph)
            CHECK_CUDA(cudaGraphLaunch(graph, cuda_stream_of(&j->stream)));
        else
            compute(j);
    }
}

static size_t append(struct job *j, char *to, size_t at, struct tensor t)
{
    const size_t bytes = (size_t)tensor_numel(&t) * dtype_bytes(t.dtype);
    struct tensor host = tensor_1d(to ? to + at : NULL, t.dtype, PLACE_HOST, tensor_numel(&t));
    if (to && bytes > 0)
        j->be->copy(&j->stream, &t, &host);
    return at + bytes;
}

/* All that an iteration leaves, on the host; to = NULL: its bytes. */
static size_t results(struct job *j, char *to)
{
    size_t n = append(j, to, 0, model_loss_sum(&j->model));
    n = append(j, to, n, model_balance_metric(&j->model));
    for (int i = 0; i < j->model.n_moe; i++)
        n = append(j, to, n, model_tokens_per_expert(&j->model, i));
    for (int i = 0; i < j->model.n_params; i++)
        if (j->model.param[i].trainable)
            n = append(j, to, n, j->model.param[i].grad);
    j->be->stream_sync(&j->stream);
    return n;
}

static void zero(struct job *j)
{
    model_zero_grads(&j->model);
    model_zero_accumulators(&j->model);
    for (int i = 0; i < j->model.n_moe; i++) {
        const struct tensor count = model_tokens_per_expert(&j->model, i);
        j->be->fill(&j->stream, &count, 0.0);
    }
}

static char *outcome(struct job *j, cudaGraphExec_t graph)
{
    char *all = xmalloc(results(j, NULL), 1);
    zero(j);
    iteration(j, graph);
    results(j, all);
    return all;
}

static cudaGraphExec_t capture(struct job *j, size_t *nodes)
{
    cudaGraph_t graph;
    cudaGraphExec_t ready;
    CHECK_CUDA(
        cudaStreamBeginCapture(cuda_stream_of(&j->stream), cudaStreamCaptureModeThreadLocal));
    compute(j);
    CHECK_CUDA(cudaStreamEndCapture(cuda_stream_of(&j->stream), &graph));
    CHECK_CUDA(cudaGraphGetNodes(graph, NULL, nodes));
    CHECK_CUDA(cudaGraphInstantiate(&ready, graph, 0));
    CHECK_CUDA(cudaGraphDestroy(graph));
    return ready;
}

/* Milliseconds of a micro-batch, on the device and of the host's calls. */
static void time_it(struct job *j, const char *name, cudaGraphExec_t graph)
{
    cudaEvent_t start, stop;
    struct timespec a, b;
    float ms;
    CHECK_CUDA(cudaEventCreate(&start));
    CHECK_CUDA(cudaEventCreate(&stop));
    iteration(j, graph);
    j->be->stream_sync(&j->stream);
    clock_gettime(CLOCK_MONOTONIC, &a);
    CHECK_CUDA(cudaEventRecord(start, cuda_stream_of(&j->stream)));
    for (int i = 0; i < REPEATS; i++)
        iteration(j, graph);
    CHECK_CUDA(cudaEventRecord(stop, cuda_stream_of(&j->stream)));
    clock_gettime(CLOCK_MONOTONIC, &b);
    j->be->stream_sync(&j->stream);
    CHECK_CUDA(cudaEventElapsedTime(&ms, start, stop));
    printf("# %s: %.3f ms a micro-batch, %.3f ms of the host\n", name,
           ms / (REPEATS * MICROBATCHES),
           1e3 * ((double)(b.tv_sec - a.tv_sec) + 1e-9 * (double)(b.tv_nsec - a.tv_nsec)) /
               (REPEATS * MICROBATCHES));
    CHECK_CUDA(cudaEventDestroy(start));
    CHECK_CUDA(cudaEventDestroy(stop));
}

int main(int argc, char **argv)
{
    struct job j;
    size_t nodes = 0;
    int failed = 0;
    job_open(&j, argc, argv);
    /* plans are made at the first use of a shape, which a capture must not be */
    free(outcome(&j, NULL));
    char *plain = outcome(&j, NULL), *again = outcome(&j, NULL);
    const size_t n = results(&j, NULL);
    const bool repeats = memcmp(plain, again, n) == 0;
    printf("%s - two iterations by calls, %zu bytes of results\n", repeats ? "ok" : "not ok", n);
    failed += !repeats;
    cudaGraphExec_t graph = capture(&j, &nodes);
    for (int i = 0; i < 2; i++) {
        char *replayed = outcome(&j, graph);
        size_t first = 0;
        while (first < n && replayed[first] == plain[first])
            first++;
        printf("%s - replay %d of a graph of %zu nodes", first == n ? "ok" : "not ok", i + 1,
               nodes);
        printf(first == n ? "\n" : ", differs from byte %zu on\n", first);
        failed += first != n;
        free(replayed);
    }
    time_it(&j, "calls", NULL);
    time_it(&j, "graph", graph);
    time_it(&j, "calls", NULL);
    time_it(&j, "graph", graph);
    CHECK_CUDA(cudaGraphExecDestroy(graph));
    free(plain);
    free(again);
    for (int m = 0; m < MICROBATCHES; m++)
        text_batch_free(&j.text[m]);
    data_free(&j.data);
    model_free(&j.model);
    arenas_free(&j.arenas, j.be);
    j.be->stream_destroy(&j.stream);
    topology_free(&j.topo);
    deck_free(&j.deck);
    printf("# gpu_graph: %d failed\n", failed);
    return failed ? 1 : 0;
}
