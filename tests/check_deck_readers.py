#!/usr/bin/env python3
"""What mimo accepts as a deck means the same to f90nml and to gfortran (regression/oracle/deck_readers.py)."""
import os
import sys

from harness import ROOT, Mimo, Tap

sys.path.insert(0, os.path.join(ROOT, "regression", "oracle"))
import deck_readers

CHANGED = 1500     # decks made by random changes, beside those of tests/decks/good and input/
LEAST = 200        # of them that mimo accepts


def main():
    tap, m = Tap(), Mimo()

    def report(reader, n, found):
        name = "%s_reads_the_same_values" % reader
        if isinstance(found, str):
            tap.skip(name, found)
        else:
            tap.result(n >= LEAST and not found, name, "%d decks\n%s" % (n, "\n".join(found)))
    deck_readers.compare(os.path.join(ROOT, "build", "tests", "test_deck"), m.binary, CHANGED, 1, report)
    m.close()
    tap.close()


if __name__ == "__main__":
    main()
