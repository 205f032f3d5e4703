#!/usr/bin/env python3
"""Regenerates the small tokenizers of this folder and what the reference implementation makes of texts.

    pip install tokenizers==0.23.3
    python3 tests/golden/tokenizers/make_goldens.py

Each NAME.json is a tokenizer.json trained here, on text generated below from this repository's own words.
NAME.cases.json lists {text, ids, ids_plain, ids_special, decoded, skipped}: ids with special tokens
recognised; with encode_special_tokens (special tokens in the text are plain text); with
add_special_tokens; and the ids decoded with and without special tokens. What is left out equals ids,
ids, text and decoded. Deterministic: the seed is fixed.
"""
import json
import pathlib
import random

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from tokenizers import pre_tokenizers, processors, trainers

HERE = pathlib.Path(__file__).resolve().parent
GPT2 = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
QWEN2 = (r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"""
         r"""|\s*[\r\n]+|\s+(?!\S)|\s+""")
BAILING = (r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"""
           r"""|\s*[\r\n]|\s+(?!\S)|\s+""")

WORDS = """the canvas holds masked positions and every denoising step commits some of them a block is
decoded from left to right when confidence is high enough return status ok const auto vector string
int32 if for while struct class template request token schedule worker lease don't we'll they've I'm
naïve café Ünïcode façade über straße данные модель слово 你好 世界 模型 解码 数据 日本語 テスト 한국어
""".split()
CODE = """def f(x):\n    return x**2\n\nfor (int i = 0; i < n; ++i) {\n\tsum += a[i] * 0.5;\n}\n// end\n
#include <vector>\nif (status != OK) return absl::InternalError("bad");\r\n    x = {'a': 1, "b": [2, 3]}\n"""


def corpus(rng):
    for _ in range(400):
        line = " ".join(rng.choice(WORDS) for _ in range(rng.randint(3, 14)))
        yield line + rng.choice([".", "!", "?", ", 2025", "\n", "\n\n", ";\n"])
    for _ in range(40):
        yield CODE


def byte_level(pattern):
    return pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def build(name, pre, normalizer=None, vocab_size=900, specials=(), added=(), post=None,
          ignore_merges=False):
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(list(corpus(random.Random(7))), trainer)
    tokenizer.add_special_tokens(list(specials))
    tokenizer.add_tokens(list(added))
    if post is not None:
        tokenizer.post_processor = post(tokenizer)
    text = tokenizer.to_str(pretty=False)
    (HERE / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    return Tokenizer.from_str(text)


def special(text):
    return AddedToken(text, special=True, normalized=False)


def templated(tokenizer):
    return processors.TemplateProcessing(
        single="<|bos|> $A <|eos|>",
        special_tokens=[(t, tokenizer.token_to_id(t)) for t in ("<|bos|>", "<|eos|>")])


def tokenizers():
    chat = [special("<|endoftext|>"), special("<|im_start|>"), special("<|im_end|>"), special("<|mask|>")]
    tags = [AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False),
            AddedToken("<tool_call>", normalized=False)]
    yield "gpt2", build("gpt2", pre_tokenizers.ByteLevel(add_prefix_space=False),
                        specials=[special("<|endoftext|>")])
    yield "qwen2", build("qwen2", byte_level(QWEN2), normalizers.NFC(), specials=chat, added=tags,
                         post=lambda _: processors.ByteLevel(trim_offsets=False))
    yield "bailing", build("bailing", byte_level(BAILING), specials=chat + [special("<|bos|>"),
                                                                          special("<|eos|>")],
                           post=templated)
    # Every flag of an added token, and a prefix space.
    yield "flags", build(
        "flags", pre_tokenizers.ByteLevel(add_prefix_space=True),
        normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]), vocab_size=500,
        specials=[special("<|eos|>"), AddedToken("<l>", special=True, normalized=False, lstrip=True),
                  AddedToken("<r>", special=True, normalized=False, rstrip=True)],
        added=[AddedToken("token", normalized=False, single_word=True),
               AddedToken("CANVAS", normalized=True), AddedToken("<both>", normalized=False, lstrip=True,
                                                                rstrip=True),
               AddedToken("ab", normalized=False), AddedToken("abc", normalized=False)])
    # Other ways to split, and ignore_merges.
    for behavior in ("removed", "merged_with_previous", "merged_with_next", "contiguous"):
        yield f"split_{behavior}", build(
            f"split_{behavior}",
            pre_tokenizers.Sequence([
                pre_tokenizers.Split(Regex(r"\s|[.,;]"), behavior=behavior),
                pre_tokenizers.Digits(individual_digits=behavior == "removed"),
                pre_tokenizers.Split("e", behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]),
            vocab_size=320)
    yield "inverted", build(
        "inverted",
        pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(r"[\p{L}\p{N}]+"), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]),
        vocab_size=400, ignore_merges=True)


FIXED = [
    "", " ", "  ", "\n", "\n\n", "\t", " \n \n\t x", "Hello world", " Hello world", "I'll DON'T 2025",
    "def f(x):\n    return x**2\n\n", "naïve café", "你好，世界", "e\u0301", "e\u0301\u0323a\u030a",
    "a\u0316\u0301\u0316", "\u1100\u1161\u11a8", "\uff21\ufb01", "ΑΣ \u0130stanbul ǅ", "x\u180ey\u00a0z\u2003w",
    "ſ 'ſ 'S 'LL 'Ll 'lL we'Ve", "12345 ٣٤ Ⅷ ½ ²", "🦙🚀 👩‍👩‍👧 ✅", "   \r\n\r\n   a", "a\u2028b\u0085c",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "<|mask|><|mask|> <|mask|>x",
    "<|im_start", "<|im_<|im_end|>", "<think>\n\n</think>\n\nok", "<|endoftext|><|endoftext|>",
    "a token tokens token. _token token", "  <l>  <r>  x <both> y", "x  <both>  <l>", "abcab abd",
    "the CANVAS canvas Canvas ＣＡＮＶＡＳ", "<|bos|>x<|eos|>", "e, 12.5; eee 3e4 ., ,.", "!!!......???\n\n\n!",
    "  leading and trailing  ", "a" * 300, "ab" * 200, " " * 100, "\n" * 50 + "x", "x" + " " * 77 + "y",
]


def random_text(rng):
    pools = [
        lambda: rng.choice(WORDS), lambda: rng.choice(FIXED[:44])[:20], lambda: " " * rng.randint(1, 4),
        lambda: rng.choice("\n\r\t \u00a0\u3000\u200b"), lambda: chr(rng.randint(33, 126)),
        lambda: chr(rng.randint(0xa1, 0x24f)), lambda: chr(rng.randint(0x300, 0x36f)),
        lambda: chr(rng.randint(0x370, 0x6ff)), lambda: chr(rng.randint(0x900, 0xdff)),
        lambda: chr(rng.randint(0x1e00, 0x206f)), lambda: chr(rng.randint(0x3040, 0x30ff)),
        lambda: chr(rng.randint(0x4e00, 0x9fff)), lambda: chr(rng.randint(0xac00, 0xd7a3)),
        lambda: chr(rng.randint(0x1f300, 0x1f6ff)), lambda: str(rng.randint(0, 99999)),
        lambda: rng.choice(["<|mask|>", "<|im_end|>", "<think>", "<l>", "<r>", "token", "abc", "'s", "'RE"]),
    ]
    return "".join(rng.choice(pools)() for _ in range(rng.randint(1, 25)))


def main():
    rng = random.Random(20261123)
    for name, tokenizer in tokenizers():
        cases = []
        for text in FIXED + [random_text(rng) for _ in range(120)]:
            tokenizer.encode_special_tokens = False
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            case = {"text": text, "ids": ids}
            with_special = tokenizer.encode(text, add_special_tokens=True).ids
            if with_special != ids:
                case["ids_special"] = with_special
            tokenizer.encode_special_tokens = True
            plain = tokenizer.encode(text, add_special_tokens=False).ids
            if plain != ids:
                case["ids_plain"] = plain
            decoded = tokenizer.decode(ids, skip_special_tokens=False)
            if decoded != text:
                case["decoded"] = decoded
            skipped = tokenizer.decode(ids, skip_special_tokens=True)
            if skipped != decoded:
                case["skipped"] = skipped
            cases.append(case)
        lines = ",\n".join(json.dumps(case, ensure_ascii=False, separators=(",", ":")) for case in cases)
        (HERE / f"{name}.cases.json").write_text("[\n" + lines + "\n]\n", encoding="utf-8")
        print(name, len(cases), "cases")


if __name__ == "__main__":
    main()
