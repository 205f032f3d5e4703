"""Writes the tiny checkpoints, in the authors' file layout, with seeded random weights.

Sizes are odd on purpose: no width, vocabulary or head size is a multiple of 16. Weights are drawn so that
the distributions are peaked but varied, and the mask token is rarely the best one.
"""
import json
import pathlib

import numpy as np

from . import safetensors_io, tokenizer


class Draw:
    """Seeded normal-like numbers, the same bits everywhere: sums of uniforms, no library functions."""

    def __init__(self, seed):
        self.random = np.random.RandomState(seed)

    def normal(self, *shape):
        uniforms = self.random.random_sample((6, *shape))
        total = uniforms[0] + uniforms[1] + uniforms[2] + uniforms[3] + uniforms[4] + uniforms[5]
        return (total - 3.0) * 2.0 ** 0.5

    def matrix(self, rows, cols, gain=1.0):
        return self.normal(rows, cols) * (gain / cols ** 0.5)

    def norm(self, size):
        return 1.0 + 0.2 * self.normal(size)


def write_text(path, value):
    text = value if isinstance(value, str) else json.dumps(value, indent=2) + "\n"
    path.write_text(text, encoding="utf-8")


def write(directory, config, tensors, dtype="F32", shards=1, others=None):
    """config.json, model.safetensors (or shards with their index), and `others` {name: text or JSON}."""
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_text(directory / "config.json", config)
    for name, value in (others or {}).items():
        write_text(directory / name, value)
    if shards == 1:
        safetensors_io.save(directory / "model.safetensors", tensors, dtype, {"format": "pt"})
        return
    names = list(tensors)  # in the order of the network
    weight_map, total = {}, 0
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = names[shard * len(names) // shards:(shard + 1) * len(names) // shards]
        safetensors_io.save(directory / file, {n: tensors[n] for n in part}, dtype, {"format": "pt"})
        weight_map.update({n: file for n in part})
        total += sum(tensors[n].size for n in part) * (4 if dtype == "F32" else 2)
    write_text(directory / "model.safetensors.index.json",
               {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


# --- RMSNorm bodies ------------------------------------------------------------------------------------

def damp_row(table, row, by=0.3):
    """Makes a row (or a slice of rows) unlikely to be predicted."""
    table[row] *= by


def decoder_tensors(draw, config, qkv_bias=False, qk_norm=False, mask=None, unused=None, head_gain=3.4):
    """Names of Qwen2, Qwen3 and Llama. Rows from `unused` on have no text."""
    d, ffn = config["hidden_size"], config["intermediate_size"]
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    hd = config.get("head_dim", d // heads)
    tied = config["tie_word_embeddings"]
    t = {"model.embed_tokens.weight": draw.normal(config["vocab_size"], d) * (head_gain / d ** 0.5 if tied else 1.0)}
    for n in range(config["num_hidden_layers"]):
        p = f"model.layers.{n}."
        t[p + "input_layernorm.weight"] = draw.norm(d)
        for name, rows, gain in (("q", heads * hd, 2.4), ("k", kv * hd, 2.4), ("v", kv * hd, 1.5)):
            t[f"{p}self_attn.{name}_proj.weight"] = draw.matrix(rows, d, gain)
            if qkv_bias:
                t[f"{p}self_attn.{name}_proj.bias"] = 0.4 * draw.normal(rows)
        t[p + "self_attn.o_proj.weight"] = draw.matrix(d, heads * hd, 1.6)
        if qk_norm:
            t[p + "self_attn.q_norm.weight"] = 2.3 * draw.norm(hd)
            t[p + "self_attn.k_norm.weight"] = 2.3 * draw.norm(hd)
        t[p + "post_attention_layernorm.weight"] = draw.norm(d)
        t[p + "mlp.gate_proj.weight"] = draw.matrix(ffn, d, 1.5)
        t[p + "mlp.up_proj.weight"] = draw.matrix(ffn, d, 1.5)
        t[p + "mlp.down_proj.weight"] = draw.matrix(d, ffn, 1.5)
    t["model.norm.weight"] = draw.norm(d)
    if not tied:
        t["lm_head.weight"] = draw.matrix(config["vocab_size"], d, head_gain)
    damp_row(t["model.embed_tokens.weight"], mask)  # so that masked positions differ by what they attend to
    head = t["model.embed_tokens.weight" if tied else "lm_head.weight"]
    if not tied:
        damp_row(head, mask)
    if unused is not None:
        damp_row(head, slice(unused, None))
    return t


def qwen_special(*texts):
    """Qwen's first three added tokens, then `texts`; returns (all texts, {text: id})."""
    added = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *texts]
    return added, {text: tokenizer.FIRST_ADDED_ID + i for i, text in enumerate(added)}


def dream(directory, dtype="F32", seed=101):
    added, ids = qwen_special("<|beginoftext|>", "<|mask|>")
    config = {
        "architectures": ["DreamModel"], "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
        "bos_token_id": ids["<|beginoftext|>"], "eos_token_id": ids["<|endoftext|>"], "hidden_act": "silu",
        "hidden_size": 36, "initializer_range": 0.02, "intermediate_size": 46,
        "mask_token_id": ids["<|mask|>"], "max_position_embeddings": 2048, "max_window_layers": 2,
        "model_type": "Dream", "num_attention_heads": 6, "num_hidden_layers": 2, "num_key_value_heads": 2,
        "pad_token_id": ids["<|endoftext|>"], "rms_norm_eps": 1e-06, "rope_scaling": None,
        "rope_theta": 10000.0, "sliding_window": None, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False, "vocab_size": 277}
    tensors = decoder_tensors(Draw(seed), config, qkv_bias=True, mask=ids["<|mask|>"],
                              unused=max(ids.values()) + 1)
    write(directory, config, tensors, dtype, others={
        **tokenizer.files(added, "<|endoftext|>", "<|mask|>", slow_files=True),
        "generation_config.json": {"_from_model_config": True, "bos_token_id": ids["<|beginoftext|>"],
                                   "eos_token_id": ids["<|endoftext|>"],
                                   "pad_token_id": ids["<|endoftext|>"]}})


def open_dcoder(directory, dtype="F32", seed=102):
    added, ids = qwen_special("<M>")
    config = {
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|endoftext|>"], "hidden_act": "silu", "hidden_size": 42,
        "initializer_range": 0.02, "intermediate_size": 58, "max_position_embeddings": 2048,
        "max_window_layers": 2, "model_type": "qwen2", "num_attention_heads": 7, "num_hidden_layers": 2,
        "num_key_value_heads": 1, "rms_norm_eps": 1e-06, "rope_theta": 1000.0, "sliding_window": 2048,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True,
        "use_sliding_window": False, "vocab_size": 275}
    tensors = decoder_tensors(Draw(seed), config, qkv_bias=True, mask=ids["<M>"], unused=max(ids.values()) + 1)
    write(directory, config, tensors, dtype, others={
        **tokenizer.files(added, "<|endoftext|>", "<M>"),
        "generation_config.json": {"eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]]}})


def a2d(directory, kind, dtype="F32", seed=103):
    added, ids = qwen_special("<|mask|>")
    config = {
        "architectures": [{"qwen3": "A2DQwen3LMHeadModel", "qwen2": "A2DQwen2LMHeadModel",
                           "llama": "A2DLlamaLMHeadModel"}[kind]],
        "attention_dropout": 0.0, "bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"],
        "hidden_act": "silu", "hidden_size": 36, "initializer_range": 0.02, "intermediate_size": 39,
        "max_position_embeddings": 2048, "model_type": f"a2d-{kind}", "num_attention_heads": 4,
        "num_hidden_layers": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_scaling": None,
        "rope_theta": 5000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True,
        "vocab_size": 281}
    if kind == "qwen3":
        config.update(attention_bias=False, head_dim=14, max_window_layers=2, sliding_window=None,
                      use_sliding_window=False)
    elif kind == "qwen2":
        config.update(hidden_size=40, max_window_layers=2, sliding_window=None, use_sliding_window=False)
    else:
        config.update(attention_bias=False, head_dim=10, mlp_bias=False, num_hidden_layers=3,
                      intermediate_size=35, pretraining_tp=1, rms_norm_eps=1e-05, rope_theta=500.0)
    tensors = decoder_tensors(Draw(seed), config, qkv_bias=kind == "qwen2", qk_norm=kind == "qwen3",
                              mask=ids["<|mask|>"], unused=max(ids.values()) + 1)
    write(directory, config, tensors, dtype, others={
        **tokenizer.files(added, "<|im_end|>", "<|mask|>", merges_as_pairs=kind == "llama"),
        "generation_config.json": {"eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]]}})


def sdar(directory, block_size, dtype="F32", shards=1, seed=106):
    """Block 4 comes with a tokenizer, block 8 without one (and with a small vocabulary)."""
    added, ids = qwen_special("<|MASK|>")
    small = block_size == 8
    mask, eos, turn_end = (97, 93, 95) if small else (ids["<|MASK|>"], ids["<|endoftext|>"], ids["<|im_end|>"])
    config = {
        "architectures": ["SDARForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_sdar.SDARConfig",
                     "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM"},
        "block_size": block_size, "bos_token_id": eos, "debug": False, "eos_token_id": eos,
        "ep_size": 1, "fuse_cross_entropy": True, "head_dim": 10, "hidden_act": "silu",
        "hidden_size": 42 if small else 34, "initializer_range": 0.02,
        "intermediate_size": 47 if small else 41, "mask_token_id": mask,
        "max_position_embeddings": 2048, "max_window_layers": 2, "micro_forward": False,
        "model_type": "sdar", "num_attention_heads": 6 if small else 4, "num_hidden_layers": 2,
        "num_key_value_heads": 3 if small else 2, "rms_norm_eps": 1e-06, "rope_scaling": None,
        "rope_theta": 20000 if small else 2000.0, "skip_checkpoint": False, "sliding_window": None,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
        "use_deepep": False, "use_sliding_window": False, "vocab_size": 101 if small else 277}
    others = {"generation_config.json": {"bos_token_id": eos, "do_sample": True,
                                         "eos_token_id": [turn_end, eos], "pad_token_id": eos,
                                         "temperature": 0.6, "top_k": 20, "top_p": 0.95}}
    if not small:
        others.update(tokenizer.files(added, "<|endoftext|>", "<|MASK|>"))
    tensors = decoder_tensors(Draw(seed), config, qk_norm=True, mask=mask,
                              unused=None if small else max(ids.values()) + 1)
    write(directory, config, tensors, dtype, shards, others)


def llada(directory, kv_heads=None, dtype="F32", shards=1, seed=108):
    """The full variant has a tokenizer; the grouped one has none."""
    added = ["<|startoftext|>", "<|endoftext|>", "<|mdm_mask|>", "<|start_header_id|>", "<|end_header_id|>",
             "<|eot_id|>"]
    ids = {text: tokenizer.FIRST_ADDED_ID + i for i, text in enumerate(added)}
    grouped = kv_heads is not None
    d, heads, ffn = (40, 4, 59) if grouped else (36, 6, 31)
    eos, mask, rows = (125, 127, 131) if grouped else (ids["<|endoftext|>"], ids["<|mdm_mask|>"], 279)
    config = {
        "activation_type": "silu", "alibi": False, "alibi_bias_max": 8.0, "architectures": ["LLaDAModelLM"],
        "attention_dropout": 0.0, "attention_layer_norm": False, "attention_layer_norm_with_affine": True,
        "auto_map": {"AutoConfig": "configuration_llada.LLaDAConfig",
                     "AutoModel": "modeling_llada.LLaDAModelLM",
                     "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM"},
        "bias_for_layer_norm": False, "block_group_size": 1, "block_type": "llama", "d_model": d,
        "embedding_dropout": 0.0, "embedding_size": rows, "eos_token_id": eos, "flash_attention": False,
        "include_bias": False, "include_qkv_bias": False, "init_cutoff_factor": None, "init_device": "meta",
        "init_fn": "mitchell", "init_std": 0.02, "input_emb_norm": False, "layer_norm_type": "rms",
        "layer_norm_with_affine": True, "mask_token_id": mask, "max_sequence_length": 2048,
        "mlp_hidden_size": ffn, "mlp_ratio": 4, "model_type": "llada", "multi_query_attention": None,
        "n_heads": heads, "n_kv_heads": kv_heads or heads, "n_layers": 2, "pad_token_id": eos,
        "precision": "amp_bf16", "residual_dropout": 0.0, "rms_norm_eps": 1e-05, "rope": True,
        "rope_full_precision": True, "rope_theta": 3000.0, "scale_logits": False, "use_cache": False,
        "vocab_size": rows, "weight_tying": False}
    draw, hd, kv = Draw(seed), d // heads, kv_heads or heads
    t = {"model.transformer.wte.weight": draw.normal(rows, d)}
    for n in range(2):
        p = f"model.transformer.blocks.{n}."
        t[p + "attn_norm.weight"] = draw.norm(d)
        t[p + "q_proj.weight"] = draw.matrix(d, d, 2.4)
        t[p + "k_proj.weight"] = draw.matrix(kv * hd, d, 2.4)
        t[p + "v_proj.weight"] = draw.matrix(kv * hd, d, 1.5)
        t[p + "attn_out.weight"] = draw.matrix(d, d, 1.6)
        t[p + "ff_norm.weight"] = draw.norm(d)
        t[p + "ff_proj.weight"] = draw.matrix(ffn, d, 1.5)
        t[p + "up_proj.weight"] = draw.matrix(ffn, d, 1.5)
        t[p + "ff_out.weight"] = draw.matrix(d, ffn, 1.5)
    t["model.transformer.ln_f.weight"] = draw.norm(d)
    t["model.transformer.ff_out.weight"] = draw.matrix(rows, d, 3.4)
    damp_row(t["model.transformer.wte.weight"], mask)
    if grouped:  # the mask token is often the best one here: it must not be picked, but it counts
        t["model.transformer.ff_out.weight"][mask] *= 1.4
    else:        # end of text is predicted often enough for the EOS switches to matter
        damp_row(t["model.transformer.ff_out.weight"], mask)
        damp_row(t["model.transformer.ff_out.weight"], slice(max(ids.values()) + 1, None))
        t["model.transformer.ff_out.weight"][eos] *= 1.6
        t["model.transformer.ff_out.weight"][ids["<|eot_id|>"]] *= 1.5
    others = {"generation_config.json": {"_from_model_config": True, "eos_token_id": eos, "pad_token_id": eos}}
    if not grouped:
        others.update(tokenizer.files(added, "<|endoftext|>", None))
    write(directory, config, t, dtype, shards, others)


# --- mixtures of experts ----------------------------------------------------------------------------------

def expert_tensors(draw, t, config, layers, width, router_gain=3.0, shared=None, shared_name="mlp.shared_experts",
                   bias_name=None):
    """Puts experts in the place of the MLP of `layers`. The router is far from even, so that no choice hangs on
    the last bit."""
    d, count = config["hidden_size"], config["num_experts"]
    for n in layers:
        p = f"model.layers.{n}."
        for part in ("gate", "up", "down"):
            t.pop(f"{p}mlp.{part}_proj.weight")
        t[p + "mlp.gate.weight"] = draw.matrix(count, d, router_gain)
        if bias_name:
            t[p + bias_name] = 0.15 * draw.normal(count)
        for name, wide in [(f"mlp.experts.{e}", width) for e in range(count)] + ([(shared_name, shared)] if shared else []):
            t[f"{p}{name}.gate_proj.weight"] = draw.matrix(wide, d, 1.5)
            t[f"{p}{name}.up_proj.weight"] = draw.matrix(wide, d, 1.5)
            t[f"{p}{name}.down_proj.weight"] = draw.matrix(d, wide, 1.5)


def qwen3_moe(directory, architecture, seed, dtype="F32"):
    """SDAR-MoE (block-causal) and RND1 (full attention, shifted): the second layer of three is dense in SDAR's."""
    sdar_moe = architecture == "SDARMoeForCausalLM"
    mask, eos, turn_end = 97, 93, 95
    config = {
        "architectures": [architecture], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": eos,
        "decoder_sparse_step": 1, "eos_token_id": turn_end, "head_dim": 10, "hidden_act": "silu", "hidden_size": 34,
        "initializer_range": 0.02, "intermediate_size": 41, "mask_token_id": mask, "max_position_embeddings": 2048,
        "max_window_layers": 2, "mlp_only_layers": [1] if sdar_moe else [],
        "model_type": "sdar_moe" if sdar_moe else "rnd1", "moe_intermediate_size": 9, "norm_topk_prob": True,
        "num_attention_heads": 4, "num_experts": 6, "num_experts_per_tok": 3, "num_hidden_layers": 3 if sdar_moe else 2,
        "num_key_value_heads": 2, "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_scaling": None,
        "rope_theta": 3000.0, "router_aux_loss_coef": 0.001, "sliding_window": None, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False, "vocab_size": 101}
    if sdar_moe:
        config["block_size"] = 4
    draw = Draw(seed)
    tensors = decoder_tensors(draw, config, qk_norm=True, mask=mask)
    layers = [n for n in range(config["num_hidden_layers"]) if n not in config["mlp_only_layers"]]
    expert_tensors(draw, tensors, config, layers, config["moe_intermediate_size"])
    write(directory, config, tensors, dtype, others={
        "generation_config.json": {"eos_token_id": [turn_end, eos]}})


def llada_moe(directory, seed):
    """Experts in the second layer alone, with a shared one beside."""
    mask, eos = 97, 93
    config = {
        "architectures": ["LLaDAMoEModelLM"], "attention_bias": False, "attention_dropout": 0.0, "clip_qkv": None,
        "dense_intermediate_size": 41, "eos_token_id": eos, "expert_intermediate_size": 11, "hidden_act": "silu",
        "hidden_size": 36, "initializer_range": 0.02, "mask_token_id": mask, "max_position_embeddings": 2048,
        "model_type": "llada", "moe_layer_freq": [0, 1], "moe_router_enable_expert_bias": False,
        "moe_router_score_function": "softmax", "norm_topk_prob": False, "num_attention_heads": 3, "num_experts": 6,
        "num_experts_per_tok": 2, "num_hidden_layers": 2, "num_key_value_heads": 3, "pad_token_id": eos,
        "partial_rotary_factor": 1, "qk_layernorm": True, "rms_norm_eps": 1e-05, "rope_scaling": None,
        "rope_theta": 5000.0, "routed_scaling_factor": 1, "router_num_group": None, "router_topk_group": None,
        "shared_expert_intermediate_size": 9, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "use_cache": False, "vocab_size": 101}
    draw = Draw(seed)
    tensors = decoder_tensors(draw, {**config, "intermediate_size": config["dense_intermediate_size"]}, qk_norm=True,
                              mask=mask)
    expert_tensors(draw, tensors, config, [1], config["expert_intermediate_size"],
                   shared=config["shared_expert_intermediate_size"], shared_name="shared_expert")
    write(directory, config, tensors)


def llada2(directory, seed, dtype="F32", edits=False):
    """With `edits` it predicts insertions, deletions and the mask token often."""
    mask, eos = 97, 93
    config = {
        "architectures": ["LLaDA2MoeModelLM"], "attention_dropout": 0.0, "block_size": 8, "eos_token_id": eos,
        "first_k_dense_replace": 1, "head_dim": 12, "hidden_act": "silu", "hidden_size": 30, "initializer_range": 0.02,
        "intermediate_size": 33, "mask_token_id": mask, "max_position_embeddings": 2048, "model_type": "llada2_moe",
        "moe_intermediate_size": 5, "moe_router_enable_expert_bias": True, "n_group": 4, "norm_topk_prob": True,
        "num_attention_heads": 4, "num_experts": 12, "num_experts_per_tok": 4, "num_hidden_layers": 3,
        "num_key_value_heads": 2, "num_shared_experts": 2, "pad_token_id": eos, "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 2000, "routed_scaling_factor": 2.5,
        "score_function": "sigmoid", "tie_word_embeddings": False, "topk_group": 2, "torch_dtype": "bfloat16",
        "use_bias": False, "use_cache": True, "use_qk_norm": True, "use_qkv_bias": False, "vocab_size": 101}
    if edits:
        config.update(delete_token_id=98, split_token_id=99)
    draw = Draw(seed)
    t = decoder_tensors(draw, config, qk_norm=True, mask=mask)
    if edits:
        t["lm_head.weight"][mask] *= 4.0
        t["lm_head.weight"][98:100] *= 1.3
    expert_tensors(draw, t, config, [1, 2], config["moe_intermediate_size"], shared=10,
                   bias_name="mlp.gate.expert_bias")
    renamed = {"model.embed_tokens": "model.word_embeddings", "self_attn.o_proj": "attention.dense",
               "self_attn.q_norm": "attention.query_layernorm", "self_attn.k_norm": "attention.key_layernorm"}
    tensors = {}
    for name, tensor in t.items():
        for old, new in renamed.items():
            name = name.replace(old, new)
        if "self_attn.q_proj" in name:
            parts = [t[name.replace("q_proj", x + "_proj")] for x in "qkv"]
            tensors[name.replace("self_attn.q_proj", "attention.query_key_value")] = np.concatenate(parts)
        elif "self_attn" not in name:
            tensors[name] = tensor
    write(directory, config, tensors, dtype)


# --- adaLN bodies --------------------------------------------------------------------------------------

def dit_tensors(draw, rows, d, heads, cond, blocks, prefix="", damp=None):
    t = {"vocab_embed.embedding": draw.normal(rows, d)}

    def linear(name, out, into, gain, bias=True):
        t[name + ".weight"] = draw.matrix(out, into, gain)
        if bias:
            t[name + ".bias"] = 0.2 * draw.normal(out)

    linear("sigma_map.mlp.0", cond, 256, 1.4)
    linear("sigma_map.mlp.2", cond, cond, 1.4)
    half = d // heads // 2
    t["rotary_emb.inv_freq"] = 10000.0 ** (-np.arange(half) / half)
    for n in range(blocks):
        p = f"blocks.{n}."
        t[p + "norm1.weight"] = draw.norm(d)
        linear(p + "attn_qkv", 3 * d, d, 2.4, bias=False)
        linear(p + "attn_out", d, d, 1.6, bias=False)
        t[p + "norm2.weight"] = draw.norm(d)
        linear(p + "mlp.0", 4 * d, d, 1.5)
        linear(p + "mlp.2", d, 4 * d, 1.5)
        linear(p + "adaLN_modulation", 6 * d, cond, 0.8)
        t[p + "adaLN_modulation.bias"][2 * d:3 * d] += 1.0  # open gates
        t[p + "adaLN_modulation.bias"][5 * d:] += 1.0
    t["output_layer.norm_final.weight"] = draw.norm(d)
    linear("output_layer.linear", rows, d, 2.5)
    linear("output_layer.adaLN_modulation", 2 * d, cond, 0.5)
    if damp is not None:
        damp_row(t["output_layer.linear.weight"], damp)
        damp_row(t["vocab_embed.embedding"], damp)
    return {prefix + name: tensor for name, tensor in t.items()}


def sedd(directory, graph, noise, seed):
    tokens = 83
    absorb = graph == "absorb"
    config = {
        "data": {"cache_dir": "data", "train": "openwebtext", "valid": "wikitext103"},
        "eval": {"batch_size": 512, "perplexity": True, "perplexity_batch_size": 32},
        "graph": {"file": "data", "report_all": False, "type": graph},
        "model": {"cond_dim": 9, "dropout": 0.1, "hidden_size": 28, "length": 1024, "n_blocks": 2,
                  "n_heads": 2, "name": "tiny", "scale_by_sigma": absorb, "type": "ddit"},
        "ngpus": 8, "noise": {"sigma_max": 20, "sigma_min": 0.0001, "type": noise},
        "optim": {"beta1": 0.9, "beta2": 0.999, "eps": 1e-08, "grad_clip": 1.0, "lr": 0.0003,
                  "optimizer": "AdamW", "warmup": 2500, "weight_decay": 0},
        "sampling": {"noise_removal": True, "predictor": "euler", "steps": 128},
        "tokens": tokens,
        "training": {"accum": 1, "batch_size": 512, "ema": 0.9999, "n_iters": 1300001}}
    write(directory, config, dit_tensors(Draw(seed), tokens + absorb, 28, 2, 9, 2))


def mdlm(directory, seed=111):
    config = {
        "_name_or_path": "kuleshov-group/mdlm-owt", "architectures": ["MDLM"],
        "auto_map": {"AutoConfig": "configuration_mdlm.MDLMConfig", "AutoModelForMaskedLM": "modeling_mdlm.MDLM"},
        "cond_dim": 9, "dropout": 0.1, "hidden_dim": 28, "model_length": 1024, "model_type": "mdlm",
        "n_blocks": 2, "n_heads": 2, "return_dict": False, "time_conditioning": False,
        "torch_dtype": "float32", "vocab_size": 89}
    write(directory, config, dit_tensors(Draw(seed), 89, 28, 2, 9, 2, prefix="backbone.", damp=88))


def fast_dllm_v2(directory, seed):
    mask, eos, turn_end = 97, 93, 95
    config = {
        "architectures": ["Fast_dLLM_QwenForCausalLM"], "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration.Fast_dLLM_QwenConfig", "AutoModelForCausalLM":
                     "modeling.Fast_dLLM_QwenForCausalLM"},
        "bd_size": 16, "bos_token_id": eos, "eos_token_id": turn_end, "hidden_act": "silu", "hidden_size": 36,
        "initializer_range": 0.02, "intermediate_size": 46, "mask_token_id": mask, "max_position_embeddings": 2048,
        "max_window_layers": 2, "model_type": "Fast_dLLM_Qwen", "num_attention_heads": 6, "num_hidden_layers": 2,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 4000.0,
        "sliding_window": None, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": False,
        "use_sliding_window": False, "vocab_size": 101}
    tensors = decoder_tensors(Draw(seed), config, qkv_bias=True, mask=mask)
    write(directory, config, tensors, others={"generation_config.json": {"eos_token_id": [turn_end, eos]}})


def bd3lm(directory, seed):
    config = {
        "_name_or_path": "kuleshov-group/bd3lm-owt-block_size8", "adaln": True, "architectures": ["BD3LM"],
        "attn_backend": "sdpa", "auto_map": {"AutoConfig": "configuration_bd3lm.BD3LMConfig", "AutoModelForMaskedLM":
                                             "modeling_bd3lm.BD3LM"},
        "block_size": 8, "causal": False, "cond_dim": 9, "cross_attn": True, "dropout": 0.1, "hidden_dim": 28,
        "model_length": 1024, "model_type": "bd3lm", "n_blocks": 2, "n_heads": 2, "return_dict": False,
        "sampling_eps_max": 0.999, "sampling_eps_min": 0.001, "time_conditioning": False, "torch_dtype": "float32",
        "var_min": True, "vocab_size": 89}
    tensors = dit_tensors(Draw(seed), 89, 28, 2, 9, 2, prefix="backbone.", damp=88)
    tensors["sampling_eps_min"] = np.array([0.001])  # buffers of the training schedule
    tensors["sampling_eps_max"] = np.array([0.999])
    write(directory, config, tensors)


# --- encoder and decoder ------------------------------------------------------------------------------------

def diffusion_gemma(directory, seed, dtype="F32"):
    """Windowed layers, and two that see everything. Of what reads images there is one tensor, which is not read."""
    types = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    d, ffn, heads, experts, width = 22, 25, 4, 5, 5
    text = {
        "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 2, "eos_token_id": 1,
        "final_logit_softcapping": 30.0, "global_head_dim": 18, "head_dim": 10,
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": d, "initializer_range": 0.02,
        "intermediate_size": ffn, "layer_types": types, "max_position_embeddings": 2048,
        "model_type": "diffusion_gemma_text", "moe_intermediate_size": width, "num_attention_heads": heads,
        "num_experts": experts, "num_global_key_value_heads": 1, "num_hidden_layers": len(types),
        "num_key_value_heads": 2, "pad_token_id": 0, "rms_norm_eps": 1e-06,
        "rope_parameters": {
            "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 5000.0, "rope_type": "proportional"},
            "sliding_attention": {"rope_theta": 1000.0, "rope_type": "default"}},
        "sliding_window": 6, "tie_word_embeddings": True, "top_k_experts": 2,
        "use_bidirectional_attention": "vision", "vocab_size": 103}
    if dtype == "BF16":
        text["dtype"] = "bfloat16"
    config = {"architectures": ["DiffusionGemmaForBlockDiffusion"], "boi_token_id": 98, "canvas_length": 8,
              "eoi_token_id": 99, "image_token_id": 100, "initializer_range": 0.02, "model_type": "diffusion_gemma",
              "text_config": text, "tie_word_embeddings": True}
    draw = Draw(seed)
    t = {"model.decoder.embed_tokens.weight": draw.normal(text["vocab_size"], d) * (4.0 / d ** 0.5)}

    def mlp(prefix, gain=1.5):
        t[prefix + "gate_proj.weight"] = draw.matrix(ffn, d, 1.5)
        t[prefix + "up_proj.weight"] = draw.matrix(ffn, d, 1.5)
        t[prefix + "down_proj.weight"] = draw.matrix(d, ffn, gain)

    for n, kind in enumerate(types):
        full, p = kind == "full_attention", f"model.decoder.layers.{n}."
        hd, kv = (text["global_head_dim"], 1) if full else (text["head_dim"], 2)
        t[p + "input_layernorm.weight"] = draw.norm(d)
        t[p + "self_attn.q_proj.weight"] = draw.matrix(heads * hd, d, 2.4)
        t[p + "self_attn.k_proj.weight"] = draw.matrix(kv * hd, d, 2.4)
        if not full:
            t[p + "self_attn.v_proj.weight"] = draw.matrix(kv * hd, d, 1.5)
        t[p + "self_attn.q_norm.weight"] = 0.6 * draw.norm(hd)
        t[p + "self_attn.k_norm.weight"] = 0.6 * draw.norm(hd)
        t[p + "self_attn.o_proj.weight"] = draw.matrix(d, heads * hd, 1.6)
        t[p + "post_attention_layernorm.weight"] = 0.4 * draw.norm(d)
        t[p + "pre_feedforward_layernorm.weight"] = draw.norm(d)
        mlp(p + "mlp.")
        t[p + "post_feedforward_layernorm_1.weight"] = draw.norm(d)
        t[p + "pre_feedforward_layernorm_2.weight"] = draw.norm(d)
        t[p + "router.proj.weight"] = draw.matrix(experts, d, 18.0)
        t[p + "router.scale"] = draw.norm(d)
        t[p + "router.per_expert_scale"] = draw.norm(experts)
        t[p + "experts.gate_up_proj"] = draw.normal(experts, 2 * width, d) * (1.5 / d ** 0.5)
        t[p + "experts.down_proj"] = draw.normal(experts, d, width) * (1.5 / width ** 0.5)
        t[p + "post_feedforward_layernorm_2.weight"] = draw.norm(d)
        t[p + "post_feedforward_layernorm.weight"] = 0.4 * draw.norm(d)
        t[p + "layer_scalar"] = np.array([0.7 + 0.1 * n])
        t[f"model.encoder.language_model.layers.{n}.layer_scalar"] = np.array([0.9 - 0.05 * n])
    t["model.decoder.norm.weight"] = draw.norm(d)
    t["model.decoder.self_conditioning.pre_norm.weight"] = draw.norm(d)
    mlp("model.decoder.self_conditioning.", gain=0.3)
    t["model.encoder.embed_vision.embedding_projection.weight"] = draw.matrix(d, 7)
    write(directory, config, t, dtype, others={
        "generation_config.json": {"eos_token_id": [1, 97], "pad_token_id": 0}})


# --- the list --------------------------------------------------------------------------------------------

CHECKPOINTS = {
    "dream": dream,
    "dream_bf16": lambda directory: dream(directory, dtype="BF16", seed=131),
    "open_dcoder": open_dcoder,
    "a2d_qwen3": lambda directory: a2d(directory, "qwen3", seed=103),
    "a2d_qwen2": lambda directory: a2d(directory, "qwen2", seed=104),
    "a2d_llama": lambda directory: a2d(directory, "llama", seed=105),
    "llada": lambda directory: llada(directory, shards=3, seed=108),
    "llada_gqa": lambda directory: llada(directory, kv_heads=2, seed=109),
    "sdar_b4": lambda directory: sdar(directory, 4, shards=2, seed=106),
    "sdar_b8": lambda directory: sdar(directory, 8, seed=107),
    "sdar_b4_f16": lambda directory: sdar(directory, 4, dtype="F16", seed=136),
    "sedd_absorb": lambda directory: sedd(directory, "absorb", "loglinear", 112),
    "sedd_uniform": lambda directory: sedd(directory, "uniform", "geometric", 113),
    "mdlm": mdlm,
    "sdar_moe": lambda directory: qwen3_moe(directory, "SDARMoeForCausalLM", seed=119),
    "rnd1": lambda directory: qwen3_moe(directory, "RND1", seed=115),
    "rnd1_bf16": lambda directory: qwen3_moe(directory, "RND1", seed=116, dtype="BF16"),
    "llada_moe": lambda directory: llada_moe(directory, seed=117),
    "llada2": lambda directory: llada2(directory, seed=118),
    "llada2_indel": lambda directory: llada2(directory, seed=123, edits=True),
    "fast_dllm_v2": lambda directory: fast_dllm_v2(directory, seed=121),
    "bd3lm": lambda directory: bd3lm(directory, seed=122),
    "diffusion_gemma": lambda directory: diffusion_gemma(directory, seed=120),
    "diffusion_gemma_bf16": lambda directory: diffusion_gemma(directory, seed=121, dtype="BF16"),
}
