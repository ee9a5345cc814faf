#!/usr/bin/python3
"""Make image-text shards and a small tokenizer for mimo.

Without --images: the demo's data set. Pictures are the colour emoji of Debian's
fonts-noto-color-emoji, alone or in strips of two to four, scaled to several heights, on white. A
caption begins with the picture's dominant colour, counted over its opaque pixels; then come the
names (Unicode's), in a strip each with its own colour:

    red: cherries                 blue: blue whale, grey hammer, blue jeans

so that a model must look to know the colours. A third of the shards each holds PNG, JPEG and WebP;
besides captions there are samples of several pictures, interleaved documents, conversations and
plain texts. No sample of valid/ has the emoji, in their order, of one in train/. Same arguments,
same bytes.

With --images DIR --captions FILE: your own pictures (jpg, jpeg, png, webp; copied as they are).
FILE has one sample a line, either name<TAB>caption or a JSON object
{"image": "name" or ["name", ...], "caption": "..."}; names are relative to DIR.

Written: OUT/train/*.tar, OUT/valid/*.tar (plain USTAR) and OUT/tokenizer.json (byte-level BPE
trained on the captions).
"""

import argparse
import collections
import colorsys
import io
import itertools
import json
import os
import random
import re
import shutil
import sys
import tarfile
import tempfile
import unicodedata

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
SPECIAL = ["<unk>", "<s>", "</s>", "<image>", "<img>", "</img>"]
# The same split in Python, Oniguruma and PCRE2.
PATTERN = r" ?\w+| ?[^\w\s]+|\s+(?!\S)|\s+"
TYPES = {"png": "PNG", "jpg": "JPEG", "webp": "WebP"}
HEIGHTS = [24, 32, 32, 40, 48, 48, 64]
TRAIN_SAMPLES, VALID_SAMPLES, TRAIN_SHARDS, VALID_SHARDS = 4800, 288, 12, 3


def fail(text):
    sys.exit("make_shards.py: error: " + text)


def progress(text):
    if sys.stderr.isatty():
        sys.stderr.write("\r%-60s" % text)
        sys.stderr.flush()


# --- emoji ---


def colour_of(r, g, b):
    """One of eleven colour words."""
    hue, saturation, value = colorsys.rgb_to_hsv(r / 255, g / 255, b / 255)
    hue *= 360
    if value < 0.25:
        return "black"
    if saturation < 0.16:
        return "white" if value > 0.86 else "grey"
    if hue < 14 or hue >= 345:
        return "pink" if saturation < 0.5 and value > 0.75 else "brown" if value < 0.6 else "red"
    if hue < 40:
        return "brown" if value < 0.72 else "orange"
    for limit, word in ((68, "yellow"), (165, "green"), (250, "blue"), (290, "purple")):
        if hue < limit:
            return word
    return "pink"


class Emoji:
    """One picture of the font: name, RGB on white, how many opaque pixels have which colour."""

    def __init__(self, name, data, image_module, words):
        image = image_module.open(io.BytesIO(data)).convert("RGBA")
        self.name = name
        self.picture = image_module.new("RGB", image.size, (255, 255, 255))
        self.picture.paste(image, mask=image.getchannel("A"))
        small = image.resize((image.width // 4, image.height // 4), image_module.BOX)
        self.colours = collections.Counter()
        for r, g, b, a in small.getdata():
            if a >= 128:
                key = (r >> 3, g >> 3, b >> 3)
                if key not in words:
                    words[key] = colour_of(8 * key[0] + 4, 8 * key[1] + 4, 8 * key[2] + 4)
                self.colours[words[key]] += 1
        self.colour = dominant([self])
        self.scaled = {}

    def at_height(self, height, filter_):
        if height not in self.scaled:
            width = round(height * self.picture.width / self.picture.height)
            self.scaled[height] = self.picture.resize((width, height), filter_)
        return self.scaled[height]


def dominant(emoji):
    total = sum((e.colours for e in emoji), collections.Counter())
    return min(total, key=lambda word: (-total[word], word))


def read_emoji(path, image_module):
    """Those with a short name and one colour on at least half of them: a tiny model has minutes."""
    try:
        from fontTools.ttLib import TTFont
    except ImportError:
        fail("fontTools is missing (Debian package python3-fonttools)")
    if not os.path.exists(path):
        fail("%s: no such font (Debian package fonts-noto-color-emoji, or --font FILE)" % path)
    try:
        font = TTFont(path, lazy=True)
        glyphs, strike = font.getBestCmap(), font["CBDT"].strikeData[0]
    except Exception as error:  # fontTools raises many kinds
        fail("%s: not a font with colour bitmaps (CBDT): %s" % (path, error))
    emoji, words = [], {}
    for code, glyph in sorted(glyphs.items()):
        name = unicodedata.name(chr(code), "").lower()
        if glyph in strike and code > 0x2300 and re.fullmatch(r"[a-z]{2,8}", name):
            one = Emoji(name, bytes(strike[glyph].imageData), image_module, words)
            if 2 * one.colours[one.colour] >= sum(one.colours.values()):
                emoji.append(one)
    if len(emoji) < 50:
        fail("%s: only %d usable emoji; is it the Noto colour emoji font?" % (path, len(emoji)))
    return emoji


class Demo:
    """Samples of the demo, drawn from one generator."""

    def __init__(self, emoji, image_module, seed):
        self.emoji, self.image_module, self.random = emoji, image_module, random.Random(seed)
        self.seen = {"train": set(), "valid": set()}
        frequency = collections.Counter(
            e.colour for e in emoji
        )  # rare colours are drawn more often, so that guessing costs more
        self.weights = list(itertools.accumulate(frequency[e.colour] ** -0.5 for e in emoji))
        self.held_out = set(
            self.random.sample(range(len(emoji)), len(emoji) // 8)
        )  # alone only in valid

    def draw(self, split, count):
        """`count` emoji in an order that the other split does not have."""
        other = self.seen["valid" if split == "train" else "train"]
        while True:
            picks = tuple(
                self.random.choices(range(len(self.emoji)), cum_weights=self.weights, k=count)
            )
            if count == 1 and (picks[0] in self.held_out) != (split == "valid"):
                continue
            if picks not in other:
                self.seen[split].add(picks)
                return [self.emoji[i] for i in picks]

    def picture(self, emoji, kind):
        height = self.random.choice(HEIGHTS)
        tiles = [e.at_height(height, self.image_module.LANCZOS) for e in emoji]
        strip = self.image_module.new("RGB", (sum(t.width for t in tiles), height), (255, 255, 255))
        x = 0
        for tile in tiles:
            strip.paste(tile, (x, 0))
            x += tile.width
        out = io.BytesIO()
        options = {
            "png": {"compress_level": 6},
            "jpg": {"quality": 90},
            "webp": {"quality": 90, "method": 0},
        }[kind]
        strip.save(out, {"jpg": "JPEG"}.get(kind, kind.upper()), **options)
        return out.getvalue()

    def caption(self, emoji):
        if len(emoji) == 1:
            return "%s: %s" % (emoji[0].colour, emoji[0].name)
        return "%s: %s" % (dominant(emoji), ", ".join("%s %s" % (e.colour, e.name) for e in emoji))

    def sample(self, split, kind):
        """(parts, texts): the members of the tar by suffix, and what the tokenizer learns from."""
        dice = self.random.random()
        if dice < 0.10:
            e = self.draw(split, 2)
            text = "%s is %s, %s is %s." % (e[0].name, e[0].colour, e[1].name, e[1].colour)
            return [("txt", text.encode())], [text]
        if dice < 0.17:  # several pictures, one caption
            groups = [self.draw(split, 1) for _ in range(self.random.randint(2, 3))]
            parts = [("%d.%s" % (i, kind), self.picture(g, kind)) for i, g in enumerate(groups)]
            record = {"caption": ", ".join("%s %s" % (g[0].colour, g[0].name) for g in groups)}
            return parts + [("json", pack(record))], [record["caption"]]
        if dice < 0.25:  # interleaved
            groups = [self.draw(split, 1) for _ in range(self.random.randint(2, 3))]
            parts, texts, images = [], [], []
            for i, group in enumerate(groups):
                name = "%d.%s" % (i, kind)
                parts.append((name, self.picture(group, kind)))
                texts += [None, self.caption(group) + ("; " if i + 1 < len(groups) else "")]
                images += [name, None]
            return parts + [("json", pack({"texts": texts, "images": images}))], [
                t for t in texts if t
            ]
        if dice < 0.30:
            group = self.draw(split, 1)
            turns = [
                ("user", [{"t": "image", "value": kind}, {"t": "text", "value": "what is it?"}]),
                ("assistant", [{"t": "text", "value": self.caption(group)}]),
            ]
            record = {"conversation": [{"sender": s, "fragments": f} for s, f in turns]}
            return (
                [(kind, self.picture(group, kind)), ("json", pack(record))],
                ["user: what is it?\nassistant: %s\n" % self.caption(group)],
            )
        group = self.draw(split, self.random.choices([1, 2, 3, 4], [45, 25, 18, 12])[0])
        caption = self.caption(group)
        return [(kind, self.picture(group, kind)), ("json", pack({"caption": caption}))], [caption]


def pack(record):
    return json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode()


def demo_splits(arguments, image_module):
    demo = Demo(read_emoji(arguments.font, image_module), image_module, arguments.seed)
    for split, samples, shards in (
        ("valid", VALID_SAMPLES, VALID_SHARDS),
        ("train", TRAIN_SAMPLES, TRAIN_SHARDS),
    ):
        yield split, [
            [demo_sample(demo, split, list(TYPES)[shard % 3]) for _ in range(samples // shards)]
            for shard in range(shards)
        ]


def demo_sample(demo, split, kind):
    sample = demo.sample(split, kind)
    progress("%s: %d different pictures" % (split, len(demo.seen[split])))
    return sample


# --- a user's own files ---


def read_captions(path):
    """[(line number, [picture names], caption)]"""
    try:
        with open(path, encoding="utf-8") as f:
            lines = f.read().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        fail("%s: %s" % (path, error))
    samples, mistakes = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            if line.lstrip().startswith("{"):
                record = json.loads(line)
                names, caption = record["image"], record["caption"]
                names = [names] if isinstance(names, str) else names
            else:
                name, caption = line.rstrip("\r").split("\t", 1)
                names = [name]
            if (
                not names
                or not all(isinstance(n, str) for n in names)
                or not isinstance(caption, str)
                or not caption.strip()
            ):
                raise ValueError("a picture name and a caption that is not empty are needed")
            samples.append((number, names, caption.strip()))
        except (ValueError, KeyError, TypeError) as error:
            reason = "no key %s" % error if isinstance(error, KeyError) else str(error)
            reason = "needs name<TAB>caption or a JSON object" if "unpack" in reason else reason
            mistakes.append("%s:%d: %s" % (path, number, reason))
    return samples, mistakes


def own_splits(arguments, image_module):
    captions, mistakes = read_captions(arguments.captions)
    samples = []
    for number, names, caption in captions:
        parts = []
        for i, name in enumerate(names):
            suffix = os.path.splitext(name)[1][1:].lower()
            path = os.path.join(arguments.images, name)
            try:
                if suffix not in ("jpg", "jpeg", "png", "webp"):
                    raise ValueError("not a jpg, jpeg, png or webp")
                with open(path, "rb") as f:
                    data = f.read()
                image_module.open(io.BytesIO(data)).verify()
                parts.append((suffix if len(names) == 1 else "%d.%s" % (i, suffix), data))
            except Exception as error:  # the imaging library raises many kinds
                mistakes.append("%s:%d: %s: %s" % (arguments.captions, number, path, error))
        samples.append((parts + [("json", pack({"caption": caption}))], [caption]))
        progress("%d samples read" % len(samples))
    if mistakes:
        shown = "\n".join("  " + m for m in mistakes[:20])
        fail(
            "%d mistakes; nothing was written\n%s%s"
            % (len(mistakes), shown, "\n  ..." if len(mistakes) > 20 else "")
        )
    if len(samples) < 2:
        fail("%s: at least two samples are needed, one of them held out" % arguments.captions)
    random.Random(arguments.seed).shuffle(samples)
    held_out = min(len(samples) - 1, max(1, round(arguments.valid_fraction * len(samples))))
    for split, part in (("valid", samples[:held_out]), ("train", samples[held_out:])):
        yield split, [
            part[i : i + arguments.shard_size] for i in range(0, len(part), arguments.shard_size)
        ]


# --- tokenizer ---


def byte_alphabet():
    """The printable code point of every byte."""
    kept = list(range(33, 127)) + list(range(161, 173)) + list(range(174, 256))
    others = [b for b in range(256) if b not in kept]
    return {b: chr(b) if b in kept else chr(256 + others.index(b)) for b in range(256)}


def train_bpe(texts, count):
    """At most `count` merges; ties go to the pair that sorts first. Counts follow word by word."""
    alphabet = byte_alphabet()
    frequency = collections.Counter(piece for text in texts for piece in re.findall(PATTERN, text))
    words = [([alphabet[b] for b in word.encode()], n) for word, n in sorted(frequency.items())]
    pairs, where = collections.Counter(), collections.defaultdict(set)
    for i, (symbols, n) in enumerate(words):
        for pair in zip(symbols, symbols[1:]):
            pairs[pair] += n
            where[pair].add(i)
    merges = []
    while len(merges) < count and pairs:
        best = min(pairs, key=lambda p: (-pairs[p], p))
        if pairs[best] < 2:
            break
        merges.append(best)
        for i in sorted(where[best]):
            symbols, n = words[i]
            for pair in zip(symbols, symbols[1:]):
                pairs[pair] -= n
            joined, at = [], 0
            while at < len(symbols):
                two = tuple(symbols[at : at + 2]) == best
                joined.append(symbols[at] + symbols[at + 1] if two else symbols[at])
                at += 2 if two else 1
            words[i] = (joined, n)
            for pair in zip(joined, joined[1:]):
                pairs[pair] += n
                where[pair].add(i)
        del pairs[best]
    return merges


def tokenizer_json(texts, size):
    alphabet = byte_alphabet()
    tokens = SPECIAL + [alphabet[b] for b in range(256)]
    merges = train_bpe(texts, size - len(tokens))
    for left, right in merges:
        if left + right not in tokens:
            tokens.append(left + right)
    added = [
        {
            "id": i,
            "content": s,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for i, s in enumerate(SPECIAL)
    ]
    split = {
        "type": "Split",
        "pattern": {"Regex": PATTERN},
        "behavior": "Isolated",
        "invert": False,
    }
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {t: i for i, t in enumerate(tokens)},
        "merges": [list(m) for m in merges],
    }
    record = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": model,
    }
    return json.dumps(record, ensure_ascii=False, indent=1) + "\n", len(tokens)


# --- writing ---


def write_shard(path, samples, first):
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for i, (parts, _) in enumerate(samples):
            for suffix, data in parts:
                info = tarfile.TarInfo("%06d.%s" % (first + i, suffix))
                info.size, info.mode = len(data), 0o644
                tar.addfile(info, io.BytesIO(data))


def replace(new, old):
    """Put the file or folder `new` at `old`; what an earlier run left there goes."""
    if os.path.isdir(old):
        shutil.rmtree(old)
    os.replace(new, old)


def check_output(out):
    """Only what this program wrote is ever replaced."""
    for split in ("train", "valid"):
        folder = os.path.join(out, split)
        strange = [
            n
            for n in (os.listdir(folder) if os.path.isdir(folder) else [])
            if not re.fullmatch(split + r"-\d{6}\.tar", n)
        ]
        if strange:
            fail(
                "%s holds files that this program did not write (%s); choose another --out"
                % (folder, strange[0])
            )


def write_all(arguments, splits, staging):
    texts, report, first = [], [], 0
    for split, shards in splits:
        folder = os.path.join(staging, split)
        os.mkdir(folder)
        for i, samples in enumerate(shards):
            write_shard(os.path.join(folder, "%s-%06d.tar" % (split, i)), samples, first)
            first += len(samples)
            texts += [t for _, learn in samples for t in learn] if split == "train" else []
            progress("%s: shard %d of %d written" % (split, i + 1, len(shards)))
        size = sum(os.path.getsize(os.path.join(folder, n)) for n in os.listdir(folder))
        report.append(
            "%s: %d samples in %d shards, %.1f MB"
            % (split, sum(map(len, shards)), len(shards), size / 1e6)
        )
    target = os.path.join(staging, "tokenizer.json")
    if arguments.tokenizer:
        shutil.copyfile(arguments.tokenizer, target)
        report.append("tokenizer.json: a copy of %s" % arguments.tokenizer)
    else:
        text, tokens = tokenizer_json(texts, arguments.vocab_size)
        with open(target, "w", encoding="utf-8") as f:
            f.write(text)
        report.append("tokenizer.json: %d tokens, trained on %d texts" % (tokens, len(texts)))
    return report


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="data/demo", help="folder to write (default data/demo)")
    parser.add_argument(
        "--seed", type=int, default=1234, help="of every random choice (default 1234)"
    )
    parser.add_argument("--font", default=FONT, help="colour emoji font (default %s)" % FONT)
    parser.add_argument("--images", metavar="DIR", help="folder of your pictures")
    parser.add_argument("--captions", metavar="FILE", help="their captions")
    parser.add_argument(
        "--valid-fraction", type=float, default=0.05, help="held out of your samples (default 0.05)"
    )
    parser.add_argument(
        "--shard-size",
        type=int,
        default=1000,
        help="samples of a shard of your files (default 1000)",
    )
    parser.add_argument(
        "--tokenizer", metavar="FILE", help="use this tokenizer.json instead of training one"
    )
    parser.add_argument(
        "--vocab-size", type=int, default=490, help="of the trained tokenizer (default 490)"
    )
    arguments = parser.parse_args()
    if bool(arguments.images) != bool(arguments.captions):
        parser.error("--images and --captions belong together")
    if arguments.vocab_size < 262:
        parser.error(
            "--vocab-size must be at least 262: 256 bytes and %d special tokens" % len(SPECIAL)
        )
    if not 0 < arguments.valid_fraction < 1 or arguments.shard_size < 1:
        parser.error("--valid-fraction must lie between 0 and 1, --shard-size be at least 1")
    if arguments.images and not os.path.isdir(arguments.images):
        parser.error("--images %s: no such folder" % arguments.images)
    if arguments.tokenizer and not os.path.isfile(arguments.tokenizer):
        parser.error("--tokenizer %s: no such file" % arguments.tokenizer)
    return arguments


def main():
    arguments = parse_arguments()
    try:
        from PIL import Image
    except ImportError:
        fail("the imaging library is missing (Debian package python3-pil)")
    check_output(arguments.out)
    try:
        os.makedirs(arguments.out, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=arguments.out, prefix=".making-") as staging:
            splits = (
                own_splits(arguments, Image) if arguments.images else demo_splits(arguments, Image)
            )
            report = write_all(arguments, splits, staging)
            for name in (
                "tokenizer.json",
                "valid",
                "train",
            ):  # train last: its presence says that all is there
                replace(os.path.join(staging, name), os.path.join(arguments.out, name))
    except OSError as error:
        fail(str(error))
    progress("")
    print("\n".join(["%s:" % arguments.out] + ["  " + line for line in report]))


if __name__ == "__main__":
    main()
