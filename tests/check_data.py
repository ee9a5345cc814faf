#!/usr/bin/env python3
"""Data as they come: every kind of picture, broken and absurd ones, documents of every shape, shards that are empty or hostile.

What a picture becomes is compared with the Python imaging library, from the file to the pixels that the model sees. A broken sample is
named and skipped, alike on every rank; a shard that cannot be trusted ends the run with 4; memory stays within what docs/data.md states.
"""
import io
import os
import re
import resource
import subprocess
import time

import numpy as np
from PIL import Image

import fuzz_seeds
from check_run import DECK, Runs, dump, grids, same_batches
from harness import ROOT, write_tokenizer

# MiB of address space, of which the program and its libraries take 160: for the largest that is let in, and for what is not.
MEMORY, SMALL = 800, 240
# Why each broken picture of fuzz_seeds.pictures() is broken.
BROKEN = {"absurd.jpg": "60000 x 60000", "absurd.png": "60000 x 60000", "absurd.webp": "16383 x 16383", "cut_lossless.webp": "too early",
          "cut_lossy.webp": "too early", "cut_progressive.jpg": "Premature end", "cut_rgb.jpg": "Premature end", "cut_rgb.png": "too early",
          "empty.jpg": "0 bytes", "moving.webp": "animated", "no_data.png": "Not enough image data", "text.png": "neither JPEG, PNG nor WebP"}
# The json parts of fuzz_seeds.documents() that are good, with what they render to beside two pictures (P) jpg and 0.png, and why the others are not.
GOOD = {"caption": "PPa word", "interleaved": "aPb", "conversation": "user: what?P\nmodel: this", "nothing": "PPtext", "null": "PPtext"}
BAD = {"no_part": "no part '9.png'", "unequal": "texts has 1 entries and images 0", "both": "exactly one", "number": "caption is not a string",
       "list": "not an object", "text_as_picture": "is none", "turn": "turn 0", "fragment": "fragment 0 of turn 0", "deep": "depth", "deeper": "depth",
       "utf8": "unable to decode", "surrogate": "json", "twice": "duplicate", "nul": "json", "nul_byte": "json", "cut": "json", "empty": "json", "bom": "json",
       "huge": "json", "behind": "end of file"}
HOSTILE = ("pax_sparse", "pax_path", "traversal", "link", "hard", "device", "fifo", "sparse", "truncated", "no_end", "empty", "gzip")


class Data(Runs):
    def overrides(self, path, *more):
        if not os.path.exists(self.at("tokenizer.json")):
            write_tokenizer(self.at("tokenizer.json"))
        return ("data.dataset_provider=webdataset", "data.train_data_path=" + path, "data.tokenizer=" + self.at("tokenizer.json"), "language.seq_length=128",
                "vision.dynamic_resolution_max_patches=64", "data.shuffle_buffer_size=0", *more)

    def shard(self, name, members):
        with open(self.at(name), "wb") as f:
            f.write(fuzz_seeds.tar(members))
        return self.at(name)

    def check(self, path, *more, limit_mib=0):
        """(status, stdout, stderr) of --check-data, with at most so much address space."""
        command, env = self.m.command(["--check-data", DECK, *self.overrides(path, *more)], 0, dict(OPENBLAS_NUM_THREADS="1"))
        limit = (lambda: resource.setrlimit(resource.RLIMIT_AS, (limit_mib << 20, limit_mib << 20))) if limit_mib else None
        p = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace", env=env,
                           preexec_fn=limit, timeout=120)
        return p.returncode, p.stdout, p.stderr


def numbers(text):
    return {m.group(1): int(m.group(2)) for m in re.finditer(r"^  (samples found|good|broken) +(\d+)", text, re.M)}


def broken_lines(text):
    return dict(re.findall(r"^  broken: [^:]+:(\S+): (.*)$", text, re.M))


def expected_pixels(name, data, width, height):
    """What the imaging library makes of a picture; where image.h says that mimo differs, that."""
    im = Image.open(io.BytesIO(data))
    if name == "deep_grey.png":
        im = Image.fromarray((np.asarray(im).astype(np.uint16) >> 8).astype(np.uint8))
    return np.asarray(im.convert("RGB").resize((width, height), Image.BICUBIC))


def pictures(r):
    """Each kind decodes to what the library decodes it to; broken ones are named with their reason and skipped."""
    kinds = fuzz_seeds.pictures()
    stem = lambda name: name.replace(".", "_")
    members = [m for name, data in sorted(kinds.items()) for m in ((stem(name) + "." + name.split(".")[1], data), (stem(name) + ".txt", b"words"))]
    path = r.shard("pictures.tar", members)
    got = r.check(path)
    found, broken = numbers(got[1]), broken_lines(got[1])
    r.tap.result(got[0] == 0 and found == {"samples found": len(kinds), "good": len(kinds) - len(BROKEN), "broken": len(BROKEN)}, "pictures_good_and_broken_are_counted", got)
    for name, reason in BROKEN.items():
        r.tap.result(reason in broken.get(stem(name), ""), "broken_picture_%s_is_named" % name, broken.get(stem(name), "not named"))
    work = r.at("shown")
    os.mkdir(work)
    for i, (name, data) in enumerate(sorted(kinds.items())):
        if name in BROKEN:
            continue
        got = r.m.run("--show-sample", str(i), DECK, *r.overrides(path), cwd=work)
        m = re.search(r"picture 0: (\d+) x (\d+) as stored, (\d+) x (\d+) for the model", got[1])
        if not r.tap.result(got[0] == 0 and m, "picture_%s_is_shown" % name, got):
            continue
        stored, seen = (int(m.group(1)), int(m.group(2))), (int(m.group(3)), int(m.group(4)))
        shown = np.asarray(Image.open(os.path.join(work, "sample_%d" % i, "sample_%06d_0.png" % i)).convert("RGB"))
        want = expected_pixels(name, data, *seen)
        r.tap.result(stored == Image.open(io.BytesIO(data)).size and shown.shape == want.shape and np.array_equal(shown, want),
                     "picture_%s_is_what_the_imaging_library_reads" % name, "%s, off by %s" % (stored, np.abs(shown.astype(int) - want).max() if shown.shape == want.shape else shown.shape))
    plain, exif = (expected_pixels(n, kinds[n], 16, 16) for n in ("rgb.jpg", "exif.jpg"))
    r.tap.result(np.array_equal(plain, exif) and Image.open(io.BytesIO(kinds["exif.jpg"])).getexif()[0x0112] == 6, "a_rotation_in_EXIF_is_not_applied")
    whole = [m for name, data in sorted(kinds.items()) if name not in BROKEN for m in ((stem(name) + "." + name.split(".")[1], data), (stem(name) + ".txt", b"words"))]
    args = ("log.dump_batches=3", "batch.micro_batch_size=2")
    r.ok("a_run_on_the_whole_ones", r.go("whole", *r.overrides(r.shard("whole.tar", whole)), *args, batch=6))
    for name, ranks, layout in (("mixed1", 0, ()), ("mixed2", 2, grids(1, 1)), ("mixed3", 3, grids(1, 2))):
        got = r.go(name, *r.overrides(path), *args, *layout, ranks=ranks, batch=4 if ranks == 3 else 6)
        r.ok("a_run_with_broken_pictures_%s" % name, got, 0, *("pictures.tar:%s skipped" % stem(n) for n in ("absurd.png", "cut_rgb.jpg")))
        if ranks == 2:
            r.equal("broken_pictures_are_skipped_alike_on_two_ranks", same_batches(r, "mixed1", "mixed2", 3))
            keys = [bytes(k) for i in (1, 2, 3) for k in dump(r, "mixed1", i)["sample_key"]]
            r.tap.result(all(k.startswith(b"pictures.tar:") and b"\0" not in k for k in keys), "sample_keys_hold_nothing_behind_their_end", keys)


def documents(r):
    docs = fuzz_seeds.documents()
    members = [m for name, data in sorted(docs.items()) for m in ((name + ".0.png", fuzz_seeds.pictures()["rgb.png"]), (name + ".jpg", fuzz_seeds.pictures()["rgb.jpg"]),
                                                                 (name + ".json", data), (name + ".txt", b"text"))]
    path = r.shard("documents.tar", members)
    got = r.check(path)
    found, broken = numbers(got[1]), broken_lines(got[1])
    r.tap.result(set(docs) == set(GOOD) | set(BAD), "every_document_has_its_verdict", set(docs) ^ (set(GOOD) | set(BAD)))
    r.tap.result(got[0] == 0 and found == {"samples found": len(docs), "good": len(GOOD), "broken": len(BAD)} and not set(broken) & set(GOOD),
                 "documents_good_and_bad_are_counted", got)
    for name, reason in BAD.items():
        r.tap.result(reason in broken.get(name, ""), "bad_document_%s_is_named" % name, broken.get(name, "not named"))
    work = r.at("texts")
    os.mkdir(work)
    for name, want in GOOD.items():
        got = r.m.run("--show-sample", str(sorted(docs).index(name)), DECK, *r.overrides(path), cwd=work)
        text = "".join("P" if "<image>" in line else re.search(r" '(.*)'$", line).group(1).replace("\\x0a", "\n") if re.search(r" '(.*)'$", line) else ""
                       for line in got[1].splitlines() if re.match(r" +\d", line))
        r.tap.result(got[0] == 0 and text == want + "</s>", "document_%s_is_read_as_written" % name, "%r\n%s" % (text, got[1]))
    lacking = r.shard("lacking.tar", [("a.png", fuzz_seeds.pictures()["rgb.png"]), ("b.png", fuzz_seeds.pictures()["rgb.png"]), ("b.txt", b"words")])
    got = r.check(lacking)
    r.tap.result(got[0] == 0 and "no caption" in broken_lines(got[1]).get("a", "") and numbers(got[1])["good"] == 1, "a_missing_caption_is_named", got)
    other = r.shard("other.tar", [m for i in range(4) for m in (("%d.txt" % i, b"words"), ("%d.cls" % i, b"3"), ("%d.flac" % i, b"fLaC"))] + [("README", b"hello")])
    got = r.check(other)
    r.tap.result(got[0] == 0 and "parts not used         cls 4, flac 4" in got[1] and re.search(r"members ignored +1 ", got[1]), "other_parts_are_counted_by_check_data", got)
    got = r.go("otherparts", *r.overrides(other), iterations=4)
    r.ok("other_parts_are_said_once_by_a_run", got, 0, "data.train_data_path: parts that are not used: cls 4, flac 4")
    r.tap.result(got[1].count("not used") == 1, "other_parts_are_said_only_once", got[1])


def shards(r):
    """What is not a plain tar, or wants out of it, ends check and run with 4 and a line that names file and member."""
    folder = r.at("tars")
    os.mkdir(folder)
    fuzz_seeds.shard(folder, r.m.binary)
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        got = r.check(path)
        lines = [x for x in got[2].splitlines() if "error: " in x]
        if name in HOSTILE:
            r.tap.result(got[0] == 4 and len(lines) == 1 and path in lines[0], "shard_%s_is_refused_in_one_line" % name, "%s\n%s" % (got[0], got[2]))
    for name in ("link", "truncated"):
        for ranks, layout in ((0, ()), (2, grids(1, 1))):
            start = time.monotonic()
            got = r.go("hostile", *r.overrides(os.path.join(folder, name)), *layout, ranks=ranks)
            r.ok("a_run_on_%d_ranks_refuses_shard_%s" % (max(ranks, 1), name), got, 4, os.path.join(folder, name))
            r.tap.result(len([x for x in got[2].splitlines() if "error: " in x]) == 1 and time.monotonic() - start < 30, "shard_%s_on_%d_ranks_is_one_line" % (name, max(ranks, 1)), got[2])
    pair = r.at("pair")
    os.mkdir(pair)
    with open(os.path.join(pair, "0.tar"), "wb") as f:
        f.write(bytes(1024))
    got = r.check(pair)
    r.tap.result(got[0] == 4 and "no sample in 1 shards" in got[2], "a_set_of_only_empty_shards_is_refused", got)
    with open(os.path.join(pair, "1.tar"), "wb") as f:
        f.write(fuzz_seeds.tar([("a.txt", b"words")]))
    got = r.check(pair)
    r.tap.result(got[0] == 0 and numbers(got[1])["good"] == 1, "an_empty_shard_beside_a_full_one_is_fine", got)


def tools_without_ranks(r):
    """Decks for many ranks and GPUs show their samples on one rank without a GPU."""
    work = r.at("tools")
    os.mkdir(work)
    got = r.m.run("--show-sample", "1", os.path.join(ROOT, "input", "mock_20l.nml"), cwd=work)
    r.tap.result(got[0] == 0 and "8192 tokens, 4096 with a label" in got[1], "a_deck_for_8_gpus_shows_a_sample", got)
    got = r.m.run("--check-data", os.path.join(ROOT, "input", "hel_33n.nml"), "data.dataset_provider=mock", "data.packing_buffer_size=0", cwd=work)
    r.tap.result(got[0] == 0 and "samples of 8192 tokens" in got[1], "a_deck_for_264_ranks_tells_its_data", got)
    got = r.m.run("--check-data", os.path.join(ROOT, "input", "hel_33n.nml"), "data.dataset_provider=mock", cwd=work)
    r.tap.result(got[0] == 2 and "data.packing_buffer_size" in got[2] and "ranks" not in got[2], "its_mistakes_are_told_without_those_of_one_rank", got)


def said_once(r):
    """A mistake that meets both splits is one line."""
    path = r.shard("words.tar", [("a.txt", b"words")])
    got = r.check(path, "data.valid_data_path=" + path, "data.end_of_document=<nothing>")
    r.tap.result(got[0] == 2 and got[2].count("error:") == 1, "a_mistake_of_both_splits_is_said_once", got)


def memory(r):
    """The largest things that are let in stay within the memory that docs/data.md states; larger ones are refused by their headers."""
    noise = np.random.default_rng(2).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    large = Image.fromarray(np.tile(noise, (100, 100, 1)))                                  # 6400 x 6400
    side = 8192
    cases = {"a_png_bomb_at_the_limit": ("png", fuzz_seeds.png(side, side, 8, 2, bytes((3 * side + 1) * side)), True),
             "a_png_bomb_above_the_limit": ("png", fuzz_seeds.png(side, side + 1, 8, 0, bytes((side + 1) * (side + 1))), False),
             "a_png_bomb_of_texts": ("png", fuzz_seeds.png(16, 16, 8, 2, bytes(49 * 16), *(fuzz_seeds.chunk(b"zTXt", b"k\0\0" + fuzz_seeds.zlib.compress(bytes(8 << 20)))
                                                                                     for _ in range(100))), True),
             "a_large_progressive_jpeg": ("jpg", fuzz_seeds.encoded(large, "JPEG", progressive=True, quality=5), True),
             "a_json_of_small_objects": ("json", b'{"x": [' + b"{}," * 1300000 + b"{}]" + b', "caption": "a"}', True),
             "a_json_of_deep_lists": ("json", b'{"x": ' + b"[" * 2000000, False),
             "a_text_of_4_MiB": ("txt", b"word " * ((4 << 20) // 5), True),
             "a_text_above_4_MiB": ("txt", b"word " * ((4 << 20) // 5 + 1), False)}
    for name, (ext, data, good) in cases.items():
        members = [("a." + ext, data)] + ([("a.txt", b"words")] if ext not in ("txt", "json") else []) + [("b.txt", b"words")]
        path = r.shard("large.tar", members)
        start = time.monotonic()
        got = r.check(path, limit_mib=MEMORY if good else SMALL)
        found = numbers(got[1])
        r.tap.result(got[0] == 0 and found.get("good") == 1 + good and found.get("broken") == 1 - good, "%s_is_%s_within_%d_MiB" % (
            (name, "read", MEMORY) if good else (name, "refused", SMALL)), "%s\n%s" % (got[0], got[1] + got[2]))
        r.tap.result(time.monotonic() - start < 60, name + "_takes_no_minute", "%.1f s" % (time.monotonic() - start))
    got = r.check(r.shard("large.tar", [("a.json", cases["a_json_of_small_objects"][1])]), limit_mib=SMALL)
    r.tap.result(got[0] == 3 and "out of memory" in got[2], "memory_that_is_not_there_ends_the_check_with_3", got)


def main():
    r = Data()
    for group in (pictures, documents, shards, tools_without_ranks, said_once, memory):
        if r.m.arg.k and r.m.arg.k not in group.__name__:
            continue
        start = time.monotonic()
        group(r)
        print("# %s: %.1f s" % (group.__name__, time.monotonic() - start), flush=True)
    r.m.close()
    r.tap.close()


if __name__ == "__main__":
    main()
