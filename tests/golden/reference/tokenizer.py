"""A tiny byte-level BPE tokenizer in the files that Hugging Face writes: the 256 byte symbols, some merges,
then added tokens."""
import json

QWEN2_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                 r"|\s*[\r\n]+|\s+(?!\S)|\s+")
MERGES = ["t h", "th e", "Ġ the", "i n", "e r", "Ġ f", "r e", "re t", "u r", "ur n", "ret urn", "d e", "de f"]


def byte_symbols():
    """Character of each byte: printable ones stand for themselves, the others are U+0100 onwards."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {**{b: chr(b) for b in printable}, **{b: chr(256 + i) for i, b in enumerate(others)}}


def vocabulary():
    """Symbol -> id: byte symbols first (printable bytes, then the rest), then one id for each merge."""
    symbols = [*byte_symbols().values(), *(merge.replace(" ", "") for merge in MERGES)]
    return {symbol: index for index, symbol in enumerate(symbols)}


FIRST_ADDED_ID = len(vocabulary())


def dump(value):
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=False) + "\n"


def files(added, eos, mask, merges_as_pairs=False, slow_files=False):
    """{file name: text}. `added`: texts of the added tokens, ids from FIRST_ADDED_ID on. `mask` or `eos` may
    be None."""
    entries = [{"id": FIRST_ADDED_ID + i, "content": text, "single_word": False, "lstrip": False,
                "rstrip": False, "normalized": False, "special": True} for i, text in enumerate(added)]
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": entries,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": QWEN2_PATTERN}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}]},
        "post_processor": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
                           "use_regex": False},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
                  "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False,
                  "vocab": vocabulary(),
                  "merges": [m.split(" ") for m in MERGES] if merges_as_pairs else MERGES}}
    settings = {"add_bos_token": False, "add_prefix_space": False,
                "added_tokens_decoder": {str(e["id"]): {k: e[k] for k in list(e)[1:]} for e in entries},
                "bos_token": None, "clean_up_tokenization_spaces": False, "eos_token": eos, "pad_token": eos,
                "model_max_length": 2048, "tokenizer_class": "Qwen2Tokenizer", "unk_token": None}
    specials = {"eos_token": eos, "pad_token": eos}
    if mask is not None:
        settings["mask_token"] = specials["mask_token"] = mask
    result = {"tokenizer.json": dump(tokenizer), "tokenizer_config.json": dump(settings),
              "special_tokens_map.json": dump(specials)}
    if slow_files:
        result["vocab.json"] = dump(vocabulary())
        result["merges.txt"] = "#version: 0.2\n" + "\n".join(MERGES) + "\n"
    return result
