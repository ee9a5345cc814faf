#!/usr/bin/env python3
"""libFuzzer on everything that reads foreign bytes (tests/fuzz_*.c), under AddressSanitizer and UBSan.

    tests/check_fuzz.py [--seconds N] [-k WORD]     (make fuzz SECONDS=600 K=deck)

Builds the targets with clang in build/fuzz, makes their seeds, runs two at a time; what an earlier run found interesting stays in
build/fuzz/corpus. A finding fails the test and lies in build/fuzz/findings: build/fuzz/tests/fuzz_NAME FILE shows it again.
The lines of the readers that the targets have reached are counted.
"""
import argparse
import concurrent.futures
import json
import os
import re
import shutil
import subprocess
import tempfile

from fuzz_seeds import SEEDS
from harness import ROOT, Tap

FUZZ = os.path.join(ROOT, "build", "fuzz")
# Seconds in `make check`, bytes of an input, MiB that a run may take.
TARGETS = {"deck": (60, 6000, 512), "shard": (20, 20000, 512), "image": (20, 4000, 512), "tokenizer": (25, 4000, 1024), "sample": (20, 2000, 512),
           "safetensors": (25, 4000, 512), "hf_config": (20, 6000, 512), "hf_directory": (30, 12000, 512)}
# The readers whose lines are counted, over the targets that reach them, and per cent of their lines that must be reached.
READERS = {"decks": (("deck",), ["deck.c", "deck_table.c", "deck_text.c", "deck_value.c"], 90.0),
           "Hugging_Face_directories": (("safetensors", "hf_config", "hf_directory"), ["safetensors.c", "hf_config.c", "hf_directory.c", "hf_names.c"], 90.0)}


def why_not():
    """Why these tests cannot run here, or ''."""
    if not shutil.which("clang"):
        return "clang is not installed (tools/bootstrap.sh --dev)"
    with tempfile.TemporaryDirectory() as d:
        source = os.path.join(d, "x.c")
        with open(source, "w") as f:
            f.write("int LLVMFuzzerTestOneInput(const unsigned char *p, unsigned long n); "
                    "int LLVMFuzzerTestOneInput(const unsigned char *p, unsigned long n) { return 0; }\n")
        p = subprocess.run(["clang", "-fsanitize=fuzzer,address,undefined", "-fprofile-instr-generate", source, "-o", os.path.join(d, "x")],
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return "" if p.returncode == 0 else "this clang has no libFuzzer (Debian: libclang-rt-14-dev): " + p.stdout.strip().splitlines()[-1]


def fuzz(name, seconds, mimo):
    """(ok, what to say) of one target."""
    binary, corpus, findings = (os.path.join(FUZZ, *p) for p in (("tests", "fuzz_" + name), ("corpus", name), ("findings",)))
    _, longest, memory = TARGETS[name]
    seeds = os.path.join(FUZZ, "seeds", name)
    shutil.rmtree(seeds, ignore_errors=True)
    for d in (seeds, corpus, findings):
        os.makedirs(d, exist_ok=True)
    SEEDS[name](seeds, mimo)
    command = [binary, "-max_total_time=%d" % seconds, "-max_len=%d" % longest, "-rss_limit_mb=%d" % (2 * memory), "-malloc_limit_mb=%d" % memory,
               "-timeout=20", "-report_slow_units=20", "-print_final_stats=1", "-artifact_prefix=" + os.path.join(findings, name + "-"), corpus, seeds]
    if os.path.exists(seeds + ".dict"):
        command.insert(1, "-dict=" + seeds + ".dict")
    env = dict(os.environ, ASAN_OPTIONS="detect_leaks=1:allocator_may_return_null=0", UBSAN_OPTIONS="print_stacktrace=1",
               LLVM_PROFILE_FILE=os.path.join(FUZZ, name + ".profraw"))
    try:
        p = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env, cwd=ROOT,
                           timeout=4 * seconds + 240, text=True, errors="replace")
    except subprocess.TimeoutExpired as e:
        return False, "did not end by itself\n" + str(e.stdout)[-2000:]
    runs = re.search(r"stat::number_of_executed_units: (\d+)", p.stdout)
    if p.returncode == 0 and runs and int(runs.group(1)) > 0:
        return True, "%s runs in %d s" % (runs.group(1), seconds)
    return False, "status %d\n%s" % (p.returncode, "\n".join(x for x in p.stdout.splitlines() if not re.match(r"#\d+\s", x)))


def covered(reader, targets, files):
    """Per cent of the lines of src/<files> that the targets' last runs reached, or a sentence why that is not known."""
    tools = {t: shutil.which(t) or shutil.which(t + "-14") for t in ("llvm-profdata", "llvm-cov")}
    if not all(tools.values()):
        return "llvm-profdata and llvm-cov are not installed (tools/bootstrap.sh --dev)"
    data = os.path.join(FUZZ, reader + ".profdata")
    subprocess.run([tools["llvm-profdata"], "merge", "-o", data, *(os.path.join(FUZZ, t + ".profraw") for t in targets)], check=True)
    binaries = [os.path.join(FUZZ, "tests", "fuzz_" + t) for t in targets]
    text = subprocess.run([tools["llvm-cov"], "export", "-summary-only", binaries[0], *(w for b in binaries[1:] for w in ("-object", b)),
                           "-instr-profile=" + data, *(os.path.join("src", f) for f in files)], stdout=subprocess.PIPE, check=True, cwd=ROOT, text=True).stdout
    lines = {os.path.basename(f["filename"]): f["summary"]["lines"] for f in json.loads(text)["data"][0]["files"]}
    if sorted(lines) != sorted(files):
        return "the coverage names %s" % sorted(lines)
    for f in files:
        print("# %-16s %5.1f %% of %d lines" % (f, lines[f]["percent"], lines[f]["count"]))
    return 100.0 * sum(l["covered"] for l in lines.values()) / sum(l["count"] for l in lines.values())


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--mimo", default=os.path.join(ROOT, "mimo"))
    ap.add_argument("--mpiexec")
    ap.add_argument("--seconds", type=int, default=0, help="for each target")
    ap.add_argument("-k", default="", help="only targets whose name holds this")
    a = ap.parse_args()
    tap = Tap()
    names = [n for n in TARGETS if a.k in n]
    reason = why_not()
    if reason:
        for n in names:
            tap.skip("fuzz_" + n, reason)
        tap.close()
    p = subprocess.run(["make", "-j2", "BUILD=build/fuzz", "CC=clang", "SAN=2", "fuzzers"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                       cwd=ROOT, env={k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")})
    if not tap.result(p.returncode == 0, "the_fuzz_targets_build", p.stdout[-3000:]):
        tap.close()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        jobs = {n: pool.submit(fuzz, n, a.seconds or TARGETS[n][0], os.path.abspath(a.mimo)) for n in names}
        for n, job in jobs.items():
            ok, note = job.result()
            tap.result(ok, "fuzz_%s_finds_nothing" % n, note)
            if ok:
                print("# fuzz_%s: %s" % (n, note), flush=True)
    for reader, (targets, files, wanted) in READERS.items():
        if not set(targets) <= set(names):
            continue
        percent, name = covered(reader, targets, files), "%d_percent_of_the_reader_of_%s_are_reached" % (wanted, reader)
        if isinstance(percent, str):
            tap.skip(name, percent)
        else:
            tap.result(percent >= wanted, name, "%.1f %%" % percent)
    tap.close()


if __name__ == "__main__":
    main()
