"""Trains the byte-level BPE tokenizer of the corpus, in tokenizer.json form.

  python3 -m training.tokenizer --corpus DIR --out DIR [--vocab 4096]

A word is the same token wherever it stands: spaces go to the keywords and punctuation beside it (" = ", ", ", " for "),
never to the word. "order" after "(" and "order" after "for " are then one id, and copying a name is copying an id.
"""

import argparse
import json
import pathlib
import random

from training import synthetic

SPECIAL = ["<mask>", "<eos>", "<bos>", "<unused>"]
MASK, EOS, BOS = 0, 1, 2
_SPACE = r" \t\n\r\x0b\x0c"
_OPENING = ("def|return|for|if|elif|while|with|not|raise|import|from|class|yield|assert|lambda|except|del|in|and|or|is|else|"
            "async|await|global")
_MIDDLE = "for|in not|in|if|else|and|or|is not|is|not in|not|as|import|the|of|a|an|to|by|with|that|from|are|and"
PATTERN = (r"\n+ *| (?:%s) |(?:%s) |[A-Za-z]+|[0-9]| ?[^%sA-Za-z0-9]+ ?|[%s]+" % (_MIDDLE, _OPENING, _SPACE, _SPACE))


def tokenizer_json(vocabulary, merges):
    bos = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": True} for i, text in enumerate(SPECIAL)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]},
        "post_processor": {"type": "TemplateProcessing", "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
                           "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                           "special_tokens": {"<bos>": {"id": "<bos>", "ids": [BOS], "tokens": ["<bos>"]}}},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": vocabulary, "merges": merges},
    }


def train(texts, vocab_size):
    """tokenizer.json as an object. The same texts give the same object."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    made.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    model = json.loads(made.to_str())["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    return tokenizer_json(model["vocab"], merges)


def count_tokens(tokenizer, folder):
    """{file: tokens} of a corpus folder's samples."""
    made = {}
    for path in sorted(folder.glob("*.jsonl")):
        texts = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
        made[path.stem] = sum(len(coded.ids) for coded in tokenizer.encode_batch(texts, add_special_tokens=False))
    return made


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", required=True, help="folder that training.prepare wrote")
    parser.add_argument("--out", required=True)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--synthetic", type=int, default=60000, help="functions of the synthetic domain that count too")
    options = parser.parse_args(argv)
    texts = [json.loads(line)["text"] for line in open(pathlib.Path(options.corpus) / "train.jsonl", encoding="utf-8")]
    rng = random.Random(1)
    rng.shuffle(texts)
    texts = texts[:80000] + [synthetic.function(rng) for _ in range(options.synthetic)]
    out = pathlib.Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    made = train(texts, options.vocab)
    (out / "tokenizer.json").write_text(json.dumps(made, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    (out / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "mask_token": "<mask>", "eos_token": "<eos>", "bos_token": "<bos>",
        "pad_token": "<eos>"}, indent=1) + "\n")
    manifest = pathlib.Path(options.corpus) / "manifest.json"
    if manifest.exists():
        from tokenizers import Tokenizer
        said = json.loads(manifest.read_text())
        said["tokens"] = count_tokens(Tokenizer.from_file(str(out / "tokenizer.json")), pathlib.Path(options.corpus))
        manifest.write_text(json.dumps(said, indent=1) + "\n")


if __name__ == "__main__":
    main()
