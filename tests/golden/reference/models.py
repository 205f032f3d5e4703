"""Forward passes of every family, from a checkpoint folder, in float64 (or float32).

    model = load("models/dream")
    rows = model.logits(ids)            # [len(ids), vocabulary], as the network gives them (unshifted)
    rows = model.predictions(ids)       # row i predicts position i (shifted where the family shifts)

Sources: the authors' modelling code of Dream (arXiv:2508.15487), LLaDA (arXiv:2502.09992), SDAR
(arXiv:2510.06303), dLLM's A2D (github.com/ZHZisZZ/dllm), Open-dLLM (github.com/pengzhangzhi/Open-dLLM), SEDD
(arXiv:2310.16834), MDLM (arXiv:2406.07524). The arithmetic here is the mathematical one: no intermediate
rounding to bf16.
"""
import dataclasses
import json
import math
import pathlib

import numpy as np

from . import safetensors_io


@dataclasses.dataclass
class Traits:
    """What the samplers need to know about a model."""
    family: str
    vocab_size: int
    mask_token: int                 # -1: none (uniform noise)
    tokenizer_size: int = 0         # ids from here on have no text; 0: no tokenizer
    shift: bool = False             # the prediction for position i is row i-1, row 0 for position 0
    block_length: int = 0           # > 0: block-causal attention
    eos_tokens: tuple = ()
    eot_token: int = -1
    delete_token: int = -1          # both or neither: editing models
    split_token: int = -1
    graph: str = ""                 # SEDD: "absorb" or "uniform"
    noise: str = "loglinear"        # SEDD, MDLM: noise schedule
    sigma_min: float = 0.0
    sigma_max: float = 0.0


# --- building blocks ---------------------------------------------------------------------------------

def rms_norm(x, weight, eps):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def layer_norm(x, weight, eps=1e-5):
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt(np.mean(centred * centred, axis=-1, keepdims=True) + eps) * weight


def silu(x):
    return x / (1 + np.exp(-x))


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))


def softmax(x):
    shifted = np.exp(x - x.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def log_softmax(x):
    top = x.max(axis=-1, keepdims=True)
    return x - top - np.log(np.exp(x - top).sum(axis=-1, keepdims=True))


def rotate(x, theta, rotary_dim=None, first=0):
    """Rotary embedding of [positions, heads, head_dim] at positions `first`, ..., half-split pairs
    (i, i + rotary_dim / 2) of the leading rotary_dim dimensions (all by default)."""
    if rotary_dim is not None and rotary_dim < x.shape[-1]:
        return np.concatenate([rotate(x[..., :rotary_dim], theta, first=first), x[..., rotary_dim:]], axis=-1)
    half = x.shape[-1] // 2
    frequencies = theta ** (-np.arange(half, dtype=np.float64) / half)
    angles = np.arange(first, first + x.shape[0], dtype=np.float64)[:, None] * frequencies
    cosine, sine = (f(angles)[:, None, :].astype(x.dtype) for f in (np.cos, np.sin))
    low, high = x[..., :half], x[..., half:]
    return np.concatenate([low * cosine - high * sine, high * cosine + low * sine], axis=-1)


def attend(q, k, v, visible):
    """q [n, heads, hd], k and v [m, kv_heads, hd], visible [n, m] bool (query, key) -> [n, heads * hd]."""
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    scores = np.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
    weights = softmax(np.where(visible, scores, -np.inf))
    return np.einsum("hqk,khd->qhd", weights, v).reshape(q.shape[0], -1)


def visibility(length, block_length):
    """Full attention, or block-causal: a position sees its own block and all before it."""
    blocks = np.arange(length) // block_length if block_length > 0 else np.zeros(length)
    return blocks[:, None] >= blocks[None, :]


def route(logits, config):
    """Experts of each row and their weights: (ids [n, k], weights [n, k]). `config` is that of a mixture of
    experts: LLaDA2 (sigmoid, groups, a bias for the choice alone, renormalised unless there is one), LLaDA-MoE (softmax as it is), Qwen3-MoE
    (softmax, renormalised)."""
    k = config["num_experts_per_tok"]
    bias = config.get("expert_bias", 0.0)
    if config["architectures"][0].startswith("LLaDA2"):
        scores = 1 / (1 + np.exp(-logits))
        choice = scores + bias
        grouped = choice.reshape(len(choice), config["n_group"], -1)
        group_scores = np.sort(grouped, axis=-1)[..., -2:].sum(axis=-1)
        out = np.argsort(-group_scores, axis=-1, kind="stable")[:, config["topk_group"]:]
        for row, groups in enumerate(out):
            grouped[row, groups] = -np.inf
        choice = grouped.reshape(choice.shape)
    else:
        scores = softmax(logits) + bias
        choice = scores
    ids = np.argsort(-choice, axis=-1, kind="stable")[:, :k]
    weights = np.take_along_axis(scores, ids, axis=-1)
    alone = config["architectures"][0].startswith("LLaDA2") and k == 1
    if not config["architectures"][0].startswith("LLaDAMoE") and not alone:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    return ids, weights * config.get("routed_scaling_factor", 1.0)


# --- families ----------------------------------------------------------------------------------------

class Model:
    """A loaded checkpoint. `tensors` are already in the dtype of the computation."""

    def __init__(self, config, tensors, traits):
        self.config, self.tensors, self.traits = config, tensors, traits

    def logits(self, ids, sigma=None):
        raise NotImplementedError

    def predictions(self, ids, sigma=None, **reuse):
        rows = self.logits(ids, sigma, **reuse)
        return np.concatenate([rows[:1], rows[:-1]]) if self.traits.shift else rows


class DecoderBody(Model):
    """RMSNorm, rotary attention with grouped heads, SwiGLU: Qwen2, Qwen3, Llama and LLaDA differ in names,
    biases and per-head norms."""

    def layer(self, index):
        """Tensors of a layer under common names; absent ones are None."""
        t = self.tensors
        if "model.transformer.wte.weight" in t:  # LLaDA: ff_proj is the gate, ff_out the way down
            prefix = f"model.transformer.blocks.{index}."
            names = {"norm1": "attn_norm", "q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "attn_out",
                     "norm2": "ff_norm", "gate": "ff_proj", "up": "up_proj", "down": "ff_out"}
        else:
            prefix = f"model.layers.{index}."
            names = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm",
                     **{x: f"self_attn.{x}_proj" for x in "qkvo"},
                     "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm",
                     "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
            if "model.word_embeddings.weight" in t:  # LLaDA2
                names.update(qkv="attention.query_key_value", o="attention.dense",
                             q_norm="attention.query_layernorm", k_norm="attention.key_layernorm")
        found = {short: t.get(f"{prefix}{name}.weight") for short, name in names.items()}
        found.update({short + "_bias": t.get(f"{prefix}{name}.bias") for short, name in names.items()})
        return found

    def experts(self, h, index):
        """Of a layer that has any: the weighted sum of the chosen experts, and the shared one; else None."""
        t, prefix = self.tensors, f"model.layers.{index}."
        router = t.get(prefix + "mlp.gate.weight")
        if router is None:
            return None

        def mlp(x, name):
            gate, up, down = (t[f"{prefix}{name}.{part}_proj.weight"] for part in ("gate", "up", "down"))
            return (silu(x @ gate.T) * (x @ up.T)) @ down.T

        bias = next((t[prefix + name] for name in ("mlp.gate.expert_bias", "mlp.expert_bias") if prefix + name in t),
                    0.0)
        chosen, weights = route(h @ router.T, {**self.config, "expert_bias": bias})
        out = np.zeros_like(h)
        for row in range(len(h)):
            for expert, weight in zip(chosen[row], weights[row]):
                out[row] += weight * mlp(h[row], f"mlp.experts.{expert}")
        for shared in ("mlp.shared_experts", "shared_expert"):
            if f"{prefix}{shared}.gate_proj.weight" in t:
                out = out + mlp(h, shared)
        return out

    def logits(self, ids, sigma=None, memory=None, span=None):
        """`memory` {layer: (k, v)} keeps the keys and values of this pass. With `span` (begin, end) these positions
        alone are computed, and theirs replaced; the others are those that an earlier pass left there."""
        c, t = self.config, self.tensors
        begin, end = span or (0, len(ids))
        llada = "model.transformer.wte.weight" in t
        embedding = next(name for name in ("model.transformer.wte", "model.word_embeddings", "model.embed_tokens")
                         if name + ".weight" in t)
        heads = c["n_heads"] if llada else c["num_attention_heads"]
        kv_heads = (c.get("n_kv_heads") or heads) if llada else c.get("num_key_value_heads", heads)
        eps, theta = c["rms_norm_eps"], c["rope_theta"]
        x = t[embedding + ".weight"][np.asarray(ids[begin:end])]
        n = end - begin
        visible = visibility(len(ids), self.traits.block_length)[begin:end]
        for index in range(c["n_layers"] if llada else c["num_hidden_layers"]):
            w = self.layer(index)

            def project(h, name, w=w):
                y = h @ w[name].T
                return y if w[name + "_bias"] is None else y + w[name + "_bias"]

            h = rms_norm(x, w["norm1"], eps)
            if w.get("qkv") is not None:
                q, k, v = np.split(project(h, "qkv").reshape(n, heads + 2 * kv_heads, -1),
                                   [heads, heads + kv_heads], axis=1)
            else:
                q, k, v = (project(h, name).reshape(n, count, -1)
                           for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)))
            if w.get("q_norm") is not None:  # per head, before the rotation
                q, k = rms_norm(q, w["q_norm"], eps), rms_norm(k, w["k_norm"], eps)
            rotary_dim = int(q.shape[-1] * c.get("partial_rotary_factor", 1))
            q, k = rotate(q, theta, rotary_dim, begin), rotate(k, theta, rotary_dim, begin)
            if span:
                k, v = (np.concatenate([old[:begin], new, old[end:]]) for old, new in zip(memory[index], (k, v)))
            if memory is not None:
                memory[index] = k, v
            x = x + project(attend(q, k, v, visible), "o")
            h = rms_norm(x, w["norm2"], eps)
            mixed = self.experts(h, index)
            if mixed is not None:
                x = x + mixed
                continue
            x = x + project(silu(project(h, "gate")) * project(h, "up"), "down")
        x = rms_norm(x, t["model.transformer.ln_f.weight" if llada else "model.norm.weight"], eps)
        if llada:
            head = t["model.transformer.wte.weight" if c["weight_tying"] else "model.transformer.ff_out.weight"]
        else:
            head = t["model.embed_tokens.weight" if c["tie_word_embeddings"] else "lm_head.weight"]
        return x @ head.T


def timestep_embedding(sigma, dim=256):
    """Cosines first, then sines, of sigma itself (not its logarithm)."""
    half = dim // 2
    angles = sigma * np.exp(-math.log(10000) * np.arange(half, dtype=np.float64) / half)
    return np.concatenate([np.cos(angles), np.sin(angles)])


class DiTBody(Model):
    """adaLN transformer of SEDD, MDLM and BD3-LM. SEDD gives log-scores, scaled and with the own entry 0; the others
    raw logits and, without time conditioning, sigma 0."""

    def logits(self, ids, sigma=None):
        t, mdlm = self.tensors, self.traits.family in ("mdlm", "bd3lm")
        prefix = "backbone." if mdlm else ""
        heads = self.config["n_heads"] if mdlm else self.config["model"]["n_heads"]
        blocks = self.config["n_blocks"] if mdlm else self.config["model"]["n_blocks"]
        if mdlm and not self.config["time_conditioning"]:
            sigma = 0.0

        def linear(x, name):
            y = x @ t[f"{prefix}{name}.weight"].T
            bias = t.get(f"{prefix}{name}.bias")
            return y if bias is None else y + bias

        x = t[prefix + "vocab_embed.embedding"][np.asarray(ids)]
        n = len(ids)
        visible = visibility(n, self.traits.block_length)
        embedding = timestep_embedding(sigma).astype(x.dtype)
        c = silu(linear(silu(linear(embedding, "sigma_map.mlp.0")), "sigma_map.mlp.2"))
        for index in range(blocks):
            name = f"blocks.{index}."
            shift1, scale1, gate1, shift2, scale2, gate2 = np.split(linear(c, name + "adaLN_modulation"), 6)
            h = layer_norm(x, t[f"{prefix}{name}norm1.weight"]) * (1 + scale1) + shift1
            q, k, v = np.split(linear(h, name + "attn_qkv").reshape(n, 3 * heads, -1), 3, axis=1)
            x = x + gate1 * linear(attend(rotate(q, 10000.0), rotate(k, 10000.0), v, visible), name + "attn_out")
            h = layer_norm(x, t[f"{prefix}{name}norm2.weight"]) * (1 + scale2) + shift2
            x = x + gate2 * linear(gelu_tanh(linear(h, name + "mlp.0")), name + "mlp.2")
        shift, scale = np.split(linear(c, "output_layer.adaLN_modulation"), 2)
        h = layer_norm(x, t[prefix + "output_layer.norm_final.weight"]) * (1 + scale) + shift
        out = linear(h, "output_layer.linear")
        if mdlm:
            return out
        if self.config["model"]["scale_by_sigma"]:
            out = out - math.log(math.expm1(sigma)) - math.log(out.shape[-1] - 1)
        out[np.arange(n), np.asarray(ids)] = 0
        return out


# --- loading -----------------------------------------------------------------------------------------

def special_id(directory, text):
    """Id of an added token of tokenizer.json, or -1."""
    path = directory / "tokenizer.json"
    if path.exists():
        for token in json.loads(path.read_text())["added_tokens"]:
            if token["content"] == text:
                return token["id"]
    return -1


def tokenizer_mask(directory):
    """Id of the token that tokenizer_config.json calls the mask token."""
    token = json.loads((directory / "tokenizer_config.json").read_text())["mask_token"]
    return special_id(directory, token if isinstance(token, str) else token["content"])


def eos_of(directory, config):
    """End-of-text ids: generation_config.json first, then config.json."""
    path = directory / "generation_config.json"
    eos = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
    eos = config.get("eos_token_id") if eos is None else eos
    return tuple(eos) if isinstance(eos, list) else (() if eos is None else (eos,))


def read_traits(directory, config):
    architecture = (config.get("architectures") or [""])[0]
    rows = config.get("vocab_size", 0)
    eos = eos_of(directory, config)
    if architecture == "DreamModel":
        return Traits("dream", rows, config["mask_token_id"], shift=True, eos_tokens=eos)
    if architecture == "Qwen2ForCausalLM":  # Open-dCoder: a diffusion model if its tokenizer has a mask token
        return Traits("open_dcoder", rows, tokenizer_mask(directory), shift=True, eos_tokens=eos)
    if architecture.startswith("A2D"):
        return Traits("a2d", rows, tokenizer_mask(directory), eos_tokens=eos)
    if architecture == "LLaDAModelLM":
        return Traits("llada", rows, config["mask_token_id"], eos_tokens=eos,
                      eot_token=special_id(directory, "<|eot_id|>"))
    if architecture == "SDARForCausalLM":
        return Traits("sdar", rows, config["mask_token_id"], block_length=config["block_size"], eos_tokens=eos)
    if architecture == "SDARMoeForCausalLM":
        return Traits("sdar_moe", rows, config["mask_token_id"], block_length=config["block_size"], eos_tokens=eos)
    if architecture == "RND1":
        return Traits("rnd1", rows, config["mask_token_id"], shift=True, eos_tokens=eos)
    if architecture == "LLaDAMoEModelLM":
        return Traits("llada_moe", rows, config["mask_token_id"], eos_tokens=eos)
    if architecture == "LLaDA2MoeModelLM":
        return Traits("llada2", rows, config["mask_token_id"], block_length=config["block_size"], eos_tokens=eos,
                      delete_token=config.get("delete_token_id", -1), split_token=config.get("split_token_id", -1))
    if architecture == "Fast_dLLM_QwenForCausalLM":
        return Traits("fast_dllm_v2", rows, config["mask_token_id"], shift=True, block_length=config["bd_size"],
                      eos_tokens=eos)
    if architecture == "BD3LM":
        return Traits("bd3lm", rows, rows - 1, block_length=config["block_size"])
    if architecture == "DiffusionGemmaForBlockDiffusion":
        return Traits("diffusion_gemma", config["text_config"]["vocab_size"], -1, eos_tokens=eos)
    if architecture == "MDLM":
        return Traits("mdlm", rows, rows - 1)
    if "graph" in config and "model" in config:  # SEDD names no architecture
        absorb = config["graph"]["type"] == "absorb"
        noise = config["noise"]
        return Traits("sedd", config["tokens"] + absorb, config["tokens"] if absorb else -1,
                      graph=config["graph"]["type"], noise=noise["type"],
                      sigma_min=noise["sigma_min"], sigma_max=noise["sigma_max"])
    raise ValueError(f"{directory}: unknown architecture {architecture!r}")


def load(directory, dtype=np.float64):
    directory = pathlib.Path(directory)
    config = json.loads((directory / "config.json").read_text())
    index = directory / "model.safetensors.index.json"
    if index.exists():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        files = ["model.safetensors"]
    tensors = {}
    for name in files:
        tensors.update({k: v.astype(dtype) for k, v in safetensors_io.load(directory / name).items()})
    traits = read_traits(directory, config)
    path = directory / "tokenizer.json"
    if path.exists():
        traits.tokenizer_size = 1 + max(t["id"] for t in json.loads(path.read_text())["added_tokens"])
    if traits.family == "diffusion_gemma":
        from .gemma import GemmaBody  # which builds on this module
        return GemmaBody(config, tensors, traits)
    return (DiTBody if traits.family in ("sedd", "mdlm", "bd3lm") else DecoderBody)(config, tensors, traits)
