#!/usr/bin/env python3
"""Token ids against the `tokenizers` package (pip install tokenizers; any interpreter that has it).

Usage: tokenizer_oracle.py TEST_TOKENIZER [COUNT]
       tokenizer_oracle.py --reference FILE.h5
TEST_TOKENIZER = the built tests/test_tokenizer; COUNT texts (default 12000). --reference keeps texts, two of the tokenizers and their
ids, for tokenizer_reference.py.

Builds byte-level BPE tokenizers with the pre-tokenizers in use (patterns A and B of training.md
6.11, GPT-2's own, literal splits, every behaviour), added tokens with all flags, ignore_merges on
and off; encodes texts from every Unicode block, emoji, runs of white space, digits, contractions
and special tokens with both programs; also times loading at the published size (131072 tokens,
269443 merges).
"""

import json
import os
import random
import struct
import subprocess
import sys
import tempfile
import unicodedata

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

PATTERN_A = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERN_B = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPECIAL = ["<unk>", "<s>", "</s>", "<image>", "<img>", "</img>", "<|im_start|>", "<|im_end|>"]
WORDS = (
    "the and of red blue don't I'll WE'VE it's cherries whale-like CamelCase snake_case 3.14159 2026-11-21 naïve Straße "
    "ﬁ ſ K I'M x² ½ Ⅷ ٣٤ हिन्दी ไทย 한국어 日本語 中文字符 عربى עברית 👩‍👩‍👧‍👦 🇫🇷 ❤️ \u200d \u180e \u0085 \u2028 \u00a0 \ufeff e\u0301"
).split(" ")


def texts(rng, count):
    out = []
    for start in range(0, 0x110000, 128):  # every block, a stretch of 40 each
        chars = [chr(c) for c in range(start, start + 128) if not 0xD800 <= c <= 0xDFFF]
        if chars:
            out.append("".join(rng.choice(chars) for _ in range(40)))
    spaces = [
        " ",
        "  ",
        "\t",
        "\n",
        "\r\n",
        "\n\n",
        "\u00a0",
        "\u3000",
        "\u2009",
        "\u0085",
        "\u180e",
        "\u2028",
        "\x0b",
        "\x1c",
        "\x00",
        "   ",
    ]
    while len(out) < count:
        parts = []
        for _ in range(rng.randint(1, 14)):
            kind = rng.random()
            if kind < 0.4:
                parts.append(rng.choice(WORDS))
            elif kind < 0.6:
                parts.append("".join(rng.choice(spaces) for _ in range(rng.randint(1, 4))))
            elif kind < 0.7:
                parts.append(rng.choice(SPECIAL + ["word", "<imag", "strip", "image>"]))
            elif kind < 0.8:
                parts.append(str(rng.randint(0, 10 ** rng.randint(1, 9))))
            elif kind < 0.9:
                parts.append(
                    chr(
                        rng.choice(
                            [
                                rng.randint(0x20, 0x7E),
                                rng.randint(0xA0, 0x2FFF),
                                rng.randint(0x1F300, 0x1FAFF),
                            ]
                        )
                    )
                )
            else:
                parts.append(
                    "".join(rng.choice("aAbB'/!?.,-_()[]{}#\n ") for _ in range(rng.randint(1, 12)))
                )
        out.append(rng.choice(["", " "]).join(parts))
    return out


def build(pre, corpus, size, ignore_merges, flags):
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIAL,
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    if flags:
        tokenizer.add_tokens(
            [
                AddedToken("word", single_word=True),
                AddedToken("strip", lstrip=True, rstrip=True),
                AddedToken("the re", normalized=True),
                AddedToken("日本", normalized=False),
                AddedToken("日本語", normalized=True),
            ]
        )
        tokenizer.add_special_tokens([AddedToken("<|im_end|>", rstrip=True, special=True)])
    return tokenizer


def compare(program, tokenizer, path, corpus, name, folder):
    data = os.path.join(folder, "texts")
    with open(data, "wb") as f:
        for text in corpus:
            raw = text.encode()
            f.write(struct.pack("<I", len(raw)) + raw)
    run = subprocess.run(
        [program, "--encode", path, data], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    if run.returncode:
        print("%s: %s" % (name, run.stderr.strip()))
        return 1
    wrong = 0
    encoded = tokenizer.encode_batch(corpus, add_special_tokens=False)
    for text, line, want in zip(corpus, run.stdout.split("\n"), encoded):
        if line != " ".join(map(str, want.ids)):
            wrong += 1
            if wrong <= 5:
                print(
                    "%s: %r\n  ours   %s\n  theirs %s"
                    % (name, text, line, " ".join(map(str, want.ids)))
                )
    print("%-44s %d texts, %d differ; %s" % (name, len(corpus), wrong, run.stderr.strip()))
    return wrong


def keep(path, corpus, kinds):
    """{name: tokenizer} with the ids of every text."""
    import time
    import h5py
    import numpy as np
    import tokenizers

    packed = {"compression": "gzip", "compression_opts": 9, "shuffle": True}
    raw = [t.encode() for t in corpus]
    with h5py.File(path, "w") as f:
        f.create_dataset("texts", data=np.frombuffer(b"".join(raw), np.uint8), **packed)
        f.create_dataset("text_bytes", data=np.array([len(t) for t in raw], np.int32), **packed)
        for name, tokenizer in kinds.items():
            ids = [e.ids for e in tokenizer.encode_batch(corpus, add_special_tokens=False)]
            g = f.create_group("kinds/" + name)
            g.create_dataset("tokenizer", data=np.frombuffer(tokenizer.to_str().encode(), np.uint8), **packed)
            g.create_dataset("counts", data=np.array([len(i) for i in ids], np.int32), **packed)
            g.create_dataset("ids", data=np.array([x for i in ids for x in i], np.int16), **packed)
        f.attrs.update(
            program="tokenizers " + tokenizers.__version__,
            version=tokenizers.__version__,
            date=time.strftime("%Y-%m-%d", time.gmtime()),
            command="regression/oracle/tokenizer_oracle.py --reference FILE.h5",
        )


def published_size(folder):
    """A file of the published size: two letters, three, ... until both counts are reached."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    base = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(base)}
    level, merges = list(letters), []
    while len(vocab) < 131072:
        following = []
        for left in level:
            for right in letters:
                if len(vocab) < 131072 and left + right not in vocab:
                    vocab[left + right] = len(vocab)
                    following.append(left + right)
                    merges.append([left, right])
        level = following
    known = set(map(tuple, merges))
    for token in vocab:
        for cut in range(1, len(token)):
            pair = (token[:cut], token[cut:])
            if len(merges) < 269443 and pair[0] in vocab and pair[1] in vocab and pair not in known:
                known.add(pair)
                merges.append(list(pair))
    path = os.path.join(folder, "big.json")
    with open(path, "w", encoding="utf-8") as f:
        json.dump(
            {
                "version": "1.0",
                "added_tokens": [],
                "normalizer": None,
                "pre_tokenizer": {
                    "type": "ByteLevel",
                    "add_prefix_space": False,
                    "trim_offsets": True,
                    "use_regex": True,
                },
                "model": {"type": "BPE", "vocab": vocab, "merges": merges},
            },
            f,
            ensure_ascii=False,
        )
    return path, len(vocab), len(merges)


def main():
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    store = sys.argv[2] if sys.argv[1] == "--reference" and len(sys.argv) > 2 else ""
    count = 10240 if store else int(sys.argv[2]) if len(sys.argv) > 2 else 12000
    rng = random.Random(11)
    # Characters that this Python's Unicode (and the PCRE2 of the same age) does not know yet may
    # have categories in the package.
    corpus = [
        "".join(c for c in text if unicodedata.category(c) != "Cn") for text in texts(rng, count)
    ]
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

    def split(pattern, behaviour="isolated", invert=False):
        return pre_tokenizers.Split(pattern, behaviour, invert)

    variants = [
        ("pattern A", [split(Regex(PATTERN_A)), plain], False, False),
        ("pattern A, flags, ignore_merges", [split(Regex(PATTERN_A)), plain], True, True),
        ("pattern B, flags", [split(Regex(PATTERN_B)), plain], False, True),
        (
            "pattern B removed + inverted, ignore_merges",
            [split(Regex(PATTERN_B), "removed", True), plain],
            True,
            False,
        ),
        ("GPT-2", [pre_tokenizers.ByteLevel(add_prefix_space=False)], False, True),
        ("GPT-2, prefix space", [pre_tokenizers.ByteLevel(add_prefix_space=True)], False, True),
        (
            "digits, then GPT-2",
            [split(Regex(r"\d"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)],
            False,
            False,
        ),
        (
            "blank merged with next, words contiguous",
            [split(" ", "merged_with_next"), split(Regex(r"\w"), "contiguous"), plain],
            False,
            False,
        ),
        (
            "space merged with previous, \\W removed",
            [
                split(Regex(r"\s"), "merged_with_previous"),
                split(Regex(r"\W{2,}"), "removed"),
                plain,
            ],
            False,
            False,
        ),
        ("empty matches", [split(Regex(r"x*"), "isolated"), plain], False, False),
    ]
    if store:
        chosen = [v for v in variants if v[0] in ("pattern A, flags, ignore_merges", "GPT-2, prefix space")]
        keep(store, corpus, {v[0]: build(pre_tokenizers.Sequence(v[1]), corpus[:4000], 1500, v[2], v[3]) for v in chosen})
        return 0
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        for name, steps, ignore, flags in variants:
            tokenizer = build(pre_tokenizers.Sequence(steps), corpus[:4000], 3000, ignore, flags)
            path = os.path.join(folder, "tokenizer.json")
            tokenizer.save(path)
            wrong += compare(sys.argv[1], tokenizer, path, corpus, name, folder)
        path, tokens, merges = published_size(folder)
        big = [
            "".join(rng.choice("abcdefghij") for _ in range(rng.randint(1, 30)))
            for _ in range(2000)
        ] + ["abcdefghij" * 20000]
        wrong += compare(
            sys.argv[1],
            Tokenizer.from_file(path),
            path,
            big,
            "%d tokens, %d merges" % (tokens, merges),
            folder,
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
