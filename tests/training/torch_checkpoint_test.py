"""Checkpoints as PyTorch writes them give the logits of the same weights in safetensors, bit for bit.

  with_torch.sh torch_checkpoint_test.py PATH_OF_CINNABAR
"""
import collections
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
import unittest

ROOT = pathlib.Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
sys.path.insert(0, str(ROOT))
BINARY = sys.argv.pop(1) if len(sys.argv) > 1 else None

try:
    import torch
except ImportError:
    torch = None


@unittest.skipIf(torch is None, "no PyTorch here")
class TorchCheckpointTest(unittest.TestCase):
    def setUp(self):
        self.scratch = tempfile.TemporaryDirectory()
        self.folder = pathlib.Path(self.scratch.name)

    def tearDown(self):
        self.scratch.cleanup()

    def state_dict(self, model):
        from training import convert
        return collections.OrderedDict(convert.read_safetensors(GOLDEN / "models" / model / "model.safetensors"))

    def logits(self, model, case):
        output = self.folder / "logits.safetensors"
        subprocess.run([BINARY, "logits", "--model", model, "--input", GOLDEN / "logits" / (case + ".json"), "--output", output],
                       check=True)
        return output.read_bytes()

    def folder_with(self, model, save):
        folder = self.folder / "model"
        folder.mkdir()
        shutil.copy(GOLDEN / "models" / model / "config.json", folder)
        save(folder)
        return folder

    def test_state_dict(self):
        for model, case in (("sedd_absorb", "sedd_absorb_13"), ("mdlm", "mdlm_13")):
            want = self.logits(GOLDEN / "models" / model, case)
            folder = self.folder_with(model, lambda f: torch.save(self.state_dict(model), f / "pytorch_model.bin"))
            self.assertEqual(self.logits(folder, case), want, model)
            shutil.rmtree(folder)

    def test_sedd_training_checkpoint_is_its_average(self):
        weights = self.state_dict("sedd_absorb")
        # In the order of the modules, buffers among them, as state_dict() has it.
        order = ["vocab_embed", "sigma_map", "rotary_emb", "blocks", "output_layer"]
        names = sorted(weights, key=lambda name: (order.index(name.split(".")[0]), name))
        model = collections.OrderedDict(("module." + name, torch.nn.Parameter(weights[name] + 1)) for name in names)
        model["module.rotary_emb.inv_freq"] = weights["rotary_emb.inv_freq"]
        shadows = [weights[name] for name in names if not name.endswith("inv_freq")]
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], lr=3e-4)

        def save(folder):
            (folder / "checkpoints-meta").mkdir()
            torch.save({"optimizer": optimizer.state_dict(), "model": model, "step": 5,
                        "ema": {"decay": 0.9999, "num_updates": 5, "shadow_params": shadows}},
                       folder / "checkpoints-meta" / "checkpoint.pth")

        folder = self.folder_with("sedd_absorb", save)
        self.assertEqual(self.logits(folder, "sedd_absorb_13"), self.logits(GOLDEN / "models" / "sedd_absorb", "sedd_absorb_13"))

    def test_code_is_refused_by_name(self):
        class Runs:
            def __reduce__(self):
                return (print, ("this must not run",))

        folder = self.folder_with("mdlm", lambda f: torch.save({"w": torch.ones(2), "x": Runs()}, f / "pytorch_model.bin"))
        done = subprocess.run([BINARY, "model", "inspect", folder, "--json"], capture_output=True, text=True)
        self.assertNotEqual(done.returncode, 0)
        self.assertNotIn("this must not run", done.stdout)
        self.assertTrue(any("print" in problem for problem in json.loads(done.stdout)["problems"]), done.stdout)


if __name__ == "__main__":
    unittest.main()
