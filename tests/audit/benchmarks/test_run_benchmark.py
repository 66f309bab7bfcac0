import json

import numpy as np
import pytest
import torch

from polyreward.audit.benchmarks import BENCHMARKS, audit_model, run_benchmark
from polyreward.audit.benchmarks.model_audit import score_rows
from polyreward.errors import InvalidInputError, MissingColumnError, UnknownNameError
from polyreward.preferences import TIE, PreferenceData
from polyreward.reward_models import BradleyTerry, Features, HashingEncoder, LinearHead, PreferenceModel, Regression


class ByLength:
    """A reward model that likes length."""

    name = "by length"

    def fit(self, preferences, **options):
        return self

    def score(self, prompts, completions, **columns):
        self.seen = columns
        return torch.tensor([float(len(text.split())) for text in completions])

    def save_pretrained(self, folder):
        raise NotImplementedError


def solutions(tmp_path):
    rows = []
    for problem in range(4):
        for place in range(4):
            words = 5 if place == 0 and problem < 3 else 2 + place % 2
            rows.append(
                {
                    "problem": f"p{problem}", "problem_id": problem, "eval_solution": ["word " * words],
                    "solution_type": "rejected" if place else "chosen", "solution_reference": f"m{place}",
                }
            )  # fmt: skip
    path = tmp_path / "math.json"
    path.write_text(json.dumps(rows))
    return path


def test_rewardmath_of_any_model(tmp_path):
    seen = []
    report = run_benchmark(ByLength(), "rewardmath", solutions(tmp_path), progress=lambda *at: seen.append(at))
    assert report.figures["accuracy"] == 0.75
    assert report.figures["accuracy of the longest"] == 0.75
    assert report.figures["accuracy of the shortest"] == 0
    assert report.figures["mrr of random scores"] == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)
    assert report.counts == {"problems": 4, "wrong solutions": 12}
    assert report.model == "by length"
    assert [row["source"] for row in report.tables["per source"]] == ["m1", "m2", "m3"]
    assert {row["feature"] for row in report.tables["style"]} == {"words", "characters", "steps", "words a step"}
    low, high = report.intervals["accuracy"]
    assert low < 0.75 <= high
    assert seen == [(16, 16)]
    made = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert made["figures"]["accuracy"] == 0.75
    assert made["audit"] is None
    # a plain function is a model too
    again = run_benchmark(ByLength().score, "rewardmath", solutions(tmp_path))
    assert again.figures == report.figures


def test_recorded_scores_need_no_model(tmp_path):
    path = tmp_path / "scores.json"
    tags = ["human_to_GPT-4", "a", ""]
    path.write_text(json.dumps([{"problem": "p", "solution_reference": tags, "score": [2, 1, 0]}] * 2))
    report = run_benchmark(None, "rewardmath", path)
    assert (report.figures["accuracy"], report.model) == (1.0, "recorded scores")
    assert "1 rows" in report.notes[0]
    assert [row["source"] for row in report.tables["per source"]] == ["(none)", "a"]
    with pytest.raises(InvalidInputError, match="pass model=None"):
        run_benchmark(ByLength(), "rewardmath", path)
    with pytest.raises(InvalidInputError, match="a reward model is needed"):
        run_benchmark(None, "rewardmath", solutions(tmp_path))
    judged = {"problem": "p", "solution_reference": tags[1:], "score": ["A", "A"], "chosen_position": ["A", "B"]}
    path.write_text(json.dumps([judged]))
    assert run_benchmark(None, "rewardmath", path).figures["pairwise_mean"] == 0.5


def test_a_model_without_an_opinion_is_an_error_of_the_benchmark(tmp_path):
    def silent(prompts, completions):
        return [np.nan if i == 2 else 1.0 for i in range(len(completions))]

    with pytest.raises(InvalidInputError, match=r"math\.json, row 3: the model's score is NaN"):
        run_benchmark(silent, "rewardmath", solutions(tmp_path))


def personal(tmp_path, **fields):
    path = tmp_path / "personal.jsonl"
    rows = [
        {
            "id": str(i), "question": "What?", "profile": [{"id": "1", "text": "likes long"}], "category": "ab"[i % 2],
            "narrative": "Hidden.", "rubric_aspects": [{"aspect": "x"}], "chosen": "long " * (3 + i % 2),
            "rejected": "short " * 3, **fields,
        }
        for i in range(6)
    ]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_personalised_pairs_of_any_model(tmp_path):
    seen = []
    model = ByLength()
    report = run_benchmark(
        model, "personalized", personal(tmp_path, user="u"), progress=lambda *at: seen.append(at), resamples=50
    )
    assert report.figures["accuracy (question)"] == report.figures["accuracy (profile)"] == 0.5
    assert report.figures["accuracy of the longer answer"] == 0.5
    assert report.counts == {"items": 6, "users": 1, "ties (question)": 3, "ties (profile)": 3}
    assert {row["category"]: row["accuracy"] for row in report.tables["per category"]} == {"a": 0.0, "b": 1.0}
    assert report.tables["per user"][0]["items"] == 6
    assert model.seen == {"annotator": ["u"] * 12}
    assert seen == [(12, 24), (24, 24)]
    json.dumps(report.to_json(), allow_nan=False)
    oracle = run_benchmark(model, "personalized", personal(tmp_path), conditions=["oracle"], resamples=5)
    assert "upper bound" in oracle.notes[0]
    assert model.seen == {}
    only = run_benchmark(model, "personalized", personal(tmp_path, profile=[]), resamples=5)
    assert "accuracy (profile)" not in only.figures
    with pytest.raises(InvalidInputError, match="has no profile"):
        run_benchmark(model, "personalized", personal(tmp_path, profile=[]), conditions=["profile"])
    with pytest.raises(InvalidInputError, match="with a planner"):
        run_benchmark(model, "personalized", personal(tmp_path), conditions=["inferred"])
    with pytest.raises(InvalidInputError, match="needs a reward model"):
        run_benchmark(None, "personalized", personal(tmp_path))


def test_unknown_benchmarks(tmp_path):
    assert BENCHMARKS == ("rewardmath", "personalized", "pairs")
    with pytest.raises(UnknownNameError, match="did you mean 'rewardmath'"):
        run_benchmark(ByLength(), "reward-math", tmp_path)


def planted(pairs=1500, seed=0):
    """Preferences of two annotators, of whom the second chooses at random."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(2 * pairs, 3)).astype(np.float32)
    worth = features @ [1.5, -1.0, 0.0]
    d = worth[::2] - worth[1::2]
    who = np.arange(pairs) % 2
    lost = rng.random(pairs) > np.where(who == 0, 1 / (1 + np.exp(-d)), 0.5)
    data = PreferenceData(
        np.arange(pairs), np.arange(2 * pairs), choice=lost.astype(int), annotators=["ab"[w] for w in who],
        columns={"kind": ["x", "y", "x"] * (pairs // 3)},
    )  # fmt: skip
    return features, data, lost


def fitted(features, data, likelihood=None):
    model = PreferenceModel(Features(features), LinearHead, likelihood or BradleyTerry())
    return model.fit(data, optimizer="lbfgs", epochs=5, validation=None)


def test_the_audit_agrees_with_the_model():
    features, data, lost = planted()
    model = fitted(features, data)
    lengths = np.round(10 + 5 * features[:, 0])
    seen = []
    audit = audit_model(model, data, lengths=lengths, by=["kind"], progress=lambda *at: seen.append(at))
    assert audit.accuracy == pytest.approx(model.evaluate(data)["accuracy"])
    assert audit.calibration.log_loss == pytest.approx(model.evaluate(data)["loss"], abs=1e-5)
    assert audit.accuracy_interval[0] < audit.accuracy < audit.accuracy_interval[1]
    assert audit.accuracy_interval[1] - audit.accuracy_interval[0] == pytest.approx(4 * np.sqrt(0.24 / 1500), rel=0.15)
    assert (audit.pairs, audit.judged_ties, audit.unscored, audit.probabilities) == (1500, 0, 0, "model")
    groups = {group.name: group for group in audit.per_annotator}
    assert groups["a"].low > groups["b"].high
    assert groups["a"].pairs == groups["b"].pairs == 750
    assert {g.name for g in audit.by_column["kind"]} == {"x", "y"}
    assert audit.calibration.ece < 0.06
    assert audit.calibration.count.sum() == 1500
    longer = (lengths[::2] - lengths[1::2]) * np.where(lost, -1, 1)
    assert audit.length_only.accuracy == pytest.approx(((longer > 0) + 0.5 * (longer == 0)).mean())
    # length is a feature of the score: nothing is left to it
    assert audit.length_effect.length_interval[0] < 0 < audit.length_effect.length_interval[1]
    assert audit.length_effect.correlation > 0.3
    assert audit.accuracy_longer.accuracy > audit.accuracy_shorter.accuracy
    assert audit.margin_quantiles[0.0] < 0 < audit.margin_quantiles[1.0]
    assert seen[-1] == (3000, 3000)
    assert len(seen) == 2
    made = json.loads(json.dumps(audit.to_json(), allow_nan=False))
    assert made["per_annotator"][0]["name"] == "a"


def test_one_pass_equals_the_models_own_probability():
    features, data, lost = planted(60)
    for model in (fitted(features, data), fitted(features, data, BradleyTerry(theta=1.5))):
        audit = audit_model(model, data, resamples=5)
        first = 2 * np.arange(60) + lost
        p = model.probability(data.prompts, first, 4 * np.arange(60) + 1 - first, data.annotators).double().numpy()
        curve = audit.calibration
        assert curve.brier == pytest.approx(((1 - p) ** 2).mean(), abs=1e-6)
    ratings = PreferenceData(np.arange(4), np.arange(8), ratings=np.array([1, 2, 3, 1, 2, 2, 5, 1.0]))
    rated = fitted(features[:8], ratings, Regression())
    audit = audit_model(rated, ratings, resamples=5)
    assert (audit.pairs, audit.judged_ties) == (3, 1)


def test_a_model_with_scores_alone_and_texts():
    data = PreferenceData.pairs(["p", "p", "q"], ["a b c", "a", "a b"], ["a b", "a b", "b a"])
    audit = audit_model(ByLength(), data, resamples=20)
    assert (audit.accuracy, audit.equal_scores, audit.probabilities) == (0.5, 1, "sigmoid")
    assert audit.length_only.accuracy == 0.5
    assert audit.length_effect is not None
    assert audit.per_annotator == []
    flat = audit_model(lambda p, c: [1.0] * len(c), data, resamples=20)
    assert (flat.accuracy, flat.length_effect) == (0.5, None)
    numbered = audit_model(lambda p, c: [float(v) for v in c], PreferenceData.pairs([0, 1], [3, 1], [0, 2]))
    assert (numbered.accuracy, numbered.length_only) == (0.5, None)


def test_pairs_without_a_score_are_counted():
    data = PreferenceData.pairs(["p"] * 3, ["a", "b", "c"], ["d", "e", "f"])

    def shy(prompts, completions):
        return [np.nan if text == "b" else float(text < "d") for text in completions]

    audit = audit_model(shy, data, resamples=5)
    assert (audit.unscored, audit.pairs, audit.accuracy) == (1, 2, 1.0)
    with pytest.raises(InvalidInputError, match="scores for no pair"):
        audit_model(lambda p, c: [np.nan] * len(c), data)


def test_rankings_count_every_comparison_the_same():
    data = PreferenceData(
        ["p", "q"], ["a", "b", "c", "d", "e"], np.array([0, 3, 5]), ranks=np.array([1, 2, 3, 1, 2.0]),
    )  # fmt: skip
    worth = {"a": 3.0, "b": 2.0, "c": 1.0, "d": 0.0, "e": 1.0}
    audit = audit_model(lambda p, c: [worth[text] for text in c], data, resamples=5)
    assert audit.pairs == 4
    assert audit.accuracy == pytest.approx(0.5)
    ties = PreferenceData(["p", "q"], list("abcd"), choice=np.array([TIE, 0]))
    assert audit_model(lambda p, c: [worth[text] for text in c], ties, resamples=5).judged_ties == 1


def test_annotators_whom_the_model_has_not_seen():
    features, data, _ = planted(60)
    model = fitted(features, data.select(np.arange(60) % 2 == 0))
    with pytest.warns(UserWarning, match="unknown annotators"):
        assert audit_model(model, data, resamples=5).unknown_annotators == 1


def test_wrong_audits():
    data = PreferenceData.pairs(["p"], ["a"], ["b"])
    with pytest.raises(MissingColumnError, match="'kind'"):
        audit_model(ByLength(), data, by=["kind"])
    with pytest.raises(InvalidInputError, match="lengths has 1"):
        audit_model(ByLength(), data, lengths=[1.0])
    with pytest.raises(InvalidInputError, match="PreferenceData"):
        audit_model(ByLength(), [])
    with pytest.raises(InvalidInputError, match="none of the 1 comparisons"):
        audit_model(ByLength(), PreferenceData(["p"], ["a", "b"], choice=np.array([TIE])))
    with pytest.raises(InvalidInputError, match="got int"):
        score_rows(3, ["p"], ["a"])
    with pytest.raises(InvalidInputError, match=r"shape \(1,\) for 2"):
        score_rows(lambda p, c: [1.0], ["p", "p"], ["a", "b"])


def test_pairs_of_a_file(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": f"p{i}", "responses": ["good word" * (i % 3 + 1), "bad word"], "choice": int(rng.random() < 0.3),
         "who": "ab"[i % 2], "kind": "xy"[i % 2]}
        for i in range(60)
    ]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, rows)))
    data_columns = {"annotator": "who"}
    from polyreward.data.preferences import read_preferences

    data = read_preferences(path, columns=data_columns)
    model = PreferenceModel(HashingEncoder(width=32), LinearHead).fit(data, epochs=2, validation=None)
    report = run_benchmark(model, "pairs", path, columns=data_columns, by=["kind"], resamples=50)
    assert report.figures["accuracy"] == report.audit.accuracy
    assert report.intervals["calibration error"] == report.audit.calibration.ece_interval
    assert [row["annotator"] for row in report.tables["per annotator"]] == ["a", "b"]
    assert len(report.tables["per kind"]) == 2
    assert len(report.tables["calibration"]) == 10
    assert report.counts["comparisons"] == 60
    assert report.notes == []
    json.dumps(report.to_json(), allow_nan=False)
    assert "sigmoid" in run_benchmark(ByLength(), "pairs", path, resamples=5).notes[0]
