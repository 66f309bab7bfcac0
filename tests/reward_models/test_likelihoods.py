import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyreward.errors import InvalidInputError
from polyreward.preferences import Preference, PreferenceData
from polyreward.reward_models.comparisons import ComparisonTable
from polyreward.reward_models.heads import Scores
from polyreward.reward_models.likelihoods import (
    BradleyTerry,
    CenteredBTLoss,
    PlackettLuce,
    Regression,
    bradley_terry_loss,
    centering_penalty,
    plackett_luce_loss,
    select_best_loss,
    tied_bradley_terry_loss,
)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def sigma(x):
    return 1 / (1 + math.exp(-x))


def batch_of(*records, **fields):
    table = ComparisonTable(PreferenceData.of([Preference("p", **record) for record in records], **fields))
    return table.batch(np.arange(len(table)))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 0.263282),
        ({"margin": 0.5}, 0.403186),
        ({"smoothing": 0.1}, 0.383282),
        ({"target": 0.9}, 0.383282),
        ({"target": 1.0, "margin": 0.5}, 0.403186),
        ({"target": 0.0}, 1.463282),
    ],
)
def test_bradley_terry_literals(options, expected):
    assert float(bradley_terry_loss(tensor(1.2), **options)) == pytest.approx(expected, abs=1e-6)


def test_a_label_without_a_response_is_refused():
    scores = torch.tensor([[1.0, -torch.inf], [0.0, 1.0]])
    with pytest.raises(InvalidInputError, match="label 1 of row 0"):
        select_best_loss(scores, torch.tensor([1, 0]))
    with pytest.raises(InvalidInputError, match="label -1 of row 0"):
        select_best_loss(scores, torch.tensor([-1, 0]))


def test_a_half_target_is_least_at_no_difference():
    x = tensor(0.0).requires_grad_()
    loss = bradley_terry_loss(x, 0.5)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert float(x.grad) == 0


def test_soft_target_is_least_at_its_logit():
    x = tensor(math.log(0.7 / 0.3)).requires_grad_()
    bradley_terry_loss(x, 0.7).backward()
    assert float(x.grad) == pytest.approx(0, abs=1e-12)


def test_very_wrong_pairs_keep_their_gradient():
    x = tensor(-200.0).requires_grad_()
    loss = bradley_terry_loss(x)
    loss.backward()
    assert loss.item() == pytest.approx(200)
    assert float(x.grad) == pytest.approx(-1)


@pytest.mark.parametrize("options", [{"target": 1.1}, {"target": float("nan")}, {"smoothing": 0.6}])
def test_probabilities_out_of_range_are_refused(options):
    with pytest.raises(InvalidInputError, match=r"must be"):
        bradley_terry_loss(tensor(1.0), **options)


def test_centering():
    chosen, rejected = tensor(1.0, 2.0), tensor(-1.0, 0.5)
    assert float(centering_penalty(chosen, rejected)) == pytest.approx(6.25 / 2)
    loss, parts = CenteredBTLoss(0.01)(chosen, rejected)
    nll = (-math.log(sigma(2.0)) - math.log(sigma(1.5))) / 2
    assert float(parts["nll"]) == pytest.approx(nll)
    assert float(loss) == pytest.approx(nll + 0.01 * 3.125)
    shifted, moved = CenteredBTLoss(0.01)(chosen + 3, rejected + 3)
    assert float(moved["nll"]) == pytest.approx(nll)
    assert float(shifted) > float(loss)
    with pytest.raises(InvalidInputError, match="eta"):
        CenteredBTLoss(-1)
    with pytest.raises(InvalidInputError, match=r"shape \(2,\)"):
        CenteredBTLoss()(chosen, rejected[:1])


def test_ties_of_rao_and_kupper():
    # theta = 5: the constant of a tie is log 24
    d, tie = tensor(1.0, 1.0), torch.tensor([False, True])
    won, tied = tied_bradley_terry_loss(d, tie, 5.0, reduction="none").tolist()
    assert won == pytest.approx(-math.log(sigma(1 - math.log(5))))
    assert tied == pytest.approx(-math.log(sigma(1 - math.log(5))) - math.log(sigma(-1 - math.log(5))) - math.log(24))
    with pytest.raises(InvalidInputError, match="above 1"):
        tied_bradley_terry_loss(d, tie, 1.0)


@settings(max_examples=50, deadline=None)
@given(st.floats(-8, 8), st.floats(1.001, 20))
def test_the_three_outcomes_sum_to_one(d, theta):
    d = tensor(d)
    won, lost, tied = (
        math.exp(-float(tied_bradley_terry_loss(sign * d, torch.tensor([tie]), theta)))
        for sign, tie in ((1, False), (-1, False), (1, True))
    )
    assert won + lost + tied == pytest.approx(1)
    part = BradleyTerry(theta=theta)
    first, second = Scores(d), Scores(tensor(0.0))
    assert float(part.tie_probability(first, second)) == pytest.approx(tied, abs=1e-9)
    assert float(part.probability(first, second)) == pytest.approx(won + tied / 2)


def test_plackett_luce_literals():
    scores = tensor(1.0, 0.0, 2.0).unsqueeze(0)
    e = math.e
    total = e + 1 + e * e
    order = -math.log(e * e / total) - math.log(e / (e + 1))
    assert float(plackett_luce_loss(scores, tensor(2, 3, 1).unsqueeze(0))) == pytest.approx(order)
    top = float(plackett_luce_loss(scores, tensor(1, 2, 2).unsqueeze(0)))
    assert top == pytest.approx(-math.log(e / total))
    assert top == pytest.approx(float(select_best_loss(scores, torch.tensor([0]))))
    partial = plackett_luce_loss(scores, tensor(2, float("nan"), 1).unsqueeze(0))
    assert float(partial) == pytest.approx(-math.log(e * e / (e * e + e)))
    hidden = torch.tensor([[True, False, True]])
    assert float(plackett_luce_loss(scores, tensor(2, 3, 1).unsqueeze(0), hidden)) == pytest.approx(float(partial))
    with pytest.raises(InvalidInputError, match="expected"):
        plackett_luce_loss(scores, tensor(1, 2))


def test_two_responses_are_bradley_terry():
    scores = tensor(0.3, -0.9).unsqueeze(0)
    expected = float(bradley_terry_loss(tensor(1.2)))
    assert float(plackett_luce_loss(scores, tensor(1, 2).unsqueeze(0))) == pytest.approx(expected)
    padded = torch.cat([scores, tensor(-math.inf).view(1, 1)], dim=1)
    assert float(select_best_loss(padded, torch.tensor([0]))) == pytest.approx(expected)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 6), st.integers(0, 100))
def test_plackett_luce_equals_drawing_one_by_one(size, seed):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=size) * 3
    ranks = rng.integers(1, 4, size=size).astype(float)
    ranks[rng.random(size) < 0.2] = np.nan
    slow = 0.0
    for i in range(size):
        if np.isnan(ranks[i]):
            continue
        worse = [scores[j] for j in range(size) if ranks[j] > ranks[i]]
        slow -= scores[i] - math.log(sum(math.exp(s) for s in [scores[i], *worse]))
    fast = plackett_luce_loss(torch.tensor(scores)[None], torch.tensor(ranks)[None])
    assert float(fast) == pytest.approx(slow, abs=1e-9)


def test_gradients():
    torch.manual_seed(0)
    scores = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    ranks = torch.tensor([[1, 2, 3, 4], [1, 2, 2, float("nan")], [2, 2, 1, 3.0]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: plackett_luce_loss(s, ranks), scores)
    assert torch.autograd.gradcheck(lambda s: bradley_terry_loss(s, 0.8, 0.3, smoothing=0.1), scores)
    tie = torch.rand(3, 4) < 0.5
    assert torch.autograd.gradcheck(lambda s: tied_bradley_terry_loss(s, tie, 2.0), scores)


def test_part_on_pairs_equals_the_function():
    batch = batch_of(
        {"responses": ["a", "b"], "choice": 1, "margin": 0.5},
        {"responses": ["a", "b"], "choice": 0, "target": 0.8},
        {"responses": ["a", "b"], "choice": "tie", "margin": 9.0},
    )
    s = torch.tensor([0.1, 0.9, 1.0, -0.5, 0.2, 0.6])
    loss, metrics = BradleyTerry(centering=0.1).loss(Scores(s), batch)
    parts = [
        -math.log(sigma(0.8 - 0.5)),
        -0.8 * math.log(sigma(1.5)) - 0.2 * math.log(sigma(-1.5)),
        -0.5 * math.log(sigma(0.4)) - 0.5 * math.log(sigma(-0.4)),
    ]
    centre = (1.0**2 + 0.5**2 + 0.8**2) / 3
    assert float(loss) == pytest.approx(sum(parts) / 3 + 0.1 * centre, rel=1e-5)
    assert float(metrics["nll"]) == pytest.approx(sum(parts) / 3, rel=1e-5)
    assert float(metrics["accuracy"]) == 1.0
    theta = BradleyTerry(theta=2.0).loss(Scores(s), batch)[0]
    cut = math.log(2)
    tied = -math.log(sigma(0.4 - cut)) - math.log(sigma(-0.4 - cut)) - math.log(3)
    wins = -math.log(sigma(0.3 - cut)) - 0.8 * math.log(sigma(1.5 - cut)) - 0.2 * math.log(sigma(cut - 1.5))
    assert float(theta) == pytest.approx((tied + wins) / 3, rel=1e-5)


def test_a_list_counts_as_one_comparison():
    batch = batch_of(
        {"responses": ["a", "b", "c"], "ranks": [1, 2, 3]},
        {"responses": ["a", "b"], "choice": 0},
        {"responses": ["a", "b", "c"], "choice": 2},
    )
    s = [0.5, 0.1, -0.2, 1.0, 0.0, 0.3, 0.2, 0.9]

    def f(i, j):
        return -math.log(sigma(s[i] - s[j]))

    slow = ((f(0, 1) + f(0, 2) + f(1, 2)) / 3 + f(3, 4) + (f(7, 5) + f(7, 6)) / 2) / 3
    assert float(BradleyTerry().loss(Scores(torch.tensor(s)), batch)[0]) == pytest.approx(slow, rel=1e-5)
    assert float(batch.pairs.weight.sum()) == pytest.approx(1)
    assert not bool(batch.pairs.tie.any())


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(1, 3), min_size=2, max_size=4), min_size=1, max_size=6), st.booleans())
def test_pairs_equal_a_loop(ranks, pairs_only):
    ranks = [r[:2] for r in ranks] if pairs_only else ranks
    batch = batch_of(*[{"responses": list("abcd")[: len(r)], "ranks": r} for r in ranks])
    expected, start = [], 0
    for number, own in enumerate(ranks):
        for i, a in enumerate(own):
            for j, b in enumerate(own):
                if a < b or (a == b and i < j):
                    expected.append((start + i, start + j, a == b, number))
        start += len(own)
    found = batch.pairs
    got = zip(*(part.tolist() for part in (found.first, found.second, found.tie, found.comparison)), strict=True)
    assert sorted(got) == sorted(expected)


def test_listwise_part():
    batch = batch_of({"responses": ["a", "b", "c"], "ranks": [2, 3, 1]}, {"responses": ["a", "b"], "choice": 0})
    s = torch.tensor([1.0, 0.0, 2.0, 0.3, -0.9])
    e = math.e
    full = -math.log(e * e / (e + 1 + e * e)) - math.log(e / (e + 1))
    pair = 0.263282
    loss, metrics = PlackettLuce().loss(Scores(s), batch)
    assert float(loss) == pytest.approx((full + pair) / 2, rel=1e-5)
    assert float(metrics["accuracy"]) == 1
    top = PlackettLuce(top_only=True).loss(Scores(s), batch)[0]
    assert float(top) == pytest.approx((-math.log(e * e / (e + 1 + e * e)) + pair) / 2, rel=1e-5)


def test_regression_part():
    batch = batch_of({"responses": ["a", "b"], "ratings": [1.0, None]}, {"responses": ["a", "b"], "ratings": [4, 2]})
    s = torch.tensor([1.5, 100.0, 1.0, 2.0])
    assert float(Regression().loss(Scores(s), batch)[0]) == pytest.approx((0.25 + 9 + 0) / 3)
    assert float(Regression("huber").loss(Scores(s), batch)[0]) == pytest.approx((0.125 + 2.5) / 3)
    assert float(Regression(temperature=2.0).probability(Scores(tensor(1.0)), Scores(tensor(0.0)))) == pytest.approx(
        sigma(0.5)
    )


def test_several_components_need_a_likelihood_of_their_own():
    batch = batch_of({"responses": ["a", "b"], "choice": 0})
    for part in (BradleyTerry(), PlackettLuce(), Regression()):
        with pytest.raises(InvalidInputError, match="one score a response"):
            part.loss(Scores(torch.zeros(2, 3)), batch)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (BradleyTerry, {"smoothing": 0.7}),
        (BradleyTerry, {"centering": -1}),
        (BradleyTerry, {"theta": 1}),
        (Regression, {"kind": "absolute"}),
        (Regression, {"temperature": 0}),
    ],
)
def test_wrong_hyper_parameters(kind, options):
    with pytest.raises(InvalidInputError):
        kind(**options)
