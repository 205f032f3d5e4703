#!/usr/bin/env python3
"""Benchmarks of the cluster around the denoiser: real programs, a real Redis, the null device (it sleeps and makes tokens up).

  tests/bench/cluster_bench.py                 life-cycles, latency and streams: about two minutes
  tests/bench/cluster_bench.py --only cycles --rounds 5
  tests/bench/cluster_bench.py --only soak --minutes 30

Everything shares this machine's cores, the client included. Medians over the rounds, with the lowest and the highest.
"""
import argparse
import json
import os
import subprocess
import sys
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "../cluster"))
from cluster import BIN, Cluster, get, post, redis_command  # noqa: E402

STEPS = 32


def spread(values, digits=0):
    ordered = sorted(values)
    return f"{ordered[len(ordered) // 2]:,.{digits}f} ({ordered[0]:,.{digits}f} .. {ordered[-1]:,.{digits}f})"


def load(cluster, *flags):
    """`cinnabar bench load` on the cluster; its JSON."""
    run = subprocess.run([os.path.join(BIN, "cinnabar"), "bench", "load", "--url", cluster.url, "--json", "--prompt-tokens", "16",
                          *map(str, flags)], capture_output=True, text=True)
    if not run.stdout.startswith("{"):
        raise RuntimeError(f"bench load: {run.stderr[-500:]}")
    return json.loads(run.stdout)


def memory_mib(process, field="VmRSS"):
    with open(f"/proc/{process.pid}/status", encoding="utf-8") as status:
        for line in status:
            if line.startswith(field + ":"):
                return int(line.split()[1]) / 1024
    raise RuntimeError("no " + field)


def descriptors(process):
    return len(os.listdir(f"/proc/{process.pid}/fd"))


def cycles(options):
    print(f"life-cycles a second: accepted, queued, packed, {STEPS} steps of one token each published and relayed, answered")
    for fsync in ("everysec", "always"):
        done = []
        for _ in range(options.rounds):
            with Cluster(workers=2, device="null", null_step_us=options.step_us, appendfsync=fsync,
                         worker_args=["--rows-max", "64", "--log-level", "warn"]) as cluster:
                cluster.wait_ready()
                result = load(cluster, "--concurrency", options.concurrency, "--seconds", options.seconds, "--warmup", 2,
                              "--canvas-tokens", STEPS, "--steps", STEPS)
                if result["failed"]:
                    raise RuntimeError(f"failures: {result}")
                done.append(result["requests_per_second"])
        print(f"  appendfsync {fsync:9} {spread(done)} life-cycles/s, {spread([STEPS * rate for rate in done])} steps/s")


def latency(options):
    print("added latency: from the client's request to the whole answer, less the device's own time, one request at a time")
    for fsync in ("everysec", "always"):
        medians, tails = [], []
        for _ in range(options.rounds):
            with Cluster(workers=1, device="null", null_step_us=1000, appendfsync=fsync) as cluster:
                cluster.wait_ready()
                added = []
                for i in range(300):
                    begin = time.monotonic()
                    status, reply, _ = post(cluster.gateway_ports[0], "/v1/completions", {
                        "model": "cinnabar-tiny", "prompt": [5, 6, 7], "max_tokens": 8, "diffusion": {"steps": 8}})
                    took = time.monotonic() - begin
                    if status != 200:
                        raise RuntimeError(reply)
                    if i >= 50:
                        added.append((took - reply["usage"]["diffusion"]["device_seconds"]) * 1e3)
                added.sort()
                medians.append(added[len(added) // 2])
                tails.append(added[int(len(added) * 0.99)])
        print(f"  appendfsync {fsync:9} p50 {spread(medians, 2)} ms, p99 {spread(tails, 2)} ms")


def streams(options):
    count = options.streams
    print(f"{count:,} streams at once, each denoised step by step")
    with Cluster(workers=2, device="null", null_step_us=200000,
                 gateway_args=["--connections-max", str(2 * count), "--connections-per-address-max", str(2 * count),
                               "--queue-requests-max", str(2 * count), "--log-level", "warn"],
                 worker_args=["--rows-max", "1024", "--tokens-max", "65536", "--log-level", "warn"]) as cluster:
        cluster.wait_ready()
        idle = memory_mib(cluster.gateways[0])
        open_most, over = [0], threading.Event()

        def watch():
            while not over.wait(0.2):
                for line in get(cluster.gateway_ports[0], "/metrics", timeout=30)[1].decode().splitlines():
                    if line.startswith("cinnabar_gateway_open_streams{"):
                        open_most[0] = max(open_most[0], int(float(line.rsplit(" ", 1)[1])))

        watcher = threading.Thread(target=watch)
        watcher.start()
        result = load(cluster, "--concurrency", count, "--seconds", 20, "--canvas-tokens", 64, "--steps", 64, "--stream",
                      "--drain", 120)
        over.set()
        watcher.join()
        print(f"  {open_most[0]:,} open at once, {result['ok']:,} answered, {result['failed']} failed; gateway "
              f"{idle:.0f} MiB idle, {memory_mib(cluster.gateways[0], 'VmHWM'):.0f} MiB at most")


def soak(options):
    print(f"soak: {options.rate} requests/s for {options.minutes} minutes, sampled each minute")
    with Cluster(workers=2, schedulers=2, gateways=2, device="null", null_step_us=1000,
                 worker_args=["--log-level", "warn"], gateway_args=["--log-level", "warn"]) as cluster:
        cluster.wait_ready()
        results = []
        loader = threading.Thread(target=lambda: results.append(load(
            cluster, "--rate", options.rate, "--seconds", options.minutes * 60, "--canvas-tokens", STEPS, "--steps", STEPS, "--stream")))
        loader.start()
        begin = time.monotonic()
        while loader.is_alive():
            loader.join(60)
            columns = [f"{process.name} {memory_mib(process):.1f} MiB {descriptors(process)} fd"
                       for process in (*cluster.gateways, *cluster.schedulers, *cluster.workers)]
            print(f"  {(time.monotonic() - begin) / 60:5.1f} min  keys {redis_command(cluster.redis_port, 'DBSIZE')}  " + "  ".join(columns),
                  flush=True)
        print(f"  {results[0]['ok']:,} answered, {results[0]['failed']} failed, p99 {results[0]['latency_seconds']['p99'] * 1e3:.0f} ms")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["cycles", "latency", "streams", "soak"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--concurrency", type=int, default=128)
    parser.add_argument("--step-us", type=int, default=500)
    parser.add_argument("--streams", type=int, default=2000)
    parser.add_argument("--rate", type=float, default=100)
    parser.add_argument("--minutes", type=float, default=30)
    options = parser.parse_args()
    for benchmark in (cycles, latency, streams):
        if options.only in (None, benchmark.__name__):
            benchmark(options)
    if options.only == "soak":
        soak(options)


if __name__ == "__main__":
    main()
