#!/usr/bin/env bash
# The kernels' tests on arm64 Linux in emulation, where no such machine is at hand: with torch 2.10.0, the newest
# whose arm64 wheel is built for the CPU.
# Usage: bash bench/arm64.sh FOLDER [PYTHON ARGUMENTS]; without them the tests of the encoder and the kernels. Wants
# Debian 12, qemu-user-static, g++-aarch64-linux-gnu, and pybind11 in the active python 3.11. Python for arm64 comes
# from Debian and the rest as wheels from PyPI into FOLDER, 2 GB, once; nothing is installed on this machine.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p "$1"
folder=$(cd "$1" && pwd)
shift
python="$folder/root/usr/bin/python3"

if [ ! -e "$python" ]; then
  mkdir -p "$folder"/apt/{lists/partial,cache/archives/partial}
  : >"$folder/apt/status"  # of a system on which nothing is installed: everything that python needs is fetched
  apt=(apt-get -q -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o APT::Install-Recommends=false
    -o "Dir::State::lists=$folder/apt/lists" -o "Dir::State::status=$folder/apt/status" -o "Dir::Cache=$folder/apt/cache")
  "${apt[@]}" update
  "${apt[@]}" install -y --download-only python3.11 libstdc++6 libgomp1
  for deb in "$folder"/apt/cache/archives/*.deb; do dpkg -x "$deb" "$folder/root"; done
  wheels=(python -m pip install --no-deps --no-compile --only-binary=:all: --target "$folder/site" --python-version 3.11
    --implementation cp)
  for tag in 2_28 2_27 2_26 2_24 2_17; do wheels+=(--platform "manylinux_${tag}_aarch64"); done
  wheels+=(--platform manylinux2014_aarch64)
  grep -v '^torch==\|^#\|^ruff\|^mypy' constraints.txt >"$folder/requirements.txt"
  "${wheels[@]}" -r "$folder/requirements.txt"
  "${wheels[@]}" --upgrade torch==2.10.0
  # sys.executable, so that what the tests start is emulated, too
  printf '#!/bin/sh\nexec qemu-aarch64-static -cpu neoverse-n1 -L "%s" -0 "%s" "%s" "$@"\n' \
    "$folder/root" "$python" "$folder/root/usr/bin/python3.11" >"$python"
  chmod +x "$python"
fi

torch="$folder/site/torch"
source=$(python -c 'from transport_geometry import kernels; print(kernels._source_hash())')
for file in ops encode; do
  aarch64-linux-gnu-g++ -std=c++17 -O3 -ffp-contract=off -fno-math-errno -fPIC -fvisibility=hidden \
    -DTORCH_TARGET_VERSION=0x020A000000000000 -DBUILD_DEVICES='"cpu"' -DBUILD_SOURCE="\"$source\"" \
    -isystem "$(python -c 'import pybind11; print(pybind11.get_include())')" -isystem "$torch/include" \
    -isystem "$(python -c 'import sysconfig; print(sysconfig.get_path("include"))')" \
    -c csrc/$file.cpp -o "$folder/$file.o"
done
aarch64-linux-gnu-g++ -shared "$folder"/{ops,encode}.o -L"$torch/lib" -lc10 -ltorch -ltorch_cpu -ltorch_python \
  -Wl,--allow-shlib-undefined -o transport_geometry/_kernels.cpython-311-aarch64-linux-gnu.so
[ $# -gt 0 ] || set -- -m pytest -p no:cacheprovider tests/test_encode.py tests/test_kernels.py
OMP_NUM_THREADS=1 PYTHONPATH="$folder/site:$PWD" "$python" "$@"
