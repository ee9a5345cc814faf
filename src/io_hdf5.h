/* io_hdf5.h - what a run leaves in parallel HDF5: trace.h5, checkpoint.h5, batches.h5 (interface.md
 * 4). No layer is known here.
 *
 * trace.h5 is laid out once at its full length and afterwards overwritten in place by independent
 * transfers, so a kill at any moment hurts no valid row. A checkpoint is written under a temporary
 * name with independent transfers of each rank's slabs of the logical tensors, synced, renamed, and
 * only then named by the tracker. A failed write ends the job at once on the rank that saw it.
 */
#ifndef MIMO_IO_HDF5_H
#define MIMO_IO_HDF5_H

#include "lr.h"
#include "model.h"
#include "optim.h"

/* ---- trace ----------------------------------------------------------------------------------- */
enum trace_section {
    TRACE_FORWARD,
    TRACE_BACKWARD,
    TRACE_BRIDGE_WAIT,
    TRACE_GRAD_SYNC,
    TRACE_OPTIMIZER,
    TRACE_DATA_WAIT,
    TRACE_AGREEMENT,
    TRACE_SECTIONS
};

/* of one iteration; written by rank 0 except ranks_* and tokens_per_expert */
struct trace_row {
    int64_t iteration, consumed_samples, num_tokens, num_zeros, images, patches;
    double lm_loss, grad_norm, learning_rate, weight_decay, seq_load_balancing_loss, params_norm;
    double iteration_seconds, tokens_per_second, tflops_per_gpu, model_tflops_per_gpu;
    double language_tflops_per_gpu;
    int8_t skipped;
    /* [moe layer, expert] on rank 0 (of the global batch); NULL elsewhere */
    const int64_t *tokens_per_expert;
    /* of this rank */
    float section_seconds[TRACE_SECTIONS];
    int64_t peak_bytes, device_peak_bytes, gemm_flops, sent_bytes;
};

struct trace;
/* Create (or continue) <path> with n_rows rows for iterations first..; `start_row` valid rows are
 * kept (a resumed run), longer runs are rewritten by temporary name and rename. n_eval = most
 * validation rows. Collective over the world. */
struct trace *trace_open(const char *path, const struct deck *deck, const struct topology *topo,
                         int n_moe, int64_t n_rows, int64_t start_row, int64_t n_eval,
                         const int64_t *arena_bytes /* [ARENA_COUNT] of this rank */);
/* Overwrite row `row` (0-based) and, when every rank has written its columns, /rows. Independent
 * transfers. Collective over the world. */
void trace_write(struct trace *t, int64_t row, const struct trace_row *values);
/* Append (or overwrite the same iteration's) validation row; rank 0's values count. Local. */
void trace_write_eval(struct trace *t, int64_t iteration, double lm_loss, double lm_loss_ablated);
/* What was written is on disk, whatever happens to the machine. Local: what this rank wrote. */
void trace_sync(const struct trace *t);
void trace_close(struct trace *t); /* Collective over the world */

/* ---- checkpoint ------------------------------------------------------------------------------ */
struct train_state {
    int64_t iteration; /* completed iterations */
    int64_t consumed_train_samples, consumed_valid_samples, skipped_train_samples;
    struct lr_schedule lr; /* all fields are stored */
    int64_t optim_step;
    int64_t n_train_streams, n_valid_streams;
    int64_t *train_position, *valid_position; /* owned by the data streams; restored in place */
};

/* <save>/iter_%07d/checkpoint.h5 and the tracker. One of this iteration that lies there already is
 * replaced if it is this run's own, else kept as iter_%07d.1, .2, ...; both are said. Collective
 * over the world. */
void checkpoint_save(const char *save, const struct deck *deck, const struct topology *topo,
                     struct model *model, const struct train_state *state, bool with_optimizer,
                     bool own);
/* One line about checkpoints in a directory without tracker, which a new run does not go on from.
 * For rank 0. Local. */
void checkpoint_warn_untracked(const char *save);
/* Data-parallel replicas of every parameter hold the same bits, or the job ends with EXIT_NUMERICS:
 * before anything is saved. Collective over the world. */
void checkpoint_check_replicas(const struct topology *topo, const struct model *model);
/* World rank of a replica that differs from most, -1 when none does; the parameter's index on that
 * rank, and a rank with the usual bits. The same on all ranks. Collective over the world. */
int checkpoint_odd_replica(const struct topology *topo, const struct model *model, int *param,
                           int *usual);
/* The iteration to load from <load>: the tracker's if its checkpoint verifies, else the newest
 * older one that does, with warnings; ckpt_step >= 0: that one or none. -1 when there is no
 * tracker, or none can be used: all that was refused is collected (EXIT_CHECKPOINT). Collective
 * over the world. */
int64_t checkpoint_find(const char *load, int64_t ckpt_step, const struct topology *topo,
                        struct errors *errors);
struct checkpoint_options {
    bool model_only;
    bool no_optimizer;
    bool finetune;
};
/* Every tensor is accounted for both ways; missing, unexpected and wrong-shape names are all listed
 * (EXIT_CHECKPOINT); the stored layout must equal this job's for now. On return *has_optimizer says
 * whether masters and moments were restored. Collective over the world. */
void checkpoint_load(const char *load, int64_t iteration, const struct deck *deck,
                     const struct topology *topo, struct model *model, struct train_state *state,
                     const struct checkpoint_options *options, bool *has_optimizer,
                     struct errors *errors);
/* Delete iter_ directories by keep_last and save_retain_interval, never the one the tracker names.
 * Rank 0 acts. Collective over the world. */
void checkpoint_retain(const char *save, int64_t keep_last, int64_t retain_interval,
                       const struct topology *topo);

/* ---- batches --------------------------------------------------------------------------------- */
struct batch_dump;
/* batches.h5: one group per dumped iteration; language lanes write ids, labels, mask, keys; encoder
 * ranks write tiles, patches, cpe of the samples they served; rows in the order of the global batch
 * (m*D + d)*mbs + b. */
/* Collective over the world */
struct batch_dump *batch_dump_open(const char *path, const struct deck *deck,
                                   const struct topology *topo);
/* Collect this rank's micro-batch m (either may be NULL). Local. */
void batch_dump_add(struct batch_dump *d, int64_t m, const struct text_batch *text,
                    const struct picture_batch *pictures);
/* Collect the experts that this rank chose in micro-batch m: choice I32 [rows, E layers * K] on the
 * host, copied, for the tokens first .. first+rows-1 of the micro-batch (batch-major). Without E
 * layers there is nothing to collect. Local. */
void batch_dump_choice(struct batch_dump *d, int64_t m, int64_t first, int64_t rows,
                       const int32_t *choice);
/* Collect what the model made of micro-batch m: loss and log-sum-exp of each token [mbs * S]
 * (batch-major), copied; on one rank of a lane. Local. */
void batch_dump_loss(struct batch_dump *d, int64_t m, const double *loss, const double *lse);
/* Collect logits of micro-batch m [mbs * S, words], f32 or in an fp64 run f64, copied: those of the
 * vocabulary's words first .. first+words-1. Local. */
void batch_dump_logits(struct batch_dump *d, int64_t m, int64_t first, int64_t words,
                       const void *logits);
/* one iteration, 1-based; Collective over the world */
void batch_dump_write(struct batch_dump *d, int64_t iteration);
void batch_dump_close(struct batch_dump *d); /* Collective over the world */

/* mimo --inspect FILE; returns the exit status. Local, works without MPI started. */
int io_inspect(const char *path, FILE *out);

#endif
