"""From functions to batches: what is masked, how long a canvas is, in which order a run sees it.

Everything is a pure function of (seed, step), so that a run resumes on another machine with the same batches.
"""

import json
import random
import re

import numpy as np

from training import synthetic
from training.tokenizer import BOS, EOS

_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class Sample:
    """One sequence. `maskable` are the positions of the canvas; the rest is given."""

    __slots__ = ("ids", "maskable", "weight", "text_end", "canvas_end")

    def __init__(self, ids, maskable, weight, text_end, canvas_end):
        self.ids = ids
        self.maskable = maskable      # positions, ascending
        self.weight = weight          # of the whole sequence in the loss
        self.text_end = text_end      # from here to canvas_end: <eos> fill, weighted less after the first
        self.canvas_end = canvas_end


def in_blocks(sample, block_length, eos):
    """The sample lengthened to whole blocks; what is added belongs to the canvas."""
    extra = -len(sample.ids) % block_length
    end = len(sample.ids) + extra
    return Sample(sample.ids + [eos] * extra, sample.maskable + list(range(len(sample.ids), end)), sample.weight, sample.text_end, end)


class Corpus:
    """Functions of real packages and of the synthetic domain, cut into tasks."""

    def __init__(self, path, tokenizer_path, length_max=128, synthetic_share=0.4, rename=0.4, tasks=None, block_length=0, bos=BOS,
                 eos=EOS, file_share=0.0):
        """file_share: how much of what is real are pieces of files, of NAME_files.jsonl beside `path`, instead of functions.
        block_length > 0: samples are whole blocks, filled with <eos>, and gaps reach to the end (nothing after a block is seen)."""
        from tokenizers import Tokenizer
        self.tokenizer = Tokenizer.from_file(str(tokenizer_path))
        self.length_max = length_max
        self.synthetic_share = synthetic_share
        self.rename = rename
        self.block_length, self.bos, self.eos = block_length, bos, eos
        self.tasks = tasks or ({"whole": 0.6, "body": 0.4} if block_length else
                               {"whole": 0.25, "span": 0.45, "body": 0.15, "names": 0.15})
        self.functions, self.pieces, self.file_share = [], [], file_share
        if file_share > 0:
            for line in open(str(path).replace(".jsonl", "_files.jsonl"), encoding="utf-8"):
                piece = json.loads(line)
                if len(piece["text"]) <= 4 * length_max:
                    self.pieces.append((piece["text"], piece["body"]))
        pool = {}
        for line in open(path, encoding="utf-8"):
            sample = json.loads(line)
            # About 3.3 bytes a token; what turns out longer is drawn again.
            if len(sample["text"]) <= 4 * length_max:
                self.functions.append((sample["text"], sample["body"], sample["names"]))
                for name in sample["names"]:
                    pool[name] = pool.get(name, 0) + 1
        self.name_pool = sorted(name for name in pool if len(name) > 1)
        vocabulary = self.tokenizer.get_vocab()
        self.is_word = np.zeros(len(vocabulary), dtype=bool)
        common = set("def return for in if not and or is else import from class with as the of a an to by self None True "
                     "False that are".split())
        for token, index in vocabulary.items():
            self.is_word[index] = token.isalpha() and len(token) > 1 and token not in common

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def _renamed(self, text, body, names, rng):
        """Locals and parameters under new names, everywhere alike: what they are can then only be copied."""
        new = {}
        for name in names:
            if rng.random() < 0.8:
                pick = rng.random()
                if pick < 0.6:
                    fresh = rng.choice(self.name_pool)
                elif pick < 0.8:
                    fresh = rng.choice(synthetic.NOUNS)
                else:
                    fresh = synthetic.made_up(rng)
                if fresh not in names and fresh not in new.values() and fresh not in text:
                    new[name] = fresh
        spans = sorted((begin, end, new[name]) for name, where in names.items() if name in new for begin, end in where)
        parts, at, moved = [], 0, 0
        for begin, end, fresh in spans:
            if begin < at:
                continue
            parts += [text[at:begin], fresh]
            if end <= body:
                moved += len(fresh) - (end - begin)
            at = end
        parts.append(text[at:])
        return "".join(parts), body + moved

    def function(self, rng):
        """(text, where the body begins: the newline in front of it)."""
        if rng.random() < self.synthetic_share:
            text = synthetic.function(rng)
            doc = text.find('"""\n')
            return text, (doc + 3 if doc >= 0 else text.index("\n"))
        if self.pieces and rng.random() < self.file_share:
            return rng.choice(self.pieces)
        text, body, names = self.functions[rng.randrange(len(self.functions))]
        if names and rng.random() < self.rename:
            text, body = self._renamed(text, body, names, rng)
        return text, body

    def sample(self, rng):
        while True:
            text, body = self.function(rng)
            made = self.task(text, body, rng)
            if made is not None and self.block_length:
                made = in_blocks(made, self.block_length, self.eos)
            if made is not None and len(made.ids) <= self.length_max:
                return made

    def task(self, text, body, rng):
        pick = rng.random()
        for kind, share in self.tasks.items():
            pick -= share
            if pick < 0:
                break
        if kind == "whole":
            ids = [self.bos] + self.encode(text)
            end = len(ids)
            ids += [self.eos] * (1 + rng.choice([0, 0, 2, 4, 8, 16]))
            return Sample(ids, list(range(1, len(ids))), 1.0, end, len(ids))
        if kind == "body":
            prefix = [self.bos] + self.encode(text[:body])
            middle = self.encode(text[body:])
            extra = 1 + rng.randrange(24)
            ids = prefix + middle + [self.eos] * extra
            end = len(prefix) + len(middle)
            return Sample(ids, list(range(len(prefix), len(ids))), 1.0, end, len(ids))
        if kind == "names":
            ids = [self.bos] + self.encode(text)
            seen, again = set(), []
            for position, token in enumerate(ids):
                if self.is_word[token]:
                    if token in seen:
                        again.append(position)
                    seen.add(token)
            if not again:
                return None
            return Sample(ids, again, 1.5, len(ids), len(ids))
        begin, end = self.span(text, body, rng)
        if begin >= end:
            return None
        prefix, middle, suffix = [self.bos] + self.encode(text[:begin]), self.encode(text[begin:end]), self.encode(text[end:])
        extra = 0 if rng.random() < 0.35 else 1 + rng.randrange(16)
        ids = prefix + middle + [self.eos] * extra + suffix
        canvas_end = len(prefix) + len(middle) + extra
        return Sample(ids, list(range(len(prefix), canvas_end)), 1.5, len(prefix) + len(middle), canvas_end)

    def span(self, text, body, rng):
        """[begin, end) of a gap: a line, lines, or a piece that starts and ends between words."""
        pick = rng.random()
        lines = [m.span() for m in re.finditer(r"[^\n]+", text)]
        if pick < 0.55:
            candidates = [i for i, (begin, _) in enumerate(lines) if begin >= body] or list(range(len(lines)))
            if rng.random() < 0.1:
                candidates = list(range(len(lines)))
            first = rng.choice(candidates)
            last = min(len(lines) - 1, first + (0 if rng.random() < 0.75 else rng.randrange(1, 4)))
            begin, end = lines[first][0], lines[last][1]
            begin += len(text[begin:end]) - len(text[begin:end].lstrip(" "))
            if rng.random() < 0.45:  # the line is begun: the rest of it
                cuts = [m.start() for m in re.finditer(r"\b|(?<=[^A-Za-z0-9_])(?=[^A-Za-z0-9_])", text[begin:lines[first][1]])]
                begin += rng.choice(cuts) if cuts else 0
            elif rng.random() < 0.3:  # with its indentation
                begin = lines[first][0] - (lines[first][0] > 0 and rng.random() < 0.5)
            return begin, end
        lower = text.index("\n") if rng.random() < 0.8 else 0
        cuts = [m.start() + lower for m in re.finditer(r"\b|(?<=[^A-Za-z0-9_])(?=[^A-Za-z0-9_])", text[lower:])] + [len(text)]
        first = rng.randrange(len(cuts))
        last = min(len(cuts) - 1, first + rng.choice([1, 1, 2, 2, 3, 3, 4, 5, 6, 8, 10]))
        return cuts[first], cuts[last]


class Batch:
    """Rows of one length. loss = sum(weight * cross entropy) over the masked positions; t is that of a row's first block."""

    __slots__ = ("ids", "clean", "length", "rows", "columns", "targets", "weights", "t", "allowed")


def maskable_blocks(sample, block_length):
    """The maskable positions, by block; one block where block_length is 0."""
    positions = np.asarray(sample.maskable)
    if not block_length:
        return [positions]
    return np.split(positions, np.flatnonzero(np.diff(positions // block_length)) + 1)


def mask_sample(sample, times, generator, eos_fill_weight=0.1, block_length=0):
    """(masked positions, their weights) at masking rates times > 0, one a block; never none in a block. A weight is the inverse of
    the probability that the position is masked, so that the loss is that of independent masks."""
    chosen, weights = [], []
    for positions, t in zip(maskable_blocks(sample, block_length), times):
        drawn = positions[:0]
        while len(drawn) == 0:
            drawn = positions[generator.random(len(positions)) < t]
        chosen.append(drawn)
        weights.append(np.full(len(drawn), sample.weight * (1 - (1 - t) ** len(positions)) / t))
    chosen, weights = np.concatenate(chosen), np.concatenate(weights)
    weights[(chosen > sample.text_end) & (chosen < sample.canvas_end)] *= eos_fill_weight
    return chosen, weights


def batches(samples, draw_times, mask_token, generator, micro_tokens, eos_fill_weight=0.1, block_length=0):
    """Groups of samples of like length, each a Batch. All weights together sum to about the number of positions.

    draw_times(count) gives as many masking rates: one a sample, or one a block of its maskable positions."""
    order = sorted(range(len(samples)), key=lambda i: len(samples[i].ids))
    counts = [len(maskable_blocks(sample, block_length)) for sample in samples]
    times = np.split(np.asarray(draw_times(sum(counts))), np.cumsum(counts)[:-1])
    masked = [mask_sample(sample, t, generator, eos_fill_weight, block_length) for sample, t in zip(samples, times)]
    groups, group = [], []
    for index in reversed(order):
        width = len(samples[group[0]].ids) if group else len(samples[index].ids)
        if group and width * (len(group) + 1) > micro_tokens:
            groups.append(group)
            group = []
        group.append(index)
    groups.append(group)
    made = []
    for group in groups:
        batch = Batch()
        batch.allowed = None  # [rows, 1, queries, keys] of bool: what attention is further restricted to
        length = max(len(samples[i].ids) for i in group)
        batch.clean = np.full((len(group), length), EOS, dtype=np.int64)
        batch.length = np.array([len(samples[i].ids) for i in group])
        batch.t = np.array([times[i][0] for i in group], dtype=np.float32)
        rows, columns, weights = [], [], []
        for row, index in enumerate(group):
            batch.clean[row, :len(samples[index].ids)] = samples[index].ids
            rows.append(np.full(len(masked[index][0]), row))
            columns.append(masked[index][0])
            weights.append(masked[index][1])
        batch.rows, batch.columns = np.concatenate(rows), np.concatenate(columns).astype(np.int64)
        batch.weights = np.concatenate(weights).astype(np.float32)
        batch.ids = batch.clean.copy()
        batch.targets = batch.clean[batch.rows, batch.columns]
        batch.ids[batch.rows, batch.columns] = mask_token
        made.append(batch)
    return made


def antithetic_times(count, generator, low):
    """`count` rates in [low, 1], one in each of `count` equal strata, in random order."""
    times = (np.arange(count) + generator.random()) / count
    return low + (1 - low) * generator.permutation(times)


def step_batches(corpus, seed, step, settings):
    """The batches of one optimizer step, and how many positions they hold."""
    rng = random.Random("%d/%d" % (seed, step))
    generator = np.random.default_rng([seed, step])
    samples, total = [], 0
    while total < settings["tokens_per_step"]:
        sample = corpus.sample(rng)
        samples.append(sample)
        total += len(sample.ids)
    made = batches(samples, lambda count: antithetic_times(count, generator, settings["t_min"]), settings["mask_token"], generator,
                   settings["micro_tokens"], settings["eos_fill_weight"], corpus.block_length)
    return made, total
