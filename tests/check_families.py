#!/usr/bin/env python3
"""The regression cases of all families but that of the layouts, each launch one test. The layouts, family
300, are `make regression`; check_regression and check_layouts run a choice of them."""
import os
import re
import subprocess

from harness import ROOT, Mimo, Tap

FAMILIES = ("^0", "^1", "^2", "^4", "^5", "^9")
LINE = re.compile(r"^(OK|WRONG|CRASH|TIMEOUT|SKIP) +(\S+) \(\d+ ranks, [\d.]+ s\)(?:: (.*))?$")


def main():
    tap, m = Tap(), Mimo()
    command = [os.path.join(ROOT, "regression", "run"), "--mimo", m.binary, "--mpiexec", m.arg.mpiexec]
    listed = subprocess.run([*command, "--list", *(w for f in FAMILIES for w in ("-k", f))], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                            text=True, check=True).stdout.splitlines()
    names = [line.split(":")[0] for line in listed if m.arg.k in line.split(":")[0]]
    p = subprocess.Popen([*command, *(w for n in names for w in ("-k", "^" + n + "$"))], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT, text=True)
    seen = set()
    for line in p.stdout:
        found = LINE.match(line.rstrip())
        if not found:
            print("# " + line.rstrip(), flush=True)
            continue
        word, name, note = found.groups()
        seen.add(name)
        if word == "SKIP":
            tap.skip(name, note)
        else:
            tap.result(word == "OK", name, "%s %s" % (word, note))
    missing = sorted(set(names) - seen)
    tap.result(p.wait() in (0, 1) and names and not missing, "every_launch_reports", missing)
    m.close()
    tap.close()


if __name__ == "__main__":
    main()
