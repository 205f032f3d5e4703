#!/usr/bin/env python3
"""The command line as a user meets it: help, errors that name the fix, examples of the README.

    usage: cli_test.py BINARY SOURCE_DIR
"""
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import unittest

BINARY = pathlib.Path(sys.argv[1]).resolve()
SOURCE = pathlib.Path(sys.argv[2]).resolve()
LLADA = SOURCE / "tests/golden/models/llada"


def run(*args, code=0):
    done = subprocess.run([BINARY, *map(str, args)], capture_output=True, text=True, timeout=120, cwd=SOURCE)
    assert done.returncode == code, (args, done.returncode, done.stdout, done.stderr)
    return done


class CommandLine(unittest.TestCase):
    def test_help_teaches(self):
        for command in ([], ["generate"], ["logits"], ["model"], ["samplers"], ["score"]):
            text = run(*command, "--help").stdout
            self.assertIn("cinnabar", text)
        self.assertIn("--threshold", run("generate", "--help").stdout)

    def test_errors_name_the_fix(self):
        cases = [
            (["generat"], "--help lists them"),
            (["generate", "--model", LLADA, "--promt", "x"], "did you mean --prompt?"),
            (["generate", "--model", LLADA], "one of --prompt, --chat, --input"),
            (["generate", "--prompt", "x"], "--model is missing"),
            (["generate", "--model", LLADA, "--prompt", "x", "--chat", "y"], "exclude each other"),
            (["generate", "--model", LLADA, "--prompt", "x", "--steps", "many"], "not a N"),
            (["generate", "--model", LLADA, "--prompt", "x", "--steps"], "needs a value"),
            (["generate", "--model", LLADA, "--prompt", "x", "--seed", "1", "--seed", "2"], "given twice"),
            (["generate", "--model", LLADA, "--prompt", "x", "--sampler", "magic"], "low_confidence"),
            (["generate", "--model", LLADA, "--prompt", "x", "--sampler", "low_confidence", "--threshold", "0.5"],
             "threshold"),
            (["generate", "--model", LLADA, "--prompt", "x", "--json", "--watch"], "exclude each other"),
            (["logits", "--model", LLADA, "--output", "/tmp/x"], "--input is missing"),
        ]
        for args, words in cases:
            with self.subTest(args=args):
                self.assertIn(words, run(*args, code=2).stderr)
        self.assertIn("config.json", run("generate", "--model", "/nowhere", "--input", "/dev/null", code=1).stderr
                      + run("model", "inspect", "/nowhere", code=1).stderr)

    def test_json_has_what_it_promises(self):
        out = json.loads(run("generate", "--model", LLADA, "--prompt", "ab", "--gen-length", 8, "--json").stdout)
        for key in ("tokens", "ids", "text", "steps", "nfe", "tokens_per_forward", "seconds"):
            self.assertIn(key, out)
        self.assertEqual(len(out["tokens"]), 8)
        again = json.loads(run("generate", "--model", LLADA, "--prompt", "ab", "--gen-length", 8, "--json",
                               "--threads", 1).stdout)
        self.assertEqual(again["tokens"], out["tokens"])

    def test_score(self):
        small = SOURCE / "models/cinnabar-py-4m"
        code = "def total(values):\n    return "
        out = {answer: json.loads(run("score", "--model", small, "--prompt", code, "--answer", answer, "--json").stdout)
               for answer in ("sum(values)", "zip(def)")}
        self.assertGreater(out["sum(values)"]["log_likelihood"], out["zip(def)"]["log_likelihood"] + 3)
        llada = json.loads(run("score", "--model", small, "--prompt", code, "--answer", "sum(values)", "--rule", "llada",
                               "--json").stdout)
        self.assertLess(abs(llada["log_likelihood"] - out["sum(values)"]["log_likelihood"]), 4)
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "text.py"
            path.write_text("def add(a, b):\n    return a + b\n" * 20)
            done = run("score", "--model", small, "--text-file", path, "--window", 64, "--samples", 8)
            self.assertIn("bits over 640 bytes", done.stdout)
            again = run("score", "--model", small, "--text-file", path, "--window", 64, "--samples", 8)
            self.assertEqual(done.stdout, again.stdout)
            path.write_text("")
            self.assertIn("no token", run("score", "--model", small, "--text-file", path, code=2).stderr)
        for args, words in [(["--answer", "x", "--rule", "mean"], "nelbo or llada"), ([], "what to score"),
                            (["--answer", "x", "--input", "y"], "one of"), (["--answer", "x", "--samples", 0], "at least 1"),
                            (["--text-file", "x", "--prompt", "y"], "goes with --answer")]:
            with self.subTest(args=args):
                self.assertIn(words, run("score", "--model", small, *args, code=2).stderr)

    def test_fill_in_keeps_prefix_and_suffix(self):
        out = json.loads(run("generate", "--model", LLADA, "--prompt", "ab", "--suffix", "cd", "--gen-length", 5,
                             "--json").stdout)
        plain = json.loads(run("generate", "--model", LLADA, "--prompt", "ab", "--gen-length", 5, "--json").stdout)
        self.assertEqual(out["ids"][:len(plain["ids"]) - 5], plain["ids"][:-5])
        self.assertGreater(len(out["ids"]), len(plain["ids"]))

    def test_hostile_input_files(self):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "input.json")
            for text, words in [("[]", "not a JSON object"), ('{"ids": [1], "foo": 1}', 'unknown field "foo"'),
                                ('{"ids": [1, -2]}', "ids[1]"), ('{"ids": [1], "given": [true, true]}', "in pairs"),
                                ('{"ids": [99999999], "given": [true]}', "99999999"), ('{"ids": []}', "empty"),
                                ('{"ids": ' + "[" * 100000, "not a JSON object")]:
                pathlib.Path(path).write_text(text)
                with self.subTest(text=text[:40]):
                    self.assertIn(words, run("generate", "--model", LLADA, "--input", path, code=2).stderr)

    def test_inspect(self):
        report = json.loads(run("model", "inspect", LLADA, "--json").stdout)
        self.assertIn("llada", json.dumps(report).lower())
        self.assertIn("mask", run("model", "inspect", LLADA).stdout)


if __name__ == "__main__":
    unittest.main(argv=[sys.argv[0], "-v"])
