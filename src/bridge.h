/* bridge.h - picture embeddings from the encoder grid to the language grid, gradients back.
 *
 * Leaders of the lanes exchange row counts (host plane) and then rows (device plane); several encoder ranks feed one lane (fan-in) or one
 * encoder rank feeds several lanes (fan-out), always in lane order, sample by sample. Both sides know from their own data how many rows
 * every part has; the exchanged counts must agree with them, a difference is fatal and names both. Gradients are cut by the same counts.
 * Nothing is sent for zero rows.
 */
#ifndef MIMO_BRIDGE_H
#define MIMO_BRIDGE_H

#include "model.h"

struct bridge;

/* Buffers from model_max_image_rows: received embeddings per language slot, received gradients. Local. */
struct bridge *bridge_init(const struct deck *deck, const struct topology *topo, const struct comm_ops *comm,
                           const struct backend_ops *be, struct stream *stream);
void bridge_plan(struct bridge *b, struct arenas *arenas);
/* Encoder side: e [rows, H], rows_per_sample [samples] of this rank's batch. Language side: rows expected for this lane's samples; returns the
 * view [rows, H] of the slot. Collective over the leaders that talk to each other. */
void bridge_send_forward(struct bridge *b, int slot, const struct tensor *e, const int64_t *rows_per_sample, int64_t samples);
struct tensor bridge_recv_forward(struct bridge *b, int slot, const int64_t *rows_per_sample, int64_t samples);
void bridge_send_backward(struct bridge *b, int slot, const struct tensor *de);
struct tensor bridge_recv_backward(struct bridge *b, int slot);
/* Both directions at once (1F1B's steady state), all messages started before any is waited for. */
struct tensor bridge_send_forward_recv_backward(struct bridge *b, int slot, const struct tensor *e, const int64_t *rows_per_sample,
                                                int64_t samples, int backward_slot);
struct tensor bridge_send_backward_recv_forward(struct bridge *b, int slot, const struct tensor *de, int forward_slot,
                                                const int64_t *rows_per_sample, int64_t samples);
double bridge_take_wait_seconds(struct bridge *b);   /* and reset. Local. */
void bridge_free(struct bridge *b);

#endif
