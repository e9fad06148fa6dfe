#!/usr/bin/env bash
# Runs the CUDA kernels of src/nn/cuda/kernels on the CPU, under tools/cuda_emulator, against
# references in double precision, and compiles them for every supported GPU.
#
# usage: tools/kernel_check.sh [TEST...]
#   TEST   names of tools/cuda_emulator/test_TEST.cpp, all of them if none is given
#
# Environment: CUDA_HOME, the toolkit (its headers are needed; without its nvcc nothing is compiled
# for GPUs), CXX and BUILD_DIR. Prints "N passed, M failed" and exits non-zero on any failure.
set -euo pipefail
cd "$(dirname "$0")/.."

: "${CUDA_HOME:=/usr/local/cuda}"
: "${CXX:=g++}"
: "${BUILD_DIR:=target/kernel_check}"
include="$CUDA_HOME/include"
if [ ! -f "$include/cuda_fp16.h" ]; then
    echo "no CUDA headers in $include: set CUDA_HOME" >&2
    exit 2
fi
mkdir -p "$BUILD_DIR"

flags=(-std=c++17 -O2 -Wall -Wextra -Wno-unknown-pragmas -march=native -ffp-contract=off
    -DDS_EMULATED -Itools/cuda_emulator -isystem "$include")

passed=0
failed=0
note() {
    if [ "$1" = 0 ]; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "FAILED $2"
    fi
}

if [ $# -gt 0 ]; then
    tests=("$@")
else
    tests=()
    for source in tools/cuda_emulator/test_*.cpp; do
        name=${source##*/test_}
        tests+=("${name%.cpp}")
    done
fi

for part in emulator warp; do
    "$CXX" "${flags[@]}" -c "tools/cuda_emulator/$part.cpp" -o "$BUILD_DIR/$part.o"
done

# run NAME INPUT...: the test NAME, from its source and INPUT
run() {
    local name=$1 program="$BUILD_DIR/test_$1" status=0 output
    shift
    echo "== $name"
    if ! "$CXX" "${flags[@]}" "tools/cuda_emulator/test_$name.cpp" "$@" -o "$program"; then
        note 1 "test_$name does not compile"
        return
    fi
    output=$("$program") || status=$?
    echo "$output"
    if [[ ${output##*$'\n'} =~ ^([0-9]+)\ passed,\ ([0-9]+)\ failed$ ]]; then
        passed=$((passed + BASH_REMATCH[1]))
        failed=$((failed + BASH_REMATCH[2]))
        [ "$status" = 0 ] || [ "${BASH_REMATCH[2]}" != 0 ] || note 1 "test_$name exits with $status"
    else
        note 1 "test_$name ended early, with $status"
    fi
}

for name in "${tests[@]}"; do
    run "$name" "$BUILD_DIR/emulator.o" "$BUILD_DIR/warp.o"
done
# As on processors other than x86-64.
run emulator -DDS_EMULATOR_UCONTEXT tools/cuda_emulator/{emulator,warp}.cpp

nvcc="$CUDA_HOME/bin/nvcc"
if [ -x "$nvcc" ]; then
    for source in src/nn/cuda/kernels/*.cu; do
        name=$(basename "$source" .cu)
        for arch in 80 86 89 90; do
            log="$BUILD_DIR/$name.sm_$arch.log"
            status=0
            "$nvcc" -std=c++17 -O3 -gencode "arch=compute_$arch,code=sm_$arch" -cubin \
                -o "$BUILD_DIR/$name.sm_$arch.cubin" -Xptxas -v "$source" >"$log" 2>&1 || status=$?
            note "$status" "$name does not compile for sm_$arch, see $log"
            # What ptxas says of a function: its name, and what it spills.
            spilling=$(awk '/Function properties for/ { name = $NF }
                /spill stores/ && !/ 0 bytes spill stores, 0 bytes spill loads/ { print "  " name ":" $0 }' "$log")
            if [ -n "$spilling" ]; then
                note 1 "$name spills registers on sm_$arch:"
                echo "$spilling"
            fi
            if grep -qi "warning" "$log"; then
                note 1 "nvcc warns of $name on sm_$arch, see $log"
            fi
        done
        echo "== $name: $(grep -c 'Compiling entry function' "$log") kernels, at most" \
            "$(grep -o 'Used [0-9]* registers' "$log" | sort -t' ' -k2 -n | tail -1 | cut -d' ' -f2)" \
            "registers"
    done
else
    echo "!! SKIPPED: no nvcc in $CUDA_HOME/bin, so no kernel was compiled for a GPU" >&2
fi

echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
