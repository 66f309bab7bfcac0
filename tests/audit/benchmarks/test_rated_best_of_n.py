import math

import numpy as np
import pytest
import torch

from polyreward.audit.benchmarks import audit_model, rated_best_of_n
from polyreward.preferences import Preference, PreferenceData


class Worth:
    """Scores a response by the number that it is."""

    def score(self, prompts, completions, **columns):
        return torch.tensor([float(c) for c in completions], dtype=torch.float64)


def test_a_score_that_runs_away_from_the_ratings():
    """The rating is the score up to 5 and 0 beyond: selecting harder gets worse."""
    rng = np.random.default_rng(5)
    records = []
    for i in range(100):
        scores = rng.permutation(8).tolist()
        records.append(
            Preference(f"q{i}", [str(s) for s in scores], ratings=[float(s if s <= 5 else 0) for s in scores])
        )
    curve = audit_model(Worth(), PreferenceData.of(records)).best_of_n
    assert [point["n"] for point in curve] == [1, 2, 3, 4, 6, 8]
    assert curve[0]["kl"] == 0
    assert curve[1]["kl"] == pytest.approx(math.log(2) - 0.5)
    assert curve[0]["rating"] == pytest.approx(15 / 8)
    assert curve[0]["score"] == pytest.approx(28 / 8)
    assert curve[-1]["rating"] == 0
    assert curve[-1]["score"] == 7
    # of two, the larger of 0..7 is m with probability m / 28
    assert curve[1]["rating"] == pytest.approx(sum(m * m for m in range(6)) / 28)


def test_only_whole_comparisons_of_the_most_common_size_count():
    records = [
        Preference("a", ["1", "2", "3"], ratings=[1.0, 2.0, 3.0]),
        Preference("b", ["3", "2", "1"], ratings=[1.0, 2.0, 3.0]),
        Preference("c", ["1", "2", "3"], ratings=[1.0, None, 3.0]),
        Preference("d", ["1", "2"], ratings=[5.0, 1.0]),
    ]
    data = PreferenceData.of(records)
    scores = np.array([1.0, 2, 3, 3, 2, 1, 1, 2, 3, 1, 2])
    curve = rated_best_of_n(data, scores)
    assert [point["n"] for point in curve] == [1, 2, 3]
    assert curve[-1]["rating"] == pytest.approx((3 + 1) / 2)
    assert curve[-1]["low"] <= curve[-1]["rating"] <= curve[-1]["high"]


def test_no_ratings_no_curve():
    data = PreferenceData.of([Preference("a", ["1", "2"], choice=0)])
    assert rated_best_of_n(data, np.zeros(2)) == []
    assert audit_model(Worth(), data).best_of_n == []
