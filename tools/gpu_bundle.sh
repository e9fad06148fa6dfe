#!/usr/bin/env bash
# Makes the bundle that tools/gpu_check.sh runs from: programs and tests for NVIDIA GPUs, and
# the Python packages that a machine with PyTorch does not have.
#
#   tools/gpu_bundle.sh [--rehearse] [OUT]
#
# --rehearse  with programs for the CPU, for gpu_check.sh --rehearse
# OUT         default: gpu-bundle in the folder of builds (target)
#
# Needs what tools/cuda_build.sh needs, and xz. Fails above 60 MiB.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
readonly wheels=(diffusers==0.42.1 importlib_metadata==10.2.0)
readonly most=$((60 << 20))

rehearse=""
out=""
while [[ $# != 0 ]]; do
  case $1 in
    --rehearse) rehearse=1 ;;
    -h | --help)
      sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
      exit
      ;;
    -*)
      echo "gpu_bundle: unknown option $1" >&2
      exit 1
      ;;
    *) out=$1 ;;
  esac
  shift
done
target=${CARGO_TARGET_DIR:-$here/target}
[[ $target == /* ]] || target=$PWD/$target
export CARGO_TARGET_DIR=$target
out=${out:-$target/gpu-bundle}
[[ $out == /* ]] || out=$PWD/$out

# executable NAME: the file that cargo's messages say this target became.
executable() {
  python3 -c '
import json, sys
built = [json.loads(line) for line in sys.stdin if line.startswith("{")]
found = [m["executable"] for m in built if m.get("executable") and m["target"]["name"] == sys.argv[1]]
print(found[-1]) if found else sys.exit(f"cargo built no {sys.argv[1]}")' "$1"
}

# pack NAME FILE: stripped and compressed.
pack() {
  strip -o "$new/$1" "$2"
  xz -9 -c "$new/$1" >"$new/bin/$1.xz"
  rm "$new/$1"
}

cd "$here"
commit=$(git rev-parse HEAD 2>/dev/null || echo unknown)
[[ -z $(git status --porcelain 2>/dev/null) ]] || commit+=", changed"
programs=(tools/cuda_build.sh --cudnn --bins)
tests=(tools/cuda_build.sh --cudnn --tests)
if [[ -n $rehearse ]]; then
  programs=(cargo build --release --bins)
  tests=(cargo test --no-run --release)
fi
readonly json=--message-format=json-render-diagnostics
built=$(mktemp)
trap 'rm -f "$built"' EXIT
"${programs[@]}" $json >"$built"
bench=$(executable ds-bench <"$built")
train=$(executable ds-train <"$built")
gpu=$("${tests[@]}" --test gpu $json | executable gpu)

new=$out.new
rm -rf "$new"
mkdir -p "$new/bin" "$new/wheels"
pack ds-bench "$bench"
pack ds-train "$train"
pack gpu "$gpu"
python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
  --dest "$new/wheels" "${wheels[@]}"

python3 - "$new" "$commit" "$here" "$most" <<'END'
import json, sys
from pathlib import Path

folder, commit, root, most = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
sizes = {str(file.relative_to(folder)): file.stat().st_size for file in sorted(folder.rglob("*")) if file.is_file()}
total = sum(sizes.values())
# root: where the tests were built, and look for their fixtures.
manifest = {"commit": commit, "root": root, "bytes": total, "files": sizes}
(folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
for name, size in sizes.items():
    print(f"gpu_bundle: {size / 2**20:6.2f} MiB  {name}")
if total > most:
    sys.exit(f"gpu_bundle: {total / 2**20:.1f} MiB is more than {most >> 20}")
print(f"gpu_bundle: {total / 2**20:6.2f} MiB in all")
END
rm -rf "$out"
mv "$new" "$out"
echo "gpu_bundle: $out"
