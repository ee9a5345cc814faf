#!/usr/bin/python3
"""Draw a trace of mimo: loss, gradient norm, learning rate, expert load, time per section and rank, speed.

    tools/plot_trace.py run/demo/trace.h5 [-o run/demo/trace.png] [--title TEXT]

Works while the run goes on. Needs Debian's python3-h5py and python3-matplotlib.
"""
import argparse
import os
import sys
import warnings

try:
    import h5py
    import matplotlib
    import numpy as np
except ImportError as e:
    sys.exit("plot_trace.py: error: %s (Debian: apt-get install python3-h5py python3-matplotlib; run with /usr/bin/python3)" % e)
matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

INK, MUTED, GRID = "#1f2933", "#7b8794", "#e4e7eb"
BLUE, ORANGE, RED, GREEN = "#2563a8", "#e07b39", "#c0392b", "#2e8b57"
ENCODER, LANGUAGE, BOTH = "#fdf1e3", "#e8f1fb", "#f0f2f4"
SECTIONS = [("forward", "#2563a8"), ("backward", "#7fb0dd"), ("bridge_wait", "#e07b39"), ("grad_sync", "#9467a8"),
            ("optimizer", "#2e8b57"), ("data_wait", "#d4a72c")]
LOAD = LinearSegmentedColormap.from_list("load", ["#1b4f8a", "#8db8dd", "#f7f7f5", "#f0a572", "#b03a1e"])
SCALARS = ["iteration", "lm_loss", "grad_norm", "learning_rate", "iteration_seconds", "tokens_per_second", "skipped",
           "consumed_samples", "tflops_per_gpu", "model_tflops_per_gpu", "num_tokens"]


class Problem(Exception):
    pass


def text(value):
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def read(path):
    """Valid rows of the trace in a dictionary; Problem says what is wrong with the file."""
    if not os.path.isfile(path):
        raise Problem("no such file")
    try:
        f = h5py.File(path, "r", locking=False)
    except TypeError:                       # h5py < 3.5 knows no locking argument
        os.environ["HDF5_USE_FILE_LOCKING"] = "FALSE"
        f = h5py.File(path, "r")
    except OSError as e:
        raise Problem("not readable as HDF5: %s" % e)
    with f:
        if text(f.attrs.get("format", "")) != "mimo-trace":
            raise Problem("is no trace of mimo (format is '%s')" % text(f.attrs.get("format", "")))
        if int(f.attrs.get("format_version", 0)) != 1:
            raise Problem("has format version %s, this program reads 1" % f.attrs.get("format_version"))
        try:
            n = int(f["rows"][()])
            t = {k: f[k][:n] for k in SCALARS}
            t["total"] = f["iteration"].shape[0]
            t["experts"] = f["moe/tokens_per_expert"][:n]
            t["sections"] = {k: f["ranks/%s_seconds" % k][:n] for k, _ in SECTIONS}
            m = int(f["eval/rows"][()])
            t["eval"] = {k: f["eval/" + k][:m] for k in ("iteration", "lm_loss", "lm_loss_ablated")}
            t["grids"] = {k: int(f["ranks"].attrs.get(k, -1)) for k in ("encoder_offset", "encoder_size", "language_offset",
                                                                       "language_size")}
            deck, code = f["deck"].attrs, f["code"].attrs
            t["deck"] = {k: text(deck[k]).strip("'") for k in deck}
            t["code"] = {k: text(code[k]) for k in code}
        except KeyError as e:
            raise Problem("is incomplete: %s" % e)
    if n == 0:
        raise Problem("holds no iteration yet")
    known = t["iteration"] > 0              # rows that were lost before a resume
    if not known.any():
        raise Problem("holds no known iteration")
    for k in SCALARS:
        t[k] = t[k][known]
    t["experts"] = t["experts"][known]
    t["sections"] = {k: v[known] for k, v in t["sections"].items()}
    return t


def smooth(y, width, how=np.nanmean):
    """Centred mean (or median) over up to `width` rows, narrower at the ends; NaN counts for nothing."""
    half = width // 2
    padded = np.concatenate([np.full(half, np.nan), np.where(np.isfinite(y), y, np.nan), np.full(half, np.nan)])
    i = np.arange(len(y))
    reach = np.minimum(np.minimum(i, len(y) - 1 - i), half)[:, None]
    out = np.empty(len(y))
    for first in range(0, len(y), 4096):                                      # windows of a long run, piece by piece
        part = slice(first, min(first + 4096, len(y)))
        w = np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1)[part]
        inside = np.abs(np.arange(-half, half + 1))[None, :] <= reach[part]
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")                                   # a window of NaN only is NaN
            out[part] = how(np.where(inside, w, np.nan), axis=1)
    return out


def si(x, _=None):
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= limit:
            return ("%.3g" % (x / limit)) + unit
    return "%.3g" % x


def dress(ax, title, xlabel="iteration"):
    ax.set_title(title, loc="left", fontsize=10.5, color=INK, fontweight="bold", pad=7)
    ax.set_xlabel(xlabel, fontsize=9, color=MUTED)
    ax.tick_params(labelsize=8.5, colors=MUTED, length=0)
    ax.grid(True, color=GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, nbins=8))
    for s in ax.spines.values():
        s.set_visible(False)


def empty(ax, title, words):
    dress(ax, title, "")
    ax.set_xticks([])
    ax.set_yticks([])
    ax.text(0.5, 0.5, words, ha="center", va="center", color=MUTED, fontsize=10, transform=ax.transAxes)


def robust_limits(y, log=False):
    """Limits that a few spikes do not spoil; None when there is nothing to show."""
    y = y[np.isfinite(y) & ((y > 0) | (not log))]
    if not len(y):
        return None
    lo, hi = np.min(y), np.max(y)
    top = np.percentile(y, 99.5)
    if len(y) > 50 and hi > top + 0.6 * max(top - lo, 1e-30):
        hi = top + 0.25 * (top - lo)
    if log:
        return lo / 1.25, hi * 1.25
    pad = 0.05 * (hi - lo) or 0.05 * abs(hi) or 1.0
    return lo - pad, hi + pad


def plot_loss(ax, t):
    x, y = t["iteration"], t["lm_loss"]
    dress(ax, "Loss")
    window = min(max(1, len(y) // 40), 250)
    bad = ~np.isfinite(y)
    one = len(x) == 1
    ax.plot(x, y, color=BLUE, lw=1 if window > 2 else 2, alpha=0.35 if window > 2 else 1, marker="o" if one else None, ms=4,
            label="training" if window <= 2 else "training, each iteration")
    if window > 2:
        ax.plot(x, smooth(y, 2 * window + 1), color=BLUE, lw=2.2, label="training, mean of %d" % (2 * window + 1))
    e, shown = t["eval"], [y]
    if len(e["iteration"]):
        ax.plot(e["iteration"], e["lm_loss"], "o-", color=ORANGE, ms=4.5, lw=1.4, mec="white", mew=0.6, label="validation", zorder=4)
        shown.append(e["lm_loss"])
        if np.isfinite(e["lm_loss_ablated"]).any():
            how = {"rotate": "another sample's pictures", "zero": "pictures zeroed"}.get(
                t["deck"].get("eval.eval_picture_ablation", ""), "other pictures")
            ax.plot(e["iteration"], e["lm_loss_ablated"], "s--", color=RED, ms=4.2, lw=1.2, mec="white", mew=0.6,
                    label="validation, " + how, zorder=3)
            shown.append(e["lm_loss_ablated"])
    limits = robust_limits(np.concatenate(shown))
    if limits:
        ax.set_ylim(*limits)
    if bad.any():
        ax.plot(x[bad], np.full(bad.sum(), 0.985), "x", color=RED, ms=6, transform=ax.get_xaxis_transform(), clip_on=False,
                label="not finite (%d)" % bad.sum())
    skipped = (t["skipped"] > 0) & ~bad
    if skipped.any():
        ax.plot(x[skipped], np.full(skipped.sum(), 0.015), "|", color=MUTED, ms=8, transform=ax.get_xaxis_transform(),
                label="update skipped (%d)" % skipped.sum())
    ax.set_ylabel("nat per token", fontsize=9, color=MUTED)
    ax.legend(fontsize=8.5, frameon=False, loc="upper right", labelcolor=INK)


def plot_norm(ax, t):
    x, y = t["iteration"], t["grad_norm"]
    dress(ax, "Gradient norm, before clipping")
    window = min(max(1, len(y) // 40), 250)
    ax.plot(x, y, color=GREEN, lw=1 if window > 2 else 1.8, alpha=0.4 if window > 2 else 1, marker="o" if len(x) == 1 else None, ms=4)
    if window > 2:
        ax.plot(x, smooth(y, 2 * window + 1, np.nanmedian), color=GREEN, lw=2)
    limits = robust_limits(y, log=True)
    if limits:
        if limits[1] > 8 * limits[0]:
            ax.set_yscale("log")
            ax.set_ylim(*limits)
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if limits[1] < 500 * limits[0] else (1,)))
            ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: "%g" % v))
            ax.yaxis.set_minor_formatter(NullFormatter())
            ax.tick_params(which="minor", length=0)
        else:
            ax.set_ylim(*robust_limits(y))
    clip = float(t["deck"].get("optimizer.clip_grad", "0").replace("d", "e") or 0)
    if clip > 0 and limits and limits[0] < clip < limits[1]:
        ax.axhline(clip, color=MUTED, lw=1, ls=":")
        ax.annotate("clip_grad = %g" % clip, (1, clip), xycoords=ax.get_yaxis_transform(), ha="right", va="bottom", fontsize=8,
                    color=MUTED)


def plot_rate(ax, t):
    dress(ax, "Learning rate")
    ax.plot(t["iteration"], t["learning_rate"], color=INK, lw=1.8, marker="o" if len(t["iteration"]) == 1 else None, ms=4)
    top = np.nanmax(t["learning_rate"])
    if top > 0:
        ax.set_ylim(0, 1.08 * top)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: "0" if v == 0 else ("%.1e" % v).replace("e-0", "e-")))


def plot_experts(fig, ax, t):
    counts = t["experts"]
    title = "Expert load: tokens over the mean of the layer"
    if counts.shape[1] == 0 or counts.shape[2] == 0:
        return empty(ax, "Expert load", "no mixture-of-experts layer")
    n, layers, experts = counts.shape
    bins = min(n, 240)
    edges = np.linspace(0, n, bins + 1).astype(int)
    c = np.add.reduceat(np.maximum(counts, 0), edges[:-1], axis=0).astype(float)
    mean = c.mean(axis=2, keepdims=True)
    load = np.where(mean > 0, c / np.where(mean > 0, mean, 1), np.nan)        # 1 = balanced
    if layers * experts > 256:              # too many rows for the eye: the spread of each layer instead of names
        load = -np.sort(-load, axis=2)
        title += ", busiest expert of each layer on top"
    image = load.transpose(1, 2, 0).reshape(layers * experts, bins)
    dress(ax, title)
    ax.grid(False)
    x = t["iteration"]
    picture = ax.imshow(np.clip(image, 0.25, 4), aspect="auto", interpolation="nearest", cmap=LOAD, norm=LogNorm(0.25, 4),
                        extent=(x[0] - 0.5, x[-1] + 0.5, layers * experts, 0))
    for layer in range(1, layers):
        ax.axhline(layer * experts, color="white", lw=2.2 if layers <= 12 else 0.8)
    step = -(-layers // 8)
    ax.set_yticks([(i + 0.5) * experts for i in range(0, layers, step)])
    pattern = t["deck"].get("language.hybrid_layer_pattern", "").replace("|", "")
    number = [i for i, kind in enumerate(pattern) if kind == "E"]
    name = number if len(number) == layers else range(layers)
    ax.set_yticklabels(["layer %d" % name[i] for i in range(0, layers, step)], fontsize=8.5)
    bar = fig.colorbar(picture, ax=ax, pad=0.015, fraction=0.04, ticks=[0.25, 0.5, 1, 2, 4])
    bar.ax.set_yticklabels(["\u2264 \u00bc", "\u00bd", "1", "2", "\u2265 4"], fontsize=8, color=MUTED)
    bar.ax.minorticks_off()
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)


def bands(t, ranks):
    """(first, last + 1, colour, name) of the runs of ranks with the same role."""
    g = t["grids"]

    def role(r):
        e = 0 <= g["encoder_offset"] <= r < g["encoder_offset"] + g["encoder_size"]
        l = 0 <= g["language_offset"] <= r < g["language_offset"] + g["language_size"]
        return (BOTH, "encoder and language") if e and l else (ENCODER, "encoder") if e else (LANGUAGE, "language") if l else (
            "white", "absent")
    out = []
    for r in range(ranks):
        if out and out[-1][2:] == role(r):
            out[-1] = (out[-1][0], r + 1) + role(r)
        else:
            out.append((r, r + 1) + role(r))
    return out


def plot_sections(ax, t):
    n = len(t["iteration"])
    recent = slice(n // 2 if n > 3 else min(1, n - 1), n)                     # the first iterations warm caches up
    with np.errstate(all="ignore"):
        means = {k: np.nan_to_num(np.nanmean(np.where(np.isfinite(v[recent]), v[recent], np.nan), axis=0)) if v.shape[1] else
                 np.zeros(0) for k, v in t["sections"].items()}
    ranks = len(means["forward"])
    title = "Time per iteration by rank, mean of the last %d" % (n - recent.start)
    if ranks == 0:
        return empty(ax, title, "no ranks")
    dress(ax, title, "rank")
    ax.grid(False, axis="x")
    whole = float(np.nanmean(t["iteration_seconds"][recent]))
    unit, name = (1e3, "ms") if whole < 1 else (1, "s")
    x, base = np.arange(ranks), np.zeros(ranks)
    for k, colour in SECTIONS:
        ax.bar(x, means[k] * unit, bottom=base, width=0.72 if ranks <= 64 else 1.0, color=colour, label=k.replace("_", " "), zorder=3)
        base += means[k] * unit
    if np.isfinite(whole):
        ax.axhline(whole * unit, color=INK, lw=1.1, ls="--", zorder=4)
        ax.annotate("whole iteration", (1, whole * unit), xycoords=ax.get_yaxis_transform(), ha="right", va="bottom", fontsize=8,
                    color=INK, xytext=(-2, 2), textcoords="offset points")
    top = 1.32 * max(np.nanmax(base), whole * unit if np.isfinite(whole) else 0, 1e-9)
    for a, b, colour, role in bands(t, ranks):
        ax.axvspan(a - 0.5, b - 0.5, color=colour, zorder=0, lw=0)
        ax.text((a + b - 1) / 2, 0.985, role, ha="center", va="top", fontsize=8.5, color=INK, style="italic",
                transform=ax.get_xaxis_transform())
    ax.set_ylim(0, top)
    ax.set_xlim(-0.5, ranks - 0.5)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=min(ranks, 16), min_n_ticks=1))
    ax.set_ylabel(name, fontsize=9, color=MUTED)
    ax.legend(fontsize=8, frameon=False, ncol=6, loc="upper center", bbox_to_anchor=(0.5, -0.13), labelcolor=INK, handlelength=1,
              columnspacing=1.1, handletextpad=0.4)


def plot_speed(ax, t):
    x, window = t["iteration"], min(max(1, len(t["iteration"]) // 40), 250)
    dress(ax, "Speed")
    marker = "o" if len(x) == 1 else None
    tokens, seconds = t["tokens_per_second"], t["iteration_seconds"]
    unit, name = (1e3, "ms") if np.nanmedian(seconds) < 1 else (1, "s")
    ax.plot(x, tokens, color=BLUE, lw=1, alpha=0.3 if window > 2 else 1, marker=marker, ms=4)
    ax.plot(x, smooth(tokens, 2 * window + 1, np.nanmedian), color=BLUE, lw=2)
    ax.set_ylabel("tokens per second", fontsize=9, color=BLUE)
    ax.yaxis.set_major_formatter(FuncFormatter(si))
    ax.set_ylim(0, 1.12 * max(np.nanpercentile(tokens, 99.5), 1e-9))
    other = ax.twinx()
    for s in other.spines.values():
        s.set_visible(False)
    other.plot(x, seconds * unit, color=ORANGE, lw=1, alpha=0.3 if window > 2 else 1, marker=marker, ms=4)
    other.plot(x, smooth(seconds, 2 * window + 1, np.nanmedian) * unit, color=ORANGE, lw=2)
    other.set_ylim(0, 1.25 * max(np.nanpercentile(seconds, 98) * unit, 1e-9))
    other.set_ylabel("%s per iteration" % name, fontsize=9, color=ORANGE)
    other.tick_params(labelsize=8.5, colors=MUTED, length=0)


def headline(t):
    e, parts = t["eval"], []
    parts.append("iteration %s of %s" % (si(t["iteration"][-1]) if t["iteration"][-1] >= 1e6 else t["iteration"][-1],
                                         t["iteration"][-1] - len(t["iteration"]) + t["total"]))
    parts.append("%s samples" % si(float(t["consumed_samples"][-1])))
    finite = t["lm_loss"][np.isfinite(t["lm_loss"])]
    if len(finite) == 1:
        parts.append("loss %.4g" % finite[0])
    elif len(finite):
        parts.append("loss %.4g \u2192 %.4g" % (finite[0], np.mean(finite[-max(1, len(finite) // 50):])))
    if len(e["iteration"]):
        parts.append("validation %.4g \u2192 %.4g" % (e["lm_loss"][0], e["lm_loss"][-1]))
        gap = e["lm_loss_ablated"][-1] - e["lm_loss"][-1]
        if np.isfinite(gap):
            parts.append("the pictures are worth %.3g nat per token" % gap)
    return "     ".join(parts)


def main():
    ap = argparse.ArgumentParser(description="Draw a trace of mimo as one picture; works while the run goes on.")
    ap.add_argument("trace", help="trace.h5 of a run")
    ap.add_argument("-o", "--output", metavar="PNG", help="picture to write (default: beside the trace, .png)")
    ap.add_argument("--title", help="headline (default: run.title of the deck, else the directory)")
    arg = ap.parse_args()
    output = arg.output or os.path.splitext(arg.trace)[0] + ".png"
    try:
        t = read(arg.trace)
    except (Problem, OSError) as e:
        sys.exit("plot_trace.py: error: %s: %s" % (arg.trace, e))
    title = arg.title or t["deck"].get("run.title") or os.path.basename(os.path.dirname(os.path.abspath(arg.trace))) or "mimo"

    plt.rcParams.update({"font.family": "DejaVu Sans", "axes.facecolor": "white", "figure.facecolor": "white"})
    fig = plt.figure(figsize=(14, 10.2))
    grid = fig.add_gridspec(3, 12, left=0.055, right=0.955, top=0.885, bottom=0.085, hspace=0.42, wspace=1.3,
                            height_ratios=[1.25, 0.85, 1])
    plot_loss(fig.add_subplot(grid[0, :8]), t)
    plot_norm(fig.add_subplot(grid[0, 8:]), t)
    plot_experts(fig, fig.add_subplot(grid[1, :8]), t)
    plot_rate(fig.add_subplot(grid[1, 8:]), t)
    plot_sections(fig.add_subplot(grid[2, :7]), t)
    plot_speed(fig.add_subplot(grid[2, 7:]), t)
    fig.text(0.055, 0.957, title, fontsize=17, fontweight="bold", color=INK)
    fig.text(0.055, 0.928, headline(t), fontsize=10.5, color=INK)
    fig.text(0.955, 0.957, "mimo %s, %s" % (t["code"].get("version", "?"), t["code"].get("git", "?")), fontsize=8.5, color=MUTED,
             ha="right")
    partial = output + ".part"
    try:
        fig.savefig(partial, dpi=110, format="png")
        os.replace(partial, output)
    except OSError as e:
        sys.exit("plot_trace.py: error: %s: cannot write: %s" % (output, e))
    print(output)


if __name__ == "__main__":
    main()
