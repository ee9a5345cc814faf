/* test_sample.c - documents from the parts of a sample: captions, interleaved documents,
 * conversations, and what is wrong with broken ones (sample.h).
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>
#include "sample.h"
#include "scratch.h"
#include "shard.h"
#include "tar_build.h"

static struct shard_set docs;
static struct sample doc;

static void read_doc(const char *member, const char *content, bool ok, const char *expected)
{
    struct tar t = { 0 };
    struct errors errors = { 0 };
    char name[64], why[512] = "", text[1024] = "";
    tar_text(&t, "k.10.jpg", "ten");
    tar_text(&t, "k.2.png", "two");
    tar_text(&t, "k.thumb.jpg", "no number");
    snprintf(name, sizeof name, "k.%s", member);
    tar_text(&t, name, content);
    tar_text(&t, "k.jpg", "none");
    tar_end(&t);
    tar_write(&t, file("doc.tar"));
    shard_init(&docs, file("doc.tar"), "deck.nml:1:1: error: data.train_data_path", &errors);
    assert_int_equal(errors.count, 0);
    const bool got = sample_read(&doc, &docs, 0, "<img>", "</img>", why, sizeof why);
    if (got != ok)
        fail_msg("%s gives %d: %s", content, got, why);
    if (!ok) {
        if (!strstr(why, expected))
            fail_msg("'%s' lacks '%s'", why, expected);
    } else {
        for (int64_t i = 0; i < doc.n_items; i++) {
            snprintf(text + strlen(text), sizeof text - strlen(text), "%.*s",
                     (int)doc.item[i].length, doc.text + doc.item[i].text);
            if (i + 1 < doc.n_items)
                snprintf(text + strlen(text), sizeof text - strlen(text), "[%s]",
                         shard_part_name(&docs, shard_parts(&docs, 0) + doc.item[i].part));
        }
        assert_string_equal(text, expected);
        assert_int_equal(doc.item[doc.n_items - 1].part, -1);
    }
    shard_free(&docs);
}

static void a_caption_follows_the_pictures_in_numeric_order(void **state)
{
    read_doc("json", "{\"caption\": \"a cat\", \"width\": 3}", true,
             "<img>[jpg]</img><img>[2.png]</img><img>[10.jpg]</img>a cat");
    assert_int_equal(doc.kind, SAMPLE_CAPTION);
    read_doc("txt", "a dog\n", true,
             "<img>[jpg]</img><img>[2.png]</img><img>[10.jpg]</img>a dog\n");
}

static void interleaved_documents_keep_their_order(void **state)
{
    read_doc(
        "json",
        "{\"texts\": [\"one\", null, \"two\", \"three\"], \"images\": [null, \"10.jpg\", null, null], \"caption\": \"x\"}",
        true, "one<img>[10.jpg]</img>two\nthree");
    assert_int_equal(doc.kind, SAMPLE_INTERLEAVED);
    read_doc("json", "{\"texts\": [\"one\"], \"images\": []}", false,
             "texts has 1 entries and images 0");
    read_doc("json", "{\"texts\": [\"one\"], \"images\": [\"jpg\"]}", false, "place 0");
    read_doc("json", "{\"texts\": [null], \"images\": [null]}", false, "place 0");
    read_doc("json", "{\"texts\": [null], \"images\": [\"9.jpg\"]}", false, "no part '9.jpg'");
    read_doc("json", "{\"texts\": [null], \"images\": [\"json\"]}", false, "is none");
}

static void conversations_are_sender_lines(void **state)
{
    read_doc(
        "json",
        "{\"caption\": \"x\", \"conversation\": [{\"sender\": \"user\", \"fragments\": [{\"t\": \"image\", \"value\": \"2.png\"},"
        "{\"t\": \"text\", \"value\": \"what?\"}]}, {\"sender\": \"assistant\", \"fragments\": [{\"t\": \"text\", \"value\": \"a cat\"}]}]}",
        true, "user: <img>[2.png]</img>what?\nassistant: a cat");
    assert_int_equal(doc.kind, SAMPLE_CONVERSATION);
    read_doc("json", "{\"conversation\": [{\"sender\": \"user\"}]}", false, "turn 0");
    read_doc(
        "json",
        "{\"conversation\": [{\"sender\": \"u\", \"fragments\": [{\"t\": \"video\", \"value\": \"2.png\"}]}]}",
        false, "fragment 0 of turn 0");
    read_doc("json", "{\"conversation\": {}}", false, "not a list");
}

static void broken_documents_say_why(void **state)
{
    read_doc("json", "{\"caption\": ", false, "line 1");
    read_doc("json", "[1]", false, "not an object");
    read_doc("json", "{\"caption\": 3}", false, "caption is not a string");
    read_doc("json", "{\"width\": 3}", false, "no caption");
    read_doc("json", "{\"caption\": \"a\", \"caption\": \"b\"}", false, "duplicate");
    read_doc("json", "{\"caption\": \"a\\u0000b\"}", false, "json");
    read_doc("txt", "\xc3(", false, "UTF-8");
    read_doc("txt", "\xed\xa0\x80", false, "UTF-8");
    read_doc("cls", "3", false, "no caption");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_caption_follows_the_pictures_in_numeric_order),
        cmocka_unit_test(interleaved_documents_keep_their_order),
        cmocka_unit_test(conversations_are_sender_lines),
        cmocka_unit_test(broken_documents_say_why),
    };
    return cmocka_run_group_tests(tests, scratch_setup, scratch_teardown);
}
