#!/usr/bin/env python3
"""The CUDA build on a machine that needs no GPU: every kernel compiles, the program and the tests of single operations link, the program
says what it lacks here and sizes a deck as the one without CUDA does, the bundle runs from another place. A SKIP where NVIDIA's compiler
or libraries are not there."""
import glob
import os
import re
import shutil
import subprocess
import sys
import time

from harness import ROOT, Mimo, Tap

DECK = os.path.join(ROOT, "input", "mock_tiny.nml")
FULL = os.path.join(ROOT, "input", "lm10.nml")
GPU = os.path.join(ROOT, "build", "gpu")
LIBRARIES = glob.glob(os.path.join(ROOT, ".cuda", "nvidia", "*", "lib"))


def lacking():
    if not LIBRARIES:
        return "no .cuda here (tools/bootstrap.sh --cuda fetches it)"
    compiler = [c for c in ("/usr/local/cuda/bin/nvcc", os.path.join(ROOT, ".cuda", "nvidia", "cu13", "bin", "nvcc")) if os.access(c, os.X_OK)]
    return "" if compiler else "no nvcc in /usr/local/cuda or .cuda"


def run(*command, **more):
    env = dict(os.environ, LD_LIBRARY_PATH=":".join([*LIBRARIES, "/usr/local/cuda/lib64"]), HWLOC_PLUGINS_PATH="/nonexistent", UCX_TLS="self,posix", **more)
    p = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", cwd=ROOT, env=env)
    return p.returncode, p.stdout


def built(tap):
    """Whether the build is there to look at."""
    start, before = time.monotonic(), os.times()
    jobs = max(1, min(len(os.sched_getaffinity(0)), 4))   # a CUTLASS kernel takes 3.5 GB
    status, text = run("make", "-j%d" % jobs, "cuda", "gpu-tests")
    after = os.times()
    print("# CUDA build: %.0f s, %.0f s of processor time" % (time.monotonic() - start, after.children_user + after.children_system
                                                             - before.children_user - before.children_system), flush=True)
    stems = [os.path.splitext(os.path.basename(n))[0] for n in glob.glob(os.path.join(ROOT, "src", "cuda", "*.cu"))]
    missing = [s for s in stems if not os.path.exists(os.path.join(GPU, "cuda", s + ".o"))]
    return tap.result(status == 0 and len(stems) > 10 and not missing, "every_kernel_compiles_and_everything_links", "%s\n%s" % (missing, text[-3000:]))


def program(m, tap):
    mimo = os.path.join(GPU, "mimo")
    status, text = run(mimo, "--features")
    features = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    tap.result(status == 0 and all(re.match(r"\d+\.", features.get(k, "no")) for k in ("cuda", "nccl", "cudnn")), "it_names_the_libraries_it_has", text)
    status, text = run(mimo, DECK, "run.backend=cuda", "run.output_dir=" + m.path("run"), CUDA_VISIBLE_DEVICES="")
    tap.result(status == 3 and text.count("error:") == 1 and "no GPU can be used" in text, "without_a_gpu_it_says_so", "%s %s" % (status, text))
    status, text = run(mimo, DECK, "run.backend=ref", "run.train_iters=2", "run.output_dir=" + m.path("ref"))
    tap.result(status == 0, "the_reference_backend_is_in_it", text[-1500:])
    tables = []
    for which in (mimo, m.binary):
        status, text = run(which, "--check", "--ranks", "1", FULL)
        tables.append((status, re.findall(r"^memory.*\n(?:  .*\n)+", text, re.M)))
    tap.result(tables[0] == tables[1] and tables[0][0] == 0 and tables[0][1], "it_sizes_a_deck_as_the_program_without_cuda", tables)


def bundle(m, tap):
    status, text = run("make", "bundle")
    place = m.path("elsewhere")
    if not tap.result(status == 0, "the_bundle_is_made", text[-1500:]):
        return
    shutil.copytree(os.path.join(ROOT, "build", "bundle"), place)
    status, text = run(os.path.join(place, "mimo"), "--version")
    tap.result(status == 0 and text.strip(), "the_bundle_runs_elsewhere", text)
    programs = {os.path.splitext(n)[0] for n in os.listdir(os.path.join(ROOT, "tests", "gpu")) if re.match(r"gpu_(?!check).*\.c$", n)}
    tap.result(programs and programs <= set(os.listdir(os.path.join(place, "tests"))), "every_test_of_an_operation_is_in_it", programs)
    status, text = run(os.path.join(place, "check_gpu"), "--gpus", "1", "--out", m.path("out"), "-k", "sentences", CUDA_VISIBLE_DEVICES="",
                       PYTHON=sys.executable)
    tap.result(status == 1 and "1 GPUs are asked for, here are 0" in text and text.endswith("0 passed, 1 failed, 0 skipped\n"),
               "check_gpu_fails_where_there_is_no_gpu", text[-1500:])


def main():
    m, tap = Mimo(), Tap()
    reason = lacking()
    if reason:
        tap.skip("the_cuda_build", reason)
    elif built(tap):
        program(m, tap)
        bundle(m, tap)
    m.close()
    tap.close()


if __name__ == "__main__":
    sys.exit(main())
