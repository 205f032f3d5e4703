"""joint_threshold_indel: one open block of a model that predicts where tokens go and where some are put in.
Follows sgl-project/sglang, python/sglang/srt/dllm/algorithm/joint_threshold_indel.py, on float64 rows of logits, with the
differences that ../README.md names."""
import numpy as np

from .models import softmax

TRIED_MAX = 7  # tokens remembered of a position


class Block:
    """`events` gets what happened, by name. `guard` is samplers.require, which refuses what float32 could decide otherwise."""

    def __init__(self, tokens, given, traits, options, events, guard, gaps):
        self.given, self.events, self.guard = given, events, guard
        self.logit_gap, self.relative = gaps
        self.mask, self.delete, self.split = traits.mask_token, traits.delete_token, traits.split_token
        self.original = [t == self.mask and not g for t, g in zip(tokens, given)]
        self.threshold = options.get("threshold", 0.9)
        self.edit_threshold = options.get("edit_threshold", 0.9)
        self.budget = options.get("edit_steps", 16)
        self.num_steps = self.num_looks = 0
        self.seen, self.tried = set(), {}

    def best(self, row, without=()):
        """The best id that is not among `without`, and its probability, of which these are a part."""
        logits = np.array(row, dtype=np.float64)
        p = softmax(logits)
        logits[list(without)] = -np.inf
        token = int(np.argmax(logits))
        self.guard(logits[token] - np.delete(logits, token).max() > self.logit_gap, "argmax")
        return token, p[token]

    def far(self, a, b, what):
        self.guard(abs(a - b) > self.relative(a, b), what)

    def fills(self, tokens, picks):
        """The masks that this step writes, and whether it is the last one."""
        masks = [i for i, t in enumerate(tokens) if t == self.mask and not self.given[i]]
        originals = [i for i in masks if self.original[i]]
        if self.num_looks >= self.budget > 0 or (self.budget == 0 and not originals):
            self.events.add("budget spent")
            return masks, True
        if self.num_steps > len(tokens) + self.budget:
            self.events.add("steps spent")
            return masks, True
        if not originals:
            return masks, False
        for i in masks:
            self.far(picks[i][1], self.threshold, "threshold")
        chosen = [i for i in masks if picks[i][1] > self.threshold]
        wanted = 1 + len(masks) - len(originals)
        if len(chosen) < wanted:
            order = sorted(masks, key=lambda i: (-picks[i][1], i))
            if wanted < len(masks):
                self.far(picks[order[wanted - 1]][1], picks[order[wanted]][1], "order")
            chosen = sorted(order[:wanted])
            self.events.add("best masks")
        else:
            self.events.add("masks above")
        if self.budget == 0 and set(originals) <= set(chosen):
            self.events.add("last originals")
            return masks, True
        return chosen, False

    def step(self, tokens, rows):
        """The block after a step, and whether it was the last."""
        tokens = list(tokens)
        open_ = [i for i, g in enumerate(self.given) if not g]
        originals = [i for i in open_ if tokens[i] == self.mask and self.original[i]]
        self.num_steps += 1
        self.num_looks += not originals
        picks = {i: self.best(rows[i]) for i in open_}
        for i in originals:
            if picks[i][0] == self.mask:
                picks[i] = self.best(rows[i], [self.mask])
                self.events.add("mask was best")
        chosen, last = self.fills(tokens, picks)
        for i in open_:
            if tokens[i] != self.mask and picks[i][0] != tokens[i]:
                self.far(picks[i][1], self.edit_threshold, "threshold")
                if picks[i][1] > self.edit_threshold:
                    chosen = sorted([*chosen, i])
                    self.events.add("edited")
        if not chosen:
            self.events.add("nothing to do")
            return tokens, True
        key = tuple(tokens)
        if last:
            for i in chosen:
                if picks[i][0] in (self.mask, self.delete, self.split):
                    picks[i] = self.best(rows[i], [self.mask, self.delete, self.split])
                    self.events.add("cleaned up")
        elif key in self.seen:
            changing = sorted((i for i in chosen if picks[i][0] != tokens[i]), key=lambda i: (picks[i][1], i))
            if changing:
                i = changing[0]
                if len(changing) > 1:
                    self.far(picks[i][1], picks[changing[1]][1], "order")
                without = set(self.tried.get(i, ())) | ({self.mask} if i in originals else set())
                picks[i] = self.best(rows[i], without)
                self.events.add("left a circle")
        self.seen.add(key)
        writes = {i: picks[i][0] for i in chosen}
        for i, token in writes.items():
            kept = self.tried.setdefault(i, [])
            if token not in kept:
                self.tried[i] = [*kept, token][-TRIED_MAX:]
        return self.moved(tokens, writes), last

    def moved(self, tokens, writes):
        """`tokens` after `writes`; every run between given positions is moved by itself. Moves self.original too."""
        out, original, i = [], [], 0
        while i < len(tokens):
            if self.given[i]:
                out.append(tokens[i])
                original.append(False)
                i += 1
                continue
            run = []
            begin = i
            while i < len(tokens) and not self.given[i]:
                token = writes.get(i)
                if token == self.delete:
                    self.events.add("delete")
                elif token == self.split:
                    run += [(self.mask, False), (tokens[i], self.original[i])]
                    self.events.add("split")
                else:
                    run.append((tokens[i] if token is None else token, self.original[i]))
                    if token == self.mask:
                        self.events.add("mask written" if tokens[i] != self.mask else "mask stays")
                i += 1
            if len(run) > i - begin:
                self.events.add("cut")
                if any(t != self.mask for t, _ in run[i - begin:]):
                    self.events.add("token cut")
            if len(run) < i - begin:
                self.events.add("filled up")
            run = (run + [(self.mask, False)] * (i - begin))[:i - begin]
            out += [t for t, _ in run]
            original += [o for _, o in run]
        self.original = original
        return out
