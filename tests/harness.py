"""What the programs tests/check_*.py share: running mimo, reading traces, TAP."""
import argparse, io, json, os, shutil, subprocess, sys, tarfile, tempfile, time

import h5py
import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class Tap:
    """Counts tests and prints them in TAP as they end."""

    def __init__(self):
        self.n = self.failed = 0

    def result(self, ok, name, note=""):
        self.n += 1
        self.failed += not bool(ok)
        print("%s %d - %s" % ("ok" if ok else "not ok", self.n, name.replace("#", "")))
        if not ok and str(note):
            for line in str(note).splitlines()[-25:]:
                print("# " + line)
        sys.stdout.flush()
        return ok

    def skip(self, name, reason):
        self.n += 1
        print("ok %d - %s # SKIP %s" % (self.n, name, reason), flush=True)

    def close(self):
        print("1..%d" % self.n)
        sys.exit(1 if self.failed or not self.n else 0)


class Mimo:
    """The program under test with a scratch directory that goes away with it."""

    def __init__(self):
        ap = argparse.ArgumentParser()
        ap.add_argument("--mimo", default=os.path.join(ROOT, "mimo"))
        ap.add_argument("--mpiexec", default="mpiexec.mpich")
        ap.add_argument("--keep", action="store_true", help="leave the scratch directory and print its name")
        ap.add_argument("-k", default="", help="only cases whose name holds this")
        self.arg = ap.parse_args()
        self.binary = os.path.abspath(self.arg.mimo)
        self.scratch = tempfile.mkdtemp(prefix="mimo-check-")

    def path(self, *parts):
        return os.path.join(self.scratch, *parts)

    def command(self, arguments, ranks, env):
        command = [self.binary, *arguments]
        if ranks:
            command = [self.arg.mpiexec, "-n", str(ranks)] + command
        return command, dict(os.environ, HWLOC_PLUGINS_PATH="/nonexistent", UCX_TLS="self,posix", **(env or {}))

    def start(self, *arguments, ranks=0, env=None, cwd=ROOT):
        """The process, left running; its stdout and stderr go to one file, process.text() reads it."""
        command, e = self.command(arguments, ranks, env)
        fd, name = tempfile.mkstemp(dir=self.scratch, suffix=".out")
        with os.fdopen(fd, "wb") as out:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=e, cwd=cwd)

        def text():
            with open(name, errors="replace") as f:
                return f.read()
        process.text = text
        return process

    def run(self, *arguments, ranks=0, stdin=None, limit=300, env=None, cwd=ROOT):
        """(status, stdout, stderr); ranks = 0: without a launcher."""
        command, e = self.command(arguments, ranks, env)
        try:
            p = subprocess.run(command, input=stdin, stdin=None if stdin is not None else subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=limit, env=e, cwd=cwd, text=True,
                               errors="replace")
            return p.returncode, p.stdout, p.stderr
        except subprocess.TimeoutExpired as t:
            return "timeout after %d s" % limit, str(t.stdout or ""), str(t.stderr or "")

    def close(self):
        if self.arg.keep:
            print("# scratch: " + self.scratch)
        else:
            shutil.rmtree(self.scratch, ignore_errors=True)


def python_with(*modules):
    """A Python interpreter that can import these packages of the Python index, or None. ORACLE_PYTHON names one to try first, else
    there is the one of tools/bootstrap.sh --oracle."""
    for python in (os.environ.get("ORACLE_PYTHON"), os.path.join(ROOT, ".oracle", "bin", "python"), sys.executable):
        if python and os.path.exists(python) and subprocess.run([python, "-c", "import " + ", ".join(modules)], stdout=subprocess.DEVNULL,
                                     stderr=subprocess.DEVNULL).returncode == 0:
            return python
    return None


def trace(directory):
    """Valid rows of a trace as {name: array}."""
    with h5py.File(os.path.join(directory, "trace.h5"), "r", locking=False) as f:
        rows = int(f["rows"][()])
        out = {k: f[k][:rows] for k in ("iteration", "lm_loss", "grad_norm", "num_tokens", "learning_rate", "skipped",
                                        "seq_load_balancing_loss", "consumed_samples")}
        out["tokens_per_expert"] = f["moe/tokens_per_expert"][:rows] if "moe/tokens_per_expert" in f else np.zeros((rows, 0, 0))
        for k in ("rows", "iteration", "lm_loss", "lm_loss_ablated"):
            out["eval/" + k] = f["eval/" + k][()]
    return out


def first_flip(a, b):
    """Row and E layer where the dispatched tokens first differ, or None."""
    d = np.argwhere(np.any(a["tokens_per_expert"] != b["tokens_per_expert"], axis=2))
    return (int(d[0][0]), int(d[0][1])) if len(d) else None


def flipped_token(a, b, iteration):
    """Where two runs that dumped their batches (log.dump_batches) first chose other experts in an iteration, as text; None if nowhere."""
    with h5py.File(os.path.join(a, "batches.h5"), "r", locking=False) as f, \
            h5py.File(os.path.join(b, "batches.h5"), "r", locking=False) as g:
        x, y = (h["iteration_%06d" % iteration] for h in (f, g))
        length = x["input_ids"].shape[1]
        where = np.argwhere(x["experts"][()] != y["experts"][()])
        if not len(where):
            return None
        row, column = (int(v) for v in where[0])
        return "token %d of sample %s: experts %s and %s (column %d of E layers x K)" % (
            row % length, x["sample_key"][row // length].decode(errors="replace").rstrip("\0"), x["experts"][row].tolist(),
            y["experts"][row].tolist(), column)


def compare(a, b, tolerance, until_flip=False):
    """'' when loss and grad norm agree to the relative tolerance in every row (up to the first flip of a discrete choice when
    asked), else one sentence that names quantity, iteration and both values."""
    if len(a["lm_loss"]) != len(b["lm_loss"]) or not len(a["lm_loss"]):
        return "rows: %d and %d" % (len(a["lm_loss"]), len(b["lm_loss"]))
    flip = first_flip(a, b)
    n = len(a["lm_loss"])
    if flip is not None:
        if not until_flip:
            return "experts' tokens differ first at iteration %d, E layer %d" % (a["iteration"][flip[0]], flip[1])
        n = flip[0]
        print("# first flip of a choice: iteration %d, E layer %d" % (a["iteration"][flip[0]], flip[1]))
    for name in ("lm_loss", "grad_norm"):
        x, y = a[name][:n], b[name][:n]
        rel = np.abs(x - y) / np.maximum(np.abs(y), 1e-300)
        if not np.all(rel <= tolerance):
            i = int(np.argmax(~(rel <= tolerance)))
            return "%s at iteration %d: %.15g and %.15g, relative %.2e > %.0e" % (name, a["iteration"][i], x[i], y[i], rel[i],
                                                                                  tolerance)
    return ""


def everything(name):
    """Every dataset of an HDF5 file as {path: array}."""
    out = {}
    with h5py.File(name, "r", locking=False) as f:
        f.visititems(lambda path, o: out.__setitem__(path, o[()]) if isinstance(o, h5py.Dataset) else None)
    return out


def differing(a, b, ignore=lambda path: False):
    """Names of the datasets that are not the same bits in both, missing ones too."""
    a, b = ({k: v for k, v in x.items() if not ignore(k)} for x in (a, b))
    equal = lambda x, y: type(x) is type(y) and np.asarray(x).dtype == np.asarray(y).dtype and (
        np.asarray(x).shape == np.asarray(y).shape and np.asarray(x).tobytes() == np.asarray(y).tobytes())
    return sorted(set(a) ^ set(b)) + [k for k in sorted(set(a) & set(b)) if not equal(a[k], b[k])]


def wait_for(condition, limit=60.0):
    """Poll until the condition holds; whether it did within `limit` seconds."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return bool(condition())


def byte_letters():
    """The printable letters that stand for the 256 bytes in a byte-level vocabulary."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters, extra = {b: chr(b) for b in plain}, 256
    for b in range(256):
        if b not in letters:
            letters[b], extra = chr(extra), extra + 1
    return [letters[b] for b in range(256)]


def write_tokenizer(name, specials=("</s>", "<image>", "<|endoftext|>", "<img>", "</img>", "<Image>", "</Image>", "<pic>")):
    """A byte-level tokenizer.json without merges: one token a byte, then the special ones."""
    vocab = {letter: i for i, letter in enumerate(byte_letters())}
    added = [{"id": 256 + i, "content": s, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
              "special": True} for i, s in enumerate(specials)]
    with open(name, "w") as f:
        json.dump({"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
                   "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
                   "post_processor": None, "decoder": {"type": "ByteLevel"},
                   "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
                             "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False, "vocab": vocab,
                             "merges": []}}, f)


def write_shards(directory, samples, shards=2, seed=0, broken=(), text_every=4, pictures=1):
    """Tar shards of pictures (png, sizes 8..40 pixels) with captions, up to `pictures` in a sample, every `text_every`-th sample a plain
    text; the pictures of the samples in `broken` end too early."""
    from PIL import Image
    os.makedirs(directory)
    rng = np.random.default_rng(seed)
    for s in range(shards):
        with tarfile.open(os.path.join(directory, "%06d.tar" % s), "w", format=tarfile.USTAR_FORMAT) as tar:
            for i in range(s, samples, shards):
                parts = {"txt": ("sample %d of a test" % i).encode()}
                for k in range(1 + i % pictures if i % text_every else 0):
                    h, w = (int(x) for x in rng.integers(8, 41, 2))
                    png = io.BytesIO()
                    Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)).save(png, "PNG")
                    parts["png" if pictures == 1 else "%d.png" % k] = png.getvalue()[:40 if i in broken else None]
                for ext, data in sorted(parts.items()):
                    info = tarfile.TarInfo("%04d.%s" % (i, ext))
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
