#!/usr/bin/env bash
# Runs a test with a Python that has torch and tokenizers: Debian's python3-torch, tokenizers and gguf in a venv of build/.
# Where one cannot be had the test runs all the same and skips by name.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=${CINNABAR_TRAINING_VENV:-$here/../../build/venv-training}
export OMP_NUM_THREADS=1
mkdir -p "$(dirname "$venv")"
exec 9>"$venv.lock"
flock 9  # tests run side by side, and each makes the venv where there is none
if ! "$venv/bin/python" -c 'import torch, tokenizers, gguf' 2>/dev/null; then
  if /usr/bin/python3 -c 'import torch, numpy' 2>/dev/null; then
    # Without pip's dependencies: they are for downloading models.
    /usr/bin/python3 -m venv --system-site-packages "$venv" &&
      "$venv/bin/pip" install --quiet --disable-pip-version-check --no-deps tokenizers==0.23.3 gguf==0.19.0 || true
  fi
fi
exec 9>&-
python=$venv/bin/python
[ -x "$python" ] || python=python3
exec "$python" -W ignore "$@"
