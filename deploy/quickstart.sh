#!/usr/bin/env bash
# From a fresh Debian 12 to a cluster that fills in code: installs packages, builds, starts Redis, scheduler, worker and
# gateway, and sends a request through all of them. Safe to run twice.
#   deploy/quickstart.sh           leaves the cluster in the foreground until Ctrl-C
#   deploy/quickstart.sh --once    stops it after the first request
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
once=
case "${1:-}" in
  '') ;;
  --once) once=1 ;;
  *) echo "usage: deploy/quickstart.sh [--once]" >&2; exit 2 ;;
esac
./deploy/install_packages.sh
echo "building (a few minutes the first time)"
cmake --preset release >/dev/null
cmake --build --preset release --target cinnabar cinnabar-gateway cinnabar-scheduler cinnabar-worker

cinnabar=build/release/bin/cinnabar
model=models/cinnabar-py-4m
listen=${CINNABAR_LISTEN:-127.0.0.1:8080}
grpc=${CINNABAR_GRPC_LISTEN:-127.0.0.1:8081}
metrics=${CINNABAR_METRICS_PORT:-9460}
data=${CINNABAR_DATA:-$HOME/.local/state/cinnabar}
prompt='def total_price(orders):
    """Return the sum of price over all orders."""
    return '
suffix='
'
echo
"$cinnabar" model inspect "$model"
echo
echo "starting the cluster (its log: $data/up.log)"
mkdir -p "$data"
"$cinnabar" up --model "$model" --listen "$listen" --grpc-listen "$grpc" --metrics-port "$metrics" --data "$data" >"$data/up.log" 2>&1 &
up=$!
stop() {
  kill -TERM "$up" 2>/dev/null || true
  wait "$up" 2>/dev/null || true
}
trap stop EXIT
trap 'exit 130' INT TERM
for _ in $(seq 600); do
  grep -q '^Cinnabar is up' "$data/up.log" && break
  if ! kill -0 "$up" 2>/dev/null; then
    cat "$data/up.log" >&2
    echo "the cluster did not start; is something else on $listen? Set CINNABAR_LISTEN=127.0.0.1:9080 and try again" >&2
    exit 1
  fi
  sleep 0.1
done
echo
echo "A fill-in by $model, a model of 4.3 M parameters for short Python functions, over HTTP through gateway, Redis, scheduler and worker:"
echo
if [ -t 2 ]; then
  "$cinnabar" generate --url "http://$listen" --prompt "$prompt" --suffix "$suffix" --gen-length 16 --watch
else
  middle=$("$cinnabar" generate --url "http://$listen" --prompt "$prompt" --suffix "$suffix" --gen-length 16)
  printf '%s⟦%s⟧%s\n' "$prompt" "$middle" "$suffix"
fi
cat <<TXT

What to try next, in another terminal:
  curl -s http://$listen/v1/completions -d '{"model": "cinnabar-py-4m", "prompt": "def add(a, b):\n    return ", "suffix": "\n", "max_tokens": 8}'
  OPENAI_BASE_URL=http://$listen/v1 OPENAI_API_KEY=none python3 -c 'import openai; print(openai.OpenAI().completions.create(model="cinnabar-py-4m", prompt="def is_even(number):", max_tokens=24).choices[0].text)'
  curl -s http://$listen/metrics                  throughput, latency, cost; workers at port $((metrics + 1))
  $cinnabar generate --url http://$listen --prompt 'def ' --gen-length 40 --temperature 0.7 --watch
  $cinnabar bench load --url http://$listen --concurrency 4 --prompt-tokens 32 --canvas-tokens 32
  $cinnabar up --model DIR --devices 0,1          your own model on NVIDIA GPUs, a worker each (built where nvcc is)
  $cinnabar up --help                             your own model, more workers, other ports
  ./tests/run.sh                                   all tests
TXT
if [ -z "$once" ]; then
  echo
  echo "The cluster runs until Ctrl-C."
  wait "$up"
fi
