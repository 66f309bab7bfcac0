import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyreward import RewardBatch
from polyreward.errors import InvalidInputError, MissingColumnError, UnknownNameError
from polyreward.objectives import ElasticTrustRegion, FixedClip


def binary_group(passed: int, size: int = 16) -> tuple[torch.Tensor, RewardBatch]:
    rewards = torch.tensor([1.0] * passed + [0.0] * (size - passed), dtype=torch.float64)
    deviation = rewards.std(correction=0)
    return (rewards - rewards.mean()) / deviation, RewardBatch(rewards)


@pytest.mark.parametrize(
    ("passed", "plus", "minus", "score", "right", "wrong"),
    [
        (1, 3.873, -0.258, 0.2344, 0.2318, 0.0832),
        (4, 1.732, -0.577, 0.75, 0.2914, 0.1886),
        (8, 1.0, -1.0, 1.0, 0.2800, 0.2800),
        (12, 0.577, -1.732, 0.75, 0.1886, 0.2914),
    ],
)
def test_worked_radii(passed, plus, minus, score, right, wrong):
    advantages, batch = binary_group(passed)
    region = ElasticTrustRegion()
    low, high = region.bounds(advantages, batch)
    assert float(advantages[0]) == pytest.approx(plus, abs=5e-4)
    assert float(advantages[-1]) == pytest.approx(minus, abs=5e-4)
    assert float(region.group_score(batch)[0]) == pytest.approx(score, abs=5e-5)
    for bound in (low, high):
        assert float(bound[0]) == pytest.approx(right, abs=5e-5)
        assert float(bound[-1]) == pytest.approx(wrong, abs=5e-5)
        assert not bound.requires_grad


@pytest.mark.parametrize("passed", range(1, 16))
def test_mean_strength_of_a_binary_group_is_twice_its_deviation(passed):
    advantages, _ = binary_group(passed)
    share = passed / 16
    assert float(advantages.abs().mean()) == pytest.approx(2 * math.sqrt(share * (1 - share)), abs=1e-12)
    if passed == 4:
        assert float(advantages.abs().mean()) == pytest.approx(0.8660, abs=5e-5)


@pytest.mark.parametrize("form", ["bounded", "additive", "proportional"])
@pytest.mark.parametrize("passed", range(1, 16))
def test_swapping_right_and_wrong_swaps_the_radii(form, passed):
    region = ElasticTrustRegion(form)
    first = region.bounds(*binary_group(passed))[1]
    second = region.bounds(*binary_group(16 - passed))[1]
    assert float(first[0]) == pytest.approx(float(second[-1]), abs=1e-12)
    assert float(first[-1]) == pytest.approx(float(second[0]), abs=1e-12)


def reference(region: ElasticTrustRegion, base: float, advantage: float, group: list[float]) -> float:
    group = [r for r in group if not math.isnan(r)]
    mean = sum(group) / len(group) if group else 0.0
    score = min(4 * sum((r - mean) ** 2 for r in group) / max(len(group), 1), 1.0)
    a = abs(advantage)
    if region.form == "proportional":
        radius = base * a
    elif region.form == "additive":
        radius = base + region.micro * math.tanh(a) + region.macro * score
    else:
        radius = base * (1 + region.micro * (2 * a / (1 + a) - 1)) * (1 + region.macro * (2 * score - 1))
    return min(max(radius, region.minimum), region.maximum)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.tuples(
            st.integers(0, 3), st.one_of(st.floats(0, 1), st.just(float("nan"))), st.floats(-6, 6, allow_nan=False)
        ),
        min_size=1,
        max_size=20,
    ),
    form=st.sampled_from(["bounded", "additive", "proportional"]),
)
def test_equals_a_plain_reference(rows, form):
    region = ElasticTrustRegion(form, low=0.15, high=0.3)
    groups = [g for g, _, _ in rows]
    batch = RewardBatch(torch.tensor([[r] for _, r, _ in rows], dtype=torch.float64), groups=groups)
    low, high = region.bounds(torch.tensor([a for _, _, a in rows], dtype=torch.float64), batch)
    for i, (group, _, advantage) in enumerate(rows):
        members = [r for g, r, _ in rows if g == group]
        assert float(low[i]) == pytest.approx(min(reference(region, 0.15, advantage, members), 0.99), abs=1e-9)
        assert float(high[i]) == pytest.approx(reference(region, 0.3, advantage, members), abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    form=st.sampled_from(["bounded", "additive", "proportional"]),
    first=st.floats(0, 50),
    more=st.floats(0, 50),
    spread=st.floats(0, 0.5),
    wider=st.floats(0, 0.5),
)
def test_monotone_in_strength_and_in_variance_and_blind_to_sign(form, first, more, spread, wider):
    region = ElasticTrustRegion(form)
    advantages = torch.tensor([first, first + more, -first, first, first], dtype=torch.float64)
    narrow, wide = sorted((spread, wider))
    rewards = torch.tensor([0.5, 0.5, 0.5, 0.5 - narrow, 0.5 + narrow, 0.5 - wide, 0.5 + wide], dtype=torch.float64)
    advantages = torch.cat([advantages, advantages[:1], advantages[:1]])
    batch = RewardBatch(rewards, groups=[0, 0, 0, 1, 1, 2, 2])
    for bound in region.bounds(advantages, batch):
        assert bound[1] >= bound[0] - 1e-12
        assert bound[2] == bound[0]
        assert bound[5] >= bound[3] - 1e-12
        assert (bound >= region.minimum).all()
        assert (bound <= region.maximum).all()


@pytest.mark.parametrize("form", ["bounded", "additive"])
def test_no_elasticity_is_the_static_interval_exactly(form):
    advantages, batch = binary_group(3)
    low, high = ElasticTrustRegion(form, low=0.2, high=0.28, micro=0, macro=0).bounds(advantages.float(), batch)
    assert (low == torch.tensor(0.2)).all()
    assert (high == torch.tensor(0.28)).all()


def test_lower_radius_stays_below_one():
    advantages, batch = binary_group(1)
    low, high = ElasticTrustRegion("proportional", low=5.0, high=5.0, maximum=4.0).bounds(advantages, batch)
    assert float(low.max()) == 0.99
    assert float(high.max()) == 4.0


def test_reward_range_weights_and_batch_maximum():
    rewards = torch.tensor([[0.0, 9.0], [4.0, 1.0], [1.0, 5.0], [1.0, 2.0]])
    batch = RewardBatch(rewards, ("score", "length"), groups=[0, 0, 1, 1])
    declared = ElasticTrustRegion(reward_range=(0, 4), weights={"score": 1.0}).group_score(batch)
    assert declared.tolist() == [1.0, 1.0, 0.0, 0.0]
    # Sums 9, 5 and 6, 3: variances 4 and 2.25.
    relative = ElasticTrustRegion(reward_range=None).group_score(batch)
    assert relative.tolist() == pytest.approx([1.0, 1.0, 0.5625, 0.5625])
    assert ElasticTrustRegion().group_score(batch).max() == 1.0
    with pytest.raises(MissingColumnError, match="'scor'; did you mean 'score'"):
        ElasticTrustRegion(weights={"scor": 1.0}).group_score(batch)


def test_missing_rewards_single_groups_and_empty_batches():
    region = ElasticTrustRegion()
    batch = RewardBatch(torch.tensor([1.0, float("nan"), 0.0, float("nan"), 0.7]), groups=["a", "a", "a", "b", "c"])
    assert region.group_score(batch).tolist() == [1.0, 1.0, 1.0, 0.0, 0.0]
    low, high = region.bounds(torch.zeros(5), batch)
    assert torch.isfinite(low + high).all()
    assert ElasticTrustRegion(reward_range=None).group_score(batch).tolist() == [1.0, 1.0, 1.0, 0.0, 0.0]
    for empty in (region, ElasticTrustRegion(reward_range=None)):
        low, high = empty.bounds(torch.zeros(0), RewardBatch(torch.zeros(0, 1)))
        assert low.shape == high.shape == (0,)


@pytest.mark.parametrize(
    "options",
    [
        {"micro": -0.1},
        {"macro": -0.1},
        {"micro": 1.1},
        {"micro": float("nan")},
        {"minimum": 0.5, "maximum": 0.4},
        {"minimum": 0.0},
        {"low": 0.9},
        {"high": 0.01},
        {"form": "proportional", "micro": 0.5},
        {"form": "proportional", "low": 0.0},
        {"reward_range": (1, 1)},
        {"reward_range": (0, float("inf"))},
    ],
)
def test_refuses_options(options):
    with pytest.raises(InvalidInputError):
        ElasticTrustRegion(**options)


def test_refuses_inputs():
    advantages, batch = binary_group(4)
    with pytest.raises(InvalidInputError, match="shape"):
        ElasticTrustRegion().bounds(advantages[:-1], batch)
    advantages[3] = float("nan")
    with pytest.raises(InvalidInputError, match="row 3"):
        ElasticTrustRegion().bounds(advantages, batch)
    with pytest.raises(UnknownNameError, match="did you mean 'bounded'"):
        ElasticTrustRegion(form="bound")
    with pytest.raises(ValueError, match="finite"):
        RewardBatch(torch.tensor([1.0, float("inf")]))
    for low, high in [(-0.1, 0.2), (1.1, 0.2), (0.2, -0.1), (float("nan"), 0.2)]:
        with pytest.raises(InvalidInputError):
            FixedClip(low, high)
