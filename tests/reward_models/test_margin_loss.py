import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyreward.errors import InvalidInputError
from polyreward.reward_models.margin_loss import BTLoss


@pytest.mark.parametrize(
    ("target", "margin", "expected"), [(1.0, 0.5, 0.403186), (1.0, 0.0, 0.263282), (0.9, 0.0, 0.383282)]
)
def test_the_worked_examples(target, margin, expected):
    difference = torch.tensor([1.2], dtype=torch.float64)
    assert float(BTLoss(target, margin)(difference)) == pytest.approx(expected, abs=1e-6)
    passed = BTLoss()(difference, torch.tensor([target]), torch.tensor([margin]))
    assert float(passed) == pytest.approx(expected, abs=1e-6)


def test_soft_and_margin_with_certain_labels_is_the_margin_loss():
    d, m = torch.tensor([1.2, -0.7]), torch.tensor([0.5, -0.25])
    assert torch.equal(BTLoss(target=torch.ones(2), margin=m)(d), BTLoss(margin=m)(d))


def minimiser(target, margin=0.0):
    d = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([d], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = BTLoss(target, margin)(d)
        loss.backward()
        return loss

    optimizer.step(closure)
    return float(d.detach()), float(BTLoss(target, margin)(d.detach()))


def test_minimisers():
    at, value = minimiser(0.5)
    assert at == pytest.approx(0.0, abs=1e-6)
    assert value == pytest.approx(math.log(2), abs=1e-9)
    for mu in (-1.5, 0.3, 2.0):
        assert minimiser(1 / (1 + math.exp(-mu)))[0] == pytest.approx(mu, abs=1e-4)
        assert minimiser(1 / (1 + math.exp(-mu)), margin=mu)[0] == pytest.approx(2 * mu, abs=1e-4)


@settings(max_examples=60, deadline=None)
@given(st.floats(-30, 30), st.floats(0, 1), st.floats(-5, 5))
def test_equals_plain_python_and_its_mirror(d, t, m):
    def log_sigma(x):
        return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))

    slow = -(t * log_sigma(d - m) + (1 - t) * log_sigma(m - d))
    one = torch.tensor([d], dtype=torch.float64)
    assert float(BTLoss(t, m)(one)) == pytest.approx(slow, abs=1e-9)
    assert float(BTLoss(1 - t, -m)(-one)) == pytest.approx(slow, abs=1e-9)


def test_a_pair_that_is_far_off_keeps_its_gradient():
    d = torch.tensor([-80.0], requires_grad=True)
    loss = BTLoss()(d)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(80.0)
    assert float(d.grad) == pytest.approx(-1.0)


def test_shapes_dtypes_and_wrong_calls():
    d = torch.tensor([1.0, 2.0], dtype=torch.bfloat16)
    assert BTLoss()(d).dtype == torch.float32
    assert BTLoss(reduction="none")(d).shape == (2,)
    assert float(BTLoss()(torch.zeros(0))) == 0.0
    with pytest.raises(ValueError, match=r"probabilities in \[0, 1\]"):
        BTLoss(target=torch.tensor([0.5, 1.1]))(d)
    with pytest.raises(ValueError, match=r"probabilities in \[0, 1\]"):
        BTLoss(target=math.nan)(d)
    with pytest.raises(InvalidInputError, match=r"margin has shape \(3,\), the differences \(2,\)"):
        BTLoss(margin=torch.zeros(3))(d)
    with pytest.raises(InvalidInputError, match=r"target has shape \(2, 1\)"):
        BTLoss()(d, torch.ones(2, 1))
    with pytest.raises(InvalidInputError, match="NaN"):
        BTLoss(margin=math.nan)(d)
    with pytest.raises(InvalidInputError, match="NaN"):
        BTLoss()(torch.tensor([math.nan]))
