#!/usr/bin/env python3
"""Every deck that mimo accepts means the same to f90nml and to gfortran's namelist reader.

Usage: deck_readers.py [--test-deck FILE] [--mimo FILE] [--changed N] [--seed N]
       deck_readers.py --install      (f90nml into build/f90nml, a virtual environment; needs the Python index)

Reads tests/decks/good, input/ and N decks made from them by random changes of letters, words and lines; of these every one that
mimo accepts is read by the other two and must give the same values for the keys it names, and no value for any other. The Fortran
program is generated from `mimo --reference`. A reader that is not here is skipped with its reason. Known and allowed for: gfortran
reports end of file when the last `/` has no newline behind it, although it has set the values; no Fortran scope can hold the group
lr and its key lr, so Fortran reads a copy whose group is called lr_; f90nml does not know a byte-order mark, so the file is opened
as utf-8-sig.
"""
import argparse
import glob
import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
VENV = os.path.join(ROOT, "build", "f90nml")
LIST = 64                     # elements of a list key
TEXT = 2048                   # characters of a string
STRINGS = ["'&lr '", "'a&run'", "'$data '", "'wow!'", "'=?'", "'?'", "'a=1'", "'/'", "' / '", "'(1)'", "'3*4'", "'%'", "'&'", "'&end'", "'#'"]
LETTERS = "\n\n  \t,,==''\"\"&/*().!+-_%$;:09aeEdDtT."


# ---- mimo ------------------------------------------------------------------------------------------------------------------

def table(mimo):
    """{group: {key: type}} in the order of the reference deck; type = integer, real, logical, string, or those with ` list`."""
    text = subprocess.run([mimo, "--reference"], stdout=subprocess.PIPE, text=True, check=True).stdout
    groups, group = {}, None
    for line in text.splitlines():
        m = re.match(r"&(\w+)$", line)
        if m:
            group = groups.setdefault(m.group(1), {})
        m = re.match(r"  (?:! )?(\w+) = ", line)
        if m:
            key = m.group(1)
        m = re.match(r"      ! (list of )?(integer|real|logical|string)s?\b", line)
        if m:
            group[key] = m.group(2) + (" list" if m.group(1) else "")
    return groups


def literal(token, kind):
    if kind == "integer":
        return int(token)
    if kind == "real":
        return float(token)
    if kind == "logical":
        return token == ".true."
    return token[1:-1].replace("''", "'").rstrip(" ")   # Fortran pads strings with blanks


def values_of_mimo(test_deck, types, paths):
    """{path: {(group, key): value or list}} of the accepted ones."""
    out = subprocess.run([test_deck, "--values"], input="\n".join(paths) + "\n", stdout=subprocess.PIPE, check=True, cwd=ROOT,
                         text=True, encoding="utf-8", errors="surrogateescape").stdout
    decks, values = {}, None
    for line in out.split("\n"):
        if line.startswith("accepted "):
            values = decks.setdefault(line[9:], {})
        elif line.startswith(" "):
            name, _, text = line[1:].partition(" ")
            group, key = name.split(".")
            kind = types[group][key]
            if kind.endswith(" list"):
                tokens = re.findall(r"'(?:[^']|'')*'|[^,\s]+", text)
                values[group, key] = [literal(t, kind.split()[0]) for t in tokens]
            else:
                values[group, key] = literal(text, kind)
    return decks


# ---- f90nml ----------------------------------------------------------------------------------------------------------------

def parse_with_f90nml(paths):
    """Runs in the interpreter that has f90nml: one JSON object for each path."""
    import f90nml

    for path in paths:
        try:
            with open(path, encoding="utf-8-sig", newline="") as f:
                nml = f90nml.read(f)
            out = {g: {k: [v, (nml[g].start_index.get(k) or [1])[0]] for k, v in nml[g].items()} for g in nml}
        except Exception as e:   # whatever it raises is its verdict on the deck
            out = "%s: %s" % (type(e).__name__, e)
        print(json.dumps(out), flush=True)


def f90nml_python():
    for python in (sys.executable, os.path.join(VENV, "bin", "python")):
        if os.path.exists(python) and subprocess.run([python, "-c", "import f90nml"], stderr=subprocess.DEVNULL).returncode == 0:
            return python
    return None


def values_of_f90nml(python, types, paths):
    out = subprocess.run([python, os.path.abspath(__file__), "--parse"], input="\n".join(paths) + "\n", stdout=subprocess.PIPE, check=True,
                         text=True, timeout=60 + len(paths)).stdout.splitlines()
    decks = {}
    for path, line in zip(paths, out):
        got = json.loads(line)
        if isinstance(got, str):
            decks[path] = got
            continue
        decks[path] = {}
        for group, keys in got.items():
            for key, (value, start) in keys.items():
                kind = types.get(group, {}).get(key, "")
                number = lambda v: float(v) if kind.startswith("real") and type(v) is int else v
                text = lambda v: v.rstrip(" ") if isinstance(v, str) else number(v)
                if kind.endswith(" list"):
                    value = [None] * (start - 1) + [text(v) for v in (value if isinstance(value, list) else [value])]
                else:
                    value = text(value)
                decks[path][group, key] = value
    return decks


# ---- gfortran --------------------------------------------------------------------------------------------------------------

FORTRAN = {"integer": "integer(8)", "real": "real(8)", "logical": "logical", "string": "character(len=%d)" % TEXT}
# Two passes with different contents before the read: what has changed in one of them was read.
BEFORE = {"integer": ("-huge(0_8)", "huge(0_8)"), "real": ("-1.25d300", "1.25d300"), "logical": (".false.", ".true."),
          "string": ("'~'", "'^'")}


def fortran_name(group):
    return group + "_" if group == "lr" else group


def fortran_copy(path, folder):
    """The deck with &lr renamed."""
    with open(path, "rb") as f:
        text = re.sub(rb"&lr(?!\w)", b"&lr_", f.read(), flags=re.I)
    copy = os.path.join(folder, "copy_%s" % re.sub(r"\W", "_", os.path.relpath(path, ROOT)))
    with open(copy, "wb") as f:
        f.write(text)
    return copy


def fortran_program(types):
    lines = ["program readers", "  implicit none", "  character(len=4096) :: path", "  integer :: pass", "  do", "    read(*, '(a)', end=9) path",
             "    do pass = 1, 2", "      print '(a,i0,1x,a)', 'deck ', pass, trim(path)"]
    lines += ["      call g_%s" % g for g in types] + ["    end do", "  end do", "9 continue", "contains"]
    for group, keys in types.items():
        lines += ["  subroutine g_%s" % group, "    integer :: unit, status, i", "    character(len=500) :: why"]
        for key, kind in keys.items():
            lines.append("    %s :: %s%s" % (FORTRAN[kind.split()[0]], key, "(%d)" % LIST if kind.endswith(" list") else ""))
        lines += ["    namelist /%s/ &" % fortran_name(group), "      " + ", &\n      ".join(keys)]
        for key, kind in keys.items():
            a, b = BEFORE[kind.split()[0]]
            lines += ["    if (pass == 1) then", "      %s = %s" % (key, a), "    else", "      %s = %s" % (key, b), "    end if"]
        lines += ["    open(newunit=unit, file=trim(path), status='old', action='read')", 
                  "    read(unit, nml=%s, iostat=status, iomsg=why)" % fortran_name(group),
                  "    if (status > 0) print '(a)', ' refused %s: ' // trim(why)" % group, "    close(unit)"]
        for key, kind in keys.items():
            item = key + "(i)" if kind.endswith(" list") else key
            a, b = BEFORE[kind.split()[0]]
            lines.append("    do i = 1, %d" % (LIST if kind.endswith(" list") else 1))
            changed = ".neqv." if kind == "logical" else "/="
            lines.append("      if ((pass == 1 .and. (%s %s %s)) .or. (pass == 2 .and. (%s %s %s))) then" % (item, changed, a, item, changed, b))
            if kind.startswith("string"):
                lines.append("        call text('%s.%s', i, %s)" % (group, key, item))
            else:
                shown = {"integer": item, "real": "transfer(%s, 0_8)" % item, "logical": "merge(1_8, 0_8, %s)" % item}[kind.split()[0]]
                lines.append("        print '(a,1x,i0,1x,i0)', ' %s.%s', i, %s" % (group, key, shown))
            lines += ["      end if", "    end do"]
        lines.append("  end subroutine")
    lines += ["  subroutine text(name, i, s)", "    character(len=*), intent(in) :: name, s", "    integer, intent(in) :: i", "    integer :: k",
              "    write(*, '(a,1x,i0,1x)', advance='no') ' ' // name, i",
              "    do k = 1, len_trim(s)", "      write(*, '(z2.2)', advance='no') ichar(s(k:k))", "    end do", "    print '(a)', ''", "  end subroutine",
              "end program"]
    return "\n".join(lines) + "\n"


def build_fortran(types, folder):
    source, program = os.path.join(folder, "readers.f90"), os.path.join(folder, "readers")
    with open(source, "w") as f:
        f.write(fortran_program(types))
    subprocess.run(["gfortran", "-std=f2018", "-O0", "-w", "-ffree-line-length-none", "-o", program, source], check=True)
    return program


def decoded(token, kind):
    if kind == "real":
        return struct.unpack("<d", struct.pack("<q", int(token)))[0]
    if kind == "string":
        return bytes.fromhex(token).decode("utf-8", errors="surrogateescape").rstrip(" ")
    return token == "1" if kind == "logical" else int(token)


def values_of_gfortran(program, types, paths, folder):
    copies = {fortran_copy(path, folder): path for path in paths}
    out = subprocess.run([program], input="\n".join(copies) + "\n", stdout=subprocess.PIPE, check=True, text=True, timeout=60 + len(paths)).stdout
    passes, where, refused = {}, None, {}
    for line in out.split("\n"):
        m = re.match(r"deck ([12]) (.*)$", line)
        if m:
            where, path = {}, copies[m.group(2)]
            passes.setdefault(path, []).append(where)
        elif line.startswith(" refused "):
            refused[path] = line[9:]
        elif line.startswith(" "):
            name, i, token = (line[1:].split(" ") + [""])[:3]
            where[name, int(i)] = token
    decks = {}
    for path, (first, second) in passes.items():
        if path in refused:
            decks[path] = refused[path]
            continue
        values = decks[path] = {}
        for group, keys in types.items():
            for key, kind in keys.items():
                name, plain = "%s.%s" % (group, key), kind.split()[0]
                get = lambda i: next((decoded(p[name, i], plain) for p in (first, second) if (name, i) in p), None)
                if kind.endswith(" list"):
                    got = [get(i) for i in range(1, LIST + 1)]
                    while got and got[-1] is None:
                        got.pop()
                    if got:
                        values[group, key] = got
                elif get(1) is not None:
                    values[group, key] = get(1)
    return decks


# ---- decks and comparison --------------------------------------------------------------------------------------------------

def changed(rng, text, all_words):
    """A few random changes of a deck's text."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        at, kind = rng.randrange(len(text) + 1), rng.randrange(8)
        if kind == 0:
            text = text[:at] + rng.choice(LETTERS) + text[at:]
        elif kind == 1:
            text = text[:at] + text[at + rng.choice((1, 1, 2, 5)):]
        elif kind == 2 and at < len(text):
            text = text[:at] + rng.choice(LETTERS) + text[at + 1:]
        elif kind == 3:
            lines = text.split("\n")
            i = rng.randrange(len(lines))
            lines.insert(rng.randrange(len(lines) + 1), lines.pop(i))
            text = "\n".join(lines)
        elif kind == 4:
            text = text[:at] + rng.choice(all_words) + text[at:]
        elif kind == 5:
            spaces = [m.start() for m in re.finditer(r"[ ,=]", text)]
            if spaces:
                i = rng.choice(spaces)
                text = text[:i] + rng.choice((" ", "\n", "\t", " ! a word\n", ",", ", ", "\r\n", " , ", "\n,", "  ")) + text[i + rng.randrange(2):]
        elif kind == 6:
            breaks = [m.start() for m in re.finditer("\n", text)]
            if breaks:
                i = rng.choice(breaks)
                text = text[:i] + rng.choice((" ", "", " ! ", "\n!", "\n\n", "\t\n")) + text[i + 1:]
        else:
            text = rng.choice((str.upper, str.swapcase, lambda s: s.replace("\n", "\r\n"), lambda s: s.rstrip(), lambda s: "\ufeff" + s))(text)
    return text


def write_decks(folder, count, seed):
    """Paths of the good decks and of `count` changed ones."""
    rng, paths = random.Random(seed), sorted(glob.glob(os.path.join(ROOT, "tests", "decks", "good", "*.nml")) + glob.glob(os.path.join(ROOT, "input", "*.nml")))
    texts = [open(p, encoding="utf-8", newline="").read() for p in paths]
    short = [t for t in texts if len(t) < 4000]
    all_words = STRINGS + sorted({w for t in short for w in re.findall(r"'[^'\n]*'|[^\s,=]+", t)})
    for i in range(count):
        path = os.path.join(folder, "%05d.nml" % i)
        with open(path, "w", encoding="utf-8", newline="") as f:
            f.write(changed(rng, rng.choice(short), all_words))
        paths.append(path)
    return paths


def differences(ours, theirs):
    """One sentence for each deck that another reader reads differently."""
    out = []
    for path, values in ours.items():
        got = theirs.get(path, "no answer")
        with open(path, "rb") as f:
            text = f.read()
        shown = os.path.relpath(path, ROOT) if path.startswith(ROOT) else repr(text[:1500])
        if isinstance(got, str):
            out.append("%s is refused: %s" % (shown, got))
            continue
        for name in sorted(set(values) | set(got)):
            a, b = values.get(name), got.get(name)
            if a != b or type(a) is not type(b):
                out.append("%s: %s.%s is %r to mimo and %r here" % ((shown,) + name + (a, b)))
    return out


def compare(test_deck, mimo, count, seed, report):
    """report(reader, n, list of sentences) or report(reader, 0, reason) for each reader."""
    types = table(mimo)
    with tempfile.TemporaryDirectory() as folder:
        ours = values_of_mimo(test_deck, types, write_decks(folder, count, seed))
        paths = list(ours)
        python = f90nml_python()
        if python:
            report("f90nml", len(paths), differences(ours, values_of_f90nml(python, types, paths)))
        else:
            report("f90nml", 0, "f90nml is not installed (regression/oracle/deck_readers.py --install)")
        if shutil.which("gfortran"):
            report("gfortran", len(paths), differences(ours, values_of_gfortran(build_fortran(types, folder), types, paths, folder)))
        else:
            report("gfortran", 0, "gfortran is not installed (tools/bootstrap.sh --dev)")


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--test-deck", default=os.path.join(ROOT, "build", "tests", "test_deck"))
    ap.add_argument("--mimo", default=os.path.join(ROOT, "mimo"))
    ap.add_argument("--changed", type=int, default=3000)
    ap.add_argument("--seed", type=int, default=1)
    ap.add_argument("--install", action="store_true")
    ap.add_argument("--parse", action="store_true", help=argparse.SUPPRESS)
    a = ap.parse_args()
    if a.parse:
        return parse_with_f90nml(sys.stdin.read().splitlines())
    if a.install:
        for command in ([sys.executable, "-m", "venv", VENV], [os.path.join(VENV, "bin", "pip"), "install", "-q", "f90nml==1.5"]):
            if subprocess.run(command).returncode != 0:
                shutil.rmtree(VENV, ignore_errors=True)   # whole or absent, so that the next call tries again
                return 1
        return 0
    bad = []

    def report(reader, n, found):
        if isinstance(found, str):
            print("%s: skipped: %s" % (reader, found))
            return
        print("\n".join(found[:40]))
        print("%s: %d decks, %d differences" % (reader, n, len(found)))
        bad.extend(found)
    compare(a.test_deck, a.mimo, a.changed, a.seed, report)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
