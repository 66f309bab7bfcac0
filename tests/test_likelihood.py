import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyreward.errors import InvalidInputError, UnknownNameError
from polyreward.likelihood import (
    KINDS,
    jepo_advantages,
    jepo_bound,
    likelihood_values,
    perplexity,
    rloo,
    underflow_count,
)

WORKED = np.log([[[0.5, 0.25, 0.8]]])


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("log-prob", -2.302585),
        ("prob", 0.1),
        ("avg-prob", 0.516667),
        ("avg-log-prob", -0.767528),
        ("geo-prob", 0.464159),
        ("jepo", -2.302585),
        ("avg_log_prob", -0.767528),
    ],
)
def test_values_of_the_worked_example(kind, value):
    assert likelihood_values(WORKED, kind=kind) == pytest.approx(np.array([[value]]), abs=1e-6)
    tensor = likelihood_values(torch.from_numpy(WORKED).float(), kind=kind)
    assert tensor.dtype == torch.float32
    assert tensor.item() == pytest.approx(value, abs=1e-6)


def test_group_bound_and_baselines_of_the_worked_example():
    values = np.array([[-1.0, -2.0, -4.0]])
    assert jepo_bound(values) == pytest.approx(np.array([-1.749600]), abs=1e-6)
    assert jepo_bound(np.array([-2.0, -4.0])) == pytest.approx(-2.566219, abs=1e-6)
    assert jepo_bound(np.array([-1.0, -4.0])) == pytest.approx(-1.644560, abs=1e-6)
    assert jepo_bound(np.array([-1.0, -2.0])) == pytest.approx(-1.379885, abs=1e-6)
    assert jepo_advantages(values) == pytest.approx(np.array([[0.816619, -0.105040, -0.369715]]), abs=1e-6)
    assert rloo(values) == pytest.approx(np.array([[2.0, 0.5, -2.5]]))
    assert rloo(np.exp(values)) == pytest.approx(np.array([[0.2911, -0.0578, -0.2333]]), abs=1e-4)


def test_one_token_and_one_chain():
    logp = torch.randn(3, 4, 1).sigmoid().log()
    prob = likelihood_values(logp, kind="prob")
    assert torch.allclose(prob, likelihood_values(logp, kind="avg-prob"))
    assert torch.allclose(prob, likelihood_values(logp, kind="geo-prob"))
    single = torch.randn(3, 1, 5).sigmoid().log()
    assert torch.allclose(likelihood_values(single, kind="jepo"), likelihood_values(single, kind="log-prob"))


groups = st.lists(st.floats(-300, 0), min_size=2, max_size=8)


@given(groups)
def test_rloo_and_jepo_equal_plain_python(values):
    table = np.array([values])
    plain = [v - (sum(values) - v) / (len(values) - 1) for v in values]
    assert rloo(table)[0] == pytest.approx(plain, abs=1e-9)
    assert rloo(table).sum() == pytest.approx(0, abs=1e-8)

    def bound(some):
        top = max(some)
        return top + math.log(sum(math.exp(v - top) for v in some) / len(some))

    assert jepo_bound(table)[0] == pytest.approx(bound(values), abs=1e-9)
    assert np.mean(values) - 1e-9 <= jepo_bound(table)[0] <= max(values) + 1e-9
    others = [bound(values) - bound(values[:i] + values[i + 1 :]) for i in range(len(values))]
    assert jepo_advantages(table)[0] == pytest.approx(others, abs=1e-8)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 6), st.integers(0, 10**6))
def test_values_equal_plain_python_and_do_not_see_padding(prompts, group, length, seed):
    rng = np.random.default_rng(seed)
    logp = -rng.exponential(2, size=(prompts, group, length))
    mask = rng.random(logp.shape) < 0.7
    mask[..., 0] = True
    spoiled = np.where(mask, logp, np.nan)
    for p in range(prompts):
        for g in range(group):
            own = [float(x) for x, keep in zip(logp[p, g], mask[p, g], strict=True) if keep]
            total = sum(own)
            expected = {
                "prob": math.exp(total),
                "avg-prob": sum(map(math.exp, own)) / len(own),
                "geo-prob": math.exp(total / len(own)),
                "log-prob": total,
                "avg-log-prob": total / len(own),
            }
            for kind, value in expected.items():
                assert likelihood_values(spoiled, mask, kind)[p, g] == pytest.approx(value, rel=1e-9, abs=1e-300)


def test_masks_of_a_prompt_and_half_precision():
    logp = torch.randn(2, 3, 4).sigmoid().log()
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    full = mask.unsqueeze(1).expand(2, 3, 4)
    assert torch.equal(likelihood_values(logp, mask), likelihood_values(logp, full))
    half = likelihood_values(logp.bfloat16(), mask, "prob")
    assert half.dtype == torch.float32
    assert torch.allclose(half, likelihood_values(logp.bfloat16().float(), mask, "prob"))


def test_impossible_tokens_are_floored_in_logs_and_zero_as_probabilities():
    logp = torch.tensor([[[-1.0, -torch.inf], [-1.0, -150.0]]])
    assert likelihood_values(logp).tolist() == [[-101, -101]]
    assert likelihood_values(logp, token_floor=-7.0).tolist() == [[-8, -8]]
    assert likelihood_values(logp, kind="avg-log-prob").tolist() == [[-50.5, -50.5]]
    assert likelihood_values(logp, kind="prob").tolist() == [[0, 0]]
    assert likelihood_values(logp, kind="avg-prob")[0, 0].item() == pytest.approx(math.exp(-1) / 2)
    assert torch.isfinite(likelihood_values(logp, kind="jepo")).all()


def test_underflow_is_counted_and_the_bound_survives_it():
    logp = torch.full((1, 3, 24), -math.log(16))
    logp[0, 1] = -5.0  # exp(-120) is 0 in float32
    assert likelihood_values(logp, kind="prob")[0, 1] == 0
    assert underflow_count(logp) == 1
    assert underflow_count(logp.double()) == 0
    assert underflow_count(logp, kind="log-prob") == 0
    logp[0, 1, 0] = -torch.inf  # impossible, not underflow
    assert underflow_count(logp) == 0
    low = torch.tensor([[-800.0, -801.0]])
    assert jepo_bound(low).item() == pytest.approx(-800 + math.log((1 + math.exp(-1)) / 2), abs=1e-4)
    assert torch.isfinite(jepo_advantages(low)).all()


def test_failed_chains_earn_the_lowest_value():
    logp = torch.tensor([[[-1.0, -1.0], [torch.nan, torch.nan]]])
    mask = torch.tensor([[[1, 1], [0, 0]]])
    failed = torch.tensor([[False, True]])
    assert likelihood_values(logp, mask, failed=failed).tolist() == [[-2, -200]]
    assert likelihood_values(logp, mask, "avg-log-prob", failed=failed).tolist() == [[-1, -100]]
    assert likelihood_values(logp, mask, "prob", failed=failed)[0, 1] == 0
    bound = likelihood_values(logp, mask, "jepo", failed=failed)
    assert bound[0, 0].item() == pytest.approx(-2 - math.log(2))
    assert underflow_count(logp, mask, failed=failed) == 0


def test_perplexity_of_a_mixture():
    logp = np.log([[[0.5, 0.5], [0.1, 0.1]]])
    assert perplexity(logp) == pytest.approx(np.array([((0.25 + 0.01) / 2) ** -0.5]))
    assert perplexity(logp, failed=[[False, True]]) == pytest.approx(np.array([(0.25 / 2) ** -0.5]))


def test_missing_samples_take_no_part():
    values = np.array([[1.0, np.nan, 3.0]])
    assert rloo(values) == pytest.approx(np.array([[-2, 0, 2]]))
    assert jepo_bound(np.array([[-1.0, np.nan, -2.0]])) == pytest.approx(jepo_bound(np.array([[-1.0, -2.0]])))
    advantages = jepo_advantages(np.array([[-1.0, np.nan, -2.0]]))
    assert advantages[0, 1] == 0
    assert advantages[0, [0, 2]] == pytest.approx(jepo_advantages(np.array([[-1.0, -2.0]]))[0])
    assert np.isfinite(jepo_advantages(np.array([[-np.inf, -np.inf, -1.0]]))).all()


def test_equal_values_have_advantage_exactly_zero():
    assert torch.equal(rloo(torch.full((2, 5), -7.3)), torch.zeros(2, 5))


def test_gradients_reach_the_tokens_that_count():
    logp = torch.randn(2, 3, 4, dtype=torch.float64).sigmoid().log().requires_grad_(True)
    mask = torch.rand(2, 3, 4) < 0.7
    mask[..., 0] = True
    for kind in KINDS:
        assert torch.autograd.gradcheck(lambda x, k=kind: likelihood_values(x, mask, k), (logp,))
    assert torch.autograd.gradcheck(jepo_bound, (logp.sum(-1),))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: likelihood_values(np.zeros((2, 3))), r"\(P, G, L\), got \(2, 3\)"),
        (lambda: likelihood_values(np.zeros((1, 2, 3)), np.ones((1, 3, 3))), r"mask has shape \(1, 3, 3\)"),
        (lambda: likelihood_values(np.zeros((1, 2, 3)), np.zeros((1, 2, 3))), "prompt 0, sample 0 has no token"),
        (lambda: likelihood_values(np.array([[[0.0], [np.nan]]])), "prompt 0, sample 1, token 0 is NaN"),
        (lambda: likelihood_values(np.array([[[2.0]]])), "above 0"),
        (lambda: likelihood_values(np.zeros((1, 2, 3)), failed=[True]), r"failed has shape \(1,\)"),
        (lambda: likelihood_values(np.zeros((1, 2, 3)), token_floor=1.0), "token_floor"),
        (lambda: rloo(np.zeros((3, 1))), "at least 2 of them, got G = 1"),
        (lambda: rloo(np.zeros((1, 2, 3))), "needs values"),
        (lambda: rloo(np.array([[0.0, -np.inf]])), r"\(0, 1\) is infinite"),
        (lambda: jepo_advantages(np.zeros((1, 1))), "at least 2"),
    ],
)
def test_errors_say_where(call, message):
    with pytest.raises(InvalidInputError, match=message):
        call()


def test_unknown_kinds_offer_the_nearest():
    with pytest.raises(UnknownNameError, match="did you mean 'log-prob'"):
        likelihood_values(WORKED, kind="log-probs")
