from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import ndcg_score

from polyreward.rewards.groupwise import GroupwiseReranker
from polyreward.studies.base import StudyConfig, rated
from polyreward.studies.grouprank import (
    MAP,
    OTHERS,
    PASSES,
    RATE,
    RATES,
    STUDY,
    TUNED,
    Arm,
    Policy,
    evaluate,
    gold_of,
    held_out,
    named,
    quality,
    run_seed,
    slide,
    train,
)


def test_quality_is_scikit_learns_ndcg_under_ties():
    pools = held_out(0, 10)
    scores = np.round(pools.signal)
    assert quality(scores, pools) == pytest.approx(ndcg_score(pools.relevant, scores, k=10))


def test_the_number_itself_is_as_good_as_the_similarity():
    pools = held_out(0, 300)
    assert quality(pools.signal, pools) == pytest.approx(quality(pools.similarity, pools))
    assert 0.62 < quality(pools.signal, pools) < 0.7


def test_gold_is_0_to_10_and_knows_relevance():
    pools = held_out(0, 50)
    gold = gold_of(pools)
    assert (gold.min(axis=1) == 0).all()
    assert (gold.max(axis=1) == 10).all()
    assert gold[pools.relevant].mean() > gold[~pools.relevant].mean() + 2


def test_features_of_a_group():
    policy = Policy(Arm(), torch.Generator().manual_seed(0))
    found = policy.features(torch.tensor([[1.0, 3.0]]))
    torch.testing.assert_close(found, torch.tensor([[[1.0, -1, -2, 1], [3.0, 1, 0, 1]]]))
    single = policy.features(torch.tensor([[5.0]]))
    torch.testing.assert_close(single, torch.tensor([[[5.0, 0, 0, 0]]]))
    alone = Policy(Arm(groupwise=False), torch.Generator().manual_seed(0))
    torch.testing.assert_close(alone.features(torch.tensor([[1.0, 3.0]])), torch.tensor([[[1.0], [3.0]]]))


def test_a_pointwise_policy_gives_the_same_in_every_group_and_pass():
    policy = train(TUNED["pointwise"], 0, 3)
    signal = held_out(0, 2).signal[0]
    alone = GroupwiseReranker(policy, 1)(None, signal)
    np.testing.assert_array_equal(GroupwiseReranker(policy, 10, 4)(None, signal), alone)
    assert set(alone.tolist()) <= set(map(float, range(11)))


def test_training_raises_the_quality_and_repeats():
    pools = held_out(0, 100)
    trained = [evaluate(train(TUNED["groupwise"], 0, steps), pools, 0) for steps in (0, 40, 40)]
    assert trained[1]["NDCG, 1 pass"] > trained[0]["NDCG, 1 pass"] + 0.1
    assert trained[1] == trained[2]
    assert [trained[1][f"calls, {named(count)}"] for count in PASSES] == [4, 8, 16]


def test_calls_of_the_sliding_window():
    assert slide(train(TUNED["groupwise"], 0, 1), held_out(0, 3))["rounds"] == 7


def test_all_arms_see_the_same_pools_and_the_map_differs():
    assert (held_out(0, 3).relevant == held_out(0, 3, (0.0, 0.0)).relevant).all()
    assert (held_out(0, 3).similarity == held_out(0, 3, (0.0, 0.0)).similarity).all()
    assert TUNED["pointwise"].map == TUNED["groupwise"].map == MAP
    assert TUNED["pointwise, no map"].map == (0.0, 0.0)


@pytest.mark.slow
def test_quick_run_is_finite_and_judged():
    figures = run_seed(0, StudyConfig(quick=True))
    assert all(np.isfinite(value) for arm in figures.values() for value in arm.values())
    assert STUDY.judge([figures]).verdict in ("supported", "not supported", "inconclusive")


def made_up(
    pointwise=0.53, groupwise=0.58, four=0.64, sizes=(0.5, 0.6), control=-0.04, histogram=(0.58, 2.0), none=(0.58, 2.9)
):
    def arm(value, passes=None, error=3.0):
        found = {"NDCG, 1 pass": value, "NDCG, 2 passes": value, "NDCG, 4 passes": value if passes is None else passes}
        found |= {"NDCG unrounded, 1 pass": value, "NDCG unrounded, 4 passes": value}
        return found | {"score error": error, "calls, 1 pass": 4.0}

    run = {}
    for rate in RATES:
        worse = 0.0 if rate == RATE else 0.1
        run[rated("pointwise", rate)] = arm(pointwise - worse)
        run[rated("groupwise", rate)] = arm(groupwise - worse, four - worse)
        for kind in ("no map", "milder map"):
            run[rated(f"pointwise, {kind}", rate)] = arm(0.64)
            run[rated(f"groupwise, {kind}", rate)] = arm(0.64 + control)
    run |= {name: arm(0.57) for name in OTHERS}
    run["groups of 5"], run["groups of 20"] = arm(sizes[0]), arm(sizes[1])
    run["histogram"], run["no alignment"] = arm(histogram[0], error=histogram[1]), arm(none[0], error=none[1])
    run["sliding window"] = {"NDCG, 1 pass": 0.6, "rounds": 7.0}
    run["sorted by the number"] = {"NDCG, 1 pass": 0.66}
    return run


@pytest.mark.parametrize(
    ("runs", "verdict", "failing"),
    [
        ([made_up(), made_up(groupwise=0.56)], "supported", None),
        ([made_up(groupwise=0.54)], "inconclusive", "at least 0.02"),
        ([made_up(groupwise=0.62, four=0.68), made_up(groupwise=0.52)], "inconclusive", "interval above 0"),
        ([made_up(four=0.61)], "inconclusive", "4 passes - 1 pass"),
        ([made_up(sizes=(0.5, 0.57))], "inconclusive", "group size"),
        ([made_up(control=0.02)], "inconclusive", "without the map"),
        ([made_up(histogram=(0.58, 2.6))], "inconclusive", "histogram"),
        ([made_up(histogram=(0.56, 2.0))], "inconclusive", "histogram"),
        ([made_up(groupwise=0.53)], "not supported", "at least 0.02"),
        ([made_up(four=0.58)], "not supported", "4 passes - 1 pass"),
    ],
)
def test_rule(runs, verdict, failing):
    judged = STUDY.judge(runs)
    assert judged.verdict == verdict
    assert [name for name, held in judged.checks.items() if not held] == [
        name for name in judged.checks if failing is not None and failing in name
    ]
    assert all(np.isfinite([judged.effect, *judged.interval]))


def test_arms_differ_from_the_main_one_in_one_thing():
    assert replace(TUNED["pointwise"], groupwise=True).size == TUNED["groupwise"].size
    assert {own.size for own in OTHERS.values()} == {5, 10, 20}
