"""The models that ship load in the engine and give their stored outputs, whichever instruction set computes them.

  models_test.py CINNABAR SOURCE             compares with models/*/stored_outputs.json
  models_test.py CINNABAR SOURCE --record    writes tokens and texts of the cases there anew
"""

import json
import pathlib
import subprocess
import sys
import unittest

CINNABAR, SOURCE = sys.argv[1], pathlib.Path(sys.argv[2])
STORED = sorted((SOURCE / "models").glob("*/stored_outputs.json"))


def generate(model, case, *flags):
    command = [CINNABAR, "generate", "--model", str(model), "--prompt", case["prompt"], "--gen-length", str(case["gen_length"]), "--json"]
    if "suffix" in case:
        command += ["--suffix", case["suffix"]]
    for name in ("steps", "sampler", "threshold", "temperature", "seed"):
        if name in case:
            command += ["--" + name, str(case[name])]
    done = subprocess.run(command + list(flags), capture_output=True, text=True, check=True)
    answer = json.loads(done.stdout)
    return answer["tokens"], answer["text"]


class ModelsTest(unittest.TestCase):
    def test_every_model_has_stored_outputs_and_a_card(self):
        folders = {path.parent for path in (SOURCE / "models").glob("*/config.json")}
        self.assertTrue(folders)
        self.assertEqual(folders, {path.parent for path in STORED})
        for folder in folders:
            self.assertTrue((folder / "README.md").exists(), folder)
            self.assertLess(sum(path.stat().st_size for path in folder.iterdir()), 25e6, folder)

    def test_stored_outputs(self):
        for path in STORED:
            cases = json.loads(path.read_text(encoding="utf-8"))
            self.assertTrue(cases)
            for case in cases:
                for isa in ("auto", "generic"):
                    with self.subTest(model=path.parent.name, prompt=case["prompt"], isa=isa):
                        tokens, text = generate(path.parent, case, "--isa", isa)
                        self.assertEqual(text, case["text"])
                        self.assertEqual(tokens, case["tokens"])

    def test_more_steps_change_the_answer_for_the_better(self):
        """The quick start's own example: nonsense in one step, what a programmer writes in as many as there are tokens."""
        cases = json.loads((SOURCE / "models/cinnabar-py-4m/stored_outputs.json").read_text(encoding="utf-8"))
        case = cases[0]
        _, text = generate(SOURCE / "models/cinnabar-py-4m", case)
        self.assertIn(text, ("sum(order.price for order in orders)", "sum([order.price for order in orders])"))
        _, hasty = generate(SOURCE / "models/cinnabar-py-4m", dict(case, steps=1))
        with self.assertRaises(SyntaxError):
            compile(case["prompt"] + hasty + case["suffix"], "hasty", "exec")


def record():
    for path in STORED:
        cases = json.loads(path.read_text(encoding="utf-8"))
        for case in cases:
            case["tokens"], case["text"] = generate(path.parent, case)
        path.write_text("[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    if "--record" in sys.argv:
        record()
    else:
        unittest.main(argv=sys.argv[:1], verbosity=2)
