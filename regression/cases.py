"""Regression cases as they lie in their folders, and the numbers of a run that they compare.

Tensors (gradients of iteration 1, parameters after the last iteration) are compared by relative L2 distance. To keep references
small a tensor is stored through `sketch`, 32 random sums of its elements: distances survive within some 15 % (Johnson-Lindenstrauss),
any wrong element changes every sum. `make oracle` compares all elements.
"""
import os
import re

import h5py
import numpy as np

EXPERTS = "moe/tokens_per_expert"
DATASETS = ("iteration", "lm_loss", "grad_norm", "num_tokens", "seq_load_balancing_loss", EXPERTS)   # every case has a line for each
MORE = ("learning_rate",)
TENSORS = ("gradients", "parameters")
SUMS = 32


class BadCase(Exception):
    """The case itself cannot be read."""


class Launch:
    def __init__(self, name, ranks, overrides, section, program=()):
        self.name, self.ranks, self.overrides, self.section, self.program = name, ranks, overrides, section, program


class Section:
    """Tolerances {quantity: (atol, rtol, source)} and where in reference.h5 their values are."""

    def __init__(self, group=""):
        self.group, self.tolerance, self.until_flip, self.unpinned, self.within = group, {}, False, False, []

    def quantities(self):
        return [q for q in DATASETS + MORE if q in self.tolerance]

    def tensors(self):
        return [q for q in TENSORS if q in self.tolerance]


class Case:
    """A folder: its deck, what is expected and the launches.

    Lines of `expect` (# starts a comment):
        <quantity> <atol> <rtol> <source...>      one per dataset of DATASETS, perhaps of MORE and TENSORS
        until_flip                                rows from the first flip of a discrete choice on do not count
        within <quantity> <i> <j> <low> <high> <source...>   besides: its values in the iterations i to j, whatever the reference says
        reference <group>                         what follows has its own tolerances, for this group of reference.h5
        oracle                                    reference.h5 comes from `make oracle`
        shards <samples> <pictures>               make such a data set and train on it
        limit <seconds>                           per launch; 600 if not given
        needs <feature>=<value>                   of `mimo --features`; otherwise every launch is a SKIP
        backend cuda                              of every launch that names no run.backend
        unpinned                                  these launches have no reference yet: judged by `within`, `memory` and `identity` alone
        memory <share>                            what a launch takes of its GPUs' memory differs from --check's table by no larger share
        identity <kind> [n]                       in every launch, besides the reference, bit for bit: the launch again (repeat), stopped
                                                  after n iterations and resumed (resume; restart: the trace alone, which leaves out two
                                                  large checkpoints), or begun with other initial weights, but then
                                                  with its first ones loaded (finetune) or exported and imported (import)
        ranks <n>                                 of the launches that follow
        launch <name> [group.key=value ...]
        speed <factor>                            launches are timed, and take at most so many times the reference's cost (speed.py)
        program <name> <word ...>                 instead of launches, and without deck and reference: a command that must end with
                                                  status 0, print no `not ok` and every line of the case's file <name>.lines if
                                                  there is one; {mimo} {tests} {python} {root} stand for the program under test, the
                                                  built tests, Python and the source tree
    """

    def __init__(self, folder):
        self.name, self.folder = os.path.basename(folder), folder
        self.deck, self.reference = os.path.join(folder, "deck.nml"), os.path.join(folder, "reference.h5")
        self.sections, self.launches, self.needs = [Section()], [], []
        self.limit, self.identity, self.stop, self.oracle, self.shards = 600.0, "", 0, False, None
        self.backend, self.memory, self.speed = "", 0.0, 0.0
        ranks, place = None, ""
        try:
            with open(os.path.join(folder, "expect")) as f:
                for number, line in enumerate(f, 1):
                    place = "%s/expect:%d: " % (self.name, number)
                    words = line.partition("#")[0].split()
                    if words:
                        ranks = self.read(words, ranks)
            place = self.name + "/expect: "
            if len(self.sections) > 1 and not self.sections[0].tolerance:
                del self.sections[0]
            programs = [l for l in self.launches if l.program]
            if programs and len(programs) == len(self.launches):
                return
            for s in self.sections if not self.speed else ():
                missing = sorted(set(DATASETS) - set(s.tolerance))
                if missing:
                    raise ValueError("quantities without a tolerance: %s" % " ".join(missing))
            if not self.launches:
                raise ValueError("no launch")
            with open(self.deck) as f:
                self.iterations = int(re.search(r"^\s*train_iters\s*=\s*(\d+)", f.read(), re.M).group(1))
        except (OSError, ValueError, IndexError, AttributeError) as e:
            raise BadCase(place + str(e)) from e

    def read(self, words, ranks):
        """Take one line in; the ranks of the launches from here on."""
        key, section = words[0], self.sections[-1]
        if key in DATASETS + MORE + TENSORS:
            if key in section.tolerance or len(words) < 4:
                raise ValueError("%s: wanted once, as `name atol rtol source`" % key)
            section.tolerance[key] = (float(words[1]), float(words[2]), " ".join(words[3:]))
        elif key == "until_flip":
            section.until_flip = True
        elif key == "within" and words[1] in section.tolerance:
            section.within.append((words[1], int(words[2]), int(words[3]), float(words[4]), float(words[5]), " ".join(words[6:])))
        elif key == "reference":
            self.sections.append(Section(words[1]))
        elif key == "oracle":
            self.oracle = True
        elif key == "shards":
            self.shards = (int(words[1]), int(words[2]))
        elif key == "limit":
            self.limit = float(words[1])
        elif key == "speed":
            self.speed = float(words[1])
        elif key == "needs":
            self.needs.append(words[1])
        elif key == "backend" and words[1] == "cuda":
            self.backend = words[1]
        elif key == "unpinned":
            section.unpinned = True
        elif key == "memory":
            self.memory = float(words[1])
        elif key == "identity" and words[1] in ("resume", "restart", "repeat", "import", "finetune"):
            self.identity, self.stop = words[1], int(words[2]) if words[1] in ("resume", "restart") else 0
        elif key == "ranks":
            return int(words[1])
        elif key == "launch":
            if ranks is None or any("=" not in w for w in words[2:]) or words[1] in [l.name for l in self.launches]:
                raise ValueError("launch %s: needs a `ranks` line before it, a new name and group.key=value" % words[1])
            self.launches.append(Launch(words[1], ranks, words[2:], section))
        elif key == "program":
            if ranks is None or len(words) < 3 or words[1] in [l.name for l in self.launches]:
                raise ValueError("program %s: needs a `ranks` line before it, a new name and a command" % words[1])
            self.launches.append(Launch(words[1], ranks, [], section, words[2:]))
        else:
            raise ValueError("unknown word '%s'" % key)
        return ranks

    def rows(self, overrides):
        """Iterations of a launch."""
        given = [int(w.split("=")[1]) for w in overrides if w.startswith("run.train_iters=")]
        return given[-1] if given else self.iterations


def cases(folder):
    """Every case below the folder, in order; a folder without a number in front is none."""
    names = sorted(n for n in os.listdir(folder) if re.match(r"\d{3}_", n) and os.path.isdir(os.path.join(folder, n)))
    return [Case(os.path.join(folder, n)) for n in names]


def read_rows(name, quantities, group=""):
    """The compared datasets of a trace or reference, valid rows only."""
    with h5py.File(name, "r", locking=False) as f:
        g = f[group] if group else f
        rows = int(g["rows"][()]) if "rows" in g else len(g["iteration"])
        return {k: g[k][:rows] for k in quantities}


# ---- tensors --------------------------------------------------------------------------------------------------------------

def checkpoint(out, iteration):
    return os.path.join(out, "ckpt", "iter_%07d" % iteration, "checkpoint.h5")


def read_group(name, group):
    """{path below the group: array} of an HDF5 file."""
    found = {}
    with h5py.File(name, "r", locking=False) as f:
        f[group or "/"].visititems(lambda path, o: found.__setitem__(path, o[()]) if isinstance(o, h5py.Dataset) else None)
    return found


def gradients(out):
    """Normalised, unclipped gradients of iteration 1 as the optimizer saw them: its first moment after one step, scaled back."""
    with h5py.File(checkpoint(out, 1), "r", locking=False) as f:
        beta, clip = (float(f["deck"].attrs["optimizer." + k]) for k in ("adam_beta1", "clip_grad"))
    norm = read_rows(os.path.join(out, "trace.h5"), ["grad_norm"])["grad_norm"][0]
    scale = 1 / (1 - beta) / (min(1.0, clip / (norm + 1e-6)) if clip > 0 else 1.0)
    moments = read_group(checkpoint(out, 1), "optimizer")
    return {n.removesuffix("/exp_avg"): m.astype(np.float64) * scale for n, m in moments.items() if n.endswith("/exp_avg")}


def heads(name):
    """Of the encoder, by the deck in a checkpoint."""
    with h5py.File(name, "r", locking=False) as f:
        return int(f["deck"].attrs["vision.num_attention_heads"])


def split_bias(tensors, heads):
    """The encoder's query, key and value biases one by one: the key bias has no gradient but rounding, which Adam turns into steps."""
    out = {}
    for n, x in tensors.items():
        if n.startswith("vision/") and n.endswith("linear_qkv.bias"):
            parts = x.reshape(heads, 3, -1)
            out.update({n + "." + p: parts[:, i].ravel() for i, p in enumerate("qkv")})
        else:
            out[n] = x
    return out


def parameters(out, iteration):
    """{module/name: array} after an iteration, biases as split_bias leaves them."""
    name = checkpoint(out, iteration)
    return split_bias(read_group(name, "model"), heads(name))


def sketch(x):
    """A short vector with about the norm of x; linear in x. Tensors of up to SUMS elements are their own sketch."""
    x = np.asarray(x, np.float64).ravel()
    if x.size <= SUMS:
        return x
    words = np.random.Philox(key=x.size).random_raw(-(-SUMS * x.size // 64))
    signs = np.unpackbits(words.view(np.uint8))[:SUMS * x.size].reshape(SUMS, x.size)
    return (2.0 * signs - 1.0) @ x / np.sqrt(SUMS)


def is_key_bias(name):
    return name.endswith("linear_qkv.bias.k")


def distance(x, y):
    """Relative L2 distance from y; 0 when both are zero, infinite for different shapes."""
    if x.shape != y.shape:
        return np.inf
    d, n = np.linalg.norm(np.asarray(x, np.float64) - y), np.linalg.norm(y)
    return 0.0 if d == 0 else d / n if n > 0 else np.inf
