/* fuzz_hf_config.c - any bytes as the config.json of a Hugging Face directory, compared with a
 * deck.
 */
#include "fuzz.h"

#include <sys/stat.h>

#include "hf_config_internal.h"

static struct deck deck;
static char directory[64];

static void leave(void)
{
    char path[80];
    snprintf(path, sizeof path, "%s/config.json", directory);
    unlink(path);
    rmdir(directory);
}

/* A directory whose config.json is a link to the input in memory; the tiny preset's deck. */
int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    static const char text[] =
        "&run train_iters = 1 /\n&language preset = 'tiny' /\n&lr lr = 1 /\n";
    struct errors errors = { 0 };
    char path[80];
    fuzz_start();
    deck_read(&deck, "fuzz", text, strlen(text), 0, NULL, &errors);
    deck_resolve(&deck, 1, &errors);
    EXPECT(errors.count == 0);
    snprintf(directory, sizeof directory, "/tmp/mimo_fuzz_XXXXXX");
    EXPECT(mkdtemp(directory));
    snprintf(path, sizeof path, "%s/config.json", directory);
    EXPECT(symlink(fuzz_file((const uint8_t *)"", 0), path) == 0 && atexit(leave) == 0);
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct errors errors = { 0 }, notes = { 0 };
    fuzz_file(data, size);
    struct hf_config *c = hf_config_open(directory, &errors);
    EXPECT((c == NULL) == (errors.count > 0));
    for (int wanted = 1; c && wanted < 1 << MODEL_MODULES; wanted++) {
        bool want[MODEL_MODULES];
        struct hf_facts facts;
        for (int m = 0; m < MODEL_MODULES; m++)
            want[m] = wanted >> m & 1;
        hf_config_facts(c, want, &facts, &errors);
        EXPECT(facts.n >= 0 && facts.n <= HF_FACTS);
        for (int i = 0; i < facts.n; i++)
            EXPECT(facts.fact[i].row < DECK_ROWS && strlen(facts.fact[i].text) < 257 &&
                   *facts.fact[i].key);
        hf_config_check(c, &deck, want, &errors, &notes);
    }
    fuzz_expect_errors(&errors);
    for (int i = 0; i < notes.count; i++)
        fuzz_expect_line(notes.line[i], 1 << 16);
    hf_config_free(c);
    errors_free(&errors);
    errors_free(&notes);
    return 0;
}
