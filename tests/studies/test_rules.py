"""The rule of every study gives every verdict that it can give, on planted figures, at the thresholds it states."""

import pytest
from planted import Figures

from polyreward.catalogue import METHODS
from polyreward.studies import dump, ema_grpo, gaussian_grpo, stratified_grpo
from polyreward.studies.base import arm, best_rate, paired_bootstrap
from polyreward.studies.runner import judge_runs

RULES = {"test_rules": ("stratified-grpo", "dump", "ema-grpo", "gaussian-grpo")}
ELSEWHERE = (
    "grouprank", "verifier-based", "tarot", "codeboost", "gui-g2", "brain", "sweet-spot", "elastic-trust-region",
    "multirole-r1", "reward-ensembles", "verpo", "likelihood-rewards", "hybrid-multi-aspect", "toolrl",
    "integer-distributions", "secrets-rm", "topological-rlhf", "micro", "oprm", "fimi-rm", "vpl", "pal", "yojo",
    "basereward", "descore", "p-genrm", "rewardmath", "personalized-rewardbench",
)  # fmt: skip


def test_every_study_has_a_test_of_its_rule():
    assert {*RULES["test_rules"], *ELSEWHERE} == {method.name for method in METHODS if method.study}


def stratified(grpo=0.62, blend=0.94, few=0.0, many=2.0):
    rows = {}
    for name, success, searches in (("grpo", grpo, few), ("blend-0.9", blend, many)):
        for rate in stratified_grpo.RATES:
            rows[f"{name}, rate {rate:g}", "success"] = success if rate == 0.3 else success - 0.1
            rows[f"{name}, rate {rate:g}", "searches, 2 hops"] = searches
    return Figures(rows)


@pytest.mark.parametrize(
    ("runs", "verdict"),
    [
        ([stratified()] * 3, "supported"),
        ([stratified(), stratified(blend=0.76)], "inconclusive"),
        ([stratified(many=0.9)], "inconclusive"),
        ([stratified(blend=0.64)], "not supported"),
        ([stratified(few=1.6)], "not supported"),
    ],
)
def test_stratified_grpo(runs, verdict):
    assert stratified_grpo.STUDY.judge(runs).verdict == verdict


def test_the_baseline_is_taken_at_its_best_rate():
    run = stratified()
    run["grpo, rate 3"]["success"] = 0.93
    assert stratified_grpo.STUDY.judge([run]).verdict == "not supported"


def curriculum(gain=0.2, ratio=0.6, late=9.0):
    return Figures(
        {
            ("uniform, rate 4", "area under the curve"): 0.55,
            ("dump, rate 4", "area under the curve"): 0.55 + gain,
            ("uniform, rate 4", "steps to 0.8"): 200.0,
            ("dump, rate 4", "steps to 0.8"): 200.0 * ratio,
            ("dump, rate 4", "centre of weights, 5 to 15 % of training"): 4.0,
            ("dump, rate 4", "centre of weights, last half"): late,
        }
    )


@pytest.mark.parametrize(
    ("runs", "verdict"),
    [
        ([curriculum()] * 3, "supported"),
        ([curriculum(), curriculum(gain=0.1)], "inconclusive"),
        ([curriculum(), curriculum(ratio=0.75)], "inconclusive"),
        ([curriculum(), curriculum(late=3.9)], "inconclusive"),
        ([curriculum(gain=0.02)], "not supported"),
        ([curriculum(gain=-0.1)], "not supported"),
    ],
)
def test_dump(runs, verdict):
    assert dump.STUDY.judge(runs).verdict == verdict


def digits(ema=0.66, worst=0.5, plain_share=0.03, ema_share=0.33):
    rows = {}
    for name, mean, low, share in (
        ("grpo", 0.5, 0.23, 0.3),
        ("dr-grpo", 0.55, 0.32, plain_share),
        ("ema-grpo", ema, worst, ema_share),
    ):
        for rate in ema_grpo.RATES:
            title = f"{name}, rate {rate:g}"
            rows[title, "mean return"] = mean if rate == 0.25 else mean - 0.1
            rows[title, "worst return"] = low
            rows[title, "gradient share, ink"] = share
    return Figures(rows)


@pytest.mark.parametrize(
    ("runs", "verdict"),
    [
        ([digits()] * 3, "supported"),
        ([digits(ema=0.59)], "inconclusive"),
        ([digits(worst=0.3)], "inconclusive"),
        ([digits(plain_share=0.12)], "inconclusive"),
        ([digits(ema_share=0.6)], "inconclusive"),
        ([digits(ema=0.56)], "not supported"),
        ([digits(ema=0.4)], "not supported"),
    ],
)
def test_ema_grpo(runs, verdict):
    assert ema_grpo.STUDY.judge(runs).verdict == verdict


def outliers(gaussian=0.6, clean=0.62, grpo=0.5, ema=0.33):
    rows = {}
    for rate in gaussian_grpo.RATES:
        down = 0.0 if rate == 0.25 else -0.1
        for name, value in (("gaussian-grpo", gaussian), ("grpo", grpo), ("ema-grpo", ema)):
            rows[f"{name}, 20% outliers, rate {rate:g}", "return, ink"] = value + down
        rows[f"gaussian-grpo, 0% outliers, rate {rate:g}", "return, ink"] = clean + down
    return Figures(rows)


@pytest.mark.parametrize(
    ("runs", "verdict"),
    [
        ([outliers()] * 3, "supported"),
        ([outliers(grpo=0.55)], "not supported"),
        ([outliers(ema=0.45)], "not supported"),
        ([outliers(clean=0.65)], "not supported"),
    ],
)
def test_gaussian_grpo(runs, verdict):
    assert gaussian_grpo.STUDY.judge(runs).verdict == verdict


@pytest.mark.parametrize("method", [m for m in METHODS if m.study], ids=lambda method: method.name)
def test_what_every_study_states(method):
    study = method.load_study()
    assert f"arXiv {method.arxiv}" in study.claim
    assert any(character.isdigit() for character in study.claim)
    assert "upported" in study.rule
    assert "not supported" in study.rule.lower()
    assert study.seeds >= 5  # 10 where a seed takes seconds
    assert all((study.task, study.baselines, study.measure, study.effect, study.full_scale, study.config))
    assert "rate" in study.baselines or "step size" in study.baselines


def test_quick_runs_and_runs_of_few_seeds_are_not_judged():
    run, study = stratified(), stratified_grpo.STUDY
    assert judge_runs(study, [run] * 10, quick=False).verdict == "supported"
    assert judge_runs(study, [run] * 9, quick=False).verdict == "not judged"
    assert judge_runs(study, [run] * 10, quick=True).verdict == "not judged"


def test_best_rate():
    runs = [Figures({("a, rate 1", "x"): 1.0, ("a, rate 2", "x"): v, ("a, rate 4", "x"): 0.5}) for v in (0.0, 3.0)]
    assert best_rate(runs, "a", "x", (1.0, 2.0, 4.0)) == 2.0
    assert best_rate(runs, "a", "x", (1.0, 2.0, 4.0), lowest=True) == 4.0
    assert arm(runs, "a, rate 2", "x").tolist() == [0.0, 3.0]


def test_paired_bootstrap():
    effect, (low, high) = paired_bootstrap([1.0, 2.0, 3.0, 4.0], [0.5, 1.5, 2.5, 3.5])
    assert (effect, low, high) == (0.5, 0.5, 0.5)
    effect, (low, high) = paired_bootstrap([0.0, 1.0, 0.0, 1.0, 0.0, 1.0])
    assert effect == 0.5
    assert 0 < low < 0.5 < high < 1
    assert paired_bootstrap([0.0, 1.0], 0.0) == paired_bootstrap([0.0, 1.0], 0.0)
    for first, second in (([], 0.0), ([1.0, 2.0], [1.0]), ([[1.0]], 0.0)):
        with pytest.raises(ValueError, match="paired_bootstrap"):
            paired_bootstrap(first, second)
