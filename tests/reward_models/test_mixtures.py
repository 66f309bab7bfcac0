import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyreward.errors import InvalidInputError, UnknownNameError
from polyreward.reward_models.likelihoods import bradley_terry_loss
from polyreward.reward_models.mixtures import (
    ContextRouter,
    MixtureBTLoss,
    MultiHeadReward,
    bt_mixture_floor,
    head_regularizers,
    mixture_preference,
    mixture_score,
    router_report,
)

WEIGHTS = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
MARGINS = torch.tensor([[2.0, 0.0, -1.0]], dtype=torch.float64)


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def sigma(x):
    return 1 / (1 + math.exp(-x))


def test_the_worked_example():
    loss, parts = MixtureBTLoss()(MARGINS, WEIGHTS.log())
    assert set(parts) == {"nll", "neg_entropy"}
    assert float(parts["nll"]) == pytest.approx(0.439766, abs=1e-6)
    assert float(parts["neg_entropy"]) == pytest.approx(-1.029653, abs=1e-6)
    assert float(loss) == pytest.approx(-0.075060, abs=1e-6)
    assert float(mixture_preference(MARGINS, WEIGHTS)) == pytest.approx(math.exp(-0.439766), abs=1e-6)
    # Jensen: the mean of the losses is above the loss of the mean
    bound = float((WEIGHTS * -torch.nn.functional.logsigmoid(MARGINS)).sum())
    assert bound == pytest.approx(0.534060, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 1000), st.floats(0, 3))
def test_the_loss_equals_plain_python(samples, heads, seed, alpha):
    rng = np.random.default_rng(seed)
    margins, logits = rng.normal(scale=4, size=(2, samples, heads))
    nll, negative = 0.0, 0.0
    for i in range(samples):
        top = max(logits[i])
        total = sum(math.exp(v - top) for v in logits[i])
        shares = [math.exp(v - top) / total for v in logits[i]]
        chance = sum(f * sigma(m) for f, m in zip(shares, margins[i], strict=True))
        nll -= math.log(chance) / samples
        negative += sum(f * math.log(f) for f in shares) / samples
        found = float(mixture_preference(margins[i : i + 1], np.array([shares]))[0])
        assert found == pytest.approx(chance)
    loss, parts = MixtureBTLoss(alpha)(torch.from_numpy(margins), torch.from_numpy(logits))
    assert float(parts["nll"]) == pytest.approx(nll)
    assert float(parts["neg_entropy"]) == pytest.approx(negative)
    assert float(loss) == pytest.approx(nll + alpha * negative)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 5))
def test_permuting_heads_changes_nothing_and_swapping_responses_adds_to_one(seed, heads):
    rng = np.random.default_rng(seed)
    margins, logits = torch.from_numpy(rng.normal(scale=3, size=(2, 7, heads)))
    order = torch.from_numpy(rng.permutation(heads))
    loss = MixtureBTLoss()(margins, logits)[0]
    assert float(MixtureBTLoss()(margins[:, order], logits[:, order])[0]) == pytest.approx(float(loss))
    weights = logits.softmax(-1)
    won, lost = mixture_preference(margins, weights), mixture_preference(-margins, weights)
    assert torch.allclose(won + lost, torch.ones(7, dtype=torch.float64))
    assert torch.allclose(mixture_preference(margins[:, order], weights[:, order]), won)
    # the score of the released evaluators is no probability of that kind: differences of it miss the mixture
    values = torch.from_numpy(rng.normal(scale=3, size=(2, 7, heads)))
    log_weights = logits.log_softmax(-1)
    pointwise = [torch.exp(mixture_score(values[i], log_weights, "log_sigmoid")) for i in (0, 1)]
    assert not torch.allclose(sum(pointwise), torch.ones(7, dtype=torch.float64))


def test_a_mixture_of_probabilities_is_no_mixture_of_rewards():
    margins = torch.tensor([[9.0, -1.0]])
    weights = torch.tensor([0.4, 0.6])
    assert float(mixture_preference(margins, weights)) == pytest.approx(0.4 * sigma(9) + 0.6 * sigma(-1))
    assert float(mixture_preference(margins, weights)) < 0.6
    assert sigma(float((weights * margins).sum())) > 0.9


def test_one_head_or_equal_heads_are_bradley_terry():
    margins = torch.tensor([[0.3], [-2.0], [5.0]])
    usual = float(bradley_terry_loss(margins[:, 0]))
    loss, parts = MixtureBTLoss()(margins, torch.zeros(3, 1))
    assert float(loss) == pytest.approx(usual)
    assert float(parts["neg_entropy"]) == 0.0
    assert float(MixtureBTLoss()(margins.repeat(1, 4), torch.randn(3, 4))[1]["nll"]) == pytest.approx(usual)


def test_static_logits_are_those_of_every_row():
    margins, logits = torch.randn(5, 3), torch.randn(3)
    one, whole = MixtureBTLoss()(margins, logits)[0], MixtureBTLoss()(margins, logits.expand(5, 3))[0]
    assert torch.equal(one, whole)


def test_far_margins_and_logits_stay_finite_with_gradients():
    margins = torch.tensor([[-300.0, -400.0], [500.0, -1e4]], requires_grad=True)
    logits = torch.tensor([[200.0, -200.0], [-1e3, 1e3]], requires_grad=True)
    loss, parts = MixtureBTLoss()(margins, logits)
    # the head that likes the second pair has weight e^-2000, so the other pays 1e4 - 2000
    assert float(parts["nll"].detach()) == pytest.approx((300 + 2000) / 2)
    loss.backward()
    assert torch.isfinite(margins.grad).all()
    assert torch.isfinite(logits.grad).all()


def test_gradients_of_the_loss():
    margins, logits = torch.randn(2, 4, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda m, f: MixtureBTLoss(0.3)(m, f)[0], (margins.requires_grad_(), logits.requires_grad_())
    )


def test_half_precision_is_computed_in_single_and_types_are_kept():
    margins, logits = torch.randn(4, 3).half(), torch.randn(4, 3).half()
    loss = MixtureBTLoss()(margins, logits)[0]
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(MixtureBTLoss()(margins.double(), logits.double())[0]), rel=1e-5)
    assert mixture_preference(margins, logits.softmax(-1)).dtype == torch.float16
    assert mixture_preference(np.zeros((2, 2), np.float32), np.array([0.5, 0.5])).dtype == np.float32
    assert isinstance(mixture_preference([[0.0, 1.0]], [0.5, 0.5]), np.ndarray)


def test_an_empty_batch_has_loss_zero():
    loss, parts = MixtureBTLoss()(torch.zeros(0, 3, requires_grad=True), torch.zeros(0, 3))
    assert float(loss.detach()) == float(parts["nll"].detach()) == 0.0
    loss.backward()
    assert mixture_preference(torch.zeros(0, 3), torch.zeros(0, 3)).shape == (0,)


def test_wrong_calls():
    good, nan = torch.zeros(2, 3), torch.tensor([[0.0, 0.0, 0.0], [0.0, float("nan"), 0.0]])
    with pytest.raises(ValueError, match=r"margins\[1, 1\] is nan"):
        MixtureBTLoss()(nan, good)
    with pytest.raises(InvalidInputError, match=r"router_logits\[1, 1\] is nan"):
        MixtureBTLoss()(good, nan)
    with pytest.raises(InvalidInputError, match="with a head"):
        MixtureBTLoss()(torch.zeros(2, 0), torch.zeros(2, 0))
    with pytest.raises(InvalidInputError, match=r"router_logits have shape \(2, 2\)"):
        MixtureBTLoss()(good, torch.zeros(2, 2))
    for alpha in (-1.0, float("nan"), float("inf")):
        with pytest.raises(InvalidInputError, match="alpha"):
            MixtureBTLoss(alpha)
    for count in (0, -1, True, 1.5):
        with pytest.raises(ValueError, match="at least 1 head"):
            MultiHeadReward(4, count)
        with pytest.raises(ValueError, match="at least 1 head"):
            ContextRouter(4, count)
    with pytest.raises(ValueError, match=r"weights of row 1 are negative, NaN, or sum to 0\.9"):
        mixture_preference(good, torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.4, 0.0]]))
    with pytest.raises(InvalidInputError, match="row 0"):
        mixture_preference(good, torch.tensor([1.5, -0.5, 0.0]))
    with pytest.raises(InvalidInputError, match=r"margins\[1, 1\]"):
        mixture_preference(nan, torch.full((3,), 1 / 3))
    with pytest.raises(UnknownNameError, match="log_sigmoid"):
        mixture_score(good, good, "log_sigmoids")
    with pytest.raises(InvalidInputError, match="sum to"):
        mixture_preference(good.half(), torch.tensor([0.52, 0.5, 0.0]).half())
    # within the tolerance
    mixture_preference(good, torch.tensor([0.500004, 0.5, 0.0]))
    with pytest.raises(InvalidInputError, match="sum to"):
        mixture_preference(good, torch.tensor([0.50002, 0.5, 0.0]))


def test_shapes_of_heads_and_routers():
    assert MultiHeadReward(6, 3)(torch.zeros(5, 6)).shape == (5, 3)
    assert not MultiHeadReward(6, 3)(torch.zeros(5, 6)).any()
    assert MultiHeadReward(6, 3, bias=True)(torch.zeros(5, 6)).any()
    router = ContextRouter(4, 3)
    assert router(torch.zeros(5, 4)).shape == (5, 3)
    assert router.network[0].out_features == 128
    assert isinstance(ContextRouter(4, 3, hidden=None).network, torch.nn.Linear)
    # one prompt's weights depend on that prompt alone
    prompts = torch.randn(5, 4)
    assert torch.allclose(router(prompts)[2], router(prompts[2:3])[0], atol=1e-6)


def test_the_floor_of_the_worked_example():
    assert bt_mixture_floor([[0.9, 0.1]], [[0.5, 0.5]]) == pytest.approx(0.645083, abs=1e-6)
    assert bt_mixture_floor(torch.tensor([[0.9, 0.1]]), torch.tensor([0.5, 0.5])) == pytest.approx(0.645083, abs=1e-6)
    assert bt_mixture_floor([[0.9, 0.1]], [[0.5, 0.5]], rho=0.0) == pytest.approx(0.325083, abs=1e-6)
    # groups that agree, and groups that are sure
    assert bt_mixture_floor([[0.8, 0.8]], [[0.3, 0.7]]) == pytest.approx(-0.8 * math.log(0.8) - 0.2 * math.log(0.2))
    assert bt_mixture_floor([[1.0, 0.0]], [[0.5, 0.5]]) == pytest.approx(0.5)


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 2000))
def test_no_single_reward_is_below_the_floor(situations, groups, seed):
    rng = np.random.default_rng(seed)
    probs, weights = rng.random((situations, groups)), rng.dirichlet(np.ones(groups), situations)
    rho, slow, best = weights.min(), 0.0, 0.0
    for p, w in zip(probs, weights, strict=True):
        mean = sum(p) / groups
        slow += 2 * rho * sum((v - mean) ** 2 for v in p) / situations
        slow -= sum(s * (v * math.log(v) + (1 - v) * math.log(1 - v)) for v, s in zip(p, w, strict=True)) / situations
        pooled = float(w @ p)
        best -= (pooled * math.log(pooled) + (1 - pooled) * math.log(1 - pooled)) / situations
    floor = bt_mixture_floor(probs, weights)
    assert floor == pytest.approx(slow)
    assert best >= floor - 1e-12


def test_wrong_floors():
    with pytest.raises(InvalidInputError, match="no rows"):
        bt_mixture_floor(np.zeros((0, 2)), np.zeros((0, 2)))
    for bad in (1.2, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"group_probs of row 1 are not probabilities"):
            bt_mixture_floor([[0.5, 0.5], [0.5, bad]], [0.5, 0.5])
    with pytest.raises(InvalidInputError, match=r"sum to 1\.1"):
        bt_mixture_floor([[0.5, 0.5]], [[0.5, 0.6]])
    with pytest.raises(InvalidInputError, match="rho must be between"):
        bt_mixture_floor([[0.5, 0.5]], [[0.4, 0.6]], rho=0.5)


def test_collapse_can_be_seen():
    none = router_report(torch.zeros(6, 3).log_softmax(-1))
    one = router_report(torch.tensor([[0.0, -torch.inf, -torch.inf]] * 6))
    each = router_report(torch.eye(3).log().repeat(2, 1))
    assert none == pytest.approx({"entropy": 1.0, "usage_entropy": 1.0})
    assert one == pytest.approx({"entropy": 0.0, "usage_entropy": 0.0})
    assert each == pytest.approx({"entropy": 0.0, "usage_entropy": 1.0})
    assert (
        router_report(torch.zeros(0, 3)) == router_report(torch.zeros(4, 1)) == {"entropy": 1.0, "usage_entropy": 1.0}
    )


def test_regularizers_by_hand():
    weight = torch.tensor([[3.0, 4.0], [4.0, -3.0], [1.0, 0.0]])
    found = head_regularizers(weight)
    assert float(found["orthogonality"]) == pytest.approx((0 + 3 + 4) / 3)
    assert float(found["norm"]) == pytest.approx((4 + 4 + 0) / 3)
    # of two entries, correlations are signs
    assert float(found["correlation"]) == pytest.approx(1.0)
    longer = torch.randn(2, 9, dtype=torch.float64)
    assert float(head_regularizers(longer)["correlation"]) == pytest.approx(abs(np.corrcoef(longer.numpy())[0, 1]))
    single = head_regularizers(torch.ones(1, 4))
    assert [float(single[name]) for name in ("orthogonality", "correlation")] == [0.0, 0.0]
    flat = torch.ones(2, 3, requires_grad=True)
    head_regularizers(flat)["correlation"].backward()
    assert torch.isfinite(flat.grad).all()
