"""DiffusionGemma: the forward pass, and its sampler with this project's random numbers.

    model.block_logits(prefix, block)                      # [len(block), vocabulary]: the first step
    model.block_logits(prefix, block, (logits, 0.8))       # conditioned on the step before, at its temperature
    generate(model, ids, given, options)                   # the whole sequence, as the sampler fills it

Source: huggingface/transformers, models/diffusion_gemma (modeling_*, generation_*). The sampler draws from
Philox4x32-10 words (Salmon et al., SC 2011), numbered as common/base/philox.h says, so that a run is
reproducible by another implementation to the token.
"""
import math

import numpy as np

from .models import Model, gelu_tanh, rms_norm, softmax
from .samplers import require


# --- the network -----------------------------------------------------------------------------------------

def rotate(x, positions, theta, angles):
    """Half-split pairs (i, i + head_dim / 2), of which the first `angles` are rotated."""
    half = x.shape[-1] // 2
    frequencies = np.where(np.arange(half) < angles, theta ** (-np.arange(half, dtype=np.float64) / half), 0.0)
    angle = np.asarray(positions, dtype=np.float64)[:, None] * frequencies
    cosine, sine = (f(angle)[:, None, :].astype(x.dtype) for f in (np.cos, np.sin))
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)


def attend(q, k, v, visible):
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    weights = softmax(np.where(visible, np.einsum("qhd,khd->hqk", q, k), -np.inf))
    return np.einsum("hqk,khd->qhd", weights, v).reshape(q.shape[0], -1)


def unit(x, eps):
    return rms_norm(x, np.ones(x.shape[-1], dtype=x.dtype), eps)


class GemmaBody(Model):
    def tensor(self, name, half="decoder."):
        return self.tensors["model." + half + name]

    def mlp(self, x, prefix):
        gate, up, down = (self.tensor(f"{prefix}{part}_proj.weight") for part in ("gate", "up", "down"))
        return (gelu_tanh(x @ gate.T) * (x @ up.T)) @ down.T

    def experts(self, x, h, prefix):
        """`h` is what the router reads."""
        c = self.config["text_config"]
        eps, k = c["rms_norm_eps"], c["top_k_experts"]
        logits = (unit(h, eps) * self.tensor(prefix + "router.scale") * h.shape[-1] ** -0.5) @ self.tensor(
            prefix + "router.proj.weight").T
        p = softmax(logits)
        gate_up, down = self.tensor(prefix + "experts.gate_up_proj"), self.tensor(prefix + "experts.down_proj")
        width = down.shape[-1]
        out = np.zeros_like(x)
        for row in range(len(x)):
            chosen = np.argsort(-p[row], kind="stable")[:k]
            for e in chosen:
                inner = gate_up[e] @ x[row]
                weight = p[row, e] / p[row, chosen].sum() * self.tensor(prefix + "router.per_expert_scale")[e]
                out[row] += weight * (down[e] @ (gelu_tanh(inner[:width]) * inner[width:]))
        return out

    def run(self, x, positions, before, causal):
        """Layers over rows at `positions`. `before`: keys and values of each layer so far, extended by an encoder
        (causal). Returns (x, keys and values)."""
        c = self.config["text_config"]
        eps, rope, window = c["rms_norm_eps"], c["rope_parameters"], c["sliding_window"]
        n, first, after = len(x), positions[0], []
        for index, kind in enumerate(c["layer_types"]):
            full, p = kind == "full_attention", f"layers.{index}."
            head_dim = c["global_head_dim"] if full else c["head_dim"]

            def norm(h, name):
                return rms_norm(h, self.tensor(f"{p}{name}.weight"), eps)

            h = norm(x, "input_layernorm")
            q = (h @ self.tensor(p + "self_attn.q_proj.weight").T).reshape(n, -1, head_dim)
            raw = (h @ self.tensor(p + "self_attn.k_proj.weight").T).reshape(n, -1, head_dim)
            v = raw if full else (h @ self.tensor(p + "self_attn.v_proj.weight").T).reshape(n, -1, head_dim)
            theta = rope[kind]["rope_theta"]
            angles = int(rope[kind].get("partial_rotary_factor", 1.0) * head_dim // 2)
            q = rotate(norm(q, "self_attn.q_norm"), positions, theta, angles)
            k = rotate(norm(raw, "self_attn.k_norm"), positions, theta, angles)
            v = unit(v, eps)
            if before is not None:
                k, v = np.concatenate([before[index][0], k]), np.concatenate([before[index][1], v])
            after.append((k, v))
            key = np.arange(len(k))[None, :]
            row = np.asarray(positions)[:, None]
            visible = key <= row if causal else key >= 0
            if not full:  # the decoder sees what the sliding cache of the encoder still holds: window - 1
                visible = visible & (key > (row if causal else np.full_like(row, first)) - window)
            a = attend(q, k, v, visible) @ self.tensor(p + "self_attn.o_proj.weight").T
            x = x + norm(a, "post_attention_layernorm")
            a = norm(self.mlp(norm(x, "pre_feedforward_layernorm"), p + "mlp."), "post_feedforward_layernorm_1")
            b = norm(self.experts(norm(x, "pre_feedforward_layernorm_2"), x, p), "post_feedforward_layernorm_2")
            x = x + norm(a + b, "post_feedforward_layernorm")
            x = x * self.tensor(p + "layer_scalar", "encoder.language_model." if causal else "decoder.")
        return x, after

    def embedded(self, ids):
        table = self.tensor("embed_tokens.weight")
        return table[np.asarray(ids)] * self.embedding_scale()

    def embedding_scale(self):
        """sqrt(width) in the dtype of the checkpoint."""
        scale = np.float32(math.sqrt(self.config["text_config"]["hidden_size"]))
        if self.config["text_config"].get("dtype") == "bfloat16":
            bits = scale.view(np.uint32)
            scale = np.uint32((int(bits) + 0x7FFF + ((int(bits) >> 16) & 1)) & 0xFFFF0000).view(np.float32)
        return self.tensors["model.decoder.embed_tokens.weight"].dtype.type(scale)

    def block_logits(self, prefix, block, previous=None):
        """Logits of a block behind `prefix`, which is encoded. `previous`: (logits of the step before, its
        temperature), or None in a block's first step."""
        c = self.config["text_config"]
        table, eps = self.tensor("embed_tokens.weight"), c["rms_norm_eps"]
        before = None
        if len(prefix):
            _, before = self.run(self.embedded(prefix), np.arange(len(prefix)), None, causal=True)
        x = self.embedded(block)
        if previous is not None:
            logits, temperature = previous
            soft = softmax(logits / temperature) @ table * self.embedding_scale()
            x = x + self.mlp(rms_norm(soft, self.tensor("self_conditioning.pre_norm.weight"), eps),
                             "self_conditioning.")
        x, _ = self.run(unit(x, eps), len(prefix) + np.arange(len(block)), before, causal=False)
        cap = c["final_logit_softcapping"]
        return cap * np.tanh(rms_norm(x, self.tensor("norm.weight"), eps) @ table.T / cap)


# --- random numbers --------------------------------------------------------------------------------------

TOKEN, INITIAL, RENOISE = 0, 3, 4  # NoiseStream


def words(seed, stream, position, step, count):
    """The first `count` random words of (seed, stream, position, step)."""
    index = np.arange((count + 3) // 4, dtype=np.uint64)
    c = [index, *(np.full_like(index, x) for x in (position, step, stream))]
    k0, k1, low, shift = seed & 0xFFFFFFFF, seed >> 32, np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(10):
        product0, product1 = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(product1 >> shift) ^ c[1] ^ np.uint64(k0), product1 & low,
             (product0 >> shift) ^ c[3] ^ np.uint64(k1), product0 & low]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack(c, axis=1).reshape(-1)[:count]


def uniform_token(seed, stream, position, step, vocabulary):
    return (int(words(seed, stream, position, step, 1)[0]) * vocabulary) >> 32


def gumbel(seed, position, step, vocabulary):
    u = (words(seed, TOKEN, position, step, vocabulary).astype(np.float64) + 0.5) / 2 ** 32
    return -np.log(-np.log(u))


# --- the sampler -----------------------------------------------------------------------------------------

def generate(model, ids, given, options):
    """Fills a canvas that reaches from the last given position to the end. Returns (ids, forward passes, events)."""
    seed, size, vocabulary = options.get("seed", 0), model.config["canvas_length"], model.traits.vocab_size
    start = given.index(False)
    assert not any(given[start:]), "given behind the first gap"
    length = start + -(-(len(ids) - start) // size) * size
    tokens = list(ids) + [0] * (length - len(ids))
    num_blocks = (length - start) // size
    steps = options.get("steps", 48 * num_blocks) // num_blocks
    high, low = options.get("temperature_start", 0.8), options.get("temperature_end", 0.4)
    bound = options.get("entropy_bound", 0.1)
    total, events = 0, set()
    for begin in range(start, length, size):
        block = [uniform_token(seed, INITIAL, begin + i, 0, vocabulary) for i in range(size)]
        previous, last, run = None, None, 0
        for step in range(steps):
            temperature = low + (high - low) * (steps - step) / steps
            logits = model.block_logits(tokens[:begin], block, previous)
            top = np.sort(logits, axis=-1)
            require((top[:, -1] - top[:, -2]).min() > 2e-3, "argmax")
            scores = logits / temperature + np.stack(
                [gumbel(seed, begin + i, total, vocabulary) for i in range(size)])
            best = np.sort(scores, axis=-1)
            require((best[:, -1] - best[:, -2]).min() > 1e-3, "draw")
            p = softmax(logits / temperature)
            entropy = -np.sum(np.where(p > 0, p * np.log(np.maximum(p, 1e-300)), 0), axis=-1)
            order = np.argsort(entropy, kind="stable")
            require(np.diff(entropy[order]).min() > 1e-4 * entropy.max(), "order")
            sums = np.cumsum(entropy[order]) - entropy[order]
            require(np.abs(sums[1:] - bound).min() > 1e-3, "bound")
            accepted = set(order[sums <= bound].tolist())
            events.add("all" if len(accepted) == size else "several" if len(accepted) > 1 else "one")
            drawn, argmax = scores.argmax(axis=-1).tolist(), logits.argmax(axis=-1).tolist()
            if any(drawn[i] != argmax[i] for i in accepted):
                events.add("drawn is not the best")
            block = [drawn[i] if i in accepted else uniform_token(seed, RENOISE, begin + i, total, vocabulary)
                     for i in range(size)]
            stable = argmax == last and run >= options.get("stable_steps", 1)
            run = run + 1 if argmax == last else 1
            require(abs(entropy.mean() - options.get("confident_entropy", 0.005)) > 1e-4, "confidence")
            total, last, previous = total + 1, argmax, (logits, temperature)
            if (stable or options.get("stable_steps", 1) == 0) and entropy.mean() < options.get("confident_entropy",
                                                                                            0.005):
                events.add("stopped early")
                break
        tokens[begin:begin + size] = last
    return tokens, total, events
