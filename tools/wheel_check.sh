#!/usr/bin/env bash
# One wheel, several torches: installs it beside each into a fresh environment (5 GB, removed
# afterwards) and runs tools/wheel_smoke.py there.
#
#   tools/wheel_check.sh dist/dijiang-*.whl 2.10.0 2.15.0     PYTHON=python3.12 TMPDIR=/big/disk
set -euo pipefail
[ $# -ge 2 ] || { echo "usage: tools/wheel_check.sh WHEEL TORCH_VERSION..." >&2; exit 2; }
wheel=$(realpath "$1")
smoke=$(realpath "$(dirname "$0")/wheel_smoke.py")
shift
for version in "$@"; do
  venv=$(mktemp -d)
  trap 'rm -rf "$venv"' EXIT
  "${PYTHON:-python3}" -m venv "$venv"
  "$venv/bin/pip" install --quiet "torch==$version" "dijiang[hf] @ file://$wheel"
  (cd "$venv" && bin/python -I "$smoke")
  rm -rf "$venv"
done
