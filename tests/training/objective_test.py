"""The objectives, by brute force. Needs torch.

A table, one row of logits for each partly hidden sequence, trained on a small known distribution draws samples from it (total
variation): nothing but objective and sampler is in play. And what the trainer sums up for a batch is the expectation over every
mask, written out here again from the papers, for all three objectives.
"""

import pathlib
import sys
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
try:
    import itertools
    import math

    import numpy as np
    import torch
    from torch.nn import functional as F
    from training import data, objectives
    from training.networks import Decoder, DiT, block_causal_mask, scaled_score
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


def subsets(positions, rate):
    """Every set of hidden positions with its probability."""
    for hidden in itertools.product([False, True], repeat=len(positions)):
        chosen = [p for p, h in zip(positions, hidden) if h]
        yield chosen, rate ** len(chosen) * (1 - rate) ** (len(positions) - len(chosen))


@unittest.skipIf(MISSING, MISSING)
class TrainerLossTest(unittest.TestCase):
    RATE, IDS, MASKABLE = 0.3, [1, 5, 6, 7, 8, 3], [1, 2, 4, 5]

    def setUp(self):
        torch.manual_seed(2)
        self.clean = torch.tensor([self.IDS])

    def decoder(self):
        model = Decoder({"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
                         "intermediate_size": 32, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "tie_word_embeddings": True,
                         "max_position_embeddings": 16, "vocab_size": 12})
        return self.shaken(model)

    @staticmethod
    def shaken(model):
        """Nothing at its neutral first value."""
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.2 * torch.randn_like(p))
        return model

    def noisy(self, chosen, mask):
        ids = self.clean.clone()
        ids[0, chosen] = mask
        return ids

    def mean(self, model, settings, count=6000):
        """The trainer's loss of the sample, over `count` draws of its mask."""
        samples = [data.Sample(self.IDS, self.MASKABLE, 1.0, 6, 6) for _ in range(count)]
        generator = np.random.default_rng(1)
        total = 0.0
        for batch in data.batches(samples, lambda n: [self.RATE] * n, settings["mask_token"], generator, 4096,
                                  block_length=settings.get("block_length", 0)):
            with torch.no_grad():
                total += float(objectives.loss(model, batch, settings, torch.device("cpu"), False)[0])
        return total / count

    def test_masked(self):
        model, exact = self.decoder(), 0.0
        for chosen, probability in subsets(self.MASKABLE, self.RATE):
            with torch.no_grad():
                entropy = F.cross_entropy(model(self.noisy(chosen, 0))[0], self.clean[0], reduction="none")
            exact += probability * float(entropy[chosen].sum()) / self.RATE
        self.assertAlmostEqual(self.mean(model, {"objective": "masked", "mask_token": 0}) / exact, 1, delta=0.03)

    def test_block(self):
        # As it is served: the blocks before are clean, the open one is partly hidden, nothing comes after.
        block, model, exact = 2, self.decoder(), 0.0
        for begin in range(0, len(self.IDS), block):
            inside = [p for p in self.MASKABLE if begin <= p < begin + block]
            for chosen, probability in subsets(inside, self.RATE):
                ids = self.noisy(chosen, 0)[:, :begin + block]
                with torch.no_grad():
                    logits = model(ids, block_causal_mask(begin + block, block, ids.device))[0]
                    entropy = F.cross_entropy(logits, self.clean[0, :begin + block], reduction="none")
                exact += probability * float(entropy[chosen].sum()) / self.RATE
        found = self.mean(model, {"objective": "block", "mask_token": 0, "block_length": block})
        self.assertAlmostEqual(found / exact, 1, delta=0.03)

    def test_score(self):
        mask, sigma = 12, torch.tensor([-math.log(1 - self.RATE)])
        model, exact = self.shaken(DiT(mask + 1, 16, 2, 2, 8, 16, True)), 0.0
        rate = (1 - objectives.EPS) / (1 - self.RATE)
        for chosen, probability in subsets(self.MASKABLE, self.RATE):
            with torch.no_grad():
                log_score = model(self.noisy(chosen, mask), sigma=sigma)[0].double()
            for p in chosen:
                ratio = [(1 / math.expm1(float(sigma)) if y == self.IDS[p] else 0.0) for y in range(mask)]
                exact += probability * rate * sum(
                    math.exp(log_score[p, y]) - a * float(log_score[p, y]) + (a * (math.log(a) - 1) if a else 0.0)
                    for y, a in enumerate(ratio))
        self.assertAlmostEqual(self.mean(model, {"objective": "score", "mask_token": mask}) / exact, 1, delta=0.03)


if __name__ == "__main__":
    unittest.main(verbosity=2)
