#!/usr/bin/env python3
"""tools/bootstrap.sh with a dpkg-query, apt-get and id that only record: what is missing is installed once and nothing else,
without root the command is printed, and where nothing is missing nothing is called."""
import os
import shutil
import subprocess
import tempfile

from harness import ROOT, Tap

STUBS = {
    # Installed is what the file `installed` lists; apt-get install adds to it.
    "dpkg-query": 'grep -qx -- "$4" "$STATE/installed" && echo "install ok installed"',
    "apt-get": 'echo "$*" >> "$STATE/calls"; [ "$1" = install ] || exit 0\nfor p; do echo "$p" >> "$STATE/installed"; done',
    "id": 'read -r uid < "$STATE/uid"; echo "$uid"',
}


class Machine:
    """A tree with tools/bootstrap.sh in it and a PATH of stubs."""

    def __init__(self, uid, debian=True):
        self.dir = tempfile.mkdtemp(prefix="mimo-bootstrap-")
        os.makedirs(self.path("tree", "tools"))
        shutil.copy(os.path.join(ROOT, "tools", "bootstrap.sh"), self.path("tree", "tools"))
        os.mkdir(self.path("bin"))
        for name, text in STUBS.items():
            if name == "id" or debian:
                with open(self.path("bin", name), "w") as f:
                    f.write("#!/bin/sh\n%s\n" % text)
                os.chmod(self.path("bin", name), 0o755)
        for name in ("dirname", "grep", "sed", "cmp"):
            os.symlink(shutil.which(name), self.path("bin", name))
        for name, text in (("uid", "%d\n" % uid), ("installed", "python3\ngcc\n"), ("calls", "")):
            with open(self.path(name), "w") as f:
                f.write(text)

    def path(self, *parts):
        return os.path.join(self.dir, *parts)

    def run(self, *options):
        """(status, stdout and stderr, calls of apt-get)"""
        open(self.path("calls"), "w").close()
        p = subprocess.run(["/bin/sh", self.path("tree", "tools", "bootstrap.sh"), *options], text=True, errors="replace",
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                           env={"PATH": self.path("bin"), "STATE": self.dir})
        with open(self.path("calls")) as f:
            return p.returncode, p.stdout, f.read().splitlines()

    def close(self):
        shutil.rmtree(self.dir)


def main():
    tap = Tap()
    m = Machine(uid=0)
    status, text, calls = m.run()
    installed = calls[-1].split() if calls else []
    tap.result(status == 0 and len(calls) == 2 and calls[0].startswith("update") and "--no-install-recommends" in installed,
               "root_installs_what_is_missing", text)
    tap.result({"mpich", "libarchive-dev", "make"} <= set(installed) and not {"gcc", "python3", "libcmocka-dev"} & set(installed),
               "only_what_is_missing_is_installed", installed)
    status, text, calls = m.run()
    tap.result(status == 0 and not calls and "everything is installed" in text, "a_second_call_does_nothing", text)
    status, text, calls = m.run("--dev")
    more = set(calls[-1].split()) if calls else set()
    tap.result(status == 0 and {"libcmocka-dev", "clang"} <= more and "mpich" not in more, "dev_adds_to_the_demo", text)
    m.close()

    m = Machine(uid=1000)
    status, text, calls = m.run()
    command = [line for line in text.splitlines() if "apt-get install" in line]
    tap.result(status == 1 and not calls, "without_root_nothing_is_called", text)
    tap.result(len(command) == 1 and command[0].split()[-len(installed) + 4:] == installed[4:],
               "without_root_the_command_is_printed", text)
    with open(m.path("installed"), "a") as f:
        f.write("\n".join(installed) + "\n")
    status, text, calls = m.run()
    tap.result(status == 0 and not calls, "without_root_a_complete_machine_is_fine", text)
    status, text, calls = m.run("--nonsense")
    tap.result(status == 2 and "--nonsense" in text, "unknown_options_are_refused", text)
    m.close()

    m = Machine(uid=1000, debian=False)
    status, text, calls = m.run()
    tap.result(status == 0 and "not Debian" in text and "libarchive-dev" in text, "elsewhere_the_packages_are_named", text)
    m.close()
    tap.close()


if __name__ == "__main__":
    main()
