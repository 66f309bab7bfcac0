import gzip
import json
from math import comb

import numpy as np
import pytest

from polyreward.studies.base import StudyConfig
from polyreward.studies.hybrid import OTHERS, RATES, STUDY, TUNED, Arm, normalisation, run_seed, start, train
from polyreward.studies.hybrid_texts import best_of_eight, choose, gsm8k


def test_all_arms_of_a_seed_see_the_same_questions():
    assert start(3) == start(3)
    assert train(Arm("rule"), 3, 0.0, steps=1)["accuracy"] == pytest.approx(start(3)["accuracy"])
    assert train(TUNED["hybrid"], 0, 1.2, steps=3) == train(TUNED["hybrid"], 0, 1.2, steps=3)


def test_on_verifiable_questions_hybrid_and_rule_are_one_reward():
    rule, hybrid = (train(TUNED[name], 1, 1.2, steps=10) for name in ("rule", "hybrid"))
    assert rule["accuracy"] == pytest.approx(hybrid["accuracy"])
    assert rule["quality"] == pytest.approx(start(1)["quality"])
    assert hybrid["quality"] > rule["quality"] + 0.05


def test_terms_do_what_they_are_for():
    plain, form, full = (
        train(TUNED[n], 0, 1.2, steps=30) for n in ("hybrid", "hybrid + format", "hybrid + format + length")
    )
    assert form["form"] > plain["form"] + 0.4
    assert full["length"] > form["length"]
    assert plain["share of accuracy"] == pytest.approx(1)
    assert sum(full[f"share of {name}"] for name in ("accuracy", "length", "format")) == pytest.approx(1)
    assert train(TUNED["reward model"], 0, 1.2, steps=30)["length"] < start(0)["length"]


def test_division_by_the_deviation_weighs_easy_and_hard_questions_up():
    figures = normalisation()
    counts = np.arange(1, 8)
    for label, p in (("easy", 0.95), ("medium", 0.5), ("hard", 0.05)):
        chance = np.array([comb(8, k) * p**k * (1 - p) ** (8 - k) for k in counts])
        deviation = np.sqrt(counts / 8 * (1 - counts / 8))
        assert figures[f"weight, {label}"] == pytest.approx((chance / deviation).sum() / chance.sum(), rel=1e-5)
        # the expected pull without division is p (1 - p) (G - 1) / G
        assert figures[f"pull, {label}, mean only"] == pytest.approx(p * (1 - p) / 0.25, rel=1e-5)
        assert figures[f"pull, {label}, scaled"] >= figures[f"pull, {label}, mean only"] - 1e-9
    assert figures["weight, easy"] == pytest.approx(figures["weight, hard"])
    assert figures["weight, easy"] > figures["weight, medium"] > 2


def test_best_of_eight():
    scores, worth = np.array([1.0, 2, 2, 0, 5, 0]), np.array([9.0, 1, 3, 0, 4, 0])
    assert choose(scores, worth, np.array([0, 0, 0, 1, 1, 1])).tolist() == [2, 4]
    figures = best_of_eight(0, 6)
    assert figures["best of 8, hybrid"]["word problems"] == figures["best of 8, rule"]["word problems"]
    assert figures["best of 8, hybrid"]["descriptions"] == figures["best of 8, surrogate"]["descriptions"]
    assert figures["best of 8, rule"]["descriptions"] == pytest.approx(figures["best of 8, random"]["descriptions"])
    assert figures["best of 8, rule"]["word problems"] >= figures["best of 8, random"]["word problems"]


def test_model_solutions(tmp_path):
    assert gsm8k(None, 0) == gsm8k(tmp_path, 0) == {}
    words = ("apples", "pears", "coins", "books", "shells", "cards")
    entries = []
    for number in range(30):
        entry = {
            "question": f"How many? {number}",
            "ground_truth": f"There are {words[number % 6]} {number}\nA: {number}",
        }
        for source, shift in (
            ("6b_finetuning", 1),
            ("6b_verification", 0),
            ("175b_finetuning", 2),
            ("175b_verification", 0),
        ):
            text = f"I count {words[number % 6]} {'again ' * shift}\nA: {number + shift}"
            entry[source] = {"is_correct": shift == 0, "solution": text}
        entries.append(entry)
    (tmp_path / "math").mkdir()
    with gzip.open(tmp_path / "math" / "gsm8k_model_solutions.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(entry) + "\n" for entry in entries)
    figures = gsm8k(tmp_path, 0)["GSM8K"]
    assert (figures["right"], figures["any right"], figures["rule agrees"]) == (0.5, 1, 1)
    assert figures["best of 4, rule"] == figures["best of 4, hybrid"] == figures["best of 4, shortest"] == 1
    assert (figures["words, right"], figures["words, wrong"]) == (5, 6.5)
    assert figures["wrong with a length penalty"] == 0


@pytest.mark.slow
def test_quick_run_is_finite_and_judged():
    figures = run_seed(0, StudyConfig(quick=True))
    assert all(np.isfinite(value) for arm in figures.values() for value in arm.values())
    judged = STUDY.judge([figures])
    assert judged.verdict in ("supported", "not supported", "inconclusive")
    assert "No GSM8K" in judged.summary


def _figures(model=0.4, hybrid=0.85, length=0.05, form=0.9, rule_quality=0.4, model_length=1.6):
    run = {"start": {"accuracy": 0.4, "quality": 0.4, "length": 2.2, "form": 0.27}}
    for name in (*TUNED, *OTHERS):
        values = {"accuracy": hybrid, "quality": 0.95, "length": 3.7, "form": 0.28}
        if name == "reward model":
            values = {"accuracy": model, "quality": 0.4, "length": model_length, "form": 0.27}
        if name == "rule":
            values["quality"] = rule_quality
        if "format" in name:
            values["form"] = form
        early = {f"{key}, step 40": value for key, value in values.items()}
        if name == "hybrid + format + length":
            early["accuracy, step 40"] += length
        shares = {f"share of {term}": 1 / 3 for term in ("accuracy", "length", "format")}
        for title in [f"{name}, rate {rate:g}" for rate in RATES] if name in TUNED else [name]:
            run[title] = values | early | shares
    return run | {"weights": normalisation(), "best of 8, hybrid": {"word problems": 1.0, "descriptions": 0.5}}


@pytest.mark.parametrize(
    ("runs", "verdict"),
    [
        ([_figures(), _figures(length=0.04)], "supported"),
        ([_figures(length=0.01)], "inconclusive"),
        ([_figures(form=0.5)], "inconclusive"),
        ([_figures(rule_quality=0.6)], "inconclusive"),
        ([_figures(model_length=2.5)], "inconclusive"),
        ([_figures(model=0.7)], "inconclusive"),
        ([_figures(model=0.8)], "not supported"),
        ([_figures(length=-0.02), _figures(length=-0.01)], "not supported"),
        ([_figures(length=-0.02), _figures(length=0.02)], "inconclusive"),
    ],
)
def test_rule(runs, verdict):
    assert STUDY.judge(runs).verdict == verdict
