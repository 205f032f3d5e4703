"""The steps of tests/bench/shape_bench in PyTorch, written as one would: fused attention, no Python in a CUDA graph's replay.

    torch_step.py --shapes llada-8b,dream-7b --cells block:1x32@512,canvas:8x1024 [--device cuda:0] [--dtype bfloat16] [--json FILE]

A step is a forward pass over the rows, logits for all of them, and the argmax with its probability. Weights are random; times
are medians by CUDA events (on a CPU by the clock).
"""
import argparse
import json
import math
import re
import sys
import time

import torch
import torch.nn.functional as F

# layers, width, MLP, heads, heads of keys and values, vocabulary, rotary base, biases of q, k and v: as memory_checkpoint.cc
SHAPES = {
    "llada-8b": (32, 4096, 12288, 32, 32, 126464, 5e5, False),
    "dream-7b": (28, 3584, 18944, 28, 4, 152064, 1e6, True),
    "small": (12, 768, 2048, 12, 12, 32000, 1e6, False),
    "tiny": (3, 96, 160, 4, 2, 1000, 1e4, False),
}


class Model:
    def __init__(self, shape, device, dtype):
        (self.layers, self.dim, self.mlp, self.heads, self.kv_heads, self.vocabulary, self.theta, self.bias) = SHAPES[shape]
        self.head_dim = self.dim // self.heads
        self.device, self.dtype = device, dtype
        generator = torch.Generator(device=device).manual_seed(1)

        def matrix(rows, cols):
            weight = torch.empty(rows, cols, device=device, dtype=dtype)
            return weight.uniform_(-math.sqrt(3 / cols), math.sqrt(3 / cols), generator=generator)

        qkv = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.embedding = matrix(self.vocabulary, self.dim)
        self.blocks = [{"qkv": matrix(qkv, self.dim),
                        "bias": torch.zeros(qkv, device=device, dtype=dtype) if self.bias else None,
                        "o": matrix(self.dim, self.heads * self.head_dim),
                        "gate_up": matrix(2 * self.mlp, self.dim),
                        "down": matrix(self.dim, self.mlp),
                        "norm1": torch.ones(self.dim, device=device, dtype=dtype),
                        "norm2": torch.ones(self.dim, device=device, dtype=dtype)} for _ in range(self.layers)]
        self.norm = torch.ones(self.dim, device=device, dtype=dtype)
        self.head = matrix(self.vocabulary, self.dim)

    def rotary(self, first, rows):
        half = self.head_dim // 2
        frequency = self.theta ** (-torch.arange(half, device=self.device, dtype=torch.float32) / half)
        angle = torch.arange(first, first + rows, device=self.device, dtype=torch.float32)[:, None] * frequency
        return angle.cos().to(self.dtype)[:, None], angle.sin().to(self.dtype)[:, None]

    @staticmethod
    def rms(x, weight):
        return F.rms_norm(x, (x.shape[-1],), weight, 1e-6) if hasattr(F, "rms_norm") else \
            (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * weight

    @staticmethod
    def rotate(x, cosine, sine):
        a, b = x.chunk(2, -1)
        return torch.cat((a * cosine - b * sine, b * cosine + a * sine), -1)

    def attend(self, q, k, v):
        if self.heads != self.kv_heads:
            k = k.repeat_interleave(self.heads // self.kv_heads, 1)
            v = v.repeat_interleave(self.heads // self.kv_heads, 1)
        if hasattr(F, "scaled_dot_product_attention"):
            return F.scaled_dot_product_attention(q, k, v)
        return (q @ k.transpose(-1, -2) / math.sqrt(self.head_dim)).softmax(-1) @ v

    def step(self, ids, cache, cosine, sine):
        """ids [sequences, rows]; cache: per layer keys and values of the cached positions and room for the rows."""
        sequences, rows = ids.shape
        x = F.embedding(ids, self.embedding)
        for block, (keys, values) in zip(self.blocks, cache):
            qkv = F.linear(self.rms(x, block["norm1"]), block["qkv"], block["bias"]).view(sequences, rows, -1, self.head_dim)
            q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), 2)
            keys[:, :, -rows:] = self.rotate(k, cosine, sine).transpose(1, 2)
            values[:, :, -rows:] = v.transpose(1, 2)
            mixed = self.attend(self.rotate(q, cosine, sine).transpose(1, 2), keys, values)
            x = x + F.linear(mixed.transpose(1, 2).reshape(sequences, rows, -1), block["o"])
            gate, up = F.linear(self.rms(x, block["norm2"]), block["gate_up"]).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, block["down"])
        logits = F.linear(self.rms(x, self.norm), self.head).view(sequences * rows, -1)
        best, token = logits.max(-1)
        return token, torch.exp(best.float() - torch.logsumexp(logits.float(), -1))


def timed(step, device, seconds):
    """Median seconds of a call."""
    times, end = [], time.monotonic() + seconds
    for _ in range(2):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    while len(times) < 3 or (time.monotonic() < end and len(times) < 30):
        if device.type == "cuda":
            begin, finish = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            step()
            finish.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(finish) / 1e3)
        else:
            begin = time.perf_counter()
            step()
            times.append(time.perf_counter() - begin)
    return sorted(times)[len(times) // 2]


def run_cell(model, cell, device, seconds):
    kind, sequences, rows, cached = re.fullmatch(r"(block|canvas):(\d+)x(\d+)(?:@(\d+))?", cell).groups()
    sequences, rows, cached = int(sequences), int(rows), int(cached or 0)
    shape = (sequences, model.kv_heads, cached + rows, model.head_dim)
    cache = [(torch.randn(shape, device=device, dtype=model.dtype), torch.randn(shape, device=device, dtype=model.dtype))
             for _ in range(model.layers if kind == "block" else 1)]
    if kind == "canvas":
        cache *= model.layers  # one buffer: nobody reads it later
    ids = torch.randint(0, model.vocabulary, (sequences, rows), device=device)
    cosine, sine = model.rotary(cached, rows)
    result = {"cell": cell, "eager_seconds": timed(lambda: model.step(ids, cache, cosine, sine), device, seconds)}
    if device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            model.step(ids, cache, cosine, sine)
        result["graph_seconds"] = timed(graph.replay, device, seconds)
    return result


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", default="llada-8b")
    parser.add_argument("--cells", default="block:1x32@512")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--json")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cpu":
        torch.set_num_threads(2)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    results = {"torch": torch.__version__, "cuda": torch.version.cuda, "device": name, "steps": []}
    with torch.inference_mode():
        for shape in args.shapes.split(","):
            model = Model(shape, device, getattr(torch, args.dtype))
            for cell in args.cells.split(","):
                results["steps"].append({"shape": shape, "dtype": args.dtype, **run_cell(model, cell, device, args.seconds)})
                print(json.dumps(results["steps"][-1]), flush=True)
            del model
            if device.type == "cuda":
                torch.cuda.empty_cache()
    if args.json:
        with open(args.json, "w", encoding="utf-8") as out:
            json.dump(results, out, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
