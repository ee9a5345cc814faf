#!/bin/sh
# Make a tree that runs on a GPU host which has only a driver and CUDA's libraries: tools/bundle.sh MIMO DIR [TEST...]
#
#   DIR/mimo            starts the program: sets the library path and execs bin/mimo
#   DIR/mpiexec         hydra's launcher, for ranks of this host
#   DIR/check_gpu       every test for GPUs; $PYTHON (python3) must have numpy and h5py (and PIL for one case)
#   DIR/bench_gpu       every measurement for GPUs
#   DIR/bin, DIR/lib    binaries and every library that ldd names, except the C library's own and NVIDIA's
#   DIR/tests           the tests of single operations named after DIR, and what the other tests share
#   DIR/input, DIR/regression, DIR/tools    as in the source tree
#
# CUDA's libraries are looked for in $MIMO_CUDA_LIBS, in python's nvidia packages and in /usr/local/cuda/lib64.
set -eu
mimo=$1 dir=$2
shift 2
here=$(cd "$(dirname "$0")/.." && pwd)
rm -rf "$dir"
mkdir -p "$dir/bin" "$dir/lib" "$dir/tests" "$dir/tools" "$dir/regression"
cp "$mimo" "$dir/bin/mimo"
cp "$(command -v mpiexec.hydra)" "$(command -v hydra_pmi_proxy)" "$dir/bin/"
for t in "$@"; do cp "$t" "$dir/tests/"; done
libraries() {
    ldd "$@" | awk '$2 == "=>" && $3 ~ /^\// { print $3 }' | sort -u |
        grep -Ev '/(libc|libm|libdl|libpthread|librt|libresolv|libstdc\+\+|libgcc_s|ld-linux[^/]*|libcuda[^/]*|libcublas[^/]*|libcudnn[^/]*|libcudart[^/]*|libnccl[^/]*|libnvrtc[^/]*)\.so'
}
for l in $(libraries "$dir"/bin/* "$dir"/tests/*) \
    $(find /usr/lib -name libslurmfull.so -path '*slurm*' 2>/dev/null | head -1); do
    cp -L "$l" "$dir/lib/"
done
strip --strip-unneeded "$dir"/bin/* "$dir"/lib/* "$dir"/tests/* 2>/dev/null || true
cat > "$dir/env.sh" <<'END'
# Source this: library path and MPI settings of the bundle.
bundle=$(cd "$(dirname "${BASH_SOURCE:-$0}")" && pwd)
nvidia=$(python3 -c "import nvidia, glob; print(':'.join(glob.glob(list(nvidia.__path__)[0] + '/*/lib')))" 2>/dev/null || true)
export LD_LIBRARY_PATH=$bundle/lib:${MIMO_CUDA_LIBS:-}:$nvidia:/usr/local/cuda/lib64${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export HWLOC_PLUGINS_PATH=/nonexistent UCX_TLS=self,posix PATH=$bundle/bin:$PATH
END
start() {   # NAME COMMAND: a program of the bundle
    printf '#!/bin/bash\n. "$(dirname "$0")/env.sh"\nexec %s "$@"\n' "$2" > "$dir/$1"
    chmod +x "$dir/$1"
}
start mimo '"$bundle/bin/mimo"'
start mpiexec '"$bundle/bin/mpiexec.hydra" -launcher fork'
start check_gpu '"${PYTHON:-python3}" "$bundle/tools/check_gpu.py"'
start bench_gpu '"${PYTHON:-python3}" "$bundle/tools/bench_gpu.py"'
cp -r "$here/input" "$dir/"
cp "$here/tests/harness.py" "$dir/tests/"
cp "$here/tools/gpu_host.py" "$here/tools/check_gpu.py" "$here/tools/bench_gpu.py" "$dir/tools/"
cp "$here/regression/run" "$here"/regression/*.py "$dir/regression/"
cp -r "$here"/regression/[0-9]* "$dir/regression/"
du -sh "$dir" | cut -f1
