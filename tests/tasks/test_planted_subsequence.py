import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyreward.errors import InvalidInputError
from polyreward.tasks.planted_subsequence import HETEROGENEOUS, HOMOGENEOUS, PlantedSubsequence


def small(gold, tokens, seed=0):
    task = PlantedSubsequence(np.array(gold), tokens)
    return task, np.random.default_rng(seed).dirichlet(np.ones(tokens), size=(2, len(gold)))


def slow_value(task, policy, prompt, horizon):
    """Mean return and distribution of returns by enumerating all traces, in plain Python."""
    x1, x2 = prompt
    mean, chances = 0.0, [0.0] * (horizon + 1)
    for trace in itertools.product(range(task.tokens), repeat=horizon):
        chance, earned, before = 1.0, 0, None
        for step, token in enumerate(trace):
            ready = before == task.gold[x1]
            chance *= policy[int(ready), x2 if ready else x1, token]
            if not earned and ready and token == task.gold[x2]:
                earned = horizon - step
            before = token
        mean += chance * earned
        chances[earned] += chance
    return mean, chances


@given(st.lists(st.integers(0, 2), min_size=1, max_size=3), st.integers(1, 5), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_value_and_distribution_equal_enumeration(gold, horizon, seed):
    task, policy = small(gold, 3, seed)
    value, chances = task.value(policy, horizon), task.return_distribution(policy, horizon)
    assert value.shape == (len(gold), len(gold))
    for prompt in itertools.product(range(len(gold)), repeat=2):
        mean, distribution = slow_value(task, policy, prompt, horizon)
        assert value[prompt] == pytest.approx(mean)
        assert chances[prompt] == pytest.approx(distribution)


def test_worked_values_of_two_and_three_steps():
    task, p, q = PlantedSubsequence(np.array([0, 1]), 4), 0.3, 0.1
    policy = np.full((2, 2, 4), (1 - p - q) / 2)
    policy[0, 0], policy[1, 1] = [p, 0.3, 0.2, 0.2], [q, p, 0.3, 0.3]
    assert task.value(policy, 1)[0, 1] == 0
    assert task.value(policy, 2)[0, 1] == pytest.approx(p * p)
    assert task.value(policy, 3)[0, 1] == pytest.approx(2 * p**2 + p**2 * (1 - p) + p * q * p)


def test_one_symbol_twice_is_solved_by_its_token_twice():
    task = PlantedSubsequence(np.array([2]), 3)
    policy = np.tile([0.0, 0.5, 0.5], (2, 1, 1))
    assert task.value(policy, 2)[0, 0] == pytest.approx(0.25)
    assert task.value(policy, 3)[0, 0] == pytest.approx(2 * 0.25 + 0.125)


def test_the_homogeneous_base_agrees_with_sampling():
    rng = np.random.default_rng(0)
    exact, sampled = [], []
    for _ in range(10):
        task = PlantedSubsequence.draw(rng)
        base = task.base_policy(HOMOGENEOUS)
        exact.append(task.value(base, 256).mean())
        sampled.append(task.sample(base, 300, 256, rng).returns)
    assert np.mean(exact) == pytest.approx(241.15, abs=0.02)
    assert np.mean(sampled) == pytest.approx(241.15, abs=0.8)  # 3000 rollouts, deviation 14
    assert np.std(sampled) == pytest.approx(14, abs=1)


def test_the_heterogeneous_base_agrees_with_sampling():
    rng = np.random.default_rng(1)
    task = PlantedSubsequence.draw(rng)
    base = task.base_policy(HETEROGENEOUS)
    chances = task.return_distribution(base, 128).mean(axis=(0, 1, 2))
    traces = task.sample(base, 4000, 128, rng)
    mean = chances @ np.arange(129)
    assert mean == pytest.approx(task.value(base, 128).mean())
    assert traces.returns.mean() == pytest.approx(mean, abs=3)
    assert (traces.returns == 0).mean() == pytest.approx(chances[0], abs=0.03)
    by_style = [traces.returns[traces.styles == style].mean() for style in range(4)]
    assert by_style == pytest.approx(task.value(base, 128).mean(axis=(1, 2)), abs=5)


def test_traces_say_what_stood_before_and_when_they_were_solved():
    rng = np.random.default_rng(2)
    task = PlantedSubsequence.draw(rng, symbols=5, tokens=4)
    traces = task.sample(task.base_policy(HETEROGENEOUS), 200, 12, rng)
    for row in range(200):
        x1, x2 = traces.prompts[row]
        solved = False
        for step in range(12):
            ready = step > 0 and traces.tokens[row, step - 1] == task.gold[x1]
            assert traces.progress[row, step] == ready
            assert traces.needed[row, step] == (x2 if ready else x1)
            assert traces.until_solved[row, step] == (traces.solved[row, -1] and not solved)
            solved |= bool(ready and traces.tokens[row, step] == task.gold[x2])
            assert traces.solved[row, step] == solved
    steps = traces.solved.argmax(axis=1)[traces.solved[:, -1]]
    full = np.where(traces.solved[:, -1], traces.solved.argmax(axis=1), 1)
    pairs = traces.pairs(full)[traces.solved[:, -1]]
    assert (pairs == task.gold[traces.prompts[traces.solved[:, -1]]]).all()
    assert (traces.returns[traces.solved[:, -1]] == 12 - steps).all()


def test_base_policies_and_prompts():
    task = PlantedSubsequence(np.array([3, 0]), 4)
    base = task.base_policy((0.0, 0.6, 1.0))
    assert base.shape == (3, 2, 2, 4)
    assert base.sum(axis=-1) == pytest.approx(np.ones((3, 2, 2)))
    assert base[1, 0, 0].tolist() == pytest.approx([0.1, 0.1, 0.1, 0.7])
    assert task.base_policy(0.6)[0] == pytest.approx(base[1])
    assert task.prompts.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert task.value(base, 10)[2].tolist() == [[9, 9], [9, 9]]
    assert np.mean(HETEROGENEOUS) == pytest.approx(HOMOGENEOUS[0])
    same = task.sample(base, 5, 6, np.random.default_rng(3)).tokens
    assert (same == task.sample(base, 5, 6, np.random.default_rng(3)).tokens).all()


def test_bad_tasks_and_policies():
    for gold in (np.array([4]), np.array([-1]), np.zeros((2, 2), dtype=int), np.array([], dtype=int), np.array([0.5])):
        with pytest.raises(InvalidInputError, match="gold"):
            PlantedSubsequence(gold, 4)
    task = PlantedSubsequence(np.array([1, 2]), 4)
    rng = np.random.default_rng(0)
    with pytest.raises(InvalidInputError, match=r"policy has shape \(2, 2, 5\), expected \(\.\.\., 2, 2, 4\)"):
        task.value(np.zeros((2, 2, 5)), 3)
    with pytest.raises(InvalidInputError, match="horizon must be at least 1"):
        task.value(np.zeros((2, 2, 4)), 0)
    with pytest.raises(InvalidInputError, match="policy must have shape"):
        task.sample(np.zeros((2, 2, 4)), 1, 3, rng)
    with pytest.raises(InvalidInputError, match=r"prompts have shape \(1, 2\), expected \(2, 2\)"):
        task.sample(task.base_policy(0.5), 2, 3, rng, np.zeros((1, 2), dtype=int))
    with pytest.raises(InvalidInputError, match="styles must lie in"):
        task.base_policy((0.5, 1.5))
