/* test_cli.c - the command line: every option, overrides, what is refused and how; the deck's text
 * from files and pipes. */
#include "test_deck.h"
#include "path_hint.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "cli.h"

enum { ARGUMENTS = 8 };

struct parsed {
    struct cli cli;
    struct errors errors;
};

static void parse(struct parsed *p, const char *const *arguments)
{
    const char *argv[ARGUMENTS + 2] = { "mimo" };
    int argc = 1;
    while (argc <= ARGUMENTS && arguments[argc - 1]) {
        argv[argc] = arguments[argc - 1];
        argc++;
    }
    memset(p, 0, sizeof *p);
    cli_parse(&p->cli, argc, (char *const *)(uintptr_t)argv, &p->errors);
}

static void done(struct parsed *p)
{
    cli_free(&p->cli);
    errors_free(&p->errors);
}

#define ARGS(...) ((const char *const[]){ __VA_ARGS__, NULL })

static void no_arguments_mean_a_run_from_standard_input(void **state)
{
    struct parsed p;
    parse(&p, (const char *const[]){ NULL });
    assert_int_equal(p.errors.count, 0);
    assert_int_equal(p.cli.action, CLI_RUN);
    assert_null(p.cli.deck);
    assert_true(cli_needs_deck(&p.cli));
    assert_string_equal(cli_deck_name(&p.cli), "<stdin>");
    done(&p);
}

static void deck_and_overrides_in_order(void **state)
{
    struct parsed p;
    parse(&p, ARGS("input/x.nml", "run.seed=5", "run.output_dir=/a/b", "data.image_tag_type="));
    assert_int_equal(p.errors.count, 0);
    assert_string_equal(p.cli.deck, "input/x.nml");
    assert_int_equal(p.cli.n_overrides, 3);
    assert_string_equal(p.cli.overrides[1], "run.output_dir=/a/b");
    done(&p);
    parse(&p, ARGS("run.seed=5")); /* a deck from standard input, with overrides */
    assert_null(p.cli.deck);
    assert_int_equal(p.cli.n_overrides, 1);
    done(&p);
    parse(&p, ARGS("./odd=name.nml"));
    assert_string_equal(p.cli.deck, "./odd=name.nml");
    done(&p);
    parse(&p, ARGS("--check", "--", "--odd.nml"));
    assert_int_equal(p.errors.count, 0);
    assert_string_equal(p.cli.deck, "--odd.nml");
    done(&p);
    parse(&p, ARGS("-"));
    assert_int_equal(p.errors.count, 0);
    assert_null(p.cli.deck);
    done(&p);
}

static void every_option_sets_its_action(void **state)
{
    static const struct {
        const char *argument[4];
        enum cli_action action;
        bool deck;
    } cases[] = {
        { { "--check", "d.nml" }, CLI_CHECK, true },
        { { "--reference" }, CLI_REFERENCE, false },
        { { "--inspect", "f.h5" }, CLI_INSPECT, false },
        { { "--check-data", "d.nml" }, CLI_CHECK_DATA, true },
        { { "--show-sample", "3", "d.nml" }, CLI_SHOW_SAMPLE, true },
        { { "--doctor" }, CLI_DOCTOR, false },
        { { "--status", "run" }, CLI_STATUS, false },
        { { "--features" }, CLI_FEATURES, false },
        { { "--version" }, CLI_VERSION, false },
        { { "--help" }, CLI_HELP, false },
        { { "-h" }, CLI_HELP, false },
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct parsed p;
        parse(&p, cases[i].argument);
        assert_int_equal(p.errors.count, 0);
        assert_int_equal(p.cli.action, cases[i].action);
        assert_int_equal(cli_needs_deck(&p.cli), cases[i].deck);
        if (cases[i].deck)
            assert_string_equal(p.cli.deck, "d.nml");
        if (p.cli.action == CLI_SHOW_SAMPLE)
            assert_int_equal(p.cli.sample, 3);
        if (p.cli.action == CLI_INSPECT)
            assert_string_equal(p.cli.path, "f.h5");
        if (p.cli.action == CLI_STATUS)
            assert_string_equal(p.cli.path, "run");
        done(&p);
    }
    struct parsed p;
    parse(&p, ARGS("--check", "--ranks", "800", "d.nml", "run.seed=1"));
    assert_int_equal(p.errors.count, 0);
    assert_int_equal(p.cli.ranks, 800);
    done(&p);
    parse(&p, ARGS("d.nml", "--ranks=8", "--check"));
    assert_int_equal(p.errors.count, 0);
    assert_int_equal(p.cli.ranks, 8);
    done(&p);
}

static void mistakes_are_named(void **state)
{
    static const struct {
        const char *argument[6], *message;
    } cases[] = {
        { { "--chek", "d" },
          "command line: error: there is no option --chek; did you mean --check?" },
        { { "--quux" }, "command line: error: there is no option --quux; --help lists them" },
        { { "-x" }, "command line: error: there is no option -x; --help lists them" },
        { { "--check", "--ranks", "0" },
          "command line: error: --ranks 0: an integer from 1 on is expected" },
        { { "--check", "--ranks", "8x" },
          "command line: error: --ranks 8x: an integer from 1 on is expected" },
        { { "--check", "--ranks", "99999999999" },
          "command line: error: --ranks 99999999999: an integer from 1 on is expected" },
        { { "--check", "--ranks" }, "command line: error: --ranks: N is missing after it" },
        { { "--ranks", "4", "d" },
          "command line: error: --ranks is for --check and --plan; the launcher sets the ranks of a run" },
        { { "--show-sample", "-1", "d" },
          "command line: error: --show-sample -1: an integer from 0 on is expected" },
        { { "--inspect" }, "command line: error: --inspect: FILE is missing after it" },
        { { "--inspect", "--help" }, "command line: error: --inspect: FILE is missing after it" },
        { { "--check", "--reference" },
          "command line: error: --check and --reference exclude each other" },
        { { "--check", "--check" }, "command line: error: --check is given twice" },
        { { "--version=3" }, "command line: error: --version takes no value" },
        { { "--version", "d.nml" },
          "command line: error: --version takes no deck and no overrides" },
        { { "a.nml", "b.nml" },
          "command line: error: 'b.nml': there is already a deck, 'a.nml'; an override is group.key=value" },
        { { "" }, "command line: error: an argument is empty" },
        { { "--plan", "d.nml" },
          "command line: error: --plan: prediction of time and memory is not built yet" },
        { { "--export", "dir" }, "command line: error: --export: FILE is missing after it" },
        { { "--deck-from-hf" }, "command line: error: --deck-from-hf: DIR is missing after it" },
        { { "--check", "d", "--dtype", "fp64" }, "command line: error: --dtype is for --export" },
        { { "--export", "dir", "f.h5", "--dtype", "half" },
          "command line: error: --dtype half: bf16, fp32 or fp64 is expected" },
        { { "--version", "--shard-bytes", "5" },
          "command line: error: --shard-bytes is for --export" },
        { { "--export", "dir", "f.h5", "--shard-bytes", "0" },
          "command line: error: --shard-bytes 0: an integer from 1 on is expected" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct parsed p;
        parse(&p, cases[i].argument);
        assert_true(p.errors.count >= 1);
        assert_string_equal(p.errors.line[0], cases[i].message);
        assert_int_equal(p.errors.worst, EXIT_DECK);
        done(&p);
    }
}

static void help_names_every_option_and_exit_status(void **state)
{
    static const char *const words[] = { "--check",
                                         "--plan",
                                         "--ranks N",
                                         "--reference",
                                         "--inspect FILE",
                                         "--check-data",
                                         "--show-sample N",
                                         "--export DIR FILE",
                                         "--dtype TYPE",
                                         "--shard-bytes N",
                                         "--deck-from-hf DIR",
                                         "--doctor",
                                         "--status DIR",
                                         "--features",
                                         "--version",
                                         "--help",
                                         "group.key=value",
                                         "75" };
    char *text = NULL;
    size_t n;
    FILE *f = open_memstream(&text, &n);
    cli_print_help(f);
    fclose(f);
    for (size_t i = 0; i < sizeof words / sizeof words[0]; i++)
        assert_non_null(strstr(text, words[i]));
    free(text);
}

/* ---- the deck's text ------------------------------------------------------------------------- */

static char *read_deck(const char *path, size_t *length, struct errors *errors)
{
    struct cli cli = { .deck = path };
    return cli_read_deck_text(&cli, length, errors);
}

static void deck_text_from_a_file_is_its_bytes(void **state)
{
    char path[] = "/tmp/test_cli_XXXXXX";
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    assert_int_equal(write(fd, "&run\0/", 6), 6);
    close(fd);
    struct errors errors = { 0 };
    size_t length;
    char *text = read_deck(path, &length, &errors);
    assert_int_equal(errors.count, 0);
    assert_int_equal(length, 6);
    assert_memory_equal(text, "&run\0/", 6);
    free(text);
    assert_int_equal(truncate(path, DECK_FILE_MAX + 1), 0);
    assert_null(read_deck(path, &length, &errors));
    assert_true(has_error(&errors, "the deck is larger than 1048576 bytes"));
    errors_free(&errors);
    unlink(path);
}

static void unreadable_decks_are_named_with_the_reason(void **state)
{
    struct errors errors = { 0 };
    size_t length;
    assert_null(read_deck("/nonexistent/deck.nml", &length, &errors));
    assert_string_equal(
        errors.line[0],
        "/nonexistent/deck.nml: error: cannot open the deck: No such file or directory; "
        "there is no directory /nonexistent");
    assert_null(read_deck("/tmp", &length, &errors));
    assert_string_equal(errors.line[1], "/tmp: error: cannot read the deck: Is a directory");
    assert_null(read_deck("/dev/zero", &length, &errors)); /* endless */
    assert_string_equal(errors.line[2], "/dev/zero: error: the deck is larger than 1048576 bytes");
    assert_int_equal(errors.worst, EXIT_DECK);
    errors_free(&errors);
}

static void a_path_that_is_nearly_right_is_suggested(void **state)
{
    static const struct {
        const char *path, *hint;
    } test[] = {
        { "input/stag2.nml", "; did you mean input/stage2.nml?" },
        { "./inptu//stag2.nml", "; did you mean ./input//stage2.nml?" },
        { "src/refs/densee.c", "; did you mean src/ref/dense.c?" },
        { "/etc/psswd", "; did you mean /etc/passwd?" },
        { "input/quite_another.nml", "" },
        { "nowhere/at/all.nml", "; there is no directory nowhere" },
        { "input/sub/stage2.nml", "; there is no directory input/sub" },
        { "data/nothing\x1bhere", " (run `make data`)" },
        { "input/stage2.nml", "" },
        { "", "" },
    };
    char out[512];
    for (size_t i = 0; i < sizeof test / sizeof test[0]; i++)
        assert_string_equal(path_hint(test[i].path, out, sizeof out), test[i].hint);
    assert_string_equal(path_hint("no\x1bwhere/x", out, sizeof out),
                        "; there is no directory no\\x1bwhere");
    assert_string_equal(path_hint("input/stag2.nml", out, 12), "; did you m");
}

/* Run cli_read_deck_text in a child whose standard input is fd (-1: closed); returns its first
 * error or text. */
static void read_standard_input(int fd, char out[256])
{
    int answer[2];
    assert_int_equal(pipe(answer), 0);
    fflush(NULL);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        if (fd < 0)
            close(0);
        else
            dup2(fd, 0);
        struct errors errors = { 0 };
        size_t length;
        char *text = read_deck(NULL, &length, &errors);
        const char *say = errors.count ? errors.line[0] : text;
        ssize_t n = write(answer[1], say, errors.count ? strlen(say) : length < 255 ? length : 255);
        free(text);
        errors_free(&errors);
        _exit(n < 0);
    }
    close(answer[1]);
    size_t n = 0;
    for (ssize_t got; n < 255 && (got = read(answer[0], out + n, 255 - n)) > 0;)
        n += (size_t)got;
    out[n] = '\0';
    close(answer[0]);
    int status;
    waitpid(child, &status, 0);
    assert_int_equal(status, 0);
}

static void standard_input_closed_terminal_pipe_and_endless(void **state)
{
    char out[256];
    read_standard_input(-1, out);
    assert_string_equal(out, "<stdin>: error: cannot read the deck: Bad file descriptor");
    int pipes[2];
    assert_int_equal(pipe(pipes), 0);
    assert_int_equal(write(pipes[1], "&run /", 6), 6);
    close(pipes[1]);
    read_standard_input(pipes[0], out);
    assert_string_equal(out, "&run /");
    close(pipes[0]);
    int zero = open("/dev/zero", O_RDONLY);
    read_standard_input(zero, out);
    assert_string_equal(out, "<stdin>: error: the deck is larger than 1048576 bytes");
    close(zero);
    int terminal = posix_openpt(O_RDWR | O_NOCTTY);
    if (terminal < 0 || grantpt(terminal) || unlockpt(terminal))
        skip();
    int tty = open(ptsname(terminal), O_RDWR | O_NOCTTY);
    if (tty < 0)
        skip();
    read_standard_input(tty, out);
    assert_string_equal(out,
                        "<stdin>: error: no deck: call mimo DECK or mimo < DECK (mimo --help)");
    close(tty);
    close(terminal);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(no_arguments_mean_a_run_from_standard_input),
        cmocka_unit_test(deck_and_overrides_in_order),
        cmocka_unit_test(every_option_sets_its_action),
        cmocka_unit_test(mistakes_are_named),
        cmocka_unit_test(help_names_every_option_and_exit_status),
        cmocka_unit_test(deck_text_from_a_file_is_its_bytes),
        cmocka_unit_test(unreadable_decks_are_named_with_the_reason),
        cmocka_unit_test(a_path_that_is_nearly_right_is_suggested),
        cmocka_unit_test(standard_input_closed_terminal_pipe_and_endless),
    };
    return cmocka_run_group_tests_name("command line", tests, NULL, NULL);
}
