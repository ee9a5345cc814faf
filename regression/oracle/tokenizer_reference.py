#!/usr/bin/python3
"""Token ids of a stored reference, without the `tokenizers` package (tokenizer_oracle.py --reference writes it).

Usage: tokenizer_reference.py TEST_TOKENIZER REFERENCE.h5
REFERENCE.h5 holds texts and, for each kind of pre-tokenizer, a tokenizer.json and the package's ids.
"""
import os
import struct
import subprocess
import sys
import tempfile

import h5py
import numpy as np


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    wrong = compared = 0
    with h5py.File(sys.argv[2], "r") as f, tempfile.TemporaryDirectory() as folder:
        ends = np.cumsum(f["text_bytes"][()])
        raw = f["texts"][()].tobytes()
        texts = [raw[end - n:end] for end, n in zip(ends, f["text_bytes"][()])]
        data, path = os.path.join(folder, "texts"), os.path.join(folder, "tokenizer.json")
        with open(data, "wb") as out:
            out.write(b"".join(struct.pack("<I", len(t)) + t for t in texts))
        for name, kind in f["kinds"].items():
            with open(path, "wb") as out:
                out.write(kind["tokenizer"][()].tobytes())
            lines = subprocess.run([sys.argv[1], "--encode", path, data], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True,
                                   text=True).stdout.split("\n")
            ids = np.split(kind["ids"][()], np.cumsum(kind["counts"][()])[:-1])
            for text, line, want in zip(texts, lines, ids, strict=False):
                compared += 1
                if line != " ".join(map(str, want)):
                    wrong += 1
                    if wrong <= 5:
                        print("%s: %r\n  ours   %s\n  theirs %s" % (name, text.decode(), line, " ".join(map(str, want))))
            wrong += abs(len(ids) - len(texts))
    print("%d texts, %d differ" % (compared, wrong))
    return 1 if wrong or not compared else 0


if __name__ == "__main__":
    sys.exit(main())
