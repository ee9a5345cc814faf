#!/bin/sh
# Make a tree that runs on a GPU host which has only a driver and CUDA's libraries: tools/bundle.sh MIMO DIR
#
#   DIR/mimo            starts the program: sets the library path and execs bin/mimo
#   DIR/mpiexec         hydra's launcher, for ranks of this host
#   DIR/bin, DIR/lib    binaries and every library that ldd names, except the C library's own and NVIDIA's
#
# CUDA's libraries are looked for in $MIMO_CUDA_LIBS, in python's nvidia packages and in /usr/local/cuda/lib64.
set -eu
mimo=$1 dir=$2
here=$(cd "$(dirname "$0")/.." && pwd)
rm -rf "$dir"
mkdir -p "$dir/bin" "$dir/lib"
cp "$mimo" "$dir/bin/mimo"
cp "$(command -v mpiexec.hydra)" "$(command -v hydra_pmi_proxy)" "$dir/bin/"
libraries() {
    ldd "$@" | awk '$2 == "=>" && $3 ~ /^\// { print $3 }' | sort -u |
        grep -Ev '/(libc|libm|libdl|libpthread|librt|libresolv|libstdc\+\+|libgcc_s|ld-linux[^/]*|libcuda[^/]*|libcublas[^/]*|libcudnn[^/]*|libcudart[^/]*|libnccl[^/]*|libnvrtc[^/]*)\.so'
}
for l in $(libraries "$dir/bin/mimo" "$dir/bin/mpiexec.hydra" "$dir/bin/hydra_pmi_proxy") \
    $(find /usr/lib -name libslurmfull.so -path '*slurm*' 2>/dev/null | head -1); do
    cp -L "$l" "$dir/lib/"
done
strip --strip-unneeded "$dir"/bin/* "$dir"/lib/* 2>/dev/null || true
cat > "$dir/env.sh" <<'END'
# Source this: library path and MPI settings of the bundle.
bundle=$(cd "$(dirname "${BASH_SOURCE:-$0}")" && pwd)
nvidia=$(python3 -c "import nvidia, glob; print(':'.join(glob.glob(list(nvidia.__path__)[0] + '/*/lib')))" 2>/dev/null || true)
export LD_LIBRARY_PATH=$bundle/lib:${MIMO_CUDA_LIBS:-}:$nvidia:/usr/local/cuda/lib64${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export HWLOC_PLUGINS_PATH=/nonexistent UCX_TLS=self,posix PATH=$bundle/bin:$PATH
END
cat > "$dir/mimo" <<'END'
#!/bin/bash
. "$(dirname "$0")/env.sh"
exec "$bundle/bin/mimo" "$@"
END
cat > "$dir/mpiexec" <<'END'
#!/bin/bash
. "$(dirname "$0")/env.sh"
exec "$bundle/bin/mpiexec.hydra" -launcher fork "$@"
END
chmod +x "$dir/mimo" "$dir/mpiexec"
cp -r "$here/input" "$dir/"
du -sh "$dir" | cut -f1
