import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted_preferences import planted

from polyreward.errors import InvalidInputError, UnknownNameError
from polyreward.reward_models.contrastive import (
    Contrastive,
    ContrastiveRegularizer,
    DropoutViewsHead,
    ViewedScores,
    info_nce,
    simcse_loss,
    sinkhorn,
    swav_loss,
)
from polyreward.reward_models.ensembles import RewardEnsemble
from polyreward.reward_models.heads import LinearHead, TwoLayerHead
from polyreward.reward_models.likelihoods import BradleyTerry
from polyreward.reward_models.model import PreferenceModel

COSINES = torch.tensor([[0.9, 0.1], [0.2, 0.8]], dtype=torch.float64)
FIT = {"epochs": 4, "batch_size": 32, "learning_rate": 1e-2, "validation": None}


def test_the_worked_example():
    assert info_nce(COSINES, 1.0, reduction="none").tolist() == pytest.approx([0.371101, 0.437488], abs=1e-6)
    first = torch.eye(2, 4, dtype=torch.float64)
    # unit rows whose product with the unit vectors gives the transposed cosines
    second = torch.cat([COSINES.T, torch.zeros(2, 2, dtype=torch.float64)], dim=1)
    second[:, 2] = (1 - second.square().sum(1)).sqrt()
    assert simcse_loss(first, second, 1.0, reduction="none").tolist() == pytest.approx([0.371101, 0.437488], abs=1e-6)
    assert float(simcse_loss(3 * first, second, 1.0)) == pytest.approx((0.371101 + 0.437488) / 2, abs=1e-6)
    regularizer = ContrastiveRegularizer(tau=1.0, beta=0.5)
    assert float(regularizer(first, second)) == pytest.approx(0.5 * (0.371101 + 0.437488) / 2, abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.floats(0.05, 2), st.integers(0, 1000))
def test_simcse_equals_plain_python_and_follows_the_rows(batch, width, tau, seed):
    rng = np.random.default_rng(seed)
    first, second = rng.normal(size=(2, batch, width))
    found = simcse_loss(torch.from_numpy(first), torch.from_numpy(second), tau, reduction="none")

    def cosine(a, b):
        return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))

    for i in range(batch):
        row = [math.exp(cosine(first[i], second[j]) / tau) for j in range(batch)]
        assert float(found[i]) == pytest.approx(-math.log(row[i] / sum(row)), abs=1e-6)
    order = rng.permutation(batch)
    moved = simcse_loss(torch.from_numpy(first[order]), torch.from_numpy(second[order]), tau)
    assert float(moved) == pytest.approx(float(found.mean()), abs=1e-6)


def test_batches_of_one_none_and_features_of_length_0():
    one = torch.randn(1, 3)
    assert float(simcse_loss(one, one)) == 0.0
    assert float(simcse_loss(torch.zeros(0, 3), torch.zeros(0, 3))) == 0.0
    assert float(swav_loss(torch.zeros(0, 3), torch.zeros(0, 3), torch.randn(2, 3))) == 0.0
    zero = torch.zeros(2, 3, requires_grad=True)
    loss = simcse_loss(zero, torch.randn(2, 3))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(math.log(2))
    assert torch.isfinite(zero.grad).all()


def slow_sinkhorn(scores, epsilon, iterations):
    q = np.exp(scores / epsilon)
    for _ in range(iterations):
        q = q / q.sum(axis=0, keepdims=True)
        q = q / q.sum(axis=1, keepdims=True)
    return q


def test_codes_share_the_prototypes():
    scores = torch.from_numpy(np.random.default_rng(0).normal(size=(12, 4)))
    codes = sinkhorn(scores, 0.5, 200)
    assert codes.sum(1).tolist() == pytest.approx([1.0] * 12)
    assert codes.sum(0).tolist() == pytest.approx([3.0] * 4, abs=1e-6)
    assert np.allclose(sinkhorn(scores, 0.5, 3).numpy(), slow_sinkhorn(scores.numpy(), 0.5, 3))
    assert np.isfinite(sinkhorn(100 * scores.float(), 0.01).numpy()).all()
    # equal scores: equal codes
    assert torch.allclose(sinkhorn(torch.zeros(3, 2)), torch.full((3, 2), 0.5))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(2, 5), st.integers(0, 1000))
def test_swav_equals_plain_python(batch, prototypes, seed):
    rng = np.random.default_rng(seed)
    first, second, c = rng.normal(size=(batch, 3)), rng.normal(size=(batch, 3)), rng.normal(size=(prototypes, 3))
    found = swav_loss(*(torch.from_numpy(x) for x in (first, second, c)), 0.2, epsilon=0.3, reduction="none")

    def unit(x):
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    s, t = (unit(x) @ unit(c).T for x in (first, second))
    p_s, p_t = (np.exp(x / 0.2) / np.exp(x / 0.2).sum(axis=1, keepdims=True) for x in (s, t))
    q_s, q_t = slow_sinkhorn(s, 0.3, 3), slow_sinkhorn(t, 0.3, 3)
    for i in range(batch):
        slow = -sum(q_t[i, k] * math.log(p_s[i, k]) + q_s[i, k] * math.log(p_t[i, k]) for k in range(prototypes))
        assert float(found[i]) == pytest.approx(slow, abs=1e-6)


def test_gradients_reach_both_views_and_the_prototypes_but_not_the_codes():
    regularizer = ContrastiveRegularizer("swav", width=3, prototypes=4)
    assert regularizer.tau == 0.1
    assert torch.allclose(regularizer.prototypes.norm(dim=1), torch.ones(4))
    first, second = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    regularizer(first, second).backward()
    assert all(bool((x.grad != 0).any()) for x in (first, second, regularizer.prototypes))
    assert not sinkhorn(first).requires_grad
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    y = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: simcse_loss(a, b, 0.5), (x, y))


def test_what_a_view_holds():
    chosen, rejected = torch.ones(2, 3), torch.full((2, 3), 0.25)
    assert ContrastiveRegularizer().inputs(chosen, rejected).shape == (4, 3)
    assert torch.equal(ContrastiveRegularizer(view="difference").inputs(chosen, rejected), torch.full((2, 3), 0.75))
    assert ContrastiveRegularizer().tau == 0.05
    assert ContrastiveRegularizer().beta == 1.0


def test_wrong_calls():
    with pytest.raises(UnknownNameError, match="did you mean 'simcse'"):
        ContrastiveRegularizer("simsce")
    with pytest.raises(UnknownNameError, match="did you mean 'difference'"):
        ContrastiveRegularizer(view="differences")
    with pytest.raises(InvalidInputError, match="tau must be above 0"):
        ContrastiveRegularizer(tau=0.0)
    with pytest.raises(InvalidInputError, match="beta must be at least 0"):
        ContrastiveRegularizer(beta=-1.0)
    with pytest.raises(InvalidInputError, match="SwAV needs the width"):
        ContrastiveRegularizer("swav")
    with pytest.raises(InvalidInputError, match=r"one shape \(B, d\), got \(2, 3\) and \(3, 3\)"):
        ContrastiveRegularizer()(torch.zeros(2, 3), torch.zeros(3, 3))
    with pytest.raises(InvalidInputError, match=r"prototypes have shape \(2, 4\)"):
        swav_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(InvalidInputError, match=r"must have shape \(B, B\)"):
        info_nce(torch.zeros(2, 3))
    with pytest.raises(InvalidInputError, match="epsilon"):
        sinkhorn(torch.zeros(2, 2), 0.0)
    with pytest.raises(InvalidInputError, match="both views are the same"):
        DropoutViewsHead(3, dropout=0.0)
    with pytest.raises(InvalidInputError, match="activation"):
        DropoutViewsHead(3, activation="step")
    with pytest.raises(InvalidInputError, match="not both"):
        Contrastive(regularizer=ContrastiveRegularizer(), beta=0.1)


@pytest.mark.parametrize(
    "options",
    [{}, {"view": "difference"}, {"kind": "swav", "width": 8}, {"kind": "swav", "width": 8, "view": "difference"}],
)
def test_a_model_fits_scores_and_survives_saving(options, tmp_path):
    data, encoder, _ = planted(pairs=120)
    head = partial(DropoutViewsHead, dropout=0.2)
    model = PreferenceModel(encoder, head, Contrastive(BradleyTerry(centering=0.01), beta=0.1, **options))
    model.fit(data, **{**FIT, "epochs": 15})
    assert model.evaluate(data)["accuracy"] > 0.75
    model.save_pretrained(tmp_path)
    back = PreferenceModel.from_pretrained(tmp_path, encoder=encoder)
    rows = np.arange(20)
    assert torch.equal(back.score(rows, rows), model.score(rows, rows))
    assert back.likelihood.config == model.likelihood.config
    assert back.likelihood.likelihood == BradleyTerry(centering=0.01)
    assert torch.equal(
        back.probability(rows, rows, rows[::-1].copy()), model.probability(rows, rows, rows[::-1].copy())
    )


def test_the_weight_0_is_the_plain_fit_and_other_weights_are_not():
    data, encoder, _ = planted(pairs=60)
    rows = np.arange(20)
    found = []
    for likelihood in (BradleyTerry(), Contrastive(beta=0.0), Contrastive(beta=1.0)):
        model = PreferenceModel(encoder, DropoutViewsHead, likelihood).fit(data, **FIT)
        found.append(model.score(rows, rows))
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2])


def test_differences_follow_the_choice_and_ties_add_nothing():
    from polyreward.preferences import PreferenceData
    from polyreward.reward_models.comparisons import ComparisonTable

    views = (torch.randn(6, 3), torch.randn(6, 3))
    scores = ViewedScores(torch.zeros(6), views=views)
    data = PreferenceData(np.arange(3), np.arange(6), choice=np.array([1, 0, -1]))
    likelihood = Contrastive(view="difference", tau=0.5)
    loss, metrics = likelihood.loss(scores, ComparisonTable(data).batch(np.arange(3)))
    first, second = (torch.stack([v[1] - v[0], v[2] - v[3]]) for v in views)
    expected = simcse_loss(first, second, 0.5)
    assert float(metrics["contrastive"]) == pytest.approx(float(expected), abs=1e-6)
    assert float(loss) == pytest.approx(math.log(2) + float(expected), abs=1e-6)
    likelihood.eval()
    assert float(likelihood.loss(scores, ComparisonTable(data).batch(np.arange(3)))[0]) == pytest.approx(math.log(2))


def test_heads_without_views_and_ensembles():
    data, encoder, _ = planted(pairs=60)
    with pytest.raises(InvalidInputError, match="such as DropoutViewsHead"):
        PreferenceModel(encoder, LinearHead, Contrastive()).fit(data, **FIT)
    ensemble = RewardEnsemble.of(PreferenceModel(encoder, DropoutViewsHead, Contrastive(beta=0.1)), 2).fit(data, **FIT)
    assert ensemble.score(np.arange(5), np.arange(5)).shape == (5,)
    plain = PreferenceModel(encoder, TwoLayerHead).fit(data, **FIT)
    assert plain.score(np.arange(5), np.arange(5)).shape == (5,)
