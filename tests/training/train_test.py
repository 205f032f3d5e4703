"""Resuming gives the same bits, and what each objective trains is what a cluster serves. Needs torch and tokenizers.

  train_test.py [folder of the programs]
"""

import json
import pathlib
import random
import sys
import tempfile
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
try:
    import torch
    from training import evaluate, export, synthetic, tokenizer, train
    import tokenizers  # noqa: F401
    MISSING = ""
except ImportError as error:
    MISSING = str(error) + "; pip install -r training/requirements.txt"
BIN = ""


@unittest.skipIf(MISSING, MISSING)
class TrainTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.holder = tempfile.TemporaryDirectory()
        cls.folder = pathlib.Path(cls.holder.name)
        rng = random.Random(3)
        for name, count in (("train", 200), ("held_out", 8)):
            with open(cls.folder / (name + ".jsonl"), "w", encoding="utf-8") as file:
                for _ in range(count):
                    text = synthetic.function(rng)
                    file.write(json.dumps({"text": text, "body": text.index("\n"), "names": {}}) + "\n")
        tokenizer.main(["--corpus", str(cls.folder), "--out", str(cls.folder), "--vocab", "512", "--synthetic", "200"])

    @classmethod
    def tearDownClass(cls):
        cls.holder.cleanup()

    def run_to(self, name, steps, processes=1):
        small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
                 "intermediate_size": 48, "tokens_per_step": 512, "micro_tokens": 256, "decay_share": 0.001}
        arguments = ["--corpus", str(self.folder), "--tokenizer", str(self.folder), "--run", str(self.folder / name),
                     "--steps", str(steps), "--processes", str(processes)]
        for key, value in small.items():
            arguments += ["--set", "%s=%s" % (key, json.dumps(value))]
        train.main(arguments)
        return torch.load(train.checkpoint_of(self.folder / name), map_location="cpu")

    def test_resuming_gives_the_same_bits(self):
        straight = self.run_to("straight", 6)
        self.run_to("resumed", 3)
        resumed = self.run_to("resumed", 6)
        self.assertEqual(straight["step"], resumed["step"])
        for part in ("model", "optimizer"):
            for name, value in straight[part].items():
                self.assertTrue(torch.equal(value, resumed[part][name]), name)


@unittest.skipIf(MISSING, MISSING)
class ServedTest(unittest.TestCase):
    """A model of each objective, trained on four functions whose operator and number belong together, exported, and asked through
    a gateway: the answers are the functions, all of them come up, and they end by themselves."""

    PROMPT = "def f(x):\n    return x"
    ENDINGS = [" + 1", " - 2", " * 3", " / 4"]

    def serve(self, objective, steps, **settings):
        if not BIN:
            self.skipTest("name the folder of the programs")
        with tempfile.TemporaryDirectory() as holder:
            folder = pathlib.Path(holder)
            for name in ("train", "held_out"):
                with open(folder / (name + ".jsonl"), "w", encoding="utf-8") as file:
                    for ending in self.ENDINGS:
                        text = self.PROMPT + ending
                        file.write(json.dumps({"text": text, "body": text.index("\n"), "names": {}}) + "\n")
            tokenizer.main(["--corpus", str(folder), "--out", str(folder), "--vocab", "300", "--synthetic", "0"])
            small = {"objective": objective, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
                     "num_key_value_heads": 2, "head_dim": 24, "intermediate_size": 96, "tokens_per_step": 1024,
                     "micro_tokens": 1024, "warmup_steps": 10, "decay_share": 0.5, "synthetic_share": 0, "ema": 0.9,
                     "length_max": 48, "max_position_embeddings": 64, **settings}
            arguments = ["--corpus", str(folder), "--tokenizer", str(folder), "--run", str(folder / "run"), "--steps", "400",
                         "--log-every", "400"]
            for key, value in small.items():
                arguments += ["--set", "%s=%s" % (key, value)]
            train.main(arguments)
            export.export(torch.load(train.checkpoint_of(folder / "run"), map_location="cpu"), folder, folder / "model")
            with evaluate.Cluster(BIN, folder / "model") as cluster:
                task = evaluate.Task("body", self.PROMPT, "", "")
                made = []
                for seed in range(40):
                    text, usage = evaluate.Client("http://127.0.0.1:%d" % cluster.port, "evaluated").fill(
                        task, 12, {"steps": steps}, 1.0, seed)
                    made.append(text)
        good = [text for text in made if text in self.ENDINGS]
        self.assertGreaterEqual(len(good), 34, made)
        self.assertEqual(set(good), set(self.ENDINGS), made)

    def test_masked_diffusion(self):
        self.serve("masked", 12)

    def test_block_diffusion(self):
        self.serve("block", 12, block_length=4)

    def test_score_entropy(self):
        self.serve("score", 64, cond_dim=16)


if __name__ == "__main__":
    BIN = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    unittest.main(verbosity=2)
