import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyreward.errors import InvalidInputError, UnknownNameError
from polyreward.reward_models.latent_scaling import MODES, RewardScaler

REWARDS = torch.tensor([[0.0, 1.0, 4.0], [-8.0, -2.0, 0.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("none", [[0, 1, 4], [-8, -2, 0]]),
        ("minmax", [[0, 0.0025, 0.01], [0, 0.0075, 0.01]]),
        ("max", [[0, 0.25, 1], [-1, -0.25, 0]]),
    ],
)
def test_by_hand(mode, expected):
    assert np.allclose(RewardScaler(mode)(REWARDS), expected)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 6), st.integers(1, 6))
def test_against_loops(seed, count, references):
    rng = np.random.default_rng(seed)
    rewards, reference = 5 * rng.normal(size=(2, count)), 5 * rng.normal(size=(2, references))
    norm, spo = RewardScaler("learned_norm")(rewards, reference), RewardScaler("spo")(rewards, reference)
    assert isinstance(spo, np.ndarray)
    for user in range(2):
        soft = math.log(sum(math.exp(r) for r in reference[user]) / references)
        for i in range(count):
            assert norm[user, i] == pytest.approx(math.exp(1e-3 * (rewards[user, i] - soft)))
            beats = [1 / (1 + math.exp(r - rewards[user, i])) for r in reference[user]]
            assert spo[user, i] == pytest.approx(sum(beats) / references)
    assert ((spo > 0) & (spo < 1)).all()
    # monotone: the ranking is that of the rewards, for any reference
    assert (spo.argsort(axis=1) == rewards.argsort(axis=1)).all()
    assert np.allclose(RewardScaler("spo", temperature=0.5)(rewards, reference), np.exp(spo / 0.5))


@settings(max_examples=30, deadline=None)
@given(st.floats(0.1, 50), st.floats(-20, 20))
def test_what_each_mode_ignores(scale, shift):
    for mode, moved in (("minmax", scale * REWARDS + shift), ("max", scale * REWARDS)):
        assert torch.allclose(RewardScaler(mode)(moved), RewardScaler(mode)(REWARDS))
    for mode in ("spo", "learned_norm"):
        assert torch.allclose(RewardScaler(mode)(REWARDS + shift), RewardScaler(mode)(REWARDS))


def test_equal_rewards_are_zero_and_nothing_is_nan():
    equal = torch.full((2, 3), 7.0)
    assert torch.equal(RewardScaler("minmax")(equal), torch.zeros(2, 3))
    assert torch.equal(RewardScaler("max")(torch.zeros(2, 3)), torch.zeros(2, 3))
    assert torch.equal(RewardScaler("minmax")(torch.tensor([3.0])), torch.zeros(1))
    assert torch.equal(RewardScaler("spo")(equal), torch.full((2, 3), 0.5))
    values = equal.clone().requires_grad_()
    RewardScaler("minmax")(values).sum().backward()
    assert torch.isfinite(values.grad).all()


@pytest.mark.parametrize("mode", MODES)
def test_dtypes_empty_and_extremes(mode):
    assert RewardScaler(mode)(REWARDS.half()).dtype == torch.float16
    assert RewardScaler(mode)(torch.zeros(2, 0)).shape == (2, 0)
    assert torch.isfinite(RewardScaler(mode)(torch.tensor([-1e6, 0.0, 1e5]))).all()
    for bad in (math.nan, math.inf):
        with pytest.raises(InvalidInputError, match=r"rewards\[1\] is"):
            RewardScaler(mode)(torch.tensor([0.0, bad]))


def test_wrong_calls():
    with pytest.raises(UnknownNameError, match="did you mean 'minmax'"):
        RewardScaler("min-max")
    with pytest.raises(InvalidInputError, match="factor must be above 0"):
        RewardScaler("max", 0.0)
    with pytest.raises(InvalidInputError, match="belongs to mode 'spo'"):
        RewardScaler("max", temperature=1.0)
    for reference in (torch.zeros(3, 2), torch.zeros(2, 0), torch.zeros(2)):
        with pytest.raises(InvalidInputError, match="the reference"):
            RewardScaler("max")(REWARDS, reference)
    with pytest.raises(InvalidInputError, match="floats"):
        RewardScaler()(torch.tensor([1, 2]))
