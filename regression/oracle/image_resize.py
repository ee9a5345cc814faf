#!/usr/bin/python3
"""Decoding and bicubic resize against the Python imaging library, bit for bit (training.md 6.8).

Usage: image_resize.py TEST_IMAGE [COUNT]
TEST_IMAGE = the built tests/test_image; COUNT pictures (default 300)

Random pictures of random sizes and modes are written as PNG, JPEG (all samplings, progressive,
grey, CMYK) and WebP, read and resized by `TEST_IMAGE --jobs`, and compared with
Image.open(f).convert('RGB').resize((w, h), Image.BICUBIC).
JPEG pixels are compared as well: both sides must link the same libjpeg for them to be equal.
"""

import os
import random
import subprocess
import sys
import tempfile

import numpy
from PIL import Image


def picture(rng, generator, index, folder):
    width, height = (rng.choice([rng.randint(1, 40), rng.randint(1, 400)]) for _ in range(2))
    kind = rng.choice(["noise", "smooth", "blocks"])
    if kind == "noise":
        array = generator.integers(0, 256, (height, width, 4), dtype=numpy.uint8)
    elif kind == "smooth":
        y, x = numpy.mgrid[0:height, 0:width]
        array = numpy.stack(
            [128 + 127 * numpy.sin(x / (3 + c) + y / (5 + 2 * c)) for c in range(4)], -1
        ).astype(numpy.uint8)
    else:
        array = 255 * generator.integers(
            0, 2, (height // 4 + 1, width // 4 + 1, 4), dtype=numpy.uint8
        )
        array = array.repeat(4, 0).repeat(4, 1)[:height, :width]
    mode = rng.choice(["RGB", "RGBA", "L", "LA", "P", "1", "CMYK"])
    image = Image.fromarray(numpy.ascontiguousarray(array), "RGBA")
    if mode == "CMYK":
        image, name = Image.fromarray(numpy.ascontiguousarray(array), "CMYK"), rng.choice(["jpg"])
    else:
        image = image if mode == "RGBA" else image.convert("RGB").convert(mode)
        name = {"RGB": ["jpg", "png", "webp"], "L": ["jpg", "png"], "RGBA": ["png", "webp"]}.get(
            mode, ["png"]
        )
        name = rng.choice(name)
    path = os.path.join(folder, "%d.%s" % (index, name))
    if name == "jpg":
        image.save(
            path,
            quality=rng.randint(30, 98),
            subsampling=rng.choice([0, 1, 2]),
            progressive=rng.random() < 0.3,
        )
    elif name == "webp":
        image.save(path, lossless=rng.random() < 0.5, quality=rng.randint(30, 98), exact=True)
    else:
        image.save(path)
    return path


def main():
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 300
    rng, generator = random.Random(6), numpy.random.default_rng(6)
    with tempfile.TemporaryDirectory() as folder:
        jobs, expected = [], []
        for i in range(count):
            path = picture(rng, generator, i, folder)
            width, height = (
                (0, 0)
                if i % 5 == 0
                else tuple(rng.choice([rng.randint(1, 60), rng.randint(1, 500)]) for _ in "wh")
            )
            image = Image.open(path).convert("RGB")
            expected.append(image if width == 0 else image.resize((width, height), Image.BICUBIC))
            jobs.append((path, width, height, os.path.join(folder, "%d.raw" % i)))
        job_file = os.path.join(folder, "jobs")
        with open(job_file, "w", encoding="ascii") as f:
            f.writelines("%s %d %d %s\n" % job for job in jobs)
        lines = subprocess.run(
            [sys.argv[1], "--jobs", job_file], stdout=subprocess.PIPE, check=True, text=True
        ).stdout.split("\n")
        wrong = 0
        for job, image, line in zip(jobs, expected, lines):
            got = open(job[3], "rb").read() if line.startswith("ok") else b""
            if line != "ok %d %d" % image.size or got != image.tobytes():
                wrong += 1
                print(
                    "differs: %s (%s) -> %dx%d: %s"
                    % (os.path.basename(job[0]), Image.open(job[0]).mode, *job[1:3], line)
                )
    print("%d pictures, %d differ" % (count, wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
