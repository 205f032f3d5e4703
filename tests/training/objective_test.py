"""A model trained on a small known distribution draws samples from it: total variation, for both objectives. Needs torch.

The model is a table, one row of logits for each partly hidden sequence, so that nothing but the objective and the sampler is tested;
the networks themselves are held against the engine elsewhere.
"""

import pathlib
import sys
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
try:
    import itertools

    import numpy as np
    import torch
    from torch.nn import functional as F
    from training import data, objectives, train
    from training.networks import Decoder, scaled_score
    MISSING = ""
except ImportError as error:
    MISSING = str(error) + "; pip install -r training/requirements.txt"
WORDS, LENGTH, MASK = 3, 3, 3
VOCAB = WORDS + 1


def make_table(score):
    class Table(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.logits = torch.nn.Parameter(torch.zeros(VOCAB ** LENGTH, LENGTH, VOCAB))

        def forward(self, ids, sigma=None):
            out = self.logits[(ids * VOCAB ** torch.arange(LENGTH)).sum(1)]
            return scaled_score(out, ids, sigma) if score else out

    return Table()


@unittest.skipIf(MISSING, MISSING)
class ObjectiveTest(unittest.TestCase):
    def setUp(self):
        torch.manual_seed(4)
        self.truth = torch.distributions.Dirichlet(torch.full((WORDS ** LENGTH,), 0.3)).sample()
        self.states = torch.cartesian_prod(*[torch.arange(WORDS)] * LENGTH)

    def train(self, objective, score, steps=1500, copies=8):
        network = make_table(score)
        optimizer = torch.optim.Adam(network.parameters(), 0.1)
        clean, weights = self.states.repeat(copies, 1), self.truth.repeat(copies) / copies
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = 0.1 * (1 - step / steps) + 1e-4
            times = objectives.antithetic(len(clean), 0.02)
            loss = (objective(network, clean, MASK, times) * weights).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return network

    def distance(self, network, score, steps):
        drawn = objectives.sample(network, 20000, LENGTH, MASK, steps, score)
        index = (drawn * WORDS ** torch.arange(LENGTH - 1, -1, -1)).sum(1)
        seen = torch.bincount(index, minlength=WORDS ** LENGTH) / len(drawn)
        return float((seen - self.truth).abs().sum() / 2)

    # 20,000 draws of the truth itself are about 0.01 away; the rest is training and the time grid.
    def check(self, objective, score):
        network = self.train(objective, score)
        fine, coarse = self.distance(network, score, 256), self.distance(network, score, 2)
        self.assertLess(fine, 0.03)
        self.assertGreater(coarse, 2 * fine)  # what is decided at once is decided independently
        # The bound: no less than the entropy, and close to it once trained.
        entropy = -float((self.truth * self.truth.clamp_min(1e-30).log()).sum())
        with torch.no_grad():
            clean, weights = self.states.repeat(400, 1), self.truth.repeat(400) / 400
            bound = float((objective(network, clean, MASK, objectives.antithetic(len(clean), 1e-3)) * weights).sum())
        self.assertAlmostEqual(bound, entropy, delta=0.05)

    def test_masked_diffusion(self):
        self.check(objectives.masked, False)

    def test_score_entropy(self):
        self.check(objectives.score_entropy, True)

    def test_the_trainer_s_loss_is_that_of_independent_masks(self):
        rate, mask = 0.3, 0
        model = Decoder({"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
                         "intermediate_size": 32, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "tie_word_embeddings": True,
                         "max_position_embeddings": 16, "vocab_size": 12})
        ids, maskable = [1, 5, 6, 7, 8], [1, 2, 4]
        clean, exact = torch.tensor([ids]), 0.0
        for hidden in itertools.product([False, True], repeat=len(maskable)):  # every mask, by its probability
            chosen = [p for p, h in zip(maskable, hidden) if h]
            noisy = clean.clone()
            noisy[0, chosen] = mask
            with torch.no_grad():
                entropy = F.cross_entropy(model(noisy)[0], clean[0], reduction="none")
            exact += rate ** len(chosen) * (1 - rate) ** (len(maskable) - len(chosen)) * float(entropy[chosen].sum()) / rate
        count = 6000
        samples = [data.Sample(ids, maskable, 1.0, 5, 5) for _ in range(count)]
        generator = np.random.default_rng(1)
        total = 0.0
        for batch in data.batches(samples, [rate] * count, mask, generator, 4096):
            with torch.no_grad():
                total += float(train.masked_loss(model, batch, torch.device("cpu"), False)[0])
        self.assertAlmostEqual(total / count / exact, 1, delta=0.03)


if __name__ == "__main__":
    unittest.main(verbosity=2)
