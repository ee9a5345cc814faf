/* bridge.h - picture embeddings from the encoder grid to the language grid, gradients back.
 *
 * The micro-batch of an encoder lane and of a language lane are cut into parts of whole samples,
 * one part for each lane of the other side that it shares samples with: several encoder lanes feed
 * one language lane (fan-in) or one encoder lane feeds several (fan-out), always in lane order.
 * Both sides know from their own data how many rows every part has; the counts that the encoder
 * side announces (host plane) must agree with them, a difference is fatal and names both. Gradients
 * are cut by the same counts. Nothing is sent for zero rows.
 *
 * Embeddings are the same on all tp ranks of an encoder lane: one of them, the holder of the part,
 * sends. Of a language lane tp rank 0 receives, the others need no embeddings and get an empty
 * tensor; it alone sends the gradient back, to the holder, and the encoder lane's tp ranks share
 * it. Every rank of both boundary stages makes the same calls. Colocated lanes use the local calls,
 * where the holder is the receiver itself whenever it is in the lane; with equal lanes of one rank
 * both are the identity, without copies.
 */
#ifndef MIMO_BRIDGE_H
#define MIMO_BRIDGE_H

#include "model.h"

struct bridge;

/* Parts, holders and peers of this rank. Needs an encoder grid. Local. */
struct bridge *bridge_init(const struct deck *deck, const struct topology *topo,
                           const struct comm_ops *comm, const struct backend_ops *be,
                           struct stream *stream);
/* Buffers of the largest micro-batch: received embeddings per language slot, received gradients.
 * Local. */
void bridge_plan(struct bridge *b, struct arenas *arenas);
/* Disjoint grids. Encoder side: e [rows, H], rows_per_sample [samples] of this lane's batch.
 * Language side: rows expected for this lane's samples; returns the view [rows, H] of the slot (tp
 * rank 0; else no rows). de: of the slot's rows, read on tp rank 0. The gradient [rows, H] is
 * returned on every encoder tp rank. Collective over the lanes that share samples. */
void bridge_send_forward(struct bridge *b, int slot, const struct tensor *e,
                         const int64_t *rows_per_sample, int64_t samples);
struct tensor bridge_recv_forward(struct bridge *b, int slot, const int64_t *rows_per_sample,
                                  int64_t samples);
void bridge_send_backward(struct bridge *b, int slot, const struct tensor *de);
struct tensor bridge_recv_backward(struct bridge *b, int slot);
/* Both directions at once (1F1B's steady state), all messages started before any is waited for.
 * Collective like the above. */
struct tensor bridge_send_forward_recv_backward(struct bridge *b, int slot, const struct tensor *e,
                                                const int64_t *rows_per_sample, int64_t samples,
                                                int backward_slot);
struct tensor bridge_send_backward_recv_forward(struct bridge *b, int slot, const struct tensor *de,
                                                int forward_slot, const int64_t *rows_per_sample,
                                                int64_t samples);
/* Colocated grids, one slot: the embeddings of this rank's encoder lane become those of its
 * language lane, and back; e must live as long as the result. Collective over the lanes that share
 * samples. */
struct tensor bridge_local_forward(struct bridge *b, const struct tensor *e,
                                   const int64_t *encoder_rows, int64_t encoder_samples,
                                   const int64_t *language_rows, int64_t language_samples);
struct tensor bridge_local_backward(struct bridge *b, const struct tensor *de);
/* What the compute stream is given from here on may overwrite the embeddings that were sent from
 * this slot; the gradient that was sent. Local. */
void bridge_embedding_free(struct bridge *b, int slot);
void bridge_gradient_free(struct bridge *b);
void bridge_free(struct bridge *b);

#endif
