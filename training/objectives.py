"""The three objectives on a Batch of training.data, and the samplers that invert two of them exactly enough to test them.

masked: MDLM / LLaDA, cross entropy at masked positions weighted 1/t (arXiv:2406.07524, 2502.09992).
block: the same with a rate of its own for each block, over BD3-LM's mask of [x_t | x_0] (arXiv:2503.09573).
score: SEDD with the absorbing graph and log-linear noise (arXiv:2310.16834).
Each gives nats, a bound on the negative log-likelihood of what is masked.
"""

import torch
from torch.nn import functional as F

from training.networks import block_diffusion_mask, padding_mask, scaled_score

EPS = 1e-3


def noise(t):
    """Log-linear noise: (sigma, its rate)."""
    return -torch.log1p(-(1 - EPS) * t), (1 - EPS) / (1 - (1 - EPS) * t)


def score_terms(log_score, clean, sigma):
    """SEDD's loss at a masked position, without the rate of the noise: zero exactly where the scores are the data's.

    log_score [..., words] without the mask token's, clean and sigma [...]."""
    e = torch.expm1(sigma)
    own = log_score.gather(-1, clean[..., None])[..., 0]
    return log_score.exp().sum(-1) - own / e - (1 + torch.log(e)) / e


def annealed_attention(batch, step, index, settings, device):
    """What a query sees while a causal model becomes bidirectional: the past, and a growing random share of the future. None at the end.

    Source: DiffuLLaMA, arXiv:2410.17891. A pure function of (seed, step, index)."""
    if step >= settings["anneal_steps"] or settings["objective"] != "masked":
        return None
    count, length = batch.ids.shape
    generator = torch.Generator().manual_seed((settings["seed"] * 1000003 + step) * 4096 + index)
    future = torch.rand(count, 1, length, length, generator=generator) < step / settings["anneal_steps"]
    return (future | torch.ones(length, length, dtype=torch.bool).tril()).to(device)


def loss(model, batch, settings, device, half):
    """Of one microbatch: the weighted sum in nats, and for the log the sum of cross entropies of masked tokens with their count."""
    ids, clean = torch.from_numpy(batch.ids).to(device), torch.from_numpy(batch.clean).to(device)
    rows, columns = torch.from_numpy(batch.rows).to(device), torch.from_numpy(batch.columns).to(device)
    targets, weights = torch.from_numpy(batch.targets).to(device), torch.from_numpy(batch.weights).to(device)
    length, positions, sigma = ids.shape[1], None, None
    allowed = padding_mask(length, batch.length, device)
    if settings["objective"] == "block":
        mask = block_diffusion_mask(length, settings["block_length"], device)
        allowed = mask if allowed is None else mask & torch.cat([allowed, allowed], -1)
        ids, positions = torch.cat([ids, clean], 1), torch.arange(length, device=device).repeat(2)
    elif settings["objective"] == "score":
        # The batch masks with probability t: the noise level at which SEDD does.
        sigma = -torch.log1p(-torch.from_numpy(batch.t).to(device).clamp(max=1 - EPS))
    elif batch.allowed is not None:
        allowed = batch.allowed if allowed is None else allowed & batch.allowed
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        logits = model.logits(model.hidden(ids, allowed, positions, sigma)[rows, columns])
    entropy = F.cross_entropy(logits, targets, reduction="none")
    if settings["objective"] != "score":
        return (entropy * weights).sum(), float(entropy.detach().sum()), len(entropy)
    mask_token, level = settings["mask_token"], sigma[rows]
    log_score = scaled_score(logits, torch.full_like(targets, mask_token), level)[..., :mask_token]
    # weights hold 1/t, t the masking probability; the rate of log-linear noise at it is (1 - EPS) / (1 - t).
    p = -torch.expm1(-level)
    terms = score_terms(log_score, targets, level) * p * (1 - EPS) / (1 - p)
    return (terms * weights).sum(), float(entropy.detach().sum()), len(entropy)


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
    assert mask_token == log_score.shape[-1] - 1, "the absorbing token is the last id"
    entropy = score_terms(log_score[..., :mask_token], clean, sigma[:, None].expand(clean.shape))
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
