"""A network trained on a small known distribution draws samples from it: total variation, for both objectives. Needs torch."""

import pathlib
import sys
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
try:
    import torch
    from training import objectives
    from training.networks import DiT
    MISSING = ""
except ImportError as error:
    MISSING = str(error) + "; pip install -r training/requirements.txt"
WORDS, LENGTH, MASK = 3, 3, 3


@unittest.skipIf(MISSING, MISSING)
class ObjectiveTest(unittest.TestCase):
    def distance(self, objective, score):
        torch.manual_seed(4)
        truth = torch.distributions.Dirichlet(torch.full((WORDS ** LENGTH,), 0.3)).sample()
        states = torch.cartesian_prod(*[torch.arange(WORDS)] * LENGTH)
        network = DiT(WORDS + 1, 32, 2, 2, 16, LENGTH, score)
        optimizer = torch.optim.Adam(network.parameters(), 3e-3)
        steps = 800
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = 3e-3 * (1 - step / steps) + 1e-5
            clean = states[torch.multinomial(truth, 128, replacement=True)]
            loss = objective(network, clean, MASK, objectives.antithetic(128, 0.02)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        drawn = objectives.sample(network, 12000, LENGTH, MASK, 32, score)
        index = (drawn * WORDS ** torch.arange(LENGTH - 1, -1, -1)).sum(1)
        seen = torch.bincount(index, minlength=WORDS ** LENGTH) / len(drawn)
        return float((seen - truth).abs().sum() / 2)

    # 12,000 draws of the truth itself are about 0.02 away; the rest is training and the time grid.
    def test_masked_diffusion(self):
        self.assertLess(self.distance(objectives.masked, False), 0.08)

    def test_score_entropy(self):
        self.assertLess(self.distance(objectives.score_entropy, True), 0.08)


if __name__ == "__main__":
    unittest.main(verbosity=2)
