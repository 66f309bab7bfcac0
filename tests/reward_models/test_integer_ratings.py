import numpy as np
import pytest
import torch

from polyreward.errors import InvalidInputError, UnknownNameError
from polyreward.preferences import PreferenceData
from polyreward.reward_models import (
    Features,
    IntegerRatings,
    Items,
    LinearHead,
    PreferenceModel,
    Scores,
    TwoLayerHead,
)
from polyreward.reward_models.comparisons import ComparisonTable
from polyreward.statistics import FAMILIES


def counts(comparisons=200, seed=0, scale=1.0):
    """Features and whole ratings whose expectation is exp of a linear function of them."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(2 * comparisons, 4)).astype(np.float32)
    ratings = rng.poisson(scale * np.exp(1 + features @ [0.6, -0.4, 0.0, 0.0])).astype(float)
    data = PreferenceData(
        np.arange(comparisons), np.arange(2 * comparisons), ratings=ratings, offsets=np.arange(comparisons + 1) * 2
    )
    return data, Features(features, name="counts"), ratings


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("components", [1, 3])
def test_every_family_fits_and_orders(family, components):
    data, encoder, ratings = counts()
    likelihood = IntegerRatings.of(data, family, components)
    model = PreferenceModel(encoder, likelihood.head, likelihood)
    model.fit(data, epochs=20, batch_size=64, learning_rate=0.02, validation=None)
    assert model.history[-1]["loss"] < model.history[0]["loss"]
    score = model.score(np.arange(len(ratings)), np.arange(len(ratings)))
    assert np.corrcoef(score.numpy(), ratings)[0, 1] > 0.3
    assert model.evaluate(data)["accuracy"] > 0.6


def test_the_loss_is_the_mean_of_the_log_probabilities_of_what_was_rated():
    ratings = np.array([0.0, 3.0, np.nan, 2.0, 5.0, np.nan])
    data = PreferenceData(np.arange(3), np.arange(6), ratings=ratings, offsets=np.arange(4) * 2)
    likelihood = IntegerRatings("poisson", mean=2.0, std=1.0, low=0, high=5)
    batch = ComparisonTable(data).batch(np.arange(3))
    loss, metrics = likelihood.loss(Scores(torch.zeros(6, 1)), batch)
    expected = -torch.distributions.Poisson(torch.tensor(2.0)).log_prob(torch.tensor([0.0, 3, 2, 5])).mean()
    assert float(loss) == pytest.approx(float(expected), abs=1e-6)
    assert float(metrics["accuracy"]) == 0.5  # equal scores
    assert likelihood.score(Scores(torch.zeros(2, 1))).tolist() == pytest.approx([2.0, 2.0])


@pytest.mark.parametrize("high", [40, 10_000])
def test_the_probability_of_a_preference_is_that_of_independent_ratings(high):
    likelihood = IntegerRatings("poisson", mean=1.0, std=1.0, low=0, high=high)
    rates = torch.tensor([[6.0], [6.0], [6.0]]), torch.tensor([[4.0], [6.0], [9.0]])
    found = likelihood.probability(*(Scores(rate.log()) for rate in rates))
    n = torch.arange(200.0)
    first, second = (torch.distributions.Poisson(rate).log_prob(n).exp() for rate in rates)
    exact = torch.stack([(a * (b.cumsum(0) - b / 2)).sum() for a, b in zip(first, second, strict=True)])
    assert torch.allclose(found, exact, atol=1e-5 if high == 40 else 0.02)


def test_one_value_leaves_no_preference():
    likelihood = IntegerRatings("poisson", mean=1.0, std=1.0, low=3, high=3)
    scores = Scores(torch.tensor([[0.0], [2.0]]))
    assert likelihood.probability(scores, scores).tolist() == [0.5, 0.5]


def test_a_saved_model_scores_alike(tmp_path):
    data, encoder, _ = counts(30)
    likelihood = IntegerRatings.of(data, "danorm", 2)
    model = PreferenceModel(encoder, likelihood.two_layer_head, likelihood).fit(data, epochs=2, validation=None)
    model.save_pretrained(tmp_path)
    back = PreferenceModel.from_pretrained(tmp_path, encoder=encoder)
    assert back.likelihood == likelihood
    rows = np.arange(60)
    assert torch.equal(back.score(rows, rows), model.score(rows, rows))


def test_the_distribution_of_a_response_is_at_hand():
    data, encoder, _ = counts(30)
    likelihood = IntegerRatings.of(data, "dlaplace")
    model = PreferenceModel(encoder, likelihood.head, likelihood).fit(data, epochs=2, validation=None)
    distribution = likelihood.distribution(model.evaluate_head(np.arange(5), np.arange(5)))
    assert distribution.batch_shape == (5,)
    assert bool((distribution.variance > 0).all())


def test_heads_give_as_many_numbers_as_asked():
    items = torch.randn(3, 5)
    codes = torch.zeros(3, dtype=torch.long)
    for head in (LinearHead(5, outputs=4), TwoLayerHead(5, outputs=4)):
        assert head(Items(items, codes, codes)).shape == (3, 4)
        assert head.config["outputs"] == 4
    with pytest.raises(InvalidInputError, match="outputs must be at least 1"):
        LinearHead(5, outputs=0)


def test_bad_input_is_named():
    with pytest.raises(UnknownNameError, match="dalap"):
        IntegerRatings("dalab")
    with pytest.raises(InvalidInputError, match="low <= high"):
        IntegerRatings("dalap", low=3, high=1)
    halves = PreferenceData(np.arange(1), np.arange(2), ratings=np.array([0.5, 1.0]), offsets=np.array([0, 2]))
    with pytest.raises(InvalidInputError, match="whole numbers"):
        IntegerRatings.of(halves, "dalap")
    unrated = PreferenceData(np.arange(1), np.arange(2), choice=np.array([0]), source="unrated")
    with pytest.raises(InvalidInputError, match="unrated has no ratings"):
        IntegerRatings.of(unrated, "dalap")
