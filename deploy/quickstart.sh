#!/usr/bin/env bash
# From a fresh Debian 12 to a model that fills in code: installs packages, builds, runs. Safe to run twice.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
./deploy/install_packages.sh
echo "building (a few minutes the first time)"
cmake --preset release >/dev/null
cmake --build --preset release --target cinnabar

cinnabar=build/release/bin/cinnabar
model=models/cinnabar-tiny
prompt='def total_price(orders):
    """Return the sum of price over all orders."""
    return sum(order'
suffix=' for order in orders)
'
echo
"$cinnabar" model inspect "$model"
echo
echo "A fill-in by $model, a demonstration model of 1.3 M parameters:"
echo
if [ -t 2 ]; then
  "$cinnabar" generate --model "$model" --prompt "$prompt" --suffix "$suffix" --gen-length 3 --watch
else
  middle=$("$cinnabar" generate --model "$model" --prompt "$prompt" --suffix "$suffix" --gen-length 3)
  printf '%s[%s]%s\n' "$prompt" "$middle" "$suffix"
fi
cat <<TXT

What to try next:
  $cinnabar generate --help                       every knob, with examples
  $cinnabar samplers                              the samplers and what each reads
  $cinnabar generate --model $model --prompt 'def ' --gen-length 40 --temperature 0.7 --watch
  $cinnabar model inspect DIR                     your own checkpoint: a Hugging Face folder
  ./tests/run.sh                                   all tests
The gateway, the scheduler and the worker are being built; see README.md.
TXT
