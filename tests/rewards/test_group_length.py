import pickle
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyreward.advantages.presets import dr_grpo
from polyreward.advantages.transform import compute_advantages
from polyreward.batch import RewardBatch
from polyreward.errors import InvalidInputError
from polyreward.grouped import factorize
from polyreward.rewards.group_length import GroupLengthPenalty, GroupLengthReward
from polyreward.rewards.groups import needs_group

SCORES, LENGTHS = np.array([0.0, 1.0, 1.0, 0.0]), np.array([40.0, 80.0, 100.0, 20.0])


def test_worked_example():
    penalty = GroupLengthPenalty()(SCORES, LENGTHS)
    assert penalty == pytest.approx([-0.277778, 0, 0, -0.388889], abs=1e-6)
    for rewards, expected in (
        (SCORES + penalty + 0.5, [-0.611111, 0.666667, 0.666667, -0.722222]),
        (SCORES, [-0.5, 0.5, 0.5, -0.5]),
    ):
        batch = RewardBatch(torch.from_numpy(rewards)[:, None], ("total",), torch.zeros(4, dtype=torch.int64))
        assert compute_advantages(dr_grpo(), batch).tolist() == pytest.approx(expected, abs=1e-6)


def test_corner_cases_of_the_definition():
    penalty = GroupLengthPenalty()
    assert penalty(np.zeros(4), LENGTHS).tolist() == [0, 0, 0, 0]
    assert penalty(np.ones(4), LENGTHS).tolist() == [0, 0, 0, 0]
    assert penalty(np.array([1.0, 0.0, 0.0]), np.array([10, 10, 999])).tolist() == [0, 0, 0]
    assert penalty(np.array([1.0, 0.0]), np.array([10, 0])).tolist() == [0, -0.5]
    assert penalty(np.array([1.0, 0.0]), np.array([0, 7])).tolist() == [
        0,
        0,
    ]  # correct and empty: nothing to compare with
    assert penalty(np.array([0.5, 0.4999]), np.array([10, 5])).tolist() == [0, -0.25]  # at tau is correct
    assert penalty(np.array([1.0]), np.array([3])).tolist() == [0]
    assert penalty(np.zeros(0), np.zeros(0)).shape == (0,)
    assert not np.signbit(penalty(SCORES, LENGTHS)[1:3]).any()


def test_two_sided():
    scores, lengths = np.array([1.0, 0, 0, 0, 0]), np.array([10, 5, 15, 20, 100])
    assert GroupLengthPenalty(side="two_sided")(scores, lengths).tolist() == [0, -0.25, -0.25, -0.5, -0.5]
    assert GroupLengthPenalty()(scores, lengths).tolist() == [0, -0.25, 0, 0, 0]


def test_the_median_is_not_moved_by_one_long_answer():
    scores, lengths = np.array([1.0, 1, 1, 0]), np.array([10, 12, 1000, 6])
    assert GroupLengthPenalty(centre="median")(scores, lengths).tolist() == [0, 0, 0, -0.25]
    assert GroupLengthPenalty()(scores, lengths)[3] == pytest.approx(-0.5 * (1 - 6 * 3 / 1022))
    assert GroupLengthPenalty(centre="median")(np.array([1.0, 1, 0]), np.array([10, 14, 6])).tolist() == [0, 0, -0.25]


def reference(scores, lengths, groups, tau, p_max, side, centre):
    out = []
    for score, length, group, limit in zip(scores, lengths, groups, tau, strict=True):
        right = [
            other
            for s, other, g, t in zip(scores, lengths, groups, tau, strict=True)
            if g == group and not np.isnan(s) and s >= t
        ]
        if np.isnan(score):
            out.append(np.nan)
            continue
        if score >= limit or not right:
            out.append(0.0)
            continue
        target = statistics.fmean(right) if centre == "mean" else statistics.median(right)
        if target == 0:
            out.append(0.0)
        elif length < target:
            out.append(-p_max * (1 - length / target))
        else:
            out.append(-p_max * min(1, length / target - 1) if side == "two_sided" else 0.0)
    return out


rows = st.lists(
    st.tuples(
        st.one_of(st.floats(-1, 2), st.just(float("nan"))), st.integers(0, 50), st.integers(-3, 3), st.floats(0, 1)
    ),
    max_size=24,
)


@given(
    rows, st.floats(0, 3), st.sampled_from(["short", "two_sided"]), st.sampled_from(["mean", "median"]), st.booleans()
)
def test_equals_a_plain_loop(data, p_max, side, centre, own_tau):
    scores, lengths, groups, taus = (list(column) for column in zip(*data, strict=True)) if data else ([], [], [], [])
    part = GroupLengthPenalty(p_max, 0.5, side, centre)
    found = part(scores, lengths, groups, taus if own_tau else None)
    expected = reference(scores, lengths, groups, taus if own_tau else [0.5] * len(scores), p_max, side, centre)
    assert found == pytest.approx(np.array(expected), abs=1e-9, nan_ok=True)
    known = found[~np.isnan(found)]
    assert ((-p_max - 1e-9 <= known) & (known <= 0)).all()


@given(rows, st.floats(0.01, 1000), st.randoms())
def test_scale_and_order_change_nothing(data, factor, random):
    if not data:
        return
    scores, lengths, groups, _ = (np.array(column) for column in zip(*data, strict=True))
    part = GroupLengthPenalty(centre="median")
    found = part(scores, lengths, groups)
    assert part(scores, lengths * factor, groups) == pytest.approx(found, abs=1e-9, nan_ok=True)
    order = list(range(len(data)))
    random.shuffle(order)
    assert part(scores[order], lengths[order], groups[order]) == pytest.approx(found[order], abs=1e-12, nan_ok=True)


@given(st.lists(st.integers(0, 30), min_size=2, max_size=12))
def test_shorter_wrong_answers_lose_more(lengths):
    ordered = sorted(lengths)
    scores = np.array([0.0] * len(ordered) + [1.0])
    penalty = GroupLengthPenalty()(scores, np.array([*ordered, 20]))[:-1]
    assert (np.diff(penalty) >= 0).all()


def test_groups_as_segments_strings_and_one_by_one():
    scores, lengths = np.tile(SCORES, 2), np.concatenate([LENGTHS, LENGTHS * 3])
    alone = GroupLengthPenalty()(SCORES, LENGTHS)
    for groups in ([0] * 4 + [1] * 4, ["a"] * 4 + ["b"] * 4, factorize([7] * 4 + [-2] * 4)):
        assert GroupLengthPenalty()(scores, lengths, groups) == pytest.approx(np.tile(alone, 2))
    assert GroupLengthPenalty()(scores, lengths, list(range(8))).tolist() == [0] * 8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tensors_keep_their_dtype(dtype):
    found = GroupLengthPenalty()(torch.tensor(SCORES, dtype=dtype, requires_grad=True), torch.tensor(LENGTHS))
    assert found.dtype == dtype
    assert not found.requires_grad
    assert found.float().numpy() == pytest.approx([-0.277778, 0, 0, -0.388889], abs=2e-3)
    assert GroupLengthPenalty()(np.array([0, 1]), [1, 2]).dtype == np.float32
    assert GroupLengthPenalty()(SCORES.astype(np.float32), LENGTHS).dtype == np.float32
    assert GroupLengthPenalty()(torch.tensor([0, 1]), torch.tensor([1, 2])).dtype == torch.float32


@pytest.mark.parametrize(
    ("scores", "lengths", "groups", "message"),
    [
        ([0.0, 1.0], [1], None, r"scores \(2,\), lengths \(1,\)"),
        ([[0.0]], [[1]], None, r"scores \(1, 1\)"),
        ([0.0, 1.0], [1, -2], None, "length -2 of sample 1"),
        ([0.0, 1.0], [float("nan"), 2], None, "length nan of sample 0"),
        ([0.0, 1.0], [1, 2], [0], "1 group ids for 2 samples"),
        (["a", "b"], [1, 2], None, "must be numbers"),
        ([0.0, 1.0], ["a", "b"], None, "must be numbers"),
    ],
)
def test_bad_input(scores, lengths, groups, message):
    with pytest.raises(InvalidInputError, match=message):
        GroupLengthPenalty()(scores, lengths, groups)


@pytest.mark.parametrize(
    "options", [{"p_max": -1}, {"p_max": float("inf")}, {"tau": float("nan")}, {"side": "long"}, {"centre": "mode"}]
)
def test_bad_options(options):
    with pytest.raises(InvalidInputError):
        GroupLengthPenalty(**options)


def right(prompts, completions, **columns):
    return [None if "?" in text else float("yes" in text) for text in completions]


def test_the_reward_groups_by_prompt_and_counts_tokens():
    reward = GroupLengthReward(right)
    prompts = ["a", "b", "a", "b", "a"]
    completions = ["yes a b c", "no", "no b", "no no no", "? what"]
    assert reward(prompts, completions) == [0, 0, -0.25, 0, None]
    ids = [[1] * n for n in (8, 1, 2, 3, 4)]
    assert reward(prompts, completions, completion_ids=ids) == [0, 0, -0.375, 0, None]
    assert reward(None, completions, group=[1, 1, 2, 2, 2]) == [0, -0.375, 0, 0, None]
    assert GroupLengthReward(right, unit="characters")(prompts, completions)[2] == pytest.approx(-0.5 * (1 - 4 / 9))
    assert reward([], []) == []
    chat = [[{"role": "user", "content": p}] for p in prompts]
    assert reward(chat, completions) == [0, 0, -0.25, 0, None]
    with pytest.raises(InvalidInputError, match="give prompts or 'group'"):
        reward(None, completions)
    with pytest.raises(InvalidInputError, match="must be a list of 5"):
        reward(prompts, completions, group=[1, 2])
    with pytest.raises(InvalidInputError, match="unit must be"):
        GroupLengthReward(right, unit="bytes")
    assert pickle.loads(pickle.dumps(reward)) == reward
    assert needs_group(reward + right)  # so that the executor keeps the batch together
