#!/usr/bin/env python3
"""The test of the regression runner: it must fail when it should, name what is wrong, and hold every pair of settings."""
import itertools
import os
import re
import shutil
import subprocess
import sys

import h5py
import numpy as np

from harness import ROOT, Mimo, Tap

RUN = os.path.join(ROOT, "regression", "run")
sys.dont_write_bytecode = True
sys.path.insert(0, os.path.dirname(RUN))
import speed   # noqa: E402
from cases import DATASETS, MORE, TENSORS, cases, sketch   # noqa: E402

QUICK = ("310_layouts_colocated/reference", "300_layouts_disjoint/e1x1_l1x1", "400_resume/e1x1")
RANKS, BATCH, EXPERTS = (1, 2, 4, 6, 8, 16), 24, 8
OVERLAP = {"": "none", "r": "reduce", "rp": "reduce+gather", "rpe": "reduce+gather+encoder"}


def setting(ranks, layout, encoder, language, ep, mbs, stage, overlap, buckets, shared):
    """The named settings of one launch; encoder and language are (tp, dp)."""
    shape = layout
    if layout == "disjoint":
        shape = "fan-in" if encoder[1] > language[1] else "equal" if encoder[1] == language[1] else "fan-out"
    elif layout == "colocated":
        shape = "colocated equal" if encoder == language else "colocated different"
    s = {"ranks": ranks, "shape": shape, "llm_tp": language[0], "llm_dp": language[1], "ep": ep, "mbs": mbs, "stage": stage,
         "overlap": overlap, "buckets": buckets, "shared": shared}
    if encoder:
        s.update(encoder_tp=encoder[0], encoder_dp=encoder[1])
    return frozenset(s.items())


def pairs(settings):
    return {frozenset(p) for s in settings for p in itertools.combinations(s, 2)}


def possible():
    """Every layout that the rules of the deck accept, for the sizes the cases use."""
    for layout, tp, dp, ep, mbs in itertools.product(("disjoint", "colocated", "language_only"), (1, 2), (1, 2, 3, 4, 6, 8),
                                                     (1, 2, 4, 8), (1, 2, 3, 4)):
        if tp * dp % ep or EXPERTS % ep or BATCH % (mbs * dp):
            continue
        for encoder in [()] if layout == "language_only" else itertools.product((1, 2, 4), (1, 2, 3, 4, 8)):
            size = encoder[0] * encoder[1] if encoder else 0
            ranks = tp * dp + (size if layout == "disjoint" else 0)
            if ranks not in RANKS or (layout == "colocated" and size != tp * dp):
                continue
            if encoder and (max(encoder[1], dp) % min(encoder[1], dp) or mbs * dp % encoder[1]):
                continue
            for stage, overlap, buckets, shared in itertools.product((1, 2, 3), OVERLAP.values(), (0, 3), "FT"):
                if encoder or (stage > 1 and overlap != "reduce+gather+encoder"):
                    yield setting(ranks, layout, encoder, (tp, dp), ep, mbs, stage, overlap, buckets, shared)


def runs():
    """The settings of every fp64 launch on mock data of the families 300 to 349."""
    for case in cases(os.path.dirname(RUN)):
        if case.shards or not 300 <= int(case.name[:3]) < 350:
            continue
        deck_stage = re.search(r"training_stage = (\d)", open(case.deck).read()).group(1)
        for launch in case.launches:
            o = dict(w.split(".", 1)[1].split("=") for w in launch.overrides)
            number = lambda key, unset="1": int(o.get(key, unset))
            layout = o["layout"]
            encoder = () if layout == "language_only" else (number("encoder_tp"), number("encoder_dp"))
            overlap = "".join(k for k, key in zip("rpe", ("overlap_grad_reduce", "overlap_param_gather", "encoder_ddp_overlap"))
                              if o.get(key) == "T")
            yield setting(launch.ranks, layout, encoder, (number("llm_tp"), number("llm_dp")), number("llm_ep"), number("micro_batch_size"),
                          number("training_stage", deck_stage), OVERLAP[overlap], number("ddp_num_buckets", "0"),
                          o.get("moe_shared_expert_overlap", "F"))


def coverage(tap):
    have, wanted = set(runs()), pairs(possible())
    missing = sorted(sorted(map(str, p)) for p in wanted - pairs(have))
    tap.result(len(wanted) > 500 and not missing, "every_pair_of_settings_occurs", missing)
    layouts = {frozenset(p for p in s if p[0] not in ("stage", "overlap", "buckets", "shared")) for s in have}
    tap.result(len(layouts) >= 40 and {dict(s)["ranks"] for s in have} >= set(RANKS), "at_least_40_layouts_on_1_to_16_ranks", len(layouts))
    # The check itself: without one launch that alone holds a pair, a pair is missing.
    alone = [s for s in have if pairs([s]) & wanted - pairs(have - {s})]
    tap.result(alone and wanted - pairs(have - {alone[0]}), "a_missing_launch_would_be_seen")


class Copy:
    """One case in a folder of its own, with one cheap launch."""

    def __init__(self, m, name="310_layouts_colocated", launch="reference"):
        self.m, self.folder, self.launch = m, m.path("cases_" + name), name + "/" + launch
        self.case = os.path.join(self.folder, name)
        shutil.copytree(os.path.join(os.path.dirname(RUN), name), self.case)
        self.reference = os.path.join(self.case, "reference.h5")

    def run(self, *more):
        p = subprocess.run([RUN, "--mimo", self.m.binary, "--mpiexec", self.m.arg.mpiexec, "--cases", self.folder, "-k",
                            self.launch, *more], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT, text=True, timeout=900)
        return p.returncode, p.stdout

    def move(self, name, row, factor):
        with h5py.File(self.reference, "r+") as f:
            old = f[name][row]
            f[name][row] = old * factor if f[name].dtype.kind == "f" else old + 1
        return old

    def edit(self, name, old, new):
        path = os.path.join(self.case, name)
        text = open(path).read()
        assert old in text
        with open(path, "w") as f:
            f.write(text.replace(old, new, 1))
        return text


def failures(tap, m):
    c = Copy(m)

    def fails(name, *patterns, more=()):
        code, text = c.run(*more)
        tap.result(code == 1 and text.splitlines()[-1] == "0 passed, 1 failed, 0 skipped" and
                   all(re.search(p, text, re.M) for p in patterns), name, text)

    for quantity in ("lm_loss", "grad_norm"):
        old = c.move(quantity, 4, 1 + 1.01e-9)
        fails("%s_moved_by_1.01_tolerances_is_wrong" % quantity, r"^WRONG .*: %s: value .* reference .* tolerance .* first iteration 5$" % quantity)
        with h5py.File(c.reference, "r+") as f:
            f[quantity][4] = old * (1 + 0.99e-9)
        code, text = c.run()
        tap.result(code == 0 and text.splitlines()[-1] == "1 passed, 0 failed, 0 skipped", "%s_moved_by_0.99_tolerances_is_ok" % quantity, text)
        with h5py.File(c.reference, "r+") as f:
            f[quantity][4] = old
    with h5py.File(c.reference, "r+") as f:
        tensor = f["gradients/language/output_layer.weight"]
        old = tensor[()]
        tensor[...] = old * (1 + 1.01e-12)
    fails("a_gradient_moved_by_1.01_tolerances_is_wrong", r"^WRONG .*: gradients: language/output_layer.weight: relative distance")
    with h5py.File(c.reference, "r+") as f:
        f["gradients/language/output_layer.weight"][...] = old * (1 + 0.99e-12)
    code, text = c.run()
    tap.result(code == 0, "a_gradient_moved_by_0.99_tolerances_is_ok", text)
    c.move("num_tokens", 11, 1)
    fails("one_token_more_is_wrong", r"^WRONG .*: num_tokens: .* first iteration 12$")
    os.remove(c.reference)
    fails("a_missing_reference_fails", r"^WRONG .*: reference.h5 is missing")
    code, text = c.run("--update")
    tap.result(code == 0 and os.path.getsize(c.reference) < 100000, "update_writes_a_small_reference", text)
    with h5py.File(c.reference) as f:
        tap.result(set(f.attrs) == {"program", "version", "git", "date", "command"}, "the_reference_says_where_it_is_from", set(f.attrs))
    code, text = c.run()
    tap.result(code == 0, "the_updated_reference_is_met", text)
    deck = c.edit("deck.nml", "lr = 1e-3", "lr_of_no_kind = 1e-3")
    fails("a_deck_that_dies_is_a_crash", r"^CRASH .*: status 2, expected 0$", r"lr_of_no_kind")
    with open(os.path.join(c.case, "deck.nml"), "w") as f:
        f.write(deck)
    expect = c.edit("expect", "\nranks", "\nlimit 0.01\n\nranks")
    fails("a_launch_beyond_its_limit_is_a_timeout", r"^TIMEOUT .*: after 0.01 s$")
    with open(os.path.join(c.case, "expect"), "w") as f:
        f.write(expect.replace("\nranks", "\nneeds cuda=always\n\nranks", 1))
    code, text = c.run()
    tap.result(code == 0 and re.search(r"^SKIP .*: needs cuda=always, this program has cuda=", text, re.M) and
               text.endswith("0 passed, 0 failed, 1 skipped\n"), "a_skip_says_why", text)


def tensors(tap, m):
    """The same for gradients and parameters, and what their sketches are worth."""
    rng = np.random.default_rng(5)
    x = rng.normal(size=(40, 50))
    ratios = [np.linalg.norm(sketch(v)) / np.linalg.norm(v) for v in rng.normal(size=(200, 2000))]
    tap.result(0.5 < min(ratios) and max(ratios) < 1.5 and abs(np.mean(ratios) - 1) < 0.05, "a_sketch_keeps_norms", ratios)
    tap.result(np.allclose(sketch(x) - sketch(2 * x[::-1]), sketch(x - 2 * x[::-1]), atol=1e-12) and
               np.all(sketch(np.eye(1, 2000, 77)) != 0), "a_sketch_is_linear_and_sees_every_element")
    c = Copy(m, "510_language", "fp64")
    path, wide = os.path.join(c.case, "expect"), []
    with open(path) as f:
        for line in f:
            words = line.split()
            wide.append("%s 0 1e-6 wide\n" % words[0] if words and words[0] in TENSORS else line)
    with open(path, "w") as f:
        f.writelines(wide[:next(i for i, line in enumerate(wide) if line == "reference fp32\n")] + ["launch fp64_l\n"])
    for kind, name in (("gradients", "language/output_layer.weight"), ("parameters", "language/decoder.layers.0.mixer.A_log")):
        for factor, right in ((1.01, False), (0.99, True)):
            with h5py.File(c.reference, "r+") as f:
                old = f["fp64"][kind][name][()]
                f["fp64"][kind][name][...] = old * (1 + factor * 1e-6)
            code, text = c.run()
            wrong = re.search(r"^WRONG .*: %s: %s: relative distance .* tolerance 1.00e-06 \(1 of \d+ tensors\)$" % (kind, re.escape(name)), text, re.M)
            tap.result((code == 0) == right and bool(wrong) != right, "%s_moved_by_%g_tolerances" % (kind, factor), text)
            with h5py.File(c.reference, "r+") as f:
                f["fp64"][kind][name][...] = old
    with h5py.File(c.reference, "r+") as f:
        del f["fp64/gradients/language/output_layer.weight"]
    code, text = c.run()
    tap.result(code == 1 and "gradients: language/output_layer.weight is in one of run and reference only" in text, "a_missing_tensor_is_wrong", text)
    code, text = c.run("--update")
    tap.result(code == 1 and "make oracle" in text, "an_oracle's_reference_is_not_updated_from_a_run", text)


def bits(tap, m):
    """--bitwise sees one value that was moved by its last bit, in the trace and in a parameter."""
    c = Copy(m, "503_mlp", "fp32")
    c.launch = "^503_mlp/fp32$"
    kept = m.path("kept")
    code, text = c.run("--record", kept)
    tap.result(code == 0, "a_launch_is_recorded", text)
    code, text = c.run("--bitwise", kept)
    tap.result(code == 0, "the_same_program_gives_the_same_bits", text)
    for file, name, index in (("trace.h5", "lm_loss", 7), ("checkpoint.h5", "model/language/output_layer.weight", (3, 5))):
        with h5py.File(os.path.join(kept, "503_mlp", "fp32", file), "r+") as f:
            old = f[name][index]
            f[name][index] = np.nextafter(old, np.inf, dtype=f[name].dtype)
        code, text = c.run("--bitwise", kept)
        tap.result(code == 1 and re.search(r"^WRONG .*: %s: tolerance 0 \(bitwise\)" % name, text, re.M), "one_ulp_in_%s_is_wrong" % file, text)
        with h5py.File(os.path.join(kept, "503_mlp", "fp32", file), "r+") as f:
            f[name][index] = old
    with open(os.path.join(kept, "machine"), "a") as f:
        f.write("another")
    code, text = c.run("--bitwise", kept)
    tap.result(code == 1 and "recorded on another machine" in text, "bits_of_another_machine_are_refused", text)


def programs(tap, m):
    """A program that judges itself is believed only when it says so."""
    folder = m.path("programs", "100_probe")
    os.makedirs(folder)
    with open(os.path.join(folder, "expect"), "w") as f:
        f.write("ranks 1\nprogram good /bin/echo ok 1\nprogram lines /bin/echo total 42\nprogram status /bin/false\nprogram tap /bin/echo not ok 1\n"
                "program silent /bin/true\nprogram other /bin/echo total 42\nprogram absent /nonexistent/program\n")
    for name, text in (("lines", "total   42\n"), ("other", "total 43\n")):
        with open(os.path.join(folder, name + ".lines"), "w") as f:
            f.write(text)
    p = subprocess.run([RUN, "--mimo", m.binary, "--cases", m.path("programs")], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    got = dict(re.findall(r"^([A-Z]+) +100_probe/(\w+) ", p.stdout, re.M)[i][::-1] for i in range(7))
    tap.result(p.returncode == 1 and got == {"good": "OK", "lines": "OK", "status": "CRASH", "tap": "WRONG", "silent": "WRONG", "other": "WRONG",
                                             "absent": "SKIP"}, "programs_are_believed_only_when_they_say_so", p.stdout)


BOUND = {"fp64": {"lm_loss": 1e-11, "gradients": 1e-9, "parameters": 1e-8}, "fp32": {"lm_loss": 2e-6, "gradients": 2e-5, "parameters": 1e-4}}


def tolerances(tap):
    """Every comparison with another program states what was measured; its tolerance is no wider than four times that."""
    bad, seen = [], 0
    for case in cases(os.path.dirname(RUN)):
        for s in case.sections if case.oracle else ():
            for q, (atol, rtol, source) in s.tolerance.items():
                m = re.search(r": measured (\S+)$", source)
                measured = float(m.group(1)) if m else 0.0
                bound = BOUND[s.group].get(q, BOUND[s.group]["gradients"])
                seen += 1
                if atol or rtol > 4.0001 * measured or measured > bound:
                    bad.append("%s %s %s: atol %g rtol %g measured %g bound %g" % (case.name, s.group, q, atol, rtol, measured, bound))
            bad += ["%s %s: no %s" % (case.name, s.group, q) for q in DATASETS + MORE + TENSORS if q not in s.tolerance]
    tap.result(seen > 30 and not bad, "tolerances_are_at_most_four_times_what_was_measured", bad)
    size = sum(os.path.getsize(os.path.join(d, f)) for d, _, files in os.walk(os.path.dirname(RUN)) for f in files)
    tap.result(size < 20e6, "the_folder_is_below_20_MB", size)


def planted(tap):
    """Every mutant's patch applies to the sources as they are, and the launch that must see it exists."""
    launches = {case.name + "/" + l.name for case in cases(os.path.dirname(RUN)) for l in case.launches}
    folder, bad = os.path.join(os.path.dirname(RUN), "mutants"), []
    for name in sorted(os.listdir(folder)):
        with open(os.path.join(folder, name)) as f:
            text = f.read()
        caught = re.search(r"^Caught by: (\S+)$", text, re.M)
        p = subprocess.run(["patch", "-p1", "--dry-run", "--batch"], input=text, cwd=ROOT, stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT, text=True)
        if p.returncode or not caught or caught.group(1) not in launches:
            bad.append("%s: %s\nplant the error in the new lines: diff -u a/FILE b/FILE below the patch's first lines" % (name, p.stdout))
    tap.result(len(os.listdir(folder)) >= 20 and not bad, "every_mutant_applies_and_names_its_launch", "\n".join(bad))


def costs(tap, m):
    """What counts as slow, in numbers; then real runs against references of this machine as it is and as if it had been 1.5 times as fast."""
    case, = (c for c in cases(os.path.dirname(RUN)) if c.name == "900_speed")
    slow = [bool(speed.judge(x, 1.0, case.speed)) for x in (1.5, 1.01 * case.speed, float("nan"), 0.99 * case.speed, 0.5)]
    tap.result(case.speed <= 1.4 and slow == [True, True, True, False, False], "one_and_a_half_times_as_long_is_wrong", slow)
    with h5py.File(case.reference) as f:
        tap.result(set(f["cost"]) == {l.name for l in case.launches} and set(f.attrs) == {"program", "version", "git", "date", "command", "processors"},
                   "every_timed_launch_has_a_reference_that_says_where_it_is_from", [set(f["cost"]), set(f.attrs)])
    c = Copy(m, "900_speed", "language")
    with open(os.path.join(c.case, "expect"), "w") as f:
        f.write("speed %g\nranks 1\nlaunch language %s\n" % (case.speed, " ".join(next(l for l in case.launches if l.name == "language").overrides)))
    names = ("a_run_as_fast_as_its_reference_is_ok", "a_run_1.5_times_as_slow_is_wrong", "a_timed_launch_without_a_reference_fails")
    wanted = (r"^OK .*: [\d.]+ times the reference's cost, [\d.]+ iterations/s$", r"^WRONG .*: cost: .* tolerance 1\.\d+$")
    # A shared host may change its speed between a reference and the runs it judges: then all three are measured again.
    for _ in range(3):
        said = [c.run("--update"), c.run()]
        with h5py.File(c.reference, "r+") as f:
            f["cost/language"][...] = f["cost/language"][()] / 1.5
        said.append(c.run())
        right = [s[0] == i and bool(re.search(w, s[1], re.M)) for i, (w, s) in enumerate(zip(wanted, said[1:]))]
        busy = re.search(r"^900_speed: SKIP the machine is busy|^SKIP .*: the machine is busy: the yardstick got \d+ % of a processor", "\n".join(s[1] for s in said), re.M)
        if all(right) or busy:
            break
    for name, fine in zip(names, right):
        if busy and not fine:
            tap.skip(name, "the machine is busy")
        else:
            tap.result(fine, name, said)
    os.remove(c.reference)
    code, text = c.run()
    tap.result(code == 1 and re.search(r"^WRONG .*: reference.h5 is missing", text, re.M), names[2], text)


def decks(tap):
    """Family 0 leaves no deck of input/ out."""
    listed = {w for case in cases(os.path.dirname(RUN)) if case.name < "100" for l in case.launches for w in l.program}
    missing = [n for n in sorted(os.listdir(os.path.join(ROOT, "input"))) if n != "reference.nml" and "{root}/input/" + n not in listed]
    tap.result(listed and not missing, "every_deck_of_input_is_in_family_0", missing)


def main():
    tap, m = Tap(), Mimo()
    decks(tap)
    tolerances(tap)
    planted(tap)
    programs(tap, m)
    costs(tap, m)
    bits(tap, m)
    tensors(tap, m)
    coverage(tap)
    failures(tap, m)
    words = [w for q in QUICK for w in ("-k", q)]
    p = subprocess.run([RUN, "--mimo", m.binary, "--mpiexec", m.arg.mpiexec, *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                       stderr=subprocess.STDOUT, text=True, timeout=1200)
    tap.result(p.returncode == 0 and re.search(r"^[3-9] passed, 0 failed, 0 skipped$", p.stdout, re.M), "quick_launches_pass", p.stdout)
    m.close()
    tap.close()


if __name__ == "__main__":
    main()
