#!/usr/bin/env bash
# PyTorch for the training tests, from Debian. Failing is no error: they skip by name without it. Safe to run twice.
set -euo pipefail
/usr/bin/python3 -c 'import torch, numpy' 2>/dev/null && exit 0
as_root=()
[ "$(id -u)" -eq 0 ] || as_root=(sudo -n)
DEBIAN_FRONTEND=noninteractive "${as_root[@]}" apt-get install -y -q --no-install-recommends \
  python3-torch python3-numpy libopenblas0-openmp || echo "python3-torch: not installed; the training tests will skip" >&2
