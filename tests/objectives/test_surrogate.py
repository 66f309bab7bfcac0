import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyreward import RewardBatch
from polyreward.errors import InvalidInputError, UnknownNameError
from polyreward.grouped import factorize
from polyreward.objectives import (
    ElasticTrustRegion,
    EntropyBonus,
    EntropyHinge,
    FixedClip,
    KLPenalty,
    PolicyObjective,
    aggregate,
    clipped_surrogate,
    importance_ratio,
    kl_estimate,
    task_entropy,
)

NAN = float("nan")


def tensors(seed=0, rows=6, tokens=5, dtype=torch.float64, shift=0.4):
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(rows, tokens, generator=generator, dtype=dtype) * 3
    logp = old + shift * torch.randn(rows, tokens, generator=generator, dtype=dtype)
    lengths = torch.randint(1, tokens + 1, (rows,), generator=generator)
    mask = torch.arange(tokens) < lengths[:, None]
    advantages = torch.randn(rows, generator=generator, dtype=dtype)
    return logp.requires_grad_(), old, advantages, mask


def slow_loss(objective, logp, old, advantages, mask, low, high, reference=None):
    logp = logp.detach()
    rows, tokens = logp.shape
    losses = []
    for i in range(rows):
        kept = [t for t in range(tokens) if mask[i, t]]
        for t in kept:
            log_ratio = float(logp[i, t] - old[i, t])
            if objective.ratio == "sequence":
                log_ratio = sum(float(logp[i, u] - old[i, u]) for u in kept) / len(kept)
            ratio = math.exp(max(-20.0, min(20.0, log_ratio)))
            a = float(advantages[i] if advantages.ndim == 1 else advantages[i, t])
            clipped = max(1 - float(low[i]), min(1 + float(high[i]), ratio))
            gain = min(ratio * a, clipped * a)
            if objective.dual_clip is not None and a < 0:
                gain = max(gain, objective.dual_clip * a)
            loss = -gain
            if objective.kl is not None:
                d = float(logp[i, t] - reference[i, t])
                loss += (
                    objective.kl.weight * {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) + d - 1}[objective.kl.estimator]
                )
            losses.append((i, loss))
    if objective.aggregation == "token-mean":
        return sum(x for _, x in losses) / len(losses)
    if objective.aggregation == "fixed-length":
        return sum(x for _, x in losses) / (rows * objective.length)
    per_row = [[x for j, x in losses if j == i] for i in range(rows)]
    return sum(sum(x) / len(x) if x else 0.0 for x in per_row) / rows


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    ratio=st.sampled_from(["token", "sequence"]),
    aggregation=st.sampled_from(["sequence-mean", "token-mean", "fixed-length"]),
    estimator=st.sampled_from([None, "k1", "k2", "k3"]),
    dual_clip=st.sampled_from([None, 1.3, 3.0]),
    by_token=st.booleans(),
)
def test_equals_a_plain_reference(seed, ratio, aggregation, estimator, dual_clip, by_token):
    logp, old, advantages, mask = tensors(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    low, high = torch.rand(2, len(logp), generator=generator, dtype=torch.float64) * 0.5
    reference = old + 0.3 * torch.randn(old.shape, generator=generator, dtype=torch.float64)
    if by_token:
        advantages = torch.randn(logp.shape, generator=generator, dtype=torch.float64)
    objective = PolicyObjective(
        ratio=ratio,
        aggregation=aggregation,
        length=7 if aggregation == "fixed-length" else None,
        kl=None if estimator is None else KLPenalty(0.3, estimator),
        dual_clip=dual_clip,
    )
    loss = objective(logp, old, advantages, mask, low=low, high=high, reference_logp=reference).loss
    expected = slow_loss(objective, logp, old, advantages, mask, low, high, reference)
    assert float(loss.detach()) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize(("high", "active"), [(0.28, True), (0.2, False)])
def test_ratio_of_1_25_is_active_or_clipped(high, active):
    logp = torch.tensor([[math.log(1.25)]], dtype=torch.float64, requires_grad=True)
    result = PolicyObjective(FixedClip(0.2, high))(logp, torch.zeros(1, 1), torch.ones(1), torch.ones(1, 1))
    result.loss.backward()
    assert float(logp.grad) == pytest.approx(-1.25 if active else 0.0)
    assert float(result.metrics["clip_fraction"]) == (0.0 if active else 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_elasticity_is_bit_identical_to_a_fixed_clip(dtype):
    logp, old, _, mask = tensors(3, rows=16, dtype=dtype)
    rewards = (torch.arange(16) % 3 == 0).to(dtype)
    advantages = (rewards - rewards.mean()) / rewards.std(correction=0)
    for low, high in [(0.2, 0.2), (0.2, 0.28), (0.1, 0.3)]:
        fixed = PolicyObjective(FixedClip(low, high))
        elastic = PolicyObjective(ElasticTrustRegion(low=low, high=high, micro=0, macro=0))
        bounds = elastic.bounds(advantages, RewardBatch(rewards))
        first = fixed(logp, old, advantages, mask).loss
        second = elastic(logp, old, advantages, mask, low=bounds[0], high=bounds[1]).loss
        assert torch.equal(first, second)
        assert torch.equal(*(torch.autograd.grad(loss, logp)[0] for loss in (first, second)))


def test_on_policy_step_does_not_depend_on_the_radius():
    logp, _, advantages, mask = tensors(4)
    found = []
    for radius in (0.0, 0.02, 0.2, torch.linspace(0.01, 0.9, 6)):
        loss = PolicyObjective()(logp, logp.detach(), advantages, mask, low=radius, high=radius).loss
        found.append((loss, torch.autograd.grad(loss, logp)[0]))
    for loss, gradient in found[1:]:
        assert torch.equal(loss, found[0][0])
        assert torch.equal(gradient, found[0][1])


def test_no_gradient_reaches_bounds_advantages_or_old_policy():
    logp, old, advantages, mask = tensors(5)
    low, high = (torch.full((6,), 0.2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    inputs = (low, high, advantages.requires_grad_(), old.requires_grad_())
    loss = PolicyObjective()(logp, old, advantages, mask, low=low, high=high).loss
    assert torch.autograd.grad(loss, inputs, allow_unused=True) == (None,) * 4


def test_elastic_region_needs_bounds():
    logp, old, advantages, mask = tensors()
    with pytest.raises(InvalidInputError, match=r"objective\.bounds"):
        PolicyObjective(ElasticTrustRegion())(logp, old, advantages, mask)


def test_radii_of_any_shape_agree():
    logp, old, advantages, mask = tensors(6)
    radius = torch.linspace(0.05, 0.5, 6, dtype=torch.float64)
    shapes = (radius, radius[:, None], radius[:, None].expand(6, 5))
    losses = [PolicyObjective()(logp, old, advantages, mask, low=r, high=r).loss for r in shapes]
    assert losses[0] == losses[1] == losses[2]
    for wrong in (radius[:5], radius[None], torch.ones(6, 4)):
        with pytest.raises(InvalidInputError, match="low has shape"):
            PolicyObjective()(logp, old, advantages, mask, low=wrong, high=0.2)


def test_dual_clip_bounds_negative_samples_only():
    ratio = torch.tensor([[5.0], [5.0]], dtype=torch.float64, requires_grad=True)
    losses = clipped_surrogate(ratio, torch.tensor([[-1.0], [1.0]]), 0.2, torch.tensor([[0.2], [9.0]]), dual_clip=3.0)
    assert losses.flatten().tolist() == [3.0, -5.0]
    assert torch.autograd.grad(losses.sum(), ratio)[0].flatten().tolist() == [0.0, -1.0]


def test_log_ratio_is_clamped():
    logp = torch.tensor([[500.0, -500.0]], requires_grad=True)
    result = PolicyObjective(kl=KLPenalty(0.1))(
        logp, torch.zeros(1, 2), -torch.ones(1), torch.ones(1, 2), reference_logp=torch.zeros(1, 2)
    )
    result.loss.backward()
    assert torch.isfinite(result.loss)
    assert torch.isfinite(logp.grad).all()
    assert float(result.metrics["ratio/max"]) == pytest.approx(math.exp(20), rel=1e-5)


def test_kl_estimators():
    logp, reference = torch.tensor([-1.0]), torch.tensor([-1.5])
    assert float(kl_estimate(logp, reference, "k1")) == 0.5
    assert float(kl_estimate(logp, reference, "k2")) == 0.125
    assert float(kl_estimate(logp, reference, "k3")) == pytest.approx(math.exp(-0.5) + 0.5 - 1)
    with pytest.raises(UnknownNameError, match="no KL estimator 'k4'"):
        kl_estimate(logp, reference, "k4")


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_kl_estimators_are_unbiased(estimator):
    generator = torch.Generator().manual_seed(0)
    policy, other = (torch.randn(5, generator=generator, dtype=torch.float64).log_softmax(0) for _ in range(2))
    expected = (policy.exp() * (policy - other)).sum()
    assert float((policy.exp() * kl_estimate(policy, other, estimator)).sum()) == pytest.approx(float(expected))


def test_aggregations_literal():
    losses = torch.tensor([[1.0, 2.0, 3.0], [10.0, 99.0, 99.0], [99.0, 99.0, 99.0]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]], dtype=torch.bool)
    assert float(aggregate(losses, mask, "sequence-mean")) == pytest.approx((2 + 10 + 0) / 3)
    assert float(aggregate(losses, mask, "token-mean")) == pytest.approx(16 / 4)
    assert float(aggregate(losses, mask, "fixed-length", length=8)) == pytest.approx(16 / 24)
    assert float(aggregate(losses, mask, "sequence-mean", normaliser=6)) == pytest.approx(2)
    assert float(aggregate(losses, mask, "token-mean", normaliser=torch.tensor(8))) == pytest.approx(2)
    assert float(aggregate(losses, mask, "fixed-length", length=8, normaliser=2)) == pytest.approx(1)


@pytest.mark.parametrize("aggregation", ["sequence-mean", "token-mean", "fixed-length"])
def test_micro_batches_with_a_normaliser_add_up(aggregation):
    logp, old, advantages, mask = tensors(7)
    objective = PolicyObjective(aggregation=aggregation, length=9 if aggregation == "fixed-length" else None)
    whole = objective(logp, old, advantages, mask).loss
    number = int(mask.sum()) if aggregation == "token-mean" else 6
    parts = [
        objective(logp[s], old[s], advantages[s], mask[s], normaliser=number).loss for s in (slice(2), slice(2, 6))
    ]
    assert float(sum(parts)) == pytest.approx(float(whole), abs=1e-12)


@pytest.mark.parametrize("aggregation", ["sequence-mean", "token-mean"])
def test_the_entropy_bonus_of_micro_batches_adds_up_by_their_share(aggregation):
    logp, old, advantages, mask = tensors(7)
    objective = PolicyObjective(aggregation=aggregation, entropy=EntropyBonus(0.5))
    number = int(mask.sum()) if aggregation == "token-mean" else 6
    losses, zero = [], torch.zeros_like(advantages)
    for s in (slice(2), slice(2, 6)):
        losses.append(objective(logp[s], old[s], zero[s], mask[s], entropy=-logp[s], normaliser=number).loss)
    means = [float((-logp[s] * mask[s]).sum() / mask[s].sum()) for s in (slice(2), slice(2, 6))]
    shares = [
        float(mask[s].sum()) / number if aggregation == "token-mean" else len(mask[s]) / 6
        for s in (slice(2), slice(2, 6))
    ]
    assert sum(map(float, losses)) == pytest.approx(-0.5 * sum(m * w for m, w in zip(means, shares, strict=True)))
    if aggregation == "token-mean":
        whole = objective(logp, old, zero, mask, entropy=-logp).loss
        assert sum(map(float, losses)) == pytest.approx(float(whole))


def test_what_stands_outside_the_mask_does_not_matter():
    values, mask = torch.tensor([[1.0, torch.nan], [torch.inf, 3.0]]), torch.tensor([[True, False], [False, True]])
    assert float(aggregate(values, mask)) == 2
    assert importance_ratio(values, values, mask, "sequence").tolist() == [[1.0], [1.0]]
    assert float(EntropyBonus(1.0)(values, mask)) == -2
    mean, present = task_entropy(values, mask, factorize(["a", "b"]))
    assert mean.tolist() == [1.0, 3.0]
    assert present.all()


def test_unknown_names_are_refused_in_functions_too():
    ones, mask = torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(UnknownNameError, match="no ratio 'sentence'"):
        importance_ratio(ones, ones, mask, "sentence")
    with pytest.raises(UnknownNameError, match="no aggregation 'mean'"):
        aggregate(ones, mask, "mean")
    with pytest.raises(InvalidInputError, match="needs a positive length"):
        aggregate(ones, mask, "fixed-length")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"kl": 0.1}, "kl must be a KLPenalty, got 0.1"),
        ({"entropy": "hinge"}, "entropy must be a EntropyBonus or EntropyHinge, got 'hinge'"),
        ({"trust_region": "elastic"}, "trust_region must be a FixedClip or ElasticTrustRegion"),
    ],
)
def test_what_is_no_part_is_refused(parts, message):
    with pytest.raises(InvalidInputError, match=message):
        PolicyObjective(**parts)


def test_clip_fractions_by_sign_and_strength():
    # Ratios 2 and 1/2; a sample is clipped where its advantage pushes further the same way.
    logp = torch.tensor([2.0, 0.5, 2.0, 0.5, 2.0, 1.0]).log()[:, None].requires_grad_()
    advantages = torch.tensor([3.0, -2.5, -1.0, 0.9, 0.1, -0.2])
    metrics = PolicyObjective()(logp, torch.zeros(6, 1), advantages, torch.ones(6, 1)).metrics
    expected = {"": 3 / 6, "/positive": 2 / 3, "/negative": 1 / 3, "/small": 1 / 2, "/medium": 0.0, "/large": 1.0}
    for name, value in expected.items():
        assert float(metrics[f"clip_fraction{name}"]) == pytest.approx(value), name
    assert float(metrics["ratio/mean"]) == pytest.approx(8 / 6)
    assert float(metrics["ratio/min"]) == pytest.approx(0.5)
    assert float(metrics["ratio/max"]) == pytest.approx(2.0)
    assert float(metrics["radius/mean"]) == pytest.approx(0.2)


def test_metrics_ignore_masked_tokens_and_count_sequences_for_a_sequence_ratio():
    logp = torch.tensor([[3.0, 3.0], [0.0, 7.0]]).requires_grad_()
    mask = torch.tensor([[1, 1], [1, 0]])
    radius = torch.tensor([0.1, 0.3])
    token = PolicyObjective()(logp, torch.zeros(2, 2), torch.ones(2), mask, low=radius, high=radius).metrics
    assert float(token["clip_fraction"]) == pytest.approx(2 / 3)
    sequence = PolicyObjective(ratio="sequence")(logp, torch.zeros(2, 2), torch.ones(2), mask, low=radius, high=radius)
    assert float(sequence.metrics["clip_fraction"]) == 0.5
    assert float(sequence.metrics["radius/mean"]) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"mask": torch.ones(6, 4)}, "mask has shape"),
        ({"old_logp": torch.zeros(5, 5)}, "old_logp has shape"),
        ({"advantages": torch.zeros(5)}, "advantages has shape"),
        ({"advantages": torch.zeros(6, 1)}, "advantages has shape"),
        ({"logp": torch.zeros(6)}, "logp must have shape"),
        ({"entropy": torch.zeros(6, 4)}, "entropy has shape"),
        ({"entropy": torch.zeros(6, 5), "tasks": ["a"]}, "tasks has 1 entries"),
    ],
)
def test_refuses_shapes(change, match):
    names = ("logp", "old_logp", "advantages", "mask")
    with pytest.raises(InvalidInputError, match=match):
        PolicyObjective()(**{**dict(zip(names, tensors(), strict=True)), **change})


def test_refuses_options_and_missing_inputs():
    logp, old, advantages, mask = tensors()
    with pytest.raises(InvalidInputError, match="needs reference_logp"):
        PolicyObjective(kl=KLPenalty(0.1))(logp, old, advantages, mask)
    with pytest.raises(InvalidInputError, match="needs entropy"):
        PolicyObjective(entropy=EntropyBonus(0.1))(logp, old, advantages, mask)
    with pytest.raises(UnknownNameError, match="did you mean 'token-mean'"):
        PolicyObjective(aggregation="token-men")
    with pytest.raises(UnknownNameError, match="did you mean 'sequence'"):
        PolicyObjective(ratio="sequences")
    for options in ({"length": 5}, {"aggregation": "fixed-length"}, {"dual_clip": 1.0}):
        with pytest.raises(InvalidInputError):
            PolicyObjective(**options)
    with pytest.raises(InvalidInputError):
        PolicyObjective(aggregation="fixed-length", length=0)
    for weight in (-1.0, NAN, math.inf):
        for part in (KLPenalty, EntropyBonus):
            with pytest.raises(InvalidInputError):
                part(weight)
    with pytest.raises(InvalidInputError, match="of maths needs"):
        EntropyHinge(by_task={"maths": (0.5, 0.4)})
    assert EntropyHinge(by_task={9: [0.5, 0.6]}) == EntropyHinge(by_task={"9": (0.5, 0.6)})


@pytest.mark.parametrize(("value", "term"), [(0.1, 0.1), (0.4, 0.0), (1.0, 0.4)])
def test_hinge_literal(value, term):
    result = PolicyObjective(entropy=EntropyHinge(0.2, 0.6, weight=1.0))(
        torch.full((2, 3), -value), torch.full((2, 3), -value), torch.zeros(2), torch.ones(2, 3)
    )
    assert float(result.loss) == pytest.approx(term, abs=1e-6)


def test_hinge_by_task_and_its_gradient():
    logp = torch.tensor(
        [[-1.0, -1.0], [-0.1, NAN], [-0.1, -0.3], [-9.0, -9.0]], dtype=torch.float64, requires_grad=True
    )
    mask = torch.tensor([[1, 1], [1, 0], [1, 1], [0, 0]])
    hinge = EntropyHinge(0.2, 0.6, weight=0.5, by_task={"ocr": (0.3, 0.4)})
    result = PolicyObjective(entropy=hinge)(
        logp, logp.detach(), torch.zeros(4), mask, tasks=["maths", "ocr", "ocr", "absent"]
    )
    # maths: 1.0 - 0.6; ocr: 0.3 - (0.1 + 0.1 + 0.3) / 3; the task without tokens has no term.
    assert float(result.loss) == pytest.approx(0.5 * (0.4 + 0.3 - 0.5 / 3))
    assert float(result.metrics["entropy/ocr"]) == pytest.approx(0.5 / 3)
    assert "entropy/absent" not in result.metrics
    result.loss.backward()
    expected = [[-0.25, -0.25], [0.5 / 3, 0.0], [0.5 / 3, 0.5 / 3], [0.0, 0.0]]
    torch.testing.assert_close(logp.grad, torch.tensor(expected, dtype=torch.float64))


def test_entropy_bonus_is_the_mean_over_tokens():
    entropy = torch.tensor([[1.0, 3.0], [5.0, NAN]], requires_grad=True)
    mask = torch.tensor([[1, 1], [1, 0]])
    zeros = torch.zeros(2, 2)
    PolicyObjective(entropy=EntropyBonus(0.1))(zeros, zeros, torch.zeros(2), mask, entropy=entropy).loss.backward()
    torch.testing.assert_close(entropy.grad, torch.tensor([[-0.1, -0.1], [-0.1, 0.0]]) / 3)
