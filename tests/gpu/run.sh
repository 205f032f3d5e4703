#!/usr/bin/env bash
# Everything that needs the device, in one command of less than nine minutes: from an unpacked bundle (deploy/bundle.sh
# --with-tests) or from the source folder with a build tree. Writes report.json and report.txt.
#   tests/gpu/run.sh [--device cuda:0] [--out DIR] [--build DIR] [--only PART,PART] [--python PYTHON]
#   tests/gpu/run.sh --dry-run           every part on the CPU with tiny shapes: tests this script, measures nothing
#   tests/gpu/run.sh --list              the parts and their seconds
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
for python in "${CINNABAR_PYTHON:-}" python3 /usr/bin/python3 /opt/conda/bin/python3; do
  if [ -n "$python" ] && command -v "$python" >/dev/null; then exec "$python" -B "$here/run.py" "$@"; fi
done
echo "tests/gpu/run.sh: no python3 here" >&2
exit 1
