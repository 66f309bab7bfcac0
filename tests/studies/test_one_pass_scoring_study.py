import numpy as np
import pytest

from polyreward.studies.base import StudyConfig, rated
from polyreward.studies.one_pass_scoring import (
    RATES,
    SIZES,
    STUDY,
    absolute,
    comparisons,
    consensus,
    evaluate,
    fit,
    run_seed,
)


def test_the_best_holds_the_key_most_often():
    prompts, responses, ranks = absolute(np.random.default_rng(0), 200)
    counts = (responses == prompts[:, -1, None, None]).sum(axis=2)
    assert all(len(set(row)) == 4 for row in counts.tolist())
    # rank 1 has most, rank 4 fewest
    assert (np.take_along_axis(counts, np.argsort(ranks, axis=1), axis=1) == -np.sort(-counts, axis=1)).all()
    assert prompts.max() < 16
    assert responses.max() < 16


def test_exactly_two_agree_and_no_ranking_of_answers_helps():
    _, responses, ranks = consensus(np.random.default_rng(0), 4000)
    answers = responses[:, :, -1] - 16
    assert answers.min() >= 0
    assert answers.max() < 16
    for row, rank in zip(answers.tolist(), ranks.tolist(), strict=True):
        assert sorted(row.count(a) for a in row) == [1, 1, 2, 2]
        assert [1.0 if row.count(a) == 2 else 2.0 for a in row] == rank
    # the highest number of all answers: the agreeing pair in a third of the sets
    top = np.take_along_axis(ranks, answers.argmax(axis=1)[:, None], axis=1) == 1
    assert abs(top.mean() - 1 / 3) < 0.03
    assert ((ranks == 1).mean(axis=1) == 0.5).all()
    data = comparisons(*consensus(np.random.default_rng(0), 2))
    assert len(data.responses[0].split()) == 4
    assert data.sizes.tolist() == [4, 4]


def test_both_readers_start_alike_and_only_one_depends_on_the_order():
    data = comparisons(*consensus(np.random.default_rng(0), 24))
    found = {
        together: evaluate(fit(data, together, 1e-3, 0), data, np.random.default_rng(1)) for together in (True, False)
    }
    assert found[False]["winner survives another order"] == 1
    for figures in found.values():
        assert sum(figures[f"picks of place {i}"] for i in range(1, 5)) == pytest.approx(1)


@pytest.mark.slow
def test_a_quick_run_is_finite():
    figures = run_seed(0, StudyConfig(quick=True))
    assert all(np.isfinite(value) for part in figures.values() for value in part.values())
    again = run_seed(0, StudyConfig(quick=True))
    # times apart
    assert all(again[name] == part for name, part in figures.items() if not name.startswith("speed"))
    assert STUDY.judge([figures, again]).interval[0] <= STUDY.judge([figures, again]).effect
    # the loss begins near ln 4
    assert figures["absolute, together, rate 0.001"]["first loss"] == pytest.approx(np.log(4), abs=0.05)


def figures_of(multi=0.93, single=0.36, plain=0.98, plain_single=0.995, ratio=3.6, low=0.0):
    made = {}
    parts = {
        "consensus, together": multi, "consensus, one by one": single, "absolute, together": plain,
        "absolute, one by one": plain_single,
    }  # fmt: skip
    for name, value in parts.items():
        for number, rate in enumerate(RATES):
            made[rated(name, rate)] = {
                "accuracy": value - 0.1 * (number > 0),
                "winner survives another order": 0.5,
                **{f"picks of place {i}": 0.25 for i in range(1, 5)},
            }
    made[rated("consensus, together", RATES[0])]["accuracy"] -= low
    for p, length, n in SIZES:
        made[f"speed, prompt {p}, responses of {length}, {n} of them"] = {"ratio": ratio}
    return made


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({}, "supported"),
        ({"multi": 0.75}, "inconclusive"),
        ({"multi": 0.58}, "not supported"),
        ({"single": 0.55}, "inconclusive"),
        ({"plain": 0.94}, "not supported"),
        ({"plain": 0.94, "plain_single": 0.95}, "inconclusive"),
        ({"ratio": 2.9}, "inconclusive"),
    ],
)
def test_the_rule_can_fail(changed, verdict):
    judged = STUDY.judge([figures_of(**changed) for _ in range(STUDY.seeds)])
    assert judged.verdict == verdict
    assert all(judged.checks.values()) == (verdict == "supported")


def test_one_weak_seed_is_enough_to_fail():
    runs = [figures_of(low=0.2 if seed == 3 else 0.0) for seed in range(STUDY.seeds)]
    assert STUDY.judge(runs).verdict == "inconclusive"
