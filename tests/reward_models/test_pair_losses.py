import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from planted_preferences import planted
from torch.nn.functional import cross_entropy

from polyreward.errors import InvalidInputError, MissingColumnError, UnknownNameError
from polyreward.preferences import TIE, PreferenceData
from polyreward.reward_models.comparisons import ComparisonTable
from polyreward.reward_models.heads import LinearHead, Scores
from polyreward.reward_models.likelihoods import BradleyTerry
from polyreward.reward_models.model import PreferenceModel
from polyreward.reward_models.pair_losses import (
    LOSSES,
    PairLoss,
    pair_loss,
    token_weighted_loss,
    user_balanced_weights,
)


def loss_of(margin, name, gamma=5.0):
    if name == "hinge":
        return max(0.0, 1 - margin)
    if name == "smoothed_hinge":
        return max(0.0, 1 - margin) ** 2 / (2 * gamma) if margin >= 1 - gamma else 1 - gamma / 2 - margin
    return math.log1p(math.exp(-margin))


@given(st.lists(st.floats(-20, 20), min_size=1, max_size=8), st.sampled_from(LOSSES), st.floats(0.5, 8))
def test_the_losses_are_those_of_a_plain_reference(margins, name, gamma):
    found = pair_loss(torch.tensor(margins, dtype=torch.float64), name, gamma=gamma, reduction="none")
    assert found.tolist() == pytest.approx([loss_of(m, name, gamma) for m in margins], abs=1e-9)
    mean = pair_loss(torch.tensor(margins, dtype=torch.float64), name, gamma=gamma)
    assert float(mean) == pytest.approx(float(found.mean()))


def test_the_smoothed_hinge_is_smooth_where_its_pieces_meet():
    margin = torch.tensor([-4.0 - 1e-4, -4.0 + 1e-4, 1.0 - 1e-4, 1.0 + 1e-4], dtype=torch.float64, requires_grad=True)
    each = pair_loss(margin, "smoothed_hinge", reduction="none")
    slope = torch.autograd.grad(each.sum(), margin)[0]
    assert each.detach().tolist() == pytest.approx([2.5, 2.5, 0.0, 0.0], abs=1e-3)
    assert slope.tolist() == pytest.approx([-1.0, -1.0, 0.0, 0.0], abs=1e-3)


def test_two_classes():
    logits = torch.tensor([0.8, 0.6], dtype=torch.float64) / 0.07
    assert logits.tolist() == pytest.approx([11.4286, 8.5714], abs=1e-4)
    assert float(pair_loss(logits[0] - logits[1], "cross_entropy")) == pytest.approx(0.055844, abs=1e-6)
    assert float(cross_entropy(logits[None], torch.tensor([0]))) == pytest.approx(0.055844, abs=1e-6)


def test_no_margins_have_no_loss():
    assert float(pair_loss(torch.zeros(0))) == 0


@pytest.mark.parametrize(("mode", "expected"), [("cumulative", 0.25), ("mean", 1 / 3), ("last", 0.1)])
def test_weights_over_tokens(mode, expected):
    losses = torch.tensor([[0.6, 0.3, 0.1]])
    assert float(token_weighted_loss(losses, torch.tensor([0]), torch.tensor([3]), mode)) == pytest.approx(expected)
    # what lies outside the span is not read
    padded = torch.tensor([[math.nan, 0.6, 0.3, 0.1, math.inf], [5.0, 5.0, 5.0, 5.0, 5.0]])
    spans = torch.tensor([1, 2]), torch.tensor([4, 2])
    found = token_weighted_loss(padded, *spans, mode, reduction="none")
    assert found.tolist() == pytest.approx([expected, 0.0])
    # two equal responses have no token to count, and do not thin out the others
    assert float(token_weighted_loss(padded, *spans, mode)) == pytest.approx(expected)


def test_gradients_do_not_come_from_outside_the_span():
    losses = torch.tensor([[math.nan, 0.6, 0.3, 0.1, 9.0]], requires_grad=True)
    token_weighted_loss(losses, torch.tensor([1]), torch.tensor([4])).backward()
    assert losses.grad.tolist()[0] == pytest.approx([0, 1 / 6, 2 / 6, 3 / 6, 0])


@given(st.integers(1, 6), st.integers(1, 8), st.randoms(use_true_random=False), st.sampled_from(["mean", "cumulative"]))
def test_token_weights_against_a_plain_reference(batch, length, random, mode):
    rows = [[random.uniform(0, 3) for _ in range(length)] for _ in range(batch)]
    starts = [random.randint(0, length) for _ in rows]
    ends = [random.randint(start, length) for start in starts]
    expected = []
    for row, start, end in zip(rows, starts, ends, strict=True):
        part = row[start:end]
        weight = [1.0 if mode == "mean" else i + 1.0 for i in range(len(part))]
        expected.append(sum(w * v for w, v in zip(weight, part, strict=True)) / sum(weight) if part else 0.0)
    found = token_weighted_loss(
        torch.tensor(rows, dtype=torch.float64), torch.tensor(starts), torch.tensor(ends), mode, reduction="none"
    )
    assert found.tolist() == pytest.approx(expected)
    some = [value for value, start, end in zip(expected, starts, ends, strict=True) if end > start]
    mean = token_weighted_loss(torch.tensor(rows, dtype=torch.float64), torch.tensor(starts), torch.tensor(ends), mode)
    assert float(mean) == pytest.approx(sum(some) / max(len(some), 1))


@pytest.mark.parametrize(
    ("call", "error", "told"),
    [
        (lambda: pair_loss(torch.ones(1), "hing"), UnknownNameError, "hinge"),
        (lambda: pair_loss(torch.ones(1), gamma=0.0), InvalidInputError, "gamma"),
        (lambda: PairLoss("squared"), UnknownNameError, "squared"),
        (
            lambda: token_weighted_loss(torch.ones(2, 3), torch.tensor([0, 2]), torch.tensor([3, 4])),
            InvalidInputError,
            "row 1: the span from 2 to 4",
        ),
        (lambda: token_weighted_loss(torch.ones(3), torch.tensor([0]), torch.tensor([1])), InvalidInputError, "(B, T)"),
        (
            lambda: token_weighted_loss(torch.ones(1, 3), torch.tensor([0]), torch.tensor([1]), "first"),
            UnknownNameError,
            "first",
        ),
    ],
)
def test_bad_input_is_one_clear_error(call, error, told):
    with pytest.raises(error, match=told.replace("(", r"\(").replace(")", r"\)")):
        call()


def test_the_logistic_loss_is_bradley_terry():
    data, _, _ = planted(60)
    comparisons = ComparisonTable(data).batch(np.arange(60))
    scores = Scores(torch.randn(120, generator=torch.Generator().manual_seed(0)))
    ours, metrics = PairLoss("logistic").loss(scores, comparisons)
    theirs, expected = BradleyTerry().loss(scores, comparisons)
    assert float(ours) == pytest.approx(float(theirs))
    assert float(metrics["accuracy"]) == pytest.approx(float(expected["accuracy"]))
    with pytest.raises(InvalidInputError, match="one score"):
        PairLoss().loss(Scores(torch.zeros(120, 2)), comparisons)


def test_ties_targets_and_margins_of_a_hinge_by_hand():
    data = PreferenceData(
        np.arange(3), np.arange(6), choice=[0, TIE, 1], margin=[0.5, 0.0, 0.0], target=[1.0, 1.0, 0.75]
    )
    scores = Scores(torch.tensor([1.0, 0.0, 2.0, 0.0, 0.0, 0.5]))
    found, metrics = PairLoss("hinge").loss(scores, ComparisonTable(data).batch(np.arange(3)))
    # ahead by 1 with margin 0.5; a tie that is 2 apart; the right one ahead by 0.5, right with 0.75
    each = [0.5, 0.5 * 0.0 + 0.5 * 3.0, 0.75 * 0.5 + 0.25 * 1.5]
    assert float(found) == pytest.approx(sum(each) / 3)
    assert float(metrics["accuracy"]) == pytest.approx(1.0)


def test_user_balanced_weights_make_every_user_count_the_same():
    users = ["a", "a", "a", "b"]
    weight = user_balanced_weights(users)
    assert weight.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1.0])
    assert user_balanced_weights(torch.tensor([7, 7])).tolist() == [0.5, 0.5]
    assert len(user_balanced_weights([])) == 0
    data = PreferenceData(np.arange(4), np.arange(8), choice=[0] * 4, annotators=users, columns={"weight": weight})
    scores = Scores(torch.tensor([3.0, 0.0, 3.0, 0.0, 3.0, 0.0, -1.0, 0.0]))
    batch = ComparisonTable(data).batch(np.arange(4))
    balanced, _ = PairLoss("hinge", weights="weight").loss(scores, batch)
    assert float(balanced) == pytest.approx((0.0 + 2.0) / 2)
    assert float(PairLoss("hinge").loss(scores, batch)[0]) == pytest.approx(2.0 / 4)
    # normalised within the batch
    part = ComparisonTable(data).batch(np.array([0, 3]))
    part_loss, _ = PairLoss("hinge", weights="weight").loss(Scores(scores.values[[0, 1, 6, 7]]), part)
    assert float(part_loss) == pytest.approx(1.0 * 2.0 / (1 + 1 / 3))
    with pytest.raises(MissingColumnError, match="wight"):
        PairLoss(weights="wight").loss(scores, batch)
    wrong = ComparisonTable(
        PreferenceData(np.arange(1), np.arange(2), choice=[0], columns={"weight": np.array([-1.0])})
    ).batch(np.arange(1))
    with pytest.raises(InvalidInputError, match=r"comparison 0.*-1"):
        PairLoss(weights="weight").loss(Scores(torch.zeros(2)), wrong)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_fits_scores_and_is_stored(name, tmp_path):
    data, encoder, direction = planted(300)
    model = PreferenceModel(encoder, LinearHead, PairLoss(name)).fit(data, epochs=30, learning_rate=0.03)
    weight = model.head.linear.weight.detach().numpy()[0]
    assert weight @ direction / np.linalg.norm(weight) > 0.9
    model.save_pretrained(tmp_path)
    again = PreferenceModel.from_pretrained(tmp_path, encoder=encoder)
    assert again.likelihood == PairLoss(name)
    rows = np.arange(5)
    assert torch.equal(again.score(rows, rows), model.score(rows, rows))
    chance = model.probability(rows, rows, rows + 5)
    assert chance == pytest.approx(torch.sigmoid(model.score(rows, rows) - model.score(rows, rows + 5)))
    first, second = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0])
    assert PairLoss(name).pair_log_probability(first, second).exp().tolist() == pytest.approx([0.7310586, 0.5])
