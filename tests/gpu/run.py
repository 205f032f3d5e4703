"""The parts of tests/gpu/run.sh: op tests, parity, invariance, sanitizer, benchmarks, end to end. Standard library only.

Each part has a budget; what is not done by then is stopped and reported as such. A figure is in the report only if this run measured it.
"""
import argparse
import glob
import json
import os
import pathlib
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
TOTAL_SECONDS = 530
SHAPES = "llada-8b,dream-7b,llada2-mini"
CELLS = "block:1x32@512,block:64x32@1024,canvas:8x1024"


class Skip(Exception):
    """The part has nothing to run here; says why."""


class Failed(Exception):
    pass


class Run:
    """Where things are, and how commands are started."""

    def __init__(self, args):
        self.dry = args.dry_run
        self.device = "cpu" if self.dry else args.device
        self.out = pathlib.Path(args.out).resolve()
        self.out.mkdir(parents=True, exist_ok=True)
        self.bundle = (ROOT / "test-bin").is_dir()
        if self.bundle:
            self.bin, self.tests, self.benches = ROOT / "bin", ROOT / "test-bin", ROOT / "test-bin"
        else:
            tree = pathlib.Path(args.build).resolve() if args.build else self.find_tree()
            self.bin, self.tests = tree / "bin", tree / "tests"
            self.benches = self.bin
        self.tree = self.bin.parent
        self.python = args.python or self.find_torch()
        # A dry run is one test among many on a busy machine: its seconds say nothing.
        self.patience = 8 if self.dry else 1
        self.end = time.monotonic() + TOTAL_SECONDS * self.patience
        self.part_end = self.end
        self.environment = dict(os.environ, CINNABAR_SOURCE_DIR=str(ROOT), CINNABAR_BIN_DIR=str(self.bin))
        if not self.dry:
            self.environment["CINNABAR_REQUIRE_GPU"] = "1"  # a skipped test is a failure here
            # A bundle made without cuBLAS takes that of the machine, or of its PyTorch.
            folders = glob.glob("/usr/local/cuda*/lib64") + glob.glob(
                "/usr/**/nvidia/c*/lib", recursive=True) + glob.glob("/opt/**/nvidia/c*/lib", recursive=True)
            known = [self.environment.get("LD_LIBRARY_PATH", "")] + [f for f in folders if glob.glob(f + "/libcublasLt.so*")]
            self.environment["LD_LIBRARY_PATH"] = ":".join(filter(None, known))

    def find_tree(self):
        for preset in (["release", "cuda"] if self.dry else ["cuda", "release"]):
            if (ROOT / "build" / preset / "bin" / "cinnabar").exists():
                return ROOT / "build" / preset
        sys.exit("tests/gpu/run.sh: nothing is built; deploy/bundle.sh --with-tests, or name a build tree with --build")

    @staticmethod
    def find_torch():
        for python in (sys.executable, "python3", "/usr/bin/python3", "/opt/conda/bin/python3"):
            if shutil.which(python) and subprocess.run([python, "-c", "import torch"], stdout=subprocess.DEVNULL,
                                                       stderr=subprocess.DEVNULL, check=False).returncode == 0:
                return python
        return None

    def left(self):
        return max(self.part_end - time.monotonic(), 0)

    def call(self, *command, check=True, environment=None, log=None):
        """Runs a command within the part's time. Its output goes to a file of the report's folder too."""
        command = [str(word) for word in command]
        started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                                   env=dict(self.environment, **(environment or {})), start_new_session=True)
        try:
            output, _ = started.communicate(timeout=self.left())
        except subprocess.TimeoutExpired:
            os.killpg(started.pid, signal.SIGKILL)
            output, _ = started.communicate()
            if log:
                (self.out / log).write_text(output)
            raise Failed(f"cut off at the part's budget: {' '.join(command)[:200]}: {output[-600:]}") from None
        if log:
            (self.out / log).write_text(output)
        if check and started.returncode != 0:
            raise Failed(f"exit status {started.returncode}: {' '.join(command)[:200]}: {output[-1500:]}")
        return started.returncode, output

    def products(self):
        """What products can be made of here: wgmma as well on compute capability 9.0."""
        if self.dry or not shutil.which("nvidia-smi"):
            return ["auto"]
        index = self.device.partition(":")[2] or "0"
        _, text = self.call("nvidia-smi", "-i", index, "--query-gpu=compute_cap", "--format=csv,noheader", check=False)
        return ["mma", "wgmma"] if text.strip() == "9.0" else ["auto"]

    def op_tests(self):
        """Commands of the op tests: those that are labelled gpu and fit the device, or in a dry run a few of the CPU's."""
        hopper = "wgmma" in self.products()
        return [command for command in self.gpu_tests() if hopper or "--gtest_filter=Hopper*" not in command]

    def gpu_tests(self):
        if self.dry:
            return [[self.tests / name, "--gtest_filter=*Linear*:*Attend*:*Argmax*:*RmsNorm*-Emulated*:Cuda*"]
                    for name in ("backend_test", "vocabulary_test")]
        if self.bundle:
            lines = (self.tests / "op_tests.txt").read_text().splitlines()
            return [[self.tests / words[0], *words[1:]] for words in (line.split(" ") for line in lines)]
        listed = subprocess.run(["ctest", "--test-dir", str(self.tree), "-L", "gpu", "--show-only=json-v1"], capture_output=True,
                                text=True, check=False)
        commands = [test["command"] for test in json.loads(listed.stdout)["tests"]] if listed.returncode == 0 else []
        return [command for command in commands if "/tests/" in command[0]]


def facts(run):
    """What the machine is."""
    found = {"host": platform.node(), "system": platform.platform(), "cpus": os.cpu_count(), "python": sys.version.split()[0]}
    _, found["cinnabar"] = run.call(run.bin / "cinnabar-worker", "--version")
    found["cinnabar"] = found["cinnabar"].strip()
    if run.bundle:
        manifest = json.loads((ROOT / "manifest.json").read_text())
        found["bundle"] = {key: manifest[key] for key in ("name", "version", "glibc_min")}
    if shutil.which("nvidia-smi"):
        _, text = run.call("nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.memory,power.limit",
                           "--format=csv", check=False)
        found["nvidia_smi"] = text.strip()
    if run.python:
        _, text = run.call(run.python, "-c", "import torch; print(torch.__version__, torch.version.cuda)", check=False)
        found["torch"] = text.strip()
    return found


def ceilings(run):
    """What the device can do: bytes copied and read, matrix products."""
    run.call(run.benches / "device_ceilings", "--device", run.device, "--json", run.out / "ceilings.json", log="ceilings.log")
    return json.loads((run.out / "ceilings.json").read_text())


def op_tests(run):
    """The op tests on the device."""
    summary, failures = {}, []
    commands = run.op_tests()
    if not commands:
        raise Failed("no test is labelled gpu: this build has no CUDA backend")
    for number, command in enumerate(commands):
        program = pathlib.Path(command[0])
        if not program.exists():
            raise Failed(f"{program} is not built")
        status, output = run.call(*command, "--gtest_brief=1", check=False, log=f"op_tests_{number}_{program.name}.log")
        passed = re.search(r"\[  PASSED  \] (\d+) test", output)
        skipped = re.search(r"\[  SKIPPED \] (\d+) test", output)
        summary[" ".join([program.name, *command[1:]])] = {"passed": int(passed[1]) if passed else 0,
                                                           "skipped": int(skipped[1]) if skipped else 0, "exit_status": status}
        if status != 0 or not passed or (skipped and not run.dry):
            failures.append(f"{program.name}: {output[-800:]}")
    if failures:
        raise Failed("\n".join(failures))
    return summary


def parity(run):
    """Float32 logits and tokens of every golden case, as on the CPU and in the reference."""
    arguments = ["--only", "llada"] if run.dry else []
    status, output = run.call(sys.executable, "-B", ROOT / "tests/golden/run_cli.py", "--bin", run.bin, "--device", run.device,
                              "--jobs", min(os.cpu_count() or 1, 8), *arguments, check=False, log="parity.log")
    counts = re.search(r"(\d+) passed, (\d+) failed", output)
    if status != 0 or not counts:
        raise Failed(output[-2000:])
    return {"passed": int(counts[1]), "failed": int(counts[2])}


def shape_bench(run, shapes, cells, *extra, log):
    path = run.out / (log + ".json")
    arguments = ["--shape", shapes, "--cells", cells, "--device", run.device, "--json", path, *extra]
    if (run.out / "ceilings.json").exists():
        arguments += ["--ceilings", run.out / "ceilings.json"]
    run.call(run.benches / "engine_bench", *arguments, log=log + ".log")
    return json.loads(path.read_text())


def invariance(run):
    """The same bits alone and in a batch, in both dtypes and by whatever products are made of here."""
    compared = []
    products = ",".join(run.products())
    for shape, cells, dtype in ([("tiny", "block:3x32@64,canvas:2x40", "float32")] if run.dry else
                                [("small", "block:1x32@512,block:17x32@512,block:64x32@512,canvas:8x333", "bfloat16"),
                                 ("small", "block:64x32@512,canvas:8x333", "float32"),
                                 ("llada2-mini", "block:33x32@256", "bfloat16")]):
        result = shape_bench(run, shape, cells, "--invariance", "--steps", 1, "--dtype", dtype, "--activations",
                             "auto" if run.dry else dtype, "--products", products if dtype == "bfloat16" else "auto",
                             log=f"invariance_{shape}_{dtype}")
        compared += [{"shape": shape, "dtype": dtype, "products": step["products"], "cell": step["cell"],
                      "rows_that_differ": step["rows_that_differ_alone"]}
                     for step in result["steps"]]
    return compared


def compare(results):
    """Adds to each step how long the same takes by mma.sync over by wgmma, and without a graph over with one."""
    times = {(step["shape"], step["cell"], step["products"], step["graphs"]): step["step_seconds"]
             for result in results for step in result["steps"]}
    for result in results:
        for step in result["steps"]:
            mma = times.get((step["shape"], step["cell"], "mma", step["graphs"]))
            if step["products"] == "wgmma" and mma:
                step["mma_over_wgmma"] = mma / step["step_seconds"]
            plain = times.get((step["shape"], step["cell"], step["products"], False))
            if step["graphs"] and plain:
                step["plain_over_graph"] = plain / step["step_seconds"]
    return results


def engine_bench(run):
    """Steps of published models' shapes, by mma.sync and wgmma, with and without graphs: time, and shares of what was measured."""
    if run.dry:
        return compare([shape_bench(run, "tiny,tiny-moe", "block:1x32@64,block:4x32@64,canvas:2x64", "--steps", 2, "--dtype",
                                    "float32", "--products", "auto", "--graphs", "on,off", log="engine_bench_float32")])
    results = []
    for shape in SHAPES.split(","):  # one at a time: what the budget cuts off is the rest
        results.append(shape_bench(run, shape, CELLS, "--seconds", 1, "--products", ",".join(run.products()), "--graphs", "on,off",
                                   log=f"engine_bench_{shape}_bfloat16"))
    return compare(results)


def fastest(run, dtype):
    """By shape and cell, the least seconds of a step that engine_bench measured."""
    seconds = {}
    for log in run.out.glob(f"engine_bench_*{dtype}.json"):
        for step in json.loads(log.read_text())["steps"]:
            key = step["shape"], step["cell"]
            seconds[key] = min(seconds.get(key, step["step_seconds"]), step["step_seconds"])
    return seconds


def fp8_bench(run):
    """The same steps with FP8 weights and activations; and the fastest bfloat16 step over theirs."""
    if run.dry:
        raise Skip("the CPU has no FP8")
    bf16 = fastest(run, "_bfloat16")
    results = []
    for shape in ("llada-8b", "dream-7b"):
        results.append(shape_bench(run, shape, "block:1x32@512,block:64x32@1024", "--seconds", 1, "--fp8", "--products",
                                   ",".join(run.products()), log=f"fp8_bench_{shape}"))
        for step in results[-1]["steps"]:
            before = bf16.get((step["shape"], step["cell"]))
            step["bfloat16_over_fp8"] = before / step["step_seconds"] if before else None
    return compare(results)


def torch_step(run):
    """The same steps in PyTorch, eager and as a CUDA graph; and its step over our fastest."""
    if not run.python:
        raise Skip("no python here can import torch")
    shapes, cells, dtype = ("tiny", "block:1x32@64,canvas:2x64", "float32") if run.dry else ("llada-8b,dream-7b", CELLS, "bfloat16")
    path = run.out / "torch.json"
    run.call(run.python, "-B", HERE / "torch_step.py", "--shapes", shapes, "--cells", cells, "--dtype", dtype, "--device",
             run.device, "--seconds", 0.2 if run.dry else 2, "--json", path, log="torch.log")
    theirs = json.loads(path.read_text())
    ours = fastest(run, dtype)
    for step in theirs["steps"]:
        mine = ours.get((step["shape"], step["cell"]))
        best = min(value for key, value in step.items() if key.endswith("_seconds") and value)
        step["torch_over_cinnabar"] = best / mine if mine else None
    return theirs


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def end_to_end(run):
    """Tokens a second through gateway, Redis, scheduler and worker, with the default model."""
    port, results = free_port(), []
    with tempfile.TemporaryDirectory(prefix="cinnabar_gpu_") as data:
        log = open(run.out / "up.log", "w", encoding="utf-8")
        up = subprocess.Popen([str(run.bin / "cinnabar"), "up", "--device", run.device, "--data", data, "--listen",
                               f"127.0.0.1:{port}", "--grpc-listen", "", "--metrics-port", "0", "--model",
                               str(ROOT / "models/cinnabar-py-4m")],
                              stdout=log, stderr=subprocess.STDOUT, env=run.environment, start_new_session=True)
        try:
            while "Cinnabar is up" not in (run.out / "up.log").read_text(errors="replace"):
                if up.poll() is not None or run.left() < 1:
                    raise Failed((run.out / "up.log").read_text(errors="replace")[-1500:])
                time.sleep(0.1)
            seconds = 2 if run.dry else max(3, min(10, int(run.left() / 4)))
            for concurrency in ([1, 2] if run.dry else [1, 64]):
                _, output = run.call(run.bin / "cinnabar", "bench", "load", "--url", f"http://127.0.0.1:{port}", "--concurrency",
                                     concurrency, "--seconds", seconds, "--warmup", 1, "--prompt-tokens", 32, "--canvas-tokens", 32,
                                     "--json", log=f"load_{concurrency}.log")
                load = json.loads(output.strip().splitlines()[-1])
                if load["failed"] or not load["ok"]:
                    raise Failed(f"{load['failed']} requests failed, {load['ok']} were answered: {load['error_messages']}")
                results.append({"concurrency": concurrency, "model": "cinnabar-py-4m", "canvas_tokens": 32, "load": load})
            up.send_signal(signal.SIGTERM)
            if up.wait(30) != 0:
                raise Failed("cinnabar up ended badly: " + (run.out / "up.log").read_text(errors="replace")[-800:])
        finally:
            if up.poll() is None:
                up.send_signal(signal.SIGINT)  # twice: at once
                time.sleep(0.5)
                up.send_signal(signal.SIGINT)
                try:
                    up.wait(20)
                except subprocess.TimeoutExpired:
                    up.kill()
            log.close()
    return results


def sanitizer(run):
    """compute-sanitizer over the op tests: memory errors, then races."""
    tool = shutil.which("compute-sanitizer") or next(iter(glob.glob("/usr/local/cuda*/bin/compute-sanitizer")), None)
    if run.dry or not tool:
        raise Skip("on the CPU there is nothing to check" if run.dry else "compute-sanitizer is not here")
    found, cut = {}, []
    for check in ("memcheck", "racecheck"):
        for number, command in enumerate(run.op_tests()):
            name = f"{check} {pathlib.Path(command[0]).name}"
            try:
                status, output = run.call(tool, "--tool", check, "--error-exitcode", 9, *command, "--gtest_brief=1", check=False,
                                          log=f"{check}_{number}.log")
            except Failed as error:
                cut.append(f"{name}: {str(error)[:200]}")
                continue
            errors = re.search(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard", output)
            found[f"{name} {number}"] = {"exit_status": status, "errors": int(errors[1] or errors[2]) if errors else None}
            if status != 0:
                raise Failed(f"{name}: {output[-1500:]}")
    if cut:
        raise Failed("not finished: " + "; ".join(cut))
    return found


# In the order of worth, should the machine go away; seconds.
PARTS = [(facts, 15), (ceilings, 35), (op_tests, 65), (parity, 55), (engine_bench, 140), (invariance, 35), (torch_step, 45),
         (fp8_bench, 60), (end_to_end, 35), (sanitizer, 45)]
assert sum(seconds for _, seconds in PARTS) <= TOTAL_SECONDS


def percent(value):
    return "" if value is None else f"{100 * value:.1f} %"


def describe(name, detail):
    """Lines of the text report."""
    if name in ("engine_bench", "fp8_bench"):
        for result in detail:
            for step in result["steps"]:
                way = ("" if step["products"] == "auto" else step["products"]) + ("" if step["graphs"] else " no graphs")
                yield (f"{step['shape']:12} {'float8' if step.get('fp8') else step['dtype']:9} {way:15} {step['cell']:17} {1e3 * step['step_seconds']:9.3f} ms "
                       f"({1e3 * step['step_seconds_low']:.3f} .. {1e3 * step['step_seconds_high']:.3f})  bandwidth "
                       f"{percent(step['bandwidth_share']):>7}  matrix {percent(step['matrix_share']):>7}  "
                       f"{step['token_steps_per_second']:,.0f} tokens x steps/s")
                if step.get("bfloat16_over_fp8"):
                    yield f"             the fastest bfloat16 step takes {step['bfloat16_over_fp8']:.2f} times as long"
                if step.get("mma_over_wgmma"):
                    yield f"             by mma.sync {step['mma_over_wgmma']:.2f} times as long"
                if step.get("plain_over_graph"):
                    yield f"             without a graph {step['plain_over_graph']:.2f} times as long"
                rates = step.get("tokens_per_second_at_tokens_per_forward")
                if rates:
                    yield ("             tokens/s if a forward commits " + ", ".join(rates) + " a sequence: " +
                           ", ".join(f"{rate:,.0f}" for rate in rates.values()))
    elif name == "end_to_end":
        for entry in detail:
            load = entry["load"]
            yield (f"{entry['model']}, {entry['concurrency']} at a time, canvas {entry['canvas_tokens']}: {load['tokens_per_second']:.1f} "
                   f"tokens/s, {load['requests_per_second']:.2f} requests/s, p50 {load['latency_seconds']['p50']:.3f} s, "
                   f"{load['tokens_per_forward']:.2f} tokens a forward, {load['failed']} failed")
    elif name == "torch_step":
        for step in detail["steps"]:
            ratio = step["torch_over_cinnabar"]
            times = ", ".join(f"{key[:-8]} {1e3 * value:.3f} ms" for key, value in step.items() if key.endswith("_seconds") and value)
            yield f"{step['shape']:12} {step['cell']:17} {times}" + (f"; {ratio:.2f} x ours" if ratio else "")
    else:
        text = json.dumps(detail, indent=1)
        yield from text.splitlines()[:60]


def main():
    parser = argparse.ArgumentParser(prog="tests/gpu/run.sh")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--out", default="gpu_report", help="folder of the report and of all logs")
    parser.add_argument("--build", help="build tree; default build/cuda")
    parser.add_argument("--only", default="", help="parts, with commas")
    parser.add_argument("--python", help="one that can import torch")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    if args.list:
        for part, seconds in PARTS:
            print(f"{part.__name__:13} {seconds:4} s  {part.__doc__}")
        return 0
    only = [name for name in args.only.split(",") if name]
    unknown = set(only) - {part.__name__ for part, _ in PARTS}
    if unknown:
        parser.error(f"no part {', '.join(sorted(unknown))}; --list shows them")
    run = Run(args)
    report = {"device": run.device, "dry_run": run.dry, "parts": []}
    lines = [f"Cinnabar on {run.device}" + (": a dry run of the script; no figure below is a device's" if run.dry else "")]
    begin = time.monotonic()
    for part, budget in PARTS:
        name = part.__name__
        if only and name not in only:
            continue
        run.part_end = min(time.monotonic() + budget * run.patience, run.end)
        entry = {"part": name, "budget_seconds": budget}
        part_begin = time.monotonic()
        try:
            if run.left() <= 0:
                raise Skip("no time is left")
            entry["detail"] = part(run)
            entry["status"] = "passed"
        except Skip as reason:
            entry.update(status="skipped", why=str(reason))
        except (Failed, OSError, ValueError, KeyError, subprocess.SubprocessError) as error:
            entry.update(status="failed", why=f"{type(error).__name__}: {error}" if not isinstance(error, Failed) else str(error))
        entry["seconds"] = round(time.monotonic() - part_begin, 1)
        report["parts"].append(entry)
        heading = f"{name}: {entry['status']} in {entry['seconds']} s"
        print(heading, flush=True)
        lines += ["", heading, *(f"  {line}" for line in entry.get("why", "").splitlines())]
        if "detail" in entry:
            lines += [f"  {line}" for line in describe(name, entry["detail"])]
        # After each part: a machine may go away.
        report["seconds"] = round(time.monotonic() - begin, 1)
        (run.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
        (run.out / "report.txt").write_text("\n".join(lines) + "\n")
    failed = [entry["part"] for entry in report["parts"] if entry["status"] == "failed"]
    print(f"{run.out}/report.txt: {report.get('seconds', 0)} s" + (f"; FAILED: {', '.join(failed)}" if failed else ""))
    return 1 if failed or not report["parts"] else 0


if __name__ == "__main__":
    sys.exit(main())
