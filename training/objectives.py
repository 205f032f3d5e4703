"""Objectives on whole batches of equal length, and the samplers that invert them exactly enough to test them.

masked: MDLM / LLaDA, cross entropy at masked positions weighted 1/t. score_entropy: SEDD with the absorbing graph and
log-linear noise (arXiv:2310.16834). Both give nats a sequence, a bound on its negative log-likelihood.
"""

import torch
from torch.nn import functional as F

EPS = 1e-3


def noise(t):
    """Log-linear noise: (sigma, its rate)."""
    return -torch.log1p(-(1 - EPS) * t), (1 - EPS) / (1 - (1 - EPS) * t)


def antithetic(count, low, generator=None):
    t = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    return low + (1 - low) * t[torch.randperm(count, generator=generator)]


def masked(network, clean, mask_token, t):
    hidden = torch.rand(clean.shape) < t[:, None]
    logits = network(torch.where(hidden, mask_token, clean)).float()
    logits[..., mask_token] = float("-inf")
    entropy = F.cross_entropy(logits.transpose(1, 2), clean, reduction="none")
    return (entropy * hidden / t[:, None]).sum(1)


def score_entropy(network, clean, mask_token, t):
    sigma, rate = noise(t)
    hidden = torch.rand(clean.shape) < -torch.expm1(-sigma)[:, None]
    log_score = network(torch.where(hidden, mask_token, clean), sigma=sigma)
    e = torch.expm1(sigma)[:, None]
    others = torch.cat([log_score[..., :mask_token], log_score[..., mask_token + 1:]], -1).exp().sum(-1)
    own = log_score.gather(-1, clean[..., None])[..., 0]
    entropy = others - own / e + (1 / e) * (torch.log(1 / e) - 1)
    return (entropy * hidden * rate[:, None]).sum(1)


@torch.no_grad()
def sample(network, count, length, mask_token, steps, score):
    """Samples by ancestral steps (masked) or Tweedie tau-leaping (score); what is left at the end is filled."""
    x = torch.full((count, length), mask_token)
    times = torch.linspace(1, 1e-5, steps + 1)
    for index in range(steps + 1):
        t = times[index].expand(count)
        sigma, _ = noise(t)
        out = network(x, sigma=sigma if score else None).float()
        p = (out + torch.log(torch.expm1(sigma))[:, None, None]).exp() if score else out.clone()
        p[..., mask_token] = 0 if score else float("-inf")
        p = p / p.sum(-1, keepdim=True) if score else p.softmax(-1)
        if index < steps:
            now, then = 1 - torch.exp(-sigma), 1 - torch.exp(-noise(times[index + 1].expand(count))[0])
            p = p * ((now - then) / now)[:, None, None]
            p[..., mask_token] = (then / now)[:, None]
        drawn = torch.multinomial(p.view(-1, p.shape[-1]), 1).view(count, length)
        x = torch.where(x == mask_token, drawn, x)
    return x
