"""Turns an autoregressive checkpoint (Llama, Qwen2 or Qwen3 body) into the first checkpoint of a diffusion run.

  python3 -m training.convert --base DIR|FILE.gguf --run DIR --tokenizer DIR [--objective masked|block] [--anneal-steps N]
  python3 -m training.train --run DIR --tokenizer DIR --corpus DIR --hours H --set lr_adam=1e-4 --set lr_muon=1e-3

Same weights, one new token <|mask|> whose embedding is the mean of the others. --base is a Hugging Face folder (safetensors,
tokenizer.json) or a GGUF file of any type that the gguf package dequantises; --tokenizer is written. Training then opens the attention:
over --anneal-steps (arXiv:2410.17891), at once with 0, or to blocks with --objective block. What is trained is in place: position i
predicts its own token, whatever the base did.
"""

import argparse
import json
import pathlib
import struct

import torch

from training.train import DEFAULTS, Optimizer, build

ARCHITECTURES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}
MASK = "<|mask|>"
DTYPES = {"F32": (torch.float32, 4), "F16": (torch.float16, 2), "BF16": (torch.bfloat16, 2)}  # and bytes
# What GGUF calls the parts of a layer.
GGUF_PARTS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
              "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
              "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj",
              "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
GGUF_ENDS = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
             "output.weight": "lm_head.weight"}
# How a GGUF's `tokenizer.ggml.pre` splits text before the byte-level merges.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN2_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
SPLITS = {"gpt-2": (GPT2_PATTERN, False), "smollm": (GPT2_PATTERN, True), "qwen2": (QWEN2_PATTERN, False)}


class Refused(Exception):
    """The base cannot be converted; the message names the field."""


def read_safetensors(path):
    """{name: tensor}; F32, F16 and BF16."""
    raw = bytearray(pathlib.Path(path).read_bytes())
    size = struct.unpack("<Q", raw[:8])[0]
    header, made = json.loads(bytes(raw[8:8 + size])), {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise Refused("%s: %s is %s; known are %s" % (path, name, entry["dtype"], ", ".join(DTYPES)))
        dtype, width = DTYPES[entry["dtype"]]
        begin, end = entry["data_offsets"]
        made[name] = torch.frombuffer(raw, dtype=dtype, count=(end - begin) // width, offset=8 + size + begin).view(entry["shape"]).float()
    return made


def read_folder(folder):
    """(body, config, tensors by their Hugging Face names, tokenizer.json as an object)."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    names = config.get("architectures") or [""]
    if names[0] not in ARCHITECTURES:
        raise Refused("%s/config.json: architectures is %s; known are %s" % (folder, names[0], ", ".join(ARCHITECTURES)))
    if config.get("rope_scaling") not in (None, {}):
        raise Refused("%s/config.json: rope_scaling is set; it is not computed" % folder)
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors.update(read_safetensors(path))
    return ARCHITECTURES[names[0]], config, tensors, json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))


def unpermuted(weight, heads):
    """llama.cpp keeps Llama's q and k rows for interleaved rotation; ours (and Hugging Face's) rotate the halves of a head."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def gguf_tokenizer(field):
    """tokenizer.json of a byte-level BPE in GGUF metadata."""
    pre = field("tokenizer.ggml.pre", "gpt-2")
    if field("tokenizer.ggml.model", "") != "gpt2" or pre not in SPLITS:
        raise Refused("tokenizer.ggml.model %s, pre %s: known are gpt2 with %s" % (
            field("tokenizer.ggml.model", "(none)"), pre, ", ".join(SPLITS)))
    tokens, kinds = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type")
    pattern, digits = SPLITS[pre]
    splits = [{"type": "Digits", "individual_digits": True}] if digits else []
    splits += [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
               {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]
    added = [{"id": i, "content": tokens[i], "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
              "special": kinds[i] == 3} for i in range(len(tokens)) if kinds[i] in (3, 4)]  # control, user-defined
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": splits}, "post_processor": None,
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                      "vocab": {token: i for i, token in enumerate(tokens)}, "merges": field("tokenizer.ggml.merges")}}


def read_gguf(path):
    """As read_folder(), of one GGUF file."""
    import gguf
    reader = gguf.GGUFReader(str(path))

    def field(name, default=None):
        found = reader.fields.get(name)
        if found is None and default is None:
            raise Refused("%s: metadata lacks %s" % (path, name))
        return found.contents() if found is not None else default

    body = field("general.architecture")
    if body not in ARCHITECTURES.values():
        raise Refused("%s: general.architecture is %s; known are %s" % (path, body, ", ".join(ARCHITECTURES.values())))
    get = lambda name, default=None: field(body + "." + name, default)
    heads, dim = get("attention.head_count"), get("embedding_length")
    config = {"hidden_size": dim, "num_hidden_layers": get("block_count"), "num_attention_heads": heads,
              "num_key_value_heads": get("attention.head_count_kv", heads), "head_dim": get("attention.key_length", dim // heads),
              "intermediate_size": get("feed_forward_length"), "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
              "rope_theta": get("rope.freq_base", 10000.0), "max_position_embeddings": get("context_length"),
              "bos_token_id": field("tokenizer.ggml.bos_token_id", field("tokenizer.ggml.eos_token_id")),
              "eos_token_id": field("tokenizer.ggml.eos_token_id")}
    tensors = {}
    for tensor in reader.tensors:
        value = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy()).float()
        value = value.view([int(n) for n in reversed(tensor.shape)])
        name = GGUF_ENDS.get(tensor.name)
        if name is None and tensor.name.startswith("blk."):
            _, layer, part, kind = tensor.name.split(".")
            if part in ("attn_q", "attn_k") and body == "llama":
                count = heads if part == "attn_q" else config["num_key_value_heads"]
                value = unpermuted(value.view(value.shape[0], -1), count).view(value.shape)
            name = "model.layers.%s.%s.%s" % (layer, GGUF_PARTS[part], kind) if part in GGUF_PARTS else None
        if name is None:
            if tensor.name != "rope_freqs.weight":
                raise Refused("%s: tensor %s has no place in a %s body" % (path, tensor.name, body))
            raise Refused("%s: rope_freqs.weight scales the rotation; it is not computed" % path)
        tensors[name] = value
    return body, config, tensors, gguf_tokenizer(field)


def settings_of(body, config, tensors):
    """A run's settings for the base's shape."""
    made = dict(DEFAULTS)
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "rms_norm_eps",
                 "max_position_embeddings"):
        if name not in config:
            raise Refused("config: %s is missing" % name)
        made[name] = config[name]
    made["num_key_value_heads"] = config.get("num_key_value_heads") or made["num_attention_heads"]
    made["head_dim"] = config.get("head_dim") or made["hidden_size"] // made["num_attention_heads"]
    made["rope_theta"] = float(config.get("rope_theta", 10000.0))
    made["tie_word_embeddings"] = "lm_head.weight" not in tensors
    made["qk_norm"], made["attention_bias"] = body == "qwen3", body == "qwen2"
    return made


def our_tensors(settings, tensors):
    """Hugging Face's names to those of networks.Decoder. Every tensor is used, or refused by name."""
    left = dict(tensors)
    made = {"embedding": left.pop("model.embed_tokens.weight"), "norm": left.pop("model.norm.weight")}
    if not settings["tie_word_embeddings"]:
        made["head"] = left.pop("lm_head.weight")
    for index in range(settings["num_hidden_layers"]):
        ours, theirs = "layers.%d." % index, "model.layers.%d." % index
        take = lambda name: left.pop(theirs + name)
        made[ours + "input_norm"], made[ours + "post_norm"] = take("input_layernorm.weight"), take("post_attention_layernorm.weight")
        made[ours + "qkv.weight"] = torch.cat([take("self_attn.%s_proj.weight" % part) for part in "qkv"])
        if settings["attention_bias"]:
            made[ours + "qkv.bias"] = torch.cat([take("self_attn.%s_proj.bias" % part) for part in "qkv"])
        if settings["qk_norm"]:
            made[ours + "q_norm"], made[ours + "k_norm"] = take("self_attn.q_norm.weight"), take("self_attn.k_norm.weight")
        made[ours + "out.weight"] = take("self_attn.o_proj.weight")
        made[ours + "gate_up.weight"] = torch.cat([take("mlp.gate_proj.weight"), take("mlp.up_proj.weight")])
        made[ours + "down.weight"] = take("mlp.down_proj.weight")
    left = [name for name in left if not name.endswith("rotary_emb.inv_freq")]
    if left:
        raise Refused("tensors that this body does not have: " + ", ".join(sorted(left)[:4]))
    return made


def with_mask(tokenizer, tensors):
    """Adds the mask token behind every id there is (or takes the one there is); gives its id. Lengthens the tables if need be."""
    known = dict(tokenizer["model"]["vocab"], **{token["content"]: token["id"] for token in tokenizer["added_tokens"]})
    mask = known.get(MASK)
    if mask is None:
        mask = 1 + max(known.values())
        tokenizer["added_tokens"].append({"id": mask, "content": MASK, "single_word": False, "lstrip": False, "rstrip": False,
                                          "normalized": False, "special": True})
        for name in ("embedding", "head"):
            if name in tensors:
                table = tensors[name]
                rows = table[:mask].mean(0, keepdim=True).expand(max(1, mask + 1 - len(table)), -1)
                tensors[name] = torch.cat([table, rows]) if mask >= len(table) else table.clone()
                tensors[name][mask] = rows[0]
    return mask


def convert(base, objective="masked", anneal_steps=0, block_length=DEFAULTS["block_length"]):
    """(checkpoint, tokenizer.json, tokenizer_config.json)."""
    base = pathlib.Path(base)
    body, config, tensors, tokenizer = read_gguf(base) if base.is_file() else read_folder(base)
    settings = settings_of(body, config, tensors)
    eos = config.get("eos_token_id")
    settings["eos_token"] = eos[0] if isinstance(eos, list) else eos
    if settings["eos_token"] is None:
        raise Refused("config: eos_token_id is missing")
    bos = config.get("bos_token_id")
    settings["bos_token"] = settings["eos_token"] if bos is None else bos
    settings.update(objective=objective, anneal_steps=anneal_steps, block_length=block_length)
    weights = our_tensors(settings, tensors)
    settings["mask_token"] = with_mask(tokenizer, weights)
    names = {i: name for name, i in tokenizer["model"]["vocab"].items()}
    names.update({token["id"]: token["content"] for token in tokenizer["added_tokens"]})
    bos = names[settings["bos_token"]]
    # Every sample begins with it, and so must every prompt.
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {bos: {"id": bos, "ids": [settings["bos_token"]], "tokens": [bos]}}}
    model = build(settings, len(weights["embedding"]))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.shape != weights[name].shape:
                raise Refused("%s is %s, the config says %s" % (name, tuple(weights[name].shape), tuple(p.shape)))
            p.copy_(weights[name])
    checkpoint = {"settings": settings, "step": 0, "tokens": 0, "seconds": 0.0, "vocab_size": len(weights["embedding"]),
                  "model": {name: p.detach() for name, p in model.named_parameters()},
                  "optimizer": Optimizer(model, settings).state}
    return checkpoint, tokenizer, {"tokenizer_class": "PreTrainedTokenizerFast", "mask_token": MASK, "bos_token": bos,
                                   "eos_token": names[settings["eos_token"]], "pad_token": names[settings["eos_token"]]}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="Hugging Face folder, or GGUF file")
    parser.add_argument("--run", required=True, help="gets checkpoint-0000000.pt")
    parser.add_argument("--tokenizer", required=True, help="folder to write tokenizer.json into")
    parser.add_argument("--objective", default="masked", choices=["masked", "block"])
    parser.add_argument("--block-length", type=int, default=DEFAULTS["block_length"])
    parser.add_argument("--anneal-steps", type=int, default=0, help="steps over which causal attention opens")
    options = parser.parse_args(argv)
    try:
        checkpoint, tokenizer, tokenizer_config = convert(options.base, options.objective, options.anneal_steps, options.block_length)
    except (Refused, KeyError) as error:
        parser.exit(1, "convert: %s\n" % (error if isinstance(error, Refused) else "tensor %s is missing" % error))
    run, out = pathlib.Path(options.run), pathlib.Path(options.tokenizer)
    for folder in (run, out):
        folder.mkdir(parents=True, exist_ok=True)
    if any(run.glob("checkpoint-*.pt")):
        parser.error("--run %s has a checkpoint already" % run)
    (out / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False) + "\n", encoding="utf-8")
    (out / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=1) + "\n")
    torch.save(checkpoint, run / "checkpoint-0000000.pt")
    print("%d parameters, mask token %d -> %s" % (sum(p.numel() for p in checkpoint["model"].values()),
                                                  checkpoint["settings"]["mask_token"], run))


if __name__ == "__main__":
    main()
