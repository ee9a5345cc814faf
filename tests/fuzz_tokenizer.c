/* fuzz_tokenizer.c - any bytes as a tokenizer.json, and behind the first NUL a text for it.
 *
 * Whatever is accepted must encode without an id of its own making, and decode what it encoded.
 */
#include "fuzz.h"

#include "tokenizer.h"

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    fuzz_start();
    return 0;
}

static void expect_encodes(struct tokenizer *t, const char *text, size_t n)
{
    int64_t *ids = NULL, capacity = 0;
    char why[512] = "", out[256];
    const int64_t count = tokenizer_encode(t, text, n, &ids, &capacity, why, sizeof why);
    if (count < 0)
        EXPECT(strnlen(why, sizeof why) > 0 && strnlen(why, sizeof why) < sizeof why);
    for (int64_t i = 0; i < count; i++)
        EXPECT(ids[i] >= 0 && ids[i] < tokenizer_size(t));
    if (count >= 0) {
        const size_t length = tokenizer_decode(t, ids, count, out, sizeof out);
        EXPECT(strnlen(out, sizeof out) <= length && strnlen(out, sizeof out) < sizeof out);
    }
    free(ids);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const char plain[] = "Hello, it's 1234 <image> \n\t \xc3\xa9\xf0\x9f\x99\x82</s>";
    const uint8_t *nul = size ? memchr(data, 0, size) : NULL;
    const size_t n = nul ? (size_t)(nul - data) : size;
    char why[512] = "";
    struct tokenizer *t = tokenizer_open(fuzz_file(data, n), why, sizeof why);
    if (!t) {
        fuzz_expect_line(why, sizeof why);
        return 0;
    }
    expect_encodes(t, plain, sizeof plain - 1);
    if (nul)
        expect_encodes(t, (const char *)nul + 1, size - n - 1);
    const int64_t id = tokenizer_id(t, "</s>");
    EXPECT(id >= -1 && id < tokenizer_size(t));
    EXPECT(!tokenizer_is_added(t, -1) && !tokenizer_is_added(t, tokenizer_size(t)));
    tokenizer_free(t);
    return 0;
}
