#!/usr/bin/env python3
"""What a run shows: plain lines on a pipe, a progress line on a terminal, the timers and their notes at every planned end."""
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time

from harness import ROOT, Mimo, Tap, wait_for

DECK = os.path.join(ROOT, "input", "mock_tiny.nml")
COLUMNS = 100


def screen(raw):
    """The lines of a terminal after these bytes (carriage return, erase to the end of the line)."""
    lines, column = [""], 0
    for part in re.findall(r"\x1b\[K|\r|\n|[^\x1b\r\n]+|.", raw):
        if part == "\n":
            lines.append("")
        elif part == "\r":
            column = 0
        elif part == "\x1b[K":
            lines[-1] = lines[-1][:column]
        else:
            lines[-1] = lines[-1][:column] + part + lines[-1][column + len(part):]
            column += len(part)
    return lines


class Log:
    def __init__(self):
        self.tap, self.m = Tap(), Mimo()

    def arguments(self, name, *more):
        return [DECK, "run.output_dir=" + self.m.path(name), *more]

    def on_terminal(self, name, *more, term="xterm", columns=COLUMNS):
        """(status, what the terminal received)."""
        command, env = self.m.command(self.arguments(name, *more), 0, {"TERM": term})
        master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        p = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=slave, stderr=slave, env=env, cwd=ROOT)
        os.close(slave)
        raw, end = b"", time.monotonic() + 120
        while time.monotonic() < end:
            if select.select([master], [], [], 0.1)[0]:
                try:
                    got = os.read(master, 65536)
                except OSError:             # the other side is closed
                    break
                raw += got
            elif p.poll() is not None:
                break
        if p.poll() is None and time.monotonic() >= end:
            p.kill()
        os.close(master)
        return p.wait(), raw.decode(errors="replace").replace("\r\n", "\n")


def read(*parts):
    with open(os.path.join(*parts)) as f:
        return f.read()


def terminal(c):
    status, raw = c.on_terminal("tty", "run.train_iters=60", "log.log_interval=50", "batch.global_batch_size=16", "eval.eval_iters=3")
    lines = screen(raw)
    shown = re.findall(r"\r iteration (\d+)/60 \| \d+ % \| eta: [\d:]+ \| lm loss: [\d.E+-]+ \| [\d.]+ ms \|\x1b\[K", raw)
    c.tap.result(status == 0 and len(shown) >= 1, "a_terminal_shows_a_progress_line", "status %s, %s\n%s" % (status, shown, raw[-1500:]))
    log = read(c.m.path("tty"), "run.log").splitlines()
    kept = [x for x in lines if x and not x.startswith("warning: ")]
    c.tap.result(kept == [x for x in log if not x.startswith("warning: ")], "what_stays_on_the_terminal_is_the_log",
                 "\n".join("terminal: " + x for x in kept if x not in log) + "\n".join("log: " + x for x in log if x not in kept))
    c.tap.result(not re.search(r"[\r\x1b]", read(c.m.path("tty"), "run.log")), "the_log_file_has_no_control_characters")
    status, raw = c.on_terminal("narrow", "run.train_iters=60", "log.log_interval=100", "batch.global_batch_size=16", columns=30)
    pieces = [x for x in re.findall(r"\r( iteration[^\r\x1b\n]*)", raw)]
    c.tap.result(status == 0 and pieces and max(map(len, pieces)) == 29, "the_progress_line_never_wraps", pieces)
    status, raw = c.on_terminal("dumb", "run.train_iters=30", "log.log_interval=100", term="dumb")
    c.tap.result(status == 0 and "\x1b" not in raw and "\r" not in raw, "a_dumb_terminal_gets_plain_lines", raw[-500:])
    status, raw = c.on_terminal("nan", "run.train_iters=10000", "log.log_interval=10000", "lr.lr=1e3", "language.init_method_std=1e2",
                                "optimizer.clip_grad=0", "batch.global_batch_size=16")
    lines = screen(raw)
    bad = [x for x in lines if "error:" in x]
    c.tap.result(status == 7 and len(bad) == 1 and bad[0].startswith("mimo: error:"), "an_error_takes_the_progress_line_away", "%s\n%s" % (status, bad))


def pipe(c):
    got = c.m.run(*c.arguments("pipe", "run.train_iters=30", "log.log_interval=100"))
    c.tap.result(got[0] == 0 and "\r" not in got[1] and "\x1b" not in got[1] and "ms |" not in got[1], "a_pipe_gets_plain_lines", got[1][-500:])


def tables(text):
    """{role: {section: share of the wall time}} of the last timers in a log, and their notes."""
    out, role = {}, None
    for line in text.splitlines():
        m = re.match(r"^timers: (\w+), (\d+) ranks?, ([\d.]+) s$", line)
        if m:
            role = m.group(1)
            out[role] = {"ranks": int(m.group(2)), "wall": float(m.group(3))}
        if line == "  of these:":
            role += " parts"
            out[role] = {}
        m = re.match(r"^  (\w[\w ]*?) +(\d+) +([\d.]+) +([\d.]+) +([\d.]+) +(\d+) +([\d.]+)$", line)
        if m and role:
            least, mean, most = (float(m.group(i)) for i in (3, 4, 5))
            out[role][m.group(1)] = {"calls": int(m.group(2)), "ordered": least <= mean + 1e-4 and mean <= most + 1e-4, "rank": int(m.group(6)),
                                     "share": float(m.group(7))}
    return out, re.findall(r"^NOTE: (\d+) % of the (\w+) ranks' time was spent (.*); .+$", text, re.M)


def timers(c):
    got = c.m.run(*c.arguments("timed", "topology.layout=disjoint", "run.train_iters=40", "log.log_interval=100", "eval.eval_iters=1",
                               "checkpoint.save=" + c.m.path("timed", "ckpt")), ranks=2)
    table, notes = tables(got[1])
    c.tap.result(got[0] == 0 and set(table) == {"encoder", "encoder parts", "language", "language parts"}, "each_role_has_its_timers", got[1][-3000:])
    wanted = {"start", "forward", "backward", "bridge wait", "grad sync", "optimizer", "data wait", "save", "eval", "log", "idle"}
    for role, rank in (("encoder", 0), ("language", 1)):
        t = table.get(role, {})
        sections = {k: v for k, v in t.items() if isinstance(v, dict)}
        c.tap.result(set(sections) == wanted and all(s["ordered"] and s["rank"] == rank for s in sections.values()),
                     "the_timers_of_the_%s_name_every_section" % role, t)
        total = sum(s["share"] for s in sections.values())
        c.tap.result(abs(total - 100) < 1, "the_shares_of_the_%s_add_up" % role, total)
        c.tap.result(sections.get("idle", {}).get("share", 100) < 5, "the_%s_is_nearly_always_in_a_section" % role, sections.get("idle"))
    parts = {"encoder": {"vit blocks", "projector", "agreement"}, "language": {"mamba", "attention", "dense", "moe router", "moe dispatch", "moe gemm", "moe shared", "vocabulary", "agreement"}}
    for role, names in parts.items():
        t, p = table.get(role, {}), table.get(role + " parts", {})
        whole, known = (sum(x[k]["share"] for k in names_of if k in x) for x, names_of in ((t, ("forward", "backward")), (p, names - {"agreement"})))
        c.tap.result(set(p) == names and all(x["ordered"] and x["calls"] > 0 for x in p.values()), "the_parts_of_the_%s_are_named" % role, p)
        c.tap.result(0.5 * whole < known <= whole + 0.1 * (len(p) + 1), "the_parts_of_the_%s_fit_into_forward_and_backward" % role, (whole, known))
    share = table.get("encoder", {}).get("bridge wait", {}).get("share", 0)
    c.tap.result([n for n in notes if n[1:] == ("encoder", "waiting for the language grid") and abs(int(n[0]) - share) <= 1],
                 "a_note_says_what_the_encoder_waited_for", "%s, %s" % (notes, share))
    p = c.m.start(*c.arguments("stopped", "run.train_iters=100000", "log.log_interval=10"))
    wait_for(lambda: p.text().count("lm loss:") >= 2 or p.poll() is not None)
    p.send_signal(signal.SIGTERM)
    status = p.wait(60)
    c.tap.result(status == 75 and "timers: both, 1 rank" in p.text(), "a_signal_stop_prints_the_timers", "%s\n%s" % (status, p.text()[-800:]))


def main():
    c = Log()
    for group in (terminal, pipe, timers):
        if c.m.arg.k in group.__name__:
            group(c)
    c.m.close()
    c.tap.close()


if __name__ == "__main__":
    main()
