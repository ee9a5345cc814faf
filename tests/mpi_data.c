/* ranks: 1 2 4 8 */
/* mpi_data.c - positions of all streams from ranks that each read a part of them, as a checkpoint
 * needs them.
 *
 * Every rank is one language lane (odd ones also read pictures) of a data set with broken samples.
 */
#include "data_fixture.h"
#include "mpi_world.h"

static struct comm *world;

/* 40 samples, each fifth one broken. */
static void write_shard(const char *path)
{
    struct tar t = { 0 };
    for (int i = 0; i < 40; i++) {
        char name[32];
        snprintf(name, sizeof name, "k%02d.png", i);
        if (i % 5 == 2)
            tar_broken_png(&t, name, 24, 24);
        else
            tar_png(&t, name, 16, 8, (unsigned)i);
        snprintf(name, sizeof name, "k%02d.txt", i);
        tar_text(&t, name, "words");
    }
    tar_end(&t);
    tar_write(&t, path);
}

static void open_one(struct deck *deck, struct data *d, const char *dir, int lanes)
{
    char *path = xasprintf("data.train_data_path=%s/a.tar", dir),
         *tokenizer = xasprintf("data.tokenizer=%s/tokenizer.json", dir);
    open_good_deck(deck, 1, lanes,
                   (const char *const[]){ "data.dataset_provider=webdataset", path, tokenizer,
                                          "batch.global_batch_size=8", NULL });
    open_data(d, deck, DATA_TRAIN);
    free(path);
    free(tokenizer);
}

static void read_lane(struct data *d, int lane, int lanes, int iterations)
{
    struct text_batch b;
    open_text(&b, d);
    for (int i = 0; i < iterations; i++)
        for (int m = 0; m < 8 / lanes; m++)
            data_text(d, i, m, lane, lanes, &b);
    text_batch_free(&b);
}

static void gathered_positions_are_those_of_one_rank_that_reads_everything(void **state)
{
    char dir[64] = "/tmp/mimo_mpi_data_XXXXXX", command[128];
    struct deck deck;
    struct data mine, all;
    if (world->rank == 0) {
        assert_non_null(mkdtemp(dir));
        char path[128];
        snprintf(path, sizeof path, "%s/a.tar", dir);
        write_shard(path);
        snprintf(path, sizeof path, "%s/tokenizer.json", dir);
        write_tokenizer(path, true);
    }
    comm_host_broadcast(world, dir, sizeof dir, 0);
    open_one(&deck, &mine, dir, world->size);
    read_lane(&mine, world->rank, world->size, 5);
    data_gather_positions(&mine, world);
    data_init(&all, &deck, DATA_TRAIN, &(struct errors){ 0 });
    for (int lane = 0; lane < world->size; lane++)
        read_lane(&all, lane, world->size, 5);
    int64_t differ = 0;
    for (int64_t s = 0; s < 8; s++)
        differ += mine.position[s] != all.position[s] || mine.position[s] < 5;
    comm_host_reduce_i64(world, &differ, 1, COMM_SUM);
    data_free(&mine);
    data_free(&all);
    deck_free(&deck);
    comm_host_barrier(world);
    if (world->rank == 0) {
        snprintf(command, sizeof command, "rm -rf '%s'", dir);
        assert_int_equal(system(command), 0);
    }
    assert_int_equal(differ, 0);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(gathered_positions_are_those_of_one_rank_that_reads_everything),
    };
    world = mpi_world(&argc, &argv);
    if (!world)
        return EXIT_ENVIRONMENT;
    const int failed = cmocka_run_group_tests(tests, NULL, NULL);
    comm_finish(world);
    return failed;
}
