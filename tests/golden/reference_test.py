#!/usr/bin/env python3
"""Checks of the reference itself: identities that hold whatever the implementation, and the committed cases.

    python3 -m pytest tests/golden      or      python3 tests/golden/reference_test.py
"""
import json
import math
import pathlib
import sys

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from reference import cases, checkpoints, indel, models, safetensors_io, samplers  # noqa: E402

INDEX = json.loads((HERE / "index.json").read_text())
LOGLINEAR = {"noise": "loglinear", "sigma_min": 0.0, "sigma_max": 0.0}


def close(a, b, bound=1e-12):
    np.testing.assert_allclose(a, b, rtol=bound, atol=bound)


# --- quotas ----------------------------------------------------------------------------------------------

def test_llada_quotas():
    assert [samplers.split_evenly(10, 4, j) for j in range(4)] == [3, 3, 2, 2]
    assert [samplers.split_evenly(2, 4, j) for j in range(4)] == [1, 1, 0, 0]


def test_dream_schedule():
    left, transfers = 8, []
    for step in range(8):
        transfers.append(samplers.dream_transfers(left, step, 8, 1e-3))
        left -= transfers[-1]
    assert transfers == [0, 1, 1, 1, 1, 1, 1, 2] and left == 0


def test_dream_origin_leaves_nothing():
    for steps, eps in ((1, 1e-3), (7, 1e-3), (5, 0.3)):
        masked = 1.0
        for step in range(steps):
            masked *= 1 - samplers.origin_probability(step, steps, eps)
            if step < steps - 1:  # the expected share still masked is t itself
                close(masked, 1 - (1 - eps) * (step + 1) / steps)
        assert masked == 0


# --- filters ---------------------------------------------------------------------------------------------

def test_top_p_keeps_the_id_that_crosses():
    logits = np.log([0.1, 0.5, 0.3, 0.1])
    assert samplers.kept_ids(logits, top_p=0.6).tolist() == [False, True, True, False]
    assert samplers.kept_ids(logits, top_p=0.4).tolist() == [False, True, False, False]
    assert samplers.kept_ids(logits, top_p=1e-9).tolist() == [False, True, False, False]
    assert samplers.kept_ids(logits, top_p=0.4, least=2).tolist() == [False, True, True, False]
    assert samplers.kept_ids(logits, top_p=0.85).tolist() == [True, True, True, False]  # of equals the lower id


def test_top_k_keeps_ties_with_the_kth():
    assert samplers.kept_ids(np.array([1.0, 3.0, 1.0, 0.0]), top_k=2).tolist() == [True, True, True, False]


def test_order_of_filters_matters():
    logits = np.log([0.4, 0.3, 0.2, 0.1])
    # top-p 0.75 over everything needs three ids; over the renormalised best two or three it needs fewer.
    assert samplers.kept_ids(logits, top_k=3, top_p=0.75).sum() == 3
    assert samplers.kept_ids(logits, top_k=3, top_p=0.75, top_k_first=True).sum() == 2


def test_the_mask_token_counts_but_is_not_picked():
    answer = samplers.answer_row(np.log([0.2, 0.5, 0.3]), mask_token=1)
    assert answer.token == 2
    close(answer.probability, 0.3)
    p, confidence = samplers.categorical(np.log([0.2, 0.5, 0.3]), mask_token=1)
    close(p, [0.4, 0, 0.6])
    close(confidence, [0.2, 0.5, 0.3])


def test_eos_switches():
    row = np.log([0.5, 0.3, 0.2, 1e-9])
    assert samplers.answer_row(row, 3, forbidden=[0]).token == 1
    close(samplers.answer_row(row, 3, forbidden=[0]).probability, 0.6, 1e-6)
    answer = samplers.answer_row(row, 3, uncounted=[0])
    assert answer.token == 0 and answer.probability == 0
    close(samplers.answer_row(row - [9, 0, 0, 0], 3, uncounted=[0]).probability, 0.6, 1e-6)


# --- selection -------------------------------------------------------------------------------------------

class Fixed:
    """A model of one fixed table of logits; id 0 is the mask token."""

    def __init__(self, rows, **traits):
        self.rows = np.asarray(rows, dtype=np.float64)
        self.traits = models.Traits("fixed", self.rows.shape[1], 0, **traits)

    def predictions(self, ids, sigma=None):
        return self.rows[:len(ids)]


def with_confidences(confidences, **traits):
    """Row i gives id 1 + i % 3 the i-th confidence and shares the rest between the other ids."""
    rows = []
    for i, c in enumerate(confidences):
        row = np.full(30, (1 - c) / 29)
        row[1 + i % 3] = c
        rows.append(np.log(row))
    return Fixed(rows, **traits)


def trace(confidences, options, traits=None, given=None):
    given = given or [False] * len(confidences)
    model = with_confidences(confidences, **(traits or {}))
    return samplers.generate(model, [5] * len(confidences), given, options).trace


def test_threshold_always_takes_the_best():
    assert trace([0.5, 0.95, 0.7, 0.92], dict(sampler="threshold", threshold=0.9)) == [[1, 3], [2], [0]]


def test_factor_by_hand():
    # Bounds for four masks, factor 1: -, 2/3, 3/4, 4/5.
    assert trace([0.9, 0.8, 0.7, 0.6], dict(sampler="factor", factor=1.0))[0] == [0, 1]
    assert trace([0.9, 0.6, 0.5, 0.4], dict(sampler="factor", factor=1.0))[0] == [0]
    assert trace([0.9, 0.89, 0.88, 0.87], dict(sampler="factor", factor=1.0))[0] == [0, 1, 2, 3]
    # When the last rank alone fails it is taken all the same.
    assert trace([0.9, 0.89, 0.88, 0.5], dict(sampler="factor", factor=1.0)) == [[0, 1, 2, 3]]


def test_entropy_bound_limits():
    confidences = [0.9, 0.5, 0.7, 0.6]
    assert trace(confidences, dict(sampler="entropy_bounded", entropy_bound=0.0)) == [[0], [2], [3], [1]]
    assert trace(confidences, dict(sampler="entropy_bounded", entropy_bound=1e9)) == [[0, 1, 2, 3]]
    # Entropies of 0 come free, and one more with them (the bound is not 0 itself: that would be a guarded tie).
    model = with_confidences([0.5, 0.6, 0.7, 0.8])
    model.rows[[0, 2]] = -1e9
    model.rows[[0, 2], 4] = 0
    result = samplers.generate(model, [0] * 4, [False] * 4, dict(sampler="entropy_bounded", entropy_bound=0.01))
    assert result.trace[0] == [0, 2, 3]


def test_block_quotas_never_touch_given_positions():
    traits, given = dict(block_length=4), [True, True, True, False]
    assert trace([0.99, 0.98, 0.97, 0.5], dict(sampler="block_static", steps=1), traits, given) == [[3]]
    given = [False, True, False, False]
    assert trace([0.9, 0.8, 0.7, 0.6], dict(sampler="block_sequential", steps=2), traits, given) == [[0], [2, 3]]


def test_block_dynamic_by_hand():
    traits = dict(block_length=4)
    options = dict(sampler="block_dynamic", steps=4, threshold=0.75)
    assert trace([0.9, 0.8, 0.7, 0.6], options, traits) == [[0, 1], [2], [3]]
    assert trace([0.9, 0.8, 0.7, 0.6], {**options, "steps": 1}, traits) == [[0, 1, 2, 3]]


def test_runs_by_hand():
    confidences, options = [0.3, 0.6, 0.5, 0.95, 0.2], dict(sampler="hierarchical", threshold=0.9, low_threshold=0.4)
    given = [False, False, True, False, False]
    # Runs 0-1 and 3-4; then 0 and 4 alone, neither above the low threshold: the best of them.
    assert trace(confidences, options, given=given) == [[1, 3], [0], [4]]
    assert trace([0.3, 0.2], options) == [[0], [1]]
    assert trace([0.95, 0.92, 0.91], options) == [[0, 1, 2]]


def test_path_planning_by_hand():
    # Nothing changes its mind, so the least probable are masked and the order is that of confidence.
    assert trace([0.5, 0.95, 0.7, 0.92], dict(sampler="p2", steps=4)) == [[1], [3], [2], [0]]
    assert trace([0.5, 0.95, 0.7, 0.92], dict(sampler="p2_open", steps=2)) == [[1, 3], [0, 2]]
    # A large eta masks what is committed: 1 is the best, but ln 0.95 * 30 is below ln 0.5.
    assert trace([0.5, 0.95, 0.7, 0.92], dict(sampler="p2", steps=4, eta=30.0)) == [[1], [1, 2, 3], [0, 1, 2], [2]]


def test_joint_threshold_by_hand():
    options = dict(sampler="joint_threshold", threshold=0.75, edit_threshold=0.5)
    # What it predicts it keeps: a last look, and the end.
    assert trace([0.9, 0.8, 0.7, 0.6], options) == [[0, 1], [2], [3], []]
    assert trace([0.9, 0.8, 0.7, 0.6], {**options, "edit_steps": 0}) == [[0, 1], [2], [3]]


MASK, DELETE, SPLIT = 0, 28, 29  # of the blocks below; text is 1 to 27


def moving_block(length, given=None, **options):
    traits = models.Traits("moving", 30, MASK, delete_token=DELETE, split_token=SPLIT)
    given = given or [False] * length
    tokens = [5 if g else MASK for g in given]
    return indel.Block(tokens, given, traits, options, set(), samplers.require,
                       (samplers.LOGIT_GAP, samplers.relative)), tokens


def rows_of(*predictions):
    """Of each position, the id predicted and its probability; the rest is shared evenly, but for a second id."""
    rows = []
    for id_, p, *second in predictions:
        row = np.full(30, (1 - p) / 29)
        row[id_] = p
        if second:
            row[second[0]] *= 2
        rows.append(np.log(row / row.sum()))
    return rows


def test_tokens_move_by_hand():
    block, tokens = moving_block(4, threshold=0.5, edit_threshold=0.5)
    tokens, last = block.step(tokens, rows_of((1, 0.9), (2, 0.8), (3, 0.7), (4, 0.6)))
    assert (tokens, last, block.original) == ([1, 2, 3, 4], False, [True] * 4)
    # A mask comes before 2 and pushes 4 out; then 1 goes, and a mask comes at the end.
    tokens, last = block.step(tokens, rows_of((1, 0.9), (SPLIT, 0.8), (3, 0.7), (4, 0.6)))
    assert (tokens, last, block.original) == ([1, MASK, 2, 3], False, [True, False, True, True])
    tokens, last = block.step(tokens, rows_of((DELETE, 0.9), (MASK, 0.8), (2, 0.7), (3, 0.6)))
    assert (tokens, last, block.original) == ([MASK, 2, 3, MASK], False, [False, True, True, False])
    tokens, last = block.step(tokens, rows_of((7, 0.9), (2, 0.8), (3, 0.7), (8, 0.6)))
    assert (tokens, last) == ([7, 2, 3, 8], False)
    tokens, last = block.step(tokens, rows_of((7, 0.9), (2, 0.8), (3, 0.7), (8, 0.6)))
    assert (tokens, last) == ([7, 2, 3, 8], True)
    assert {"split", "token cut", "delete", "filled up", "mask stays", "nothing to do"} <= block.events


def test_runs_between_given_positions_move_alone():
    block, tokens = moving_block(5, [False, False, True, False, False], threshold=0.5, edit_threshold=0.9)
    tokens, _ = block.step(tokens, rows_of((DELETE, 0.9), (2, 0.8), (3, 0.9), (SPLIT, 0.7), (4, 0.6)))
    assert tokens == [2, MASK, 5, MASK, MASK]
    assert block.original == [True, False, False, False, True]


def test_the_last_step_cleans_up():
    block, tokens = moving_block(2, threshold=0.5, edit_threshold=0.5, edit_steps=1)
    tokens, last = block.step(tokens, rows_of((1, 0.9), (2, 0.8)))
    assert (tokens, last) == ([1, 2], False)
    tokens, last = block.step(tokens, rows_of((DELETE, 0.9, 7), (MASK, 0.8, 9)))
    assert (tokens, last) == ([7, 9], True)
    # Without a budget the step that takes the last of the block's own masks is the last.
    block, tokens = moving_block(2, threshold=0.5, edit_steps=0)
    tokens, last = block.step(tokens, rows_of((1, 0.9), (SPLIT, 0.8, 6)))
    assert (tokens, last) == ([1, 6], True)


def test_a_circle_is_left():
    block, tokens = moving_block(1, threshold=0.5, edit_threshold=0.5)
    for want, row in ((1, (1, 0.9)), (2, (2, 0.9)), (1, (1, 0.9)), (8, (2, 0.9, 8))):
        tokens, last = block.step(tokens, rows_of(row))
        assert (tokens, last) == ([want], False)
    assert "left a circle" in block.events


def test_remasking_gains_at_least_one():
    options = dict(sampler="hierarchical_remask", threshold=0.9, low_threshold=0.55)
    assert trace([0.95, 0.5, 0.92, 0.6], options) == [[0, 2], [3], [1]]
    # Position 0 is taken as the best of two, then doubted; with one more than what is doubted it is taken again.
    assert trace([0.5, 0.3], options) == [[0], [1]]


def test_credits_by_hand():
    # Two positions of probability 0.5 for id 1 or 2: the first step's credit is 0.5^0.2 each.
    credit = np.zeros((2, 30))
    rows = with_confidences([0.5, 0.5]).rows
    fused = samplers.give_credit(rows, credit, [0, 1], 0)
    close(credit[[0, 1], [1, 2]], [0.5 ** 0.2] * 2)
    close(fused[0, 1] - rows[0, 1], 0.7 * np.log(1 + 0.5 ** 0.2))
    samplers.give_credit(rows, credit, [1], 0)
    close(credit[[0, 1], [1, 2]], [0.8 * 0.5 ** 0.2, 1.8 * 0.5 ** 0.2])
    # A step's own credit counts in it: 0.5 becomes 0.608, 0.55 becomes 0.656.
    assert trace([0.5, 0.55], dict(sampler="credit", threshold=0.6)) == [[0, 1]]
    assert trace([0.5, 0.55], dict(sampler="threshold", threshold=0.6)) == [[1], [0]]


def test_nucleus_leaves_out_what_crosses():
    close(samplers.nucleus(np.array([0.2, 0.5, 0.3]), 0.85), [0, 5 / 8, 3 / 8])
    close(samplers.nucleus(np.array([0.2, 0.5, 0.3]), 0.75), [0, 1, 0])
    close(samplers.nucleus(np.array([0.2, 0.5, 0.3]), 0.4), [0, 1, 0])


def test_remasking_without_sigma_is_mdlm():
    logits, ids = np.log([[0.5, 0.3, 0.1, 0.1], [0.2, 0.2, 0.5, 0.1]]), [3, 1]
    for step in range(6):
        want = samplers.mdlm_posterior(logits, ids, 3, *samplers.step_time(step, 6))
        for name in ("remdm_cap", "remdm_rescale"):
            close(samplers.remdm_posterior(name, logits, ids, 3, 6, step, eta=0.0), want)


def test_the_corrector_ends():
    for steps in (1, 2, 7, 64, 1000):
        times = samplers.dfm_times(steps)
        assert all(a > b >= 0 for a, b in zip(times, times[1:])) and len(times) <= steps + 32


def test_blocks():
    full, causal = models.Traits("f", 9, 0), models.Traits("c", 9, 0, block_length=4)
    given = [True] * 3 + [False] * 7 + [True] * 2
    assert samplers.canvas_blocks(given, full, 3) == [(3, 6), (6, 9), (9, 10)]
    assert samplers.canvas_blocks(given, full, 0) == [(3, 10)]
    assert samplers.canvas_blocks(given, causal, 0) == [(0, 4), (4, 8), (8, 12)]
    assert samplers.canvas_blocks([True], full, 3) == []


def test_draws_without_replacement():
    close(samplers.without_replacement([1, 2, 5], 1), np.array([1, 2, 5]) / 8)
    close(samplers.without_replacement([1, 2, 5], 3), [1, 1, 1])
    close(samplers.without_replacement([1, 2, 5], 2).sum(), 2)


# --- SEDD and MDLM ---------------------------------------------------------------------------------------

def test_analytic_step_of_the_ideal_score_is_the_mdlm_posterior():
    p, t, s = np.array([0.5, 0.3, 0.2]), 0.7, 0.6
    eps = 1e-3  # times are chosen so that the move chances are t and s themselves
    t_noise, s_noise = t / (1 - eps), s / (1 - eps)
    sigma = samplers.noise_at(t_noise, **LOGLINEAR)[0]
    log_score = np.array([[*np.log(p / math.expm1(sigma)), 0.0]])
    ids = [3]
    got = samplers.sedd_analytic(log_score, ids, t_noise, t_noise - s_noise, "absorb", LOGLINEAR)
    close(got[0], [*(p * (t - s) / t), s / t])
    close(got[0], [0.0714285714, 0.0428571429, 0.0285714286, 0.8571428571], 1e-9)
    score = np.exp(log_score)
    d = sigma - samplers.noise_at(s_noise, **LOGLINEAR)[0]
    close((samplers.staggered(score, d, "absorb") * samplers.transp_transition(ids, d, 4, "absorb")).sum(), 1)
    logits = np.log([[*p, 123.0]])
    close(samplers.mdlm_posterior(logits, ids, 3, t, t - s)[0], got[0])


def test_euler_agrees_with_the_analytic_step_in_the_limit():
    random = np.random.RandomState(3)
    log_score = random.standard_normal((2, 6))
    for graph, ids in (("absorb", [5, 5]), ("uniform", [1, 4])):
        log_score[[0, 1], ids] = 0
        t, dt = 0.5, 1e-6
        a = samplers.sedd_analytic(log_score, ids, t, dt, graph, LOGLINEAR)
        b = samplers.sedd_euler(log_score, ids, t, dt, graph, LOGLINEAR)
        np.testing.assert_allclose(a, b, atol=1e-9)


def test_settled_tokens_cannot_change_in_an_absorbing_graph():
    log_score = np.random.RandomState(4).standard_normal((1, 6))
    log_score[0, 2] = 0
    for rule in (samplers.sedd_euler, samplers.sedd_analytic):
        close(rule(log_score, [2], 0.7, 0.1, "absorb", LOGLINEAR)[0], np.eye(6)[2])
    close(samplers.sedd_denoise(log_score, [2], 1e-5, "absorb", LOGLINEAR)[0], np.eye(6)[2])


def test_uniform_analytic_step_of_the_ideal_score_inverts_the_noise():
    # With the true marginal at t as score, one step over the whole time gives the data distribution back.
    p0, n = np.array([0.5, 0.3, 0.15, 0.05]), 4
    schedule = {"noise": "geometric", "sigma_min": 1e-4, "sigma_max": 20.0}
    t, s = 0.8, 0.3
    sigma_t, sigma_s = (samplers.noise_at(x, **schedule)[0] for x in (t, s))

    def marginal(sigma):
        return math.exp(-sigma) * p0 + (1 - math.exp(-sigma)) / n

    score = marginal(sigma_t)[None, :] / marginal(sigma_t)[:, None]
    step = samplers.sedd_analytic(np.log(score), range(n), t, t - s, "uniform", schedule)
    close(marginal(sigma_t) @ step, marginal(sigma_s), 1e-9)


def test_score_entropy_is_zero_at_the_ideal_score():
    e = math.expm1(samplers.noise_at(0.4, **LOGLINEAR)[0])
    x0, rest = 2, 1e-300
    s = np.log(np.where(np.arange(5) == x0, 1 / e, rest))  # one-hot data
    close(np.exp(s).sum() - s[x0] / e + (1 / e) * (math.log(1 / e) - 1), 0, 1e-9)


# --- networks --------------------------------------------------------------------------------------------

def test_block_causal_rows_do_not_see_later_blocks():
    model = models.load(HERE / "models/sdar_b4")
    ids = list(range(20, 33))
    close(model.logits(ids)[:8], model.logits(ids[:8]), 1e-9)
    changed = model.logits([*ids[:7], 99, *ids[8:]])
    assert np.abs(changed[4:8] - model.logits(ids)[4:8]).min(axis=1).max() > 0
    close(changed[:4], model.logits(ids)[:4], 1e-9)


def test_sedd_scaling_cancels_in_expectation():
    model = models.load(HERE / "models/sedd_absorb")
    rows = model.logits([3, 83, 9], 0.8)
    assert rows[0, 3] == 0 and rows[1, 83] == 0 and rows[2, 9] == 0
    model.config["model"]["scale_by_sigma"] = False
    close(model.logits([3, 83, 9], 0.8)[1, :83] - rows[1, :83], math.log(math.expm1(0.8)) + math.log(83), 1e-9)


def test_mdlm_does_not_read_sigma():
    model = models.load(HERE / "models/mdlm")
    close(model.logits([1, 2, 88], 5.0), model.logits([1, 2, 88], 0.1), 0)


def test_parameter_counts():
    # LLaDA-8B and SDAR-4B: the published total_size of the bf16 shards.
    d, ffn, rows = 4096, 12288, 126464
    assert 2 * (2 * rows * d + d + 32 * (4 * d * d + 3 * d * ffn + 2 * d)) == 16_031_162_368
    d, ffn, rows, q, kv, hd = 2560, 9728, 151936, 4096, 1024, 128
    layer = q * d * 2 + kv * d * 2 + 3 * ffn * d + 2 * d + 2 * hd
    assert 2 * (2 * rows * d + d + 36 * layer) == 8_822_848_512


def test_bf16_rounds_to_nearest_even():
    values = np.array([1.0, 1 + 2.0 ** -8, 1 + 3 * 2.0 ** -8, -1 - 2.0 ** -9, 3.3895314e38, 1e-40], np.float32)
    kept = safetensors_io.bf16_values(safetensors_io.bf16_bits(values))
    close(kept[:5], [1.0, 1.0, 1 + 2.0 ** -6, -1.0, 3.3895314e38], 1e-7)
    assert safetensors_io.bf16_bits(np.array([np.inf], np.float32))[0] == 0x7F80


# --- committed files -------------------------------------------------------------------------------------

def test_every_model_has_logits_and_every_sampler_a_case():
    folders = {e["model_dir"] for e in INDEX["logits"] if not e["model_dir"].endswith(".gguf")}
    assert folders == {f"models/{name}" for name in checkpoints.CHECKPOINTS}
    used = {json.loads((HERE / e["case_file"]).read_text())["options"]["sampler"]
            for e in INDEX["tokens"] + INDEX["properties"]}
    assert used == {*cases.SAMPLERS, "mdlm_ancestral", "sedd_euler", "sedd_analytic", "remdm_cap", "remdm_rescale",
                    "remdm_conf", "remdm_loop", "dfm_corrector", "p2_random", "bd3lm_first_hitting", "bd3lm_scheduled",
                    "gemma_renoise"}


def traced_cases():
    """Token cases of samplers.py; gemma.py's name no positions."""
    for entry in INDEX["tokens"]:
        case = json.loads((HERE / entry["case_file"]).read_text())
        if "trace" in case["expected"]:
            yield entry, case


def test_cases_keep_what_was_given_and_fill_the_rest_once():
    for entry, case in traced_cases():
        ids, given = case["input"]["ids"], case["input"]["given"]
        extra = case["options"].get("gen_length", 0)
        given = given + [False] * extra
        result = case["expected"]["ids"]
        assert len(result) == len(given), entry["name"]
        assert all(not g or a == b for a, b, g in zip(ids, result, given)), entry["name"]
        changed = sorted(p for step in case["expected"]["trace"] for p in step)
        open_ = [i for i, g in enumerate(given) if not g]
        if case["options"]["sampler"] in samplers.REVISING:
            changed = sorted(set(changed))
        if case["options"].get("eos_early_stop"):
            assert set(changed) <= set(open_), entry["name"]
        else:
            assert changed == open_, entry["name"]


def test_probabilities_sum_to_one():
    for entry in INDEX["probabilities"]:
        case = json.loads((HERE / entry["case_file"]).read_text())
        for draw in case.get("draws", []):
            for row in draw.get("probabilities", []):
                close(sum(row), 1, 1e-9)
                assert min(row) >= 0


def test_float32_makes_the_same_decisions():
    loaded = {}
    for entry, case in traced_cases():
        model = loaded.setdefault(case["model"], models.load(HERE / case["model"], np.float32))
        extra = case["options"].get("gen_length", 0)
        result = samplers.generate(model, case["input"]["ids"] + [0] * extra,
                                   case["input"]["given"] + [False] * extra, case["options"])
        assert result.tokens == case["expected"]["ids"], entry["name"]
        assert result.trace == case["expected"]["trace"], entry["name"]


if __name__ == "__main__":
    tests = {name: f for name, f in list(globals().items()) if name.startswith("test_")}
    for name, test in tests.items():
        test()
    print(f"{len(tests)} checks passed")
