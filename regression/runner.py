"""Launches of regression cases and the comparison of what they leave behind."""
import contextlib
import copy
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

import h5py
import numpy as np

import cases as c
import gpu
import speed
from cases import EXPERTS, read_rows

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path.insert(0, os.path.join(ROOT, "tests"))
import harness   # noqa: E402

STOPPED = 75   # the exit status of a planned stop
# Overrides of a run that leaves its last checkpoint, and of one that leaves the first as well.
LAST, BOTH = ("checkpoint.save_interval=0",), ("checkpoint.save_initial=T",)
# What a clock or an allocator decides, and the echo, which names the run's own directory.
NOT_BITWISE = re.compile(r"seconds|tokens_per_second|tflops|peak_bytes|^deck/|^code/")


# A restart finds its parameters whole and need not gather them: the first iteration after it sends less.
NOT_RESUMED = re.compile(NOT_BITWISE.pattern + r"|sent_bytes")


class Runner:
    """arg: mimo, mpiexec, record and bitwise as regression/run has them; its backend, gpus, share, ranks_per_gpu and traces may be absent."""

    def __init__(self, arg, scratch):
        self.arg, self.scratch = arg, os.path.join(scratch, "run")
        self.data, self.data_lock = os.path.join(scratch, "data"), threading.Lock()
        for folder in (self.scratch, self.data):
            os.mkdir(folder)
        self.mimo, self.tests = os.path.abspath(arg.mimo), os.path.join(ROOT, "build", "tests")
        self.serial = 0
        self.running, self.ended = set(), threading.Event()   # process groups of launches; set: none may go on
        self.env = {}   # added to the environment of every launch
        self.features = {}
        self.devices = gpu.Devices(getattr(arg, "gpus", ()), getattr(arg, "share", 1))
        self.ranks_per_gpu = getattr(arg, "ranks_per_gpu", 1)

    def beside(self):
        """A runner that shares what can be shared, to launch something at the same time."""
        other = copy.copy(self)
        other.scratch, other.serial = tempfile.mkdtemp(dir=self.scratch), 0
        return other

    def probe(self):
        """Features of the program, or '' and why there are none."""
        try:
            p = subprocess.run([self.mimo, "--features"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired) as e:
            return "%s does not run: %s" % (self.arg.mimo, e)
        self.features = dict(line.split("=", 1) for line in p.stdout.splitlines() if "=" in line)
        return "" if p.returncode == 0 and self.features else "%s --features ended with status %d" % (self.arg.mimo, p.returncode)

    def shards(self, case):
        """Overrides that train on the case's data set, made when first asked for."""
        if not case.shards:
            return []
        data = os.path.join(self.data, case.name)
        with self.data_lock:
            if not os.path.exists(data):
                harness.write_shards(data, case.shards[0], pictures=case.shards[1])
                harness.write_tokenizer(os.path.join(data, "tokenizer.json"))
        return ["data.dataset_provider=webdataset", "data.train_data_path=" + data, "data.tokenizer=" + os.path.join(data, "tokenizer.json")]

    def program(self, case, launch):
        """The outcome of a command that judges itself."""
        names = {"{mimo}": self.mimo, "{tests}": self.tests, "{python}": sys.executable, "{root}": ROOT}
        command = launch.program
        for k, v in names.items():
            command = [w.replace(k, v) for w in command]
        if not os.access(command[0], os.X_OK):
            return "SKIP %s is not built" % command[0]
        seconds, status, text = self.command(case, launch.ranks, command)
        said = {" ".join(line.split()) for line in text.splitlines()}
        wanted = os.path.join(case.folder, launch.name + ".lines")
        if seconds is None:
            return "TIMEOUT after %g s\n%s" % (case.limit, tail(text))
        if status != 0:
            return "CRASH status %s, expected 0\n%s" % (status, tail(text))
        if re.search(r"^(\[\d+\] )?not ok", text, re.M):
            return "WRONG a test of its own fails\n%s" % tail(text)
        if os.path.exists(wanted):
            with open(wanted) as f:
                missing = [line.strip() for line in f if line.strip() and " ".join(line.split()) not in said]
            if missing:
                return "WRONG no line `%s`\n%s" % (missing[0], tail(text))
        return "OK" if said else "WRONG it prints nothing"

    def go(self, case, ranks, overrides, out):
        """As `command`, for the program under test on the case's deck."""
        return self.command(case, ranks, [self.mimo, case.deck, "run.output_dir=" + out, *self.shards(case), *overrides])

    def environment(self):
        return dict(os.environ, HWLOC_PLUGINS_PATH="/nonexistent", UCX_TLS="self,posix", OPENBLAS_NUM_THREADS="1", CMOCKA_MESSAGE_OUTPUT="TAP",
                    **self.env)

    def command(self, case, ranks, command):
        """(seconds or None when the limit was hit, status, output) of one process group."""
        if ranks > 1:
            command = [self.arg.mpiexec, "-n", str(ranks)] + command
        start = time.monotonic()
        with tempfile.TemporaryFile(dir=self.scratch) as log:
            p = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.environment(), start_new_session=True)
            self.running.add(p.pid)
            try:
                if self.ended.is_set():
                    os.killpg(p.pid, signal.SIGKILL)
                status, seconds = p.wait(case.limit), time.monotonic() - start
            except subprocess.TimeoutExpired:
                status, seconds = None, None
            finally:
                if p.poll() is None:
                    os.killpg(p.pid, signal.SIGKILL)
                    p.wait()
                self.running.discard(p.pid)
            log.seek(0)
            return seconds, status, log.read().decode(errors="replace")

    def launch(self, case, ranks, overrides, expected=0, out="", saving=()):
        """(directory, ''), or (directory, outcome) when the program did not end as expected. saving: overrides of a run with checkpoints."""
        self.serial += 1
        out = out or os.path.join(self.scratch, "%04d" % self.serial)
        save = ["checkpoint.save=" + os.path.join(out, "ckpt"), *saving] if saving else []
        seconds, status, text = self.go(case, ranks, overrides + save, out)
        if seconds is None:
            return out, "TIMEOUT after %g s\n%s" % (case.limit, tail(text))
        if status != expected:
            return out, "CRASH status %s, expected %d\n%s" % (status, expected, tail(text))
        if not os.path.exists(os.path.join(out, "trace.h5")):
            return out, "CRASH status %s, but no trace.h5\n%s" % (status, tail(text))
        return out, ""

    def stop(self):
        """End the launches of all threads, those to come as well."""
        self.ended.set()
        for group in list(self.running):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)

    def clean(self):
        """Remove what the launches so far have left."""
        for n in os.listdir(self.scratch):
            shutil.rmtree(os.path.join(self.scratch, n), ignore_errors=True)

    def shared(self, launch):
        """Whether more ranks than there are GPUs share them."""
        return self.ranks_per_gpu > 1 and launch.ranks > len(self.devices.load) > 0

    def gpus(self, launch):
        """How many GPUs a launch takes."""
        return 0 if not on_gpus(launch) else len(self.devices.load) if self.shared(launch) else launch.ranks

    def predicted(self, case, launch):
        """gpu.predicted of what --check says, or {} and why."""
        p = subprocess.run([self.mimo, "--check", "--ranks", str(launch.ranks), case.deck, *launch.overrides], stdin=subprocess.DEVNULL,
                           capture_output=True, text=True, timeout=case.limit)
        table = gpu.predicted(p.stdout)
        return (table, "") if p.returncode == 0 and table else ({}, "CRASH status %s of --check\n%s" % (p.returncode, tail(p.stderr)))

    def placed(self, case, launch):
        """(the launch with the backend it is to run on, ''), or (it, the reason to skip it)."""
        asked, overrides = getattr(self.arg, "backend", ""), launch.overrides
        if asked == "cuda" and not case.backend:
            adapted, reason = gpu.adapt(case, launch)
            return adapted or launch, reason
        if asked == "ref":
            overrides = [w for w in overrides if not w.startswith(("run.backend=", "run.precision=bf16"))] + ["run.backend=ref"]
        elif case.backend and not any(w.startswith("run.backend=") for w in overrides):
            overrides = overrides + ["run.backend=" + case.backend]
        return (launch if launch.program else c.Launch(launch.name, launch.ranks, overrides, launch.section)), ""

    def ready(self, case, launch):
        """(the launch as it can run here, ''), or (it, the reason to skip it)."""
        launch, reason = self.placed(case, launch)
        reason = reason or self.skip(case, launch)
        if not reason and on_gpus(launch) and self.shared(launch):
            launch = c.Launch(launch.name, launch.ranks, launch.overrides + ["run.ranks_per_gpu=%d" % self.ranks_per_gpu], launch.section)
            reason = self.too_large(case, launch) if case.memory else ""
        return launch, reason

    def too_large(self, case, launch):
        """'' when the ranks of each GPU fit together, as far as --check can tell; else the reason to skip."""
        table, need = self.predicted(case, launch)[0], 0
        for ranks in gpu.sharers(launch.ranks, len(self.devices.load)) if table else ():
            need = max(need, gpu.wanted(table, ranks))
        return "its ranks need %.1f GiB of a GPU of %.1f together" % (need / 1024, gpu.capacity() / 1024) if need > gpu.capacity() else ""

    def skip(self, case, launch):
        """The reason to skip, or ''."""
        ranks = launch.ranks
        if on_gpus(launch) and self.features.get("cuda", "no") == "no":
            return "for GPUs, and this program was built without CUDA"
        if on_gpus(launch) and len(self.devices.load) * self.ranks_per_gpu < ranks:
            return "needs %d GPUs, here are %d%s" % (ranks, len(self.devices.load),
                                                     " for %d ranks each" % self.ranks_per_gpu if self.ranks_per_gpu > 1 else "")
        for need in case.needs:
            feature = need.partition("=")[0]
            if "%s=%s" % (feature, self.features.get(feature, "")) != need:
                return "needs %s, this program has %s=%s" % (need, feature, self.features.get(feature, ""))
        if ranks > 1 and not shutil.which(self.arg.mpiexec):
            return "%d ranks, and there is no %s" % (ranks, self.arg.mpiexec)
        return ""

    def check(self, case, launch):
        """The outcome of one launch: 'OK ...', 'WRONG ...', 'CRASH ...', 'TIMEOUT ...' or 'SKIP ...'."""
        launch, reason = self.ready(case, launch)
        if reason:
            return "SKIP " + reason
        if launch.program:
            return self.program(case, launch)
        if case.speed:
            return "SKIP times are no bits" if self.arg.record or self.arg.bitwise else speed.check(self, case, launch)
        if not on_gpus(launch):
            return self.verdict(case, launch)
        with self.devices.lend(self.gpus(launch), alone=bool(case.memory)) as lent:
            self.env = dict(self.env, CUDA_VISIBLE_DEVICES=",".join(lent), CUDA_DEVICE_ORDER="PCI_BUS_ID")
            return self.verdict(case, launch, lent)

    def verdict(self, case, launch, lent=()):
        """As `check`, for a launch that can run; lent: the GPUs that its ranks take in turn."""
        ranks, overrides = launch.ranks, launch.overrides
        if self.arg.record or self.arg.bitwise:
            out, fault = self.launch(case, ranks, overrides, saving=LAST)
            return fault or (self.record if self.arg.record else self.bitwise)(case, launch, out) or "OK"
        if not launch.section.unpinned and not os.path.exists(case.reference):
            return "WRONG reference.h5 is missing (%s writes it)" % writer(case)
        saving = () if case.identity == "restart" else BOTH if case.identity else LAST if launch.section.tensors() else ()
        with gpu.MemoryWatch() if case.memory and lent else contextlib.nullcontext() as watch:
            out, fault = self.launch(case, ranks, overrides, saving=saving)
        if getattr(self.arg, "traces", None) and os.path.exists(os.path.join(out, "trace.h5")):
            shutil.copy(os.path.join(out, "trace.h5"), os.path.join(self.arg.traces, "%s.%s.h5" % (case.name, launch.name)))
        fault, note = (fault, "") if fault else unpinned(case, launch, out) if launch.section.unpinned else compare(case, launch, out)
        if watch and not fault:
            used = watch.most()
            fault, more = self.memory(case, launch, [used.get(i, 0) for i in lent])
            note += more
        if not fault and "gradients" in launch.section.tolerance:
            first, fault = self.first_step(case, launch)
            stored = fault or c.read_group(case.reference, launch.section.group)
            fault = fault or compare_tensors(launch.section, "gradients", c.gradients(first), stored)
        if not fault and case.identity:
            fault = self.identity(case, ranks, overrides, out)
        return fault or "OK" + note

    def memory(self, case, launch, used):
        """(outcome or '', note): the MiB in use on each GPU against what --check says of its ranks."""
        table, fault = self.predicted(case, launch)
        if fault:
            return fault, ""
        rows = [(" ".join(map(str, ranks)), len(ranks), mib, gpu.wanted(table, ranks)) for ranks, mib in zip(gpu.sharers(launch.ranks, len(used)), used)]
        note = " memory, GiB used/predicted: " + ", ".join("rank %s %.1f/%.1f" % (who, mib / 1024, m / 1024) for who, _, mib, m in rows)
        far = [who for who, n, mib, m in rows if not abs(mib - m) <= case.memory * m + n * gpu.CONTEXT]
        return ("WRONG memory of rank %s: off by more than %g %%;%s" % (far[0], 100 * case.memory, note), "") if far else ("", note)

    def record(self, case, launch, out):
        """Keep what the launch left in the directory of --record."""
        kept = os.path.join(self.arg.record, case.name, launch.name)
        shutil.rmtree(kept, ignore_errors=True)
        os.makedirs(kept)
        with open(os.path.join(self.arg.record, "machine"), "w") as f:
            f.write(machine())
        for name in ("trace.h5", c.checkpoint(out, case.rows(launch.overrides))):
            shutil.copy(os.path.join(out, name), kept)
        return ""

    def bitwise(self, case, launch, out):
        """The outcome of comparing with what --record kept, or ''."""
        kept = os.path.join(self.arg.bitwise, case.name, launch.name)
        try:
            with open(os.path.join(self.arg.bitwise, "machine")) as f:
                where = f.read()
        except OSError:
            return "WRONG %s: nothing was recorded there" % self.arg.bitwise
        if where != machine():
            return "WRONG %s was recorded on another machine: bits may differ" % self.arg.bitwise
        if not os.path.exists(os.path.join(kept, "trace.h5")):
            return "WRONG this launch was not recorded in %s" % self.arg.bitwise
        return same_bits((os.path.join(kept, "trace.h5"), os.path.join(out, "trace.h5")),
                         (os.path.join(kept, "checkpoint.h5"), c.checkpoint(out, case.rows(launch.overrides))), ignore=NOT_BITWISE.search)

    def first_step(self, case, launch):
        """As `launch`, for a run of one iteration, whose checkpoint holds the gradients as the optimizer's first moments."""
        longer = [w for w in launch.overrides if not w.startswith("run.train_iters=")]
        return self.launch(case, launch.ranks, longer + ["run.train_iters=1"], saving=LAST)

    def other_start(self, case, whole, kind):
        """kind: the run's precision. (overrides of a run that draws other weights and then takes the first ones of `whole`, '' or the outcome that prevented it)"""
        other = ["language.init_method_std=0.01"]
        if case.identity == "finetune":
            return other + ["checkpoint.load=" + os.path.join(whole, "ckpt"), "checkpoint.ckpt_step=0", "checkpoint.finetune=T"], ""
        folder = whole + "_exported"
        p = subprocess.run([self.mimo, "--export", folder, c.checkpoint(whole, 0), "--dtype", kind], stdin=subprocess.DEVNULL,
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=case.limit)
        if p.returncode != 0:
            return [], "CRASH status %s of --export\n%s" % (p.returncode, tail(p.stdout))
        return other + ["checkpoint.import_%s=%s" % (m, folder) for m in ("language", "vision", "projector")], ""

    def identity(self, case, ranks, overrides, whole):
        """Once more, or in two parts, or from other weights: '' when every bit is that of `whole`."""
        rows, again, more = case.rows(overrides), whole + "_again", []
        if case.identity in ("resume", "restart"):
            part = overrides + ["run.exit_interval=%d" % case.stop]
            out, fault = self.launch(case, ranks, part, expected=STOPPED, out=again, saving=LAST)
            if not fault and len(read_rows(os.path.join(again, "trace.h5"), ["iteration"])["iteration"]) != case.stop:
                fault = "WRONG the first part did not stop after %d iterations" % case.stop
            if fault:
                return fault
            if case.identity == "restart":
                return self.restart(case, ranks, overrides, whole, again)
        elif case.identity in ("import", "finetune"):
            more, fault = self.other_start(case, whole, gpu.precision(case, c.Launch("", ranks, overrides, None)))
            if fault:
                return fault
        out, fault = self.launch(case, ranks, overrides + more, out=again, saving=LAST)
        if fault:
            return fault
        return same_bits(*((os.path.join(whole, name), os.path.join(again, name)) for name in ("trace.h5", c.checkpoint("", rows))),
                         ignore=(NOT_RESUMED if case.identity == "resume" else NOT_BITWISE).search)

    def restart(self, case, ranks, overrides, whole, part):
        """Resumes `part` without saving again: '' when the rows that follow are those of `whole`, bit for bit."""
        out, fault = self.launch(case, ranks, overrides + ["checkpoint.load=" + os.path.join(part, "ckpt")])
        if fault:
            return fault
        a, b = (read_rows(os.path.join(x, "trace.h5"), c.DATASETS) for x in (whole, out))
        first = int(b["iteration"][0]) if len(b["iteration"]) else 0
        if first != case.stop + 1 or b["iteration"][-1] != a["iteration"][-1]:
            return "WRONG the second part has %d rows from iteration %d on" % (len(b["iteration"]), first)
        for k in c.DATASETS:
            if a[k][case.stop:].tobytes() != b[k].tobytes():
                return first_bit(k, a[k][case.stop:], b[k], 1)
        return ""

    def update(self, case):
        """Write reference.h5, each of its groups from the first launch that is compared with it; '' or the outcome that prevented it."""
        if case.launches[0].program:
            return "SKIP it has no reference"
        if case.oracle:
            return "SKIP its reference is not our own: `make oracle` writes it"
        if case.speed:
            launch, reason = self.placed(case, case.launches[0])
            reason = reason or self.skip(case, launch)
            return "SKIP " + reason if reason else speed.update(self, case)
        partial = case.reference + ".new"
        with h5py.File(partial, "w") as f:
            for section in case.sections:
                fault = self.update_section(case, section, f.require_group(section.group or "/"))
                if fault.startswith("SKIP") and section.unpinned and section.group:
                    del f[section.group]
                    fault = ""
                if fault:
                    break
        if fault:
            os.remove(partial)
            return fault
        os.replace(partial, case.reference)
        return ""

    def update_section(self, case, section, group):
        """Write what the section is compared with; '' or the outcome that prevented it."""
        launch, reason = self.ready(case, next(l for l in case.launches if l.section is section))
        if reason:
            return "SKIP " + reason
        with self.devices.lend(self.gpus(launch)) as lent:
            self.env = dict(self.env, CUDA_VISIBLE_DEVICES=",".join(lent)) if lent else self.env
            out, fault = self.launch(case, launch.ranks, launch.overrides)
            if fault:
                return fault
            tensors = {}
            if "gradients" in section.tolerance:
                first, fault = self.first_step(case, launch)
                if fault:
                    return fault
                tensors = c.gradients(first)
        rows = read_rows(os.path.join(out, "trace.h5"), section.quantities())
        bad = [k for k, v in rows.items() if len(v) != case.rows(launch.overrides) or not np.all(np.isfinite(v))]
        if bad:
            return "WRONG %s: rows are missing or not finite, no reference written" % bad[0]
        for k, v in rows.items():
            group.create_dataset(k, data=v, compression="gzip" if v.size > 1000 else None)
        for k, v in tensors.items():
            group["gradients/" + k] = c.sketch(v)
        command = ["mpiexec", "-n", str(launch.ranks)] if launch.ranks > 1 else []
        group.attrs.update(program="mimo", version=self.features.get("version", ""), git=self.features.get("git", ""),
                           date=time.strftime("%Y-%m-%d", time.gmtime()),
                           command=" ".join([*command, "mimo", "regression/%s/deck.nml" % case.name, *launch.overrides]))
        return ""


def on_gpus(launch):
    return not launch.program and any(w in launch.overrides for w in ("run.backend=cuda", "run.backend=shadow"))


def machine():
    """What decides the bits of a sum besides the program: this computer and its processor."""
    with open("/proc/cpuinfo") as f:
        model = re.search(r"model name\s*: (.*)", f.read())
    return "%s, %s\n" % (os.uname().nodename, model.group(1) if model else os.uname().machine)


def same_bits(*files, ignore):
    """'' when every dataset of each pair of files is the same bit for bit, but for the ignored ones; else the outcome."""
    for one, other in files:
        a, b = harness.everything(one), harness.everything(other)
        bits = harness.differing(a, b, ignore=ignore)
        if bits:
            return first_bit(bits[0], a.get(bits[0]), b.get(bits[0]), len(bits))
        if not [k for k in a if not ignore(k)]:
            return "WRONG %s: holds nothing to compare" % os.path.basename(one)
    return ""


def first_bit(name, a, b, count):
    """Names the dataset and, where it can be told, the first element whose bits differ."""
    where = ""
    if a is None or b is None or np.shape(a) != np.shape(b):
        return "WRONG %s: missing or of another shape in one of the runs (%d datasets differ)" % (name, count)
    d = np.argwhere(np.atleast_1d(np.asarray(a) != np.asarray(b)))
    if len(d):
        i = tuple(int(x) for x in d[0])
        where = " first at %s: %r, unbroken %r" % (list(i), np.atleast_1d(b)[i], np.atleast_1d(a)[i])
    return "WRONG %s: tolerance 0 (bitwise),%s (%d datasets differ)" % (name, where, count)


def tail(text, lines=12):
    return "\n".join("    | " + x for x in text.strip().splitlines()[-lines:])


def writer(case):
    return "make oracle" if case.oracle else "regression/run --update -k " + case.name


def compare(case, launch, out):
    """(outcome or '', note): the launch's trace and tensors against the reference in its own number of iterations."""
    section, rows = launch.section, case.rows(launch.overrides)
    try:
        reference = read_rows(case.reference, section.quantities(), section.group)
    except (OSError, KeyError) as e:
        return "WRONG reference.h5: %s" % e, ""
    got = read_rows(os.path.join(out, "trace.h5"), section.quantities())
    for label, r in (("reference", reference), ("trace", got)):
        short = [k for k in r if len(r[k]) < rows]
        if short or not rows:
            return "WRONG %s: the %s has %d rows, %d wanted" % (short[0] if short else "iteration", label,
                                                                len(r[short[0]]) if short else 0, rows), ""
    if len(got["iteration"]) != rows:
        return "WRONG iteration: the trace has %d rows, %d wanted" % (len(got["iteration"]), rows), ""
    n, note = rows, ""
    if section.until_flip:
        flip = harness.first_flip(*({"tokens_per_expert": r[EXPERTS][:rows]} for r in (got, reference)))
        if flip is not None:
            row, layer = flip
            expert = int(np.argmax(got[EXPERTS][row, layer] != reference[EXPERTS][row, layer]))
            n, note = row, " up to the first flip: iteration %d, E layer %d, expert %d" % (reference["iteration"][row], layer, expert)
    # A choice that differs before any row could be compared proves nothing.
    if n == 0:
        return "WRONG %s: differs at iteration 1, E layer %d, expert %d" % (EXPERTS, layer, expert), ""
    fault = compare_rows(section, got, reference, n) or look_within(section, got)
    # After a flip, or in fewer iterations, the last parameters are others.
    if not fault and "parameters" in section.tolerance and n == rows == case.iterations:
        stored = c.read_group(case.reference, section.group)
        fault = compare_tensors(section, "parameters", c.parameters(out, rows), stored, longest_way(got))
    return fault, note


def compare_rows(section, got, reference, n):
    """The outcome of the first n rows, or ''."""
    for k in section.quantities():
        atol, rtol, _ = section.tolerance[k]
        if got[k].shape[1:] != reference[k].shape[1:]:
            return "WRONG %s: shape %s, reference %s" % (k, got[k].shape[1:], reference[k].shape[1:])
        x, y = (r[k][:n].astype(np.float64) for r in (got, reference))
        near = np.abs(x - y) <= atol + rtol * np.abs(y)   # false for NaN
        if not near.all():
            i = tuple(int(j) for j in np.argwhere(~near)[0])
            place = "" if len(i) == 1 else " at [layer, expert] %s" % list(i[1:])
            return "WRONG %s%s: value %.17g, reference %.17g, off by %.2e, tolerance %.2e (atol %g, rtol %g), first iteration %d" % (
                k, place, x[i], y[i], abs(x[i] - y[i]), atol + rtol * abs(y[i]), atol, rtol, reference["iteration"][i[0]])
    return ""


def unpinned(case, launch, out):
    """As `compare`, without a reference: the rows are there, finite, and where they must be."""
    got = read_rows(os.path.join(out, "trace.h5"), launch.section.quantities())
    bad = [k for k, v in got.items() if len(v) != case.rows(launch.overrides) or not np.all(np.isfinite(v))]
    return "WRONG %s: rows are missing or not finite" % bad[0] if bad else look_within(launch.section, got), " without a reference"


def look_within(section, got):
    """The outcome of the ranges that values must lie in, whatever the reference says, or ''."""
    for k, first, last, low, high, source in section.within:
        for i, x in zip(got["iteration"], got[k]):
            if first <= i <= last and not low <= x <= high:   # true for NaN
                return "WRONG %s: value %.6g in iteration %d, must lie within %g and %g (%s)" % (k, x, i, low, high, source)
    return ""


def longest_way(rows):
    """How far Adam moves an element whose gradient is noise, at most: a learning rate in each iteration."""
    return float(np.sum(rows["learning_rate"]))


def compare_tensors(section, kind, got, stored, longest=0.0):
    """The outcome of every tensor, or ''. A key bias is only bounded, by the `longest` way that Adam can take."""
    atol, rtol, _ = section.tolerance[kind]
    stored = {n.removeprefix(kind + "/"): x for n, x in stored.items() if n.startswith(kind + "/")}
    other = sorted(set(got) ^ set(stored))
    if other or not stored:
        return "WRONG %s: %s is in one of run and reference only" % (kind, other[0] if other else "nothing")
    far = []
    for n in sorted(stored):
        if kind == "parameters" and c.is_key_bias(n):
            if not np.all(np.abs(got[n]) <= longest):
                return "WRONG %s: %s: an element of %.2e, Adam's steps on rounding reach %.2e" % (kind, n, np.abs(got[n]).max(), longest)
            continue
        x, y = c.sketch(got[n]), stored[n]
        if x.shape != y.shape or not np.linalg.norm(x - y) <= atol + rtol * np.linalg.norm(y):   # false for NaN
            far.append((c.distance(x, y), n))
    if far:
        return "WRONG %s: %s: relative distance %.2e, tolerance %.2e (%d of %d tensors)" % (kind, max(far)[1], max(far)[0], rtol, len(far), len(stored))
    return ""
