/* ranks: 1 2 4 8 */
/* mpi_io_trace.c - trace and batch file on real grids: rows survive resuming, lengthening and
 * another number of ranks. */
#include "io_fixture.h"

/* ---- trace --------------------------------------------------------------------------------- */

static void write_rows(struct trace *t, const struct job *j, int64_t first, int64_t n)
{
    int64_t tokens[64];
    for (int64_t r = first; r < first + n; r++) {
        struct trace_row row = { .iteration = r + 1,
                                 .consumed_samples = 8 * (r + 1),
                                 .num_tokens = 1000 + r,
                                 .num_zeros = -1,
                                 .lm_loss = r == 2 ? NAN : 6.0 - 0.1 * (double)r,
                                 .grad_norm = 1.0 / (double)(r + 1),
                                 .params_norm = NAN,
                                 .skipped = r == 2,
                                 .peak_bytes = 1000 * world->rank + r,
                                 .device_peak_bytes = 7000 + world->rank };
        for (int i = 0; i < TRACE_SECTIONS; i++)
            row.section_seconds[i] = (float)(world->rank + 10 * i + 100 * r);
        int64_t per_row = 2 * j->deck.moe.num_experts;
        for (int64_t i = 0; i < per_row && i < 64; i++)
            tokens[i] = 100 * r + i;
        row.tokens_per_expert = world->rank == 0 ? tokens : NULL;
        trace_write(t, r, &row);
    }
}

/* Rows [0, n) of the file are what write_rows wrote; `ranks` of them wrote columns. */
static bool rows_are_right(const char *path, int64_t n, int64_t total, int ranks,
                           int64_t from_rank_row)
{
    hid_t file = io_open(path, false);
    int64_t rows = -1, shape[TENSOR_MAX_DIMS], start[2] = { 0, 0 }, count[2] = { n, 0 };
    bool ok = file >= 0 && io_get(file, "/rows", H5T_NATIVE_INT64, 1, &rows) && rows == n &&
              io_get_shape(file, "/iteration", shape) == 1 && shape[0] == total &&
              io_get_shape(file, "/ranks/backward_seconds", shape) == 2 && shape[0] == total &&
              shape[1] >= ranks;
    count[1] = shape[1];
    double *loss = xcalloc((size_t)n, sizeof *loss);
    float *seconds = xcalloc((size_t)(n * shape[1]), sizeof *seconds);
    hid_t a = H5Dopen2(file, "/lm_loss", H5P_DEFAULT),
          b = H5Dopen2(file, "/ranks/backward_seconds", H5P_DEFAULT);
    ok = ok && io_get_box(a, H5T_NATIVE_DOUBLE, 1, start, count, loss) &&
         io_get_box(b, H5T_NATIVE_FLOAT, 2, start, count, seconds);
    for (int64_t r = 0; ok && r < n; r++) {
        ok = r == 2 ? isnan(loss[r]) : loss[r] == 6.0 - 0.1 * (double)r;
        for (int64_t k = 0; ok && r >= from_rank_row && k < ranks; k++)
            ok = seconds[r * shape[1] + k] == (float)(k + 10 + 100 * r);
        for (int64_t k = ranks; ok && r >= from_rank_row && k < shape[1]; k++)
            ok = isnan(seconds[r * shape[1] + k]);
    }
    int64_t tokens[2 * 8] = { 0 };
    hid_t c = H5Dopen2(file, "/moe/tokens_per_expert", H5P_DEFAULT);
    ok = ok && io_get_box(c, H5T_NATIVE_INT64, 3, (int64_t[3]){ n - 1, 0, 0 },
                          (int64_t[3]){ 1, 2, 8 }, tokens);
    for (int i = 0; ok && i < 16; i++)
        ok = tokens[i] == 100 * (n - 1) + i;
    H5Dclose(a);
    H5Dclose(b);
    H5Dclose(c);
    H5Fclose(file);
    free(loss);
    free(seconds);
    return ok;
}

static int64_t eval_rows(const char *path)
{
    int64_t n = -1;
    hid_t file = io_open(path, false);
    io_get(file, "/eval/rows", H5T_NATIVE_INT64, 1, &n);
    H5Fclose(file);
    return n;
}

static void trace_is_laid_out_once_continued_and_lengthened(void **unused)
{
    struct job j;
    char path[IO_PATH];
    int64_t arena[ARENA_COUNT];
    struct stat before, after;
    bool ok = true;
    job_open(&j, world, "");
    for (int i = 0; i < ARENA_COUNT; i++)
        arena[i] = 10 * world->rank + i;
    in_scratch(path, "trace.h5");
    struct trace *t = trace_open(path, &j.deck, &j.topo, 2, 10, 0, 4, arena);
    trace_write_eval(t, 0, 6.5, 6.6);
    write_rows(t, &j, 0, 5);
    trace_write_eval(t, 5, 5.5, NAN);
    trace_write_eval(t, 5, 5.4, NAN); /* the same iteration again */
    write_rows(t, &j, 5, 2);
    trace_write_eval(t, 7, 5.0, NAN);
    comm_host_barrier(world);
    if (world->rank == 0)
        ok = rows_are_right(path, 7, 10, world->size, 0) && eval_rows(path) == 3 &&
             stat(path, &before) == 0; /* live */
    trace_close(t);
    agree(ok);

    t = trace_open(path, &j.deck, &j.topo, 2, 10, 5, 4, arena); /* resumed at iteration 5 */
    if (world->rank == 0)
        ok = rows_are_right(path, 5, 10, world->size, 0) && eval_rows(path) == 2 &&
             stat(path, &after) == 0 && before.st_ino == after.st_ino;
    agree(ok);
    write_rows(t, &j, 5, 5);
    trace_write_eval(t, 10, 4.9, 5.9);
    comm_host_barrier(world);
    if (world->rank == 0)
        ok = rows_are_right(path, 10, 10, world->size, 0);
    trace_close(t);
    agree(ok);

    t = trace_open(path, &j.deck, &j.topo, 2, 15, 10, 6, arena); /* a longer run */
    write_rows(t, &j, 10, 3);
    comm_host_barrier(world);
    if (world->rank == 0)
        ok = rows_are_right(path, 13, 15, world->size, 0) && eval_rows(path) == 3 &&
             stat(path, &after) == 0 && before.st_ino != after.st_ino;
    trace_close(t);
    agree(ok);
    job_close(&j);
}

static void trace_of_more_ranks_keeps_its_columns(void **unused)
{
    struct job j;
    char path[IO_PATH];
    int64_t arena[ARENA_COUNT] = { 1 };
    bool ok = true;
    job_open(&j, world, "");
    in_scratch(path, "ranks.h5");
    struct trace *t = trace_open(path, &j.deck, &j.topo, 2, 8, 0, 0, arena);
    write_rows(t, &j, 0, 4);
    trace_close(t);
    job_close(&j);
    struct comm *alone = comm_split(world, world->rank == 0 ? 0 : -1, "alone");
    if (alone) {
        job_open(&j, alone, "");
        t = trace_open(path, &j.deck, &j.topo, 2, 8, 4, 0, arena);
        ok = rows_are_right(path, 4, 8, world->size, 0);
        write_rows(t, &j, 4, 2);
        ok = ok && rows_are_right(path, 6, 8, 1, 4);
        trace_close(t);
        job_close(&j);
        comm_free(alone);
    }
    agree(ok);
}

/* A program that knows more datasets goes on with a trace of one that knew fewer. */
static void trace_of_an_older_program_is_completed(void **unused)
{
    static const char newer[] = "/ranks/device_peak_bytes";
    struct job j;
    char path[IO_PATH];
    int64_t arena[ARENA_COUNT] = { 1 }, bytes[5] = { 0 };
    bool ok = true;
    job_open(&j, world, "");
    in_scratch(path, "older.h5");
    struct trace *t = trace_open(path, &j.deck, &j.topo, 2, 8, 0, 0, arena);
    write_rows(t, &j, 0, 4);
    trace_close(t);
    if (world->rank == 0) {
        hid_t file = io_open(path, true);
        ok = file >= 0 && H5Ldelete(file, newer, H5P_DEFAULT) >= 0 && H5Fclose(file) >= 0;
    }
    agree(ok);
    t = trace_open(path, &j.deck, &j.topo, 2, 8, 4, 0, arena);
    write_rows(t, &j, 4, 1);
    trace_close(t);
    if (world->rank == 0) {
        ok = rows_are_right(path, 5, 8, world->size, 0);
        hid_t file = io_open(path, false), set = H5Dopen2(file, newer, H5P_DEFAULT);
        ok = ok && io_get_box(set, H5T_NATIVE_INT64, 2, (int64_t[2]){ 0, 0 }, (int64_t[2]){ 5, 1 },
                              bytes);
        for (int r = 0; ok && r < 5; r++)
            ok = bytes[r] == (r < 4 ? -1 : 7000);
        H5Dclose(set);
        H5Fclose(file);
    }
    agree(ok);
    job_close(&j);
}

static void trace_is_read_live_by_h5py(void **unused)
{
    struct job j;
    char path[IO_PATH], command[3 * IO_PATH];
    int64_t arena[ARENA_COUNT] = { 1 };
    bool ok = true, have = system("/usr/bin/python3 -c 'import h5py' > /dev/null 2>&1") == 0;
    int64_t all = have;
    comm_host_reduce_i64(world, &all, 1, COMM_MIN);
    if (!all)
        skip();
    job_open(&j, world, "");
    in_scratch(path, "live.h5");
    struct trace *t = trace_open(path, &j.deck, &j.topo, 2, 100, 0, 2, arena);
    write_rows(t, &j, 0, 4);
    comm_host_barrier(world);
    if (world->rank == 0) {
        snprintf(
            command, sizeof command,
            "/usr/bin/python3 -c \"\nimport h5py, math\nf = h5py.File('%s', 'r', locking=False)\n"
            "n = int(f['rows'][()])\nassert n == 4 and f.attrs['format'] == 'mimo-trace'\n"
            "assert list(f['iteration'][:n]) == [1, 2, 3, 4] and math.isnan(f['lm_loss'][2])\n"
            "assert f['ranks/forward_seconds'][3, %d] == 300 + %d\n"
            "assert list(f['ranks/arena_bytes'].attrs['arenas'])[0] == 'params'\n"
            "assert f['deck'].attrs['run.train_iters'] == '10' and b'&run' in f['deck/text'][()]\n"
            "assert f['code'].attrs['version']\n"
            "def check(name, x):\n    assert not isinstance(x, h5py.Dataset) or name == "
            "'deck/text' "
            "or (x.attrs['units'] and x.attrs['description']), name\n"
            "f.visititems(check)\n\"",
            path, world->size - 1, world->size - 1);
        ok = system(command) == 0;
    }
    trace_close(t);
    job_close(&j);
    agree(ok);
}

/* ---- batches ------------------------------------------------------------------------------- */

static void batches_lie_in_the_order_of_the_global_batch(void **unused)
{
    struct job j;
    char path[IO_PATH];
    bool ok = true;
    job_open(&j, world, "stage.training_stage=3");
    const int64_t gbs = 8, nmb = j.deck.derived.num_microbatches, S = j.deck.language.seq_length,
                  p = j.deck.vision.patch_dim;
    struct batch_dump *d = batch_dump_open(in_scratch(path, "batches.h5"), &j.deck, &j.topo);
    struct data_limits l = { .seq_length = S,
                             .max_patches_per_sample = 64,
                             .max_tiles_per_sample = 4 };
    struct text_batch text;
    struct picture_batch pictures;
    const int64_t whole = gbs / nmb, embs = j.deck.derived.encoder_microbatch;
    text_batch_init(&text, &l, 1);
    picture_batch_init(&pictures, &l, embs, 3 * p * p, false);
    for (int iteration = 1; iteration <= 2; iteration++) {
        for (int64_t m = 0; m < nmb; m++) {
            int64_t row = m * whole + j.topo.language.dp_rank;
            text.samples = 1;
            text.seq_length = S;
            for (int64_t s = 0; s < S; s++) {
                text.input_ids[s] = 1000 * row + s;
                text.labels[s] = 1000 * row + s + 1;
                text.loss_mask[s] = (float)(row + 100 * iteration);
            }
            snprintf(text.key[0], 256, "mock:%d", (int)row);
            pictures.samples = embs;
            pictures.tiles = pictures.patches = 0;
            for (int64_t s = 0; j.topo.encoder.member && s < embs; s++) {
                int64_t sample = m * whole + j.topo.encoder.dp_rank * embs + s;
                pictures.tiles_per_sample[s] = sample % 3; /* none for some */
                for (int64_t k = 0; k < sample % 3; k++, pictures.tiles++) {
                    pictures.tile_size[pictures.tiles][0] = (int32_t)((2 + k) * p);
                    pictures.tile_size[pictures.tiles][1] = (int32_t)(2 * p);
                    for (int c = 0; c < 4; c++)
                        pictures.cpe[pictures.tiles][c] = (double)(10 * sample + k);
                    for (int64_t n = 0; n < (2 + k) * 2; n++, pictures.patches++)
                        for (int64_t c = 0; c < 3 * p * p; c++)
                            ((float *)pictures.pixels)[pictures.patches * 3 * p * p + c] =
                                (float)(100 * sample + 10 * k);
                }
            }
            batch_dump_add(d, m, j.topo.language.member ? &text : NULL,
                           j.topo.encoder.member ? &pictures : NULL);
        }
        batch_dump_write(d, iteration);
    }
    batch_dump_close(d);
    d = batch_dump_open(path, &j.deck,
                        &j.topo); /* a resumed run keeps what is there and does an iteration anew */
    batch_dump_write(d, 3);
    batch_dump_write(d, 3);
    batch_dump_close(d);
    if (world->rank == 0) {
        hid_t file = io_open(path, false);
        int64_t ids[8 * 4096], shape[TENSOR_MAX_DIMS], tiles_per_sample[8];
        float mask[8 * 4096], *pixels = NULL;
        double cpe[4 * 16];
        char keys[8][256];
        hid_t key = H5Tcopy(H5T_C_S1);
        H5Tset_size(key, 256);
        H5Tset_strpad(key, H5T_STR_NULLPAD);
        H5Tset_cset(key, H5T_CSET_UTF8);
        ok = S <= 4096 &&
             io_get(file, "/iteration_000001/input_ids", H5T_NATIVE_INT64, gbs * S, ids) &&
             io_get(file, "/iteration_000002/loss_mask", H5T_NATIVE_FLOAT, gbs * S, mask) &&
             io_get(file, "/iteration_000001/tiles_per_sample", H5T_NATIVE_INT64, gbs,
                    tiles_per_sample) &&
             io_get(file, "/iteration_000001/sample_key", key, gbs, keys);
        for (int64_t r = 0; ok && r < gbs; r++) {
            char name[32];
            snprintf(name, sizeof name, "mock:%d", (int)r);
            ok = strcmp(keys[r], name) == 0 && tiles_per_sample[r] == r % 3;
            for (int64_t s = 0; ok && s < S; s++)
                ok = ids[r * S + s] == 1000 * r + s && mask[r * S + s] == (float)(r + 200);
        }
        ok = ok && io_get_shape(file, "/iteration_000002/patches", shape) == 2;
        if (ok) {
            pixels = xcalloc((size_t)(shape[0] * shape[1]), sizeof *pixels);
            ok = io_get(file, "/iteration_000002/patches", H5T_NATIVE_FLOAT, shape[0] * shape[1],
                        pixels) &&
                 io_get(file, "/iteration_000002/cpe", H5T_NATIVE_DOUBLE, 4 * 7, cpe);
        }
        for (int64_t r = 0, patch = 0, tile = 0; ok && r < gbs; r++)
            for (int64_t k = 0; ok && k < r % 3; k++, tile++) {
                ok = cpe[4 * tile + 3] == (double)(10 * r + k);
                for (int64_t n = 0; ok && n < (2 + k) * 2; n++, patch++)
                    ok = pixels[patch * 3 * p * p] == (float)(100 * r + 10 * k) &&
                         pixels[(patch + 1) * 3 * p * p - 1] == (float)(100 * r + 10 * k);
            }
        free(pixels);
        H5Tclose(key);
        H5Fclose(file);
    }
    agree(ok);
    text_batch_free(&text);
    picture_batch_free(&pictures);
    job_close(&j);
}

int main(int argc, char **argv)
{
    if (!fixture_start(&argc, &argv))
        return EXIT_ENVIRONMENT;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(trace_is_laid_out_once_continued_and_lengthened),
        cmocka_unit_test(trace_of_more_ranks_keeps_its_columns),
        cmocka_unit_test(trace_of_an_older_program_is_completed),
        cmocka_unit_test(trace_is_read_live_by_h5py),
        cmocka_unit_test(batches_lie_in_the_order_of_the_global_batch),
    };
    return fixture_finish(cmocka_run_group_tests(tests, NULL, NULL));
}
