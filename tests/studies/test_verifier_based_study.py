import math

import numpy as np
import pytest
from planted import Figures

from polyreward.studies import model_solutions, verifier_based
from polyreward.studies.base import StudyConfig
from polyreward.studies.verifier_based import HORIZONS, STUDY, Setting, run_seed
from polyreward.tasks.planted_subsequence import HETEROGENEOUS, HOMOGENEOUS


def test_the_policy_of_a_perfect_verifier_is_the_binary_tilt():
    setting = Setting(HOMOGENEOUS, 64, 0)
    better = setting.improve(setting.base, setting.learn(setting.sample(500))["best map"])
    gold = better[0, :, np.arange(20), setting.task.gold]
    p = 0.2425 + 0.7575 / 20
    assert gold == pytest.approx(np.full(gold.shape, p + math.sqrt(0.5 * p * (1 - p))))


def test_style_mean_and_base_are_the_same_only_where_there_is_one_style():
    one, many = (Setting(styles, 128, 1) for styles in (HOMOGENEOUS, HETEROGENEOUS))
    assert one.value(one.base.mean(axis=0)) == pytest.approx(one.value(one.base))
    assert many.value(many.base.mean(axis=0)) == pytest.approx(113, abs=0.5)
    assert many.value(many.base) == pytest.approx(81.5, abs=0.5)


def test_figures_of_the_middle_horizon():
    figures = Setting(HETEROGENEOUS, 128, 2).figures(256)
    assert figures["VB"] == pytest.approx(124.6, abs=0.1)
    assert figures["VB, style kept"] == pytest.approx(119.3, abs=0.1)
    assert 98 < figures["VF"] < 110
    assert figures["VB, style kept, kappa 0"] == figures["base"]
    assert figures["gold share in the cloned data"] == pytest.approx(0.14, abs=0.02)
    assert figures["gold share of the style mean"] == pytest.approx(0.2804, abs=1e-4)
    assert figures["symbols seen"] == 1
    alike = Setting(HOMOGENEOUS, 128, 2).figures(256)
    assert alike["gold share in the cloned data"] == pytest.approx(0.28, abs=0.02)


def test_no_solved_trace_leaves_both_learners_with_the_base():
    setting = Setting((0.0,), 2, 3)
    figures = setting.figures(1)
    assert figures["solved traces"] == 0
    assert figures["VF"] == figures["VB"] == figures["VB, style kept"] == figures["base"]


def test_best_of_n_by_the_true_checker():
    figures = Setting(HETEROGENEOUS, 128, 0).best_of_n()
    assert list(figures.values()) == pytest.approx([81.5, 108.6, 122.5, 126.1, 126.8], abs=0.2)
    figures = Setting(HOMOGENEOUS, 128, 0).best_of_n()
    assert list(figures.values()) == pytest.approx([113.1, 120.4, 124.0, 125.8, 126.6], abs=0.1)


def test_best_of_n_agrees_with_choosing_among_traces():
    setting = Setting(HETEROGENEOUS, 128, 4)
    prompts = np.repeat(setting.task.prompts, 4, axis=0)
    traces = setting.task.sample(setting.base, len(prompts), 128, setting.rng, prompts)
    assert traces.returns.reshape(-1, 4).max(axis=1).mean() == pytest.approx(setting.best_of_n()["4"], abs=2)


@pytest.mark.parametrize("kind", verifier_based.NOISE_KINDS)
def test_a_wrong_checker_teaches_wrong_tokens(kind):
    clean, half, wrong = (Setting(HETEROGENEOUS, 128, 5).noisy(256, noise, kind) for noise in (0.0, 0.6, 1.0))
    assert clean["symbols learned right"] == 1
    assert clean["symbols learned right"] >= half["symbols learned right"] >= wrong["symbols learned right"]
    if kind == "decoy":  # a random step still shows the gold tokens of the quick styles
        assert wrong["symbols learned right"] == 0
        assert wrong["style kept"] < wrong["base"]


@pytest.mark.slow
def test_quick_run_is_finite_and_judged():
    figures = run_seed(0, StudyConfig(quick=True))
    assert all(np.isfinite(value) for arm in figures.values() for value in arm.values())
    judged = STUDY.judge([figures])
    assert judged.verdict in ("supported", "not supported", "inconclusive")
    assert "No real model solutions" in judged.summary
    assert set(figures) == set(run_seed(1, StudyConfig(quick=True)))


def planted(short=10.0, long=40.0, flat=(10.0, 11.0), kept=(3.0, 30.0), few=20.0, many=20.0):
    rows = {}
    for base, (low, high) in {"heterogeneous": (short, long), "homogeneous": flat}.items():
        for horizon in HORIZONS:
            gap = low if horizon <= 64 else high
            style = (kept[0] if horizon <= 64 else kept[1]) if base == "heterogeneous" else gap
            arm = f"{base}, H = {horizon}"
            rows |= {(arm, "VF"): 100.0, (arm, "VB"): 100 + gap, (arm, "VB, style kept"): 100 + style}
    for size in verifier_based.SIZES:
        arm = f"heterogeneous, n = {size}"
        rows |= {(arm, "VF"): 100.0, (arm, "VB"): 100 + (many if size == 1024 else few)}
    return Figures(rows)


@pytest.mark.parametrize(
    ("runs", "verdict"),
    [
        ([planted()] * 3, "supported"),
        ([planted(long=29.0)] * 3, "inconclusive"),
        ([planted(long=70.0), planted(long=70.0), planted(long=5.0)], "inconclusive"),  # the interval reaches below 2
        ([planted(kept=(3.0, 8.0))], "inconclusive"),
        ([planted(flat=(10.0, 14.0))], "inconclusive"),
        ([planted(many=9.0)], "inconclusive"),
        ([planted(many=1.0)], "not supported"),
        ([planted(long=12.0)], "not supported"),
        ([planted(long=-5.0)], "not supported"),
    ],
)
def test_rule(runs, verdict):
    assert STUDY.judge(runs).verdict == verdict


def test_effect_is_the_ratio_of_the_mean_gaps():
    judged = STUDY.judge([planted(short=10, long=50), planted(short=30, long=70)])
    assert judged.effect == pytest.approx(120 / 40)
    assert judged.interval == pytest.approx((70 / 30, 5.0))


@pytest.mark.parametrize(
    ("term", "result", "right"),
    [
        ("16-3", "13", True),
        ("2*(3+4)/7", "2", True),
        ("60/100*5", "3.0", True),
        ("1,000+1", "2", False),
        ("-3+5", "2", True),
        ("10/3", "3.333", True),
        ("10/3", "3.4", False),
        ("1/0", "1", False),
        ("(1+2", "3", False),
        ("", "0", False),
        ("1 2", "3", False),
        ("9**9**9", "1", False),
        ("(" * 5000, "1", False),
        ("2-3-4", "-5", True),
        ("8/4/2", "1", True),
    ],
)
def test_calculations_are_checked_without_evaluating_text(term, result, right):
    assert model_solutions.checks(term, result) == right


def test_features_and_answers_of_any_text():
    text = "She has 3 + 4 = <<3+4=7>>7 eggs\nand sells 2\nA: 7"
    assert model_solutions.answer_of(text) == 7
    features = model_solutions.features_of("3 hens, 4 ducks and 9 cats", text)
    assert features == pytest.approx((math.log1p(13), 3, 1, 1, 0, math.log1p(7), 1, 1, 2 / 3))
    for odd in ("", "A:", "A: x", "A: 1e999", "<<=>>", "A: 1/0", "A: 7 A:"):
        features = model_solutions.features_of("", odd)
        assert len(features) == 9
        assert np.isfinite(features).all()


def test_real_solutions_are_left_out_where_there_are_none(tmp_path):
    assert model_solutions.select_solutions(None, 0) == {}
    assert model_solutions.select_solutions(tmp_path, 0) == {}


@pytest.mark.slow
def test_selection_among_written_solutions(tmp_path):
    import gzip
    import json

    rng, lines = np.random.default_rng(0), []
    for row in range(40):
        entry = {"question": f"What is {row} plus 1?", "ground_truth": ""}
        for source in model_solutions.SOURCES:
            right = bool(rng.random() < 0.5)
            body = f"{row}+1=<<{row}+1={row + 1}>>{row + 1}" if right else "a guess"
            entry[source] = {
                "is_correct": right,
                "solution": f"{body}\nA: {row + 1 if right else rng.integers(99, 999)}",
            }
        lines.append(json.dumps(entry))
    (tmp_path / "math").mkdir()
    with gzip.open(tmp_path / "math" / "gsm8k_model_solutions.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(lines))
    figures = model_solutions.select_solutions(tmp_path, 0)
    chosen = figures["GSM8K selection"]
    assert chosen["verifier of text, squared"] == chosen["any right"]  # calculations give the right ones away
    assert chosen["random"] < chosen["majority vote"] <= chosen["any right"]
    assert set(figures) == {"GSM8K selection", "GSM8K, 6b", "GSM8K, 175b"}
    assert model_solutions.select_solutions(tmp_path, 0) == figures
