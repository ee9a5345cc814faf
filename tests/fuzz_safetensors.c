/* fuzz_safetensors.c - any bytes as a safetensors file (first byte 0), as a header alone that any
 * number of data bytes follow (1, then the number in two bytes), or as an index (2).
 *
 * What is accepted lies side by side inside its file, has sizes that multiply out, is found by its
 * name, and can be read to the last element. Every name goes through the table of Hugging Face
 * names.
 */
#include "fuzz.h"

#include "hf_directory.h"

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    fuzz_start();
    return 0;
}

static void expect_tensor(const struct safetensors_tensor *t)
{
    int64_t elements = 1;
    EXPECT(t->ndim >= 0 && t->ndim <= SAFETENSORS_DIMS &&
           strnlen(t->name, sizeof t->name) < sizeof t->name);
    for (int d = 0; d < t->ndim; d++) {
        EXPECT(t->shape[d] >= 0);
        elements *= t->shape[d];
    }
    EXPECT(elements == t->elements && t->at >= 0 && t->bytes >= 0);
    EXPECT(t->kind == SAFETENSORS_OTHER ||
           t->bytes == elements * (t->kind == SAFETENSORS_F64   ? 8
                                   : t->kind == SAFETENSORS_F32 ? 4
                                                                : 2));
}

static void expect_names(struct safetensors *s)
{
    struct hf_directory d = { .path = "fuzz", .s = *s };
    hf_directory_index(&d);
    for (int i = 0; i < s->n; i++) {
        char name[SAFETENSORS_NAME];
        const struct hf_found *f = &d.found[i];
        const struct safetensors_tensor *t = &s->tensor[f->index];
        const enum model_module m = (enum model_module)f->module;
        const char *group = hf_dropped(m, t->name, f->name), *why = hf_refused(m, f->name, t->type);
        EXPECT(m >= 0 && m <= MODEL_MODULES && strlen(f->name) < SAFETENSORS_NAME);
        EXPECT(hf_directory_find(&d, m, f->name) != NULL && (!group || *group) && (!why || *why));
        if (strlen(f->name) < SAFETENSORS_NAME - 40)
            hf_published(m, f->name, true, name);
    }
    free(d.found);
}

static void whole_file(const uint8_t *data, size_t size)
{
    struct errors errors = { 0 };
    struct safetensors s;
    if (safetensors_open(&s, fuzz_file(data, size), &errors)) {
        struct safetensors_access a = { .s = &s };
        double x[64];
        EXPECT(s.n_files == 1 && s.file[0].bytes == (int64_t)size);
        for (int i = 0; i < s.n; i++) {
            const struct safetensors_tensor *t = &s.tensor[i];
            expect_tensor(t);
            EXPECT(t->at >= 8 && t->at + t->bytes <= (int64_t)size &&
                   safetensors_find(&s, t->name) == t);
            EXPECT(i == 0 || strcmp(t[-1].name, t->name) < 0);
            for (int64_t at = 0; t->kind != SAFETENSORS_OTHER && at < t->elements; at += 64)
                EXPECT(safetensors_read(&a, t, at, t->elements - at < 64 ? t->elements - at : 64, x,
                                        &errors));
        }
        safetensors_close(&a, &errors);
        EXPECT(errors.count == 0);
        expect_names(&s);
    } else {
        EXPECT(errors.count > 0 && errors.worst == EXIT_CHECKPOINT);
        fuzz_expect_errors(&errors);
    }
    safetensors_free(&s);
    errors_free(&errors);
}

static void part(const uint8_t *data, size_t size, bool index)
{
    struct safetensors s = { .n = 0 };
    char why[2048] = "";
    int64_t end = 0, bytes = 0;
    if (!index && size >= 2) {
        bytes = data[0] + 256 * data[1];
        data += 2;
        size -= 2;
    }
    const bool ok = index ? safetensors_parse_index(&s, (const char *)data, size, why, sizeof why)
                          : safetensors_parse(&s, (const char *)data, size, bytes, why, sizeof why);
    for (int i = 0; ok && i < s.n; i++) {
        const struct safetensors_tensor *t = &s.tensor[i];
        if (index) {
            EXPECT(t->file >= 0 && t->file < s.n_files && !strchr(s.file[t->file].name, '/') &&
                   s.file[t->file].name[0] != '.');
        } else {
            expect_tensor(t);
            EXPECT(t->at == end);
            end += t->bytes;
        }
    }
    if (ok)
        EXPECT(index ? s.n > 0 : end == bytes);
    else
        fuzz_expect_line(why, sizeof why);
    safetensors_free(&s);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size == 0)
        return 0;
    if (data[0] % 3 == 0)
        whole_file(data + 1, size - 1);
    else
        part(data + 1, size - 1, data[0] % 3 == 2);
    return 0;
}
