import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyreward.data.pair_columns import identical_pairs
from polyreward.data.preference_strength import (
    CleanedPairs,
    PreferenceCleaner,
    SingleVoterWarning,
    StrengthBinner,
    flip_pairs,
    flips_by_group,
    preference_strength,
    strength_of_differences,
)
from polyreward.errors import InvalidInputError, MissingColumnError, UnknownNameError
from polyreward.preferences import TIE, UNLABELLED, IdenticalResponsesWarning, PreferenceData

FOUR = [0.5, 1.5, -0.5, 0.5]


def voters(differences):
    """Functions that score a response of 1 by the voter's difference, and one of 0 by 0."""
    return [lambda x, d=d: d * x for d in differences]


def test_the_worked_example():
    one, none = np.ones(1), np.zeros(1)
    found = preference_strength(voters(FOUR), one, none)
    assert found["mean"][0] == pytest.approx(0.5)
    assert found["std"][0] == pytest.approx(0.707107, abs=1e-6)
    assert found["raw"].tolist() == [[0.5], [1.5], [-0.5], [0.5]]
    flipped = preference_strength(voters(FOUR), none, one)
    assert flipped["mean"][0] == pytest.approx(-0.5)
    assert flipped["std"][0] == pytest.approx(0.707107, abs=1e-6)


def test_tensors_stay_tensors_of_their_dtype():
    one, none = torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    found = preference_strength(voters(FOUR), one, none)
    assert all(isinstance(value, torch.Tensor) and value.dtype == torch.float64 for value in found.values())
    assert found["raw"].shape == (4, 3)
    half = preference_strength(voters(FOUR), one.half(), none.half())
    assert half["mean"].dtype == torch.float32
    assert (
        preference_strength(voters(FOUR), np.ones(2, np.float32), np.zeros(2, np.float32))["mean"].dtype == np.float32
    )
    regimes = StrengthBinner()(found)
    assert isinstance(regimes, torch.Tensor)
    cleaned = PreferenceCleaner()(one, none, found)
    assert all(isinstance(value, torch.Tensor) for value in cleaned)
    assert cleaned.margin.dtype == cleaned.target.dtype == torch.float32
    assert cleaned.flipped.dtype == torch.bool


def test_voters_that_read_prompts_and_reward_models():
    class Model:
        def score(self, prompts, completions):
            return [len(p) * len(c) for p, c in zip(prompts, completions, strict=True)]

    found = preference_strength([Model(), Model().score], ["a", "bb"], ["", "b"], prompts=["pp", "p"])
    assert found["mean"].tolist() == [2.0, 1.0]
    assert found["std"].tolist() == [0.0, 0.0]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(1, 7), st.integers(0, 10_000))
def test_strength_equals_plain_python(members, pairs, seed):
    raw = np.random.default_rng(seed).normal(size=(members, pairs))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SingleVoterWarning)
        found = strength_of_differences(raw)
        other = strength_of_differences(-raw)
    for i in range(pairs):
        own = [float(raw[m, i]) for m in range(members)]
        mean = sum(own) / members
        assert found["mean"][i] == pytest.approx(mean)
        assert found["std"][i] == pytest.approx(math.sqrt(sum((d - mean) ** 2 for d in own) / members), abs=1e-9)
    assert np.allclose(other["mean"], -found["mean"])
    assert np.allclose(other["std"], found["std"])


def test_voters_of_other_scale_are_divided_by_their_deviation():
    raw = np.array([[1.0, -1.0, 3.0, 1.0], [100.0, -100.0, 300.0, 100.0]])
    scaled = strength_of_differences(raw, "std")
    assert np.allclose(scaled["raw"][0], scaled["raw"][1])
    assert np.allclose(scaled["raw"].std(axis=1), 1)
    assert np.allclose(scaled["std"], 0)
    assert strength_of_differences(torch.tensor(raw), "std")["raw"][0].tolist() == pytest.approx(
        scaled["raw"][0].tolist()
    )
    with pytest.raises(InvalidInputError, match="voter 1 sees the same difference"):
        strength_of_differences(np.array([[1.0, 2.0], [3.0, 3.0]]), "std")
    with pytest.raises(InvalidInputError, match="voter 1 sees the same difference"):
        strength_of_differences(torch.tensor([[1.0, 2.0], [3.0, 3.0]]), "std")


def test_one_voter_and_no_pairs():
    with pytest.warns(SingleVoterWarning):
        found = strength_of_differences(np.array([[1.0, 2.0]]))
    assert found["std"].tolist() == [0.0, 0.0]
    empty = preference_strength(voters([1.0, 2.0]), np.zeros(0), np.zeros(0), scale="std")
    assert [value.shape for value in empty.values()] == [(0,), (0,), (2, 0)]
    assert StrengthBinner()(empty).shape == (0,)
    assert PreferenceCleaner()(np.zeros(0), np.zeros(0), empty).margin.shape == (0,)


def test_wrong_votes():
    one, none = np.ones(2), np.zeros(2)
    with pytest.raises(InvalidInputError, match="at least one voter"):
        preference_strength([], one, none)
    with pytest.raises(InvalidInputError, match="2 chosen and 1 rejected"):
        preference_strength(voters(FOUR), one, none[:1])
    with pytest.raises(InvalidInputError, match="for 1 prompts"):
        preference_strength(voters(FOUR), one, none, prompts=["p"])
    with pytest.raises(InvalidInputError, match=r"voter 1 gave scores of shape \(2, 1\)"):
        preference_strength([*voters([1.0]), lambda x: x[:, None]], one, none)
    with pytest.raises(ValueError, match="voter 1 for pair 0 is NaN"):
        preference_strength(voters([1.0, math.nan]), one, none)
    with pytest.raises(InvalidInputError, match="voter 0 for pair 1 is NaN or infinite"):
        strength_of_differences(torch.tensor([[1.0, math.inf]]))
    with pytest.raises(InvalidInputError, match=r"got \(3,\)"):
        strength_of_differences(np.zeros(3))
    with pytest.raises(InvalidInputError, match="must be numbers"):
        strength_of_differences(np.array([["a"]]))
    with pytest.raises(UnknownNameError, match="did you mean 'std'"):
        strength_of_differences(np.zeros((2, 2)), "sd")


def test_regimes_by_rank():
    mean = np.array([0.3, -2.0, 5.0, 0.1, 1.0, 2.0, 3.0, 0.2, 4.0, 6.0])
    assert StrengthBinner()(mean).tolist() == [0, -1, 1, 0, 1, 1, 1, 0, 1, 1]
    assert StrengthBinner((0.2, 0.4))({"mean": mean}).tolist() == [0, -1, 1, -1, 1, 1, 1, 0, 1, 1]
    assert StrengthBinner((0.0, 0.0))(mean).tolist() == [1] * 10
    assert StrengthBinner((1.0, 1.0))(mean).tolist() == [-1] * 10
    assert StrengthBinner((0.1, 0.4))(np.arange(30)).tolist() == [-1] * 3 + [0] * 9 + [1] * 18


def test_pairs_of_equal_strength_are_in_one_regime():
    assert len(set(StrengthBinner()(np.zeros(7)).tolist())) == 1
    assert StrengthBinner((0.3, 0.6))(np.array([1.0, 1.0, 1.0, 2.0, 3.0])).tolist() == [0, 0, 0, 1, 1]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(0, 1000))
def test_regimes_follow_the_pair_and_ignore_scale(pairs, seed):
    rng = np.random.default_rng(seed)
    mean, order = rng.normal(size=pairs), rng.permutation(pairs)
    regimes = StrengthBinner()(mean)
    assert StrengthBinner()(mean[order]).tolist() == regimes[order].tolist()
    assert StrengthBinner()(3 * mean + 1).tolist() == regimes.tolist()
    assert (np.diff(regimes[mean.argsort()]) >= 0).all()


@pytest.mark.parametrize("quantiles", [(0.4, 0.1), (-0.1, 0.4), (0.1, 1.1), (0.1,), (math.nan, 0.4)])
def test_wrong_quantiles(quantiles):
    with pytest.raises(InvalidInputError, match="ascending shares"):
        StrengthBinner(quantiles)


MEAN = np.array([2.0, -1.0, 0.5, -0.25])


def test_cleaning_by_hand():
    chosen, rejected = np.arange(8.0).reshape(4, 2), np.arange(10.0, 18.0).reshape(4, 2)
    found = PreferenceCleaner(flip_fraction=0.25, soft="sigmoid")(chosen, rejected, MEAN)
    assert isinstance(found, CleanedPairs)
    assert found.flipped.tolist() == [False, True, False, False]
    assert found.chosen[1].tolist() == [12.0, 13.0]
    assert found.rejected[1].tolist() == [2.0, 3.0]
    assert found.chosen[[0, 2, 3]].tolist() == chosen[[0, 2, 3]].tolist()
    assert found.margin.tolist() == [2.0, 1.0, 0.5, -0.25]
    sigma = [1 / (1 + math.exp(-x)) for x in (2.0, 1.0, 0.5, -0.25)]
    assert found.target.tolist() == pytest.approx(sigma)
    below = PreferenceCleaner(flip_below=0.0)(chosen, rejected, MEAN)
    assert below.flipped.tolist() == [False, True, False, True]
    assert below.margin.tolist() == [2.0, 1.0, 0.5, 0.25]
    assert below.target.tolist() == [1.0] * 4
    smooth = PreferenceCleaner(flip_fraction=0.0, soft="smooth", margin=False)(chosen, rejected, MEAN)
    assert smooth.target.tolist() == pytest.approx([0.9] * 4)
    assert smooth.margin.tolist() == [0.0] * 4
    assert not smooth.flipped.any()


def test_every_kind_of_responses_is_flipped_alike():
    mask = np.array([True, False])
    arrays = np.array([[1, 2], [3, 4]]), np.array([[5, 6], [7, 8]])
    expected = [[5, 6], [3, 4]], [[1, 2], [7, 8]]
    for kind in (np.asarray, torch.as_tensor, list):
        found = flip_pairs(*(kind(array) for array in arrays), mask)
        assert type(found[0]) is type(kind(arrays[0]))
        for side, right in zip(found, expected, strict=True):
            assert np.array_equal(np.asarray(side), right)
    assert flip_pairs(["a", "b"], ["c", "d"], torch.from_numpy(mask)) == (["c", "b"], ["a", "d"])


def test_what_was_given_stays_as_it_was():
    chosen, rejected, mean = np.arange(4.0), np.arange(10.0, 14.0), MEAN.copy()
    PreferenceCleaner(flip_fraction=1.0)(chosen, rejected, mean)
    assert chosen.tolist() == [0.0, 1.0, 2.0, 3.0]
    assert mean.tolist() == MEAN.tolist()


def test_a_blind_flip_of_a_right_label_still_asks_for_the_strength():
    found = PreferenceCleaner(flip_fraction=1.0, soft="sigmoid")(["a"], ["b"], [3.0])
    assert (found.chosen, found.rejected) == (["b"], ["a"])
    assert found.margin.tolist() == [3.0]
    assert found.target.tolist() == pytest.approx([1 / (1 + math.exp(-3))])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 30), st.floats(0, 1), st.integers(0, 1000))
def test_the_number_flipped_and_twice_is_the_identity(pairs, share, seed):
    rng = np.random.default_rng(seed)
    chosen, rejected, mean = rng.normal(size=(pairs, 3)), rng.normal(size=(pairs, 3)), rng.normal(size=pairs)
    found = PreferenceCleaner(flip_fraction=share, soft="sigmoid")(chosen, rejected, mean)
    assert abs(int(found.flipped.sum()) - share * pairs) <= 0.5 + 1e-6
    if found.flipped.any() and not found.flipped.all():
        assert mean[found.flipped].max() <= mean[~found.flipped].min()
    assert ((found.target >= 0) & (found.target <= 1)).all()
    back = flip_pairs(found.chosen, found.rejected, found.flipped)
    assert np.array_equal(back[0], chosen)
    assert np.array_equal(back[1], rejected)


def test_the_share_and_the_first_regime_are_the_same_pairs():
    mean = np.random.default_rng(0).normal(size=37)
    for share in (0.0, 0.1, 0.29, 0.5, 1.0):
        flipped = PreferenceCleaner(flip_fraction=share).labels(mean)[2]
        assert flipped.tolist() == (StrengthBinner((share, 1.0))(mean) == -1).tolist()


def test_equal_strengths_are_flipped_first_come_or_by_the_generator():
    mean = np.zeros(10)
    first = PreferenceCleaner(flip_fraction=0.3).labels(mean)[2]
    assert first.tolist() == [True] * 3 + [False] * 7
    drawn = [PreferenceCleaner(flip_fraction=0.3).labels(mean, np.random.default_rng(s))[2] for s in (1, 1, 2)]
    assert drawn[0].tolist() == drawn[1].tolist() != drawn[2].tolist()
    assert all(d.sum() == 3 for d in drawn)


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        (["a", "b", "c"], ["x", "b", "y"]),
        (np.array([1, 2, 3]), np.array([4, 2, 5])),
        (torch.tensor([[1.0, 0.0], [2.0, 1.0], [3.0, 0.0]]), torch.tensor([[1.0, 1.0], [2.0, 1.0], [0.0, 0.0]])),
        ([np.array([1, 2]), np.array([3]), np.array([4])], [np.array([1]), np.array([3]), np.array([5])]),
        (list(torch.tensor([[1], [3], [4]])), list(torch.tensor([[9], [3], [5]]))),
    ],
)
def test_pairs_of_the_same_response_are_dropped_with_a_count(chosen, rejected):
    assert identical_pairs(chosen, rejected).tolist() == [False, True, False]
    with pytest.warns(IdenticalResponsesWarning, match="dropped 1 of 3"):
        found = PreferenceCleaner(flip_below=0.0)(chosen, rejected, [1.0, -9.0, -2.0])
    assert len(found.chosen) == len(found.rejected) == 2
    assert found.flipped.tolist() == [False, True]
    assert found.margin.tolist() == [1.0, 2.0]


def test_wrong_cleaners():
    for wrong in ({"flip_fraction": 1.5}, {"flip_fraction": -0.1}, {"flip_fraction": math.nan}):
        with pytest.raises(ValueError, match=r"flip_fraction must be in \[0, 1\]"):
            PreferenceCleaner(**wrong)
    with pytest.raises(InvalidInputError, match="not both"):
        PreferenceCleaner(flip_fraction=0.1, flip_below=0.0)
    with pytest.raises(InvalidInputError, match="flip_below must be a number"):
        PreferenceCleaner(flip_below=math.nan)
    with pytest.raises(UnknownNameError, match="did you mean 'smooth'"):
        PreferenceCleaner(soft="smoth")
    with pytest.raises(InvalidInputError, match="alpha"):
        PreferenceCleaner(alpha=0.6)
    assert PreferenceCleaner().flip_fraction == 0.1
    assert PreferenceCleaner(flip_below=0.0).flip_fraction is None
    with pytest.raises(InvalidInputError, match="1 chosen and 1 rejected responses for 2 strengths"):
        PreferenceCleaner()(["a"], ["b"], [1.0, 2.0])
    with pytest.raises(InvalidInputError, match="strength of pair 1 is NaN"):
        PreferenceCleaner()(["a", "b"], ["c", "d"], [1.0, math.nan])
    with pytest.raises(InvalidInputError, match=r"shape \(pairs,\), got \(2, 1\)"):
        PreferenceCleaner()(["a", "b"], ["c", "d"], [[1.0], [2.0]])
    with pytest.raises(InvalidInputError, match=r"chosen has shape \(2, 1\), rejected \(2, 2\)"):
        PreferenceCleaner()(np.zeros((2, 1)), np.ones((2, 2)), [1.0, 2.0])
    with pytest.raises(InvalidInputError, match="flipped has shape"):
        flip_pairs(["a"], ["b"], [True, False])


def record(choice=(0, 1, 0, 1), **fields):
    return PreferenceData(
        ["p", "q", "r", "s"], ["a0", "a1", "b0", "b1", "c0", "c1", "d0", "d1"], choice=np.array(choice), **fields
    )


def test_a_record_carries_choice_target_and_margin():
    found = PreferenceCleaner(flip_below=0.0, soft="sigmoid").clean(record(), MEAN)
    assert found.choice.tolist() == [0, 0, 0, 0]
    assert found.margin.tolist() == [2.0, 1.0, 0.5, 0.25]
    assert found.target.tolist() == pytest.approx([1 / (1 + math.exp(-x)) for x in (2.0, 1.0, 0.5, 0.25)])
    assert found.columns["flipped"].tolist() == [False, True, False, True]
    assert found.columns["strength"].tolist() == MEAN.tolist()
    assert found.prompts == record().prompts


def test_a_negative_margin_becomes_the_other_choice_with_the_same_loss():
    from polyreward.reward_models.comparisons import ComparisonTable
    from polyreward.reward_models.heads import Scores
    from polyreward.reward_models.likelihoods import BradleyTerry, bradley_terry_loss

    data, scores = record(), torch.randn(8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for soft in ("none", "smooth", "sigmoid"):
        cleaner = PreferenceCleaner(flip_fraction=0.25, soft=soft)
        found = cleaner.clean(data, MEAN)
        assert found.choice.tolist() == [0, 0, 0, 0]  # row 1 by flipping, row 3 for its margin of -0.25
        assert found.columns["flipped"].tolist() == [False, True, False, False]
        loss, _ = BradleyTerry().loss(Scores(scores), ComparisonTable(found).batch(np.arange(4)))
        target, margin, flipped = cleaner.labels(MEAN)
        pairs = scores.view(4, 2)
        second = torch.tensor([False, True, False, True]) ^ torch.from_numpy(flipped)
        difference = torch.where(second, pairs[:, 1] - pairs[:, 0], pairs[:, 0] - pairs[:, 1])
        plain = bradley_terry_loss(difference, torch.from_numpy(target).double(), torch.from_numpy(margin).double())
        assert float(loss) == pytest.approx(float(plain), abs=1e-6)


def test_records_with_ties_ranks_ratings_and_margins_of_their_own():
    mixed = record((0, TIE, UNLABELLED, 1), margin=np.array([3.0, 1.0, np.nan, 2.0]))
    found = PreferenceCleaner(flip_below=0.0, margin=False).clean(mixed, [1.0, np.nan, np.nan, -1.0])
    assert found.choice.tolist() == [0, TIE, UNLABELLED, 0]
    assert found.columns["flipped"].tolist() == [False, False, False, True]
    assert found.margin.tolist()[:2] == [3.0, 1.0]
    assert found.margin[3] == 0  # a margin of the wrong label
    assert np.isnan(found.target[1:3]).all()
    ranked = PreferenceData(["p", "q"], ["a", "b", "c", "d"], ranks=np.array([1.0, 2.0, 2.0, 1.0]))
    ranked_found = PreferenceCleaner(flip_below=0.0).clean(ranked, [-1.0, 1.0])
    assert ranked_found.ranks is None
    assert ranked_found.choice.tolist() == [1, 1]
    rated = PreferenceData(["p"], ["a", "b"], ratings=np.array([4.0, 2.0]))
    assert PreferenceCleaner(flip_below=0.0).clean(rated, [-1.0]).order()[0].tolist() == [2.0, 1.0]


def test_a_record_with_the_same_response_twice():
    data = PreferenceData.pairs(["p", "q", "r"], ["a", "b", "c"], ["x", "b", "y"])
    with pytest.warns(IdenticalResponsesWarning, match="dropped 1 of 3"):
        found = PreferenceCleaner(flip_fraction=0.5).clean(data, [1.0, -9.0, -2.0])
    assert found.columns["flipped"].tolist() == [False, True]
    assert found.columns["strength"].tolist() == [1.0, -2.0]


def test_wrong_records():
    lists = PreferenceData(["p"], ["a", "b", "c"], np.array([0, 3]), choice=np.array([0]), source="file.jsonl")
    with pytest.raises(InvalidInputError, match=r"file.jsonl, row 1: 3 responses"):
        PreferenceCleaner().clean(lists, [1.0])
    with pytest.raises(InvalidInputError, match="4 comparisons, got 2 strengths"):
        PreferenceCleaner().clean(record(), [1.0, 2.0])
    with pytest.raises(InvalidInputError, match=r"row 3: the strength is NaN"):
        PreferenceCleaner().clean(record(), [1.0, 2.0, np.nan, 1.0])


def test_flips_of_a_minority_show():
    data = record(annotators=["many", "many", "few", None])
    found = PreferenceCleaner(flip_below=0.0).clean(data, [2.0, 1.0, -1.0, -0.5])
    assert flips_by_group(found) == {"many": 0.0, "few": 1.0, None: 1.0}
    assert flips_by_group(found, "prompt") == {"p": 0.0, "q": 0.0, "r": 1.0, "s": 1.0}
    assert flips_by_group(found, "strength") == {2.0: 0.0, 1.0: 0.0, -1.0: 1.0, -0.5: 1.0}
    with pytest.raises(InvalidInputError, match=r"call PreferenceCleaner\.clean first"):
        flips_by_group(data)
    with pytest.raises(MissingColumnError, match="no annotators"):
        flips_by_group(PreferenceCleaner().clean(record(), MEAN))
