#!/usr/bin/env bash
# Do ops.cpp and encode.cpp compile, without a warning, where they are not run: for an arm64 Mac (and link there),
# and with the compilers of this machine, against the headers of the oldest torch that pyproject.toml promises?
# Usage: bash csrc/check_builds.sh [TORCH ...], with pybind11 in the active python; 2.10.0 2.11.0 ... for a table.
# Clang with libc++ for a Mac is zig's. Headers and libraries are those of torch's wheel for a Mac, which is the
# smallest; the headers of another platform differ in generated ones only. Both are downloaded once and kept.
set -euo pipefail
cd "$(dirname "$0")"
kept="${XDG_CACHE_HOME:-$HOME/.cache}/transport-geometry-builds"
zig=0.17.1
[ $# -gt 0 ] || set -- "$(grep -o 'torch>=[0-9.]*' ../pyproject.toml | cut -d= -f2).0"
mkdir -p "$kept"
scratch=$(mktemp -d -p "$kept")
trap 'rm -rf "$scratch"' EXIT

fetch() {  # NAME COMMAND...: keeps the folder that the command fills, given as its last argument
  [ -d "$kept/$1" ] && return
  "${@:2}" "$scratch/$1" >"$scratch/log" 2>&1 || { cat "$scratch/log"; echo "check_builds: no $1, see above" >&2; exit 1; }
  mv "$scratch/$1" "$kept/$1"
}
headers() {  # TORCH FOLDER
  python -m pip download -q --no-deps --only-binary=:all: --python-version 3.11 --implementation cp \
    --platform macosx_14_0_arm64 --platform macosx_11_0_arm64 "torch==$1" -d "$scratch/wheel" &&
    unzip -q "$scratch"/wheel/*.whl 'torch/include/*' 'torch/lib/*.dylib' torch/utils/cpp_extension.py -d "$2" &&
    rm -r "$scratch/wheel"
}
fetch "zig-$zig" python -m pip install -q --no-deps "ziglang==$zig" --target
python=$(python -c 'import sysconfig; print(sysconfig.get_path("include"))')
pybind11=$(python -c 'import pybind11; print(pybind11.get_include())')
declare -A compiler=([mac]="$kept/zig-$zig/ziglang/zig c++ -target aarch64-macos" [gcc]=g++ [clang]=clang++
  [libc++]="clang++ -stdlib=libc++" [gcc-arm64]=aarch64-linux-gnu-g++)

failed=0
for version; do
  fetch "torch-$version" headers "$version"
  torch="$kept/torch-$version/torch"
  # as torch's own build has it: most of what cpp_extension.py says
  std=$(grep -o 'std=c++[0-9]*' "$torch/utils/cpp_extension.py" | sort | uniq -c | sort -n | tail -1 | grep -o 'std=.*')
  for name in mac gcc clang libc++ gcc-arm64; do
    read -ra cxx <<<"${compiler[$name]}"
    [ $name = mac ] || echo '#include <vector>' | "${cxx[@]}" -x c++ -fsyntax-only - 2>"$scratch/log" || {
      echo "torch $version, $name: skipped, not here"
      continue
    }
    outcome=ok
    for source in ops encode; do
      "${cxx[@]}" -$std -O1 -fPIC -ffp-contract=off -fno-math-errno -Wall -Wextra -Werror \
        -DTORCH_TARGET_VERSION=0x020A000000000000 -DBUILD_DEVICES='""' -DBUILD_SOURCE='""' -isystem "$pybind11" \
        -isystem "$torch/include" -isystem "$python" -c $source.cpp -o "$scratch/$source.o" || outcome=FAILED
    done
    if [ $name$outcome = macok ]; then
      # without libc++, which zig would compile first, for minutes
      "${cxx[@]}" -shared -nostdlib++ -undefined dynamic_lookup "$scratch"/{ops,encode}.o -o "$scratch/kernels.so" \
        "-L$torch/lib" -lc10 -ltorch -ltorch_cpu -ltorch_python || outcome=FAILED
    fi
    echo "torch $version, $name, $std: $outcome"
    [ $outcome = ok ] || failed=1
  done
done
exit $failed
