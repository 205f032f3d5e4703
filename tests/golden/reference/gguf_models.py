"""GGUF files of the architectures that llama.cpp has for diffusion models, and the networks that they mean.

The names and the order of LLaDA's q and k rows are those of llama.cpp's converters (conversion/{dream,llada,qwen}.py).
"""
import json
import pathlib

import numpy as np

from . import checkpoints, gguf_io, models, safetensors_io, tokenizer

LAYER = {"input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
         "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
         "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
         "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.gate": "ffn_gate_inp"}
LLADA_LAYER = {"attn_norm": "attn_norm", "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v",
               "attn_out": "attn_output", "ff_norm": "ffn_norm", "ff_proj": "ffn_gate", "up_proj": "ffn_up",
               "ff_out": "ffn_down"}
ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
        "model.transformer.wte": "token_embd", "model.transformer.ln_f": "output_norm", "model.transformer.ff_out": "output"}
ARCHITECTURES = {"DreamModel": "dream", "LLaDAModelLM": "llada", "LLaDAMoEModelLM": "llada-moe", "RND1": "rnd1"}


def gguf_name(name):
    """(name in the file, index among the experts that are stacked there or None)."""
    stem, kind = name.rsplit(".", 1)
    if stem in ENDS:
        return f"{ENDS[stem]}.{kind}", None
    llada = stem.startswith("model.transformer.blocks.")
    layer, rest = stem[len("model.transformer.blocks." if llada else "model.layers."):].split(".", 1)
    if rest.startswith("mlp.experts."):
        expert, part = rest[len("mlp.experts."):].split(".")
        return f"blk.{layer}.ffn_{part.replace('_proj', '')}_exps.{kind}", int(expert)
    return f"blk.{layer}.{(LLADA_LAYER if llada else LAYER)[rest]}.{kind}", None


def interleaved(weight, heads):
    """Row i of the first half of a head to 2 i, row i of the second to 2 i + 1."""
    return weight.reshape(heads, 2, -1, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)


def halves(weight, heads):
    return weight.reshape(heads, -1, 2, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)


def q_and_k_heads(config, name):
    """Number of heads whose rows are interleaved in the file; 0: they are not."""
    if config["architectures"][0] != "LLaDAModelLM":
        return 0
    return {"attn_q": config.get("n_heads", 0), "attn_k": config.get("n_kv_heads", 0)}.get(name.split(".")[-2], 0)


def metadata(config, added):
    arch = ARCHITECTURES[config["architectures"][0]]
    llada = arch == "llada"
    get = lambda hf, other: config[other if llada else hf]
    made = {"general.architecture": arch, "general.name": "tiny " + arch,
            f"{arch}.vocab_size": config["vocab_size"],
            f"{arch}.context_length": get("max_position_embeddings", "max_sequence_length"),
            f"{arch}.embedding_length": get("hidden_size", "d_model"),
            f"{arch}.block_count": get("num_hidden_layers", "n_layers"),
            f"{arch}.attention.head_count": get("num_attention_heads", "n_heads"),
            f"{arch}.attention.head_count_kv": get("num_key_value_heads", "n_kv_heads"),
            f"{arch}.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
            f"{arch}.attention.causal": False, f"{arch}.rope.freq_base": float(config["rope_theta"])}
    if "intermediate_size" in config or llada:
        made[f"{arch}.feed_forward_length"] = get("intermediate_size", "mlp_hidden_size")
    if "head_dim" in config:
        made[f"{arch}.attention.key_length"] = made[f"{arch}.attention.value_length"] = config["head_dim"]
    if "num_experts" in config:
        made[f"{arch}.expert_count"] = config["num_experts"]
        made[f"{arch}.expert_used_count"] = config["num_experts_per_tok"]
        made[f"{arch}.expert_feed_forward_length"] = config.get("moe_intermediate_size") or config["expert_intermediate_size"]
    if arch in ("llada", "llada-moe"):
        made["diffusion.shift_logits"] = False
    made["tokenizer.ggml.mask_token_id"] = config["mask_token_id"]
    made["tokenizer.ggml.eos_token_id"] = config["eos_token_id"]
    if added:
        tokens = list(tokenizer.vocabulary()) + added
        unused = config["vocab_size"] - len(tokens)
        made.update({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2",
                     "tokenizer.ggml.tokens": tokens + [f"[PAD{len(tokens) + i}]" for i in range(unused)],
                     "tokenizer.ggml.token_type": [1] * len(tokenizer.vocabulary()) + [3] * len(added) + [5] * unused,
                     "tokenizer.ggml.merges": tokenizer.MERGES, "tokenizer.ggml.add_bos_token": llada})
    return made


def write(path, config, tensors, dtype_of, added=()):
    """tensors: {Hugging Face name: array}; dtype_of(name in the file, array) -> a dtype of gguf_io."""
    stacks, order = {}, {}
    for name, array in tensors.items():
        target, expert = gguf_name(name)
        if expert is None:
            heads = q_and_k_heads(config, target)
            order[target] = interleaved(array, heads) if heads else array
        else:
            stacks.setdefault(target, {})[expert] = array
    for target, experts in stacks.items():
        order[target] = np.stack([experts[e] for e in range(len(experts))])
    path.parent.mkdir(parents=True, exist_ok=True)
    gguf_io.save(path, metadata(config, list(added)),
                 {name: (array, dtype_of(name, array)) for name, array in order.items()})


def load(path, config, names, dtype=np.float64):
    """The network of a file: its values, exactly, under the names of `config`'s family."""
    stored = gguf_io.load(path)
    tensors = {}
    for name in names:
        target, expert = gguf_name(name)
        array = stored[target] if expert is None else stored[target][expert]
        heads = q_and_k_heads(config, target)
        tensors[name] = (halves(array, heads) if heads else array).astype(dtype)
    return models.DecoderBody(config, tensors, models.read_traits(pathlib.Path("/nowhere"), config))


# --- the files -----------------------------------------------------------------------------------------------

def from_folder(folder):
    config = json.loads((folder / "config.json").read_text())
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(safetensors_io.load(file))
    path = folder / "tokenizer.json"
    added = [t["content"] for t in json.loads(path.read_text())["added_tokens"]] if path.exists() else []
    return config, tensors, added


def floats(dtype):
    return lambda name, array: dtype if array.ndim > 1 else "F32"


def mixed(name, array):
    """Block formats of 32, one for each role, so that a product of q, k and v has three; gate and up differ."""
    if array.ndim == 1 or name.endswith("gate_inp.weight"):
        return "F32"
    return {"attn_q": "Q8_0", "attn_k": "Q4_0", "attn_v": "Q4_1", "attn_output": "Q8_0", "ffn_gate": "Q4_1",
            "ffn_up": "Q8_0", "ffn_down": "Q4_0", "ffn_gate_exps": "Q8_0", "ffn_up_exps": "Q8_0",
            "ffn_down_exps": "Q4_1", "token_embd": "Q4_1", "output": "Q8_0"}[name.split(".")[-2]]


def k_quants(name, array):
    if array.ndim == 1:
        return "F32"
    return "Q6_K" if name.split(".")[-2] in ("attn_v", "ffn_down", "output") else "Q4_K"


def decoder(architecture, seed, **changes):
    """Like the tiny checkpoints, but as wide as blocks ask for."""
    config = {"architectures": [architecture], "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 3000.0, "vocab_size": 101,
              "max_position_embeddings": 2048, "mask_token_id": 97, "eos_token_id": 93, "tie_word_embeddings": False,
              "intermediate_size": 96, **changes}
    draw = checkpoints.Draw(seed)
    tensors = checkpoints.decoder_tensors(draw, config, qkv_bias=architecture == "DreamModel",
                                          qk_norm=architecture != "DreamModel", mask=97)
    if "num_experts" in config:
        checkpoints.expert_tensors(draw, tensors, config, range(config["num_hidden_layers"]),
                                   config.get("moe_intermediate_size") or config["expert_intermediate_size"])
    return config, tensors, []


def wide_llada(seed):
    """One layer of width 256, the blocks of Q4_K and Q6_K."""
    config = {"architectures": ["LLaDAModelLM"], "d_model": 256, "n_layers": 1, "n_heads": 8, "n_kv_heads": 1,
              "mlp_hidden_size": 256, "rms_norm_eps": 1e-05, "rope_theta": 3000.0, "vocab_size": 101,
              "embedding_size": 101, "max_sequence_length": 2048, "mask_token_id": 97, "eos_token_id": 93,
              "weight_tying": False}
    draw, d, p = checkpoints.Draw(seed), 256, "model.transformer.blocks.0."
    t = {"model.transformer.wte.weight": draw.normal(101, d), p + "attn_norm.weight": draw.norm(d),
         p + "q_proj.weight": draw.matrix(d, d, 2.4), p + "k_proj.weight": draw.matrix(32, d, 2.4),
         p + "v_proj.weight": draw.matrix(32, d, 1.5), p + "attn_out.weight": draw.matrix(d, d, 1.6),
         p + "ff_norm.weight": draw.norm(d), p + "ff_proj.weight": draw.matrix(256, d, 1.5),
         p + "up_proj.weight": draw.matrix(256, d, 1.5), p + "ff_out.weight": draw.matrix(d, 256, 1.5),
         "model.transformer.ln_f.weight": draw.norm(d), "model.transformer.ff_out.weight": draw.matrix(101, d, 3.4)}
    return config, t, []


# name -> (function of the models folder giving (config, tensors, added tokens), dtype of each tensor)
FILES = {
    "dream_f32": (lambda out: from_folder(out / "dream"), floats("F32")),
    "llada_f16": (lambda out: from_folder(out / "llada"), floats("F16")),
    "rnd1_bf16": (lambda out: from_folder(out / "rnd1_bf16"), floats("BF16")),
    "dream_mixed": (lambda out: decoder("DreamModel", 141), mixed),
    "rnd1_mixed": (lambda out: decoder("RND1", 142, head_dim=16, num_experts=4, num_experts_per_tok=2,
                                       moe_intermediate_size=32, norm_topk_prob=True), mixed),
    "llada_moe_mixed": (lambda out: decoder("LLaDAMoEModelLM", 143, head_dim=16, num_experts=4, num_experts_per_tok=2,
                                            expert_intermediate_size=32, norm_topk_prob=False, qk_layernorm=True), mixed),
    "llada_k": (lambda out: wide_llada(144), k_quants),
}

QUANTIZED = ("dream_mixed", "rnd1_mixed", "llada_moe_mixed", "llada_k")


def make(out):
    """Writes every file into the models folder `out`."""
    for name, (source, dtype_of) in FILES.items():
        config, tensors, added = source(out)
        write(out / f"{name}.gguf", config, tensors, dtype_of, added)


def loaded(out, name, dtype=np.float64):
    config, tensors, _ = FILES[name][0](out)
    return load(out / f"{name}.gguf", config, list(tensors), dtype)
