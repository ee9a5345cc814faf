"""What check_gpu.py and bench_gpu.py share: the bundle they lie in, the machine, programs with a deadline."""
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.dont_write_bytecode = True
sys.path.insert(0, os.path.join(ROOT, "regression"))
import gpu   # noqa: E402

MIMO = os.path.join(ROOT, "bin", "mimo")
MPIEXEC = os.path.join(ROOT, "bin", "mpiexec.hydra")
OPERATIONS = os.path.join(ROOT, "tests")


def add_options(ap):
    ap.add_argument("--gpus", default="1", metavar="N[,N...]", help="how many GPUs a run has: each count is done in turn (1)")
    ap.add_argument("--out", required=True, metavar="DIR", help="folder for the results")
    ap.add_argument("-k", action="append", default=[], metavar="WORD", help="only parts whose name holds the word (several: any of them)")


def counts(text):
    try:
        n = [int(x) for x in text.split(",")]
    except ValueError:
        n = []
    if not n or min(n) < 1:
        sys.exit("--gpus %s: wanted numbers of GPUs, as 1,2,4" % text)
    return n


def cores():
    return len(os.sched_getaffinity(0))


def environment(**more):
    return dict(os.environ, HWLOC_PLUGINS_PATH="/nonexistent", UCX_TLS="self,posix", HYDRA_LAUNCHER="fork", CUDA_DEVICE_ORDER="PCI_BUS_ID", **more)


def ask(*command):
    """What a program prints, or ''."""
    try:
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, env=environment()).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def machine():
    """What the numbers depend on, for the result files."""
    rows = [r.split(", ") for r in ask("nvidia-smi", "--query-gpu=name,driver_version,power.limit,memory.total", "--format=csv,noheader").splitlines()]
    features = dict(line.split("=", 1) for line in ask(MIMO, "--features").splitlines() if "=" in line)
    return {"date": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()), "devices": [r[0] for r in rows], "driver": rows[0][1] if rows else "",
            "power_limit": rows[0][2] if rows else "", "device_memory": rows[0][3] if rows else "", "cores": cores(),
            "kernel": os.uname().release, "python": sys.version.split()[0], "program": features}


class Program:
    """A running program and everything it starts; its output is read while it runs."""

    def __init__(self, command, env=None, cwd=ROOT):
        self.start, self.text, self.killed = time.monotonic(), "", False
        self.file = tempfile.TemporaryFile("w+", errors="replace")
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=self.file, stderr=subprocess.STDOUT, env=env or environment(),
                                        cwd=cwd, start_new_session=True)

    def read(self):
        """All output so far."""
        return os.pread(self.file.fileno(), os.fstat(self.file.fileno()).st_size, 0).decode(errors="replace")

    def wait(self, deadline, look=None, pause=0.1):
        """Until it ends or the deadline (time.monotonic) has come, then it is killed. look(text): called with the output meanwhile."""
        while self.process.poll() is None:
            if time.monotonic() > deadline:
                self.killed = True
                self.kill()
            if look:
                look(self.read())
            time.sleep(pause)
        if look:
            look(self.read())
        self.seconds, self.status, self.text = time.monotonic() - self.start, self.process.returncode, self.read()
        self.file.close()
        return self

    def kill(self):
        """At first gently: the runner of the regression cases ends its launches, which have sessions of their own."""
        for number, patience in ((signal.SIGTERM, 5), (signal.SIGKILL, None)):
            try:
                os.killpg(self.process.pid, number)
                self.process.wait(patience)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                pass


def together(jobs, width):
    """Call every job() on `width` threads; the first exception is raised when all have ended."""
    waiting, lock, trouble = list(jobs), threading.Lock(), []

    def work():
        while True:
            with lock:
                if not waiting:
                    return
                job = waiting.pop(0)
            try:
                job()
            except Exception as e:   # an error of this program, shown by the main thread
                trouble.append(e)
    threads = [threading.Thread(target=work) for _ in range(max(1, min(width, len(waiting))))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if trouble:
        raise trouble[0]


def operation_lines(text):
    """[(ok, case, note)] of what a program of tests/gpu prints."""
    out = []
    for line in text.splitlines():
        m = re.match(r"(not ok|ok) - (.*)", line)
        if m:
            out.append([m.group(1) == "ok", m.group(2), ""])
        elif line.startswith("#   ") and out:
            out[-1][2] += line[4:] + "\n"
    return out


def operations():
    """Paths of the tests of single operations in the bundle."""
    return [os.path.join(OPERATIONS, n) for n in sorted(os.listdir(OPERATIONS)) if n.startswith("gpu_") and os.access(os.path.join(OPERATIONS, n), os.X_OK)]
