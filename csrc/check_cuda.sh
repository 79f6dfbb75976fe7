#!/usr/bin/env bash
# Does ops_cuda.cu compile? To an object file only, so no GPU and no CUDA build of torch is needed: the
# stable-ABI headers in the CPU wheel suffice.
# Usage: bash csrc/check_cuda.sh, with torch in the active python and nvcc under CUDA_HOME, /usr/local/cuda
# or PATH.
set -euo pipefail
cd "$(dirname "$0")"
nvcc="${CUDA_HOME:-/usr/local/cuda}/bin/nvcc"
[ -x "$nvcc" ] || nvcc=$(command -v nvcc) || { echo "check_cuda: skipped, no nvcc here"; exit 0; }
include=$(python -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parent / "include")')
object=$(mktemp --suffix=.o)
trap 'rm -f "$object"' EXIT
for arch in ${CUDA_ARCHS:-80 90}; do codes="${codes:-} -gencode arch=compute_$arch,code=sm_$arch"; done
"$nvcc" -c ops_cuda.cu -o "$object" -std=c++17 -O3 --fmad=false --Werror all-warnings $codes \
  -isystem "$include" -DUSE_CUDA -DTORCH_TARGET_VERSION=0x020A000000000000 --compiler-options -fPIC
release=$("$nvcc" --version | grep -o 'release [0-9.]*')
echo "check_cuda: ops_cuda.cu compiles for sm ${CUDA_ARCHS:-80 90} with $release"
