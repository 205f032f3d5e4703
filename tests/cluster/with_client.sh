#!/usr/bin/env bash
# Runs a Python test with the official `openai` client, from a virtual environment beside the build (made once).
#   tests/cluster/with_client.sh SCRIPT [arguments]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=${CINNABAR_VENV:-$here/../../build/venv}
if ! "$venv/bin/python" -c 'import openai, grpc' 2>/dev/null; then
  python3 -m venv "$venv"
  "$venv/bin/pip" install --quiet --disable-pip-version-check -r "$here/requirements.txt"
fi
exec env PYTHONPATH="$here" "$venv/bin/python" "$@"
