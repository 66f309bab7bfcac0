import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted_preferences import planted

from polyreward.errors import InvalidInputError, UnknownNameError
from polyreward.objectives import FixedClip, KLPenalty, PolicyObjective
from polyreward.preferences import PreferenceData
from polyreward.reward_models.dual_objective import DecidedPairs, dual_objective_loss, group_advantages, preference_loss
from polyreward.reward_models.heads import LinearHead
from polyreward.reward_models.likelihoods import BradleyTerry
from polyreward.reward_models.model import PreferenceModel


def batch(seed=0, rows=6, tokens=5, pairs=3):
    g = torch.Generator().manual_seed(seed)
    old = -torch.rand(rows, tokens, generator=g).double() * 3
    logp = old + 0.5 * torch.randn(rows, tokens, generator=g).double()
    reference = old + 0.3 * torch.randn(rows, tokens, generator=g).double()
    mask = torch.rand(rows, tokens, generator=g) < 0.7
    return {
        "logp": logp,
        "old_logp": old,
        "advantages": torch.randn(rows, generator=g).double(),
        "mask": mask,
        "ref_logp": reference,
        "scores_pair": torch.randn(pairs, 2, generator=g).double(),
        "labels": torch.randint(-1, 2, (pairs,), generator=g),
    }


def slow(given, bt_weight, kl_coef, low=0.2, high=0.3, dual=3.0):
    policy, kl, count = 0.0, 0.0, 0
    for i, row in enumerate(given["mask"].tolist()):
        for t, counts in enumerate(row):
            if not counts:
                continue
            now, old, ref = (float(given[name][i, t]) for name in ("logp", "old_logp", "ref_logp"))
            advantage, ratio = float(given["advantages"][i]), math.exp(now - old)
            loss = max(-ratio * advantage, -min(max(ratio, 1 - low), 1 + high) * advantage)
            if advantage < 0:
                loss = min(loss, -dual * advantage)
            policy, count = policy + loss, count + 1
            kl += math.exp(ref - now) - (ref - now) - 1
    bt = []
    for (a, b), label in zip(given["scores_pair"].tolist(), given["labels"].tolist(), strict=True):
        if label >= 0:
            gap = a - b if label == 0 else b - a
            bt.append(math.log1p(math.exp(-gap)))
    policy, kl, bt = policy / max(count, 1), kl / max(count, 1), sum(bt) / max(len(bt), 1)
    return policy + kl_coef * kl + bt_weight * bt, policy, kl, bt


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 1), st.floats(0, 1))
def test_equals_a_loop_over_tokens_and_pairs(seed, bt_weight, kl_coef):
    data = batch(seed)
    found = dual_objective_loss(**data, bt_weight=bt_weight, kl_coef=kl_coef)
    expected = slow(data, bt_weight, kl_coef)
    for name, value in zip(("loss", "policy", "kl", "bt"), expected, strict=True):
        assert float(found[name]) == pytest.approx(value, abs=1e-9)


@pytest.mark.parametrize("dual_clip", [None, 1.5, 3.0])
def test_the_policy_part_is_the_shared_objective(dual_clip):
    data = batch(3)
    logp = data["logp"].requires_grad_()
    own = dual_objective_loss(**data, bt_weight=0.0, kl_coef=0.3, dual_clip=dual_clip)
    (mine,) = torch.autograd.grad(own["loss"], logp)
    objective = PolicyObjective(FixedClip(0.2, 0.3), aggregation="token-mean", kl=KLPenalty(0.3), dual_clip=dual_clip)
    other = objective(logp, data["old_logp"], data["advantages"], data["mask"], reference_logp=data["ref_logp"])
    (theirs,) = torch.autograd.grad(other.loss, logp)
    assert float(own["loss"].detach()) == pytest.approx(float(other.loss.detach()))
    assert torch.allclose(mine, theirs)


def test_the_papers_defaults():
    data = batch(1)
    found = dual_objective_loss(**data)
    assert float(found["loss"]) == pytest.approx(slow(data, 5e-3, 1e-5)[0], abs=1e-12)


def test_no_bt_weight_leaves_the_scores_without_gradient():
    data = batch(2)
    data["scores_pair"].requires_grad_()
    dual_objective_loss(**data, bt_weight=0.0)["loss"].backward()
    assert torch.equal(data["scores_pair"].grad, torch.zeros(3, 2, dtype=torch.float64))
    data["scores_pair"].grad = None
    dual_objective_loss(**data, bt_weight=0.5)["loss"].backward()
    assert data["scores_pair"].grad.abs().sum() > 0


def test_at_ratio_one_the_policy_loss_is_the_mean_advantage_of_the_tokens():
    data = batch(4)
    found = dual_objective_loss(**(data | {"logp": data["old_logp"], "ref_logp": None}), kl_coef=0.0)
    per_token = data["advantages"].unsqueeze(1).expand(6, 5)[data["mask"]]
    assert float(found["policy"]) == pytest.approx(-float(per_token.mean()))
    assert float(found["kl"]) == 0
    assert float(found["clip_fraction"]) == 0


def test_masked_places_do_not_matter():
    data = batch(5)
    data["logp"].requires_grad_()
    plain = dual_objective_loss(**data)["loss"]
    broken = {k: torch.where(data["mask"], data[k], torch.nan) for k in ("logp", "old_logp", "ref_logp")}
    filled = dual_objective_loss(**(data | broken))["loss"]
    assert float(filled) == float(plain)
    (grad,) = torch.autograd.grad(filled, data["logp"])
    assert bool(torch.isfinite(grad).all())


def test_nothing_to_learn_from_is_zero():
    data = batch(6) | {"mask": torch.zeros(6, 5), "labels": torch.full((3,), -1)}
    found = dual_objective_loss(**data)
    assert [float(found[name]) for name in ("loss", "policy", "kl", "bt", "accuracy")] == [0] * 5
    none = {"scores_pair": torch.zeros(0, 2), "labels": torch.zeros(0, dtype=torch.int64)}
    assert float(dual_objective_loss(**(data | none))["bt"]) == 0


def test_half_precision_is_computed_in_float32():
    data = batch(7)
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in data.items()}
    found = dual_objective_loss(**half)
    assert found["loss"].dtype == torch.float32
    assert float(found["loss"]) == pytest.approx(float(dual_objective_loss(**data)["loss"]), abs=0.05)


def pair(difference, label=0):
    return torch.tensor([[difference, 0.0]], dtype=torch.float64), torch.tensor([label])


def test_bradley_terry_and_its_ties():
    assert float(preference_loss(*pair(1.2))) == pytest.approx(0.263282, abs=1e-6)
    assert float(preference_loss(*pair(-1.2, 1))) == pytest.approx(0.263282, abs=1e-6)
    assert float(preference_loss(*pair(0.0))) == pytest.approx(math.log(2))
    assert float(preference_loss(*pair(0.0, -1), theta=5.0)) == pytest.approx(0.405465, abs=1e-6)
    assert float(preference_loss(*pair(math.log(5)), theta=5.0)) == pytest.approx(math.log(2))
    assert float(preference_loss(*pair(1.2), margin=0.57)) == pytest.approx(math.log1p(math.exp(-0.63)))
    # the constant is no part of a tie
    assert float(preference_loss(*pair(0.0, -1), theta=5.0, margin=0.57)) == pytest.approx(0.405465, abs=1e-6)


@given(st.floats(-20, 20))
def test_win_loss_and_tie_add_up_to_one(difference):
    total = sum(math.exp(-float(preference_loss(*pair(difference, label), theta=5.0))) for label in (0, 1, -1))
    assert total == pytest.approx(1.0)


def test_ties_in_the_mean_are_a_choice():
    scores = torch.tensor([[1.2, 0.0], [5.0, 0.0], [0.0, 1.2], [9.0, 0.0]], dtype=torch.float64)
    labels = torch.tensor([0, -1, 1, -2])
    assert float(preference_loss(scores, labels)) == pytest.approx(0.263282, abs=1e-6)
    assert float(preference_loss(scores, labels, ties="counted")) == pytest.approx(0.131641, abs=1e-6)
    only = torch.tensor([-1, -1, -2, -2])
    for ties in ("counted", "dropped"):
        assert float(preference_loss(scores, only, ties=ties)) == 0
    # an unjudged pair stays outside of ties that are judgements
    both = float(preference_loss(scores[:2], labels[:2], theta=5.0))
    assert float(preference_loss(scores[[0, 1, 3]], labels[[0, 1, 3]], theta=5.0)) == pytest.approx(both)


def test_advantages_of_the_worked_example():
    found = group_advantages(torch.tensor([[1.0, 0.5, 0.5, 0.0], [2.0, 2.0, 2.0, 2.0]], dtype=torch.float64))
    assert found[0].tolist() == pytest.approx([1.22474, 0, 0, -1.22474], abs=1e-5)
    assert found[1].tolist() == [0, 0, 0, 0]
    assert group_advantages(torch.full((3, 8), 0.1)).abs().max() == 0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.one_of(st.floats(-3, 3), st.just(math.nan)), min_size=2, max_size=7))
def test_advantages_equal_numpy_of_the_rewards_that_apply(rewards):
    found = group_advantages(torch.tensor([rewards], dtype=torch.float64))[0].tolist()
    known = np.array([r for r in rewards if r == r])
    for value, reward in zip(found, rewards, strict=True):
        if reward != reward or len(known) < 2 or known.min() == known.max():
            assert value == 0
        else:
            assert value == pytest.approx((reward - known.mean()) / (known.std(ddof=1) + 1e-6))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"old_logp": torch.zeros(6, 4)}, r"old_logp has shape \(6, 4\)"),
        ({"mask": torch.zeros(5, 5)}, "mask has shape"),
        ({"ref_logp": torch.zeros(1, 5)}, "ref_logp has shape"),
        ({"ref_logp": None}, "pass it, or kl_coef=0"),
        ({"advantages": torch.zeros(5)}, r"advantages has shape \(5,\)"),
        ({"advantages": torch.full((6,), math.nan), "mask": torch.ones(6, 5)}, "advantage of row 0"),
        ({"logp": torch.full((6, 5), math.nan), "mask": torch.ones(6, 5)}, "logp is nan in row 0, token 0"),
        ({"scores_pair": torch.zeros(3, 3)}, r"scores_pair \(B, 2\)"),
        ({"scores_pair": torch.full((3, 2), math.inf)}, "scores_pair, row 0"),
        ({"labels": torch.tensor([0, 1, 2])}, "labels must be"),
        ({"labels": torch.zeros(3)}, "labels must be"),
        ({"labels": torch.zeros(2, dtype=torch.int64)}, "labels"),
        ({"bt_weight": -1.0}, "bt_weight"),
        ({"kl_coef": math.inf}, "kl_coef"),
        ({"dual_clip": 1.0}, "dual_clip"),
    ],
)
def test_wrong_input_is_one_error(change, message):
    with pytest.raises(InvalidInputError, match=message):
        dual_objective_loss(**(batch() | change))


def test_groups_of_one_and_unknown_ties():
    with pytest.raises(InvalidInputError, match="at least 2"):
        group_advantages(torch.zeros(3, 1))
    with pytest.raises(InvalidInputError, match="infinite"):
        group_advantages(torch.tensor([1.0, math.inf]))
    with pytest.raises(UnknownNameError, match="did you mean 'counted'"):
        preference_loss(*pair(1.0), ties="count")
    with pytest.raises(UnknownNameError, match="did you mean 'dropped'"):
        DecidedPairs("drop")


def test_decided_pairs_as_a_likelihood():
    data, encoder, _ = planted()
    counted = PreferenceModel(encoder, LinearHead, DecidedPairs()).fit(
        data, epochs=5, learning_rate=0.1, validation=None
    )
    usual = PreferenceModel(encoder, LinearHead, BradleyTerry()).fit(data, epochs=5, learning_rate=0.1, validation=None)
    assert torch.allclose(counted.head.linear.weight, usual.head.linear.weight)
    tied = PreferenceData(data.prompts, data.responses, choice=np.where(np.arange(400) % 2, -1, data.choice))
    rows = np.arange(0, 400, 2)
    half = tied.select(rows)
    losses = {
        ties: PreferenceModel(encoder, counted.head, DecidedPairs(ties)).evaluate(tied)["loss"]
        for ties in ("counted", "dropped")
    }
    alone = PreferenceModel(encoder, counted.head, DecidedPairs()).evaluate(half)["loss"]
    assert losses["dropped"] == pytest.approx(alone, rel=1e-5)
    assert losses["counted"] == pytest.approx(alone / 2, rel=1e-5)
