import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted_preferences import planted

from polyreward.errors import InvalidInputError
from polyreward.preferences import Preference, PreferenceData
from polyreward.reward_models.comparisons import ComparisonTable
from polyreward.reward_models.distributional_preferences import (
    CategoricalPreference,
    MeanVariance,
    categorical_win_probability,
    mean_variance_loss,
)
from polyreward.reward_models.heads import LinearHead, Scores, TwoLayerHead
from polyreward.reward_models.model import PreferenceModel


def batch_of(*records):
    table = ComparisonTable(PreferenceData.of([Preference("p", **record) for record in records]))
    return table.batch(np.arange(len(table)))


def test_equal_variances_reduce_to_a_steeper_bradley_terry():
    difference, variance = torch.tensor([-1.0, 0.0, 2.0]), torch.tensor(0.7)
    steep = math.sqrt(2 * math.pi) / math.sqrt(1.4)
    found = mean_variance_loss(difference, variance, variance)
    assert found.tolist() == pytest.approx([math.log(1 + math.exp(-steep * d)) for d in (-1, 0, 2)], rel=1e-5)
    chance = MeanVariance().probability(
        Scores(torch.tensor([[1.0, math.log(0.5)]])), Scores(torch.tensor([[0.5, math.log(1.5)]]))
    )
    assert float(chance) == pytest.approx(1 / (1 + math.exp(-math.sqrt(2 * math.pi) * 0.5 / math.sqrt(2))))
    assert float(chance) == pytest.approx(0.708, abs=1e-3)


def test_uniform_and_certain_histograms():
    even = torch.full((10,), 0.1)
    assert float(categorical_win_probability(even, even)) == pytest.approx(0.5)
    low, high = torch.eye(10)[0], torch.eye(10)[9]
    assert float(categorical_win_probability(high, low)) == 1
    assert float(categorical_win_probability(low, high)) == 0
    assert float(categorical_win_probability(low, low)) == 0.5
    assert float(categorical_win_probability(high, even)) == pytest.approx(0.95)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 12))
def test_wins_against_the_matrix_of_atoms(seed, atoms):
    rng = np.random.default_rng(seed)
    first, second = torch.from_numpy(rng.dirichlet(np.ones(atoms), size=2))
    slow = sum(
        float(first[i] * second[j]) * (1.0 if i > j else 0.5 if i == j else 0.0)
        for i in range(atoms)
        for j in range(atoms)
    )
    assert float(categorical_win_probability(first, second)) == pytest.approx(slow)
    assert float(categorical_win_probability(second, first)) == pytest.approx(1 - slow)


def test_entropy_of_the_mean_histogram_is_in_the_loss():
    comparisons = batch_of({"responses": ["a", "b"], "choice": 0}, {"responses": ["c", "d"], "choice": "tie"})
    values = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).double()
    one, metrics = CategoricalPreference(3, 0.1).loss(Scores(values), comparisons)
    none, _ = CategoricalPreference(3, 0.0).loss(Scores(values), comparisons)
    mean = values.softmax(-1).mean(0)
    assert float(one - none) == pytest.approx(0.1 * float((mean * mean.log()).sum()))
    p = values.softmax(-1)
    wins = [float(categorical_win_probability(p[i], p[j])) for i, j in ((0, 1), (2, 3))]
    expected = -(math.log(wins[0]) + 0.5 * math.log(wins[1]) + 0.5 * math.log(1 - wins[1])) / 2
    assert float(none) == pytest.approx(expected)
    assert float(metrics["nll"]) == pytest.approx(expected)


@pytest.mark.parametrize("likelihood", [MeanVariance(), MeanVariance(0.1), CategoricalPreference()])
def test_the_planted_direction_is_found_and_survives_saving(likelihood, tmp_path):
    data, encoder, direction = planted(pairs=600)
    model = PreferenceModel(encoder, likelihood.head, likelihood)
    model.fit(data, epochs=25, batch_size=100, learning_rate=0.03, validation=None)
    rows = np.arange(200)
    scores = model.score(rows, rows)
    assert np.corrcoef(scores.numpy(), encoder.responses[:200] @ direction)[0, 1] > 0.85
    assert model.evaluate(data)["accuracy"] > 0.8
    chance = model.probability(rows[:50], rows[:50], rows[50:100])
    other = model.probability(rows[:50], rows[50:100], rows[:50])
    assert torch.allclose(chance + other, torch.ones(50), atol=1e-5)
    model.save_pretrained(tmp_path)
    back = PreferenceModel.from_pretrained(tmp_path, encoder=encoder)
    assert torch.equal(back.score(rows, rows), scores)
    assert torch.allclose(likelihood.pair_log_probability(*torch.randn(2, 5, 4, likelihood.outputs)).exp(), torch.ones(
        5, 4), atol=1)  # fmt: skip


def test_what_people_dispute_has_the_larger_variance():
    # item 0 against item 1 is settled, item 2 against item 3 is not
    rng = np.random.default_rng(0)
    features = np.eye(4, dtype=np.float32)
    first = np.repeat([0, 2], 200)
    lost = np.concatenate([np.zeros(200), rng.random(200) < 0.5]).astype(int)
    data = PreferenceData(np.arange(400), np.stack([first, first + 1], 1).reshape(-1), choice=lost)
    from polyreward.reward_models.encoders import Features

    likelihood = MeanVariance()
    model = PreferenceModel(Features(features), likelihood.head, likelihood)
    model.fit(data, epochs=40, batch_size=50, learning_rate=0.05, validation=None)
    rows = np.arange(4)
    variance = likelihood.variance(model.evaluate_head(rows, rows))
    assert variance[:2].max() < variance[2:].max()


def test_wrong_calls():
    with pytest.raises(InvalidInputError, match="variance_penalty"):
        MeanVariance(-1.0)
    with pytest.raises(InvalidInputError, match="atoms must be at least 2"):
        CategoricalPreference(1)
    with pytest.raises(InvalidInputError, match="same number"):
        categorical_win_probability(torch.ones(3), torch.ones(2))
    data, encoder, _ = planted(pairs=20)
    for likelihood in (MeanVariance(), CategoricalPreference()):
        with pytest.raises(InvalidInputError, match="outputs="):
            PreferenceModel(encoder, LinearHead, likelihood).fit(data, epochs=1, validation=None)
        head = partial(TwoLayerHead, outputs=likelihood.outputs)
        assert PreferenceModel(encoder, head, likelihood).fit(data, epochs=1, validation=None).history
