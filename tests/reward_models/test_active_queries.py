import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyreward.errors import InvalidInputError, UnknownNameError
from polyreward.reward_models.active_queries import (
    label_vectors,
    label_weights,
    laplace_precision,
    linear_information,
    mixture_information,
    select_queries,
)
from polyreward.reward_models.latent_users import LatentReward, VariationalPreferences, VPLLoss
from polyreward.reward_models.preference_sets import PreferenceSetEncoder


class Linear:
    """A reward z . s with its exact Gaussian approximation at 0 as posterior; diagonal, as items lie on the axes."""

    def encode(self, first, second, labels):
        differences = first - second
        precision = laplace_precision(differences)
        mean = torch.linalg.solve(precision, ((labels - 0.5).unsqueeze(-1) * differences).sum(1).unsqueeze(-1))
        return mean.squeeze(-1), torch.diagonal(torch.linalg.inv(precision), dim1=-2, dim2=-1).log()

    def latent(self, mean, log_variance=None, generator=None):
        if log_variance is None:
            return mean
        return mean + (0.5 * log_variance).exp() * torch.randn(mean.shape, generator=generator)

    def logits(self, first, second, z):
        return ((first - second) * z).sum(-1)

    def sample_prior(self, count, generator=None):
        return torch.randn(count, 2, generator=generator)


def vpl(kind="attention"):
    torch.manual_seed(0)
    return VariationalPreferences(PreferenceSetEncoder(kind, 3, 2, 8), LatentReward(3, 2, 8), VPLLoss())


def test_precision_of_the_linear_toy():
    differences = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    assert torch.allclose(laplace_precision(differences), torch.tensor([[2.25, 0.0], [0.0, 1.0]]))
    assert torch.equal(laplace_precision(torch.zeros(0, 2)), torch.eye(2))
    steep = laplace_precision(differences, torch.tensor([3.0, 0.0]))
    slope = [math.exp(-3 * d) / (1 + math.exp(-3 * d)) ** 2 for d in (1, 2)]
    assert float(steep[0, 0]) == pytest.approx(1 + slope[0] + 4 * slope[1], rel=1e-5)


def test_an_orthogonal_query_says_more_than_a_repeated_one():
    asked = laplace_precision(torch.tensor([[2.0, 0.0]] * 3))
    queries = torch.tensor([[[2.0, 0.0]], [[0.0, 2.0]]])
    repeated, orthogonal = linear_information(asked, queries).tolist()
    assert repeated == pytest.approx(0.5 * math.log(1 + 0.25 * 4 / 4))
    assert orthogonal == pytest.approx(0.5 * math.log(1 + 0.25 * 4))
    assert orthogonal > repeated
    given = torch.tensor([[2.0, 0.0]] * 6), torch.zeros(6, 2), torch.ones(6)
    candidates = torch.stack([queries, torch.zeros_like(queries)], dim=2)
    for criterion in ("information", "entropy"):
        chosen = select_queries(
            candidates, Linear(), 50, criterion, given=given, generator=torch.Generator().manual_seed(0)
        )
        assert int(chosen) == chosen.index == 1
        assert chosen.order.tolist() == [1, 0]


def test_a_pair_of_equal_items_says_nothing():
    first = torch.tensor([[[1.0, 0.0]], [[1.0, 2.0]]])
    second = torch.tensor([[[1.0, 0.0]], [[1.0, -2.0]]])
    chosen = select_queries((first, second), Linear(), generator=torch.Generator().manual_seed(0))
    assert chosen.index == 1
    assert float(chosen.scores[0]) == pytest.approx(0, abs=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000))
def test_information_against_a_loop_and_never_negative(seed):
    torch.manual_seed(seed)
    means, log_variances = torch.randn(2, 2, 5, 3).double()
    weights = torch.rand(2, 5).double().softmax(-1)
    found = mixture_information(means, log_variances, weights)
    for s in range(2):
        mean = sum(weights[s, j] * means[s, j] for j in range(5))
        mixed = sum(
            weights[s, j] * (torch.diag(log_variances[s, j].exp()) + torch.outer(means[s, j], means[s, j]))
            for j in range(5)
        ) - torch.outer(mean, mean)
        inside = sum(float(weights[s, j] * log_variances[s, j].sum()) for j in range(5))
        assert float(found[s]) == pytest.approx(0.5 * (math.log(float(torch.linalg.det(mixed))) - inside))
    assert (found >= 0).all()
    same = mixture_information(means[:, :1].expand(2, 5, 3), log_variances[:, :1].expand(2, 5, 3), weights)
    assert same.tolist() == pytest.approx([0, 0], abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000))
def test_weights_are_the_models_probabilities(seed):
    torch.manual_seed(seed)
    logits, labels = 2 * torch.randn(4, 2, 3).double(), label_vectors(3, 8).double()
    found = label_weights(logits, labels)
    assert found.shape == (2, 8)
    for s, (place, label) in itertools.product(range(2), enumerate(labels.tolist())):
        chance = [
            math.prod(1 / (1 + math.exp((1 - 2 * y) * float(x))) for y, x in zip(label, logits[z, s], strict=True))
            for z in range(4)
        ]
        assert float(found[s, place]) == pytest.approx(sum(chance) / 4)  # all vectors are there: no scaling
    assert found.sum(-1).tolist() == pytest.approx([1, 1])


def test_label_vectors_are_all_or_drawn_bit_by_bit():
    assert {tuple(row) for row in label_vectors(3, 8).tolist()} == set(itertools.product((0.0, 1.0), repeat=3))
    drawn = label_vectors(70, 500, torch.Generator().manual_seed(0))
    assert drawn.shape == (500, 70)
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    assert float(drawn.mean()) == pytest.approx(0.5, abs=0.02)
    assert torch.equal(drawn, label_vectors(70, 500, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("criterion", ["information", "entropy", "random"])
@pytest.mark.parametrize("kind", ["attention", "concat"])
def test_all_criteria_with_a_model(criterion, kind):
    torch.manual_seed(1)
    first, second = torch.randn(2, 20, 4, 3)
    found = select_queries((first, second), vpl(kind), 50, criterion, generator=torch.Generator().manual_seed(0))
    again = select_queries((first, second), vpl(kind), 50, criterion, generator=torch.Generator().manual_seed(0))
    assert torch.equal(found.scores, again.scores)
    assert found.scores.shape == (20,)
    assert found.index == int(found.order[0]) == int(found.scores.argmax())
    if criterion != "random":  # permuting the candidates permutes the scores
        turned = select_queries(
            (first.flip(0), second.flip(0)), vpl(kind), 50, criterion, generator=torch.Generator().manual_seed(0)
        )
        assert torch.allclose(turned.scores.flip(0), found.scores, atol=1e-5)


def test_chunks_change_nothing(monkeypatch):
    from polyreward.reward_models import active_queries

    first, second = torch.randn(2, 7, 4, 3)
    options = {"n_label_samples": 16, "generator": torch.Generator().manual_seed(0)}
    whole = select_queries((first, second), vpl(), **options)
    monkeypatch.setattr(active_queries, "SETS", 20)
    options["generator"] = torch.Generator().manual_seed(0)
    assert torch.allclose(select_queries((first, second), vpl(), **options).scores, whole.scores, atol=1e-6)


def test_many_pairs_in_a_set():
    first, second = torch.randn(2, 3, 40, 3)
    assert torch.isfinite(select_queries((first, second), vpl(), 20).scores).all()


def test_wrong_calls():
    pair = torch.zeros(2, 3, 3), torch.zeros(2, 3, 3)
    with pytest.raises(UnknownNameError, match="did you mean 'information'"):
        select_queries(pair, vpl(), criterion="informative")
    with pytest.raises(InvalidInputError, match="at least 1"):
        select_queries(pair, vpl(), 0)
    with pytest.raises(InvalidInputError, match="needs a model"):
        select_queries(pair, None)
    for wrong in ((pair[0], pair[1][:1]), (pair[0][:0], pair[1][:0]), pair[:1], torch.zeros(2, 3, 3)):
        with pytest.raises(InvalidInputError, match="candidates"):
            select_queries(wrong, vpl())
    with pytest.raises(InvalidInputError, match="do not fit"):
        mixture_information(torch.zeros(2, 3, 1), torch.zeros(2, 3, 1), torch.zeros(2, 4))
    with pytest.raises(InvalidInputError, match="differences"):
        laplace_precision(torch.zeros(3))
