#!/usr/bin/env bash
# Builds libraries that stand in for NVIDIA's (libcuda, libcublas, libcublasLt,
# libcurand, libcudart, libcudnn, libnvrtc) and execute on the CPU, so that
# programs with the feature cuda link and run on a machine without a GPU.
#
# usage: tools/cuda_emulator/build.sh OUT_DIR [--test]
#
# --test runs the tests of the libraries afterwards.
#
# Needs g++ 12 or later, python3, the toolkit's headers in $CUDA_HOME/include,
# and candle-kernels' sources in cargo's registry (`cargo fetch`). OUT_DIR is
# the folder to link and run with. Objects are kept in OUT_DIR/objects and
# rebuilt when something they include has changed.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
out=${1:?"usage: $0 OUT_DIR [--test]"}
headers=${CUDA_HOME:?"set CUDA_HOME: the toolkit's headers are needed"}/include
[[ -f $headers/cuda.h ]] || {
  echo "no cuda.h in $headers" >&2
  exit 1
}
candle=$(cargo metadata --format-version 1 --features cuda --manifest-path "$here/../../Cargo.toml" |
  python3 -c 'import json, os, sys
print(*(os.path.dirname(p["manifest_path"]) for p in json.load(sys.stdin)["packages"] if p["name"] == "candle-kernels"))')
[[ -d $candle ]] || {
  echo "candle-kernels is not in cargo's registry: run cargo fetch" >&2
  exit 1
}

mkdir -p "$out/objects"
out=$(cd "$out" && pwd)
objects=$out/objects
compiler=${CXX:-g++}
base=(-std=c++17 -fPIC -fvisibility=hidden -pthread -I "$here" -I "$headers" -I "$headers/cccl")
device=("${base[@]}" -O2 -ffp-contract=off -fno-strict-aliasing -w -DDS_EMULATED)
host=("${base[@]}" -O3 -march=native -Wall -Wextra)

# compile OBJECT SOURCE OPTIONS...: unless the object is newer than all it is made of,
# and was made in this way.
compile() {
  local object=$objects/$1.o source=$2
  shift 2
  if [[ -f $object && -f $object.d && $(cat "$object.made" 2>/dev/null) == "$compiler $*" ]]; then
    local made_of
    made_of=$(sed -e 's/^[^:]*://' -e 's/\\$//' "$object.d")
    # shellcheck disable=SC2086 # a list of paths without blanks
    [[ -n $(find $made_of -newer "$object" 2>&1) ]] || return 0
  fi
  echo "compiling $source"
  "$compiler" "$@" -MMD -MF "$object.d" -c "$source" -o "$object.new"
  mv "$object.new" "$object"
  echo "$compiler $*" >"$object.made"
}

# kernels ours|foreign SOURCE: the source with a table of its kernels.
kernels() {
  local name
  name=$1_$(basename "$2" .cu)
  local table=$objects/$name.cpp fresh=$objects/fresh_$name.cpp
  python3 "$here/driver/generate.py" "$1" "$2" "$fresh" -- "$compiler" "${device[@]}"
  cmp -s "$fresh" "$table" || mv "$fresh" "$table"
  rm -f "$fresh"
  compile "$name" "$table" "${device[@]}"
  linked+=("$objects/$name.o")
}

# library NAME VERSION LINKED...
library() {
  local name=$1 version=$2
  shift 2
  "$compiler" -shared -pthread -o "$out/lib$name.so.$version" -Wl,-soname,"lib$name.so.$version" \
    -Wl,-z,defs "$@"
  ln -sf "lib$name.so.$version" "$out/lib$name.so"
}

linked=()
for source in "$here"/../../src/nn/cuda/kernels/*.cu; do
  [[ -f $source ]] && kernels ours "$source"
done
for name in affine binary cast conv fill indexing reduce sort ternary unary; do
  kernels foreign "$candle/src/$name.cu"
done
for name in emulator warp; do
  compile "$name" "$here/$name.cpp" "${device[@]}"
  linked+=("$objects/$name.o")
done
for name in context copies cubin image memory modules report; do
  compile "$name" "$here/driver/$name.cpp" "${host[@]}"
  linked+=("$objects/$name.o")
done
for name in products convolutions cublas cublaslt cudnn curand cudart nvrtc; do
  compile "$name" "$here/driver/$name.cpp" "${host[@]}"
done

library cuda 1 "${linked[@]}"
library cublas 13 "$objects/cublas.o" "$objects/products.o" "$out/libcuda.so.1"
library cublasLt 13 "$objects/cublaslt.o"
library cudnn 9 "$objects/cudnn.o" "$objects/convolutions.o" "$objects/products.o" "$out/libcuda.so.1"
library curand 10 "$objects/curand.o" "$out/libcuda.so.1"
library cudart 13 "$objects/cudart.o" "$out/libcuda.so.1"
library nvrtc 13 "$objects/nvrtc.o"

if [[ ${2:-} == --test ]]; then
  for name in test_driver test_libraries; do
    compile "$name" "$here/driver/$name.cpp" "${base[@]}" -O1 -Wall -Wextra
    "$compiler" -o "$out/$name" "$objects/$name.o" -L "$out" -lcuda -lcublas -lcudnn -lcurand
    LD_LIBRARY_PATH=$out "$out/$name"
  done
fi

cat <<END
built in $out
  link: DS_EMULATOR_LIBRARIES=$out and tools/cuda_emulator/emulator-gcc as cargo's linker
  run:  LD_LIBRARY_PATH=$out BINARY
  DS_EMULATOR_REPORT=FILE       counts of launches, copies, products and bytes, written at exit (JSON)
  DS_EMULATOR_MEMORY_MIB=N      the device's memory (8192); more is out of memory
  DS_EMULATOR_ORDER=shuffled    threads run in another order (forward, backward, shuffled)
END
