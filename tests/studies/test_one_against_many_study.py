import gzip
import json

import numpy as np
import pytest

from polyreward.errors import MissingFileError
from polyreward.studies.base import StudyConfig
from polyreward.studies.one_against_many import DESIGNS, KS, NS, RECORDED, STUDY, SimulatedModels, recorded, run_seed


def test_a_quick_run_is_finite_and_repeats():
    figures = run_seed(1, StudyConfig(quick=True))
    assert all(np.isfinite(value) for part in figures.values() for value in part.values())
    assert run_seed(1, StudyConfig(quick=True)) == figures
    assert set(DESIGNS) < set(figures)
    assert figures["policies"]["first"] < figures["policies"]["highest"] <= 1
    assert not any(name.startswith("recorded") for name in figures)
    assert np.isfinite(STUDY.judge([figures, figures]).effect)


def test_scores_of_the_simulated_models():
    models = SimulatedModels(np.random.default_rng(0), models=400)
    assert models.severity.shape == (400, 6)
    assert (models.severity <= 0).all()
    draws = np.abs(
        np.random.default_rng(1).uniform(0.3, 2, 200_000) + 0.8 * np.random.default_rng(2).normal(size=200_000)
    )
    assert models.severity.mean() == pytest.approx(-draws.mean(), abs=0.05)
    assert models.correct(500, style=1.0).mean(axis=(1, 2)) == pytest.approx(models.liking, abs=0.2)
    types = np.array([[0, 5]] * 500)
    assert models.wrong(types).mean(axis=1) == pytest.approx(models.severity[:, [0, 5]], abs=0.2)


def folder(tmp_path, correct_wins):
    """Recorded scores of six models: the correct one is first in a share of the problems."""
    place = tmp_path / "rewardmath_scores"
    place.mkdir()
    rng = np.random.default_rng(0)
    for index, name in enumerate(RECORDED):
        rows = []
        for problem in range(200):
            wins = problem < 200 * correct_wins[index]
            scores = [float(s) for s in [0.9 if wins else 0.1, *(0.2 + 0.5 * rng.random(9))]]
            tags = ["human_to_GPT-4", "", *[f"model-{i}" for i in range(8)]]
            if name == "Math_Shepherd":
                scores = [[s, s] for s in scores]
            rows.append({"problem": f"p{problem}", "solution_reference": tags, "score": scores})
        with gzip.open(place / f"{name}.json.gz", "wt") as stream:
            json.dump(rows, stream)
    return tmp_path


def test_recorded_scores_are_read_again(tmp_path):
    shares = [0.1, 0.2, 0.4, 0.5, 0.7, 0.9]
    figures = recorded(folder(tmp_path, shares), splits=5)
    names = [*(f"recorded, {name}" for name in list(RECORDED)[:5]), "recorded, Math_Shepherd (prod)"]
    assert [figures[name]["accuracy"] for name in names] == pytest.approx([100 * s for s in shares])
    # it wins or is last
    assert figures[names[0]]["mrr"] == pytest.approx(100 * (0.1 + 0.9 / 10))
    assert set(figures["reliability, 25 problems"]) == {f"{k} comparisons" for k in KS}
    with pytest.raises(MissingFileError, match="ArmoRM"):
        recorded(tmp_path / "nowhere")


def figures_of(many=0.93, mismatched=0.1, matched=0.3, fragile=-0.8, close=0.0, three=0.8):
    made = {
        name: {f"{m} {k}": value for m in ("accuracy", "mrr") for k in ("r2", "spearman")}
        for name, value in zip(DESIGNS, (mismatched, matched, 0.85, many), strict=True)
    }
    made["over-optimisation"] = {
        "accuracy and drop, own styles": fragile, "accuracy and drop, one style": -0.1, "largest drop": 0.2,
    }  # fmt: skip
    for kind in ("lowest", "highest"):
        made[f"curve, {kind} four"] = {f"accuracy at {n}": 0.3 for n in NS}
    for name, ways in RECORDED.items():
        for how, (accuracy, mrr) in ways.items():
            made[f"recorded, {name}{f' ({how})' if how else ''}"] = {
                "accuracy": accuracy + close, "mrr": mrr, "accuracy, low": 1.0, "accuracy, high": 99.0,
            }  # fmt: skip
    for size in ("half of the", 25, 100):
        made[f"reliability, {size} problems"] = {f"{k} comparisons": three if k == 3 else 0.7 for k in KS}
    return made


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({}, "supported"),
        ({"close": 0.009}, "supported"),
        ({"close": 0.02}, "inconclusive"),
        ({"three": 0.6}, "inconclusive"),
        ({"many": 0.75}, "inconclusive"),
        ({"matched": 0.95}, "inconclusive"),
        ({"mismatched": 0.4}, "inconclusive"),
        ({"mismatched": 0.65}, "not supported"),
        ({"many": 0.05}, "not supported"),
        ({"fragile": 0.0}, "inconclusive"),
        ({"fragile": 0.5}, "not supported"),
    ],
)
def test_the_rule_can_fail(changed, verdict):
    judged = STUDY.judge([figures_of(**changed) for _ in range(STUDY.seeds)])
    assert judged.verdict == verdict
    assert all(judged.checks.values()) == (verdict == "supported")


def test_the_rule_without_real_data():
    runs = [
        {name: part for name, part in figures_of().items() if not name.startswith(("recorded", "reliability"))}
        for _ in range(3)
    ]
    judged = STUDY.judge(runs)
    assert judged.verdict == "supported"
    assert len(judged.checks) == 4
