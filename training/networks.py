"""The networks that the engine serves: a RMSNorm/SwiGLU decoder (A2D Qwen3 layout) and the adaLN transformer of SEDD and MDLM.

Written for any PyTorch from 1.13 on. Statistics and the residual stream are float32, products may be bfloat16.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F


def rms_norm(x, weight, eps):
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def rotary(length, dim, theta, device):
    angles = torch.arange(length, device=device).float()[:, None] * (
        theta ** (-torch.arange(0, dim, 2, device=device).float() / dim))
    return torch.cos(angles), torch.sin(angles)


def rotate(x, cos, sin):
    """x [batch, heads, length, dim], half-split pairs (i, i + dim/2)."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def attention(q, k, v, allowed):
    """allowed: None or bool, broadcast to [batch, 1, queries, keys]."""
    if hasattr(F, "scaled_dot_product_attention"):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    return scores.softmax(-1) @ v


def padding_mask(length, lengths, device):
    """[batch, 1, 1, keys], or None where every row is full."""
    lengths = torch.as_tensor(lengths, device=device)
    if bool((lengths == length).all()):
        return None
    return (torch.arange(length, device=device)[None] < lengths[:, None])[:, None, None]


def block_causal_mask(length, block, device):
    index = torch.arange(length, device=device) // block
    return (index[:, None] >= index[None])[None, None]


def block_diffusion_mask(length, block, device):
    """BD3-LM's mask over [x_t | x_0], each `length` long (arXiv:2503.09573)."""
    index = torch.arange(length, device=device) // block
    index = torch.cat([index, index])
    clean = torch.arange(2 * length, device=device) >= length
    q, k = index[:, None], index[None]
    same_half = clean[:, None] == clean[None]
    mask = (same_half & (q == k)) | (~clean[:, None] & clean[None] & (q > k)) | (clean[:, None] & clean[None] & (q >= k))
    return mask[None, None]


class DecoderLayer(nn.Module):
    def __init__(self, c):
        super().__init__()
        d, self.heads, self.kv_heads, self.dim = c["hidden_size"], c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
        self.eps = c["rms_norm_eps"]
        self.qk_norm = c.get("qk_norm", True)
        self.input_norm, self.post_norm = nn.Parameter(torch.ones(d)), nn.Parameter(torch.ones(d))
        if self.qk_norm:
            self.q_norm, self.k_norm = nn.Parameter(torch.ones(self.dim)), nn.Parameter(torch.ones(self.dim))
        self.parts = [self.heads * self.dim, self.kv_heads * self.dim, self.kv_heads * self.dim]
        self.qkv = nn.Linear(d, sum(self.parts), bias=c.get("attention_bias", False))
        self.out = nn.Linear(self.heads * self.dim, d, bias=False)
        self.gate_up = nn.Linear(d, 2 * c["intermediate_size"], bias=False)
        self.down = nn.Linear(c["intermediate_size"], d, bias=False)
        # Muon orthogonalises what is stacked here one by one.
        self.qkv.weight.stacked, self.gate_up.weight.stacked = self.parts, [c["intermediate_size"]] * 2

    def forward(self, x, cos, sin, allowed):
        b, n, _ = x.shape
        q, k, v = self.qkv(rms_norm(x, self.input_norm, self.eps)).split(self.parts, -1)
        q, k, v = (z.view(b, n, -1, self.dim) for z in (q, k, v))
        if self.qk_norm:
            q, k = rms_norm(q, self.q_norm, self.eps), rms_norm(k, self.k_norm, self.eps)
        q, k = (rotate(z.transpose(1, 2).float(), cos, sin).to(v.dtype) for z in (q, k))
        v = v.transpose(1, 2)
        if self.kv_heads != self.heads:
            k, v = (z.repeat_interleave(self.heads // self.kv_heads, 1) for z in (k, v))
        x = x + self.out(attention(q, k, v, allowed).transpose(1, 2).reshape(b, n, -1))
        gate, up = self.gate_up(rms_norm(x, self.post_norm, self.eps)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Decoder(nn.Module):
    """config: the fields of a Qwen3 config.json, and qk_norm (Qwen3: true; Llama and Qwen2: false)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        d = config["hidden_size"]
        self.embedding = nn.Parameter(torch.randn(config["vocab_size"], d) * 0.02)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config["num_hidden_layers"]))
        self.norm = nn.Parameter(torch.ones(d))
        self.head = None if config["tie_word_embeddings"] else nn.Parameter(torch.randn(config["vocab_size"], d) * 0.02)
        for layer in self.layers:
            for linear in (layer.qkv, layer.gate_up):
                nn.init.normal_(linear.weight, std=d ** -0.5)
            for linear in (layer.out, layer.down):
                nn.init.zeros_(linear.weight)

    def hidden(self, ids, allowed=None, positions=None, sigma=None):
        x = F.embedding(ids, self.embedding)
        cos, sin = rotary(self.config["max_position_embeddings"], self.config["head_dim"], self.config["rope_theta"], ids.device)
        cos, sin = (z[:ids.shape[1]] if positions is None else z[positions] for z in (cos, sin))
        for layer in self.layers:
            x = layer(x, cos, sin, allowed)
        return rms_norm(x, self.norm, self.config["rms_norm_eps"])

    def logits(self, hidden):
        return F.linear(hidden, self.embedding if self.head is None else self.head).float()

    def forward(self, ids, allowed=None, positions=None, sigma=None):
        return self.logits(self.hidden(ids, allowed, positions))


class DiTBlock(nn.Module):
    def __init__(self, d, heads, cond):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.Module(), nn.Module()
        self.norm1.weight, self.norm2.weight = nn.Parameter(torch.ones(d)), nn.Parameter(torch.ones(d))
        self.attn_qkv, self.attn_out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(approximate="tanh"), nn.Linear(4 * d, d))
        self.adaLN_modulation = nn.Linear(cond, 6 * d)
        nn.init.zeros_(self.adaLN_modulation.weight)
        nn.init.zeros_(self.adaLN_modulation.bias)
        self.attn_qkv.weight.stacked = [d] * 3

    def forward(self, x, c, cos, sin, allowed):
        b, n, d = x.shape
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, -1)
        h = F.layer_norm(x, (d,)) * self.norm1.weight * (1 + scale1) + shift1
        q, k, v = (z.view(b, n, self.heads, -1).transpose(1, 2) for z in self.attn_qkv(h).chunk(3, -1))
        q, k = (rotate(z.float(), cos, sin).to(v.dtype) for z in (q, k))
        a = attention(q, k, v, allowed)
        x = x + gate1 * self.attn_out(a.transpose(1, 2).reshape(b, n, d))
        h = F.layer_norm(x, (d,)) * self.norm2.weight * (1 + scale2) + shift2
        return x + gate2 * self.mlp(h)


def scaled_score(out, ids, sigma):
    """SEDD's log-scores (absorb) of a network's output: scaled by the noise, and zero for the token that is there.

    out [..., vocabulary], ids [...], sigma of the first dimension."""
    noise = torch.log(torch.expm1(sigma)).view([-1] + [1] * (out.ndim - 1))
    out = out.float() - noise - math.log(out.shape[-1] - 1)
    return out.scatter(-1, ids[..., None], torch.zeros_like(out[..., :1]))


class DiT(nn.Module):
    """SEDD's network, tensor names and all. `score`: log-scores scaled by sigma (absorb); otherwise plain logits."""

    def __init__(self, vocab, d, layers, heads, cond, length, score):
        super().__init__()
        self.vocab, self.heads, self.score, self.length = vocab, heads, score, length
        self.vocab_embed = nn.Module()
        self.vocab_embed.embedding = nn.Parameter(torch.randn(vocab, d) * 0.05)
        self.sigma_map = nn.Module()
        self.sigma_map.mlp = nn.Sequential(nn.Linear(256, cond), nn.SiLU(), nn.Linear(cond, cond))
        self.blocks = nn.ModuleList(DiTBlock(d, heads, cond) for _ in range(layers))
        out = self.output_layer = nn.Module()
        out.norm_final = nn.Module()
        out.norm_final.weight = nn.Parameter(torch.ones(d))
        out.linear = nn.Linear(d, vocab)
        out.adaLN_modulation = nn.Linear(cond, 2 * d)
        for part in (out.linear, out.adaLN_modulation):
            nn.init.zeros_(part.weight)
            nn.init.zeros_(part.bias)
        self.dim = d

    def hidden(self, ids, allowed=None, positions=None, sigma=None):
        if sigma is None:
            sigma = torch.zeros(ids.shape[0], device=ids.device)
        frequency = torch.exp(-math.log(10000) * torch.arange(128, device=ids.device).float() / 128)
        angle = sigma[:, None] * frequency
        c = F.silu(self.sigma_map.mlp(torch.cat([torch.cos(angle), torch.sin(angle)], -1)))
        x = F.embedding(ids, self.vocab_embed.embedding)
        cos, sin = rotary(ids.shape[1], self.dim // self.heads, 10000.0, ids.device)
        if positions is not None:
            cos, sin = cos[positions], sin[positions]
        for block in self.blocks:
            x = block(x, c, cos, sin, allowed)
        shift, scale = self.output_layer.adaLN_modulation(c)[:, None].chunk(2, -1)
        return F.layer_norm(x, (self.dim,)) * self.output_layer.norm_final.weight * (1 + scale) + shift

    def logits(self, hidden):
        return self.output_layer.linear(hidden).float()

    def forward(self, ids, allowed=None, positions=None, sigma=None):
        out = self.logits(self.hidden(ids, allowed, positions, sigma))
        return scaled_score(out, ids, sigma) if self.score else out
