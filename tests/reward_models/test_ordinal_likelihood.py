import math
import warnings
from functools import partial

import numpy as np
import pytest
import torch

from polyreward.errors import InvalidInputError, MissingColumnError, UnknownNameError
from polyreward.preferences import Preference, PreferenceData
from polyreward.reward_models.comparisons import ComparisonTable
from polyreward.reward_models.encoders import Features
from polyreward.reward_models.heads import Head, Items, LinearHead, Scores
from polyreward.reward_models.likelihoods import BradleyTerry
from polyreward.reward_models.model import PreferenceModel
from polyreward.reward_models.ordinal import OrdinalDistribution, ordinal_preference_loss
from polyreward.reward_models.ordinal_likelihood import (
    ContradictingLevelsWarning,
    OrdinalHead,
    OrdinalLikelihood,
    ordinal_distribution,
    without_contradictions,
)
from polyreward.reward_models.quality_levels import QualityPartition, region_mask


def rated(pairs=300, seed=0, label=1.0, lowest=1):
    """One-hot features of the ratings 1 to 9; the higher rating is chosen, a share of the pairs is labelled."""
    rng = np.random.default_rng(seed)
    ratings = rng.integers(lowest, 10, size=(pairs, 2))
    ratings[:, 1] = np.where(ratings[:, 0] == ratings[:, 1], lowest + (ratings[:, 1] - lowest + 1) % 3, ratings[:, 1])
    chosen, rejected = ratings.max(axis=1), ratings.min(axis=1)
    labelled = rng.random(pairs) < label
    level = {name: np.where(labelled, (r - 1) // 3, -1) for name, r in (("chosen", chosen), ("rejected", rejected))}
    data = PreferenceData.pairs(
        np.arange(pairs), chosen - 1, rejected - 1, columns={f"{name}_level": v for name, v in level.items()}
    )
    return data, Features(np.eye(9, dtype=np.float32), name="ratings")


def batch_of(*records):
    table = ComparisonTable(PreferenceData.of([Preference("p", **record) for record in records]))
    return table.batch(np.arange(len(table)))


def logits(rows, seed=0, ratings=9):
    return torch.randn(rows, ratings, generator=torch.Generator().manual_seed(seed))


OPTIONS = {"epochs": 30, "batch_size": 100, "learning_rate": 0.1, "validation": None}


@pytest.mark.parametrize("mode", ["triangle", "rectangle", "weighted"])
def test_labelled_pairs_anchor_the_scale_and_unlabelled_ones_do_not(mode):
    everyone = np.arange(3, 9)
    plain, encoder = rated(lowest=4, label=0.0)
    anchored, _ = rated(lowest=4)
    free = PreferenceModel(encoder, OrdinalHead, OrdinalLikelihood(mode=mode)).fit(plain, **OPTIONS)
    held = PreferenceModel(encoder, OrdinalHead, OrdinalLikelihood(mode=mode)).fit(anchored, **OPTIONS)
    for model in (free, held):
        assert model.evaluate(plain)["accuracy"] > 0.9
        scores = model.score(everyone, everyone)
        assert scores.min() >= 1
        assert scores.max() <= 9
    level = ordinal_distribution(held, everyone, everyone).level_probs()
    assert level.argmax(dim=1).tolist() == [1, 1, 1, 2, 2, 2]
    # the worst item is bad, as far as preferences can tell
    assert int(ordinal_distribution(free, everyone, everyone).level_probs()[0].argmax()) == 0


def test_the_loss_of_a_batch_is_that_of_the_parts():
    first, second = {"responses": ["a", "b"], "choice": 0}, {"responses": ["a", "b"], "choice": 1}
    label = [{"chosen_level": c, "rejected_level": r} for c, r in ((2, 1), (None, -1), (0, 2), (1, None))]
    tie = {"responses": ["a", "b"], "choice": "tie", "columns": label[0]}
    batch = batch_of(
        *[part | {"columns": c} for part, c in zip((first, second, first, second), label, strict=True)], tie
    )
    values = logits(10)
    loss, metrics = OrdinalLikelihood().loss(Scores(values), batch)
    chosen, rejected = values[[0, 3, 7]], values[[1, 2, 6]]
    region = region_mask(torch.tensor([2, -1, 1]), torch.tensor([1, -1, -1]))
    assert float(loss) == pytest.approx(float(ordinal_preference_loss(chosen, rejected, region)), abs=1e-6)
    # the contradiction and the tie
    assert int(metrics["dropped"]) == 2
    a, b = OrdinalDistribution(values[[0, 3, 4, 7]]), OrdinalDistribution(values[[1, 2, 5, 6]])
    expected = (a.prob_greater(b) > b.prob_greater(a)).float().mean()
    assert float(metrics["accuracy"]) == pytest.approx(float(expected))


def test_levels_from_ratings_of_lists():
    ratings = [9.0, 2.0, 5.0]
    batch = batch_of({"responses": ["a", "b", "c"], "ratings": ratings})
    values = logits(3)
    likelihood = OrdinalLikelihood(levels="ratings", mode="rectangle")
    loss, metrics = likelihood.loss(Scores(values), batch)
    pairs = [(0, 1, 2, 0), (0, 2, 2, 1), (2, 1, 1, 0)]
    losses = [
        float(
            ordinal_preference_loss(values[[i]], values[[j]], torch.from_numpy(region_mask([c], [r], mode="rectangle")))
        )
        for i, j, c, r in pairs
    ]
    assert float(loss) == pytest.approx(np.mean(losses), abs=1e-6)
    assert int(metrics["dropped"]) == 0
    # an unrated response leaves its comparison unlabelled, and a choice may contradict the ratings
    mixed = batch_of(
        {"responses": ["a", "b"], "choice": 0, "ratings": [9.0, None]},
        {"responses": ["a", "b"], "choice": 0, "ratings": [1.0, 9.0]},
    )
    loss, metrics = likelihood.loss(Scores(logits(4)), mixed)
    assert float(loss) == pytest.approx(float(ordinal_preference_loss(logits(4)[[0]], logits(4)[[1]])), abs=1e-6)
    assert int(metrics["dropped"]) == 1
    with pytest.raises(InvalidInputError, match="rating 10 is outside the scale 1 to 9"):
        likelihood.loss(Scores(logits(2)), batch_of({"responses": ["a", "b"], "ratings": [10.0, 2.0]}))


def test_a_target_weighs_both_orders_where_labels_allow_both():
    record = {"responses": ["a", "b"], "choice": 0, "target": 0.7}
    values = logits(2)
    there, back = (float(ordinal_preference_loss(values[[i]], values[[1 - i]])) for i in (0, 1))
    loss, _ = OrdinalLikelihood().loss(Scores(values), batch_of(record))
    assert float(loss) == pytest.approx(0.7 * there + 0.3 * back, abs=1e-6)
    levels = {"columns": {"chosen_level": 2, "rejected_level": 0}}
    loss, _ = OrdinalLikelihood(mode="rectangle").loss(Scores(values), batch_of(record | levels))
    p = values.softmax(1)
    assert float(loss) == pytest.approx(-math.log(float(p[0, 6:].sum() * p[1, :3].sum())), abs=1e-6)


def test_contradictions_are_counted_and_left_out():
    data, _ = rated(40)
    columns = {name: np.array(values) for name, values in data.columns.items()}
    columns["chosen_level"][[3, 7]], columns["rejected_level"][[3, 7]] = 0, 2
    wrong = PreferenceData.pairs(data.prompts, data.responses[::2], data.responses[1::2], columns=columns)
    with pytest.warns(ContradictingLevelsWarning, match=r"2 of 40 pairs are left out.*\(first: preferences, row 4\)"):
        clean = without_contradictions(wrong)
    assert len(clean) == 38
    assert set(clean.rows) == set(range(1, 41)) - {4, 8}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(without_contradictions(data)) == 40
    with pytest.warns(ContradictingLevelsWarning, match="2 of 40"):
        OrdinalLikelihood().prepare(ComparisonTable(wrong))
    likelihood = OrdinalLikelihood()
    table = ComparisonTable(wrong)
    values = logits(80)
    loss, metrics = likelihood.loss(Scores(values), table.batch(np.arange(40)))
    kept = np.setdiff1d(np.arange(40), [3, 7])
    rows = (2 * kept[:, None] + np.arange(2)).reshape(-1)
    alone, _ = likelihood.loss(Scores(values[rows]), table.batch(kept))
    assert int(metrics["dropped"]) == 2
    assert float(loss) == pytest.approx(float(alone), abs=1e-6)
    nothing, _ = likelihood.loss(Scores(logits(4).requires_grad_()), table.batch(np.array([3, 7])))
    nothing.backward()
    assert float(nothing.detach()) == 0


def test_scores_probabilities_and_log_probabilities():
    a, b = logits(4, 1), logits(4, 2)
    likelihood = OrdinalLikelihood()
    first, second = OrdinalDistribution(a), OrdinalDistribution(b)
    assert torch.equal(likelihood.score(Scores(a)), first.mean)
    chance = likelihood.probability(Scores(a), Scores(b))
    assert torch.allclose(chance, first.prob_greater(second) + first.prob_equal(second) / 2)
    assert torch.allclose(chance + likelihood.probability(Scores(b), Scores(a)), torch.ones(4))
    assert torch.allclose(likelihood.pair_log_probability(a, b).exp(), first.prob_greater(second))
    many = torch.stack([a, b, a + b], dim=1)
    found = likelihood.pair_log_probability(many, many.flip(1))
    assert found.shape == (4, 3)
    assert torch.allclose(found[:, 0], likelihood.pair_log_probability(a, a + b))
    assert likelihood.score(Scores(many)).shape == (4, 3)
    assert likelihood.score(Scores(torch.zeros(0))).shape == (0,)


@pytest.mark.parametrize("hidden", [None, 12])
def test_a_fitted_model_is_saved_with_its_distributions(tmp_path, hidden):
    data, encoder = rated(100, label=0.5)
    likelihood = OrdinalLikelihood(partition=((1, 4), (5, 9)))
    levels = {name: np.clip(values, -1, 1) for name, values in data.columns.items()}
    data = PreferenceData.pairs(data.prompts, data.responses[::2], data.responses[1::2], columns=levels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ContradictingLevelsWarning)
        model = PreferenceModel(encoder, partial(OrdinalHead, hidden=hidden), likelihood).fit(data, **OPTIONS)
    model.save_pretrained(tmp_path)
    back = PreferenceModel.from_pretrained(tmp_path, encoder=encoder)
    assert back.likelihood == likelihood
    rows = np.arange(9)
    assert torch.equal(back.score(rows, rows), model.score(rows, rows))
    found, again = (ordinal_distribution(m, rows, rows) for m in (model, back))
    assert torch.equal(found.variance, again.variance)
    assert torch.equal(found.mean, model.score(rows, rows))
    assert found.entropy.shape == (9,)
    assert found.level_probs(likelihood.quality).shape == (9, 2)
    assert torch.allclose(
        model.probability(rows[:1], rows[:1], rows[8:]), back.probability(rows[:1], rows[:1], rows[8:])
    )
    assert ordinal_distribution(model, [], []).mean.shape == (0,)
    assert model.score([], []).shape == (0,)


def test_data_without_levels_and_any_optimiser_fit():
    data, encoder = rated(100)
    plain = PreferenceData.pairs(data.prompts, data.responses[::2], data.responses[1::2])
    for options in (OPTIONS, {"optimizer": "lbfgs", "epochs": 3, "validation": None}):
        model = PreferenceModel(encoder, OrdinalHead, OrdinalLikelihood()).fit(plain, **options)
        assert model.evaluate(plain)["accuracy"] > 0.95


def test_disagreement_shows_as_variance():
    data, encoder = rated(600, label=0.0)
    flip = ((data.responses == 4).reshape(-1, 2).any(axis=1)) & (np.random.default_rng(1).random(600) < 0.5)
    noisy = PreferenceData(data.prompts, data.responses, choice=flip.astype(int))
    model = PreferenceModel(encoder, OrdinalHead, OrdinalLikelihood()).fit(noisy, **OPTIONS)
    variance = ordinal_distribution(model, np.arange(9), np.arange(9)).variance
    assert variance[4] > 5 * variance[[0, 1, 7, 8]].mean()


def test_a_mixture_of_ordinal_ratings_fits_as_one_model():
    from polyreward.reward_models.mixture_models import MixtureLikelihood

    data, encoder = rated(100, label=0.0)
    model = PreferenceModel(encoder, partial(OrdinalHead, components=2), MixtureLikelihood(OrdinalLikelihood()))
    model.fit(data, **OPTIONS)
    assert model.evaluate(data)["accuracy"] > 0.9
    rows = np.arange(9)
    found = ordinal_distribution(model, rows, rows)
    scores = model.evaluate_head(rows, rows)
    slow = (scores.log_weights.exp().unsqueeze(-1) * scores.values.softmax(-1)).sum(1)
    assert torch.allclose(found.probs, slow, atol=1e-6)


def test_the_head():
    items = Items(torch.randn(5, 3), torch.zeros(5).long(), torch.arange(5))
    head = OrdinalHead(3)
    assert isinstance(head, Head)
    assert head(items).values.shape == (5, 9)
    assert not head(items).values.any()
    assert OrdinalHead(3, ratings=4, hidden=8, layers=3)(items).values.shape == (5, 4)
    several = OrdinalHead(3, ratings=4, components=2)(items)
    assert several.values.shape == (5, 2, 4)
    assert torch.allclose(several.log_weights.exp(), torch.full((5, 2), 0.5))
    assert several.values.any()
    assert OrdinalHead(**OrdinalHead(3, hidden=4).config).config == OrdinalHead(3, hidden=4).config
    with pytest.raises(InvalidInputError, match="at least 2 ratings and 1 component"):
        OrdinalHead(3, ratings=1)
    with pytest.raises(InvalidInputError, match="mixture likelihood"):
        OrdinalLikelihood(4).loss(several, batch_of({"responses": ["a", "b"], "choice": 0}))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"chosen_level": 3, "rejected_level": 1}, "column 'chosen_level' is 3.0 in comparison 1, expected a level"),
        ({"chosen_level": 1, "rejected_level": 0.5}, "column 'rejected_level' is 0.5"),
        ({"chosen_level": -2, "rejected_level": 0}, "column 'chosen_level' is -2"),
    ],
)
def test_wrong_labels_are_named(columns, message):
    batch = batch_of({"responses": ["a", "b"], "choice": 0, "columns": columns})
    with pytest.raises(InvalidInputError, match=message):
        OrdinalLikelihood().loss(Scores(logits(2)), batch)


def test_wrong_parts_are_named():
    pair = batch_of({"responses": ["a", "b"], "choice": 0, "columns": {"chosen_level": 1}})
    with pytest.raises(MissingColumnError, match="no column 'rejected_level'"):
        OrdinalLikelihood().loss(Scores(logits(2)), pair)
    labels = {"chosen_level": 2, "rejected_level": 1}
    three = batch_of({"responses": ["a", "b", "c"], "choice": 0, "columns": labels})
    with pytest.raises(InvalidInputError, match='use levels="ratings"'):
        OrdinalLikelihood().loss(Scores(logits(3)), three)
    with pytest.raises(InvalidInputError, match=r"needs 9 logits a response, the head returned shape \(2,\)"):
        OrdinalLikelihood().score(Scores(torch.zeros(2)))
    with pytest.raises(InvalidInputError, match="does not hold 5 ratings"):
        OrdinalLikelihood(5, QualityPartition())
    with pytest.raises(InvalidInputError, match="at least 2 ratings"):
        OrdinalLikelihood(1)
    with pytest.raises(UnknownNameError, match="did you mean 'triangle'"):
        OrdinalLikelihood(mode="triangel")
    with pytest.raises(UnknownNameError, match="did you mean 'ratings'"):
        OrdinalLikelihood(levels="rating")
    assert OrdinalLikelihood(2).partition == ((1, 1), (2, 2))
    assert OrdinalLikelihood(9, [[1, 5], [6, 9]]).partition == ((1, 5), (6, 9))
    data, encoder = rated(20)
    model = PreferenceModel(encoder, LinearHead, BradleyTerry()).fit(data, epochs=1, validation=None)
    with pytest.raises(InvalidInputError, match="fit with OrdinalHead"):
        ordinal_distribution(model, [0], [0])
