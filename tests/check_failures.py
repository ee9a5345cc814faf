#!/usr/bin/env python3
"""Ways to fail: each ends every rank within seconds, with its exit status and one line that says what to do or what the system said.

Starts with the mistakes of somebody who has just met the program. Faults of the system are put in by limits, small file systems and,
where strace is there, by system calls that fail or kill on one rank (robustness.md 4.6); ranks are stopped. Decks are tests/decks, data test_shard.c and
check_run.py, checkpoints and locks check_run.py, killed ranks check_kill.py.
"""
import os
import re
import shutil
import signal
import stat
import subprocess
import time

import h5py

from check_run import DECK, Runs, checkpoint, descendants, everything, finish, grids, read, same_checkpoint, same_trace, wait_for
from harness import ROOT

INPUT = os.path.join(ROOT, "input")
PAIR = grids(1, 1)


def error_lines(stderr):
    return [x for x in stderr.splitlines() if "error: " in x]


class Failures(Runs):
    def shell(self, script, arguments, ranks=0, limit=60, **kw):
        """Run `script` (sh) in which "$@" is mimo's command line; with ranks the whole script runs on every rank."""
        command, env = self.m.command(arguments, 0, kw.pop("env", None))
        command = ["sh", "-c", script, "sh", *command]
        if ranks:
            command = [self.m.arg.mpiexec, "-n", str(ranks), *command]
        try:
            p = subprocess.run(command, stdin=kw.pop("stdin", subprocess.DEVNULL), stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=limit, env=env,
                               cwd=kw.pop("cwd", ROOT), text=True, errors="replace", **kw)
            return p.returncode, p.stdout, p.stderr
        except subprocess.TimeoutExpired as e:
            return "still running after %d s" % limit, str(e.stdout), str(e.stderr)

    def one_line(self, name, got, code, *words):
        """The status, and a single error line with these words."""
        lines = error_lines(got[2])
        lacks = [w for w in words if not lines or w not in lines[0]]
        return self.tap.result(got[0] == code and len(lines) == 1 and not lacks, name, "status %s, not %s; lacks %s\n%s" % (got[0], code, lacks, got[2][-1500:]))


def new_user(r):
    """A wrong path, a typo in a key, a wrong number of ranks: one line that says what to do, and nothing is started."""
    work = r.at("new")
    os.mkdir(work)
    os.symlink(INPUT, os.path.join(work, "input"))

    def mistake(name, code, arguments, *words, ranks=0):
        r.one_line("new_user_" + name, r.m.run(*arguments, ranks=ranks, cwd=work, limit=60), code, *words)
        r.tap.result(os.listdir(work) == ["input"], "new_user_%s_starts_nothing" % name, os.listdir(work))
    tiny = "input/mock_tiny.nml"
    mistake("mistypes_the_deck", 2, ("input/mok_tiny.nml",), "input/mok_tiny.nml: error: cannot open the deck", "did you mean input/mock_tiny.nml?")
    mistake("mistypes_the_directory", 2, ("inputs/mock_tiny.nml",), "did you mean input/mock_tiny.nml?")
    mistake("forgets_the_directory", 2, ("no/mock_tiny.nml",), "there is no directory no")
    mistake("mistypes_a_key", 2, (tiny, "run.train_itres=5"), "did you mean train_iters?")
    mistake("takes_the_key_of_another_group", 2, (tiny, "run.lr=1e-3"), "lr belongs to &lr")
    mistake("mistypes_a_group", 2, (tiny, "optimiser.clip_grad=1"), "did you mean &optimizer?")
    mistake("mistypes_a_word", 2, (tiny, "lr.lr_decay_style=cosin"), "did you mean 'cosine'?")
    mistake("uses_dashes", 2, (tiny, "run.train-iters=5"), "did you mean train_iters?")
    mistake("writes_a_real_for_an_integer", 2, (tiny, "run.train_iters=1e3"), "integer expected, write 1000")
    mistake("mistypes_an_option", 2, ("--chek", tiny), "did you mean --check?")
    mistake("forgets_the_launcher", 3, (tiny, *grids(2, 2)), "needs 4 ranks", "1 is present", "start it with mpiexec -n 4")
    mistake("starts_too_few_ranks", 3, (tiny, *grids(2, 2)), "needs 4 ranks", "3 are present", "start it with mpiexec -n 4", ranks=3)
    mistake("starts_too_many_ranks", 3, (tiny, *PAIR), "needs 2 ranks", "4 are present", "start it with mpiexec -n 2", ranks=4)
    mistake("starts_an_odd_number_of_ranks", 3, (tiny,), "3 ranks are neither 1 nor even; possible: ", ranks=3)
    mistake("starts_one_grid_too_small", 3, (tiny, "topology.layout=language_only", "topology.llm_dp=4"), "start it with mpiexec -n 4", ranks=2)
    mistake("gives_no_deck", 2, (), "no deck", "call mimo DECK or mimo < DECK")
    mistake("gives_a_directory_as_deck", 2, ("input",), "Is a directory")
    mistake("gives_a_picture_as_deck", 2, (os.path.join(ROOT, "docs", "demo.png"),), "is not text")
    # From here on the run directory is made: the directory says how the start ended.
    got = r.go("noweights", "run.mode=eval")
    r.ok("new_user_evaluates_nothing", got, 0, "warning: run.mode = 'eval' without a checkpoint: what is evaluated are the initial weights")
    got = r.go("loadfile", "checkpoint.load=README.md", iterations=1)
    r.ok("new_user_loads_a_file", got, 0, "warning: checkpoint.load = 'README.md' is a file, not a directory of checkpoints: starting at iteration 0")
    got = r.go("importnothing", "checkpoint.import_language=" + r.at("new", "inptu"), "topology.layout=language_only")
    r.one_line("new_user_imports_from_nowhere", got, 5, "checkpoint.import_language = '%s': No such file" % r.at("new", "inptu"), "did you mean %s?" % r.at("new", "input"))
    real = [x for x in r.real() if not x.startswith("data.t")]
    paths = {"train_data_path": r.at("data", "train"), "tokenizer": r.at("data", "tokenizer.json")}
    for key, wrong, right in (("train_data_path", r.at("data", "trian"), r.at("data", "train")), ("tokenizer", r.at("data", "tokeniser.json"), r.at("data", "tokenizer.json"))):
        given = ["data.%s=%s" % x for x in {**paths, key: wrong}.items()]
        got = r.go("wrongpath", *real, *given)
        r.one_line("new_user_mistypes_%s" % key, got, 4, "data.%s = '%s'" % (key, wrong), "did you mean %s?" % right)
    r.ok("new_user_asks_how_it_ended", r.m.run("--status", r.at("wrongpath")), 4, "did you mean")


def standard_input(r):
    """Launchers that give the deck to nobody, to rank 0 or to all."""
    text = read(DECK)
    args = ("run.train_iters=2", "batch.global_batch_size=2")
    r.ok("a_deck_on_standard_input_of_every_rank", r.shell('exec "$@" < "%s"' % DECK, [*args, "run.output_dir=" + r.at("stdin_all")], ranks=2))
    r.ok("a_deck_on_standard_input_of_rank_0", r.m.run(*args, "run.output_dir=" + r.at("stdin_0"), ranks=2, stdin=text))
    r.equal("both_give_the_same_run", same_trace(r.at("stdin_all"), r.at("stdin_0")))
    got = r.shell('exec "$@" <&-', [*args], ranks=2)
    r.one_line("no_standard_input_on_any_rank", got, 2, "<stdin>", "empty")
    got = r.shell('if [ "$PMI_RANK" = 1 ]; then exec "$@" <&-; else exec "$@"; fi', [DECK, *args, "run.output_dir=" + r.at("stdin_closed1")], ranks=2)
    r.ok("standard_input_closed_on_rank_1", got)
    got = r.shell('exec "$@" < /dev/zero', [DECK, *args, "run.output_dir=" + r.at("stdin_zero")], ranks=2)
    r.ok("an_endless_standard_input_beside_a_deck", got)
    got = r.m.run(*args, "run.output_dir=" + r.at("stdin_bad"), ranks=2, stdin=text.replace("train_iters", "train_itres"))
    r.one_line("a_bad_deck_on_standard_input_under_a_launcher", got, 2, "did you mean train_iters?")


def limits(r):
    """F11, F12: limits of the shell."""
    for ranks, layout in ((0, ()), (2, PAIR)):
        where = "on_%d_ranks" % max(ranks, 1)
        # 5 MB: MPI's own shared memory needs as much.
        got = r.shell('ulimit -f 10000; exec "$@"', r.arguments("f_trace" + where, layout, iterations=300000), ranks)
        r.one_line("F11_a_file_limit_for_the_trace_%s" % where, got, 6, "trace.h5", "File too large")
        got = r.shell('ulimit -f 10000; exec "$@"', r.arguments("f_save" + where, (*layout, "language.vocab_size=30000"), save=True), ranks)
        r.one_line("F11_a_file_limit_for_the_checkpoint_%s" % where, got, 6, "checkpoint.h5", "File too large")
        r.tap.result(read(r.at("f_save" + where), "EXIT").startswith("6 ") and not os.path.exists(r.at("f_save" + where, "ckpt", "latest_checkpointed_iteration.txt")),
                     "F11_no_tracker_names_it_%s" % where)
        large = ("language.vocab_size=4000000", "language.make_vocab_size_divisible_by=128")
        start = time.monotonic()
        got = r.shell('ulimit -v 1500000; exec "$@"', r.arguments("v" + where, (*layout, *large)), ranks, limit=90)
        r.one_line("F12_a_memory_limit_%s" % where, got, 3, "bytes")
        r.tap.result(time.monotonic() - start < 60, "F12_a_memory_limit_ends_soon_%s" % where)
    got = r.shell('ulimit -n 40; exec "$@"', r.arguments("n", ()))
    r.tap.result(got[0] in (0, 3, 4, 6) and len(error_lines(got[2])) == (got[0] != 0), "F12_few_descriptors", "%s\n%s" % (got[0], got[2][-800:]))


def environment(r):
    """F49, S5: what a batch system may leave out, and the modes of new files."""
    base = {k: v for k, v in os.environ.items() if k not in ("HOME", "TMPDIR", "USER", "LANG", "TERM")}
    command, env = r.m.command(r.arguments("bare", ()), 0, None)
    p = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=60, cwd=ROOT,
                       env={**{k: env[k] for k in ("HWLOC_PLUGINS_PATH", "UCX_TLS")}, **base, "LC_ALL": "tr_TR.UTF-8"})
    r.ok("F49_without_HOME_TMPDIR_and_a_known_locale", (p.returncode, p.stdout, p.stderr))
    r.go("known", iterations=3)
    r.equal("F49_it_is_the_same_run", same_trace(r.at("bare"), r.at("known")))
    for mask in (0o027, 0o002):
        name = "umask_%03o" % mask
        r.ok("S5_%s" % name, r.shell('umask %03o; exec "$@"' % mask, r.arguments(name, (), save=True, iterations=1)))
        wrong = []
        for folder, _, names in os.walk(r.at(name)):
            for n, full in [(folder, 0o777)] + [(os.path.join(folder, x), 0o666) for x in names]:
                mode = stat.S_IMODE(os.stat(n).st_mode)
                if mode != full & ~mask:
                    wrong.append("%s: %03o" % (n, mode))
        r.tap.result(not wrong, "S5_files_follow_%s" % name, wrong)
    for title, variables, words in (("slurm", {"SLURM_NTASKS": "4"}, ("Slurm says 4 tasks", "srun --mpi=pmi2")),
                                    ("open_mpi", {"OMPI_COMM_WORLD_SIZE": "4"}, ("Open MPI's launcher started 4 ranks", "use that library's mpiexec"))):
        got = r.m.run(*r.arguments("alone", ()), env=variables)
        r.one_line("F45_started_alone_by_%s" % title, got, 3, *words)
        r.tap.result(not os.path.exists(r.at("alone")), "F45_started_alone_by_%s_touches_nothing" % title)
    gone = r.at("gone")
    os.mkdir(gone)
    got = r.shell('cd "%s" && rmdir "%s" && exec "$@"' % (gone, gone), [DECK, "run.train_iters=1", "run.output_dir=here"])
    r.one_line("F42_a_removed_working_directory", got, 6, "run.output_dir")


def full_disks(r):
    """F06, F08: the disk fills up while the run goes on."""
    with open("/dev/full", "w") as full:
        command, env = r.m.command(r.arguments("fullout", ()), 0, None)
        p = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=full, stderr=subprocess.PIPE, text=True, env=env, cwd=ROOT, timeout=60)
        r.one_line("F08_a_full_disk_behind_standard_output", (p.returncode, "", p.stderr), 6, "standard output: No space left on device")
        for option in ("--help", "--reference", "--features"):
            p = subprocess.run([r.m.binary, option], stdin=subprocess.DEVNULL, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
            r.one_line("F08_%s_to_a_full_disk" % option[2:], (p.returncode, "", p.stderr), 6, "No space left on device")
    p = subprocess.Popen([*r.m.command(r.arguments("reader", (), iterations=30), 0, None)[0]], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE, text=True, cwd=ROOT)
    p.stdout.readline()
    p.stdout.close()
    stderr = p.stderr.read()
    r.tap.result(p.wait(60) == 0 and read(r.at("reader"), "run.log").count("lm loss:") == 30, "a_reader_that_goes_away_does_not_end_the_run", stderr)
    probe = subprocess.run(["unshare", "-m", "sh", "-c", "mount -t tmpfs -o size=4m tmpfs /mnt"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for ranks, layout in ((0, ()), (2, PAIR)):
        name = "F08_a_disk_that_fills_up_on_%d_ranks" % max(ranks, 1)
        if probe.returncode != 0:
            r.tap.skip(name, "this machine does not let us mount a tmpfs in a namespace of its own")
            continue
        disk = r.at(name)
        os.mkdir(disk)
        command, env = r.m.command(r.arguments("x", (*layout, "run.output_dir=" + disk), iterations=1000000, batch=2), ranks, None)
        # Once the run has written its first lines something else takes the rest of the disk.
        script = ('mount -t tmpfs -o size=200m tmpfs "%s" || exit 99; (until grep -q "lm loss:" "%s/run.log" 2>/dev/null; do sleep 0.05; done; '
                  'cat /dev/zero > "%s/fill" 2>/dev/null) & "$@"; code=$?; cp "%s/EXIT" "%s.exit"; exit $code') % (disk, disk, disk, disk, disk)
        try:
            p = subprocess.run(["unshare", "-m", "sh", "-c", script, "sh", *command], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               text=True, timeout=60, env=env, cwd=ROOT)
            got = p.returncode, "", p.stderr
        except subprocess.TimeoutExpired:
            got = "still running after 60 s", "", ""
        r.one_line(name + "_ends_with_6", got, 6, "No space left on device")
        r.tap.result(re.match(r"6 \d+ \w+ \d+ .*No space left on device", read(disk + ".exit")) is not None, name + "_still_says_so_in_EXIT", read(disk + ".exit"))


def strace_works():
    if not shutil.which("strace"):
        return "strace is not installed (tools/bootstrap.sh --dev)"
    p = subprocess.run(["strace", "-f", "-o", "/dev/null", "-e", "inject=fsync:error=EIO:when=1", "true"], stderr=subprocess.PIPE, text=True)
    return "" if p.returncode == 0 else "strace cannot trace here: " + p.stderr.strip()[-200:]


def system_calls(r):
    """F02, F03, F07, F09, F10: a system call fails, or kills, while a checkpoint is saved. What was there before stays whole."""
    reason = strace_works()
    if reason:
        for name in ("F02_F03_killed_at_any_system_call_of_a_save", "F07_one_rank_without_space", "F09_interrupted_and_short_writes", "F10_a_sync_that_fails"):
            r.tap.skip(name, reason)
        return
    base = "traced"
    args = (*PAIR, "stage.training_stage=3", "checkpoint.save_interval=2")
    r.ok("traced_first_part", r.go(base, *args, "run.exit_interval=2", ranks=2, iterations=6, batch=2, save=True), 75)
    r.ok("traced_unbroken", r.go("whole_traced", *args, ranks=2, iterations=6, batch=2, save=True))
    whole = everything(r.at("whole_traced", "trace.h5"))["lm_loss"]

    def traced(name, inject, victim, iterations=4, before=None):
        """Go on from the first part in a copy of its directory, system calls of rank `victim` tampered with."""
        shutil.rmtree(r.at(name), ignore_errors=True)
        shutil.copytree(r.at(base), r.at(name))
        if before:
            before(r.at(name))
        script = 'if [ "$PMI_RANK" = %d ]; then exec strace -f -o /dev/null -P "%s" %s "$@"; else exec "$@"; fi'
        inject = "".join(" -e inject=%s" % i for i in inject)
        # Only calls that touch the checkpoint directory are counted.
        return r.shell(script.replace(' -P "%s"', "") % (victim, inject), r.arguments(name, args, iterations=iterations, batch=2, save=True), ranks=2, limit=90)

    def goes_on(name):
        got = r.go(name, *args, ranks=2, iterations=6, batch=2, save=True)
        t = everything(r.at(name, "trace.h5"))
        return "" if got[0] == 0 and t["lm_loss"].tobytes() == whole.tobytes() else "status %s, %s\n%s" % (got[0], t["lm_loss"], got[2][-600:])

    for title, inject, victim, words in (("F07_one_rank_without_space", ("pwrite64:error=ENOSPC:when=3+",), 1, ("No space left",)),
                                         ("F10_a_sync_that_fails", ("fsync,fdatasync:error=EIO:when=1+",), 0, ("Input/output error",)),
                                         ("F09_a_write_error", ("pwrite64:error=EIO:when=5+",), 0, ("Input/output error",)),
                                         ("F03_a_rename_that_fails", ("rename,renameat,renameat2:error=EACCES:when=1+",), 0, ("Permission denied",))):
        start = time.monotonic()
        got = traced("tampered", inject, victim)
        r.one_line(title + "_ends_with_6", got, 6, *words)
        r.tap.result(time.monotonic() - start < 45 and r.m.run("--inspect", checkpoint(r.at("tampered"), 2))[0] == 0, title + "_leaves_the_earlier_checkpoint", "%.1f s" % (time.monotonic() - start))
        r.equal(title + "_goes_on_afterwards", goes_on("tampered"))
    got = traced("tampered", ("renameat2:error=EINVAL:when=1+",), 0, before=lambda at: shutil.copytree(os.path.dirname(checkpoint(at, 2)), os.path.dirname(checkpoint(at, 4))))
    with h5py.File(checkpoint(r.at("tampered"), 4), "r") as f:
        there = int(f["state/iteration"][()])
    r.tap.result(got[0] == 0 and there == 4 and "iter_0000004: replaces" in got[1] and not [x for x in os.listdir(os.path.dirname(os.path.dirname(checkpoint(r.at("tampered"), 4)))) if x.startswith(".")],
                 "a_file_system_that_cannot_exchange_names_is_no_obstacle", "%s %s" % (there, got))
    # the superblock, which HDF5 writes once more when a file is closed: the other ranks wait inside HDF5 by then
    script = 'if [ "$PMI_RANK" = 0 ]; then exec strace -o %s -e trace=pwrite64 %s "$@"; else exec "$@"; fi'
    record = r.at("calls")
    r.shell(script % (record, ""), r.arguments("closed", args, iterations=2, batch=2, save=True), ranks=2)
    blocks = [n for n, line in enumerate((x for x in read(record).splitlines() if x.startswith("pwrite64")), 1) if re.search(r'"\\211HDF.*, (48|96), 0\)', line)]
    shutil.rmtree(r.at("closed"))
    got = r.shell(script % (record, "-e inject=pwrite64:error=EINTR:when=2..%d+7" % (blocks[-5] - 1)), r.arguments("closed", args, iterations=2, batch=2, save=True), ranks=2, limit=60)
    r.tap.result(got[0] == 0 and read(record).count("EINTR") > 20, "F09_interrupted_writes_are_tried_again", got[2][-800:])
    # at the end: the checkpoint's when all ranks close it, three when rank 0 marks it as complete, the trace's
    for title, at in (("checkpoint", blocks[-5]), ("trace", blocks[-1])):
        shutil.rmtree(r.at("closed"))
        start = time.monotonic()
        got = r.shell(script % (record, "-e inject=pwrite64:error=EIO:when=%d" % at), r.arguments("closed", args, iterations=2, batch=2, save=True), ranks=2, limit=60)
        r.one_line("a_%s_that_cannot_be_closed_ends_with_6" % title, got, 6, "closed", "Input/output error")
        r.tap.result(time.monotonic() - start < 45 and r.m.run("--status", r.at("closed"))[0] == 6, "EXIT_says_so_of_the_%s" % title, read(r.at("closed", "EXIT")))
    faults, kills = [], 0
    for calls in ("pwrite64", "rename,renameat2", "fsync", "mkdir,mkdirat", "unlink,unlinkat,rmdir"):
        n = 1
        while n < 1000:
            got = traced("shot", ("%s:signal=KILL:when=%d" % (calls, n),), 0)
            if got[0] == 0:
                break
            kills += 1
            fault = goes_on("shot")
            if fault:
                faults.append("%s %d: %s" % (calls, n, fault))
            n += n if calls == "pwrite64" else 1      # there are hundreds: 1, 2, 4, 8, ...
        print("# killed at %s 1 to %d" % (calls, n - 1), flush=True)
    r.tap.result(not faults and kills >= 10, "F02_F03_killed_at_any_system_call_of_a_save", "%d kills\n%s" % (kills, "\n".join(faults)))


def shim(r):
    """F05, F09, F12, F37: faults that a library under the program brings (fault_shim.c)."""
    library = r.at("fault_shim.so")
    p = subprocess.run(["cc", "-std=c11", "-D_GNU_SOURCE", "-O1", "-shared", "-fPIC", "-o", library, os.path.join(ROOT, "tests", "fault_shim.c"), "-ldl"],
                       stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if not r.tap.result(p.returncode == 0, "the_shim_builds", p.stdout):
        return
    args = ("checkpoint.save_interval=2", "stage.training_stage=3")

    def go(name, fault, *more):
        env = {"LD_PRELOAD": library, "MIMO_FAULT": fault, "MIMO_FAULT_DIR": r.at(name)} if fault else None
        return r.m.run(*r.arguments(name, (*args, *more), iterations=6, batch=2, save=True), env=env, limit=60)
    r.ok("shim_unbroken", go("sound", None))
    r.ok("F09_short_writes_are_continued", go("short", "short"))
    r.equal("F09_short_writes_leave_the_same_checkpoint", same_checkpoint(r.at("sound"), r.at("short"), 6))
    r.ok("F37_a_clock_that_jumps_a_day", go("clock", "clock", "run.exit_duration_in_mins=5"))
    r.equal("F37_leaves_the_same_trace", same_trace(r.at("sound"), r.at("clock")))
    seconds = everything(r.at("clock", "trace.h5"))["iteration_seconds"]
    r.tap.result(all(0 < s < 60 for s in seconds), "F37_intervals_do_not_jump", seconds)
    faults, codes = [], []
    for n in (1, 2, 3, 5, 9, 17, 33, 65, 129, 257, 400, 513, 700, 900):
        got = go("memory", "memory:%d" % n)
        lines = error_lines(got[2])
        codes.append(got[0])
        if got[0] == 3 and not (len(lines) == 1 and "out of memory: " in lines[0]) or got[0] not in (0, 3):
            faults.append("allocation %d: status %s\n%s" % (n, got[0], got[2][-500:]))
    r.tap.result(not faults and codes.count(3) >= 8, "F12_any_allocation_that_fails_ends_with_3", "%s\n%s" % (codes, "\n".join(faults)))
    # 1, 2, ... up to the layout of the trace, then ever rarer until the run ends first.
    faults, n, failures = [], 1, 0
    while True:
        shutil.rmtree(r.at("power"), ignore_errors=True)
        got = go("power", "power:%d" % n)
        if got[0] == 0:
            break
        failures += 1
        again = go("power", None)
        fault = "status %s %s" % (again[0], again[2][-500:]) if again[0] else same_trace(r.at("sound"), r.at("power")) + same_checkpoint(r.at("sound"), r.at("power"), 6)
        if got[0] != -9 or fault:
            faults.append("write or sync %d: %s; %s" % (n, got[0], fault[:600]))
        n += max(1, n // 2)
    r.tap.result(not faults and failures >= 10, "F05_a_power_failure_at_any_write_is_survived", "%d failures\n%s" % (failures, "\n".join(faults)))


def hangs(r):
    """F26, F28: a rank that stops for ever is named and the job ended; slow ranks, and a whole job that is suspended, are left alone."""
    args = (*PAIR, "stage.training_stage=3", "checkpoint.save_interval=3", "run.distributed_timeout_minutes=0.05")

    def begin(name, more=args):
        p = r.begin(name, *more, ranks=2, iterations=4000, batch=2, save=True)
        r.tap.result(wait_for(lambda: p.text().count("lm loss:") >= 5 or p.poll() is not None, 60) and p.poll() is None, name + "_was_running", p.text()[-800:])
        time.sleep(1.3)     # until each rank has written into LIVE where it is in the loop
        return p, descendants(p.pid)

    def named(name, p, start, *words):
        code, _ = finish(p, 60)
        r.one_line(name + "_ends_with_8", (code, "", p.text()), 8, *words)
        r.tap.result(read(r.at(name), "EXIT").startswith("8 ") and time.monotonic() - start < 45, name + "_says_so_in_time",
                     "%.1f s, %s" % (time.monotonic() - start, read(r.at(name), "EXIT")))
    for rank, role in ((0, "encoder"), (1, "language")):
        name = "F26_rank_%d_is_stopped" % rank
        p, ranks = begin(name)
        start = time.monotonic()
        os.kill(ranks[rank], signal.SIGSTOP)
        named(name, p, start, "no sign of life", "rank %d (%s, host " % (rank, role), "last seen in iteration ")
        r.tap.result(wait_for(lambda: not any(os.path.exists("/proc/%d" % x) and "Z" not in read("/proc/%d/stat" % x).rsplit(")", 1)[1][:3] for x in ranks), 10),
                     name + "_and_no_rank_is_left")
    last = int(read(r.at(name, "ckpt", "latest_checkpointed_iteration.txt"))) + 2
    r.ok("F26_the_job_goes_on_afterwards", r.go(name, *args, "run.exit_interval=%d" % last, ranks=2, iterations=4000, batch=2, save=True), 75, "taken over")
    r.ok("F26_unbroken", r.go("unhung", *args, "run.exit_interval=%d" % last, ranks=2, iterations=4000, batch=2, save=True), 75)
    r.equal("F26_and_has_the_unbroken_trace", same_trace(r.at("unhung"), r.at(name)))
    p, ranks = begin("F28_slow")
    for _ in range(4):
        for pid, seconds in ((ranks[1], 1.2), (ranks[0], 0.4)):
            os.kill(pid, signal.SIGSTOP)
            time.sleep(seconds)
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.2)
    for pid in ranks:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(7)
    for pid in ranks:
        os.kill(pid, signal.SIGCONT)
    time.sleep(1)
    r.tap.result(p.poll() is None, "F28_slow_ranks_and_a_suspended_job_are_left_alone", p.text()[-800:])
    p.send_signal(signal.SIGTERM)
    finish(p)
    r.tap.result(read(r.at("F28_slow"), "EXIT").startswith("75 ") and not os.path.exists(r.at("F28_slow", "LIVE")), "F28_it_ends_as_planned", read(r.at("F28_slow"), "EXIT"))
    if strace_works():
        r.tap.skip("F26_a_dead_disk_of_rank_1", strace_works())
        return
    # The 60th write of rank 1 into its trace takes a minute: it is in no message, and its watchdog writes on.
    script = 'if [ "$PMI_RANK" = 1 ]; then exec strace -f -o /dev/null -P "%s" -e inject=pwrite64:delay_enter=60000000:when=60 "$@"; else exec "$@"; fi'
    name, start = "F26_a_dead_disk_of_rank_1", time.monotonic()
    got = r.shell(script % r.at(name, "trace.h5"), r.arguments(name, args, iterations=4000, batch=2, save=True), ranks=2, limit=55)
    r.one_line(name + "_ends_with_8", got, 8, "no progress", "rank 1 (language, host ", "the other rank waits")
    r.tap.result(time.monotonic() - start < 50, name + "_ends_before_the_disk_answers", time.monotonic() - start)


def crashes(r):
    """Exit 1: a crash of one rank is one line, an EXIT file and a backtrace; the job ends and can go on."""
    for name, number, ranks, victim, hint in (("SIGSEGV_of_rank_1", signal.SIGSEGV, 2, 1, ""), ("SIGBUS_of_rank_0", signal.SIGBUS, 2, 0, "/dev/shm"),
                                              ("SIGABRT_of_one_rank", signal.SIGABRT, 0, 0, "")):
        args = (*(PAIR if ranks else ()), "checkpoint.save_interval=3")
        p = r.begin(name, *args, ranks=ranks, iterations=4000, batch=2, save=True)
        wait_for(lambda: p.text().count("lm loss:") >= 5 or p.poll() is not None, 60)
        pid = descendants(p.pid)[victim] if ranks else p.pid
        os.kill(pid, number)
        code, seconds = finish(p, 40)
        r.one_line("F50_%s_ends_with_1" % name, (code, "", p.text()), 1, "crashed by " + name.split("_")[0], "CRASH.%d has the backtrace" % victim, "iteration ")
        role = ("encoder", "language")[victim] if ranks else "both"
        r.tap.result(read(r.at(name), "EXIT").startswith("1 %d %s " % (victim, role)) and seconds < 30 and hint in p.text(), "F50_%s_says_so" % name,
                     "%.1f s, %s" % (seconds, read(r.at(name), "EXIT")))
        trace = read(r.at(name, "CRASH.%d" % victim)) if os.path.exists(r.at(name, "CRASH.%d" % victim)) else ""
        r.tap.result(trace.count("mimo") >= 3 and "libc" in trace, "F50_%s_leaves_a_backtrace" % name, trace)
        r.ok("F50_%s_status" % name, r.m.run("--status", r.at(name)), 1, "crashed by")
        last = int(read(r.at(name, "ckpt", "latest_checkpointed_iteration.txt"))) + 1
        r.ok("F50_%s_goes_on" % name, r.go(name, *args, "run.exit_interval=%d" % last, ranks=ranks, iterations=4000, batch=2, save=True), 75, "restart from")


def other_data(r):
    """F34: shards that change between two starts are said; the same ones under another path are not."""
    data, work = r.real(), r.at("data", "changing")
    shutil.copytree(r.at("data", "train"), work)
    go = lambda iterations, path=work: r.go("changing", *[x.replace(r.at("data", "train"), path) for x in data], "lr.lr_decay_iters=8",
                                            iterations=iterations, save=True)
    r.ok("F34_first_start", go(2))
    shutil.copytree(work, r.at("data", "moved"))
    got = go(4, r.at("data", "moved"))
    r.tap.result(got[0] == 0 and "restart from" in got[1] and "training data" not in got[2], "F34_the_same_shards_elsewhere_are_no_other_data", got[2][-600:])
    shutil.copy(r.at("data", "valid", sorted(os.listdir(r.at("data", "valid")))[0]), os.path.join(work, "zz.tar"))
    got = go(6)
    said = [x for x in got[2].splitlines() if "the training data are not those of the start before" in x]
    r.tap.result(got[0] == 0 and len(said) == 1 and len(re.findall(r"\d+ shards?, \d+ samples", said[0])) == 2, "F34_other_shards_are_a_warning", got[2][-600:])
    got = go(8)
    r.tap.result(got[0] == 0 and "training data" not in got[2], "F34_it_is_said_once", got[2][-600:])


def no_progress(r):
    """F46: a job that is submitted again and again and gets nowhere is refused, once, after three starts."""
    data = r.real()
    train, away = r.at("data", "train"), r.at("data", "gone")
    start = lambda: r.go("storm", *data, "run.exit_interval=2", iterations=6, save=True)[0]
    codes = [start()]
    os.rename(train, away)
    codes += [start() for _ in range(3)]
    got = r.go("storm", *data, "run.exit_interval=2", iterations=6, save=True)
    r.one_line("F46_the_fourth_start_without_progress", got, 5, "no progress in 3 starts", "iteration 2", "the last with 4")
    r.ok("F46_status_says_so", r.m.run("--status", r.at("storm")), 5, "no progress in 3 starts")
    codes.append(start())
    os.rename(away, train)
    codes += [start(), start()]
    r.tap.result(codes == [75, 4, 4, 4, 4, 75, 0], "F46_it_can_be_submitted_again", codes)


def main():
    r = Failures()
    for group in (new_user, standard_input, limits, environment, full_disks, system_calls, shim, hangs, crashes, other_data, no_progress):
        if r.m.arg.k and r.m.arg.k not in group.__name__:
            continue
        start = time.monotonic()
        group(r)
        print("# %s: %.1f s" % (group.__name__, time.monotonic() - start), flush=True)
    r.m.close()
    r.tap.close()


if __name__ == "__main__":
    main()
