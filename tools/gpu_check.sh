#!/usr/bin/env bash
# Checks and measures the crate on a machine with an NVIDIA GPU, without cargo and without a network.
#
#   tools/gpu_check.sh --bundle DIR --out DIR [--minutes 9] [--only 1,3]
#
# DIR is what tools/gpu_bundle.sh wrote. Needs Python 3.10 or later with PyTorch for CUDA 13.
# docs/gpu.md says what is measured; --help lists the options.
set -euo pipefail
python=${PYTHON:-python3}
command -v "$python" >/dev/null || {
  echo "gpu_check: no $python; PYTHON names another one" >&2
  exit 1
}
exec "$python" "$(dirname "${BASH_SOURCE[0]}")/gpu_check.py" "$@"
