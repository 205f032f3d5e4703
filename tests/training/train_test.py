"""Resuming gives the same bits, and an export loads in the engine. Needs torch and tokenizers.

  train_test.py [path of cinnabar]
"""

import json
import pathlib
import random
import subprocess
import sys
import tempfile
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
try:
    import torch
    from training import export, synthetic, tokenizer, train
    import tokenizers  # noqa: F401
    MISSING = ""
except ImportError as error:
    MISSING = str(error) + "; pip install -r training/requirements.txt"
CINNABAR = ""


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

    def test_an_export_loads_in_the_engine(self):
        if not CINNABAR:
            self.skipTest("name the cinnabar program")
        export.export(self.run_to("exported", 2), self.folder, self.folder / "model")
        done = subprocess.run([CINNABAR, "generate", "--model", str(self.folder / "model"), "--prompt", "def f(x):\n", "--suffix",
                               "\n", "--gen-length", "8", "--json"], capture_output=True, text=True, check=True)
        self.assertEqual(len(json.loads(done.stdout)["tokens"]), 8)


if __name__ == "__main__":
    CINNABAR = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    unittest.main(verbosity=2)
