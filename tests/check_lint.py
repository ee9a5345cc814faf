#!/usr/bin/env python3
"""The rules of the source tree that a program can hold. Each rule is one test; `make lint` runs only this file."""
import argparse
import collections
import functools
import glob
import os
import re
import shutil
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
# Files whose static data may change: the log, the timers, what the failure line says, signals and lazily bound symbols, and the
# process's shadow, whose table's entries get no context.
MUTABLE = {"log", "timer", "check", "yield", "run", "backend", "comm_mpi", "shadow"}
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
            if re.match(r"(cuda|cublas|cudnn|nccl)", h) and not os.path.exists(os.path.join(SRC, h)):
                found.append("src/%s includes %s" % (name, h))
    return found


def objects(build):
    """Object files of the program itself, not of the tests or of other builds that lie below."""
    for folder, dirs, names in os.walk(build):
        dirs[:] = [d for d in dirs if d in ("ref", "cuda")]
        yield from (os.path.join(folder, n) for n in sorted(names) if n.endswith(".o"))


def nm(path, *options):
    return subprocess.run(["nm", *options, path], capture_output=True, text=True).stdout.splitlines()


def mutable_data(build):
    found = []
    for path in objects(build):
        n = os.path.basename(path)
        if re.sub(r"(_f32|_f64)?\.o$", "", n) not in MUTABLE:
            found += ["%s: %s" % (n, l.split()[-1]) for l in nm(path)
                      if re.search(r" [bBdDC] ", l) and ".rel.ro" not in l and not is_relro(path, l.split()[-1])]
    return found


def is_relro(path, symbol):
    """A constant that only needs relocation lies in .data.rel.ro and does not count."""
    out = subprocess.run(["objdump", "-t", path], capture_output=True, text=True).stdout
    return any(l.split()[-1] == symbol and ".data.rel.ro" in l for l in out.splitlines() if l.strip())


def prototypes_without_contract():
    """Each prototype says Local or Collective beside it, in a comment above it with no blank line between, or the header's first
    comment ends with 'Local' for all of them."""
    part = re.compile(r"(?P<comment>/\*.*?\*/)|(?P<blank>\n[ \t]*\n)|"
                      r"^(?P<prototype>(?!static|typedef|return|extern)[A-Za-z_][\w \t*\n]*?\b(?P<name>\w+)\([^;{}]*\)[^;{}]*;(?:[ \t]*/\*.*?\*/)?)",
                      re.M | re.S)
    found = []
    for name, text in files(".h", skip=()):
        if re.search(r"\bLocal(, all)?\.\s*\*/$", text[:text.index("*/") + 2]):
            continue
        said = ""
        for m in part.finditer(text):
            if m.group("prototype") is None:
                said = said + m.group("comment") if m.group("comment") else ""
            elif not re.search(r"\b(Local|[Cc]ollective)\b", said + m.group("prototype")):
                found.append("src/%s:%d: %s" % (name, text.count("\n", 0, m.start()) + 1, m.group("name")))
    return found


# What a file exports beside names that begin with its stem or with its module, the stem's first word.
EXPORTS = {
    "arena": ("arenas_",), "backend": ("comm_select",), "check": ("errors_", "fatal", "printable", "xmalloc", "xcalloc", "xrealloc", "xstrdup", "xasprintf"),
    "data": ("picture_batch_", "text_batch_"), "io": ("batch_dump_", "checkpoint_", "export_", "import_", "trace_"), "language": ("model_",), "linear": ("param_",),
    "radio": ("model_",), "tensor": ("dtype_",), "tokenizer": ("bpe_", "merges_", "regex_", "split_", "token_", "utf8_", "vocab_"),
    "yield": ("ucp_worker_progress",), "ref": ("ref_",), "cuda": ("cuda_", "backend_", "comm_"),
}


def foreign_symbols(build):
    """Exported names that do not tell where they are defined."""
    found = []
    for path in objects(build):
        folder, stem = os.path.basename(os.path.dirname(path)), re.sub(r"(_f32|_f64)?\.o$", "", os.path.basename(path))
        module = stem.split("_")[0]
        own = (stem, module + "_") + EXPORTS.get(folder if folder in ("ref", "cuda") else module, ())
        for line in nm(path, "-g", "--defined-only"):
            symbol = line.split()[-1]
            if not symbol.startswith(own):
                found.append("%s: %s" % (os.path.relpath(path, build), symbol))
    return found


def undocumented_targets():
    """Targets of make that make help does not list."""
    said, phony = set(), set()
    for path in ("Makefile", "tools/analysis.mk"):
        text = open(os.path.join(ROOT, path), encoding="utf-8").read()
        said |= set(re.findall(r"^([a-z-]+):.*##", text, re.M))
        phony |= {t for line in re.findall(r"^\.PHONY:(.*)", text, re.M) for t in line.split()}
    return sorted(phony - said - {"FORCE", "gpu-programs", "fuzzers"})     # these three are for other targets


def cppcheck():
    """Findings of cppcheck; None when it is not installed."""
    if not shutil.which("cppcheck"):
        return None
    flags = ["cppcheck", "-j2", "--quiet", "--std=c11", "--enable=warning,performance,portability", "--library=posix", "--inline-suppr",
             "--library=tools/cppcheck.cfg", "--suppressions-list=tools/cppcheck.suppress", "--suppress=missingIncludeSystem",
             "--template={file}:{line}: {id}: {message}", "-Isrc", "-D_GNU_SOURCE"]
    found = []
    for more in (["-isrc/ref", "src"], ["-Dreal=float", "-Dref_suffix=f32", "src/ref"]):
        p = subprocess.run(flags + more, capture_output=True, text=True, cwd=ROOT)
        found += [l for l in (p.stdout + p.stderr).splitlines() if re.match(r"\S+:\d+: ", l)]
        if p.returncode != 0:
            found.append("cppcheck ended with status %d: %s" % (p.returncode, p.stderr[-300:]))
    return found


def unformatted():
    """Files that `make format` would change, lines over 100 columns; None without the clang-format of Debian 12: others lay out differently."""
    if not shutil.which("clang-format") or " 14." not in subprocess.run(["clang-format", "--version"], capture_output=True, text=True).stdout:
        return None
    paths = sorted(p for d in ("src", "src/ref", "src/cuda", "tests", "tests/gpu") for s in ("c", "h", "cu", "cuh", "cpp")
                   for p in glob.glob(os.path.join(ROOT, d, "*." + s)))
    p = subprocess.run(["clang-format", "--dry-run", "--Werror", *paths], capture_output=True, text=True)
    found = [os.path.relpath(f, ROOT) for f in sorted(set(re.findall(r"^(\S+):\d+:\d+: error", p.stderr, re.M)))]
    for path in paths:
        with open(path, encoding="utf-8") as f:                      # a text that is printed is kept whole
            found += ["%s:%d is %d columns wide" % (os.path.relpath(path, ROOT), i, len(line) - 1)
                      for i, line in enumerate(f, 1) if len(line) > 101 and '"' not in line]
    return found


# Larger than style asks, and why a cut would not make them clearer.
LARGER = {
    "src/backend.h": 330,                          # every operation's contract, once
}


def sources():
    """(path below the root, text) of every C, C++ and CUDA file of the project."""
    for folder in ("src", "src/ref", "src/cuda", "tests", "tests/gpu"):
        for n in sorted(os.listdir(os.path.join(ROOT, folder))):
            if n.endswith((".c", ".h", ".cu", ".cuh", ".cpp")):
                with open(os.path.join(ROOT, folder, n), encoding="utf-8") as f:
                    yield folder + "/" + n, f.read()


def oversized():
    """Files and functions that nobody reads in one go. Headers of tests hold code and count as such."""
    found = []
    for path, text in sources():
        kind = path.rsplit(".", 1)[1]
        most = LARGER.get(path, 900 if kind in ("cu", "cuh") else 200 if kind == "h" and path.startswith("src/") else 800)
        lines = text.splitlines()
        if len(lines) > most:
            found.append("%s has %d lines, at most %d" % (path, len(lines), most))
        start = name = None
        for i, line in enumerate(lines, 1):
            if line[:1].isalpha():
                name = next((w for w in re.findall(r"(\w+)\(", line) if not w.startswith("__")), name)
            if line == "{":
                start = i
            elif line == "}" and start:
                if i - start + 1 > LARGER.get("%s:%s" % (path, name), 120):
                    found.append("%s:%d: %s has %d lines, at most 120" % (path, start, name, i - start + 1))
                start = None
    return found


def unnamed():
    """Files that do not begin with their name and what they are."""
    found = []
    for path, text in sources():
        head = re.sub(r"^/\* ranks: [\d ]+\*/\n", "", text)
        if not head.startswith("/* %s - " % os.path.basename(path)):
            found.append("%s: the first line is not /* %s - ... " % (path, os.path.basename(path)))
    return found


def unshared(build):
    """Exported names that no other file uses: they should be static, or go."""
    texts = {path: text for path, text in sources()}
    texts["deck_params.def"] = open(os.path.join(SRC, "deck_params.def"), encoding="utf-8").read()
    words = {path: collections.Counter(re.findall(r"\w+", code_of(text))) for path, text in texts.items()}
    found = []
    for path in objects(build):
        folder, stem = os.path.split(os.path.relpath(path, build))
        if folder or not os.path.exists(os.path.join(SRC, stem[:-2] + ".c")):
            continue
        own = "src/%s.c" % stem[:-2]
        for line in nm(path, "-g", "--defined-only"):
            symbol = line.split()[-1]
            # A header names what it declares once; twice is a macro that expands to it. The shadows' names are pasted from the list of operations.
            used = (any(w[symbol] for p, w in words.items() if p != own and not re.match(r"src/.*\.h$", p))
                    or sum(w[symbol] for p, w in words.items() if re.match(r"src/.*\.h$", p)) > 1)
            if not used and symbol not in ("main", "ucp_worker_progress") and not symbol.startswith("backend_shadow_"):
                found.append("%s: %s" % (own, symbol))
    return found


def job_scripts():
    """A job requests resources and runs one line with a deck; what a run can vary is in the deck."""
    found, folder = [], os.path.join(ROOT, "jobs")
    for n in sorted(os.listdir(folder)):
        if n.endswith(".sbatch"):
            with open(os.path.join(folder, n), encoding="utf-8") as f:
                text = f.read()
            runs = re.findall(r"^srun .*? \./mimo (.*)$", text, re.M)
            if len(runs) != 1 or not re.fullmatch(r"input/\w+\.nml", runs[0]) or not os.path.exists(os.path.join(ROOT, runs[0])):
                found.append("jobs/%s: one srun line with a deck of input/, not %s" % (n, runs))
            found += ["jobs/%s: %s" % (n, l) for l in text.splitlines() if re.match(r"\s*(make|cp|gcc|nvcc|pip|apt-get)\b", l)]
    return found


def machine_paths():
    """Paths of the machine that somebody worked on."""
    p = subprocess.run(["git", "grep", "-nIE", r"(^|[^\w.])/(home|root|work)/[a-z]"], capture_output=True, text=True, cwd=ROOT)
    return None if p.returncode > 1 else p.stdout.splitlines()


def wide_prose():
    """Lines of the documents over 100 columns that are neither tables, code nor pictures."""
    found = []
    pages = [os.path.join(f, n) for f in ("", "docs", "src", "tests", "regression") for n in os.listdir(os.path.join(ROOT, f)) if n.endswith(".md")]
    for path in sorted(pages):
        with open(os.path.join(ROOT, path), encoding="utf-8") as f:
            text = re.sub(r"^```.*?^```", lambda m: "\n" * m.group(0).count("\n"), f.read(), flags=re.M | re.S)
        found += ["%s:%d" % (path, i) for i, line in enumerate(text.splitlines(), 1)
                  if len(line) > 100 and not line.startswith(("|", "    ", "!["))]
    return found


def planted_errors():
    """Patches of regression/mutants that the sources have left behind (check_regression.py asks more of them)."""
    folder = os.path.join(ROOT, "regression", "mutants")
    found = []
    for n in sorted(os.listdir(folder)):
        with open(os.path.join(folder, n)) as f:
            p = subprocess.run(["patch", "-p1", "--dry-run", "--batch"], stdin=f, capture_output=True, text=True, cwd=ROOT)
        if p.returncode:
            found.append("regression/mutants/%s does not apply: plant its error in the new lines" % n)
    return found


def main_is_short():
    text = open(os.path.join(SRC, "main.c"), encoding="utf-8").read()
    body = text[text.index("\nint main("):]
    lines = body[:body.index("\n}\n") + 2].count("\n")
    return [] if lines <= 120 else ["main() has %d lines" % lines]


def short(path, most):
    n = sum(1 for _ in open(os.path.join(ROOT, path)))
    return [] if n <= most else ["%s has %d lines, at most %d" % (path, n, most)]


def unmapped():
    """Source files that the map, src/README.md, does not name in their folder's tables, and names there without a file."""
    with open(os.path.join(SRC, "README.md"), encoding="utf-8") as f:
        text = re.sub(r"^## Words\n.*?(?=^## )", "", f.read(), flags=re.M | re.S)
    parts = re.split(r"^### (ref|cuda)/\n(.*?)(?=^##|\Z)", text, flags=re.M | re.S)
    mapped = {"": "".join(parts[::3]), **dict(zip(parts[1::3], parts[2::3]))}
    found = []
    for folder, text in mapped.items():
        named = {n for cell in re.findall(r"^\| (`[^|]*`) \|", text, re.M) for n in re.findall(r"`([^`]*)`", cell)}
        there = {n.split(".")[0] for n in os.listdir(os.path.join(SRC, folder)) if n.endswith((".c", ".h", ".cu", ".cuh", ".cpp", ".def"))}
        found += ["src/README.md lacks src/%s" % os.path.join(folder, n) for n in sorted(there - named)]
        found += ["src/README.md names %s, which is not in src/%s" % (n, folder) for n in sorted(named - there)]
    return found


# The lists of behaviours that tests pin: name in tests and in docs/pinned.md, and how many items.
PINNED = {"p12": 105, "m6": 40}


def items_of(name):
    """The items that a test's name holds: the numbers behind p12_ or m6_, several in a row."""
    return {(k, int(n)) for k, run in re.findall(r"(p12|m6)((?:_\d\d+)+)(?!\d)", name) for n in run.split("_")[1:]}


def pinned_tests():
    """Names with items in the tests' sources and among the decks that are read one by one."""
    folder = os.path.join(ROOT, "tests")
    names = {n[:-4] for n in os.listdir(os.path.join(folder, "decks", "bad")) if n.endswith(".nml") and items_of(n)}
    for n in os.listdir(folder):
        if n.endswith((".c", ".py")):
            with open(os.path.join(folder, n), encoding="utf-8") as f:
                names.update(re.findall(r"\b\w*?(?:p12|m6)_\d\d\w*", f.read()))
    return names


def pinned(text, tests):
    """What is wrong with the table of docs/pinned.md."""
    found, rows = [], {}
    for kind, number, last in re.findall(r"^\| (p12|m6)_(\d+) \|[^|]*\|([^|]*)\|$", text, re.M):
        rows.setdefault((kind, int(number)), []).append(last)
    for item in [(k, n) for k in PINNED for n in range(1, PINNED[k] + 1)]:
        if len(rows.get(item, ())) != 1:
            found.append("%s_%02d has %d rows" % (*item, len(rows.get(item, ()))))
            continue
        last = rows[item][0]
        named = re.findall(r"`([^`]*)`", last)
        found += ["%s_%02d: no test is called %s" % (*item, n) for n in named if n not in tests]
        found += ["%s_%02d: %s does not carry the number" % (*item, n) for n in named if item not in items_of(n)]
        found += ["%s_%02d lacks %s" % (*item, n) for n in sorted(tests) if item in items_of(n) and n not in named]
        if not named and not re.search(r"\bwaits for \w", last):
            found.append("%s_%02d names neither a test nor what it waits for" % item)
    return found + ["%s_%02d is no item of the lists" % item for item in sorted({*rows} | {i for n in tests for i in items_of(n)})
                    if not 1 <= item[1] <= PINNED[item[0]]]


def pinned_rules(path=os.path.join(ROOT, "docs", "pinned.md")):
    """The table as it is, and that a table with a fault would be seen."""
    tests = pinned_tests()
    with open(path, encoding="utf-8") as f:
        text = f.read()
    one = re.search(r"^\| p12_%d .*\n" % 44, text, re.M).group(0)
    faulty = (text.replace(one, ""), text.replace(one, one + one), text.replace(one, re.sub(r"`[^`]*`", "", one)), text + one.replace("44", "106", 1),
              text.replace(one, one.replace("trace_of_three_stages", "trace_of_four_stages")))
    return pinned(text, tests), ["fault %d of the table is not seen" % i for i, t in enumerate(faulty) if not pinned(t, tests)]


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--mimo")
    ap.add_argument("--mpiexec")
    ap.add_argument("--build", default=os.path.join(ROOT, "build"))
    ap.add_argument("-k", default="", help="only rules whose name holds this")
    a = ap.parse_args()
    tap = Tap()
    rules = [
        ("foreign headers stay in their files", foreign_headers),
        ("preprocessor conditionals are header guards only", conditionals),
        ("groups have a size and a rank, no other words", lambda: grep(r"nprocs|num_proc|world_size", ".c", ".h")),
        ("only check.c and comm_mpi.c end the process",
         lambda: grep(r"\b(exit|_exit|abort|MPI_Abort|quick_exit)\s*\(", ".c", allow=ENDS)),
        ("assert.h is not used", lambda: grep(r"assert\.h", ".c", ".h", raw=True)),
        ("no unsafe string functions or shell", lambda: grep(r"\b(strcpy|strcat|sprintf|gets|system|popen|atoi|atof)\s*\(", ".c")),
        ("no marks of unfinished work", lambda: grep(r"\b(TODO|FIXME|XXX|HACK)\b", ".c", ".h", raw=True)),
        ("p12_16 no mutable data outside log, timer and the process's own state", lambda: mutable_data(a.build)),
        ("exported names begin with their module", lambda: foreign_symbols(a.build)),
        ("every exported name is used by another file", lambda: unshared(a.build)),
        ("structs, unions and enums have no typedef", lambda: grep(r"\btypedef\s+(struct|union|enum)\b", ".c", ".h")),
        ("files and functions keep to their size", oversized),
        ("every file begins with its name and what it is", unnamed),
        ("every prototype says Local or Collective", prototypes_without_contract),
        ("main() has at most 120 lines", main_is_short),
        ("Makefile has at most 150 lines", lambda: short("Makefile", 150)),
        ("Makefile.inc has at most 60 lines", lambda: short("Makefile.inc", 60)),
        ("make help lists every target", undocumented_targets),
        ("jobs run a deck and nothing else", job_scripts),
        ("planted errors apply to the sources", planted_errors),
        ("no file names a place of the machine it was written on", machine_paths),
        ("the map of the source names every file", unmapped),
        ("documents are wrapped at 100 columns", wide_prose),
        ("every C file is laid out by make format", unformatted),
        ("cppcheck finds nothing", cppcheck),
    ]
    pinned = functools.lru_cache(None)(pinned_rules)
    rules += [("every pinned behaviour has its row, every numbered test its place in it", lambda: pinned()[0]),
              ("a fault of that table would be seen", lambda: pinned()[1])]
    for name, rule in rules:
        if a.k not in name:
            continue
        found = rule()
        if found is None:
            tap.skip(name, "the program it needs is not installed (tools/bootstrap.sh --dev)")
        else:
            tap.result(not found, name, "\n".join(found))
    tap.close()


if __name__ == "__main__":
    main()
