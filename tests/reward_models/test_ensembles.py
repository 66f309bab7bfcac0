import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted_preferences import planted

from polyreward.errors import InvalidInputError, UnknownNameError
from polyreward.reward_models.encoders import HashingEncoder
from polyreward.reward_models.ensembles import AGGREGATES, MemberFailureWarning, RewardEnsemble, aggregate_rewards
from polyreward.reward_models.heads import LinearHead, TwoLayerHead
from polyreward.reward_models.model import PreferenceModel

FIVE = torch.tensor([[1.0], [2.0], [4.0], [0.5], [2.5]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("how", "options", "expected"),
    [
        ("mean", {}, 2.0),
        ("median", {}, 2.0),
        ("min", {}, 0.5),
        ("mean_minus_std", {}, 0.775255),
        ("mean_minus_std", {"ddof": 1}, 0.630694),
        ("mean_minus_std", {"std_coef": 0.0}, 2.0),
    ],
)
def test_aggregates_of_the_worked_example(how, options, expected):
    assert float(aggregate_rewards(FIVE, how, **options)) == pytest.approx(expected, abs=1e-6)
    from_numpy = aggregate_rewards(FIVE.numpy(), how, **options)
    assert isinstance(from_numpy, np.ndarray)
    assert from_numpy[0] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("how", AGGREGATES)
@pytest.mark.parametrize("ddof", [0, 1])
def test_one_member_or_equal_members_are_that_member(how, ddof):
    scores = torch.tensor([[0.1, -3.0, 7.7]])
    assert torch.equal(aggregate_rewards(scores, how, ddof=ddof), scores[0])
    assert aggregate_rewards(scores.repeat(3, 1), how).tolist() == pytest.approx(scores[0].tolist())


def test_a_prompt_constant_of_one_member_changes_the_pick_of_min_and_not_of_mean():
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 0.0])
    before, after = torch.stack([a, b]), torch.stack([a, b + 3])
    assert int(aggregate_rewards(before, "min").argmax()) == 0
    assert aggregate_rewards(after, "min").tolist() == [1.0, 2.0]
    assert int(aggregate_rewards(before, "mean").argmax()) == int(aggregate_rewards(after, "mean").argmax())


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 1000))
def test_aggregates_equal_numpy_of_the_members_that_take_part(members, samples, seed):
    rng = np.random.default_rng(seed)
    scores, mask = rng.normal(size=(members, samples)), rng.random((members, samples)) < 0.7
    mask[rng.integers(members)] = True
    for how in AGGREGATES:
        found = aggregate_rewards(scores, how, mask, std_coef=0.5)
        for j in range(samples):
            own = scores[mask[:, j], j]
            slow = {
                "mean": own.mean(),
                "median": np.median(own),
                "min": own.min(),
                "mean_minus_std": own.mean() - 0.5 * own.std(),
            }
            assert found[j] == pytest.approx(slow[how])
            assert slow["min"] <= min(slow["median"], slow["mean"]) + 1e-12


@settings(max_examples=30, deadline=None)
@given(st.floats(0.1, 10), st.floats(-5, 5), st.sampled_from(AGGREGATES))
def test_positive_affine_maps_commute(scale, shift, how):
    assert float(aggregate_rewards(scale * FIVE + shift, how)) == pytest.approx(
        scale * float(aggregate_rewards(FIVE, how)) + shift
    )


def test_scores_that_are_not_finite_take_no_part():
    scores = torch.tensor([[1.0, 2.0], [float("nan"), 4.0], [3.0, float("inf")]])
    with pytest.warns(MemberFailureWarning, match=r"members \[1, 2\]"):
        assert aggregate_rewards(scores, "mean").tolist() == [2.0, 3.0]
    with pytest.warns(MemberFailureWarning), pytest.raises(InvalidInputError, match="sample 1"):
        aggregate_rewards(scores, "mean", mask=torch.tensor([[True, False], [True, False], [True, True]]))


def test_wrong_calls():
    with pytest.raises(InvalidInputError, match="with a member"):
        aggregate_rewards(torch.zeros(0, 3))
    with pytest.raises(InvalidInputError, match="at least one member"):
        RewardEnsemble([])
    with pytest.raises(UnknownNameError, match="did you mean 'median'"):
        RewardEnsemble([len], "medium")
    with pytest.raises(InvalidInputError, match="mask has shape"):
        aggregate_rewards(FIVE, mask=torch.ones(3, dtype=torch.bool))
    with pytest.raises(InvalidInputError, match=r"member 0 returned shape \(1,\)"):
        RewardEnsemble([lambda p, c: torch.zeros(1)])(["p"] * 2, ["a", "b"])


def test_gradient_at_equal_members_is_finite():
    scores = torch.ones(3, 1, requires_grad=True)
    aggregate_rewards(scores, "mean_minus_std").sum().backward()
    assert torch.equal(scores.grad, torch.full((3, 1), 1 / 3))


def test_functions_are_members():
    ensemble = RewardEnsemble([lambda p, c: torch.tensor([1.0, 2.0]), lambda p, c: [3.0, 0.0]], "mean_minus_std")
    assert ensemble.member_scores(["p"] * 2, ["a", "b"]).tolist() == [[1.0, 2.0], [3.0, 0.0]]
    assert ensemble(["p"] * 2, ["a", "b"]).tolist() == [1.0, 0.0]
    assert ensemble.disagreement(["p"] * 2, ["a", "b"]).tolist() == [1.0, 1.0]
    ensemble.standardize(["p"] * 2, ["a", "b"])
    assert ensemble.member_scores(["p"] * 2, ["a", "b"]).tolist() == [[-1.0, 1.0], [1.0, -1.0]]
    with pytest.raises(InvalidInputError, match="member 0 scores all samples the same"):
        RewardEnsemble([lambda p, c: torch.ones(2)]).standardize(["p"] * 2, ["a", "b"])


def test_members_differ_by_seed_and_survive_saving(tmp_path):
    data, encoder, _ = planted(pairs=120)
    ensemble = RewardEnsemble.of(PreferenceModel(encoder, TwoLayerHead), 3, aggregate="median")
    ensemble.fit(data, epochs=3, learning_rate=1e-2)
    rows = np.arange(20)
    scores = ensemble.member_scores(rows, rows)
    assert scores.shape == (3, 20)
    assert not torch.allclose(scores[0], scores[1])
    again = RewardEnsemble.of(PreferenceModel(encoder, TwoLayerHead), 3).fit(data, epochs=3, learning_rate=1e-2)
    assert torch.equal(again.member_scores(rows, rows), scores)
    ensemble.standardize(rows, rows)
    ensemble.save_pretrained(tmp_path)
    back = RewardEnsemble.from_pretrained(tmp_path, encoder=encoder)
    assert torch.equal(back.score(rows, rows), ensemble.score(rows, rows))
    assert back.as_reward("herd")(rows, rows) == pytest.approx(ensemble.score(rows, rows).tolist())
    with pytest.raises(InvalidInputError, match="single reward model"):
        RewardEnsemble.from_pretrained(tmp_path / "member-00")


def test_members_with_errors_of_their_own_average_out():
    rng = np.random.default_rng(0)
    own, shared = rng.normal(size=(5, 40_000)), rng.normal(size=40_000)
    assert aggregate_rewards(own, "mean").var() == pytest.approx(1 / 5, rel=0.03)
    assert aggregate_rewards(0.6 * own + 0.8 * shared, "mean").var() == pytest.approx(0.64 + 0.36 / 5, rel=0.03)


def test_an_ensemble_of_text_models():
    from polyreward.preferences import PreferenceData

    data = PreferenceData.pairs([f"p{i}" for i in range(20)], ["good answer"] * 20, ["bad answer"] * 20)
    ensemble = RewardEnsemble.of(PreferenceModel(HashingEncoder(64), LinearHead), 2).fit(data, learning_rate=0.05)
    good, bad = ensemble.score(["p", "p"], ["good", "bad"]).tolist()
    assert good > bad
