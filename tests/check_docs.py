#!/usr/bin/env python3
"""What the documents say: the Python examples of docs/files.md run on the files of a run, commands are understood, the README's way from
one's own pictures to a training is walked, files and links that are named exist, the man page is well-formed, `make install` installs what
works."""
import glob
import os
import re
import shutil
import subprocess
import sys

from PIL import Image

import h5py

from harness import ROOT, Mimo, Tap

DECK = os.path.join(ROOT, "input", "mock_tiny.nml")
PAGES = ["README.md", "CONTRIBUTING.md", "SECURITY.md", "src/README.md", "tests/README.md", "regression/README.md",
         *sorted(os.path.relpath(p, ROOT) for p in glob.glob(os.path.join(ROOT, "docs", "*.md")))]
# Made by a build or a run, not part of the tree.
MADE = ("build", "run", "data", "mimo", "latest_checkpointed_iteration", "iter_0000010", "trace.h5", "checkpoint.h5", "batches.h5")


def page(name):
    with open(os.path.join(ROOT, name), encoding="utf-8") as f:
        return f.read()


def examples(d):
    work = d.m.path("work")
    os.mkdir(work)
    got = d.m.run(DECK, "run.train_iters=3", "checkpoint.save=run/ckpt", "log.dump_batches=1", "eval.eval_iters=1", cwd=work)
    d.tap.result(got[0] == 0, "the_run_that_the_examples_read", got[2])
    bare = []
    for name in ("trace.h5", "batches.h5"):
        with h5py.File(os.path.join(work, "run", name), "r", locking=False) as f:
            f.visititems(lambda at, o: bare.append(name + ":" + at) if isinstance(o, h5py.Dataset) and not {"units", "description"} <= set(o.attrs) else None)
    d.tap.result(not bare, "every_dataset_has_units_and_a_description", bare)
    blocks = re.findall(r"^```python\n(.*?)^```", page("docs/files.md"), re.M | re.S)
    wanted = ("3 iterations, loss", "numbers in", "ids;", "ended with 0 at iteration 3", "")
    d.tap.result(len(blocks) == len(wanted), "every_kind_of_file_has_its_example", len(blocks))
    for i, (code, word) in enumerate(zip(blocks, wanted), 1):
        p = subprocess.run([sys.executable, "-W", "error::DeprecationWarning", "-c", code], cwd=work, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                           text=True)
        d.tap.result(p.returncode == 0 and word in p.stdout and not p.stderr, "example_%d_of_files_md_runs" % i, p.stdout + p.stderr)
        lines = len([x for x in code.splitlines() if x.strip()])
        d.tap.result(lines <= 16, "example_%d_of_files_md_is_short" % i, lines)
    d.tap.result(os.path.getsize(os.path.join(work, "mine-000000.tar")) >= 10240, "the_example_shard_is_there")


def own_data(d):
    """The lines of the README under "Your own data", on thirty pictures, with a few short iterations on two ranks."""
    section = page("README.md").split("\n### Your own data\n")[1].split("\n#")[0]
    lines = [x[4:].split("  #")[0] for x in section.splitlines() if x.startswith("    ")]
    work = d.m.path("own")
    os.makedirs(os.path.join(work, "DIR"))
    for name in ("tools", "input", "mimo"):
        os.symlink(d.m.binary if name == "mimo" else os.path.join(ROOT, name), os.path.join(work, name))
    with open(os.path.join(work, "FILE"), "w") as f:
        for i in range(30):
            Image.new("RGB", (40, 30 + i), (8 * i, 0, 255 - 8 * i)).save(os.path.join(work, "DIR", "%d.png" % i))
            f.write("%d.png\ta plain picture of the height %d\n" % (i, 30 + i))
    d.tap.result(len(lines) == 5 and lines[-1].startswith("mpiexec -n 8 ./mimo mine.nml "), "the_way_has_five_steps", lines)
    for i, line in enumerate(lines, 1):
        line = line.replace("mpiexec -n 8", d.m.arg.mpiexec + " -n 2")
        if i == len(lines):
            line += " run.train_iters=2 lr.lr_warmup_iters=1 batch.global_batch_size=2 eval.eval_iters=1"
        p = subprocess.run(line, shell=True, cwd=work, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                           env=dict(os.environ, HWLOC_PLUGINS_PATH="/nonexistent", UCX_TLS="self,posix"))
        d.tap.result(p.returncode == 0, "step_%d_from_own_pictures_to_a_training" % i, line + "\n" + p.stdout[-1500:])
    d.tap.result(os.path.exists(os.path.join(work, "run", "mine", "iter_0000002", "checkpoint.h5")), "it_leaves_a_checkpoint")


def commands(d):
    """Every ./mimo line of the README and docs/ that starts nothing long: its options and decks are known."""
    text = "\n".join(page(x) for x in PAGES)
    lines = [x.strip().split("   #")[0].strip() for x in re.findall(r"^    (?:mpiexec -n \d+ )?(\./mimo .*)$", text, re.M)]
    lines += [" ".join(x.split()) for x in re.findall(r"`(\./mimo --[^`]*)`", text)]
    d.tap.result(len(lines) >= 8, "the_documents_name_commands", lines)
    known = set(re.findall(r"^  (--[a-z-]+)", d.m.run("--help")[1], re.M))
    unknown = [x for line in lines for x in re.findall(r"(?:^| )(--[a-z-]+)", line) if x not in known]
    d.tap.result(not unknown, "they_name_only_options_that_exist", unknown)
    for line in dict.fromkeys(lines):
        deck = re.search(r"(?<!> )(input/\w+\.nml)", line)
        if not deck:
            continue
        given = re.findall(r" (\w+\.\w+=\S+)", line)
        ranks = re.search(r"--ranks (\d+)", line)
        n = ranks.group(1) if ranks else "8"
        got = d.m.run("--check", "--ranks", n, deck.group(1), *given, limit=120)
        unbuilt = [x for x in got[2].splitlines() if ": error: " in x and "is not built yet" not in x]
        d.tap.result(got[0] in (0, 2) and not unbuilt and "\nschedule" in got[1], "this_deck_checks: " + line, "%s\n%s" % (got[0], got[2][-600:]))


def exists(name):
    name = name.rstrip("/.,")
    return os.path.exists(os.path.join(ROOT, name)) or bool(glob.glob(os.path.join(ROOT, name)))


def links(d):
    for name in PAGES:
        d.tap.result(os.path.exists(os.path.join(ROOT, name)), name + "_exists")
        text = re.sub(r"^```.*?^```", "", page(name), flags=re.M | re.S)
        named = re.findall(r"!?\[[^\]]*\]\(([^)#]+)\)", text)
        named = [os.path.relpath(os.path.join(ROOT, os.path.dirname(name), x), ROOT) for x in named if "://" not in x]
        named += [x for x in re.findall(r"`((?:src|tests|tools|docs|input|jobs|regression)/[\w./*-]*)`", text)]
        lost = [x for x in named if not exists(x) and not x.startswith(MADE)]
        d.tap.result(not lost, "files_named_in_%s_exist" % name, lost)
    targets = set(re.findall(r"\bmake ([a-z][a-z-]+)", " ".join(re.findall(r"`[^`]*`|^    .*$", "\n".join(page(x) for x in PAGES), re.M))))
    helped = subprocess.run(["make", "-s", "help"], cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout
    d.tap.result(targets and not [t for t in targets if not re.search("^%s " % t, helped, re.M)], "make_targets_that_are_named_exist",
                 [t for t in targets if not re.search("^%s " % t, helped, re.M)])


def default_target(d):
    """`make` without a target, the README's build command, makes the program and nothing for GPUs."""
    plain = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    p = subprocess.run(["make", "-n", "-B"], cwd=ROOT, env=plain, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    d.tap.result(p.returncode == 0 and " -o mimo " in p.stdout and "tests/" not in p.stdout, "make_alone_builds_the_program", p.stdout[-2000:])


def manual(d):
    got = d.m.run("--man")
    d.tap.result(got[0] == 0 and got[1].startswith(".TH MIMO 1"), "man_prints_a_page", got[1][:200] + got[2])
    missing = [x for x in re.findall(r"^  (--[a-z-]+)", d.m.run("--help")[1], re.M) if x.replace("-", "\\-") not in got[1]]
    d.tap.result(not missing, "the_manual_names_every_option", missing)
    for name, command, allowed in (("mandoc", ["mandoc", "-T", "lint", "-W", "warning"], "missing date"), ("groff", ["groff", "-man", "-ww", "-Tutf8"], None)):
        if not shutil.which(command[0]):
            d.tap.skip("the_manual_is_clean_for_" + name, name + " is not installed (tools/bootstrap.sh --dev)")
            continue
        p = subprocess.run(command, input=got[1], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        said = [x for x in (p.stdout + p.stderr if name == "mandoc" else p.stderr).splitlines() if not (allowed and allowed in x)]
        d.tap.result(not said, "the_manual_is_clean_for_" + name, "\n".join(said))


def install(d):
    prefix = d.m.path("prefix")
    p = subprocess.run(["make", "-s", "install", "PREFIX=" + prefix], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    have = sorted(os.path.relpath(os.path.join(f, n), prefix) for f, _, names in os.walk(prefix) for n in names)
    d.tap.result(p.returncode == 0 and {"bin/mimo", "share/man/man1/mimo.1", "share/doc/mimo/input/mock_tiny.nml", "share/doc/mimo/README.md",
                                        "share/doc/mimo/LICENSE"} <= set(have), "install_puts_program_manual_and_decks", p.stdout + "\n".join(have))
    p = subprocess.run([os.path.join(prefix, "bin", "mimo"), "--check", os.path.join(prefix, "share", "doc", "mimo", "input", "mock_tiny.nml")],
                       stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL)
    d.tap.result(p.returncode == 0, "the_installed_program_checks_the_installed_deck", p.stderr)


class Documents:
    def __init__(self):
        self.tap, self.m = Tap(), Mimo()


def main():
    d = Documents()
    for group in (examples, commands, links, default_target, manual, install):
        if d.m.arg.k in group.__name__:
            group(d)
    d.m.close()
    d.tap.close()


if __name__ == "__main__":
    main()
