#!/usr/bin/env python3
"""The command line from outside: options, decks from files and pipes, overrides, errors, the tables of --check, exit status.

Every call runs in a scratch directory, so that "nothing was started" can be seen: no file appears there.
"""
import os
import pty
import re
import resource
import subprocess
import time

import h5py
import numpy as np

from harness import ROOT, Mimo, Tap

INPUT = os.path.join(ROOT, "input")
# parameters: language, active per token, active without embedding, vision, projector, total (model.md 4)
NEMOTRON_20L = (11515677504, 1777290048, 1424968512, 651645440, 13762560, 12181085504)
NEMOTRON_54L = (31657765568, 3659901632, 3307580096, 651648000, 13762560, 32323176128)
FIRST_10 = (6115770176, 1246576448, 894254912, 0, 0, 6115770176)
FIRST_10_SEEING = (6115770176, 1246576448, 894254912, 651645440, 13762560, 6781178176)
TEXT_20L = (11515677504, 1777290048, 1424968512, 0, 0, 11515677504)
EXPERTS_64 = (6405638976, 1775913792, 1423592256, 0, 0, 6405638976)
TINY = (208752, 159600, 126832, 26944, 8192, 243888)
NANO_LANGUAGE = 31577937344
DECKS = {"mock_20l": (8, NEMOTRON_20L), "hel_9n": (72, NEMOTRON_54L), "hel_17n": (136, NEMOTRON_54L), "hel_33n": (264, NEMOTRON_54L),
         "hel_68n": (544, NEMOTRON_54L), "hel_100n": (800, NEMOTRON_54L), "mock_tiny": (1, TINY), "stage1": (8, TINY),
         "stage2": (8, TINY), "lm10": (1, FIRST_10), "lm20e64": (1, EXPERTS_64),
         "v1l1": (2, FIRST_10_SEEING), "v2l2": (4, NEMOTRON_20L), "l4": (4, TEXT_20L), "l8": (8, TEXT_20L)}
TEXT_ONLY = ("lm10", "lm20e64", "l4", "l8")
SECONDS = 5.0


class Cases:
    def __init__(self):
        self.tap, self.m = Tap(), Mimo()
        self.work = self.m.path("work")
        os.mkdir(self.work)

    def call(self, *arguments, **kw):
        return self.m.run(*arguments, cwd=self.work, limit=kw.pop("limit", 60), **kw)

    def expect(self, name, got, code, *needles, out=(), starts=None):
        """`needles` in stderr, `out` in stdout."""
        status, stdout, stderr = got
        fault = [] if status == code else ["status %s, not %s" % (status, code)]
        fault += ["stderr lacks '%s'" % n for n in needles if n not in stderr]
        fault += ["stdout lacks '%s'" % n for n in out if n not in stdout]
        if starts is not None and os.path.exists(os.path.join(self.work, starts)):
            fault.append("%s was made" % starts)
        return self.tap.result(not fault, name, "\n".join(fault) + "\n" + stderr[-1500:])


def one_error(stderr):
    return len([line for line in stderr.splitlines() if ": error: " in line])


def options(c):
    got = c.call("--help")
    c.expect("help_names_every_option", got, 0, out=["--check", "--plan", "--ranks N", "--reference", "--inspect FILE", "--check-data",
                                                     "--show-sample N", "--export", "--deck-from-hf", "--doctor", "--status DIR",
                                                     "--features", "--version", "exit status"])
    got = c.call("--version")
    c.expect("version_is_one_line", got, 0, out=["mimo 0."])
    c.tap.result(got[1].count("\n") == 1, "version_prints_nothing_else", got[1])
    got = c.call("--features")
    pairs = dict(line.split("=", 1) for line in got[1].splitlines() if "=" in line)
    c.expect("features_succeeds", got, 0)
    c.tap.result(all("=" in line for line in got[1].splitlines()) and
                 {"version", "git", "cuda", "nccl", "cudnn", "hdf5", "mpi", "libarchive"} <= set(pairs), "features_are_name_value_lines", got[1])
    c.tap.result("parallel" in pairs.get("hdf5", "") and all(pairs.values()), "features_say_that_hdf5_is_parallel", got[1])
    got = c.call("--reference")
    with open(os.path.join(INPUT, "reference.nml")) as f:
        c.tap.result(got[0] == 0 and got[1] == f.read(), "reference_is_input_reference_nml", "mimo --reference > input/reference.nml")
    text = got[1]
    got = c.call("--check", "-", "run.train_iters=1", "lr.lr=1", "language.preset=tiny", stdin=text)
    c.expect("reference_reads_as_a_deck", got, 0)
    doctor(c)
    for wrong, right in (("--chekc", "--check"), ("--rank", "--ranks"), ("--statsu", "--status"), ("--halp", "--help")):
        c.expect("unknown_option_%s_names_the_nearest" % wrong[2:], c.call(wrong), 2, "command line: error:", "did you mean %s?" % right)
    c.expect("unknown_option_far_from_all_points_to_help", c.call("--zzzzzzzzzzzz"), 2, "--help")
    for args, word in ((("--plan", os.path.join(INPUT, "mock_tiny.nml")), "--plan"),):
        got = c.call(*args)
        c.expect("%s_is_refused_by_name" % word[2:], got, 2, word, "not built")
        c.tap.result(one_error(got[2]) == 1, "%s_is_refused_in_one_line" % word[2:], got[2])
    got = c.call("--nope")
    c.expect("nothing_far_fetched_is_proposed", got, 2, "there is no option --nope; --help lists them")
    c.expect("ranks_alone_is_refused", c.call("--ranks", "4", os.path.join(INPUT, "mock_tiny.nml")), 2, "--ranks")
    for n in ("0", "-1", "x", "99999999999999999999"):
        c.expect("ranks_%s_is_refused" % n, c.call("--check", os.path.join(INPUT, "mock_tiny.nml"), "--ranks", n), 2, "--ranks")
    c.expect("two_decks_are_refused", c.call(os.path.join(INPUT, "mock_tiny.nml"), os.path.join(INPUT, "stage1.nml")), 2, "deck")
    c.expect("two_actions_are_refused", c.call("--version", "--help"), 2, "exclude")
    c.expect("inspect_without_a_file_is_refused", c.call("--inspect"), 2, "--inspect")


def doctor(c):
    """One page: a line for each subject, and a warning under each one that stands in the way of a run."""
    def page(name, *wanted, warned=(), env=None, cwd=None, limits=None):
        command, environment = c.m.command(["--doctor"], 0, env)
        p = subprocess.run(command, env=environment, cwd=cwd or c.work, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                           text=True, preexec_fn=limits)
        said = [x for x in p.stdout.splitlines() if x.startswith("  warning: ")]
        last = p.stdout.splitlines()[-1] if p.stdout else ""
        lacks = [w for w in wanted if not re.search("^%s: ." % w, p.stdout, re.M)] + [w for w in warned if not any(w in x for x in said)]
        counted = last == ("%d warning%s" % (len(said), "" if len(said) == 1 else "s") if said else "no warnings")
        c.tap.result(p.returncode == 0 and not lacks and counted and not p.stderr, name, "status %s, lacks %s\n%s%s" % (p.returncode, lacks, p.stdout,
                                                                                                              p.stderr))
        return p.stdout

    text = page("doctor_tells_about_the_machine", "version", "mpi", "hdf5", "blas", "host", "cores", "memory", "disk", "shared memory", "limits",
                "blas kernels", "hdf5 parallel", "yield", "launchers", "launcher", "gpu")
    c.tap.result("one rank" in text and "mpiexec" in text and len(text.splitlines()) < 60, "doctor_is_one_page_without_a_launcher", text)
    c.tap.result(not os.listdir(c.work), "doctor_leaves_nothing_behind", os.listdir(c.work))
    page("doctor_warns_of_a_foreign_launcher", warned=["linked with another MPI"], env={"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"})
    page("doctor_warns_of_srun_without_kill", warned=["kill-on-bad-exit"], env={"SLURM_NTASKS": "1", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0"})
    page("doctor_warns_where_nothing_can_be_written", warned=["nothing can be written here"], cwd="/proc")
    page("doctor_warns_without_mpiexec", warned=["neither mpiexec nor srun"], env={"PATH": "/nonexistent"})

    def tight():
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    page("doctor_warns_of_tight_limits", warned=["ulimit -n 1024", "ulimit -f unlimited"], limits=tight)
    got = c.call("--doctor", ranks=3)
    c.tap.result(got[0] == 0 and len(re.findall("^cores: ", got[1], re.M)) == 1 and re.search("^launcher: mpiexec, 3 ranks$", got[1], re.M),
                 "doctor_under_a_launcher_prints_once", got[1])
    secret = c.call("--doctor", env={"WANDB_API_KEY": "secretsecret"})
    c.tap.result("secretsecret" not in secret[1], "doctor_does_not_show_the_environment", secret[1])


def status(c):
    for code, text in ((0, "0 0 - 3 all iterations done"), (75, "75 0 - 7 stopped by a signal"), (7, "7 1 encoder 2 gradient norm is nan")):
        os.makedirs(c.m.path("s%d" % code), exist_ok=True)
        with open(c.m.path("s%d" % code, "EXIT"), "w") as f:
            f.write(text + "\n")
        c.expect("status_prints_and_exits_with_%d" % code, c.call("--status", c.m.path("s%d" % code)), code, out=[text])
    os.mkdir(c.m.path("none"))
    c.expect("status_without_EXIT_is_8", c.call("--status", c.m.path("none")), 8, out=["EXIT"])
    c.expect("status_of_no_directory_is_8", c.call("--status", c.m.path("absent")), 8, out=["EXIT"])
    with open(c.m.path("none", "EXIT"), "wb") as f:
        f.write(b"\x00\xff garbage")
    c.expect("status_of_a_garbage_EXIT_is_8", c.call("--status", c.m.path("none")), 8)


def deck_sources(c):
    tiny = os.path.join(INPUT, "mock_tiny.nml")
    with open(tiny) as f:
        text = f.read()
    by_file, by_stdin = c.call("--check", tiny), c.call("--check", stdin=text)
    body = lambda got: re.sub(r"^! echo of .*", "", got[1])
    c.tap.result(by_file[0] == by_stdin[0] == 0 and body(by_file) == body(by_stdin), "deck_by_argument_and_by_stdin_are_the_same",
                 by_file[2] + by_stdin[2])
    c.tap.result("<stdin>" in by_stdin[1].splitlines()[0], "echo_names_stdin", by_stdin[1][:200])
    got = c.call("--check", tiny, stdin="&nonsense /")
    c.expect("stdin_is_not_looked_at_beside_a_deck_argument", got, 0)
    got = c.call(stdin="")
    c.expect("empty_stdin_says_empty", got, 2, "<stdin>:1:1: error:", "empty")
    c.expect("a_deck_without_group_says_empty", c.call(stdin="! only a comment\n"), 2, "empty")
    c.expect("missing_deck_file", c.call("nofile.nml"), 2, "nofile.nml: error:", "No such file")
    c.expect("directory_as_deck", c.call(c.work), 2, "error:", "directory")
    c.expect("binary_stdin", c.call(stdin="\x7fELF\x02\x01\x01\x00\x03"), 2, "<stdin>:1:1: error:")
    with open(c.m.path("device"), "wb") as f:
        f.write(os.urandom(4096))
    c.expect("random_bytes_as_deck", c.call(c.m.path("device")), 2, "error:")
    c.expect("nul_device_as_deck", c.call("/dev/null"), 2, "empty")
    c.expect("endless_device_as_deck", c.call("/dev/zero"), 2, "error:")
    for title, shell in (("endless_pipe", "yes | exec \"$0\""), ("closed_stdin", "exec \"$0\" <&-"),
                         ("closed_stdin_and_stdout", "exec \"$0\" <&- >&-")):
        start = time.monotonic()
        try:
            p = subprocess.run(["sh", "-c", shell, c.m.binary], stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=15, text=True,
                               cwd=c.work, env=c.m.command((), 0, None)[1])
            got = p.returncode, p.stdout, p.stderr
        except subprocess.TimeoutExpired:
            got = "hang: killed after %.0f s" % (time.monotonic() - start), "", ""
        c.expect(title + "_ends_with_2", got, 2, "error:")
    outer, inner = pty.openpty()
    p = subprocess.Popen([c.m.binary], stdin=inner, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=c.work)
    try:
        stdout, stderr = p.communicate(timeout=25)
    except subprocess.TimeoutExpired:
        p.kill()
        stdout, stderr = p.communicate()
        stderr += "hang"
    os.close(outer)
    os.close(inner)
    c.expect("terminal_as_stdin_says_how_to_call", (p.returncode, stdout, stderr), 2, "mimo DECK", "mimo < DECK")
    c.tap.result(not os.listdir(c.work), "no_deck_error_leaves_a_file", os.listdir(c.work))


def overrides(c):
    tiny = os.path.join(INPUT, "mock_tiny.nml")
    good = (("run.title=two words", "title = 'two words'"), ("run.title='quoted'", "title = 'quoted'"),
            ('run.title="double"', "title = 'double'"), ("run.title=it's", "title = 'it''s'"), ("run.title=a=b", "title = 'a=b'"),
            ("run.title=", "title = ''"), ("RUN.Title=x", "title = 'x'"), ("lr.lr=2.5d-4", "lr = 0.00025"),
            ("log.log_params_norm=t", "log_params_norm = .true."), ("batch.iterations_to_skip=1,2", "iterations_to_skip = 1, 2"),
            ("language.preset=tiny", "preset = 'tiny'"), ("run.output_dir=/tmp/a b/c", "output_dir = '/tmp/a b/c'"))
    for override, echo in good:
        got = c.call("--check", tiny, override)
        line = [x for x in got[1].splitlines() if echo in x]
        c.tap.result(got[0] == 0 and line and line[0].rstrip().endswith("! command line"), "override_%s" % override, got[2])
    bad = (("run.titel=x", "did you mean title?"), ("rnu.title=x", "run"), ("nodot=3", "group.key=value"), ("run.train_iters=", "run.train_iters: value missing"),
           ("run.train_iters=1.5", "integer"), ("run.train_iters=1e3", "integer"), ("run.train_iters=-1", "1..1000000000"),
           ("lr.lr=x", "real"), ("lr.lr=nan", "real"), ("lr.lr=1e999", "lr.lr"), ("log.log_params_norm=1", "logical"),
           ("language.preset=tini", "tiny"), ("run.seed=99999999999999999999", "run.seed"), ("run.seed=4294967296", "run.seed"),
           ("run.title=" + "x" * 300, "run.title"), ("moe.moe_router_topk=160", "num_experts"), ("lr.=3", "error"), (".lr=3", "error"),
           ("=", "error"), ("run.train_iters=2,3", "run.train_iters"))
    for override, word in bad:
        got = c.call(tiny, override)
        c.expect("override_%s_is_refused" % override[:40], got, 2, "command line: error:", word, starts="run")
    got = c.call(tiny, *(bad[i][0] for i in (0, 1, 2, 3, 7, 10, 11, 12)))      # of as many keys: what is said twice is printed once
    c.tap.result(got[0] == 2 and one_error(got[2]) == 8, "eight_bad_overrides_give_eight_lines", got[2])
    got = c.call(tiny, "run.train_iters=4", "run.train_iters=5")
    c.expect("an_override_given_twice_is_refused", got, 2, "run.train_iters", starts="run")


def errors_together(c):
    deck = c.m.path("bad.nml")
    with open(deck, "w") as f:
        f.write("&run\n  train_itres = 5\n  seed = 1.5\n/\n&moe\n  moe_router_topk = 160\n/\n&languge\n/\n&lr\n  lr = 'x'\n/\n"
                "&language\n  preset = 'tiny'\n/\n&checkpoint save_interval = -3 /\n")
    got = c.call(deck, "batch.micro_batch_size=x")
    for needle in (":2:3: error: ", "did you mean train_iters?", ":3:10: error: ", "integer", ":8:1: error: ", "did you mean &language?",
                   ":11:8: error: ", "real", ":16:29: error: ", "command line: error: "):
        c.expect("all_errors_at_once_%s" % needle.strip(), got, 2, needle)
    c.tap.result(one_error(got[2]) >= 6 and all(re.match(r"(%s:\d+:\d+|command line): error: " % re.escape(deck), line)
                                                for line in got[2].splitlines() if "error: " in line),
                 "errors_are_in_compiler_style", got[2])
    got = c.call(deck, ranks=3)
    c.expect("errors_on_three_ranks_end_with_2", got, 2, ":2:3: error:")
    c.tap.result(got[2].count(":2:3: error:") == 1, "errors_are_printed_by_one_rank", got[2])
    with open(deck, "w") as f:
        f.write("&run train_iters = 1 /\n&language preset = 'tiny' /\n")
    got = c.call(deck)
    c.expect("a_deck_without_lr_names_it", got, 2, "lr.lr", starts="run")
    got = c.call(os.path.join(INPUT, "mock_tiny.nml"), "run.train_iters=0")
    c.expect("a_deck_without_length_names_it", got, 2, "train_iters", "train_samples", starts="run")


def section(text, first, last=None):
    lines = text.splitlines()
    at = next((i for i, x in enumerate(lines) if x.startswith(first)), None)
    if at is None:
        return []
    out = []
    for line in lines[at + 1:]:
        if not line.strip():
            break
        out.append(line)
    return out


def every_deck(c):
    decks = sorted(os.path.splitext(x)[0] for x in os.listdir(INPUT) if x.endswith(".nml") and x != "reference.nml")
    c.tap.result(decks == sorted(DECKS), "the_decks_of_input_are_the_known_ones", decks)
    built = ("mock_tiny", "stage1", "stage2")
    for name in decks:
        ranks, counts = DECKS.get(name, (1, None))
        start = time.monotonic()
        got = c.call("--check", os.path.join(INPUT, name + ".nml"), "--ranks", str(ranks))
        seconds = time.monotonic() - start
        lines = [x for x in got[2].splitlines() if ": error: " in x]
        if name in built:
            c.expect("check_%s" % name, got, 0)
        else:
            c.tap.result(got[0] in (0, 2) and (got[0] == 0) == (not lines) and all("not built yet" in x for x in lines),
                         "check_%s_refuses_only_what_is_not_built" % name, got[2])
        c.tap.result(seconds < SECONDS, "check_%s_takes_less_than_5_s" % name, "%.1f s" % seconds)
        numbers = [int(x.split()[-1]) for x in section(got[1], "parameters")]
        c.tap.result(tuple(numbers) == counts, "check_%s_counts_parameters" % name, "%s, not %s" % (numbers, counts))
        grids = re.findall(r"^grid (encoder|language)\s+ranks (\d+)-(\d+):", got[1], re.M)
        c.tap.result(len(grids) == 2 - (name in TEXT_ONLY) and grids[-1][2] == str(ranks - 1), "check_%s_prints_its_grids" % name, grids)
        lanes = re.search(r"^bridge \d+ encoder lanes? -> \d+ language lanes?", got[1], re.M)
        c.tap.result((lanes is not None) == (ranks > 1 and name not in TEXT_ONLY),
                     "check_%s_prints_the_bridge" % name, got[1][-2000:])
        memory = section(got[1], "memory, MiB a rank")
        values = [float(x) for line in memory[1:] for x in line.split()[2:]]
        c.tap.result(len(memory) >= 2 and values and all(v >= 0 for v in values) and
                     all(abs(sum(map(float, line.split()[2:-1])) - float(line.split()[-1])) < 0.1 for line in memory[1:]),
                     "check_%s_prints_memory_that_adds_up" % name, "\n".join(memory))
        c.tap.result(re.search(r"^schedule, \d+ micro-batches, verified for all %d ranks" % ranks, got[1], re.M) is not None,
                     "check_%s_verifies_the_schedule" % name, got[1][-1500:])
    for ranks in (1, 2, 6, 8, 48):
        c.expect("check_stage2_on_%d_ranks" % ranks, c.call("--check", os.path.join(INPUT, "stage2.nml"), "--ranks", str(ranks)), 0)
    got = c.call("--check", "-", "--ranks", "1", stdin="&run train_iters = 1, backend = 'cuda' /\n&lr lr = 1 /\n"
                 "&language preset = 'nemotron3_nano' /")
    c.expect("check_nemotron3_nano_counts_the_released_model", got, 0, out=["%d" % NANO_LANGUAGE])
    got = c.call("--check", "--ranks", "4", os.path.join(INPUT, "mock_20l.nml"))
    c.expect("ranks_that_do_not_fit_are_3_for_a_deck_of_gpus_too", got, 3, "needs 8 ranks")
    if "cuda=no" in c.call("--features")[1]:
        tiny = os.path.join(INPUT, "mock_tiny.nml")
        fp32, bf16 = c.call("--check", tiny), c.call("--check", tiny, "run.precision=bf16")
        c.expect("a_deck_in_bf16_is_sized_for_gpus_without_cuda", bf16, 0, out=["backend = 'cuda'", "note: this deck is for GPUs"])
        c.tap.result(section(fp32[1], "memory, MiB a rank") != section(bf16[1], "memory, MiB a rank"), "and_its_memory_is_another", bf16[1])
        c.expect("and_is_3_where_it_would_run", c.call(tiny, "run.precision=bf16"), 3, "run.precision = 'bf16': ", starts="run")
    got = c.call("--check", os.path.join(INPUT, "stage2.nml"), ranks=2)
    c.expect("check_under_a_launcher", got, 0, out=["layout disjoint, 2 ranks"])
    c.tap.result(got[1].count("\nparameters\n") == 1, "check_is_printed_by_one_rank", got[1])
    c.tap.result(not os.listdir(c.work), "check_leaves_no_file", os.listdir(c.work))


def ranks_and_memory(c):
    tiny = os.path.join(INPUT, "mock_tiny.nml")
    grid = ("topology.layout=disjoint", "topology.encoder_dp=2", "topology.llm_dp=2")
    for n in (1, 3):
        got = c.call(tiny, *grid, ranks=n)
        c.expect("F39_four_ranks_needed_%d_started" % n, got, 3, "4", str(n), starts="run")
        c.tap.result(re.search(r"\b4\b", got[2]) is not None and re.search(r"\b%d\b" % n, got[2]) is not None and
                     one_error(got[2]) == 1, "F39_one_line_names_4_and_%d" % n, got[2])
    c.expect("an_odd_number_without_grids_is_3", c.call(tiny, ranks=3), 3, "3", starts="run")
    c.expect("a_bad_deck_under_the_launcher_is_2", c.call(tiny, "run.seed=x", ranks=4), 2, "run.seed", starts="run")
    got = c.call(os.path.join(INPUT, "stage2.nml"), "run.output_dir=" + c.m.path("nodata"), ranks=2)
    c.expect("a_deck_without_its_data_is_4_with_the_hint", got, 4, "data.train_data_path", "make data")
    got = c.call("--status", c.m.path("nodata"))
    c.expect("the_EXIT_file_says_4_too", got, 4, out=["train_data_path"])
    # the memory table is what a run allocates
    for ranks in (1, 4):
        out = c.m.path("memory%d" % ranks)
        plan = c.call("--check", tiny, "--ranks", str(ranks))
        got = c.call(tiny, "run.train_iters=1", "run.output_dir=" + out, "log.log_interval=100", ranks=ranks)
        if not c.expect("a_run_on_%d_ranks" % ranks, got, 0):
            continue
        with h5py.File(os.path.join(out, "trace.h5"), "r") as f:
            used = f["ranks/arena_bytes"][()] / 2.0 ** 20
        rows = {int(x.split()[1]): np.array([float(v) for v in x.split()[2:-1]]) for x in section(plan[1], "memory, MiB a rank")[1:]}
        fault = ["rank %d: planned %s, allocated %s" % (r, rows[r], np.round(used[r], 2)) for r in rows
                 if not np.allclose(rows[r], used[r], atol=0.0051)]
        c.tap.result(rows and not fault, "the_memory_table_on_%d_ranks_is_what_the_run_allocates" % ranks, "\n".join(fault))


def inspect(c):
    out = c.m.path("inspected")
    got = c.call(os.path.join(INPUT, "mock_tiny.nml"), "run.train_iters=2", "run.output_dir=" + out, "checkpoint.save=" + out + "/ckpt")
    if not c.expect("a_run_to_inspect", got, 0):
        return
    c.expect("inspect_a_trace", c.call("--inspect", out + "/trace.h5"), 0, out=["mimo-trace", "2 of 2 rows", "lm_loss", "version", "git",
                                                                               "train_iters = 2"])
    got = c.call("--inspect", out + "/ckpt/iter_0000002/checkpoint.h5")
    c.expect("inspect_a_checkpoint", got, 0, out=["mimo-checkpoint", "colocated on 1 rank", "embedding.word_embeddings.weight",
                                                  "512", "version", "train_iters = 2"])
    c.tap.result(re.search(r"iteration\s+2\b", got[1]) is not None, "inspect_tells_the_iteration", got[1][:500])
    for title, name in (("text", os.path.join(INPUT, "mock_tiny.nml")), ("absent", "nofile"), ("directory", out)):
        got = c.call("--inspect", name)
        c.expect("inspect_%s_is_refused" % title, got, 5, "error:")
        c.tap.result(len(got[2].splitlines()) == 1, "inspect_%s_is_refused_in_one_line" % title, got[2])
    with open(out + "/trace.h5", "rb") as f:
        data = f.read()
    with open(c.m.path("cut.h5"), "wb") as f:
        f.write(data[:len(data) // 2])
    c.expect("inspect_a_truncated_file", c.call("--inspect", c.m.path("cut.h5")), 5, "error:")
    with h5py.File(c.m.path("foreign.h5"), "w") as f:
        f["x"] = 1
    c.expect("inspect_a_foreign_file", c.call("--inspect", c.m.path("foreign.h5")), 5, "error:")


def extremes(c):
    """F19: extreme values of numbers end with 0 or 2 and a sentence, quickly and without a large allocation."""
    tiny = os.path.join(INPUT, "mock_tiny.nml")
    keys = ("language.hidden_size", "language.seq_length", "language.vocab_size", "moe.num_experts", "mamba.mamba_chunk_size",
            "vision.hidden_size", "vision.patch_dim", "data.num_image_tiles", "data.mock_dataset_size", "batch.micro_batch_size",
            "batch.global_batch_size", "topology.encoder_dp", "topology.llm_dp", "run.train_iters", "log.dump_batches",
            "eval.eval_iters", "language.make_vocab_size_divisible_by")
    for key in keys:
        bad = []
        for value in ("2147483647", "9223372036854775807", "-9223372036854775808", "0", "-1"):
            start = time.monotonic()
            got = c.call("--check", tiny, "%s=%s" % (key, value), limit=30)
            if got[0] not in (0, 2, 3) or (got[0] != 0) != (one_error(got[2]) > 0) or time.monotonic() - start > 20:
                bad.append("%s: status %s after %.1f s\n%s" % (value, got[0], time.monotonic() - start, got[2][-300:]))
        c.tap.result(not bad, "F19_extreme_values_of_%s" % key, "\n".join(bad))
    for key in ("lr.lr", "optimizer.adam_eps", "language.init_method_std"):
        for value in ("1e308", "-1e308", "1e-320", "0"):
            got = c.call("--check", tiny, "%s=%s" % (key, value), limit=30)
            c.tap.result(got[0] in (0, 2) and (got[0] != 0) == (one_error(got[2]) > 0), "F19_%s_%s" % (key, value), got)
    got = c.call("--check", tiny, "--ranks", "1000000", "topology.layout=disjoint", limit=60)
    c.tap.result(got[0] in (0, 2, 3) and one_error(got[2]) > 0, "F19_a_million_ranks", (got[0], got[2][-500:]))


def main():
    c = Cases()
    for group in (options, status, deck_sources, overrides, errors_together, every_deck, ranks_and_memory, inspect, extremes):
        if c.m.arg.k and c.m.arg.k not in group.__name__:
            continue
        group(c)
    c.m.close()
    c.tap.close()


if __name__ == "__main__":
    main()
