"""Seeds and dictionaries for the fuzz targets: whole and broken files of every kind that mimo reads, made here."""
import functools, glob, io, json, os, re, struct, subprocess, tarfile, zlib

import numpy as np
from PIL import Image

from harness import ROOT, write_tokenizer


def write(folder, name, data):
    with open(os.path.join(folder, name), "wb") as f:
        f.write(data)


def words(path, tokens):
    """A libFuzzer dictionary."""
    with open(path, "w") as f:
        for t in sorted(set(tokens)):
            f.write('"%s"\n' % "".join("\\x%02x" % b if b < 32 or b > 126 or chr(b) in '"\\' else chr(b) for b in t.encode()))


# ---- decks -----------------------------------------------------------------------------------------------------------------

OVERRIDES = ("run.title=two words", "run.title='quoted'", "lr.lr=2.5d-4", "batch.iterations_to_skip=1, 2,3*7", "run.titel=x", "nodot=3",
             "lr.lr", "batch.iterations_to_skip(2)=1", "nogroup.key=1", "moe.num_experts=1 2", "moe.num_experts=", "log.log_params_norm=T",
             "language.preset=tini", "run.train_iters=4", "x" * 200 + "=1")


def deck(folder, mimo):
    for path in glob.glob(os.path.join(ROOT, "tests", "decks", "*", "*.nml")) + glob.glob(os.path.join(ROOT, "input", "*.nml")):
        with open(path, "rb") as f:
            write(folder, os.path.basename(os.path.dirname(path)) + "_" + os.path.basename(path), f.read())
    tiny = open(os.path.join(ROOT, "input", "mock_tiny.nml")).read()
    for i, o in enumerate(OVERRIDES):
        write(folder, "override%d" % i, ("! ranks: %d\n! override: %s\n! override: run.seed=5\n%s" % (1 + i % 4, o, tiny)).encode())
    text = subprocess.run([mimo, "--reference"], stdout=subprocess.PIPE, text=True, check=True).stdout
    keys = re.findall(r"^  (?:! )?(\w+) = ", text, re.M)
    choices = re.findall(r"'[\w|*-]+'", text)
    words(folder + ".dict", keys + re.findall(r"^&\w+", text, re.M) + choices + ["! override: ", "! ranks: ", "3*", ".true.", "1d-4", "(1:3)",
                                                                             "&end", "''", "/\n", "= ", "\xef\xbb\xbf", "\r\n"])


# ---- pictures --------------------------------------------------------------------------------------------------------------

def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, depth, colour, rows, *more, interlace=0):
    """A PNG by hand: any header with any data."""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)) + b"".join(more) + \
        chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def encoded(im, form, **options):
    out = io.BytesIO()
    im.save(out, form, **options)
    return out.getvalue()


def rotated_exif(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@functools.lru_cache(None)
def pictures():
    """{name: bytes}: every kind of picture that a data set may hold, whole ones and broken ones."""
    noise = np.random.default_rng(1).integers(0, 256, (12, 9, 4), dtype=np.uint8)
    rgba, rgb = Image.fromarray(noise, "RGBA"), Image.fromarray(noise[:, :, :3])
    out = {"rgb.jpg": encoded(rgb, "JPEG"), "grey.jpg": encoded(rgb.convert("L"), "JPEG"), "cmyk.jpg": encoded(rgb.convert("CMYK"), "JPEG"),
           "progressive.jpg": encoded(rgb, "JPEG", progressive=True), "exif.jpg": encoded(rgb, "JPEG", exif=rotated_exif(6)),
           "rgb.png": encoded(rgb, "PNG"), "rgba.png": encoded(rgba, "PNG"), "grey.png": encoded(rgb.convert("L"), "PNG"),
           "grey_alpha.png": encoded(rgba.convert("LA"), "PNG"), "palette.png": encoded(rgb.convert("P"), "PNG"),
           "bits.png": encoded(rgb.convert("1"), "PNG"), "deep.png": png(2, 2, 16, 2, b"\0" + bytes(12) + b"\0" + bytes(12)),
           "deep_grey.png": encoded(Image.fromarray(noise[:, :, 0].astype(np.uint16) * 257), "PNG"),
           "clear_palette.png": png(2, 1, 8, 3, b"\0\0\1", chunk(b"PLTE", bytes(6)), chunk(b"tRNS", b"\0\xff")),
           "interlaced.png": png(1, 1, 8, 2, b"\0abc", interlace=1),
           "lossy.webp": encoded(rgb, "WEBP"), "lossless.webp": encoded(rgba, "WEBP", lossless=True),
           "moving.webp": encoded(rgb, "WEBP", save_all=True, append_images=[rgb.rotate(90, expand=True).resize(rgb.size)], duration=100),
           "absurd.png": png(60000, 60000, 8, 2, b""), "bomb.png": png(8000, 8000, 8, 0, bytes(8001 * 8000)),
           "no_data.png": png(4, 4, 8, 2, b""), "text.png": b"this is no picture", "empty.jpg": b""}
    jpeg = bytearray(out["rgb.jpg"])
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at:at + 4] = struct.pack(">HH", 60000, 60000)
    out["absurd.jpg"] = bytes(jpeg)
    webp = bytearray(out["lossy.webp"])
    at = webp.index(b"\x9d\x01\x2a") + 3
    webp[at:at + 4] = struct.pack("<HH", 16383, 16383)
    out["absurd.webp"] = bytes(webp)
    for name in ("rgb.jpg", "rgb.png", "lossy.webp", "lossless.webp", "progressive.jpg"):
        out["cut_" + name] = out[name][:2 * len(out[name]) // 3]
    return out


def image(folder, mimo):
    for name, data in pictures().items():
        write(folder, name, data)
    words(folder + ".dict", ["IHDR", "PLTE", "tRNS", "IDAT", "IEND", "gAMA", "iCCP", "acTL", "RIFF", "WEBP", "VP8 ", "VP8L", "VP8X", "ALPH",
                             "ANIM", "Exif", "Adobe"])


# ---- tars ------------------------------------------------------------------------------------------------------------------

def tar(members, form=tarfile.USTAR_FORMAT, **pax):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as t:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            info.pax_headers = pax
            t.addfile(info, io.BytesIO(data))
    return out.getvalue()


def shard(folder, mimo):
    caption = json.dumps({"caption": "a word"}).encode()
    plain = [("0.txt", b"text"), ("1.png", b"png"), ("1.json", caption), ("dir/2.0.jpg", b"j"), ("dir/2.1.jpg", b"k"), ("dir/2.json", caption)]
    long = [("d/" * 60 + "%s.txt" % ("n" * 40), b"text")]
    write(folder, "ustar", tar(plain))
    write(folder, "pax", tar(plain, tarfile.PAX_FORMAT, comment="a comment", mtime="1.5"))
    write(folder, "gnu", tar(plain + long, tarfile.GNU_FORMAT))
    write(folder, "pax_long", tar(plain + long, tarfile.PAX_FORMAT))
    write(folder, "pax_size", tar(plain[:1], tarfile.PAX_FORMAT, size="3"))
    write(folder, "pax_sparse", tar(plain[:1], tarfile.PAX_FORMAT, **{"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9"}))
    write(folder, "pax_path", tar(plain[:1], tarfile.PAX_FORMAT, path="../../etc/x.txt"))
    write(folder, "scattered", tar([("a.txt", b"1"), ("b.txt", b"2"), ("a.json", caption), ("a.txt", b"3")]))
    write(folder, "traversal", tar([("../a.txt", b"1"), ("/b.txt", b"2")]))
    for kind, name in ((tarfile.SYMTYPE, "link"), (tarfile.LNKTYPE, "hard"), (tarfile.CHRTYPE, "device"), (tarfile.FIFOTYPE, "fifo"),
                       (tarfile.GNUTYPE_SPARSE, "sparse"), (tarfile.DIRTYPE, "directory")):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as t:
            info = tarfile.TarInfo("a.txt")
            info.type, info.linkname = kind, "../b"
            t.addfile(info)
        write(folder, name, out.getvalue())
    whole = tar(plain)
    write(folder, "truncated", whole[:1300])
    write(folder, "no_end", whole[:7 * 512])
    write(folder, "empty", b"")
    write(folder, "only_end", bytes(1024))
    write(folder, "gzip", b"\x1f\x8b\x08" + bytes(20))
    words(folder + ".dict", ["ustar\0" + "00", "ustar  \0", "path=", "size=", "linkpath=", "GNU.sparse.map=", "././@LongLink", "30 mtime=", "../", "11 path=a\n",
                             "10 size=1\n"])


# ---- JSON ------------------------------------------------------------------------------------------------------------------

JSON_WORDS = ["null", "true", "false", "{", "}", "[", "]", ":", ",", '"', "\\u0000", "\\ud800", "1e999", "-1", "4194304", "9999999999999999999"]


def documents():
    """{name: bytes}: the json part of a sample, good and bad."""
    good = {"caption": {"caption": "a word"}, "interleaved": {"texts": ["a", None, "b"], "images": [None, "0.png", None]},
            "conversation": {"conversation": [{"sender": "user", "fragments": [{"t": "text", "value": "what?"}, {"t": "image", "value": "jpg"}]},
                                              {"sender": "model", "fragments": [{"t": "text", "value": "this"}]}]},
            "nothing": {}, "no_part": {"texts": [None], "images": ["9.png"]}, "unequal": {"texts": ["a"], "images": []},
            "both": {"texts": ["a"], "images": ["jpg"]}, "number": {"caption": 5}, "null": {"caption": None}, "list": [1, 2],
            "text_as_picture": {"texts": [None], "images": ["json"]}, "turn": {"conversation": [{"sender": 1}]},
            "fragment": {"conversation": [{"sender": "a", "fragments": [{"t": "sound", "value": "x"}]}]}}
    out = {k: json.dumps(v).encode() for k, v in good.items()}
    out.update({"deep": b"[" * 3000 + b"]" * 3000, "deeper": b'{"caption":' + b"[" * 100000, "utf8": b'{"caption": "\xff\xfe"}', "surrogate": b'{"caption": "\\ud800"}',
                "twice": b'{"caption": "a", "caption": "b"}', "nul": b'{"caption": "a\\u0000b"}', "nul_byte": b'{"caption": "a\0b"}', "cut": b'{"caption": "a', "empty": b"",
                "bom": b'\xef\xbb\xbf{"caption": "a"}', "huge": b'{"caption": 1e999999}', "behind": b'{"caption": "a"} x'})
    return out


def sample(folder, mimo):
    for name, data in documents().items():
        write(folder, name, data)
    words(folder + ".dict", JSON_WORDS + ['"caption"', '"texts"', '"images"', '"conversation"', '"sender"', '"fragments"', '"t"', '"value"', '"image"', '"text"',
                                          '"0.png"', '"jpg"', '"json"'])


def tokenizer(folder, mimo):
    whole = os.path.join(folder, "whole")
    write_tokenizer(whole)
    with open(whole) as f:
        plain = json.load(f)
    vocab = {"a": 0, "b": 1, "ab": 2, "Ġ": 3, "é": 4}
    base = dict(plain, added_tokens=[{"id": 5, "content": "</s>", "special": True}],
                model={"type": "BPE", "vocab": vocab, "merges": ["a b"], "unk_token": "a"})
    split = {"type": "Split", "pattern": {"Regex": "\\p{L}+|\\s"}, "behavior": "Isolated", "invert": False}
    kinds = {"small": {}, "pairs": {"model": dict(base["model"], merges=[["a", "b"]])},
             "split": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, {"type": "ByteLevel", "use_regex": False}]}},
             "literal": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [dict(split, pattern={"String": " "}, behavior="MergedWithNext"),
                                                                                  {"type": "ByteLevel", "add_prefix_space": True}]}},
             "strips": {"added_tokens": [{"id": 5, "content": "<image>", "lstrip": True, "rstrip": True, "single_word": True},
                                         {"id": 6, "content": "<im", "normalized": True}]},
             "unigram": {"model": {"type": "Unigram"}}, "nfc": {"normalizer": {"type": "NFC"}}, "gap": {"model": dict(base["model"], vocab={"a": 0, "b": 400000})},
             "twice": {"added_tokens": [{"id": 0, "content": "a"}, {"id": 0, "content": "a"}]}, "far": {"added_tokens": [{"id": 1 << 40, "content": "x"}]}}
    for name, change in kinds.items():
        write(folder, name, json.dumps(dict(base, **change), ensure_ascii=name == "literal").encode() + b"\0a text of <image> words, 12 \xc3\xa9")
    write(folder, "deep", b"[" * 3000)
    write(folder, "bad_pattern", json.dumps(dict(base, pre_tokenizer=dict(split, pattern={"Regex": "((a+)+)+$"}))).encode())
    words(folder + ".dict", JSON_WORDS + ['"model"', '"vocab"', '"merges"', '"added_tokens"', '"pre_tokenizer"', '"pretokenizers"', '"Split"', '"ByteLevel"', '"Sequence"',
                                          '"Regex"', '"String"', '"behavior"', '"Removed"', '"Contiguous"', '"MergedWithPrevious"', '"invert"', '"id"', '"content"',
                                          '"lstrip"', '"normalized"', '"unk_token"', "\\\\p{L}", "(?!\\\\S)", "\\\\s+", "[^\\\\r\\\\n]", "(?i:", "\\0"])


# ---- Hugging Face directories ------------------------------------------------------------------------------------------------

def safetensors(folder, mimo):
    entry = lambda dtype, shape, a, b: {"dtype": dtype, "shape": shape, "data_offsets": [a, b]}
    file = lambda header, data: struct.pack("<Q", len(header)) + header + data
    good = {"__metadata__": {"format": "pt"}, "backbone.layers.0.mixer.D": entry("BF16", [4], 0, 8), "vision_model.radio_model.model.blocks.1.ls1.gamma":
            entry("F16", [2, 1], 8, 12), "mlp1.0.weight": entry("F32", [], 12, 16), "lm_head.weight": entry("F64", [1, 1, 1], 16, 24),
            "sound_encoder.x": entry("I64", [0, 7], 24, 24), "language_model.backbone.layers.1.mixer.experts.0.up_proj.weight_scale": entry("F8_E4M3", [1], 24, 25)}
    text = json.dumps(good).encode()
    kinds = {"good": text, "spaces": text + b" " * 7, "empty": b"{}", "hole": json.dumps({"a": entry("F32", [1], 4, 8)}).encode(),
             "overlap": json.dumps({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}).encode(),
             "twice": b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}',
             "overflow": json.dumps({"a": entry("F32", [1 << 40, 1 << 40], 0, 0)}).encode(), "nan": b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[NaN,1]}}',
             "deep": b'{"a":' + b"[" * 50, "list": b"[]", "real": b'{"a":{"dtype":"F4","shape":[2.0],"data_offsets":[0,1]}}'}
    for name, header in kinds.items():
        write(folder, name, b"\0" + file(header, bytes(25)))
        write(folder, "header_" + name, b"\1" + struct.pack("<H", 25) + header)
    write(folder, "cut", b"\0" + file(text, bytes(25))[:100])
    write(folder, "huge", b"\0" + b"\xff" * 8 + text)
    for name, m in (("index", {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}), ("escape", {"a": "../x.safetensors"}),
                    ("itself", {"a": "model.safetensors.index.json"}), ("none", {}), ("number", {"a": 1})):
        write(folder, name, b"\2" + json.dumps({"metadata": {"total_size": 1}, "weight_map": m}).encode())
    words(folder + ".dict", JSON_WORDS + ['"dtype"', '"shape"', '"data_offsets"', '"__metadata__"', '"weight_map"', ".safetensors", "BF16", "F16", "F32", "F64",
                                          "I64", "F8_E4M3", "language_model.", "backbone.", "vision_model.", "radio_model.model.", "blocks.0.", "parametrizations."])


def hf_config(folder, mimo):
    import hf_files as hf
    vlm = hf.vlm_config(hf.TINY, hf.TINY_VISION)
    listed = {k: v for k, v in hf.TINY.items() if k != "hybrid_override_pattern"} | {"layers_block_type": ["mamba", "moe", "linear_attention", "full_attention", "moe", "mlp"]}
    remote = {"args": {"model": "vit_huge_patch16_224", "cpe_max_size": 2048, "min_num_patches": 4}, "patch_size": 16}
    for name, config in (("language", hf.TINY), ("listed", listed), ("vision", hf.TINY_VISION), ("vlm", vlm), ("remote", remote),
                         ("library", hf.vlm_config(listed, hf.TINY_VISION, published=False)), ("empty", {}), ("list", []),
                         ("long", {"hybrid_override_pattern": "M" * 1000}), ("wrong", {k: "x" for k in hf.TINY})):
        write(folder, name, json.dumps(config).encode())
    write(folder, "traps", json.dumps(vlm).replace("16", "Infinity").replace("2.5", "NaN").encode())
    write(folder, "deep", b"[" * 200)
    words(folder + ".dict", JSON_WORDS + ["Infinity", "-Infinity", "NaN", '"args"', '"model"', '"text_config"', '"llm_config"', '"vision_config"',
                                          *('"%s"' % k for k in {**hf.TINY, **hf.TINY_VISION, **vlm})])


# The deck and the config.json of fuzz_hf_directory.c.
SMALL = dict(hybrid_override_pattern="M*E", hidden_size=8, num_attention_heads=4, num_key_value_heads=2, head_dim=2, intermediate_size=8, vocab_size=16,
             mamba_num_heads=4, mamba_head_dim=2, n_groups=2, ssm_state_size=4, conv_kernel=4, n_routed_experts=2, moe_intermediate_size=4,
             moe_shared_expert_intermediate_size=4)
SMALL_VISION = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=2.0, patch_size=4, max_img_size=16, num_cls_tokens=1, num_registers=1)


def hf_directory(folder, mimo):
    import hf_files as hf
    c, v = SMALL, SMALL_VISION
    has_index, loops, linked, cut, language_only = 1, 2, 4, 8, 16
    one, two, index_name = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"

    def header(tensors):
        """(JSON, bytes of data) of {name: (dtype, shape)}."""
        out, at = {"__metadata__": {"format": "pt"}}, 0
        for n, (dtype, shape) in tensors.items():
            size = int(np.prod(shape, dtype=np.int64)) * hf.WIDTH[dtype]
            out[n] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
            at += size
        return json.dumps(out).encode(), at

    def put(name, flags, *files, index=b""):
        data = bytes([flags]) + struct.pack("<H", len(index)) + index
        for tensors in (*files, None, None, None)[:3]:
            text, n = header(tensors) if tensors is not None else (b"", 0)
            part = struct.pack("<I", n) + text if tensors is not None else b""
            data += struct.pack("<H", len(part)) + part
        write(folder, name, data)

    def halves(name, flags, tensors, change=lambda where: where):
        names = list(tensors)
        a, b = ({n: tensors[n] for n in part} for part in (names[:len(names) // 2], names[len(names) // 2:]))
        where = change({**{n: one for n in a}, **{n: two for n in b}})
        put(name, flags | has_index, None, a, b, index=json.dumps({"metadata": {"total_size": 1}, "weight_map": where}).encode())

    f32 = lambda names: {n: ("F32", s) for n, s in names.items()}
    alone = f32(hf.language(c))
    # Zeros are no mean of pictures, so a whole directory is without the two constants.
    whole = f32({**hf.language(c, "language_model."), **hf.vision(v, "vision_model."), **hf.projector(c, v), **hf.final_norm(v)})
    library = f32({**hf.language(c, "language_model.", library=True, fused=True), **hf.vision(v, "vision_model.", library=True), **hf.projector(c, v, library=True),
                   **hf.final_norm(v)})
    split = f32({**hf.language(c, "language_model."), **hf.vision(v, "vision_model.", split=True), **hf.projector(c, v), **hf.final_norm(v, "vision_projector.vision_final_layernorm.")})
    scales = {"vision_model.radio_model.model.blocks.0.ls%d.gamma" % k: ("F16", (8,)) for k in (1, 2)}
    more = {**f32(hf.more_vision(v, "vision_model.")), **f32(hf.audio(2)), "mtp.layers.0.norm.weight": ("BF16", (8,))}
    refused = {"language_model.backbone.layers.0.mixer.in_proj.bias": ("F32", (28,)), "language_model.backbone.layers.2.mixer.experts.0.up_proj.weight_scale":
               ("I8", ()), "vision_model.radio_model.model.blocks.0.attn.qkv.parametrizations.weight.0.scale": ("I8", ()), "surplus": ("F32", (3,))}
    put("alone", language_only, alone)
    put("whole", 0, whole)
    put("library", 0, library)
    put("split", 0, {**split, **scales})
    put("bf16", language_only, {n: ("BF16", s) for n, (_, s) in alone.items()})
    put("more", 0, {**whole, **more})
    put("audio", 0, {**whole, **{n: x for n, x in more.items() if "conditioner" not in n}})
    put("no_norm", 0, {n: x for n, x in whole.items() if "final_layernorm" not in n})
    put("integers", 0, {n: ("I64", s) for n, (_, s) in whole.items()})
    put("wrong_scale", 0, {**whole, **{n: ("F16", (7,)) for n in scales}, "vision_model.radio_model.input_conditioner.norm_mean": ("F32", (2,))})
    put("escapes", language_only, {**alone, "backbone.\x1b[2J": ("F32", ()), "model.\x1b[2J": ("F32", ()), "a\nb": ("F32", ()), "\u202e": ("F32", ())})
    put("long_name", language_only, {**alone, "x" * 300: ("F32", ())})
    put("refused", 0, {**whole, **refused})
    put("cut", cut, None, None, whole)
    put("few", 0, {n: x for i, (n, x) in enumerate(whole.items()) if i % 3})
    put("shapes", 0, {n: (d, s[::-1]) for n, (d, s) in whole.items()})
    put("both", language_only, {**alone, **f32(hf.language(c, library=True))})
    put("nothing", 0)
    halves("shards", 0, whole)
    halves("shards_alone", language_only, alone)
    halves("cut_shard", cut, whole)
    halves("linked", linked, whole)
    halves("loop", loops, whole)
    halves("exchanged", language_only, alone, lambda w: {n: {one: two, two: one}[f] for n, f in w.items()})
    halves("cyclic", language_only, alone, lambda w: {n: index_name for n in w})
    halves("one_less", language_only, alone, lambda w: dict(list(w.items())[1:]))
    halves("one_more", language_only, alone, lambda w: {**w, "x": one})
    halves("long_names", language_only, alone, lambda w: {n * 20: f for n, f in w.items()})
    halves("escapes_in_the_index", language_only, alone, lambda w: {**w, "\x1b[2J": one, "b": "\x1b.safetensors"})
    words(folder + ".dict", JSON_WORDS + ['"dtype"', '"shape"', '"data_offsets"', '"weight_map"', "BF16", "F16", "F32", "F64", "I64", one, two, index_name,
                                          *{w for n in {**whole, **library, **split, **scales, **more, **refused} for w in (n, *re.findall(r"[^.]+\.", n))}])


SEEDS = {"deck": deck, "image": image, "shard": shard, "sample": sample, "safetensors": safetensors, "hf_config": hf_config, "hf_directory": hf_directory, "tokenizer": tokenizer}
