"""The samplers, on float64 probabilities. Greedy ones run to the end (generate); random ones are given as
exact probability functions of one step.

Rules that all samplers share (decisions of this project, see ../README.md):
  * The canvas spans from the first to the last position that is not given. Full attention: blocks of
    block_length from there, the last may be short. Block-causal: absolute multiples of the model's block.
  * The mask token is never picked, the best other token is, but its probability stays in the softmax. MDLM
    and SEDD remove it by their parameterisation.
  * Ties go to the lower token id and to the lower position.
  * Temperature 0: the token is the argmax; confidence, margin and entropy are those of softmax(logits) after
    the filters.

Every decision is guarded: when the runner-up is so close that float32 could decide differently, TooClose is
raised and the case is not used.
"""
import dataclasses
import math

import numpy as np

from . import indel
from .models import softmax


class TooClose(Exception):
    """A decision that float32 arithmetic could flip, or one that the rules leave open."""


LOGIT_GAP = 2e-3        # argmax and top-k, in logits
RELATIVE_GAP = 5e-4     # of probabilities
ABSOLUTE_GAP = 3e-4     # of margins and entropies
TOP_P_GAP = 1e-4        # top_p may move this much without another choice


def require(condition, what):
    if not condition:
        raise TooClose(what)


# --- one row of logits -------------------------------------------------------------------------------------

@dataclasses.dataclass
class Answer:
    token: int
    probability: float   # of the token, in the filtered softmax
    margin: float        # largest minus second largest probability
    entropy: float       # nats
    gap: float           # logit of the token minus that of the best other pickable one


def kept_ids(logits, top_k=0, top_p=1.0, top_k_first=False, guard=False, least=1):
    """Boolean [vocabulary]: what the filters leave. An id falls to top_p when the mass before it, in
    descending order, already exceeds top_p, but for the first `least`; to top_k when it is below the k-th largest logit."""
    def by_top_k(kept):
        if not 0 < top_k < len(logits):
            return kept
        values = np.sort(np.where(kept, logits, -np.inf))[::-1]
        require(not guard or values[top_k] == -np.inf or values[top_k - 1] - values[top_k] > LOGIT_GAP, "top_k")
        return kept & (logits >= values[top_k - 1])

    def by_top_p(kept):
        if top_p >= 1:
            return kept
        p = softmax(np.where(kept, logits, -np.inf))
        order = np.argsort(-p, kind="stable")
        before = np.cumsum(p[order]) - p[order]
        result = kept.copy()
        result[order[least:][before[least:] > top_p]] = False
        return result

    kept = np.ones(len(logits), dtype=bool)
    for rule in (by_top_k, by_top_p) if top_k_first else (by_top_p, by_top_k):
        kept = rule(kept)
    return kept


def answer_row(logits, mask_token, forbidden=(), uncounted=(), top_k=0, top_p=1.0, top_k_first=False, least=1):
    """Greedy pick and statistics of one row. `forbidden`: neither counted nor pickable; `uncounted`: left out
    of the softmax after the pick (their own probability is 0)."""
    logits = np.array(logits, dtype=np.float64)
    logits[list(forbidden)] = -np.inf
    kept = kept_ids(logits, top_k, top_p, top_k_first, guard=True, least=least)
    pickable = np.where(kept, logits, -np.inf)
    pickable[mask_token] = -np.inf
    token = int(np.argmax(pickable))
    require(pickable[token] > -np.inf, "only the mask token is left")
    others = np.delete(pickable, token)
    counted = np.where(kept, logits, -np.inf)
    counted[list(uncounted)] = -np.inf
    p = softmax(counted)
    first, second = np.sort(p)[::-1][:2]
    entropy = -float(np.sum(p[p > 0] * np.log(p[p > 0])))
    return Answer(token, float(p[token]), float(first - second), entropy,
                  float(pickable[token] - others.max()))


# --- the greedy loop -----------------------------------------------------------------------------------------

@dataclasses.dataclass
class Result:
    tokens: list
    trace: list           # per denoising step, the positions committed, ascending
    nfe: int              # forward passes of the authors' loop, up to the one that fills the last position
    nfe_min: int          # without those whose step transfers nothing
    events: set           # special paths that were taken, for choosing cases
    stopped: bool = False  # at an end of text, with the rest undecided


def canvas_blocks(given, traits, block_length):
    """[begin, end) of every block, in order, those without a masked position too."""
    masked = [i for i, g in enumerate(given) if not g]
    if not masked:
        return []
    begin, end = masked[0], masked[-1] + 1
    if traits.block_length:
        size = traits.block_length
        return [(b, min(b + size, len(given))) for b in range(begin // size * size, end, size)]
    size = block_length or end - begin
    return [(b, min(b + size, end)) for b in range(begin, end, size)]


def split_evenly(count, steps, step):
    """Transfers of `step` when `count` are spread over `steps`, the larger shares first."""
    return count // steps + (1 if step < count % steps else 0)


class Scores(list):
    """Scores of the masked positions; the first two may come `from_one_row` (shifted logits, positions 0 and 1)."""
    from_one_row = False


def take_best(scores, count, gap, events):
    """Indices of the `count` largest scores; ties to the lower index. Ends of a cut must differ by `gap`,
    unless they are exactly equal on every machine: 0, 1, or the same row of logits."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    if 0 < count < len(scores):
        last, next_ = scores[order[count - 1]], scores[order[count]]
        twins = getattr(scores, "from_one_row", False) and order[count - 1:count + 1] == [0, 1]
        if last == next_ and (twins or last in (0.0, 1.0)):
            events.add("tie")
        else:
            require(last - next_ > gap(last, next_), "order")
    return order[:count]


def relative(a, b):
    return RELATIVE_GAP * max(abs(a), abs(b))


def absolute(a, b):
    return ABSOLUTE_GAP * max(1.0, abs(a), abs(b))


def float32_share(count, rate):
    """The share of `count` as RND1's and P2's tensors round it down: of a whole number it can leave one less."""
    return int(np.float32(count) * np.float32(rate))


def dream_transfers(masked, step, steps, eps):
    """Dream's schedule: t falls linearly from 1 to eps."""
    if step >= steps - 1:
        return masked
    t, s = (1 - (1 - eps) * i / steps for i in (step, step + 1))
    value = masked * (1 - s / t)
    require(abs(value - round(value)) > 1e-4, "schedule")
    return int(value)


def select(name, options, answers, positions, block_masks, block_step, block_steps, traits, events):
    """Indices into `positions` (ascending masked positions of the open block) that are transferred."""
    m = len(positions)

    def scores_of(value):
        scores = Scores(value(a) for a in answers)
        scores.from_one_row = traits.shift and positions[:2] == [0, 1]
        return scores

    p = scores_of(lambda a: a.probability)
    if name == "low_confidence":
        return take_best(p, min(split_evenly(block_masks, block_steps, block_step), m), relative, events)
    if name == "random":  # greedy only where chance has no say
        count = min(split_evenly(block_masks, block_steps, block_step), m)
        require(count in (0, m), "random order")
        return list(range(count))
    if name == "origin":
        require(block_steps == 1, "random order")
        return list(range(m))
    if name in ("maskgit_plus", "topk_margin", "entropy"):
        count = dream_transfers(m, block_step, block_steps, options.get("eps", 1e-3))
        scores, gap = {"maskgit_plus": (p, relative),
                       "topk_margin": (scores_of(lambda a: a.margin), absolute),
                       "entropy": (scores_of(lambda a: -a.entropy), absolute)}[name]
        if name == "topk_margin":  # the mask token must not be one of the two
            require(all(a.probability - a.margin >= -1e-12 for a in answers), "margin of the mask token")
        return take_best(scores, count, gap, events)
    if name in ("threshold", "credit"):
        threshold = options.get("threshold", 0.9)
        require(all(abs(c - threshold) > relative(c, threshold) for c in p), "threshold")
        above = [i for i in range(m) if p[i] >= threshold]
        events.add("above" if len(above) > 1 else "fallback" if not above else "one")
        return above or take_best(p, 1, relative, events)
    if name == "fast_dllm_v2":
        threshold = options.get("threshold", 0.9)
        require(all(abs(c - threshold) > relative(c, threshold) for c in p), "threshold")
        above = [i for i in range(m) if p[i] > threshold]
        events.add("above" if len(above) > 1 else "fallback" if not above else "one")
        return above or take_best(p, 1, relative, events)
    if name == "factor":
        order = take_best(p, m, relative, events)
        bounds = [1 - options.get("factor", 1.0) / (rank + 1) for rank in range(1, m + 1)]
        bounds[0] = -1.0
        require(all(abs(p[i] - b) > 5e-4 for i, b in zip(order, bounds)), "factor")
        failures = [rank for rank in range(m) if p[order[rank]] < bounds[rank]]
        count = failures[0] if failures else m - 1
        if failures and failures[0] == m - 1:
            events.add("last rank fails")  # and is transferred all the same
        if count in (0, m - 1):
            count += 1
        events.add("several" if 1 < count < m else "all" if count == m else "one")
        require(count == m or p[order[count - 1]] - p[order[count]] > relative(p[order[count]], 0), "order")
        return order[:count]
    if name == "entropy_bounded":
        bound = options.get("entropy_bound", 0.1)
        entropies = [a.entropy for a in answers]
        order = sorted(range(m), key=lambda i: (entropies[i], i))
        count, total = 0, 0.0
        for index in order:
            require(count == 0 or abs(total - bound) > ABSOLUTE_GAP, "entropy bound")
            if count and total > bound:
                break
            count, total = count + 1, total + entropies[index]
        events.add("several" if 1 < count < m else "all" if count == m else "one")
        return take_best(scores_of(lambda a: -a.entropy), count, absolute, events)
    if name == "rnd1":
        count = m - float32_share(block_masks, (block_steps - 1 - block_step) / block_steps)
        return take_best(scores_of(lambda a: -a.entropy), count, absolute, events)
    if name == "rnd1_entropy_bounded":
        bound = options.get("entropy_bound", 0.1)
        order = take_best(p, m, relative, events)
        for a, b in zip(order, order[1:]):
            require(p[a] - p[b] > relative(p[a], p[b]), "order")
        entropies = np.array([answers[i].entropy for i in order])
        criterion = np.cumsum(entropies) - np.maximum.accumulate(entropies)
        require(np.all(np.abs(criterion[1:] - bound) > ABSOLUTE_GAP), "entropy bound")
        count = int(np.sum(criterion <= bound))
        events.add("several" if 1 < count < m else "all" if count == m else "one")
        return order[:count]
    if name == "hierarchical":
        return hierarchy(positions, p, options, 0, events)
    quota = split_evenly(traits.block_length, block_steps, block_step)
    if name == "block_sequential":
        window = range(positions[0], positions[0] + quota)
        return [i for i in range(m) if positions[i] in window]
    if quota > m:
        events.add("quota above masks")  # where the authors' code overwrites given tokens
    if name == "block_static":
        return take_best(p, min(quota, m), relative, events)
    if name == "block_dynamic":
        threshold = options.get("threshold", 0.9)
        require(all(abs(c - threshold) > relative(c, threshold) for c in p), "threshold")
        above = [i for i in range(m) if p[i] > threshold]
        if len(above) >= quota:
            events.add("above quota" if len(above) > quota else "at quota")
            return above
        events.add("fallback")
        return take_best(p, min(quota, m), relative, events)
    raise ValueError(f"unknown sampler {name}")


def hierarchy(positions, confidences, options, revoked, events):
    """dInfer: the best of each run of neighbours when above the low threshold, all above the threshold, and the best
    of the rest until one more than `revoked` is taken."""
    high, low = options.get("threshold", 0.9), options.get("low_threshold", 0.4)
    require(all(abs(c - t) > relative(c, t) for c in confidences for t in (high, low)), "threshold")
    taken = {i for i, c in enumerate(confidences) if c > high}
    begin = 0
    for end in range(1, len(positions) + 1):
        if end < len(positions) and positions[end] == positions[end - 1] + 1:
            continue
        run = range(begin, end)
        best = begin + take_best([confidences[i] for i in run], 1, relative, events)[0]
        if confidences[best] > low:
            taken.add(best)
        begin = end
    events.add("several" if len(taken) > 1 else "one" if taken else "fallback")
    while len(taken) <= revoked and len(taken) < len(positions):
        rest = [i for i in range(len(positions)) if i not in taken]
        taken.add(rest[take_best([confidences[i] for i in rest], 1, relative, events)[0]])
    return sorted(taken)


def revise(name, options, answers, positions, x, mask, block_masks, block_step, block_steps, block_edits, events):
    """One step of a sampler that revises. `positions` are those of the block that are not given, `answers` theirs.
    Returns what changes, {position: token, the mask token where it is masked again}, and whether the block stays open
    though nothing of it is masked."""
    masked = [x[i] == mask for i in positions]
    changes = {}

    def write(index):
        require(answers[index].gap > LOGIT_GAP, "argmax")
        changes[positions[index]] = answers[index].token

    if name in ("p2", "p2_open"):
        kept = (block_step + 1) / block_steps if name == "p2_open" else (block_step + 1) * (1 / block_steps)
        num_masked = float32_share(block_masks, 1 - kept)
        eta = options.get("eta", 1.0)
        if name == "p2":
            scores = [math.log(a.probability) * (1 if m else eta) for a, m in zip(answers, masked)]
        else:
            scores = [a.probability for a in answers]
        kept = take_best(scores, len(positions) - num_masked, lambda a, b: 1e-3 * max(1.0, eta), events)
        for index, position in enumerate(positions):
            if masked[index] and index in kept:
                write(index)
            elif not masked[index] and index not in kept:
                changes[position] = mask
                events.add("masked again")
        return changes, num_masked > 0
    if name == "joint_threshold":
        threshold, edit_threshold = options.get("threshold", 0.9), options.get("edit_threshold", 0.9)
        p = [a.probability for a in answers]
        require(all(abs(c - t) > relative(c, t) for c in p for t in (threshold, edit_threshold)), "threshold")
        open_ = [i for i, m in enumerate(masked) if m]
        fills = [i for i in open_ if p[i] > threshold]
        if open_ and not fills:
            fills = [open_[i] for i in take_best([p[i] for i in open_], 1, relative, events)]
        for index in fills:
            write(index)
        for index, position in enumerate(positions):
            if not masked[index] and p[index] > edit_threshold:
                require(answers[index].gap > LOGIT_GAP, "argmax")
                if answers[index].token != x[position]:
                    write(index)
                    events.add("edited")
        if len(fills) < len(open_):
            return changes, False
        edits = block_edits + (not open_)
        if edits >= options.get("edit_steps", 16):
            events.add("edit budget")
            return changes, False
        return changes, bool(open_ or changes)
    if name == "hierarchical_remask":
        p = [a.probability for a in answers]
        low = options.get("low_threshold", 0.4)
        require(all(abs(c - low) > relative(c, low) for c in p), "threshold")
        candidates = [i for i in range(len(positions)) if masked[i] or p[i] < low]
        revoked = sum(not masked[i] for i in candidates)
        taken = [candidates[i] for i in hierarchy([positions[i] for i in candidates], [p[i] for i in candidates],
                                                  options, revoked, events)]
        for index in candidates:
            if index in taken:
                write(index)
                if changes[positions[index]] == x[positions[index]]:
                    del changes[positions[index]]
            elif not masked[index]:
                changes[positions[index]] = mask
                events.add("masked again")
        return changes, False
    raise ValueError(f"unknown sampler {name}")


def ended(x, given, mask, final_end, traits):
    """Whether an end of text is final, and so is all before it."""
    for i in range(final_end):
        if x[i] == mask and not given[i]:
            return False
        if not given[i] and x[i] in (*traits.eos_tokens, traits.eot_token):
            return True
    return False


def give_credit(rows, credit, positions, mask, kept_max=6):
    """dInfer: credits fade by 0.8, each masked position's best token gets p^0.2 more, and the logits
    0.7 ln(1 + credit). A position keeps its largest `kept_max`. Changes `credit`; returns the logits."""
    credit *= 0.8
    for i in positions:
        pickable = np.array(rows[i])
        pickable[mask] = -np.inf
        best = int(np.argmax(pickable))
        require(pickable[best] - np.delete(pickable, best).max() > LOGIT_GAP, "argmax")
        credit[i, best] += softmax(rows[i])[best] ** 0.2
    fused = rows + 0.7 * np.log1p(credit[:len(rows)])
    for i in positions:
        order = np.argsort(-credit[i], kind="stable")
        require(credit[i, order[kept_max]] == 0 or
                credit[i, order[kept_max - 1]] - credit[i, order[kept_max]] > 1e-4, "credits")
        credit[i, order[kept_max:]] = 0
    return fused


REVISING = ("p2", "p2_open", "joint_threshold", "joint_threshold_indel", "hierarchical_remask")
FILTERED = ("p2_open", "rnd1", "rnd1_entropy_bounded", "joint_threshold",
            "maskgit_plus", "topk_margin", "entropy", "origin", "block_static", "block_dynamic", "block_sequential")


def generate(model, ids, given, options):
    """Greedy decoding. ids and given cover the whole sequence; ids where given is False are ignored."""
    traits, name = model.traits, options["sampler"]
    assert options.get("temperature", 0) == 0
    mask = traits.mask_token
    length = len(ids)
    if traits.block_length and not given[-1]:
        # A canvas that reaches the end is filled up to whole blocks, as SDAR does; the answer leaves them out.
        filler = -length % traits.block_length
        ids, given = [*ids, *[0] * filler], [*given, *[False] * filler]
    x = [int(t) if g else mask for t, g in zip(ids, given)]
    blocks = canvas_blocks(given, traits, options.get("block_length", 0))
    steps = options.get("steps", 0)
    assert steps % max(1, len(blocks)) == 0
    forbidden = traits.eos_tokens if options.get("logits_eos_inf") else ()
    uncounted = ()
    if options.get("confidence_eos_eot_inf"):
        uncounted = [t for t in (*traits.eos_tokens, traits.eot_token) if t >= 0]
    filters = {"top_k": options.get("top_k", 0), "top_p": options.get("top_p", 1.0),
               "top_k_first": name.startswith(("block_", "rnd1", "joint_")),
               "least": 2 if name.startswith("rnd1") else 1} if name in FILTERED else {}
    reuse = options.get("kv_reuse", "exact")
    result = Result(x, [], 0, 0, set())
    for begin, end in blocks:
        block_masks = sum(not g for g in given[begin:end])
        block_step = block_edits = 0
        credit = np.zeros((len(x), traits.vocab_size))
        stays_open = True
        memory = {}  # keys and values of the last pass over the whole block
        moving = indel.Block(x[begin:end], given[begin:end], traits, options, result.events, require,
                             (LOGIT_GAP, relative)) if name == "joint_threshold_indel" and block_masks else None
        while moving:
            before = x[begin:end]
            x[begin:end], last = moving.step(before, model.predictions(x[:end] if traits.block_length else x)[begin:end])
            result.trace.append([i for i in range(begin, end) if x[i] != before[i - begin]])
            result.nfe += 1
            result.nfe_min += 1
            if last:
                break
        while not moving:
            positions = [i for i in range(begin, end) if x[i] == mask and not given[i]]
            if not positions and (block_masks == 0 or name not in REVISING or not stays_open):
                break
            edits = not positions
            if name in REVISING:
                positions = [i for i in range(begin, end) if not given[i]]
            seen = x[:end] if traits.block_length else x  # block-causal: later blocks do not exist yet
            first_alone, span = False, None
            if name == "fast_dllm_v2":
                first_alone = traits.shift and positions[0] == begin > 0
                sub = options.get("sub_block_length") or 8
                sub_begin = positions[0] - (positions[0] - begin) % sub
                positions = [i for i in positions if i < sub_begin + sub]
                if reuse == "dual" and memory and whole_pass_in == sub_begin and positions[0] > sub_begin:
                    span = sub_begin, min(sub_begin + sub, end)
            elif reuse != "exact":
                first_alone = traits.shift and positions[0] == begin and not memory
                span = (begin, end if reuse == "dual" else len(x)) if memory else None
            if first_alone:
                positions = positions[:1]
            if name == "fast_dllm_v2" and first_alone:
                rows = model.predictions(x[:begin] + [mask])  # the row before sees nothing of the block
            elif reuse == "exact":
                rows = model.predictions(seen)
            elif span:
                result.events.add("reused")
                rows = np.zeros((len(x), traits.vocab_size))
                rows[span[0]:span[1]] = model.predictions(seen, memory=memory, span=span)
            else:
                rows = model.predictions(seen, memory=memory)
                whole_pass_in = sub_begin if name == "fast_dllm_v2" else begin
            if options.get("cfg_scale", 0) > 0:
                hidden = [mask if g else t for t, g in zip(x, given)]
                unconditional = model.predictions(hidden)
                rows = unconditional + (options["cfg_scale"] + 1) * (rows - unconditional)
            if options.get("repeat_penalty", 0) > 0:
                rows = np.array(rows, dtype=np.float64)
                for i in range(begin + 1, end):
                    rows[i, x[i - 1]] -= options["repeat_penalty"]
            if name == "credit":
                plain = [int(np.argmax(np.delete(rows[i], mask))) for i in positions]
                rows = give_credit(np.asarray(rows, dtype=np.float64), credit, positions, mask)
                if plain != [int(np.argmax(np.delete(rows[i], mask))) for i in positions]:
                    result.events.add("credit decides")
            if any(np.argmax(rows[i]) == mask for i in positions):
                result.events.add("mask is best")
                require(name != "topk_margin", "margin of the mask token")
            choices = []
            for nudge in (0, -TOP_P_GAP, TOP_P_GAP) if filters.get("top_p", 1) < 1 else (0,):
                nudged = {**filters, "top_p": filters["top_p"] + nudge} if filters else {}
                answers = [answer_row(rows[i], mask, forbidden, uncounted, **nudged) for i in positions]
                if name in REVISING:
                    changes, stays_open = revise(name, options, answers, positions, x, mask, block_masks, block_step,
                                                 steps // len(blocks), block_edits, result.events)
                    require(all(t < (traits.tokenizer_size or traits.vocab_size) for t in changes.values()), "unused row")
                    choices.append((changes, stays_open))
                    continue
                chosen = sorted(select(name, options, answers, positions, block_masks, block_step,
                                       steps // len(blocks), traits, result.events))
                # Whether rows without text may be picked is left open here: they never are the best.
                require(all(a.token < (traits.tokenizer_size or traits.vocab_size) for a in answers), "unused row")
                choices.append((chosen, [answers[i].token for i in chosen]))
            require(all(choice == choices[0] for choice in choices), "top_p")
            chosen = choices[0][0]
            if name in REVISING:
                for position, token in chosen.items():
                    x[position] = token
                result.trace.append(sorted(chosen))
                result.nfe_min += 1
            else:
                for i in chosen:
                    require(answers[i].gap > LOGIT_GAP, "argmax")
                    x[positions[i]] = answers[i].token
                result.trace.append([positions[i] for i in chosen])
                result.nfe_min += bool(chosen)
            result.nfe += 1
            block_step += 1
            block_edits += edits
            assert block_step <= len(x) + max(steps, 1) + 20, "no progress"
            if options.get("eos_early_stop") and name not in REVISING and ended(x, given, mask, len(x), traits):
                result.stopped = True
                break
        if options.get("eos_early_stop") and ended(x, given, mask, end, traits):
            result.stopped = True
        if result.stopped:
            break
    if result.stopped and mask in x:
        result.events.add("stopped early")
    assert result.stopped or all(t != mask for t, g in zip(x, given) if not g)
    del x[length:]
    result.trace = [[i for i in step if i < length] for step in result.trace]
    return result


# --- probabilities of random steps -----------------------------------------------------------------------

def categorical(logits, mask_token=-1, temperature=1.0, top_k=0, top_p=1.0, top_k_first=False):
    """(probability of drawing each id, its confidence). The mask token is never drawn; the confidence keeps it
    in the normaliser."""
    logits = np.asarray(logits, dtype=np.float64) / temperature
    kept = kept_ids(logits, top_k, top_p, top_k_first)
    confidence = softmax(np.where(kept, logits, -np.inf))
    weights = confidence.copy()
    if mask_token >= 0:
        weights[mask_token] = 0
    return weights / weights.sum(), confidence


def origin_probability(step, steps, eps):
    """Dream `origin`: chance of each masked position to be transferred in this step."""
    t, s = (1 - (1 - eps) * i / steps for i in (step, step + 1))
    return 1 - s / t if step < steps - 1 else 1.0


def without_replacement(weights, count):
    """Probability of each index to be among `count` draws without replacement, each in proportion to the
    weights left; by enumeration."""
    weights = np.asarray(weights, dtype=np.float64)
    inside = np.zeros(len(weights))

    def draw(chosen, chance):
        if len(chosen) == count:
            inside[chosen] += chance
            return
        left = [i for i in range(len(weights)) if i not in chosen]
        total = weights[left].sum()
        for i in left:
            draw([*chosen, i], chance * weights[i] / total)

    draw([], 1.0)
    return inside


def noise_at(t, noise, sigma_min=0.0, sigma_max=0.0, eps=1e-3):
    """(sigma, d sigma / dt) of SEDD's schedules."""
    if noise == "loglinear":
        return -math.log1p(-(1 - eps) * t), (1 - eps) / (1 - (1 - eps) * t)
    sigma = sigma_min ** (1 - t) * sigma_max ** t
    return sigma, sigma * math.log(sigma_max / sigma_min)


TIME_END = 1e-5  # where SEDD and MDLM stop


def step_time(step, steps):
    """(t, dt) of predictor step `step`; t of step == steps is the denoising step's."""
    dt = (1 - TIME_END) / steps
    return 1 - step * dt, dt


def staggered(score, d, graph):
    n = score.shape[-1]
    total = score.sum(axis=-1, keepdims=True)
    if graph == "absorb":
        result = math.exp(d) * score
        result[..., -1] += (1 - math.exp(d)) * total[..., 0]
        return result
    q = math.exp(-d)
    return (q - 1) / (n * q) * total + score / q


def transp_transition(ids, d, n, graph):
    own = np.eye(n)[np.asarray(ids)]
    if graph == "absorb":
        return math.exp(-d) * own + (1 - math.exp(-d)) * (np.asarray(ids) == n - 1)[:, None]
    move = -math.expm1(-d) / n
    return move * (1 - own) + (1 - (n - 1) * move) * own


def normalised(weights):
    """Exponential races never choose a negative weight, so it counts as 0."""
    weights = np.maximum(weights, 0)
    return weights / weights.sum(axis=-1, keepdims=True)


def sedd_euler(log_score, ids, t, dt, graph, schedule):
    score, ids = np.exp(np.asarray(log_score, dtype=np.float64)), np.asarray(ids)
    n = score.shape[-1]
    own = np.eye(n)[ids]
    if graph == "absorb":
        rate = -own + (ids == n - 1)[:, None]
    else:
        rate = (1 - own) / n - own * (n - 1) / n
    reverse = np.where(own == 1, 0, rate * score)
    reverse = reverse - own * reverse.sum(axis=-1, keepdims=True)
    return normalised(own + dt * noise_at(t, **schedule)[1] * reverse)


def sedd_analytic(log_score, ids, t, dt, graph, schedule):
    score = np.exp(np.asarray(log_score, dtype=np.float64))
    d = noise_at(t, **schedule)[0] - noise_at(t - dt, **schedule)[0]
    return normalised(staggered(score, d, graph) * transp_transition(ids, d, score.shape[-1], graph))


def sedd_denoise(log_score, ids, t, graph, schedule):
    score = np.exp(np.asarray(log_score, dtype=np.float64))
    d = noise_at(t, **schedule)[0]
    weights = staggered(score, d, graph) * transp_transition(ids, d, score.shape[-1], graph)
    if graph == "absorb":
        weights[..., -1] = 0
    return normalised(weights)


def mdlm_posterior(logits, ids, mask_token, t, dt, temperature=1.0):
    """One ancestral step: a masked position is unmasked with chance dt / t, then takes a token from the softmax
    without the mask token; others stay. Temperature 0 takes the argmax."""
    logits = np.array(logits, dtype=np.float64)
    logits[:, mask_token] = -np.inf
    if temperature == 0:
        p = np.eye(logits.shape[-1])[np.argmax(logits, axis=-1)]
    else:
        p = softmax(logits / temperature)
    result = p * (dt / t)
    result[:, mask_token] = (t - dt) / t
    settled = np.asarray(ids) != mask_token
    result[settled] = np.eye(logits.shape[-1])[np.asarray(ids)[settled]]
    return result


def nucleus(p, top_p):
    """ReMDM's and BD3-LM's filter: ids whose cumulated mass, their own included, is at most top_p; the first
    always."""
    order = np.argsort(-p, kind="stable")
    keep = np.cumsum(p[order]) <= top_p
    keep[0] = True
    result = np.zeros_like(p)
    result[order[keep]] = p[order[keep]]
    return result / result.sum()


def dfm_rates(t, steps):
    """(forward rate, backward rate, step length) of the corrector's schedule."""
    a = 10 * t ** 0.25 * (1 - t) ** 0.25 + 1
    b = a - 1
    return a, b, 1 / steps if t == 1 else min(1 / steps, 1 / (a / t + b / (1 - t)))


def dfm_times(steps):
    """Times of the corrector's steps; the last is the closing step's."""
    times = [1.0]
    while times[-1] > (1 - TIME_END) / steps:
        times.append(times[-1] - dfm_rates(times[-1], steps)[2])
    return times


def remdm_posterior(name, logits, ids, mask_token, steps, step, eta=None, t_on=0.55, t_off=0.05, alpha_on=0.9,
                    top_p=1.0, temperature=1.0, confidences=()):
    """One step of ReMDM or of the DFM corrector: the next token of each position. `confidences` are those with which
    the committed tokens were taken (remdm_conf)."""
    logits, ids = np.array(logits, dtype=np.float64), np.asarray(ids)
    logits[:, mask_token] = -np.inf
    p0 = np.array([nucleus(row, top_p) if top_p < 1 else row for row in softmax(logits / temperature)])
    masked = ids == mask_token
    p0[~masked] = np.eye(logits.shape[-1])[ids[~masked]]
    t, dt = step_time(step, steps)
    at, as_ = 1 - t, 1 - (t - dt)
    largest = min(1.0, (1 - as_) / at) if at > 0 else 1.0
    sigma = np.zeros(len(ids))
    if name == "remdm_cap":
        sigma[:] = min(eta, (1 - as_) / at) if at > 0 else eta
    elif name == "remdm_rescale":
        sigma[:] = eta * largest
    elif name == "remdm_conf":
        weights = np.where(masked, 0.0, np.exp(-np.asarray(confidences, dtype=np.float64)))
        sigma = weights / weights.sum() * largest if weights.any() else sigma
    elif name == "remdm_loop":
        if t > t_on:
            at, as_ = ((1 - x) * alpha_on / (1 - t_on) for x in (t, t - dt))
        elif t <= t_off:
            at, as_ = (1 - x * (1 - alpha_on) / t_off for x in (t, t - dt))
        else:
            at = as_ = alpha_on
            sigma[:] = eta
    if name == "dfm_corrector":
        t = dfm_times(steps)[step]
        a, b, h = dfm_rates(t, steps)
        unmask = a * h / t
        remask = b * h / (1 - t) if t < 1 else 0.0
        chance = np.where(masked, unmask, 1 - remask)
        weights = p0 * chance[:, None]
        weights[:, mask_token] = 1 - chance
        return weights
    weights = np.where(masked[:, None], p0 * ((as_ - (1 - sigma) * at) / (1 - at))[:, None], p0 * (1 - sigma)[:, None])
    weights[:, mask_token] = np.where(masked, (1 - as_ - sigma * at) / (1 - at), sigma)
    return normalised(weights)


def bd3lm_posterior(name, logits, ids, mask_token, steps=1, step=0, top_p=1.0, temperature=1.0):
    """One step of BD3-LM inside a block. first_hitting: one uniformly chosen masked position; scheduled: each masked
    position by the ratio of move chances between neighbouring times."""
    logits, ids = np.array(logits, dtype=np.float64), np.asarray(ids)
    logits[:, mask_token] = -np.inf
    p0 = np.array([nucleus(row, top_p) if top_p < 1 else row for row in softmax(logits / temperature)])
    masked = ids == mask_token
    if name == "bd3lm_first_hitting":
        stays = 1 - 1 / masked.sum()
    else:
        t, dt = np.linspace(1, 0, steps)[step], 1 / steps
        stays = max((t - dt) / t, 0.0) if t > 0 else 0.0
    weights = p0 * (1 - stays)
    weights[:, mask_token] = stays
    weights[~masked] = np.eye(logits.shape[-1])[ids[~masked]]
    return weights
