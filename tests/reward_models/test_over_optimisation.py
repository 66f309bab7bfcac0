import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from polyreward.errors import InvalidInputError
from polyreward.reward_models.over_optimisation import (
    EnsembleSplit,
    hack_feature_shift,
    overoptimization_curve,
    underspecification_report,
)


def test_the_ensembles_of_a_grid():
    split = EnsembleSplit.grid(5, 5)
    fine, pre = split.finetune_ensembles(), split.pretrain_ensembles()
    assert [e.tolist() for e in fine] == [list(range(5 * p, 5 * p + 5)) for p in range(5)]
    assert len(pre) == 5
    for members in pre:
        assert sorted(split.pretrain_ids[members]) == sorted(split.finetune_ids[members]) == list(range(5))
        split.check_pretrain(members)
    assert sorted(np.concatenate(pre).tolist()) == list(range(25))
    with pytest.raises(InvalidInputError, match=r"these members have \[0, 1\]"):
        split.check_finetune([0, 5])
    with pytest.raises(InvalidInputError, match="pretraining 0 comes 2 times"):
        split.check_pretrain([0, 1, 5])
    split.check_finetune([0, 1, 4])


def test_partial_grids_and_wrong_ones():
    split = EnsembleSplit([7, 7, 9], [1, 2, 2])
    assert [e.tolist() for e in split.pretrain_ensembles()] == [[0, 2]]
    with pytest.raises(InvalidInputError, match="of one length"):
        EnsembleSplit([0, 1], [0])
    with pytest.raises(InvalidInputError, match="same pretraining and fine-tuning"):
        EnsembleSplit([0, 0], [1, 1])


def test_rank_correlations_by_kind_of_pair():
    rng = np.random.default_rng(0)
    inside, outside = rng.normal(size=(4, 30)), rng.normal(size=(4, 20)).round(1)
    split = EnsembleSplit.grid(2, 2)
    report = underspecification_report(inside, outside, split)
    for name, scores in (("rank_corr_id", inside), ("rank_corr_ood", outside)):
        rho = {(i, j): spearmanr(scores[i], scores[j]).statistic for i, j in itertools.combinations(range(4), 2)}
        assert report[name]["all"] == pytest.approx(np.mean(list(rho.values())))
        assert report[name]["same_pretrain"] == pytest.approx((rho[0, 1] + rho[2, 3]) / 2)
        others = [rho[pair] for pair in rho if pair not in ((0, 1), (2, 3))]
        assert report[name]["different_pretrain"] == pytest.approx(np.mean(others))
    assert underspecification_report(inside, np.exp(inside))["rank_corr_ood"] == pytest.approx(
        underspecification_report(inside, inside)["rank_corr_id"]
    )
    for wrong, message in (
        (inside[:3], "got 4 and 3"),
        (inside * 0, "member 0 gives all"),
        (inside + np.nan, "finite"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            underspecification_report(inside, wrong)
    with pytest.raises(InvalidInputError, match="the split has 25"):
        underspecification_report(inside, outside, EnsembleSplit.grid(5, 5))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 6))
def test_the_curve_is_the_mean_over_all_subsets(seed, n):
    rng = np.random.default_rng(seed)
    proxy, gold = rng.normal(size=(2, 6)), rng.normal(size=(2, 6))
    curve = overoptimization_curve(proxy, gold, [n])
    picks = [
        [max(subset, key=lambda i, p=p: proxy[p, i]) for subset in itertools.combinations(range(6), n)]
        for p in range(2)
    ]
    assert curve["gold"][0] == pytest.approx(np.mean([gold[p, i] for p in range(2) for i in picks[p]]))
    assert curve["proxy"][0] == pytest.approx(np.mean([proxy[p, i] for p in range(2) for i in picks[p]]))


def test_the_curve_of_the_oracle_rises_and_knows_its_divergence():
    gold = np.random.default_rng(0).normal(size=(20, 64))
    curve = overoptimization_curve(gold, gold, [1, 2, 8, 64])
    assert (np.diff(curve["gold"]) > 0).all()
    assert curve["gold"][-1] == pytest.approx(gold.max(axis=1).mean())
    assert curve["gold"][0] == pytest.approx(gold.mean())
    assert curve["kl"][[0, -1]] == pytest.approx([0, 3.174508], abs=1e-6)
    with pytest.raises(InvalidInputError):
        overoptimization_curve(gold, gold, [65])
    with pytest.raises(InvalidInputError, match="expected the same"):
        overoptimization_curve(gold, gold[:, :3], [1])


def test_shift_of_a_feature():
    features = np.array([[1.0, 5.0], [3.0, 2.0]])
    assert hack_feature_shift(features, [1, 0], [0.0, 2.0, 4.0]) == pytest.approx((4 - 2) / np.sqrt(8 / 3))
    both = np.stack([features, -features], axis=2)
    assert hack_feature_shift(both, [1, 0], both).tolist() == pytest.approx(
        [(4 - 2.75) / features.std(), -(4 - 2.75) / features.std()]
    )
    with pytest.raises(InvalidInputError, match="does not vary"):
        hack_feature_shift(features, [1, 0], [1.0, 1.0])
    with pytest.raises(InvalidInputError, match="features must be"):
        hack_feature_shift(features, [1], [1.0, 2.0])
