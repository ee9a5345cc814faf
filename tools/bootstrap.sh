#!/bin/sh
# Install what mimo needs on Debian 12: the demo's packages; with --dev also what the tests need (and f90nml of the Python
# index, in build/f90nml); with --cuda also NVIDIA's libraries for a CUDA build, unpacked into .cuda/, and the compiler where
# /usr/local/cuda has none (no GPU or driver needed to build); with --oracle also transformers and torch in .oracle/ for `make oracle`. Safe to run again.
# Without root it prints the command to run as root and ends with status 1. Elsewhere than on Debian it only names the packages.
set -eu
cd "$(dirname "$0")/.."

# munkres is what fonttools otherwise takes scipy for, and with it Boost's headers: 250 MB.
packages="gcc make mpich libmpich-dev libhdf5-mpich-dev libopenblas0-pthread libopenblas-dev
    libjpeg62-turbo-dev libpng-dev libwebp-dev libpcre2-dev libjansson-dev libarchive-dev libxxhash-dev
    python3 python3-numpy python3-h5py python3-matplotlib python3-pil python3-munkres python3-fonttools fonts-noto-color-emoji"
dev="clang clang-format libclang-rt-14-dev llvm libcmocka-dev git patch gfortran strace python3-venv
    cppcheck clang-tidy valgrind mandoc"
cuda=no
f90nml=no
oracle=no

for option in "$@"; do
    case "$option" in
    --dev) f90nml=yes; packages="$packages $dev" ;;
    --cuda) cuda=yes; packages="$packages python3-pip" ;;
    --oracle) oracle=yes; packages="$packages python3-venv" ;;
    -h | --help) sed -n '2,6s/^# //p' "$0"; exit 0 ;;
    *) echo "bootstrap.sh: unknown option '$option' (--dev, --cuda, --oracle, --help)" >&2; exit 2 ;;
    esac
done

missing=
for p in $packages; do
    dpkg-query -W -f '${Status}' "$p" 2>/dev/null | grep -q 'ok installed' || missing="$missing $p"
done
if ! command -v dpkg-query >/dev/null; then
    echo "bootstrap.sh: this is not Debian; what these packages of Debian 12 hold must be there:" $packages >&2
elif [ -n "$missing" ]; then
    if [ "$(id -u)" -ne 0 ]; then
        echo "bootstrap.sh: packages are missing; as root run:" >&2
        echo "    apt-get update && apt-get install -y --no-install-recommends$missing" >&2
        exit 1
    fi
    echo "installing:$missing"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    # shellcheck disable=SC2086
    apt-get install -y -qq --no-install-recommends $missing >/dev/null
fi

if [ "$cuda" = yes ] && [ ! -d .cuda ]; then
    echo "fetching NVIDIA's libraries into .cuda (about 1 GB)"
    compiler=
    [ -x /usr/local/cuda/bin/nvcc ] || compiler="nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88
        nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85"
    rm -rf .cuda.part   # what an interrupted fetch has left
    mkdir -p .cuda.part/wheels
    # shellcheck disable=SC2086
    python3 -m pip download -q --no-deps -d .cuda.part/wheels nvidia-cublas==13.1.1.3 nvidia-nccl-cu13==2.28.9 \
        nvidia-cudnn-cu13==9.19.0.56 nvidia-cutlass==4.2.0.0 nvidia-cudnn-frontend==1.32.0 nvidia-cuda-nvrtc==13.0.88 $compiler
    for w in .cuda.part/wheels/*.whl; do python3 -m zipfile -e "$w" .cuda.part; done
    if [ -n "$compiler" ]; then chmod +x .cuda.part/nvidia/cu13/bin/* .cuda.part/nvidia/cu13/nvvm/bin/*; fi
    rm -rf .cuda.part/wheels
    mv .cuda.part .cuda
fi
if [ "$f90nml" = yes ] && [ ! -d build/f90nml ]; then
    regression/oracle/deck_readers.py --install ||
        echo "bootstrap.sh: no f90nml from the Python index: the test that compares with it will be skipped" >&2
fi
# Made whole or not at all; made again when the list of packages has changed.
if [ "$oracle" = yes ] && ! cmp -s regression/oracle/requirements.txt .oracle/requirements.txt; then
    echo "fetching transformers and torch into .oracle (about 1 GB)"
    rm -rf .oracle
    python3 -m venv .oracle
    .oracle/bin/pip install -q -r regression/oracle/requirements.txt
    cp regression/oracle/requirements.txt .oracle/requirements.txt
fi
echo "bootstrap: everything is installed"
