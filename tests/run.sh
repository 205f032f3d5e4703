#!/usr/bin/env bash
# Installs what is missing, builds the release preset and runs every test. Safe to run twice.
#   tests/run.sh [ctest arguments]        for example: tests/run.sh -L unit
#   CINNABAR_SANITIZERS=1 tests/run.sh    builds and tests the asan preset as well
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
./deploy/install_packages.sh
./tests/install_tools.sh
run() {
  local preset=$1
  shift
  cmake --preset "$preset"
  cmake --build --preset "$preset"
  ctest --preset "$preset" --no-tests=error -j "$(nproc)" "$@"
}
run release "$@"
if [ -n "${CINNABAR_SANITIZERS:-}" ]; then run asan "$@"; fi
