/* ranks: 1 2 4 8 */
/* mpi_io.c - checkpoints on real grids: what is saved comes back bit for bit on any number of
 * ranks, and what is wrong is named. */
#include "io_fixture.h"

static bool told(const struct errors *e, const char *word)
{
    for (int i = 0; i < e->count; i++)
        if (strstr(e->line[i], word))
            return true;
    return false;
}

static const struct checkpoint_options plain = { false, false, false };

/* Load `name` into j; on rank 0 every word of the NULL-terminated list must stand in some error
 * line and nothing else may be wrong. */
static void expect_refusal(struct job *j, const char *name,
                           const struct checkpoint_options *options, const char *const *word)
{
    struct errors e = { 0 };
    char path[IO_PATH];
    bool has_optimizer, ok = true;
    int words = 0;
    checkpoint_load(in_scratch(path, name), 7, &j->deck, &j->topo, &j->model, &j->state, options,
                    &has_optimizer, &e);
    if (world->rank == 0) {
        for (; word[words]; words++)
            ok = ok && told(&e, word[words]);
        ok = ok && e.count == words && e.worst == EXIT_CHECKPOINT;
        for (int i = 0; !ok && i < e.count; i++)
            print_message("  said: %s\n", e.line[i]);
    }
    errors_free(&e);
    agree(ok);
}

static void save_here(struct job *j, const char *name)
{
    char path[IO_PATH];
    checkpoint_save(in_scratch(path, name), &j->deck, &j->topo, &j->model, &j->state, true, true);
}

static void p12_86_87_saved_and_loaded_is_bitwise_equal(void **unused)
{
    struct job j, k;
    struct errors e = { 0 };
    char path[IO_PATH];
    bool has_optimizer = false;
    job_open(&j, world, "");
    scribble(&j, 1);
    save_here(&j, "plain");
    job_open(&k, world, "");
    memset(k.train_position, 0, sizeof k.train_position);
    memset(k.valid_position, 0, sizeof k.valid_position);
    k.state = (struct train_state){ .n_train_streams = 3,
                                    .n_valid_streams = 2,
                                    .train_position = k.train_position,
                                    .valid_position = k.valid_position };
    int64_t found = checkpoint_find(in_scratch(path, "plain"), -1, &k.topo, &e);
    checkpoint_load(path, found, &k.deck, &k.topo, &k.model, &k.state, &plain, &has_optimizer, &e);
    for (int i = 0; i < e.count; i++)
        print_message("  said: %s\n", e.line[i]);
    bool ok = e.count == 0 && found == 7 && has_optimizer && scribbled(&k, 1, 4);
    ok = ok && memcmp(k.train_position, j.train_position, sizeof j.train_position) == 0 &&
         memcmp(k.valid_position, j.valid_position, sizeof j.valid_position) == 0 &&
         k.state.train_position == k.train_position;
    for (int i = 0; i < io_n_state_fields; i++)
        ok = ok && memcmp((char *)&k.state + io_state_fields[i].offset,
                          (char *)&j.state + io_state_fields[i].offset,
                          io_state_fields[i].kind == IO_STATE_INT ? sizeof(int) : 8) == 0;
    agree(ok);
    job_close(&j);
    job_close(&k);
}

static void fp64_run_comes_back_bitwise(void **unused)
{
    struct job j;
    struct errors e = { 0 };
    char path[IO_PATH];
    bool has = false;
    job_open(&j, world, "run.precision=fp64");
    scribble(&j, 5);
    save_here(&j, "fp64");
    scribble(&j, 6);
    checkpoint_load(in_scratch(path, "fp64"), 7, &j.deck, &j.topo, &j.model, &j.state, &plain, &has,
                    &e);
    agree(e.count == 0 && has && scribbled(&j, 5, 4) && j.model.param[0].value.dtype == DTYPE_F64);
    job_close(&j);
    job_open(&j, world, ""); /* and an fp32 run says so in one line */
    checkpoint_load(path, 7, &j.deck, &j.topo, &j.model, &j.state, &plain, &has, &e);
    agree(
        world->rank ||
        (e.count == 1 && told(&e, "was written with run.precision = 'fp64', this run has 'fp32'")));
    errors_free(&e);
    job_close(&j);
}

static void weights_only_and_without_optimizer(void **unused)
{
    struct job j, k;
    struct errors e = { 0 };
    char path[IO_PATH];
    bool has = true;
    job_open(&j, world, "");
    scribble(&j, 2);
    checkpoint_save(in_scratch(path, "bare"), &j.deck, &j.topo, &j.model, &j.state, false, true);
    for (int what = 0; what < 4; what++) {
        static const struct checkpoint_options option[4] = {
            { .finetune = true }, { .model_only = true }, { .no_optimizer = true }, { 0 }
        };
        job_open(&k, world, "");
        k.state.iteration = k.state.consumed_train_samples = k.state.lr.n = k.state.optim_step = 0;
        k.train_position[1] = 0;
        checkpoint_load(path, 7, &k.deck, &k.topo, &k.model, &k.state, &option[what], &has, &e);
        bool ok = e.count == 0 && !has && scribbled(&k, 2, 1);
        ok = ok && k.state.iteration == (what == 0 ? 0 : 7) &&
             k.state.consumed_train_samples == (what < 2 ? 0 : 56) &&
             k.train_position[1] == (what < 2 ? 0 : 101) && k.state.lr.n == (what < 3 ? 0 : 48);
        job_close(&k);
        agree(ok);
    }
    job_close(&j);
}

/* All of /model of two files is the same bytes. */
static bool same_model(const char *a, const char *b)
{
    hid_t x = io_open(a, false), y = io_open(b, false);
    struct io_manifest m = { 0 }, n = { 0 };
    struct errors e = { 0 };
    bool ok = x >= 0 && y >= 0 && io_manifest_get(a, x, &m, &e) && io_manifest_get(b, y, &n, &e);
    int64_t compared = 0, others = 0;
    for (int64_t i = 0; ok && i < n.n_paths; i++)
        others += strncmp(n.path[i], "/model/", 7) == 0;
    for (int64_t i = 0; ok && i < m.n_paths; i++) {
        int64_t s[TENSOR_MAX_DIMS];
        if (strncmp(m.path[i], "/model/", 7))
            continue;
        int ndim = io_get_shape(x, m.path[i], s);
        int64_t count = io_volume(ndim, s);
        float *p = xcalloc((size_t)count, sizeof *p), *q = xcalloc((size_t)count, sizeof *q);
        ok = io_get(x, m.path[i], H5T_NATIVE_FLOAT, count, p) &&
             io_get(y, m.path[i], H5T_NATIVE_FLOAT, count, q) &&
             memcmp(p, q, (size_t)count * sizeof *p) == 0;
        free(p);
        free(q);
        compared++;
    }
    ok = ok && compared == others && compared > 50;
    io_manifest_free(&m);
    io_manifest_free(&n);
    errors_free(&e);
    H5Fclose(x);
    H5Fclose(y);
    return ok;
}

static void p12_17_95_initial_weights_are_bitwise_equal_for_every_number_of_ranks(void **unused)
{
    struct job j;
    char a[IO_PATH], b[IO_PATH];
    job_open(&j, world, "");
    j.state.iteration = 0;
    save_here(&j, "initial");
    job_close(&j);
    struct comm *alone = comm_split(world, world->rank == 0 ? 0 : -1, "alone");
    bool ok = true;
    if (alone) {
        job_open(&j, alone, "");
        j.state.iteration = 0;
        save_here(&j, "initial-alone");
        job_close(&j);
        comm_free(alone);
        ok = same_model(checkpoint_file(a, "initial", 0), checkpoint_file(b, "initial-alone", 0));
    }
    agree(ok);
}

/* F32: one bit of one rank's copy of a parameter, whichever grid it is in. */
static void F32_a_flipped_bit_of_a_replica_is_found(void **unused)
{
    struct job j;
    int param = -1, usual = -1;
    job_open(&j, world, "");
    scribble(&j, 1);
    bool ok = checkpoint_odd_replica(&j.topo, &j.model, &param, &usual) == -1;
    for (int victim = 0; victim < world->size; victim++)
        for (int which = 0; which < 2; which++) {
            int64_t replicas = 0, index = which ? j.model.n_params - 1 : 0; /* of the victim */
            comm_host_broadcast(world, &index, sizeof index, victim);
            const struct param *p = &j.model.param[index < j.model.n_params ? index : 0];
            const struct grid *g = p->module == MODEL_LANGUAGE ? &j.topo.language : &j.topo.encoder;
            replicas = p->expert ? g->expt_dp_size : g->dp_size;
            comm_host_broadcast(world, &replicas, sizeof replicas, victim);
            unsigned char *byte = (unsigned char *)p->value.data + 13;
            if (world->rank == victim)
                *byte ^= 4;
            const int odd = checkpoint_odd_replica(&j.topo, &j.model, &param, &usual);
            if (world->rank == victim)
                *byte ^= 4;
            /* Of two nobody knows which is right: the higher one is named. */
            if (replicas == 1)
                ok = ok && odd == -1;
            else if (replicas == 2)
                ok = ok && (odd == victim || usual == victim) && odd > usual;
            else
                ok = ok && odd == victim && usual != victim;
            if (odd == world->rank)
                ok = ok && strcmp(j.model.param[param].name, p->name) == 0;
        }
    ok = ok && checkpoint_odd_replica(&j.topo, &j.model, &param, &usual) == -1;
    agree(ok);
    job_close(&j);
}

static void flip_byte(const char *path, const char *name, int64_t element)
{
    hid_t file = io_open(path, false), data = H5Dopen2(file, name, H5P_DEFAULT);
    haddr_t at = H5Dget_offset(data);
    H5Dclose(data);
    H5Fclose(file);
    int fd = open(path, O_RDWR);
    unsigned char byte;
    off_t where = (off_t)at + element * 4 + 1;
    CHECK_SYS(at != HADDR_UNDEF && pread(fd, &byte, 1, where) == 1, EXIT_INTERNAL, "test");
    byte ^= 4;
    CHECK_SYS(pwrite(fd, &byte, 1, where) == 1 && close(fd) == 0, EXIT_INTERNAL, "test");
}

static void flipped_bytes_are_named(void **unused)
{
    static const char one[] = "/model/language/decoder.layers.0.mixer.in_proj.weight";
    static const char two[] = "/optimizer/projector/encoder.weight/exp_avg_sq";
    struct job j;
    char path[IO_PATH];
    job_open(&j, world, "");
    save_here(&j, "flipped");
    if (world->rank == 0) {
        flip_byte(checkpoint_file(path, "flipped", 7), one, 1000);
        flip_byte(path, two, 5);
    }
    comm_host_barrier(world);
    expect_refusal(&j, "flipped", &plain, (const char *const[]){ one, two, NULL });
    bool ok = true;
    if (world->rank == 0) { /* the inspector sees them too */
        FILE *null = fopen("/dev/null", "w");
        ok = io_inspect(path, null) == EXIT_CHECKPOINT;
        fclose(null);
    }
    agree(ok);
    if (world->rank == 0) {
        flip_byte(path, one, 1000);
        flip_byte(path, two, 5);
        hid_t file = io_open(path, true),
              data = H5Dopen2(file, "/state/consumed_train_samples", H5P_DEFAULT);
        int64_t wrong = 57;
        H5Dwrite(data, H5T_NATIVE_INT64, H5S_ALL, H5S_ALL, H5P_DEFAULT, &wrong);
        H5Dclose(data);
        H5Fclose(file);
    }
    comm_host_barrier(world);
    expect_refusal(&j, "flipped", &plain,
                   (const char *const[]){ "/state is missing or damaged", NULL });
    job_close(&j);
}

static void m6_02_p12_94_every_mismatched_tensor_is_listed(void **unused)
{
    struct job j;
    char path[IO_PATH];
    job_open(&j, world, "");
    save_here(&j, "edited");
    if (world->rank == 0) {
        hid_t file = io_open(checkpoint_file(path, "edited", 7), true), type = io_type(DTYPE_F64),
              f32 = io_type(DTYPE_F32);
        int64_t three[1] = { 3 }, hidden[1] = { 64 };
        static const char *const gone[] = {
            "/model/language/decoder.final_norm.weight", "/model/projector/encoder.weight",
            "/model/language/decoder.layers.0.mixer.D",
            "/model/language/decoder.layers.0.mixer.in_proj.layer_norm_weight",
            "/optimizer/language/output_layer.weight/master"
        };
        for (size_t i = 0; i < 5; i++)
            IO_WRITE(path, gone[i], H5Ldelete(file, gone[i], H5P_DEFAULT));
        io_put(path, file, gone[2], f32, 1, three, NULL, NULL, NULL);   /* wrong shape */
        io_put(path, file, gone[3], type, 1, hidden, NULL, NULL, NULL); /* wrong type */
        H5Lcreate_soft("/model/language/output_layer.weight", file, gone[0], H5P_DEFAULT,
                       H5P_DEFAULT);
        H5Lcreate_external("other.h5", "/x", file, gone[1], H5P_DEFAULT, H5P_DEFAULT);
        io_put(path, file, "/model/language/decoder.layers.99.mixer.D", f32, 1, three, NULL, NULL,
               NULL);
        H5Tclose(type);
        H5Tclose(f32);
        H5Fclose(file);
    }
    comm_host_barrier(world);
    expect_refusal(&j, "edited", &plain,
                   (const char *const[]){
                       "/model/language/decoder.final_norm.weight: is a soft link",
                       "/model/language/decoder.final_norm.weight: missing",
                       "/model/projector/encoder.weight: is an external or user-defined link",
                       "/model/projector/encoder.weight: missing",
                       "decoder.layers.0.mixer.D: has shape [3], this model needs [",
                       "in_proj.layer_norm_weight: has type another type, this model needs float32",
                       "/model/language/decoder.layers.99.mixer.D: unexpected",
                       "/optimizer/language/output_layer.weight/master: missing", NULL });
    job_close(&j);
}

static void copy_file(const char *from, const char *to, int64_t bytes)
{
    char text[3 * IO_PATH];
    snprintf(text, sizeof text, "head -c %lld '%s' > '%s'", (long long)bytes, from, to);
    CHECK_SYS(system(text) == 0, EXIT_INTERNAL, "%s", text);
}

static void unusable_files_are_refused(void **unused)
{
    struct job j;
    char path[IO_PATH], keep[IO_PATH];
    job_open(&j, world, "");
    save_here(&j, "bad");
    checkpoint_file(path, "bad", 7);
    in_scratch(keep, "kept.h5");
    static const char *const said[] = {
        "cannot open",       "is incomplete", "is no checkpoint of mimo",
        "format version 99", "symbolic link", "No such file"
    };
    if (world->rank == 0)
        CHECK_SYS(rename(path, keep) == 0, EXIT_INTERNAL, "test");
    for (int what = 0; what < 6; what++) {
        if (world->rank == 0) {
            struct stat st;
            CHECK_SYS(stat(keep, &st) == 0, EXIT_INTERNAL, "test");
            unlink(path);
            if (what < 4)
                copy_file(keep, path, what == 0 ? st.st_size / 2 : st.st_size);
            if (what == 4)
                CHECK_SYS(symlink(keep, path) == 0, EXIT_INTERNAL, "test");
            if (what >= 1 && what <= 3) {
                hid_t file = io_open(path, true);
                H5Adelete(file, what == 1 ? "complete" : what == 2 ? "format" : "format_version");
                if (what == 2)
                    io_attr_string(path, file, "format", "mimo-trace");
                if (what == 3)
                    io_attr_i64(path, file, "format_version", 99);
                H5Fclose(file);
            }
        }
        comm_host_barrier(world);
        expect_refusal(&j, "bad", &plain, (const char *const[]){ said[what], NULL });
    }
    job_close(&j);
}

static void p12_89_another_model_or_streams_are_refused_with_both_values(void **unused)
{
    struct job j, k;
    char path[IO_PATH];
    job_open(&j, world, "");
    save_here(&j, "other");
    job_open(&k, world, "moe.moe_router_topk=3");
    expect_refusal(
        &k, "other", &plain,
        (const char *const[]){ "was written with moe.moe_router_topk = 2, this run has 3", NULL });
    job_close(&k);
    j.state.n_train_streams = 2;
    expect_refusal(
        &j, "other", &plain,
        (const char *const[]){ "positions of 3 training streams, this run reads 2", NULL });
    j.state.n_train_streams = 3;
    j.state.n_valid_streams = 0; /* validation switched off is no reason */
    struct errors e = { 0 };
    bool has = false;
    checkpoint_load(in_scratch(path, "other"), 7, &j.deck, &j.topo, &j.model, &j.state, &plain,
                    &has, &e);
    agree(e.count == 0 && has);
    struct comm *alone = comm_split(world, world->rank == 0 ? 0 : -1, "alone");
    bool ok = true;
    if (alone && world->size > 1) {
        job_open(&k, alone, "");
        has = false;
        checkpoint_load(path, 7, &k.deck, &k.topo, &k.model, &k.state, &plain, &has, &e);
        ok = e.count == 0 && has; /* another layout is no reason */
        job_close(&k);
    }
    if (alone)
        comm_free(alone);
    errors_free(&e);
    agree(ok);
    job_close(&j);
}

static void write_text(const char *path, const char *text)
{
    FILE *f = fopen(path, "w");
    CHECK_SYS(f && fputs(text, f) >= 0 && fclose(f) == 0, EXIT_INTERNAL, "%s", path);
}

static void tracker_is_checked(void **unused)
{
    struct job j;
    char dir[IO_PATH], path[IO_PATH];
    job_open(&j, world, "");
    save_here(&j, "tracked");
    in_scratch(dir, "tracked");
    in_scratch(path, "tracked/latest_checkpointed_iteration.txt");
    static const struct {
        const char *text;
        int64_t step, found;
        const char *said;
    } test[] = {
        { "7\n", -1, 7, NULL },
        { "7", -1, 7, NULL },
        /* stale or unreadable: the newest that is there */
        { "12\n", -1, 7, NULL },
        { "release\n", -1, 7, NULL },
        { "", -1, 7, NULL },
        { "7 8", -1, 7, NULL },
        { "-7", -1, 7, NULL },
        { "99999999999999999999", -1, 7, NULL },
        /* never a newer one than it says */
        { "6\n", -1, -1, "holds no checkpoint that can be used" },
        { NULL, -1, -1, NULL },
        { NULL, 7, 7, NULL },
        { "7\n", 3, -1, "checkpoint.ckpt_step names a checkpoint that cannot be used" },
    };
    for (size_t i = 0; i < sizeof test / sizeof test[0]; i++) {
        struct errors e = { 0 };
        if (world->rank == 0) {
            if (test[i].text)
                write_text(path, test[i].text);
            else
                unlink(path);
        }
        comm_host_barrier(world);
        bool ok = checkpoint_find(dir, test[i].step, &j.topo, &e) == test[i].found;
        if (world->rank == 0)
            ok = ok && (test[i].said ? e.count == 2 && told(&e, test[i].said) : e.count == 0);
        if (!ok)
            print_message("  case %zu\n", i);
        errors_free(&e);
        agree(ok);
    }
    job_close(&j);
}

/* robustness.md 4.4.7: each damage is found by verifying, and the next older one is taken. */
static void the_newest_checkpoint_that_verifies_is_found(void **unused)
{
    static const char tensor[] = "/optimizer/projector/encoder.weight/exp_avg_sq";
    struct job j;
    char dir[IO_PATH], path[IO_PATH];
    job_open(&j, world, "");
    for (j.state.iteration = 1; j.state.iteration <= 5; j.state.iteration++)
        checkpoint_save(in_scratch(dir, "fallback"), &j.deck, &j.topo, &j.model, &j.state, true,
                        true);
    for (int64_t left = 5; left >= 0; left--) {
        struct errors e = { 0 };
        bool ok = checkpoint_find(dir, -1, &j.topo, &e) == (left ? left : -1);
        if (world->rank == 0)
            ok = ok && (left ? e.count == 0 : e.count == 6 && told(&e, tensor));
        if (!ok)
            print_message("  left %d, %d lines\n", (int)left, e.count);
        errors_free(&e);
        agree(ok);
        if (world->rank == 0 && left > 0) {
            checkpoint_file(path, "fallback", left);
            if (left == 5)
                flip_byte(path, tensor, 3);
            if (left == 4)
                CHECK_SYS(truncate(path, 5000) == 0, EXIT_INTERNAL, "test");
            if (left == 3)
                write_text(path, "");
            if (left == 2)
                CHECK_SYS(unlink(path) == 0, EXIT_INTERNAL, "test");
            if (left == 1) {
                hid_t file = io_open(path, true);
                H5Adelete(file, "complete");
                H5Fclose(file);
            }
        }
        comm_host_barrier(world);
    }
    job_close(&j);
}

static int entries(const char *name, const char *prefix)
{
    char path[IO_PATH];
    int n = 0;
    DIR *d = opendir(in_scratch(path, name));
    for (struct dirent *e; d && (e = readdir(d)) != NULL;)
        n += strncmp(e->d_name, prefix, strlen(prefix)) == 0;
    if (d)
        closedir(d);
    return n;
}

static bool exists(const char *name)
{
    char path[IO_PATH];
    return access(in_scratch(path, name), F_OK) == 0;
}

static void p12_94_retention_keeps_last_interval_and_tracked(void **unused)
{
    struct job j;
    char dir[IO_PATH], path[IO_PATH];
    bool ok = true;
    job_open(&j, world, "");
    for (j.state.iteration = 1; j.state.iteration <= 6; j.state.iteration++)
        checkpoint_save(in_scratch(dir, "kept"), &j.deck, &j.topo, &j.model, &j.state, false, true);
    if (world->rank == 0) {
        ok = mkdir(in_scratch(path, "kept/iter_0000009"), 0777) == 0 /* newer than the tracker */
             && symlink("/tmp", in_scratch(path, "kept/iter_0000000")) == 0;
    }
    checkpoint_retain(dir, 0, 0, &j.topo);
    if (world->rank == 0)
        ok = ok && entries("kept", "iter_") == 8;
    checkpoint_retain(dir, 2, 3, &j.topo);
    if (world->rank == 0)
        ok = ok && entries("kept", "iter_") == 5 && exists("kept/iter_0000003") &&
             exists("kept/iter_0000005") && exists("kept/iter_0000006") &&
             exists("kept/iter_0000009") && exists("kept/iter_0000000") &&
             entries("kept", ".trash") == 0;
    agree(ok);
    checkpoint_retain(dir, 0, 4, &j.topo);
    if (world->rank == 0)
        ok = entries("kept", "iter_") == 3 && exists("kept/iter_0000006");
    agree(ok);
    job_close(&j);
}

static void saving_an_iteration_again_replaces_it_and_leftovers_go(void **unused)
{
    struct job j;
    struct errors e = { 0 };
    char dir[IO_PATH], path[IO_PATH];
    bool has, ok = true;
    job_open(&j, world, "");
    scribble(&j, 3);
    save_here(&j, "again");
    if (world->rank == 0) {
        char name[IO_PATH], host[300];
        gethostname(host, sizeof host);
        host[strcspn(host, "/")] = 0;
        snprintf(name, sizeof name, "again/.tmp-iter_0000003-%s-999999999",
                 host); /* of a process that is gone */
        ok = mkdir(in_scratch(path, name), 0777) == 0;
        strcat(path, "/checkpoint.h5");
        write_text(path, "torn");
        snprintf(name, sizeof name, "again/.latest_checkpointed_iteration.txt-%s-999999999", host);
        write_text(in_scratch(path, name), "3");
        snprintf(name, sizeof name,
                 "again/.tmp-iter_0000004-another-host-1"); /* maybe alive elsewhere */
        ok = ok && mkdir(in_scratch(path, name), 0777) == 0;
    }
    scribble(&j, 4);
    save_here(&j, "again");
    scribble(&j, 0);
    checkpoint_load(in_scratch(dir, "again"), 7, &j.deck, &j.topo, &j.model, &j.state, &plain, &has,
                    &e);
    ok = ok && e.count == 0 && scribbled(&j, 4, 4);
    if (world->rank == 0)
        ok = ok && entries("again", ".tmp-iter_0000004") == 1 && entries("again", ".") == 3 &&
             entries("again", "iter_") == 1;
    agree(ok);
    job_close(&j);
}

static void inspector_reads_a_good_file_and_refuses_foreign_ones(void **unused)
{
    struct job j;
    char path[IO_PATH], *text = NULL;
    size_t size = 0;
    bool ok = true;
    job_open(&j, world, "");
    save_here(&j, "inspected");
    if (world->rank == 0) {
        FILE *f = open_memstream(&text, &size);
        ok = io_inspect(checkpoint_file(path, "inspected", 7), f) == EXIT_OK;
        fclose(f);
        ok = ok && strstr(text, "mimo-checkpoint") && strstr(text, "iteration                7") &&
             strstr(text, "in_proj.weight") && strstr(text, "blocks agree with their checksums") &&
             strstr(text, "language.preset = 'tiny'") && strstr(text, "vocabulary 500");
        free(text);
        f = fopen("/dev/null", "w");
        write_text(in_scratch(path, "text.h5"), "no HDF5 at all\n");
        ok = ok && io_inspect(path, f) == EXIT_CHECKPOINT &&
             io_inspect("/nonexistent.h5", f) == EXIT_CHECKPOINT &&
             io_inspect("/tmp", f) == EXIT_CHECKPOINT;
        in_scratch(path, "foreign.h5");
        H5Fclose(io_create(path, false));
        ok = ok && io_inspect(path, f) == EXIT_CHECKPOINT;
        fclose(f);
    }
    agree(ok);
    job_close(&j);
}

static void bfloat16_is_read_by_h5py_as_float32(void **unused)
{
    char path[IO_PATH], command[3 * IO_PATH];
    bool ok = true;
    int64_t have = system("/usr/bin/python3 -c 'import h5py' > /dev/null 2>&1") == 0;
    comm_host_reduce_i64(world, &have, 1, COMM_MIN);
    if (!have)
        skip();
    if (world->rank == 0) {
        static const uint16_t bits[6] = { 0x3f80, 0xc049, 0x0000, 0x7f80, 0x0080, 0x4780 };
        const int64_t shape[1] = { 6 };
        hid_t file = io_create(in_scratch(path, "bf16.h5"), true), type = io_type(DTYPE_BF16);
        io_put(path, file, "x", type, 1, shape, bits, NULL, NULL);
        ok = H5Tget_size(type) == 2;
        H5Tclose(type);
        H5Fclose(file);
        snprintf(command, sizeof command,
                 "/usr/bin/python3 -c \"\nimport h5py, numpy as np\nx = h5py.File('%s')['x'][:]\n"
                 "assert x.dtype == np.float32, x.dtype\n"
                 "assert list(x) == [1, -3.140625, 0, np.inf, 2.0 ** -126, 65536], list(x)\n\"",
                 path);
        ok = ok && system(command) == 0;
    }
    agree(ok);
}

int main(int argc, char **argv)
{
    if (!fixture_start(&argc, &argv))
        return EXIT_ENVIRONMENT;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(bfloat16_is_read_by_h5py_as_float32),
        cmocka_unit_test(p12_86_87_saved_and_loaded_is_bitwise_equal),
        cmocka_unit_test(fp64_run_comes_back_bitwise),
        cmocka_unit_test(weights_only_and_without_optimizer),
        cmocka_unit_test(p12_17_95_initial_weights_are_bitwise_equal_for_every_number_of_ranks),
        cmocka_unit_test(F32_a_flipped_bit_of_a_replica_is_found),
        cmocka_unit_test(flipped_bytes_are_named),
        cmocka_unit_test(m6_02_p12_94_every_mismatched_tensor_is_listed),
        cmocka_unit_test(unusable_files_are_refused),
        cmocka_unit_test(p12_89_another_model_or_streams_are_refused_with_both_values),
        cmocka_unit_test(tracker_is_checked),
        cmocka_unit_test(the_newest_checkpoint_that_verifies_is_found),
        cmocka_unit_test(p12_94_retention_keeps_last_interval_and_tracked),
        cmocka_unit_test(saving_an_iteration_again_replaces_it_and_leftovers_go),
        cmocka_unit_test(inspector_reads_a_good_file_and_refuses_foreign_ones),
    };
    return fixture_finish(cmocka_run_group_tests(tests, NULL, NULL));
}
