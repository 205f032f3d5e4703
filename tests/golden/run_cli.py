#!/usr/bin/env python3
"""Runs every golden case against a `cinnabar` binary and compares.

    tests/golden/run_cli.py --bin build/release/cli [--device cuda:0] [--jobs N] [--only TEXT] [--verbose]

Needs the Python standard library alone. What it calls:
    cinnabar logits   --model DIR --input FILE.json --output FILE.safetensors
    cinnabar generate --model DIR --input FILE.json --sampler NAME --steps N ... --json
`generate --json` prints one JSON object as the last line of standard output: {"ids": [whole sequence],
"nfe": forward passes, ...}; an optional "trace" (per step the positions committed) is compared as well.
Prints a line for each failure and a closing "N passed, N failed"; the exit status is 1 when one failed.
"""
import argparse
import array
import concurrent.futures
import json
import math
import pathlib
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
TIMEOUT_SECONDS = 120


class Failure(Exception):
    pass


def read_float32(path, name):
    """(values, shape) of an F32 tensor of a safetensors file."""
    data = pathlib.Path(path).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + length])
    if name not in header:
        raise Failure(f"{path} has no tensor {name!r}")
    entry = header[name]
    if entry["dtype"] != "F32":
        raise Failure(f"{path}: dtype {entry['dtype']}, not F32")
    begin, end = (8 + length + offset for offset in entry["data_offsets"])
    values = array.array("f")
    values.frombytes(data[begin:end])
    if sys.byteorder == "big":
        values.byteswap()
    return values, entry["shape"]


class Runner:
    def __init__(self, binary, extra, verbose):
        self.binary, self.extra, self.verbose = binary, extra, verbose
        self.passed, self.failed = 0, 0

    def call(self, *arguments):
        command = [str(self.binary), *map(str, arguments), *self.extra]
        if self.verbose:
            print("+", " ".join(command))
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            raise Failure(f"no answer within {TIMEOUT_SECONDS} s") from None
        if done.returncode != 0:
            raise Failure(f"exit status {done.returncode}: {done.stderr.strip()[-400:]}")
        return done.stdout

    def logits(self, entry, scratch):
        output, input_file = scratch / "logits.safetensors", scratch / "input.json"
        fields = json.loads((HERE / entry["input_file"]).read_text())
        fields.pop("steps", None)  # later steps of DiffusionGemma, which model_forward_test compares
        input_file.write_text(json.dumps(fields))
        self.call("logits", "--model", HERE / entry["model_dir"], "--input", input_file, "--output", output)
        got, got_shape = read_float32(output, "logits")
        want, want_shape = read_float32(HERE / entry["logits_file"], "logits")
        if got_shape != want_shape:
            raise Failure(f"shape {got_shape}, expected {want_shape}")
        worst, where = 0.0, 0
        for i, (a, b) in enumerate(zip(got, want)):
            error = abs(a - b) / max(1.0, abs(b))
            if not error <= worst:  # a NaN is the worst
                worst, where = error, i
                if math.isnan(error):
                    break
        if not worst <= entry["bound"]:
            row, column = divmod(where, want_shape[-1])
            raise Failure(f"row {row} id {column}: {got[where]:.6g}, expected {want[where]:.6g} "
                          f"(off by {worst:.1e}, bound {entry['bound']:.0e})")

    def generate(self, case, scratch):
        input_file = scratch / "input.json"
        input_file.write_text(json.dumps(case["input"]))
        arguments = ["generate", "--model", HERE / case["model"], "--input", input_file, "--json"]
        for key, value in case["options"].items():
            flag = "--" + key.replace("_", "-")
            arguments += ([flag] if value else []) if isinstance(value, bool) else [flag, repr(value).strip("'")]
        lines = self.call(*arguments).strip().splitlines()
        try:
            return json.loads(lines[-1])
        except (IndexError, ValueError):
            raise Failure("the last line of the output is not JSON") from None

    def tokens(self, case, scratch):
        want, got = case["expected"], self.generate(case, scratch)
        if got.get("ids") != want["ids"]:
            ids = got.get("ids") or []
            different = [i for i, (a, b) in enumerate(zip(ids, want["ids"])) if a != b]
            raise Failure(f"tokens differ at {different or 'the end'}: {ids}, expected {want['ids']}")
        low, high = want.get("nfe_min", want.get("nfe")), want.get("nfe_max", want.get("nfe"))
        if "nfe" not in got or not low <= got["nfe"] <= high:
            raise Failure(f"nfe {got.get('nfe')}, expected {low}" + ("" if low == high else f" to {high}"))
        if "trace" in got and [t for t in got["trace"] if t] != [t for t in want["trace"] if t]:
            raise Failure(f"trace {got['trace']}, expected {want['trace']}")

    def properties(self, case, scratch):
        first, second = (self.generate(case, scratch)["ids"] for _ in range(2))
        if first != second:
            raise Failure("the same seed gave two results")
        if len(first) != case["properties"]["length"]:
            raise Failure(f"{len(first)} tokens, expected {case['properties']['length']}")
        for i, (token, given) in enumerate(zip(case["input"]["ids"], case["input"]["given"])):
            if given and first[i] != token:
                raise Failure(f"given position {i} changed from {token} to {first[i]}")
        given = case["input"]["given"] + [False] * (len(first) - len(case["input"]["given"]))
        left = [i for i, t in enumerate(first) if t == case["properties"]["mask_token"] and not given[i]]
        if left:
            raise Failure(f"positions {left} are still masked")

    def run(self, kind, name, check, argument):
        """What is wrong with a case, or nothing. From any thread."""
        try:
            with tempfile.TemporaryDirectory() as scratch:
                check(argument, pathlib.Path(scratch))
        except Failure as failure:
            return f"FAIL {kind} {name}: {failure}"
        return None

    def run_all(self, cases, jobs):
        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            for failure in pool.map(lambda case: self.run(*case), cases):
                self.passed += failure is None
                self.failed += failure is not None
                if failure:
                    print(failure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", required=True, type=pathlib.Path, help="folder of the binary, or the binary")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--extra", action="append", default=[], help="one more argument for every call")
    parser.add_argument("--device", help="cuda:0: activations in float32 there, to compare exactly")
    parser.add_argument("--jobs", type=int, default=1, help="cases at once")
    parser.add_argument("--verbose", action="store_true", help="print the commands")
    args = parser.parse_args()
    binary = args.bin / "cinnabar" if args.bin.is_dir() else args.bin
    if not binary.is_file():
        parser.error(f"no binary at {binary}")
    extra = args.extra + (["--device", args.device, "--activations", "float32"] if args.device else [])
    runner = Runner(binary.resolve(), extra, args.verbose)
    index = json.loads((HERE / "index.json").read_text())
    cases = [("logits", entry["name"], runner.logits, entry) for entry in index["logits"]]
    for kind, check in (("tokens", runner.tokens), ("properties", runner.properties)):
        cases += [(kind, entry["name"], check, json.loads((HERE / entry["case_file"]).read_text())) for entry in index[kind]]
    runner.run_all([case for case in cases if args.only in case[1]], args.jobs)
    print(f"{runner.passed} passed, {runner.failed} failed")
    return 1 if runner.failed or not runner.passed else 0


if __name__ == "__main__":
    sys.exit(main())
