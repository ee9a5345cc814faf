/* sample.c - documents from the parts of a sample. Text goes into one buffer; a picture closes the
 * current stretch of text. */
#include "sample.h"
#include <ctype.h>
#include <inttypes.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

struct build {
    struct sample *out;
    struct shard_set *set;
    const struct shard_part *part;
    int32_t n_parts;
    const char *before, *after;
    char *why;
    size_t why_size;
};

struct numbered {
    int64_t number;
    int32_t part;
};

static bool fail(struct build *b, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
static bool read_json(struct build *b, int64_t index, int32_t part, bool *found);
static bool read_conversation(struct build *b, const json_t *turns);
static bool read_interleaved(struct build *b, const json_t *texts, const json_t *images);
static bool read_caption(struct build *b, const char *text, size_t n);
static void add_text(struct build *b, const char *text, size_t n);
static void add_picture(struct build *b, int32_t part);
static bool add_named(struct build *b, const json_t *name);
static int32_t find_part(const struct build *b, const char *name);
static bool picture_number(const char *name, int64_t *number);
static bool is_utf8(const unsigned char *s, int64_t n);
static int compare_numbered(const void *a, const void *b);
static void close_stretch(struct sample *s, int32_t part);

bool sample_read(struct sample *out, struct shard_set *set, int64_t index, const char *before,
                 const char *after, char *why, size_t why_size)
{
    const struct shard_sample *s = &set->sample[index];
    struct build b = {
        out, set, shard_parts(set, index), s->n_parts, before, after, why, why_size
    };
    out->n_items = 0;
    out->text_used = 0;
    if (s->broken)
        return fail(&b, "%s", s->broken);
    bool found = false;
    const int32_t json = find_part(&b, "json"), txt = find_part(&b, "txt");
    if (json >= 0 && !read_json(&b, index, json, &found))
        return false;
    if (!found && txt >= 0) {
        if (!shard_read(set, index, &b.part[txt], SAMPLE_TEXT_MAX, &out->raw, &out->raw_capacity,
                        why, why_size))
            return false;
        if (!is_utf8(out->raw, b.part[txt].size))
            return fail(&b, "part txt is not UTF-8");
        if (!read_caption(&b, (const char *)out->raw, (size_t)b.part[txt].size))
            return false;
    } else if (!found) {
        return fail(&b, "it has no caption, texts, conversation or txt part");
    }
    close_stretch(out, -1);
    return true;
}

bool sample_is_picture(const char *part_name)
{
    const char *dot = strrchr(part_name, '.'), *ending = dot ? dot + 1 : part_name;
    return strcasecmp(ending, "jpg") == 0 || strcasecmp(ending, "jpeg") == 0 ||
           strcasecmp(ending, "png") == 0 || strcasecmp(ending, "webp") == 0;
}

const char *sample_kind_name(enum sample_kind kind)
{
    static const char *const name[SAMPLE_KINDS] = { "pictures with caption", "text", "interleaved",
                                                    "conversation" };
    return name[kind];
}

void sample_free(struct sample *s)
{
    free(s->item);
    free(s->text);
    free(s->raw);
    memset(s, 0, sizeof *s);
}

static bool fail(struct build *b, const char *fmt, ...)
{
    char text[512];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    printable(b->why, b->why_size, text);
    return false;
}

static bool read_json(struct build *b, int64_t index, int32_t part, bool *found)
{
    struct sample *out = b->out;
    if (!shard_read(b->set, index, &b->part[part], SAMPLE_TEXT_MAX, &out->raw, &out->raw_capacity,
                    b->why, b->why_size))
        return false;
    json_error_t error;
    json_t *root = json_loadb((const char *)out->raw, (size_t)b->part[part].size,
                              JSON_REJECT_DUPLICATES, &error);
    /* jansson says nothing where an allocation inside it fails; the sample may be whole. */
    if (!root && (json_error_code(&error) == json_error_out_of_memory || !error.text[0]))
        FATAL(EXIT_ENVIRONMENT, "out of memory while reading a json part of %" PRId64 " bytes",
              b->part[part].size);
    if (!root)
        return fail(b, "part json, line %d: %s", error.line, error.text);
    const json_t *conversation = json_object_get(root, "conversation"),
                 *texts = json_object_get(root, "texts");
    const json_t *images = json_object_get(root, "images"),
                 *caption = json_object_get(root, "caption");
    bool ok = true;
    *found = true;
    if (!json_is_object(root))
        ok = fail(b, "part json is not an object");
    else if (conversation && !json_is_null(conversation))
        ok = read_conversation(b, conversation);
    else if (json_is_array(texts) && json_is_array(images))
        ok = read_interleaved(b, texts, images);
    else if (json_is_string(caption))
        ok = read_caption(b, json_string_value(caption), json_string_length(caption));
    else if (caption && !json_is_null(caption))
        ok = fail(b, "caption is not a string");
    else
        *found = false;
    json_decref(root);
    return ok;
}

/* "sender: fragments" lines. */
static bool read_conversation(struct build *b, const json_t *turns)
{
    if (!json_is_array(turns))
        return fail(b, "conversation is not a list");
    b->out->kind = SAMPLE_CONVERSATION;
    for (size_t i = 0; i < json_array_size(turns); i++) {
        const json_t *turn = json_array_get(turns, i), *sender = json_object_get(turn, "sender");
        const json_t *fragments = json_object_get(turn, "fragments");
        if (!json_is_string(sender) || !json_is_array(fragments))
            return fail(b, "turn %zu of conversation lacks sender (a string) or fragments (a list)",
                        i);
        if (i > 0)
            add_text(b, "\n", 1);
        add_text(b, json_string_value(sender), json_string_length(sender));
        add_text(b, ": ", 2);
        for (size_t k = 0; k < json_array_size(fragments); k++) {
            const json_t *fragment = json_array_get(fragments, k),
                         *value = json_object_get(fragment, "value");
            const char *type = json_string_value(json_object_get(fragment, "t"));
            if (type && strcmp(type, "text") == 0 && json_is_string(value))
                add_text(b, json_string_value(value), json_string_length(value));
            else if (!type || strcmp(type, "image") != 0 || !json_is_string(value))
                return fail(b, "fragment %zu of turn %zu is neither text nor image with a value", k,
                            i);
            else if (!add_named(b, value))
                return false;
        }
    }
    return true;
}

/* Exactly one of text and image at each place, in order; neighbouring texts are lines. */
static bool read_interleaved(struct build *b, const json_t *texts, const json_t *images)
{
    const size_t n = json_array_size(texts);
    if (json_array_size(images) != n)
        return fail(b, "texts has %zu entries and images %zu", n, json_array_size(images));
    b->out->kind = SAMPLE_INTERLEAVED;
    bool after_text = false;
    for (size_t i = 0; i < n; i++) {
        const json_t *text = json_array_get(texts, i), *image = json_array_get(images, i);
        if (json_is_string(text) && json_is_null(image)) {
            if (after_text)
                add_text(b, "\n", 1);
            add_text(b, json_string_value(text), json_string_length(text));
            after_text = true;
        } else if (json_is_null(text) && json_is_string(image)) {
            if (!add_named(b, image))
                return false;
            after_text = false;
        } else {
            return fail(b,
                        "place %zu must have a string in exactly one of texts and images, null in "
                        "the other",
                        i);
        }
    }
    return true;
}

/* All pictures in numeric order, a part without number first, then the caption. */
static bool read_caption(struct build *b, const char *text, size_t n)
{
    struct numbered *list = xmalloc((size_t)b->n_parts, sizeof *list);
    int32_t pictures = 0;
    for (int32_t i = 0; i < b->n_parts; i++) {
        int64_t number;
        if (picture_number(shard_part_name(b->set, &b->part[i]), &number))
            list[pictures++] = (struct numbered){ number, i };
    }
    qsort(list, (size_t)pictures, sizeof *list, compare_numbered);
    for (int32_t i = 0; i < pictures; i++)
        add_picture(b, list[i].part);
    free(list);
    b->out->kind = pictures > 0 ? SAMPLE_CAPTION : SAMPLE_TEXT;
    add_text(b, text, n);
    return true;
}

static void add_text(struct build *b, const char *text, size_t n)
{
    struct sample *s = b->out;
    if (s->text_used + n + 1 > s->text_capacity) {
        s->text_capacity = 2 * s->text_capacity + n + 4096;
        s->text = xrealloc(s->text, s->text_capacity, 1);
    }
    memcpy(s->text + s->text_used, text, n);
    s->text_used += n;
}

static void add_picture(struct build *b, int32_t part)
{
    add_text(b, b->before, strlen(b->before));
    close_stretch(b->out, part);
    add_text(b, b->after, strlen(b->after));
}

static bool add_named(struct build *b, const json_t *name)
{
    const int32_t part = find_part(b, json_string_value(name));
    if (part < 0)
        return fail(b, "it has no part '%s' for a picture", json_string_value(name));
    if (!sample_is_picture(shard_part_name(b->set, &b->part[part])))
        return fail(b, "part '%s' is used as a picture and is none", json_string_value(name));
    add_picture(b, part);
    return true;
}

static int32_t find_part(const struct build *b, const char *name)
{
    for (int32_t i = 0; i < b->n_parts; i++)
        if (strcmp(shard_part_name(b->set, &b->part[i]), name) == 0)
            return i;
    return -1;
}

/* jpg -> -1, 7.png -> 7; names that mean something else are no pictures of a caption. */
static bool picture_number(const char *name, int64_t *number)
{
    if (!sample_is_picture(name))
        return false;
    *number = -1;
    const char *dot = strchr(name, '.');
    if (!dot)
        return true;
    if (dot == name || dot - name > 9 || strchr(dot + 1, '.'))
        return false;
    for (const char *c = name; c < dot; c++)
        if (!isdigit((unsigned char)*c))
            return false;
    *number = strtoll(name, NULL, 10);
    return true;
}

/* Without surrogates and overlong forms. */
static bool is_utf8(const unsigned char *s, int64_t n)
{
    for (int64_t i = 0; i < n;) {
        const unsigned char c = s[i];
        const int more = c < 0x80                ? 0
                         : c >= 0xc2 && c < 0xe0 ? 1
                         : c >= 0xe0 && c < 0xf0 ? 2
                         : c >= 0xf0 && c < 0xf5 ? 3
                                                 : -1;
        if (more < 0 || i + more >= n)
            return false;
        for (int k = 1; k <= more; k++)
            if ((s[i + k] & 0xc0) != 0x80)
                return false;
        const unsigned char second = more ? s[i + 1] : 0;
        if ((c == 0xe0 && second < 0xa0) || (c == 0xed && second > 0x9f) ||
            (c == 0xf0 && second < 0x90) || (c == 0xf4 && second > 0x8f))
            return false;
        i += 1 + more;
    }
    return true;
}

static int compare_numbered(const void *a, const void *b)
{
    const struct numbered *x = a, *y = b;
    if (x->number != y->number)
        return x->number < y->number ? -1 : 1;
    return x->part < y->part ? -1 : x->part > y->part;
}

static void close_stretch(struct sample *s, int32_t part)
{
    if (s->n_items == s->item_capacity) {
        s->item_capacity = 2 * s->item_capacity + 16;
        s->item = xrealloc(s->item, (size_t)s->item_capacity, sizeof *s->item);
    }
    const size_t from =
        s->n_items > 0 ? s->item[s->n_items - 1].text + s->item[s->n_items - 1].length : 0;
    s->item[s->n_items++] = (struct sample_item){ from, s->text_used - from, part };
}
