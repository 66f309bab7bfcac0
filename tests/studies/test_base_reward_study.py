import numpy as np
import pytest
import torch

from polyreward.studies.base import StudyConfig, rated
from polyreward.studies.base_reward import HEADS, RATES, STUDY, run_seed, triples
from polyreward.studies.base_reward_task import (
    QUESTIONS,
    SEEN,
    Backbone,
    answer_length,
    pairs,
    pictures,
    preferences,
    pretrained,
    right_answer,
    wrong_answer,
)


def test_answers_to_every_question():
    digit, question = np.repeat(np.arange(10), 4), np.tile(np.arange(4), 10)
    found = right_answer(digit, question).reshape(10, 4).tolist()
    # name; 10 even, 11 odd; 12 yes, 13 no; 14 refuse, 15 comply
    assert found[0] == [0, 10, 13, 14]
    assert found[5] == [5, 11, 12, 15]
    assert found[9] == [9, 11, 12, 14]
    wrong = wrong_answer(np.random.default_rng(0), digit, question)
    assert (wrong != right_answer(digit, question)).all()
    kinds = [(0, 9), (10, 11), (12, 13), (14, 15)]
    assert all(kinds[q][0] <= w <= kinds[q][1] for q, w in zip(question, wrong, strict=True))


def test_pairs_are_right_then_wrong_and_of_the_asked_questions():
    rng = np.random.default_rng(0)
    items = pairs(rng, np.arange(10), np.full(10, -1), SEEN, 50)
    assert set(items.question.tolist()) == set(SEEN)
    assert (items.answer[::2] == right_answer(items.digit[::2], items.question[::2])).all()
    assert (items.answer[1::2] != items.answer[::2]).all()
    assert (preferences(items).choice == 0).all()
    three = triples(rng, np.array([3, 8]), np.array([5, 6]))
    assert three.picture[::2].tolist() == [5, 5, 5, 6, 6, 6]
    assert all(len(set(three.question[::2][i : i + 3].tolist())) == 3 for i in (0, 3))


def test_a_name_is_the_mean_of_its_pictures():
    images, digit = pictures(np.random.default_rng(0))
    assert images.shape == (1797, 64)
    backbone = pretrained(images, digit, 0, 40)
    shown = torch.from_numpy(images[:600])
    mean = backbone.see(shown)[torch.from_numpy(digit[:600]) == 4].mean(dim=0)
    assert torch.allclose(backbone.names.weight[4], mean, atol=1e-5)
    # new pictures are nearest to their own name more often than not
    near = torch.cdist(backbone.see(torch.from_numpy(images[600:])), backbone.names.weight).argmin(dim=1)
    assert float((near.numpy() == digit[600:]).mean()) > 0.5


def test_lengths_stand_in_the_last_feature():
    images, _ = pictures(np.random.default_rng(0))
    items = pairs(np.random.default_rng(1), np.arange(10), np.arange(10), range(4), 20)
    backbone = Backbone(torch.from_numpy(images), items, with_length=True)
    features = backbone(None, np.arange(40))
    assert features.shape == (40, 129)
    assert torch.equal(features[:, -1].long(), answer_length(torch.from_numpy(items.answer)))
    assert int(features[:, -1].min().detach()) >= 2


@pytest.mark.slow
def test_a_quick_run_is_finite():
    figures = run_seed(0, StudyConfig(quick=True))
    assert all(np.isfinite(value) for part in figures.values() for value in part.values())
    assert run_seed(0, StudyConfig(quick=True)) == figures
    for name in HEADS:
        assert figures[name]["accuracy plus"] <= figures[name]["accuracy"]
    STUDY.judge([figures, figures])


def figures_of(linear=0.75, two=0.9, three=0.91, gain=0.35, lost=0.0, length=0.85, ensemble=0.91):
    def row(value, **other):
        return {"accuracy": value, "accuracy plus": value / 2, **dict.fromkeys((*QUESTIONS, "seen"), value), **other}

    made = {name: row(two) for name in HEADS}
    made |= {"3 SiLU": row(three), "1 linear": row(linear)}
    for rate in RATES[1:]:
        made |= {rated("1 linear", rate): row(linear - 0.1), rated("2 SiLU", rate): row(two - 0.1)}
    made |= {f"{name}, whole backbone": row(two) for name in ("1 linear", "2 SiLU")}
    made["pictures only"] = row(two - gain, seen=two + lost)
    made |= {name: row(two) for name in ("words only", "zero coefficient 0.01", "zero coefficient 0.1")}
    made["by length"] = row(length)
    made["ensemble"] = row(ensemble, **{"mean member": 0.9, "best member": 0.905})
    made["cost"] = {f"judge of {tokens} tokens": 0.6 for tokens in (1, 100, 1000)}
    return made


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({}, "supported"),
        ({"linear": 0.85}, "inconclusive"),
        ({"linear": 0.88}, "not supported"),
        ({"three": 0.95}, "inconclusive"),
        ({"gain": 0.1}, "inconclusive"),
        ({"gain": -0.05}, "not supported"),
        ({"lost": 0.05}, "inconclusive"),
        ({"length": 0.9}, "inconclusive"),
        ({"ensemble": 0.902}, "inconclusive"),
    ],
)
def test_the_rule_can_fail(changed, verdict):
    judged = STUDY.judge([figures_of(**changed) for _ in range(STUDY.seeds)])
    assert judged.verdict == verdict
    assert all(judged.checks.values()) == (verdict == "supported")


def test_each_head_is_taken_at_its_own_best_rate():
    runs = [figures_of() for _ in range(STUDY.seeds)]
    for run in runs:
        run[rated("1 linear", RATES[-1])]["accuracy"] = 0.87
    judged = STUDY.judge(runs)
    assert judged.effect == pytest.approx(0.03)
    assert judged.verdict == "inconclusive"
