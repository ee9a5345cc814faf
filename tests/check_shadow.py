#!/usr/bin/env python3
"""A new operation without a shadow and without cases for it does not compile: a copy of the sources gets one, in the table alone or in
the list of operations too, and the compiler must name it in each file that lacks it."""
import argparse
import os
import re
import shutil
import subprocess
import tempfile

from harness import ROOT, Tap

MEMBER = "    void (*novelty)(struct stream *s, in_t x, out_t y);\n"
# Each file and what it must be told to hold.
LACKING = {
    "src/backend_shadow.c": "backend_shadow_novelty",
    "src/ref/backend_ref.c": "ref_novelty_f32",
    "tests/test_shadow.c": "case_novelty",
}


def copy(folder, listed):
    for name in ("src", "tests"):
        shutil.copytree(os.path.join(ROOT, name), os.path.join(folder, name))
    for path, before, text, wanted in (("src/backend.h", "    void (*sum_squares)", MEMBER, True),
                                       ("src/backend_list.h", "X(sum_squares)", "X(novelty) ", listed)):
        path = os.path.join(folder, path)
        with open(path, encoding="utf-8") as f:
            old = f.read()
        assert old.count(before) == 1
        if wanted:
            with open(path, "w", encoding="utf-8") as f:
                f.write(old.replace(before, text + before))


def errors(folder, path):
    """What the compiler says. An object would not link either, for what is declared and nowhere defined."""
    p = subprocess.run(["gcc", "-std=c11", "-D_GNU_SOURCE", "-Isrc", "-Itests", "-I/usr/include/hdf5/mpich", "-c", "-o", "object", path],
                       cwd=folder, capture_output=True, text=True)
    if p.returncode == 0:
        return "undefined " + subprocess.run(["nm", "-u", "object"], cwd=folder, capture_output=True, text=True).stdout
    return p.stderr


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--mimo")
    ap.add_argument("--mpiexec")
    ap.parse_args()
    tap = Tap()
    for listed in (False, True):
        with tempfile.TemporaryDirectory(prefix="mimo-shadow-") as folder:
            copy(folder, listed)
            for path, symbol in LACKING.items():
                said = errors(folder, path)
                word = symbol if listed else "every member of struct backend_ops is in one of the lists"
                tap.result(re.search(r"\b%s\b" % word, said), "%s without a new operation %s does not build" % (os.path.basename(path), "of the list" if listed else "of the table"), said)
    tap.close()


if __name__ == "__main__":
    main()
