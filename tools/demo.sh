#!/bin/sh
# The demo: install what is missing, build, make the data, train on 8 ranks (4 encoder + 4 language), show the result.
set -eu
[ $# -eq 0 ] || { echo "usage: tools/demo.sh (no arguments; like make demo)"; exit 2; }
cd "$(dirname "$0")/.."
start=$(date +%s)
tools/bootstrap.sh
make -s -j2 all
make -s data
rm -rf run/demo
export HWLOC_PLUGINS_PATH=/nonexistent UCX_TLS=self,posix
mpiexec.mpich -n 8 ./mimo input/stage2.nml run.output_dir=run/demo checkpoint.save=run/demo/checkpoints
/usr/bin/python3 tools/plot_trace.py run/demo/trace.h5 -o run/demo/trace.png
/usr/bin/python3 - <<'PY'
import h5py
with h5py.File("run/demo/trace.h5", "r", locking=False) as f:
    n = int(f["eval/rows"][()])
    it, loss, ablated = (f["eval/" + k][:n] for k in ("iteration", "lm_loss", "lm_loss_ablated"))
    print("\nheld-out loss per token: %.3f before training, %.3f after %d iterations" % (loss[0], loss[-1], it[-1]))
    print("the same with every picture given to another sample: %.3f - the model looks: %+.3f" % (ablated[-1], ablated[-1] - loss[-1]))
PY
echo "curves: run/demo/trace.png   log: run/demo/run.log   checkpoint: run/demo/checkpoints"
echo "demo took $(($(date +%s) - start)) s"
