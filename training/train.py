"""Trains a diffusion model: masked or block diffusion on a decoder, score entropy on SEDD's transformer. A run folder holds the
settings, the checkpoints, the log and the loss curve.

  python3 -m training.train --corpus DIR --tokenizer DIR --run DIR [--hours H | --steps N] [settings]

Resumes from the newest checkpoint of --run, to the same bits on the same kind of machine: a step's batches come from
(seed, step), and gradients are summed in the order of the microbatches whichever process computed them.
"""

import argparse
import json
import math
import os
import pathlib
import time

import numpy as np
import torch
import torch.multiprocessing as multiprocessing

from training import data, objectives, plot
from training.networks import Decoder, DiT

OBJECTIVES = ("masked", "block", "score")
DEFAULTS = {
    "objective": "masked", "block_length": 8, "cond_dim": 64, "anneal_steps": 0,
    "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64,
    "intermediate_size": 704, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": True, "qk_norm": True,
    "attention_bias": False,
    "max_position_embeddings": 512,
    "seed": 1, "tokens_per_step": 8192, "micro_tokens": 2048, "length_max": 128, "t_min": 0.03, "eos_fill_weight": 0.1,
    "synthetic_share": 0.4, "file_share": 0.0, "rename": 0.4,
    "lr_muon": 0.02, "lr_adam": 3e-3, "weight_decay": 0.01, "warmup_steps": 50,
    "decay_share": 0.35, "lr_end": 0.03, "clip": 1.0, "ema": 0.998, "schedule": "wsd",
    "mask_token": 0, "bos_token": data.BOS, "eos_token": data.EOS,
}


def newton_schulz(g, iterations=5):
    """The nearest (semi-)orthogonal matrix, roughly: Muon's quintic iteration."""
    x = g.bfloat16() if g.device.type == "cuda" or torch.backends.mkldnn.is_available() and torch.__version__ >= "2" else g.float()
    x = x / (x.norm() + 1e-7)
    flip = x.shape[0] > x.shape[1]
    if flip:
        x = x.T
    for _ in range(iterations):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
    return (x.T if flip else x).float()


class Optimizer:
    """Muon for the matrices inside the layers (not those of the noise level), Adam for the rest. Its state is a dict of tensors
    by parameter name."""

    def __init__(self, model, settings):
        self.settings = settings
        self.names = [name for name, _ in model.named_parameters()]
        self.parameters = dict(model.named_parameters())
        self.state = {}
        for name, p in self.parameters.items():
            self.state[name + "/m"] = torch.zeros_like(p, memory_format=torch.contiguous_format)
            if not self.is_matrix(name):
                self.state[name + "/v"] = torch.zeros_like(p)
            self.state[name + "/ema"] = p.detach().clone()

    def is_matrix(self, name):
        return self.parameters[name].ndim == 2 and name.startswith(("layers.", "blocks.")) and "adaLN" not in name

    def rate(self, step, progress):
        """Warm-up, then stable and decaying ("wsd") or "cosine", as a factor; `progress` in [0, 1] is the share that is done."""
        s = self.settings
        factor = min(1.0, (step + 1) / s["warmup_steps"])
        if s["schedule"] == "cosine":
            factor *= s["lr_end"] + (1 - s["lr_end"]) * (1 + math.cos(math.pi * min(1.0, progress))) / 2
        elif progress > 1 - s["decay_share"]:
            left = max(0.0, (1 - progress) / s["decay_share"])
            factor *= s["lr_end"] + (1 - s["lr_end"]) * left
        return factor

    @torch.no_grad()
    def update(self, name, gradient, step, factor):
        s, p, m = self.settings, self.parameters[name], self.state[name + "/m"]
        if self.is_matrix(name):
            m.mul_(0.95).add_(gradient)
            blend = gradient + 0.95 * m
            parts = getattr(p, "stacked", [p.shape[0]])
            made = torch.cat([newton_schulz(part) * max(1.0, part.shape[0] / part.shape[1]) ** 0.5
                              for part in blend.split(parts)])
            rate = s["lr_muon"] * factor
            p.mul_(1 - rate * s["weight_decay"]).add_(made, alpha=-rate)
        else:
            v = self.state[name + "/v"]
            m.mul_(0.9).add_(gradient, alpha=0.1)
            v.mul_(0.98).addcmul_(gradient, gradient, value=0.02)
            # A gradient is mostly zero in a row whose token did not come up: those rows rest.
            step_size = s["lr_adam"] * factor / (1 - 0.9 ** (step + 1))
            p.addcdiv_(m, (v / (1 - 0.98 ** (step + 1))).sqrt_().add_(1e-8), value=-step_size)
        ema = self.state[name + "/ema"]
        ema.lerp_(p.detach(), 1 - min(s["ema"], (step + 1) / (step + 10)))


class Held:
    """Held-out bounds: the NELBO of whole functions, with fixed masks, in nats a token and bits a byte."""

    def __init__(self, corpus, texts, seed=7, repeats=2):
        self.samples, self.bytes, self.tokens = [], 0, 0
        for text in texts:
            ids = [corpus.bos] + corpus.encode(text) + [corpus.eos]
            sample = data.Sample(ids, list(range(1, len(ids))), 1.0, len(ids), len(ids))
            if corpus.block_length:  # the bound is then that of the filled blocks
                sample = data.in_blocks(sample, corpus.block_length, corpus.eos)
            if len(sample.ids) <= corpus.length_max:
                self.samples += [sample] * repeats
                self.bytes += len(text) * repeats
                self.tokens += (len(ids) - 1) * repeats
        self.seed, self.block_length = seed, corpus.block_length

    def bound(self, model, settings, device, half):
        generator = np.random.default_rng(self.seed)
        total = 0.0
        for batch in data.batches(self.samples, lambda count: data.antithetic_times(count, generator, 0.02), settings["mask_token"],
                                  generator, settings["micro_tokens"], 1.0, self.block_length):
            with torch.no_grad():
                total += float(objectives.loss(model, batch, settings, device, half)[0])
        return total / self.tokens, total / self.bytes / math.log(2)


def checkpoint_of(run):
    found = sorted(run.glob("checkpoint-*.pt"))
    return found[-1] if found else None


class Run:
    """One process's part of a run. Rank 0 also logs, saves and ends it."""

    def __init__(self, options, settings, shared=None, rank=0, world=1):
        self.options, self.settings, self.rank, self.world, self.shared = options, settings, rank, world, shared
        torch.set_num_threads(options.threads)
        torch.manual_seed(settings["seed"])
        self.device = torch.device(options.device)
        self.half = options.bf16
        tokenizer = pathlib.Path(options.tokenizer) / "tokenizer.json"
        self.corpus = data.Corpus(pathlib.Path(options.corpus) / "train.jsonl", tokenizer, settings["length_max"],
                                  settings["synthetic_share"], settings["rename"],
                                  block_length=settings["block_length"] if settings["objective"] == "block" else 0,
                                  bos=settings["bos_token"], eos=settings["eos_token"],
                                  file_share=settings["file_share"])
        self.run = pathlib.Path(options.run)

    def work(self):
        model, optimizer, gradients = self.shared["model"], self.shared["optimizer"], self.shared["gradients"]
        parameters = list(model.parameters())
        local = model
        if self.rank == 0:
            held = [json.loads(line)["text"] for line in
                    open(pathlib.Path(self.options.corpus) / "held_out.jsonl", encoding="utf-8")]
            held = Held(self.corpus, held[::max(1, len(held) // self.options.held_out)])
            log = open(self.run / "log.jsonl", "a", buffering=1, encoding="utf-8")
        step = self.shared["step0"]
        seconds0, started, saved = self.shared["seconds0"], time.time(), time.time()
        tokens = self.shared["tokens0"]
        losses = []
        while True:
            micro, positions = data.step_batches(self.corpus, self.settings["seed"], step, self.settings)
            for index, batch in enumerate(micro):
                batch.allowed = objectives.annealed_attention(batch, step, index, self.settings, self.device)
            assert len(micro) <= len(gradients), "more microbatches than slots"
            while True:
                with self.shared["lock"]:
                    index = self.shared["next"].value
                    self.shared["next"].value = index + 1
                if index >= len(micro):
                    break
                slot = gradients[index]
                slot.zero_()
                at = 0
                for p in parameters:
                    p.grad = slot[at:at + p.numel()].view_as(p)
                    at += p.numel()
                loss, entropy, count = objectives.loss(local, micro[index], self.settings, self.device, self.half)
                (loss / positions).backward()
                self.shared["losses"][index] = torch.tensor([float(loss.detach()) / positions, entropy, count])
            self.shared["barrier"].wait()
            total = gradients[0]
            if self.rank == 0:
                for index in range(1, len(micro)):
                    total.add_(gradients[index])
                norm = float(total.norm())
                total.mul_(min(1.0, self.settings["clip"] / (norm + 1e-6)))
                self.shared["next"].value = 0
                elapsed = seconds0 + time.time() - started
                self.shared["progress"].value = (step / self.options.steps if self.options.steps else
                                                 min(1.0, elapsed / (3600 * self.options.hours)))
                losses.append(self.shared["losses"][:len(micro)].sum(0).tolist())
            self.shared["barrier"].wait()
            progress = self.shared["progress"].value
            factor = optimizer.rate(step, progress)
            at = 0
            for index, name in enumerate(optimizer.names):
                size = optimizer.parameters[name].numel()
                if index % self.world == self.rank:
                    optimizer.update(name, total[at:at + size].view_as(optimizer.parameters[name]), step, factor)
                at += size
            step, tokens = step + 1, tokens + positions
            over = step >= self.options.steps if self.options.steps else progress >= 1
            self.shared["barrier"].wait()
            if self.rank == 0:
                elapsed = seconds0 + time.time() - started
                if step % self.options.log_every == 0 or over:
                    mean = np.array(losses).sum(0)
                    record = {"step": step, "tokens": tokens, "seconds": round(elapsed, 1),
                              "loss": round(mean[0] / len(losses), 4), "entropy": round(mean[1] / mean[2], 4),
                              "norm": round(norm, 3), "rate": round(factor, 4)}
                    losses = []
                    if step % self.options.eval_every == 0 or over:
                        record["nelbo"], record["bits_per_byte"] = (
                            round(x, 4) for x in self.with_ema(held.bound))
                    log.write(json.dumps(record) + "\n")
                    print(" ".join("%s=%s" % item for item in record.items()), flush=True)
                if over or time.time() - saved > 60 * self.options.save_minutes:
                    self.save(step, tokens, elapsed)
                    saved = time.time()
                    plot.curve(self.run / "log.jsonl", self.run / "loss.svg")
            if over:
                break

    def with_ema(self, function):
        model, optimizer = self.shared["model"], self.shared["optimizer"]
        kept = {name: p.detach().clone() for name, p in optimizer.parameters.items()}
        with torch.no_grad():
            for name, p in optimizer.parameters.items():
                p.copy_(optimizer.state[name + "/ema"])
            made = function(model, self.settings, self.device, self.half)
            for name, p in optimizer.parameters.items():
                p.copy_(kept[name])
        return made

    def save(self, step, tokens, elapsed):
        optimizer = self.shared["optimizer"]
        path = self.run / ("checkpoint-%07d.pt" % step)
        torch.save({"settings": self.settings, "step": step, "tokens": tokens, "seconds": elapsed,
                    "vocab_size": self.shared["vocab_size"],
                    "model": {k: v.detach().cpu() for k, v in optimizer.parameters.items()},
                    "optimizer": {k: v.cpu() for k, v in optimizer.state.items()}}, str(path) + ".part")
        os.replace(str(path) + ".part", path)
        for old in sorted(self.run.glob("checkpoint-*.pt"))[:-self.options.keep]:
            old.unlink()


def worker(rank, options, settings, shared):
    Run(options, settings, shared, rank, options.processes).work()


def build(settings, vocab_size):
    """The network of the settings' objective. With score entropy the absorbing token is one more id, the last."""
    if settings["objective"] != "score":
        return Decoder(dict(settings, vocab_size=vocab_size))
    if settings["mask_token"] != vocab_size:
        raise SystemExit("--set mask_token=%d: score entropy needs the id behind the vocabulary" % vocab_size)
    return DiT(vocab_size + 1, settings["hidden_size"], settings["num_hidden_layers"], settings["num_attention_heads"],
               settings["cond_dim"], settings["max_position_embeddings"], True)


def vocabulary_size(tokenizer):
    """Ids of a tokenizer.json, added tokens included."""
    read = json.loads((pathlib.Path(tokenizer) / "tokenizer.json").read_text(encoding="utf-8"))
    return 1 + max(list(read["model"]["vocab"].values()) + [token["id"] for token in read.get("added_tokens", [])])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--run", required=True)
    parser.add_argument("--hours", type=float, default=1.0, help="length of the whole run, earlier parts included")
    parser.add_argument("--steps", type=int, default=0, help="length in steps instead")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true", help="products in bfloat16")
    parser.add_argument("--log-every", type=int, default=10)
    parser.add_argument("--eval-every", type=int, default=200)
    parser.add_argument("--held-out", type=int, default=200, help="held-out functions in the bound")
    parser.add_argument("--save-minutes", type=float, default=5)
    parser.add_argument("--keep", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of DEFAULTS")
    options = parser.parse_args(argv)
    run = pathlib.Path(options.run)
    run.mkdir(parents=True, exist_ok=True)
    newest = checkpoint_of(run)
    saved = torch.load(newest, map_location="cpu") if newest else None
    settings = dict(DEFAULTS, **(saved["settings"] if saved else {}))
    vocab = saved["vocab_size"] if saved and "vocab_size" in saved else vocabulary_size(options.tokenizer)
    for item in options.set:
        name, value = item.split("=", 1)
        if name not in DEFAULTS:
            parser.error("--set %s: no such setting; see DEFAULTS" % name)
        try:
            settings[name] = json.loads(value)
        except ValueError:
            settings[name] = value
    if settings["objective"] not in OBJECTIVES:
        parser.error("--set objective=%s: known are %s" % (settings["objective"], ", ".join(OBJECTIVES)))
    if settings["objective"] == "block" and settings["length_max"] % settings["block_length"]:
        parser.error("--set length_max=%d: not a multiple of block_length %d" % (settings["length_max"], settings["block_length"]))
    if settings["objective"] == "score" and not saved:
        settings["mask_token"] = vocab
    (run / "settings.json").write_text(json.dumps(settings, indent=1) + "\n")
    torch.manual_seed(settings["seed"])
    model = build(settings, vocab).to(options.device)
    optimizer = Optimizer(model, settings)
    if saved:
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(saved["model"][name])
            for name, value in optimizer.state.items():
                value.copy_(saved["optimizer"][name])
    for p in model.parameters():
        p.share_memory_()
    for value in optimizer.state.values():
        value.share_memory_()
    size = sum(p.numel() for p in model.parameters())
    slots = settings["tokens_per_step"] // settings["micro_tokens"] * 2 + 2
    context = multiprocessing.get_context("fork")
    shared = {"model": model, "vocab_size": vocab, "optimizer": optimizer, "lock": context.Lock(), "next": context.Value("i", 0),
              "gradients": [torch.zeros(size, device=options.device).share_memory_() for _ in range(slots)],
              "losses": torch.zeros(slots, 3).share_memory_(), "barrier": context.Barrier(options.processes),
              "progress": context.Value("d", 0.0), "step0": saved["step"] if saved else 0,
              "tokens0": saved["tokens"] if saved else 0, "seconds0": saved["seconds"] if saved else 0.0}
    print("parameters=%d step=%d" % (size, shared["step0"]), flush=True)
    if options.processes == 1:
        worker(0, options, settings, shared)
        return
    processes = [context.Process(target=worker, args=(rank, options, settings, shared)) for rank in range(options.processes)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit("a process failed: " + str([process.exitcode for process in processes]))


if __name__ == "__main__":
    main()
