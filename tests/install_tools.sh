#!/usr/bin/env bash
# What only tests use. Safe to run twice.
#   promtool  unpacked from Debian's package beside the build: installed, it would start a service
#   PyTorch   Debian's, for the training tests; where it cannot be had they skip by name
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
as_root=()
if [ "$(id -u)" -ne 0 ]; then as_root=(sudo); fi

if ! /usr/bin/python3 -c 'import torch, numpy' 2>/dev/null; then
  DEBIAN_FRONTEND=noninteractive "${as_root[@]}" apt-get install -y -q --no-install-recommends \
    python3-torch python3-numpy libopenblas0-openmp || echo "python3-torch: not installed; the training tests will skip" >&2
fi

tools=build/tools
[ -x "$tools/promtool" ] && exit 0
mkdir -p "$tools"
work=$(mktemp -d "$tools/unpack.XXXXXX")
trap 'rm -rf "$work"' EXIT
# apt fetches as a user of its own, who may not write here.
chmod 755 "$work"
download() { (cd "$work" && apt-get -q -o APT::Sandbox::User=root download prometheus); }
if ! download; then  # apt's lists are old, or not there
  "${as_root[@]}" apt-get update -q
  download
fi
dpkg-deb -x "$work"/*.deb "$work/unpacked"
mv "$work/unpacked/usr/bin/promtool" "$tools/promtool"
