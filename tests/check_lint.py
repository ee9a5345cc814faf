#!/usr/bin/env python3
"""The rules of the source tree that a program can hold. Each rule is one test; `make lint` runs only this file."""
import argparse
import os
import re
import subprocess

from harness import ROOT, Tap

SRC = os.path.join(ROOT, "src")

# Where a foreign header may be included.
CONFINED = {
    "mpi.h": {"main.c", "topology.c", "comm_mpi.c", "comm_sum.c", "comm_sum.h", "code.c", "io_hdf5.c", "io_tensors.c"},
    "hdf5.h": {"code.c"} | {f for f in os.listdir(SRC) if f.startswith("io_")},
    "cblas.h": {"ref/ref.h", "backend.c"},
    "archive.h": {"shard.c"},
    "archive_entry.h": {"shard.c"},
    "jpeglib.h": {"image_decode.c"},
    "png.h": {"image_decode.c", "data_tools.c"},
    "webp/decode.h": {"image_decode.c"},
    "pcre2.h": {"tokenizer_split.c"},
}
# Files whose static data may change: the log, the timers, what the failure line says, signals and lazily bound symbols.
MUTABLE = {"log", "timer", "check", "yield", "run", "backend", "comm_mpi"}
# Who may end the process.
ENDS = {"check.c", "comm_mpi.c"}


def files(*suffixes, skip=("cuda",)):
    for folder, dirs, names in os.walk(SRC):
        dirs[:] = [d for d in dirs if d not in skip]
        for n in sorted(names):
            if n.endswith(suffixes):
                path = os.path.join(folder, n)
                yield os.path.relpath(path, SRC), open(path, encoding="utf-8").read()


def code_of(text):
    """Without comments and string literals, line structure kept."""
    def blank(m):
        return re.sub(r"[^\n]", " ", m.group(0))
    return re.sub(r'/\*.*?\*/|//[^\n]*|"(?:\\.|[^"\\\n])*"', blank, text, flags=re.S)


def grep(pattern, *suffixes, allow=(), raw=False):
    found = []
    for name, text in files(*suffixes):
        if name in allow:
            continue
        for i, line in enumerate((text if raw else code_of(text)).splitlines(), 1):
            if re.search(pattern, line):
                found.append("src/%s:%d: %s" % (name, i, line.strip()))
    return found


def conditionals():
    found = []
    for name, text in files(".c", ".h"):
        lines = code_of(text).splitlines()
        guard = "MIMO_(\\w+_)?" + re.sub(r"[^A-Z0-9]", "_", os.path.basename(name).upper())
        for i, line in enumerate(lines, 1):
            if re.match(r"\s*#\s*(if|ifdef|ifndef|elif|else)\b", line) and not re.match(r"#ifndef %s\b" % guard, line):
                found.append("src/%s:%d: %s" % (name, i, line.strip()))
    return found


def foreign_headers():
    found = []
    for name, text in files(".c", ".h"):
        for m in re.finditer(r'#include [<"]([^>"]+)[>"]', text):
            h = m.group(1)
            if h in CONFINED and name not in CONFINED[h] and os.path.basename(name) not in CONFINED[h]:
                found.append("src/%s includes %s" % (name, h))
            if re.match(r"(cuda|cublas|cudnn|nccl)", h):
                found.append("src/%s includes %s" % (name, h))
    return found


def mutable_data(build):
    found = []
    for folder, dirs, names in os.walk(build):
        dirs[:] = [d for d in dirs if d in ("ref", "cuda")]   # not the other builds that lie below
        for n in sorted(names):
            stem = re.sub(r"(_f32|_f64)?\.o$", "", n)
            if not n.endswith(".o") or stem in MUTABLE or "tests" in folder:
                continue
            out = subprocess.run(["nm", os.path.join(folder, n)], capture_output=True, text=True).stdout
            found += ["%s: %s" % (n, l.split()[-1]) for l in out.splitlines() if re.search(r" [bBdDC] ", l) and ".rel.ro" not in l
                      and not is_relro(os.path.join(folder, n), l.split()[-1])]
    return found


def is_relro(path, symbol):
    """A constant that only needs relocation lies in .data.rel.ro and does not count."""
    out = subprocess.run(["objdump", "-t", path], capture_output=True, text=True).stdout
    return any(l.split()[-1] == symbol and ".data.rel.ro" in l for l in out.splitlines() if l.strip())


def prototypes_without_contract():
    found = []
    for name, text in files(".h"):
        if re.search(r"^[a-z][\w \*]*\b\w+\([^;{]*\)[^;{]*;", text, re.M) and not re.search(r"\bLocal\b|\bCollective\b", text):
            found.append("src/%s says neither Local nor Collective" % name)
    return found


def main_is_short():
    text = open(os.path.join(SRC, "main.c"), encoding="utf-8").read()
    body = text[text.index("\nint main("):]
    lines = body[:body.index("\n}\n") + 2].count("\n")
    return [] if lines <= 120 else ["main() has %d lines" % lines]


def short(path, most):
    n = sum(1 for _ in open(os.path.join(ROOT, path)))
    return [] if n <= most else ["%s has %d lines, at most %d" % (path, n, most)]


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--mimo")
    ap.add_argument("--mpiexec")
    ap.add_argument("--build", default=os.path.join(ROOT, "build"))
    a = ap.parse_args()
    tap = Tap()
    rules = [
        ("foreign headers stay in their files", foreign_headers()),
        ("preprocessor conditionals are header guards only", conditionals()),
        ("groups have a size and a rank, no other words", grep(r"nprocs|num_proc|world_size", ".c", ".h")),
        ("only check.c and comm_mpi.c end the process", grep(r"\b(exit|_exit|abort|MPI_Abort|quick_exit)\s*\(", ".c", allow=ENDS)),
        ("assert.h is not used", grep(r"assert\.h", ".c", ".h", raw=True)),
        ("no unsafe string functions or shell", grep(r"\b(strcpy|strcat|sprintf|gets|system|popen|atoi|atof)\s*\(", ".c")),
        ("no marks of unfinished work", grep(r"\b(TODO|FIXME|XXX|HACK)\b", ".c", ".h", raw=True)),
        ("no mutable data outside log, timer and the process's own state", mutable_data(a.build)),
        ("every header says Local or Collective", prototypes_without_contract()),
        ("main() has at most 120 lines", main_is_short()),
        ("Makefile has at most 150 lines", short("Makefile", 150)),
        ("Makefile.inc has at most 60 lines", short("Makefile.inc", 60)),
    ]
    for name, found in rules:
        tap.result(not found, name, "\n".join(found))
    tap.close()


if __name__ == "__main__":
    main()
