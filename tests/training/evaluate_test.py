"""evaluate: how tasks are cut and judged; and, with tokenizers and the programs, a whole small run through a served cluster."""

import contextlib
import io
import json
import pathlib
import random
import sys
import tempfile
import unittest

SOURCE = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(SOURCE))
from training import evaluate, synthetic  # noqa: E402
from training.evaluate import Task, judge  # noqa: E402

try:
    import tokenizers
    MISSING = ""
except ImportError as error:
    MISSING = str(error)
BIN = sys.argv.pop(1) if len(sys.argv) > 1 else ""

TEXT = '''def total(items, start=0):
    """The sum of items."""
    result = start
    for item in items:
        result += item
    return result'''
BODY = TEXT.index("    result = start")


class TasksTest(unittest.TestCase):
    def test_a_gap_and_what_is_around_it_are_the_text(self):
        rng = random.Random(3)
        for text, body in [(TEXT, BODY)] + [(t, t.index("\n") + 1) for t in (synthetic.function(rng, held_out=True) for _ in range(50))]:
            for kind in evaluate.KINDS:
                for _ in range(20):
                    task = evaluate.cut(kind, text, body, rng)
                    if task is None:
                        continue
                    self.assertEqual(task.prefix + task.answer + task.suffix, text)
                    self.assertTrue(task.answer.strip())
                    if kind == "line":
                        self.assertNotIn("\n", task.answer)
                        self.assertFalse(task.answer.startswith(" "))
                        self.assertGreaterEqual(len(task.prefix), body)
                    if kind == "body":
                        self.assertEqual((task.prefix, task.suffix), (text[:body], ""))

    def test_the_true_answer_is_right_in_every_way(self):
        for kind in evaluate.KINDS:
            task = evaluate.cut(kind, TEXT, BODY, random.Random(1))
            scores = judge(task, task.answer)
            self.assertEqual(set(scores.values()), {True, 1.0})

    def test_wrong_answers_lose_where_they_are_wrong(self):
        task = Task("body", TEXT[:BODY], TEXT[BODY:], "")
        other = judge(task, "    return sum(items, start)")
        self.assertEqual((other["exact"], other["parses"], other["named"]), (False, True, True))
        self.assertFalse(judge(task, "    return sum(things)")["named"])
        self.assertFalse(judge(task, "    return sum(items")["parses"])
        self.assertFalse(judge(task, "    return sum(items")["named"])
        self.assertLess(judge(task, "    pass")["similar"], 0.3)
        self.assertFalse(evaluate.parses("\0"))

    def test_names_bound_anywhere_are_defined(self):
        read, bound = evaluate.names_read("def f(a, *b, **c):\n    import os.path as p, sys\n    try:\n        x = [y for y in a]\n"
                                          "    except E as e:\n        print(e, x, p, sys, z)\n")
        self.assertEqual(read - bound, {"E", "z"} - bound)
        self.assertLessEqual({"a", "b", "c", "p", "sys", "x", "y", "e", "f"}, bound)


@unittest.skipIf(MISSING or not BIN, MISSING or "no programs named")
class RunTest(unittest.TestCase):
    def test_a_run_through_a_served_cluster(self):
        with tempfile.TemporaryDirectory() as folder:
            held_out = pathlib.Path(folder) / "held_out.jsonl"
            held_out.write_text("".join(json.dumps({"text": TEXT, "body": BODY}) + "\n" for _ in range(2)))
            out = pathlib.Path(folder) / "out"
            with contextlib.redirect_stdout(io.StringIO()) as said:
                evaluate.main(["--bin", BIN, "--model", str(SOURCE / "models/cinnabar-tiny"), "--held-out", str(held_out), "--out", str(out),
                               "--each", "2", "--steps", "1,0", "--thresholds", "0.5"])
            results = json.loads((out / "results.json").read_text())["results"]
            self.assertEqual(len(results), 2 * len(evaluate.KINDS) * 3)
            self.assertTrue(all(r["count"] == 2 and 0 <= r["exact"] <= 1 and r["forwards"] > 0 for r in results))
            one = [r for r in results if r["steps"] == 1]
            self.assertTrue(all(r["forwards"] == 1 for r in one))
            self.assertIn("| real | line | low_confidence | 1 | 1.0 |", (out / "table.md").read_text())
            self.assertIn("<svg", (out / "quality.svg").read_text())
            self.assertIn("threshold 0.5", said.getvalue())


if __name__ == "__main__":
    unittest.main(verbosity=2)
