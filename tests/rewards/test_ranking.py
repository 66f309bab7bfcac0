import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from scipy.special import softmax
from sklearn.metrics import ndcg_score

from polyreward.advantages.parts import Center, Scale, WeightedSum
from polyreward.advantages.transform import chain, compute_advantages
from polyreward.batch import RewardBatch
from polyreward.errors import InvalidInputError, MissingColumnError, PolyrewardError, UnknownNameError
from polyreward.rewards.composition import gate
from polyreward.rewards.formats import TagFormat
from polyreward.rewards.ranking import (
    FormatGate,
    GroupRankReward,
    RankingUtilityReward,
    ScoreDistributionReward,
    grouprank,
)
from polyreward.rewards.ranking_measures import dcg, jensen_shannon, ndcg, rankable, rbo, recall
from polyreward.rewards.score_answers import format_answer, parse_scores

GOLD, SCORES = [10.0, 5.0, 0.0, 1.0], [7.0, 8.0, 1.0, 0.0]
MODES = ("documents", "softmax", "histogram")
whole = st.integers(0, 10).map(float)
groups = st.integers(1, 13).flatmap(
    lambda c: st.tuples(st.lists(whole, min_size=c, max_size=c), st.lists(whole, min_size=c, max_size=c))
)
backends = pytest.mark.parametrize("make", [np.array, torch.tensor], ids=["numpy", "torch"])


@backends
def test_worked_example(make):
    scores, gold = make(SCORES), make(GOLD)
    assert float(dcg(make([5.0, 10.0, 0.0, 1.0]))) == pytest.approx(11.74, abs=5e-3)
    assert float(dcg(make([10.0, 5.0, 1.0, 0.0]))) == pytest.approx(13.65, abs=6e-3)
    assert float(ndcg(scores, gold)) == pytest.approx(0.859779, abs=1e-6)
    assert float(recall(scores, gold)) == 1
    alignment = ScoreDistributionReward(smoothing=0)
    assert float(alignment.divergence(scores, gold)) == pytest.approx(0.090244, abs=1e-6)
    assert float(alignment(scores, gold)) == pytest.approx(0.909756, abs=1e-6)
    natural = ScoreDistributionReward(base=math.e, smoothing=0)
    assert float(natural.divergence(scores, gold)) == pytest.approx(0.062553, abs=1e-6)
    assert float(RankingUtilityReward()(scores, gold)) == pytest.approx(1.059779, abs=1e-6)
    assert float(GroupRankReward(alignment=alignment).of_scores(scores, gold)) == pytest.approx(1.150754, abs=1e-6)


def test_distributions_of_the_worked_example():
    p, q = [0.4375, 0.5, 0.0625, 0], [0.625, 0.3125, 0, 0.0625]
    assert jensen_shannon(p, q) == pytest.approx(0.090244, abs=1e-6)
    assert jensen_shannon(p, q, math.e) == pytest.approx(0.062553, abs=1e-6)
    assert jensen_shannon(p, q) == pytest.approx(jensenshannon(p, q, base=2) ** 2)


@given(groups)
def test_scores_equal_to_gold_earn_the_maximum(pair):
    gold = np.array(pair[0])
    for mode, ties in itertools.product(MODES, ("stable", "expected")):
        reward = GroupRankReward(utility=RankingUtilityReward(ties=ties), alignment=ScoreDistributionReward(mode))
        value = reward.of_scores(gold, gold)
        recalled = recall(gold, gold, ties=ties)
        assert ScoreDistributionReward(mode).divergence(gold, gold) == pytest.approx(0, abs=1e-12)
        if gold.any():
            assert ndcg(gold, gold, ties=ties) == pytest.approx(1)
            assert value == pytest.approx(1 + 0.2 * recalled + 0.1)
            if ties == "stable" and set(pair[0]) - {0.0, 1.0}:
                assert value == pytest.approx(1.3)


@given(groups)
def test_divergence_is_symmetric_and_between_0_and_1(pair):
    scores, gold = map(np.array, pair)
    for mode in MODES:
        alignment = ScoreDistributionReward(mode)
        value = alignment.divergence(scores, gold)
        assert 0 <= value <= 1
        assert value == pytest.approx(alignment.divergence(gold, scores), abs=1e-12)


@backends
def test_disjoint_supports_have_divergence_1(make):
    assert float(jensen_shannon(make([0.5, 0.5, 0, 0]), make([0, 0, 0.25, 0.75]))) == pytest.approx(1)
    bare = ScoreDistributionReward(smoothing=0)
    assert float(bare.divergence(make([3.0, 0, 0]), make([0, 0, 7.0]))) == pytest.approx(1)
    histogram = ScoreDistributionReward("histogram", smoothing=0)
    assert float(histogram.divergence(make([1.0, 2, 1]), make([3.0, 4, 5]))) == pytest.approx(1)


@given(groups, st.sampled_from([lambda s: 3 * s + 1, lambda s: s**3, lambda s: np.exp(s / 3) - 20]))
def test_utility_sees_only_the_order(pair, increasing):
    scores, gold = map(np.array, pair)
    for ties in ("stable", "expected"):
        utility = RankingUtilityReward(ties=ties, rbo_weight=0.5)
        assert utility(increasing(scores), gold) == pytest.approx(utility(scores, gold))


@given(groups, st.floats(0.05, 1), st.integers(0, 4), st.randoms())
def test_what_each_alignment_does_not_see(pair, scale, shift, random):
    scores, gold = map(np.array, pair)
    documents, flat, histogram = (ScoreDistributionReward(mode) for mode in MODES)
    assert documents.divergence(scale * scores, gold) == pytest.approx(documents.divergence(scores, gold), abs=1e-9)
    assert flat.divergence(scores + shift, gold) == pytest.approx(flat.divergence(scores, gold), abs=1e-9)
    order = random.sample(range(len(scores)), len(scores))
    assert histogram.divergence(scores[order], gold) == pytest.approx(histogram.divergence(scores, gold), abs=1e-12)


def test_what_each_alignment_does_see():
    scores, gold = np.array(SCORES), np.array(GOLD)
    documents, flat, histogram = (ScoreDistributionReward(mode) for mode in MODES)
    assert documents.divergence(scores[[1, 0, 2, 3]], gold) != pytest.approx(documents.divergence(scores, gold))
    assert flat.divergence(scores / 2, gold) != pytest.approx(flat.divergence(scores, gold))
    assert histogram.divergence(scores + 1, gold) != pytest.approx(histogram.divergence(scores, gold))
    # only the histogram, beside NDCG, fixes order and magnitude: halved gold is no longer the best
    assert histogram(gold / 2, gold) < 0.9 < histogram(gold, gold)
    assert documents(gold / 2, gold) == pytest.approx(1)


def test_histogram_of_the_worked_example():
    p, q = np.full(11, 1e-3), np.full(11, 1e-3)
    p[[7, 8, 1, 0]] += 0.25
    q[[10, 5, 0, 1]] += 0.25
    expected = jensenshannon(p / p.sum(), q / q.sum(), base=2) ** 2
    assert ScoreDistributionReward("histogram").divergence(SCORES, GOLD) == pytest.approx(expected)
    # rounded, halves up
    assert ScoreDistributionReward("histogram").divergence([0.5, 9.4], [1, 9]) == pytest.approx(0)


def test_softmax_and_documents_equal_scipy():
    scores, gold = np.array(SCORES), np.array(GOLD)
    expected = jensenshannon(softmax(scores), softmax(gold), base=2) ** 2
    assert ScoreDistributionReward("softmax").divergence(scores, gold) == pytest.approx(expected)
    smooth = jensenshannon(scores / scores.sum() + 1e-3, gold / gold.sum() + 1e-3, base=2) ** 2
    assert ScoreDistributionReward().divergence(scores, gold) == pytest.approx(smooth)


@backends
@pytest.mark.parametrize("smoothing", [0, 1e-3])
def test_all_predicted_zero_is_uniform(make, smoothing):
    alignment = ScoreDistributionReward(smoothing=smoothing)
    zeros, gold = make([0.0, 0, 0, 0]), make(GOLD)
    assert float(alignment.divergence(zeros, gold)) == pytest.approx(float(alignment.divergence(zeros + 3, gold)))
    assert float(alignment.divergence(zeros, zeros)) == pytest.approx(0, abs=1e-12)


def slow_order(scores):
    return sorted(range(len(scores)), key=lambda d: (-scores[d], d))


def slow_dcg(relevance, k, gain):
    top = relevance if k is None else relevance[:k]
    return sum((r if gain == "linear" else 2**r - 1) / math.log2(i + 2) for i, r in enumerate(top))


def slow_ndcg(scores, gold, k, gain):
    best = slow_dcg(sorted(gold, reverse=True), k, gain)
    return slow_dcg([gold[d] for d in slow_order(scores)], k, gain) / best if best > 0 else 0.0


def slow_recall(scores, gold, k):
    if not any(gold):
        return 0.0
    if set(gold) <= {0.0, 1.0}:
        relevant, cut = {d for d, g in enumerate(gold) if g == 1}, k
    else:
        cut = min(k, math.ceil(len(gold) / 2))
        relevant = set(slow_order(gold)[:cut])
    return len(relevant & set(slow_order(scores)[:cut])) / len(relevant)


def slow_rbo(scores, gold, p):
    first, second = slow_order(scores), slow_order(gold)
    c = len(first)
    overlap = [len(set(first[:d]) & set(second[:d])) for d in range(1, c + 1)]
    return p**c * overlap[-1] / c + (1 - p) / p * sum(p**d * x / d for d, x in enumerate(overlap, start=1))


@given(groups, st.sampled_from([1, 3, 10, None]), st.sampled_from(["linear", "exp2"]))
def test_ndcg_equals_a_plain_loop(pair, k, gain):
    scores, gold = pair
    expected = slow_ndcg(scores, gold, k, gain)
    for make in (np.array, torch.tensor):
        assert float(ndcg(make(scores), make(gold), k, gain)) == pytest.approx(expected, abs=1e-6)


@given(groups, st.integers(1, 10), st.floats(0.1, 0.95))
def test_recall_and_rbo_equal_a_plain_loop(pair, k, p):
    scores, gold = pair
    for values in (gold, [float(g > 5) for g in gold]):
        for make in (np.array, torch.tensor):
            assert float(recall(make(scores), make(values), k)) == pytest.approx(slow_recall(scores, values, k))
    assert rbo(scores, gold, p) == pytest.approx(slow_rbo(scores, gold, p))


@given(groups, st.sampled_from([1, 3, 10, None]))
def test_expected_ndcg_equals_scikit_learn_under_ties(pair, k):
    scores, gold = pair
    if len(scores) == 1:
        return
    value = ndcg(scores, gold, k, ties="expected")
    assert value == pytest.approx(ndcg_score([gold], [scores], k=k))
    assert float(ndcg(torch.tensor(scores), torch.tensor(gold), k, ties="expected")) == pytest.approx(value, abs=1e-6)


@settings(max_examples=30)
@given(st.integers(1, 5).flatmap(lambda c: st.tuples(*[st.lists(st.integers(0, 2), min_size=c, max_size=c)] * 2)))
def test_expected_is_the_mean_over_the_orders_of_tied_documents(pair):
    scores, gold = (np.array(values, dtype=float) for values in pair)
    found: dict[str, list[float]] = {"ndcg": [], "hits": []}
    least = sorted(gold, reverse=True)[math.ceil(len(gold) / 2) - 1]
    binary = set(gold) <= {0.0, 1.0}
    for order in itertools.permutations(range(len(scores))):
        s, g = scores[list(order)], gold[list(order)]
        found["ndcg"].append(ndcg(s, g, 10))
        cut = 10 if binary else math.ceil(len(gold) / 2)
        wanted = g == 1 if binary else g >= least
        total = wanted.sum() if binary else cut
        found["hits"].append(wanted[slow_order(s)[:cut]].sum() / total if gold.any() else 0.0)
    assert ndcg(scores, gold, ties="expected") == pytest.approx(np.mean(found["ndcg"]))
    assert recall(scores, gold, ties="expected") == pytest.approx(np.mean(found["hits"]))


def test_stable_ties_depend_on_the_input_order_and_expected_ones_do_not():
    gold, tied = np.array([10.0, 5, 0, 1]), np.zeros(4)
    orders = [list(order) for order in itertools.permutations(range(4))]
    stable = {round(float(RankingUtilityReward()(tied, gold[order])), 9) for order in orders}
    expected = {round(float(RankingUtilityReward(ties="expected")(tied, gold[order])), 9) for order in orders}
    assert len(stable) > 1
    assert len(expected) == 1
    assert ndcg(tied, gold) == 10 / 10 * ndcg(tied - np.arange(4), gold)  # first come, first ranked


def test_recall_of_small_and_large_groups():
    # c = 4: two relevant, the predicted first two count
    assert recall([1, 2, 3, 4], [10, 9, 0, 1]) == 0
    assert recall([9, 0, 8, 1], [10, 9, 0, 1]) == 0.5
    # c = 20 and 30: k_eff = 10
    down = np.arange(20, 0, -1.0)
    assert recall(down[::-1], down / 2) == 0
    assert recall(np.roll(np.arange(30, 0, -1.0), 5), np.arange(30, 0, -1.0) / 3) == 0.5
    # binary labels: plain recall at k
    labels = np.zeros(30)
    labels[[0, 9, 10, 20]] = 1
    assert recall(np.arange(30, 0, -1.0), labels) == 0.5
    assert recall([0, 1, 2], [1, 0, 0]) == 1  # k = 10 holds the whole group


@backends
def test_all_gold_zero_is_0(make):
    scores, gold = make([[3.0, 1, 2], [3, 1, 2]]), make([[0.0, 0, 0], [1, 0, 0]])
    for ties in ("stable", "expected"):
        value = RankingUtilityReward(ties=ties, rbo_weight=1.0)(scores, gold)
        assert float(value[0]) == 0
        assert float(value[1]) > 1
    assert rankable(gold).tolist() == [False, True]


@backends
def test_leading_axes_dtype_and_broadcasting(make):
    rng = np.random.default_rng(0)
    scores, gold = rng.integers(0, 11, size=(3, 2, 8)), rng.integers(0, 11, size=(3, 1, 8))
    single = [[GroupRankReward().of_scores(scores[i, j], gold[i, 0]) for j in range(2)] for i in range(3)]
    found = GroupRankReward().of_scores(make(scores.tolist()), make(gold.tolist()))
    assert tuple(found.shape) == (3, 2)
    np.testing.assert_allclose(np.asarray(found), single, rtol=1e-6)
    for mode in MODES:
        assert tuple(ScoreDistributionReward(mode)(make(scores.tolist()), make(gold.tolist())).shape) == (3, 2)


def test_dtype_follows_the_input():
    for dtype in (np.float32, np.float64):
        values = np.array([GOLD], dtype=dtype)
        assert GroupRankReward().of_scores(values, values).dtype == dtype
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        values = torch.tensor([GOLD], dtype=dtype)
        assert GroupRankReward().of_scores(values, values).dtype == dtype
    assert ndcg(torch.tensor([[1, 2]]), torch.tensor([[2, 1]])).dtype == torch.float32
    assert ndcg(torch.tensor([1, 2]), np.array([2.0, 1.0])).dtype == torch.float64
    assert ndcg(np.zeros((0, 4)), np.zeros((0, 4))).shape == (0,)
    assert recall(torch.zeros(2, 0, 4), torch.zeros(2, 0, 4), ties="expected").shape == (2, 0)


@given(groups, st.randoms())
def test_documents_may_come_in_any_order(pair, random):
    scores, gold = map(np.array, pair)
    order = random.sample(range(len(scores)), len(scores))
    for mode in MODES:
        reward = GroupRankReward(utility=RankingUtilityReward(ties="expected"), alignment=ScoreDistributionReward(mode))
        assert reward.of_scores(scores[order], gold[order]) == pytest.approx(reward.of_scores(scores, gold))


def test_rbo_of_equal_and_reversed_orders():
    assert rbo([3, 2, 1], [9, 5, 0]) == pytest.approx(1)
    assert rbo(np.arange(20), -np.arange(20.0) + 20) == pytest.approx(slow_rbo(range(20), [-i for i in range(20)], 0.9))
    assert RankingUtilityReward(rbo_weight=0.5)(GOLD, GOLD) == pytest.approx(1.7)


def test_alignment_has_a_gradient_through_torch():
    for mode in ("documents", "softmax"):
        scores = torch.tensor(SCORES, dtype=torch.float64, requires_grad=True)
        alignment = ScoreDistributionReward(mode)
        assert torch.autograd.gradcheck(lambda s, a=alignment: a(s, torch.tensor(GOLD)), (scores + 0.5,))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ndcg([], []), r"ndcg: scores has shape \(0,\), expected \(\.\.\., c\) with at least one document"),
        (lambda: ndcg(1.0, 2.0), r"scores has shape \(\)"),
        (lambda: ndcg([1, 2], [1, 2, 3]), r"have shapes \[\(2,\), \(3,\)\], expected the same documents"),
        (lambda: ndcg([[1], [2]], [[1], [2], [3]]), "do not broadcast"),
        (lambda: ndcg([1, math.nan], [1, 2]), "ndcg: scores at index 1 is NaN or infinite"),
        (lambda: recall([[1, 2]], [[1, math.inf]]), r"recall: gold at index \(0, 1\) is NaN or infinite"),
        (lambda: ndcg([1, 2], [1, -2]), "ndcg: gold at index 1 is negative"),
        (lambda: ndcg(["a"], [1]), "ndcg: scores and gold must be arrays of numbers"),
        (lambda: ndcg([[1, 2], [1]], [1]), "must be arrays of numbers"),
        (lambda: ndcg(torch.ones(1), ["a"]), "must be arrays of numbers"),
        (lambda: ndcg([1], [1], k=0), "k must be a whole number, at least 1, got 0"),
        (lambda: ndcg([1], [1], gain="exp"), "gain must be 'linear' or 'exp2', got 'exp'"),
        (lambda: ndcg([1], [1], ties="random"), "ties must be 'stable' or 'expected'"),
        (lambda: ndcg([1], [2000], gain="exp2"), "gain 'exp2' needs relevance up to 1000, got 2000"),
        (lambda: rbo([1], [1], p=1), "p must lie between 0 and 1, got 1"),
        (lambda: jensen_shannon([0.5, 0.5], [0.5, 0.4]), "jensen_shannon: q does not add up to 1"),
        (lambda: jensen_shannon([1.5, -0.5], [0.5, 0.5]), "p at index 1 is negative"),
        (lambda: jensen_shannon([1], [1], base=1), "base must be above 1"),
        (lambda: ScoreDistributionReward("cosine"), "mode must be one of documents, softmax, histogram, got 'cosine'"),
        (lambda: ScoreDistributionReward(smoothing=-1), "smoothing must be a finite number, at least 0"),
        (lambda: ScoreDistributionReward()([1, -1], [1, 1]), r"scores at index 1 is outside \[0, inf\]"),
        (lambda: ScoreDistributionReward("histogram")([1, 1], [1, 11]), r"gold at index 1 is outside \[0, 10\]"),
        (lambda: RankingUtilityReward(k=1.5), "k must be a whole number"),
        (lambda: RankingUtilityReward(recall_weight=math.nan), "recall_weight must be a finite number"),
        (lambda: GroupRankReward(alignment_weight=-1), "alignment_weight must be a finite number"),
        (lambda: FormatGate({"bad_json": math.inf}), "level of 'bad_json' must be a finite number"),
        (lambda: FormatGate()("ok"), "needs the reward of the answer"),
    ],
)
def test_errors(call, message):
    with pytest.raises(InvalidInputError, match=message):
        call()


def test_format_gate():
    gate_ = FormatGate()
    assert gate_("bad_json", 1.0) == -0.1
    assert gate_("bad_tags") == -0.5
    assert gate_("ok", 1.15) == 1.15
    rewards = [1.0, 2.0, 3.0, math.nan]
    np.testing.assert_array_equal(gate_(["ok", "bad_json", "bad_tags", "ok"], rewards), [1, -0.1, -0.5, math.nan])
    tensor = gate_(["ok", "bad_tags"], torch.tensor([1.0, 1.0]))
    assert tensor.dtype == torch.float32
    assert tensor.tolist() == [1.0, -0.5]
    assert FormatGate({"ok": 1.15, "bad_json": -0.1, "bad_tags": -0.5})("ok") == 1.15
    assert FormatGate({"bad_json": 0})("bad_json", 3) == 0
    with pytest.raises(UnknownNameError, match="no status 'bad_tag'; did you mean 'bad_tags'"):
        FormatGate({"bad_tag": -1})
    with pytest.raises(UnknownNameError, match="no status 'fine'"):
        gate_(["ok", "fine"], [1, 1])


def answer(body, reason="x"):
    return f"<reason>{reason}</reason><answer>{body}</answer>"


@pytest.mark.parametrize(
    ("text", "status"),
    [
        (answer('{"1": 7, "2": 0}'), "ok"),
        (answer(' {"2": 10,\n "1": 7.5} ', reason=""), "ok"),
        (answer('{"[1]": 7, "[2]": 0}'), "ok"),
        ("\n" + answer('{"1": 7, "2": 0}').replace("</reason>", "</reason>\n") + " ", "ok"),
        (answer('{"1": 7}'), "bad_json"),  # missing
        (answer('{"1": 7, "2": 0, "3": 1}'), "bad_json"),  # extra
        (answer('{"1": 7, "2": 0, "1": 7}'), "bad_json"),  # twice
        (answer('{"1": 7, "2": 0, "[1]": 7}'), "bad_json"),
        (answer('{"1": 7, "2": 11}'), "bad_json"),
        (answer('{"1": 7, "2": -1}'), "bad_json"),
        (answer('{"1": 7, "2": "5"}'), "bad_json"),
        (answer('{"1": 7, "2": true}'), "bad_json"),
        (answer('{"1": 7, "2": null}'), "bad_json"),
        (answer('{"1": 7, "2": NaN}'), "bad_json"),
        (answer('{"1": 7, "2": 1e999}'), "bad_json"),
        (answer('{"1": 7, "2": {"score": 1}}'), "bad_json"),
        (answer("[7, 0]"), "bad_json"),
        (answer('[["1", 7], ["2", 0]]'), "bad_json"),
        (answer("[]"), "bad_json"),
        (answer("7"), "bad_json"),
        (answer(""), "bad_json"),
        (answer("{'1': 7, '2': 0}"), "bad_json"),
        (answer('```json\n{"1": 7, "2": 0}\n```'), "bad_json"),
        (answer("[" * 100_000), "bad_json"),
        (answer('{"1": ' + "9" * 6000 + "}"), "bad_json"),
        ('<answer>{"1": 7, "2": 0}</answer>', "bad_tags"),
        ('<answer>{"1": 7, "2": 0}</answer><reason>x</reason>', "bad_tags"),
        ('<reason>x</reason>{"1": 7, "2": 0}', "bad_tags"),
        (answer('{"1": 7, "2": 0}') + " done", "bad_tags"),
        (answer('{"1": 7, "2": 0}') * 2, "bad_tags"),
        ('<reason>x<answer>{"1": 7, "2": 0}</answer></reason>', "bad_tags"),
        ("", "bad_tags"),
    ],
)
def test_reading_an_answer(text, status):
    read = parse_scores(text, ["1", "2"])
    assert read.status == status
    assert (read.scores is None) == (status != "ok")
    reward = GroupRankReward()(None, [text], gold=[[10, 2]])[0]
    assert reward == {"bad_json": -0.1, "bad_tags": -0.5}.get(status, reward)
    assert (reward > 0.5) == (status == "ok")


def test_scores_come_in_the_order_of_the_ids():
    assert parse_scores(answer('{"b": 1, "a": 2, "c": 3}'), ["a", "b", "c"]).scores.tolist() == [2, 1, 3]
    assert parse_scores(answer('{"2": 1, "1": 2}'), [1, 2]).scores.tolist() == [2, 1]


@given(st.lists(st.one_of(st.integers(0, 10), st.floats(0, 10)), min_size=1, max_size=20), st.booleans())
def test_what_is_written_reads_back(scores, named):
    ids = [f"doc {place}" for place in range(len(scores))] if named else range(1, len(scores) + 1)
    text = format_answer(scores, ids if named else None, "because")
    assert parse_scores(text, ids).scores.tolist() == pytest.approx(scores)


def test_reward_of_text():
    reward = GroupRankReward(alignment=ScoreDistributionReward(smoothing=0))
    text = format_answer(SCORES, reason="2 beats 1")
    assert reward(None, [text, answer("{}"), "?"], gold=[GOLD] * 3) == pytest.approx([1.150754, -0.1, -0.5], abs=1e-6)
    named = {"x": 10, "y": 5, "z": 0, "w": 1}
    assert reward(None, [format_answer(SCORES, named)], gold=[named]) == pytest.approx([1.150754], abs=1e-6)
    # structs of parquet have every key of the table: None is no document
    assert reward(None, [format_answer(SCORES, named)], gold=[{"v": None, **named}]) == pytest.approx([1.150754])
    parts = reward.explain(None, [text, "?", text], gold=[GOLD, GOLD, None])
    assert parts.status == ("ok", "bad_tags", None)
    np.testing.assert_allclose(parts.utility, [1.059779, math.nan, math.nan], atol=1e-6)
    np.testing.assert_allclose(parts.alignment, [0.909756, math.nan, math.nan], atol=1e-6)
    np.testing.assert_allclose(parts.total, [1.150754, -0.5, math.nan], atol=1e-6)


def test_groups_of_any_size_in_one_batch_equal_one_by_one():
    rng = np.random.default_rng(0)
    golds = [rng.integers(0, 11, size=rng.integers(1, 8)).astype(float).tolist() for _ in range(40)]
    texts = [format_answer(rng.integers(0, 11, size=len(gold))) for gold in golds]
    batch = GroupRankReward()(None, texts, gold=golds)
    assert batch == [GroupRankReward()(None, [text], gold=[gold])[0] for text, gold in zip(texts, golds, strict=True)]


def test_a_group_without_relevant_documents_is_dropped():
    texts = [format_answer([1, 2]), "?", format_answer([1, 2])]
    assert GroupRankReward()(None, texts, gold=[[0, 0], [0.0, 0], [1, 0]])[:2] == [None, None]


def test_bad_gold_is_named():
    for bad in ([], {}, "10, 5", 7, [1, -1], [1, 11], [1, "2"], [1, math.nan], [1, None], {"a": 1, "[a]": 2}):
        with pytest.raises(InvalidInputError, match=r"reward 'grouprank': column 'gold', row 1: "):
            GroupRankReward()(None, ["?", "?"], gold=[[1, 2], bad])
    with pytest.raises(MissingColumnError, match="reads the column 'gold'"):
        GroupRankReward()(None, ["?"], golds=[[1]])
    assert GroupRankReward("labels")(None, [format_answer([10, 0])], labels=[np.array([10, 0])]) == pytest.approx([1.3])


def test_recipe_form_equals_the_parts():
    flat = grouprank("g", 3, 0.5, "exp2", "expected", "histogram", 0.3, 0.0, {"bad_json": -0.2})
    parts = GroupRankReward(
        "g",
        RankingUtilityReward(3, 0.5, "exp2", "expected"),
        ScoreDistributionReward("histogram", smoothing=0.0),
        0.3,
        FormatGate({"bad_json": -0.2}),
    )
    assert flat == parts
    assert grouprank() == GroupRankReward()
    assert grouprank(alignment="none").alignment is None
    text = format_answer(GOLD)
    assert grouprank(alignment="none")(None, [text], gold=[GOLD]) == pytest.approx([1.2])
    assert pickle.loads(pickle.dumps(flat))(None, [text], g=[GOLD]) == flat(None, [text], g=[GOLD])


def test_levels_equal_nested_gates():
    def readable(prompts, completions, **columns):
        return [float(parse_scores(text, range(1, 5)).status != "bad_json") for text in completions]

    def valid(prompts, completions, **columns):
        return [1.0 for _ in completions]

    texts = [format_answer(SCORES), answer("{}"), "?"]
    nested = gate(gate(valid, readable, 1, -0.1), TagFormat(("reason", "answer")), 1, -0.5)
    assert nested(None, texts) == FormatGate()([parse_scores(t, range(1, 5)).status for t in texts], 1.0).tolist()


def test_equal_invalid_rollouts_give_no_signal():
    recipe = chain(WeightedSum(), Center("group"), Scale("group", ddof=0))
    values = GroupRankReward()(None, ["?"] * 4 + ["?", format_answer(GOLD), answer("{}"), "?"], gold=[GOLD] * 8)
    batch = RewardBatch(
        torch.tensor(values, dtype=torch.float64)[:, None], ("rank",), torch.arange(2).repeat_interleave(4)
    )
    advantages = compute_advantages(recipe, batch)
    assert advantages[:4].tolist() == [0, 0, 0, 0]
    assert advantages[5] > 0 > advantages[4]
    assert min(values) == -0.5


def test_every_valid_answer_beats_every_invalid_one():
    worst = GroupRankReward()(None, [format_answer([0, 10])], gold=[[10, 0]])[0]
    assert worst > 0 > -0.1


@given(st.text(max_size=30))
def test_no_text_raises(text):
    for body in (text, f"<reason>{text}</reason><answer>{text}</answer>"):
        try:
            values = GroupRankReward()(None, [body], gold=[[3, 1]])
        except PolyrewardError:
            pytest.fail("text of the model raised")
        assert -0.5 <= values[0] <= 1.3


def test_large_groups():
    rng = np.random.default_rng(0)
    scores, gold = rng.integers(0, 11, size=100_000), rng.random(100_000) * 10
    assert ndcg(scores, gold, None, ties="expected") == pytest.approx(ndcg_score([gold], [scores]))
