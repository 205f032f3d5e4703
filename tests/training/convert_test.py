"""convert: the weights of a Hugging Face folder and of a GGUF file are the base's, against the golden logits; then a step of training,
an export, and the engine. Needs torch, tokenizers and gguf.

  convert_test.py [path of cinnabar]
"""

import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
import unittest

SOURCE = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(SOURCE))
try:
    import gguf
    import numpy as np
    import tokenizers
    import torch
    from training import convert, export, train
    MISSING = ""
except ImportError as error:
    MISSING = str(error) + "; pip install -r training/requirements.txt"
CINNABAR = ""
GOLDEN = SOURCE / "tests" / "golden"
BODIES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def permuted(weight, heads):
    """What llama.cpp's converter does to Llama's q and k: the halves of a head become pairs."""
    made = np.empty_like(weight)
    dim = weight.shape[0] // heads
    for head in range(heads):
        for i in range(dim // 2):
            made[head * dim + 2 * i] = weight[head * dim + i]
            made[head * dim + 2 * i + 1] = weight[head * dim + dim // 2 + i]
    return made


def model_of(checkpoint):
    model = train.build(checkpoint["settings"], checkpoint["vocab_size"])
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(checkpoint["model"][name])
    return model


@unittest.skipIf(MISSING, MISSING)
class ConvertTest(unittest.TestCase):
    def setUp(self):
        self.holder = tempfile.TemporaryDirectory()
        self.addCleanup(self.holder.cleanup)
        self.folder = pathlib.Path(self.holder.name)

    def base(self, body):
        """A golden A2D checkpoint as if it were the autoregressive one."""
        folder = self.folder / body
        shutil.copytree(GOLDEN / "models" / ("a2d_" + body), folder)
        config = json.loads((folder / "config.json").read_text())
        config["architectures"] = [BODIES[body]]
        (folder / "config.json").write_text(json.dumps(config))
        return folder, config

    def check_logits(self, checkpoint, body):
        expected = convert.read_safetensors(GOLDEN / "logits" / ("a2d_%s_13.safetensors" % body))["logits"]
        ids = json.loads((GOLDEN / "logits" / ("a2d_%s_13.json" % body)).read_text())["ids"]
        with torch.no_grad():
            found = model_of(checkpoint)(torch.tensor([ids]))[0, :, :expected.shape[1]]
        self.assertLess(float((found - expected).abs().max()), 2e-4 * max(1.0, float(expected.abs().max())))

    def test_a_folder(self):
        for body in BODIES:
            with self.subTest(body):
                folder, config = self.base(body)
                checkpoint, tokenizer, _ = convert.convert(folder)
                self.check_logits(checkpoint, body)

    def test_the_mask_token_is_the_mean_of_the_others(self):
        folder, _ = self.base("qwen3")  # which has one already: it is called otherwise here
        text = (folder / "tokenizer.json").read_text(encoding="utf-8").replace("<|mask|>", "<|other|>")
        (folder / "tokenizer.json").write_text(text, encoding="utf-8")
        checkpoint, tokenizer, _ = convert.convert(folder)
        mask = checkpoint["settings"]["mask_token"]
        self.assertIn((mask, "<|mask|>"), [(t["id"], t["content"]) for t in tokenizer["added_tokens"]])
        self.assertEqual(sum(t["id"] == mask for t in tokenizer["added_tokens"]), 1)
        table = checkpoint["model"]["embedding"]
        self.assertTrue(torch.allclose(table[mask], table[:mask].mean(0), atol=1e-6))

    def write_gguf(self, body, path, lack=""):
        folder, config = self.base(body)
        tensors = {name: value.numpy() for name, value in convert.read_safetensors(folder / "model.safetensors").items()}
        tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        writer = gguf.GGUFWriter(str(path), body)
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_embedding_length(config["hidden_size"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count(config["num_attention_heads"])
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_key_length(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_rope_freq_base(config["rope_theta"])
        vocabulary = dict(tokenizer["model"]["vocab"], **{t["content"]: t["id"] for t in tokenizer["added_tokens"]})
        names = sorted(vocabulary, key=vocabulary.get)
        special = {t["content"] for t in tokenizer["added_tokens"]}
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(names)
        writer.add_token_types([3 if name in special else 1 for name in names])
        writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]])
        writer.add_eos_token_id(vocabulary[names[-1]])
        parts = {theirs: ours for ours, theirs in convert.GGUF_PARTS.items()}
        ends = {theirs: ours for ours, theirs in convert.GGUF_ENDS.items()}
        for name, value in tensors.items():
            if name in ends:
                called = ends[name]
            else:
                _, _, layer, rest = name.split(".", 3)
                part, kind = rest.rsplit(".", 1)
                called = "blk.%s.%s.%s" % (layer, parts[part], kind)
                if body == "llama" and part in ("self_attn.q_proj", "self_attn.k_proj"):
                    value = permuted(value, config["num_attention_heads" if "q_proj" in part else "num_key_value_heads"])
            if called != lack:
                writer.add_tensor(called, np.ascontiguousarray(value, dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return folder

    def test_a_gguf_file(self):
        for body in BODIES:
            with self.subTest(body):
                path = self.folder / (body + ".gguf")
                folder = self.write_gguf(body, path)
                checkpoint, tokenizer, _ = convert.convert(path)
                self.check_logits(checkpoint, body)
                ours = tokenizers.Tokenizer.from_str(json.dumps(tokenizer))
                theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
                text = "def f(x1):\n    return  x1 + 'ä'\n"
                self.assertEqual(ours.encode(text, add_special_tokens=False).ids, theirs.encode(text, add_special_tokens=False).ids)

    def test_what_cannot_be_converted_is_named(self):
        folder, config = self.base("llama")
        for change, word in (({"architectures": ["GPT2LMHeadModel"]}, "architectures"), ({"rope_scaling": {"factor": 2}}, "rope_scaling"),
                             ({"hidden_size": 12}, "is"), ({"eos_token_id": None}, "eos_token_id"), ({"num_hidden_layers": 2}, "layers.2")):
            (folder / "config.json").write_text(json.dumps(dict(config, **change)))
            with self.assertRaisesRegex(convert.Refused, word):
                convert.convert(folder)
        self.write_gguf("qwen3", self.folder / "lacking.gguf", lack="output_norm.weight")
        with self.assertRaisesRegex(KeyError, "model.norm.weight"):
            convert.convert(self.folder / "lacking.gguf")

    def test_trained_on_and_served(self):
        if not CINNABAR:
            self.skipTest("name the cinnabar program")
        folder, _ = self.base("qwen2")
        for objective in ("masked", "block"):
            run, out = self.folder / objective, self.folder / (objective + "_tokenizer")
            convert.main(["--base", str(folder), "--run", str(run), "--tokenizer", str(out), "--objective", objective,
                          "--anneal-steps", "2", "--block-length", "4"])
            for name in ("train", "held_out"):
                (self.folder / (name + ".jsonl")).write_text(
                    json.dumps({"text": "def f(x):\n    return x", "body": 9, "names": {}}) + "\n")
            before = torch.load(run / "checkpoint-0000000.pt", map_location="cpu")["model"]["embedding"].clone()
            train.main(["--corpus", str(self.folder), "--tokenizer", str(out), "--run", str(run), "--steps", "3", "--set",
                        "tokens_per_step=256", "--set", "micro_tokens=128", "--set", "synthetic_share=0"])
            checkpoint = torch.load(train.checkpoint_of(run), map_location="cpu")
            self.assertEqual(checkpoint["step"], 3)
            self.assertFalse(torch.equal(before, checkpoint["model"]["embedding"]))
            export.export(checkpoint, out, self.folder / (objective + "_model"))
            done = subprocess.run([CINNABAR, "generate", "--model", str(self.folder / (objective + "_model")), "--prompt", "def f",
                                   "--gen-length", "8", "--json"], capture_output=True, text=True)
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertLessEqual(len(json.loads(done.stdout)["tokens"]), 8)


if __name__ == "__main__":
    CINNABAR = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    unittest.main(verbosity=2)
