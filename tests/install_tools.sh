#!/usr/bin/env bash
# What only tests use and no service may come of: promtool, unpacked from Debian's package beside the build. Safe to run twice.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
tools=build/tools
[ -x "$tools/promtool" ] && exit 0
mkdir -p "$tools"
work=$(mktemp -d "$tools/unpack.XXXXXX")
trap 'rm -rf "$work"' EXIT
# apt fetches as a user of its own, who may not write here.
chmod 755 "$work"
download() { (cd "$work" && apt-get -q -o APT::Sandbox::User=root download prometheus); }
if ! download; then  # apt's lists are old, or not there
  as_root=()
  if [ "$(id -u)" -ne 0 ]; then as_root=(sudo); fi
  "${as_root[@]}" apt-get update -q
  download
fi
dpkg-deb -x "$work"/*.deb "$work/unpacked"
mv "$work/unpacked/usr/bin/promtool" "$tools/promtool"
