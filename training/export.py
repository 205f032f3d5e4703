"""Writes a checkpoint of training.train as a folder that the engine serves: A2D (Qwen3, Qwen2 or Llama body) or SEDD.

  python3 -m training.export --run DIR --tokenizer DIR --out DIR [--last]

The averaged weights are written, in bfloat16; --last takes the latest ones.
"""

import argparse
import json
import pathlib
import shutil
import struct

import torch

from training.train import DEFAULTS, checkpoint_of


def write_safetensors(path, tensors):
    """{name: tensor} in bfloat16, names in order. Needs no library."""
    header, blobs, at = {}, [], 0
    for name in sorted(tensors):
        tensor = tensors[name].detach().to(torch.bfloat16).contiguous()
        blob = tensor.view(torch.int16).numpy().tobytes()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [at, at + len(blob)]}
        blobs.append(blob)
        at += len(blob)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for blob in blobs:
            file.write(blob)


def decoder_tensors(weights, settings):
    """Our names to Qwen3's. Stacked projections are cut."""
    made = {"model.embed_tokens.weight": weights["embedding"], "model.norm.weight": weights["norm"]}
    heads, kv, dim = settings["num_attention_heads"], settings["num_key_value_heads"], settings["head_dim"]
    for index in range(settings["num_hidden_layers"]):
        ours, theirs = "layers.%d." % index, "model.layers.%d." % index
        q, k, v = weights[ours + "qkv.weight"].split([heads * dim, kv * dim, kv * dim])
        gate, up = weights[ours + "gate_up.weight"].chunk(2)
        made.update({
            theirs + "input_layernorm.weight": weights[ours + "input_norm"],
            theirs + "post_attention_layernorm.weight": weights[ours + "post_norm"],
            theirs + "self_attn.q_proj.weight": q, theirs + "self_attn.k_proj.weight": k,
            theirs + "self_attn.v_proj.weight": v, theirs + "self_attn.o_proj.weight": weights[ours + "out.weight"],
            theirs + "mlp.gate_proj.weight": gate, theirs + "mlp.up_proj.weight": up,
            theirs + "mlp.down_proj.weight": weights[ours + "down.weight"]})
        if settings["qk_norm"]:
            made.update({theirs + "self_attn.q_norm.weight": weights[ours + "q_norm"],
                         theirs + "self_attn.k_norm.weight": weights[ours + "k_norm"]})
        if settings["attention_bias"]:
            biases = weights[ours + "qkv.bias"].split([heads * dim, kv * dim, kv * dim])
            made.update({theirs + "self_attn.%s_proj.bias" % name: bias for name, bias in zip("qkv", biases)})
    if "head" in weights:
        made["lm_head.weight"] = weights["head"]
    return made


def decoder_config(settings, vocab_size):
    """config.json of an A2D model. Biases of q, k and v alone are what Qwen2 has."""
    body = "Qwen3" if settings["qk_norm"] else "Qwen2" if settings["attention_bias"] else "Llama"
    config = {"architectures": ["A2D%sLMHeadModel" % body], "model_type": "a2d-" + body.lower(), "hidden_act": "silu",
              "rope_scaling": None, "attention_bias": False, "vocab_size": vocab_size, "torch_dtype": "bfloat16"}
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
                 "rms_norm_eps", "rope_theta", "tie_word_embeddings", "max_position_embeddings"):
        config[name] = settings[name]
    for name in ("mask", "eos", "bos"):
        config[name + "_token_id"] = settings[name + "_token"]
    if settings["objective"] == "block":
        config["block_size"] = settings["block_length"]
    return config


def sedd_config(settings, vocab_size):
    """config.json of a SEDD model, absorbing graph and log-linear noise; `tokens` leaves the absorbing one out."""
    return {"tokens": vocab_size, "graph": {"type": "absorb"}, "noise": {"type": "loglinear"},
            "model": {"type": "ddit", "hidden_size": settings["hidden_size"], "cond_dim": settings["cond_dim"],
                      "length": settings["max_position_embeddings"], "n_blocks": settings["num_hidden_layers"],
                      "n_heads": settings["num_attention_heads"], "scale_by_sigma": True}}


def export(checkpoint, tokenizer, out, last=False):
    settings, out = dict(DEFAULTS, **checkpoint["settings"]), pathlib.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    weights = {name: value if last else checkpoint["optimizer"][name + "/ema"] for name, value in checkpoint["model"].items()}
    if settings["objective"] == "score":
        vocab_size = weights["vocab_embed.embedding"].shape[0] - 1
        config, tensors = sedd_config(settings, vocab_size), weights
    else:
        config, tensors = decoder_config(settings, weights["embedding"].shape[0]), decoder_tensors(weights, settings)
    write_safetensors(out / "model.safetensors", tensors)
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    eos = settings["eos_token"]
    (out / "generation_config.json").write_text(json.dumps(
        {"eos_token_id": eos, "bos_token_id": settings["bos_token"], "pad_token_id": eos}, indent=1) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(pathlib.Path(tokenizer) / name, out / name)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--last", action="store_true", help="the latest weights, not the averaged ones")
    options = parser.parse_args(argv)
    newest = checkpoint_of(pathlib.Path(options.run))
    if newest is None:
        parser.error("--run %s: no checkpoint" % options.run)
    export(torch.load(newest, map_location="cpu"), options.tokenizer, options.out, options.last)
    print(newest, "->", options.out)


if __name__ == "__main__":
    main()
