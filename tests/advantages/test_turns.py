import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyreward.advantages.presets import reinforce
from polyreward.advantages.transform import compute_advantages
from polyreward.advantages.turns import FusedAdvantage, degenerate_group_ratio
from polyreward.batch import RewardBatch
from polyreward.errors import InvalidInputError

LOCAL = np.array([0.13534, 1.12152, 0.53110, 0.13534, 0.13534])
OUTCOME, LENGTHS, INDEX = np.array([1.0, 0.0, 0.0]), np.array([2, 1, 2]), np.array([0, 0, 1, 2, 2])


def test_worked_example():
    advantages = FusedAdvantage()(LOCAL, OUTCOME, LENGTHS, INDEX)
    assert advantages == pytest.approx([0.26361, 1.24979, -0.15062, -0.54639, -0.54639], abs=2e-5)
    local = FusedAdvantage()(LOCAL, np.zeros(3), LENGTHS, INDEX)
    assert local == pytest.approx([-0.27639, 0.70979, 0.11938, -0.27639, -0.27639], abs=2e-5)
    ends = FusedAdvantage(beta=0.0)(LOCAL, OUTCOME, LENGTHS, INDEX)
    assert ends == pytest.approx([0.54, 0.54, -0.27, -0.27, -0.27], abs=1e-14)


def by_hand(local, outcome, lengths, index, groups, beta, gamma, std):
    decayed = [r * gamma**n for r, n in zip(outcome, lengths, strict=True)]

    def compared(values, labels):
        out = []
        for value, label in zip(values, labels, strict=True):
            mates = [v for v, other in zip(values, labels, strict=True) if other == label]
            mean = sum(mates) / len(mates)
            spread = (sum((v - mean) ** 2 for v in mates) / max(len(mates) - 1, 1)) ** 0.5
            constant = max(mates) - min(mates) == 0
            out.append(0.0 if constant else (value - mean) / (spread + 1e-6 if std else 1))
        return out

    ends = compared(decayed, groups)
    steps = compared(local, [groups[i] for i in index])
    alone = [groups.count(label) == 1 for label in groups]
    return [0.0 if alone[i] else ends[i] + beta * s for i, s in zip(index, steps, strict=True)]


@st.composite
def episodes(draw):
    count = draw(st.integers(1, 7))
    lengths = draw(st.lists(st.integers(1, 4), min_size=count, max_size=count))
    groups = draw(st.lists(st.integers(-2, 2), min_size=count, max_size=count))
    index = draw(st.permutations([i for i, n in enumerate(lengths) for _ in range(n)]))
    value = st.floats(-5, 5, width=32).map(lambda v: round(v, 3))
    local = draw(st.lists(value, min_size=len(index), max_size=len(index)))
    outcome = draw(st.lists(st.sampled_from([0.0, 1.0]), min_size=count, max_size=count))
    return local, outcome, lengths, list(index), groups


@given(episodes(), st.floats(0, 3), st.floats(0.1, 1), st.booleans())
def test_equals_plain_python(episode, beta, gamma, std):
    local, outcome, lengths, index, groups = episode
    part = FusedAdvantage(beta, gamma, "std" if std else "mean")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = part(np.array(local), np.array(outcome), np.array(lengths), np.array(index), np.array(groups))
        tensor = part(*(torch.tensor(v) for v in (local, outcome, lengths, index)), torch.tensor(groups))
    expected = by_hand(local, outcome, lengths, index, groups, beta, gamma, std)
    assert found == pytest.approx(expected, abs=1e-5, rel=1e-5)
    assert tensor.dtype == torch.float32
    assert tensor.tolist() == pytest.approx(expected, abs=1e-4, rel=1e-4)


@given(episodes())
def test_local_part_sums_to_zero_over_turns_and_the_outcome_over_trajectories(episode):
    local, outcome, lengths, index, _ = episode
    if len(outcome) == 1:
        return
    args = np.array(lengths), np.array(index)
    assert FusedAdvantage()(np.array(local), np.zeros(len(outcome)), *args).sum() == pytest.approx(0, abs=1e-9)
    ends = FusedAdvantage(beta=0.0)(np.array(local), np.array(outcome), *args)
    first = [index.index(i) for i in range(len(outcome))]
    assert ends[first].sum() == pytest.approx(0, abs=1e-9)


def test_single_turns_are_the_centred_sum():
    rng = np.random.default_rng(0)
    local, outcome = rng.random(12), rng.integers(0, 2, 12).astype(float)
    groups = np.repeat([0, 1, 2], 4)
    fused = FusedAdvantage(beta=0.5, gamma=1.0)(local, outcome, np.ones(12, int), np.arange(12), groups)
    batch = RewardBatch(np.stack([outcome, local], 1), ("outcome", "local"), groups)
    assert fused == pytest.approx(compute_advantages(reinforce({"outcome": 1, "local": 0.5}), batch).numpy())


def test_a_single_trajectory_gets_zero_and_a_warning():
    with pytest.warns(UserWarning, match="1 of 2 groups have a single trajectory"):
        found = FusedAdvantage()(LOCAL, OUTCOME, LENGTHS, INDEX, np.array([0, 1, 1]))
    assert found[:2].tolist() == [0, 0]
    assert np.abs(found[2:]).min() > 0


def test_equal_rewards_give_exactly_zero():
    for normalise in ("mean", "std"):
        found = FusedAdvantage(normalise=normalise)(np.full(5, 0.1), np.zeros(3), LENGTHS, INDEX)
        assert found.tolist() == [0] * 5
    assert FusedAdvantage()(np.zeros(0), np.zeros(0), np.zeros(0, int), np.zeros(0, int)).shape == (0,)


def test_dtype_and_order():
    found = FusedAdvantage()(LOCAL.astype(np.float32), OUTCOME.astype(bool), LENGTHS, INDEX)
    assert found.dtype == np.float32
    order = [3, 0, 4, 2, 1]
    again = FusedAdvantage()(LOCAL[order], OUTCOME, LENGTHS, INDEX[order])
    assert again == pytest.approx(FusedAdvantage()(LOCAL, OUTCOME, LENGTHS, INDEX)[order])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((LOCAL, OUTCOME, np.array([2, 2, 1]), INDEX), "lengths says 2 turns for trajectory 1, traj_index names it 1"),
        ((LOCAL, OUTCOME, LENGTHS, INDEX + 1), "traj_index must be from 0 to 2"),
        ((LOCAL, OUTCOME, LENGTHS, INDEX[:4]), "4 entries for 5"),
        ((LOCAL, OUTCOME, LENGTHS[:2], INDEX), "lengths has 2 entries for 3"),
        ((LOCAL * np.nan, OUTCOME, LENGTHS, INDEX), "turn_rewards is nan at 0"),
        ((LOCAL, np.array([np.inf, 0, 0]), LENGTHS, INDEX), "trajectory_rewards is inf at 0"),
        ((LOCAL[None], OUTCOME, LENGTHS, INDEX), "one-dimensional"),
        ((["a"], OUTCOME, LENGTHS, INDEX), "turn_rewards must be numbers"),
        ((LOCAL, OUTCOME, LENGTHS * 1.0, INDEX), "lengths must be whole numbers"),
        ((LOCAL, OUTCOME, LENGTHS, INDEX, np.array([0, 1])), "groups has 2 entries for 3"),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(InvalidInputError, match=words):
        FusedAdvantage()(*arguments)


@pytest.mark.parametrize(
    "options",
    [
        {"gamma": 0.0},
        {"gamma": 1.1},
        {"beta": float("inf")},
        {"beta": "1"},
        {"normalise": "max"},
        {"ddof": 2},
        {"epsilon": -1},
    ],
)
def test_bad_options(options):
    with pytest.raises(InvalidInputError):
        FusedAdvantage(**options)


def test_degenerate_group_ratio():
    groups = ["a", "a", "b", "b", "c", "d", "d"]
    assert degenerate_group_ratio([1, 1, 0, 1, 5, 0, 0], groups) == pytest.approx(2 / 3)
    assert degenerate_group_ratio(torch.tensor([1, 1.05, 0, 1, 5, 0, 0]), groups, tol=0.1) == pytest.approx(2 / 3)
    assert degenerate_group_ratio([1.0, np.nan, 0, 1, 5, 0, 0], groups) == pytest.approx(1 / 2)
    assert degenerate_group_ratio([], []) == 0
    assert degenerate_group_ratio([3.0], ["x"]) == 0
    for rewards, ids, tol in (([1, 2], [0], 0), ([1.0, np.inf], [0, 0], 0), ([1, 2], [0, 0], -1), ([[1, 2]], [0], 0)):
        with pytest.raises(InvalidInputError):
            degenerate_group_ratio(rewards, ids, tol)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1)), max_size=20))
def test_degenerate_group_ratio_by_hand(rows):
    groups, rewards = [g for g, _ in rows], [float(r) for _, r in rows]
    real = [g for g in set(groups) if groups.count(g) > 1]
    dead = [g for g in real if len({r for h, r in zip(groups, rewards, strict=True) if h == g}) == 1]
    assert degenerate_group_ratio(rewards, groups) == pytest.approx(len(dead) / len(real) if real else 0)
