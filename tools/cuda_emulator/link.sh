#!/usr/bin/env bash
# A linker for cargo that looks into the emulator's folder first: cudarc names the
# toolkit's own folders to the linker, and those come before LIBRARY_PATH.
#
#   DS_EMULATOR_LIBRARIES=OUT_DIR \
#     CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_LINKER=tools/cuda_emulator/link.sh cargo ...
set -euo pipefail
exec "${CC:-cc}" -L "${DS_EMULATOR_LIBRARIES:?"set it to the folder that build.sh wrote"}" "$@"
