import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyreward.errors import InvalidInputError, UnknownNameError
from polyreward.reward_models.user_scaling import UserScaler

OWN, NEIGHBOURS = np.array([[6.0, 7.0], [5.0, 8.0]]), np.array([[7.0, 6.0], [8.0, 6.0]])
NAN = float("nan")


def test_the_worked_example():
    total = UserScaler().combine(OWN, NEIGHBOURS)
    assert total.tolist() == [13, 13.5]
    half = UserScaler(weights=(0.5, 0.5)).combine(OWN, NEIGHBOURS)
    assert half.tolist() == [6.5, 6.75]
    assert UserScaler().choose(total) == UserScaler().choose(half) == 1
    for weights in ((1, 1), (0.5, 0.5)):
        scaler = UserScaler(weights=weights)
        assert scaler.combine(OWN).tolist() == [5.5, 7.5]
        assert scaler.combine(OWN, np.full((2, 2), NAN)).tolist() == [5.5, 7.5]
        assert scaler.combine(None, NEIGHBOURS).tolist() == [7.5, 6]
        assert scaler(np.zeros((0, 2)), NEIGHBOURS).tolist() == [7.5, 6]


def test_chains_that_failed_take_no_part():
    own = np.array([[6.0, 7.0], [NAN, NAN], [5.0, 8.0]])
    assert UserScaler().combine(own, NEIGHBOURS).tolist() == [13, 13.5]
    # a response without own score stays on the scale of the others
    part = np.array([[NAN, 7.0], [NAN, 8.0]])
    assert UserScaler().combine(part, NEIGHBOURS).tolist() == [15, 13.5]
    assert UserScaler(weights=(0.5, 0.5)).combine(part, NEIGHBOURS).tolist() == [7.5, 6.75]
    strict = UserScaler(missing="nan").combine(part, NEIGHBOURS)
    assert np.isnan(strict[0])
    assert strict[1] == 13.5
    assert np.isnan(UserScaler().combine(np.full((2, 2), NAN))).all()
    assert UserScaler(weights=(0, 1)).combine(OWN, NEIGHBOURS).tolist() == [7.5, 6]
    assert np.isnan(UserScaler(weights=(0, 1)).combine(OWN)).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([(1.0, 1.0), (0.5, 0.5), (2.0, 1.0)]))
def test_equals_a_loop_over_items_and_responses(seed, weights):
    rng = np.random.default_rng(seed)
    own, other = rng.uniform(1, 10, size=(3, 4, 2)), rng.uniform(1, 10, size=(3, 2, 2))
    own[rng.random(own.shape) < 0.4] = np.nan
    other[rng.random(other.shape) < 0.4] = np.nan
    found = UserScaler(4, 2, weights).combine(own, other)
    for item in range(3):
        sides = [own[item], other[item]]
        alive = [not np.isnan(side).all() for side in sides]
        for response in range(2):
            values, shares = [], []
            for side, weight in zip(sides, weights, strict=True):
                known = [v for v in side[:, response] if v == v]
                if known:
                    values.append(weight * sum(known) / len(known))
                    shares.append(weight)
            if not values:
                assert np.isnan(found[item, response])
            else:
                scale = sum(weights) if all(alive) else 1.0
                assert found[item, response] == pytest.approx(scale * sum(values) / sum(shares))


def test_the_variance_of_the_own_side_falls_as_one_over_m():
    scores = np.random.default_rng(0).normal(6, 1, size=(20_000, 16, 1))
    wide = UserScaler(1).combine(scores[:, :1]).var()
    narrow = UserScaler(16).combine(scores).var()
    assert wide / narrow == pytest.approx(16, rel=0.05)


def test_ties_go_to_the_first_and_nan_comes_last():
    scaler = UserScaler()
    assert scaler.choose([3, 3]) == 0
    assert scaler.choose([NAN, 1.0]) == 1
    assert scaler.choose([NAN, NAN]) == 0
    assert scaler.choose(torch.tensor([1.0, 2.0, 2.0])) == 1


def test_types_are_kept():
    own = torch.tensor(OWN, dtype=torch.float32)
    assert UserScaler().combine(own).dtype == torch.float32
    assert UserScaler().combine(own.bfloat16(), own.bfloat16()).dtype == torch.float32
    assert isinstance(UserScaler().combine(OWN.tolist()), np.ndarray)


def test_wrong_calls():
    with pytest.raises(InvalidInputError, match="at most 1"):
        UserScaler(1, 1).combine(OWN)
    with pytest.raises(InvalidInputError, match="different responses"):
        UserScaler().combine(OWN, NEIGHBOURS[:, :1])
    with pytest.raises(InvalidInputError, match="needs own scores"):
        UserScaler().combine(None)
    with pytest.raises(InvalidInputError, match="infinite"):
        UserScaler().combine(np.array([[np.inf]]))
    with pytest.raises(InvalidInputError, match=r"\(samples, responses\)"):
        UserScaler().combine(np.zeros(2))
    with pytest.raises(InvalidInputError, match="at least one response"):
        UserScaler().choose([])
    with pytest.raises(InvalidInputError, match="not both 0"):
        UserScaler(0, 0)
    with pytest.raises(InvalidInputError, match="weights"):
        UserScaler(weights=(-1, 2))
    with pytest.raises(UnknownNameError, match="did you mean 'renormalise'"):
        UserScaler(missing="renormalize")


@pytest.mark.parametrize("changes", [{"m": 2.5}, {"n": "3"}, {"m": True}, {"weights": None}, {"weights": 1.0}])
def test_settings_of_another_type(changes):
    with pytest.raises(InvalidInputError, match=next(iter(changes))):
        UserScaler(**changes)
