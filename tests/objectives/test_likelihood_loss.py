import itertools
import math

import pytest
import torch
from torch import nn

from polyreward.errors import InvalidInputError, UnknownNameError
from polyreward.likelihood import jepo_bound, likelihood_values, rloo
from polyreward.objectives.likelihood import JEPOObjective, LikelihoodPolicyLoss, likelihood_objective

KINDS = ("prob", "avg-prob", "log-prob", "avg-log-prob", "geo-prob")
THOUGHTS, LENGTH, GROUP = 3, 2, 2


class Tabular(nn.Module):
    """One prompt: logits of 3 thoughts, and of 4 symbols at 2 places after each."""

    def __init__(self, seed: int = 0, ignores: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.thought = nn.Parameter(torch.randn(THOUGHTS, generator=generator, dtype=torch.float64))
        self.symbols = nn.Parameter(
            torch.randn(1 if ignores else THOUGHTS, LENGTH, 4, generator=generator, dtype=torch.float64)
        )

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """log pi(z), (3,), and log-probability of the reference's tokens (1, 2), (3, 2)."""
        after = self.symbols.log_softmax(-1)[:, torch.arange(LENGTH), torch.tensor([1, 2])]
        return self.thought.log_softmax(0), after.expand(THOUGHTS, LENGTH)


def gradients(loss: torch.Tensor, model: nn.Module) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True))


def surrogate_mean(loss: LikelihoodPolicyLoss | JEPOObjective, model: Tabular, size: int = GROUP) -> torch.Tensor:
    """Mean of the surrogate over all groups of thoughts, each by its probability (which gets no gradient)."""
    total = torch.zeros((), dtype=torch.float64)
    for group in itertools.product(range(THOUGHTS), repeat=size):
        own, after = model()
        rows = list(group)
        total = total + own[rows].sum().exp().detach() * loss(own[rows][None], after[rows][None]).loss
    return total


def expected_reward(kind: str, model: Tabular) -> torch.Tensor:
    own, after = model()
    return (own.exp() * likelihood_values(after[None], kind=kind)[0]).sum()


@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_surrogate_has_the_gradient_of_the_expected_reward(kind):
    model = Tabular()
    exact = gradients(-expected_reward(kind, model), model)
    ours = gradients(surrogate_mean(LikelihoodPolicyLoss(kind), model), model)
    for one, other in zip(exact, ours, strict=True):
        assert torch.allclose(one, other, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_without_the_direct_term_only_the_thoughts_are_trained(kind):
    model = Tabular()
    exact = gradients(-expected_reward(kind, model), model)
    ours = gradients(surrogate_mean(LikelihoodPolicyLoss(kind, direct_term=False), model), model)
    assert torch.allclose(exact[0], ours[0], atol=1e-12)
    assert ours[1].abs().max() == 0
    assert exact[1].abs().max() > 1e-3


@pytest.mark.parametrize("direct", [True, False])
def test_the_mean_jepo_surrogate_has_the_gradient_of_the_expected_bound(direct):
    model = Tabular(1)

    def expected_bound() -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for group in itertools.product(range(THOUGHTS), repeat=3):
            own, after = model()
            total = total + own[list(group)].sum().exp() * jepo_bound(after.sum(-1)[list(group)])
        return total

    exact = gradients(-expected_bound(), model)
    ours = gradients(surrogate_mean(JEPOObjective(direct_term=direct), model, 3), model)
    assert torch.allclose(exact[0], ours[0], atol=1e-12)
    if direct:
        assert torch.allclose(exact[1], ours[1], atol=1e-12)
    else:
        assert ours[1].abs().max() == 0


def test_the_expected_bounds_are_in_order():
    own, after = (table.detach() for table in Tabular(2)())
    total = after.sum(-1)
    exact = (own + total).logsumexp(0)
    bounds = []
    for size in (1, 2, 3):
        rows = [list(group) for group in itertools.product(range(THOUGHTS), repeat=size)]
        bounds.append(sum(own[r].sum().exp() * jepo_bound(total[r]) for r in rows))
    assert (own.exp() * total).sum().item() == pytest.approx(bounds[0].item())
    assert bounds[0] < bounds[1] < bounds[2] < exact


def test_a_head_that_ignores_the_thought_is_trained_as_by_supervision():
    model = Tabular(ignores=True)
    thoughts, head = gradients(surrogate_mean(LikelihoodPolicyLoss("log-prob"), model), model)
    _, after = model()
    (supervised,) = torch.autograd.grad(-after[0].sum(), [model.symbols])
    assert torch.allclose(head, supervised, atol=1e-12)
    assert thoughts.abs().max() < 1e-12


def test_the_surrogate_by_hand():
    cot = torch.tensor([[-1.0, -2.0, -0.5]], requires_grad=True)
    answer = torch.tensor([-1.0, -2.0, -4.0]).view(1, 3, 1).requires_grad_(True)
    loss, metrics = LikelihoodPolicyLoss("log-prob")(cot, answer)
    loss.backward()
    assert loss.item() == pytest.approx(-(2 * -1 + 0.5 * -2 + -2.5 * -0.5 - 7) / 3)
    assert cot.grad[0].tolist() == pytest.approx([-2 / 3, -0.5 / 3, 2.5 / 3])
    assert answer.grad.flatten().tolist() == pytest.approx([-1 / 3] * 3)
    assert metrics["reward"].item() == pytest.approx(-7 / 3)
    assert metrics["reward_std"].item() == pytest.approx(torch.tensor([-1.0, -2, -4]).std().item())
    assert metrics["perplexity"].item() == pytest.approx(math.exp(1.749600), rel=1e-5)
    assert metrics["underflow"].item() == 0
    cot.grad = answer.grad = None
    LikelihoodPolicyLoss("jepo")(cot, answer).loss.backward()
    assert cot.grad[0].tolist() == pytest.approx([-0.816619, 0.105040, 0.369715], abs=1e-5)
    assert answer.grad.flatten().tolist() == pytest.approx((-torch.tensor([-1.0, -2, -4]).softmax(0)).tolist())


def test_verifrees_weights_of_the_answer():
    cot = torch.zeros(1, 3)
    answer = torch.tensor([-1.0, -2.0, -4.0]).view(1, 3, 1).requires_grad_(True)
    values = answer.detach().flatten().exp()
    expected = {"gradient": values, "one": torch.ones(3), "advantage": rloo(values)}
    for weight, factor in expected.items():
        answer.grad = None
        LikelihoodPolicyLoss("prob", answer_weight=weight)(cot, answer).loss.backward()
        assert answer.grad.flatten().tolist() == pytest.approx((-factor / 3).tolist())


def test_tokens_of_the_chain_and_failures():
    tokens = torch.randn(2, 3, 5, requires_grad=True)
    mask = torch.rand(2, 3, 5) < 0.6
    spoiled = torch.where(mask, tokens, torch.nan)
    answer = torch.randn(2, 3, 4).sigmoid().log().requires_grad_(True)
    failed = torch.tensor([[False, True, False], [False, False, False]])
    loss, metrics = LikelihoodPolicyLoss("log-prob")(spoiled, answer, cot_mask=mask, failed=failed)
    loss.backward()
    summed = LikelihoodPolicyLoss("log-prob")(torch.where(mask, tokens, 0.0).sum(-1), answer, failed=failed).loss
    assert loss.item() == pytest.approx(summed.item())
    assert answer.grad[0, 1].abs().max() == 0
    assert answer.grad[0, 0].abs().min() > 0
    assert metrics["cot_length"].item() == pytest.approx(mask.sum(-1).float().mean().item())


def test_underflow_is_reported():
    answer = torch.full((1, 2, 24), -5.0)
    assert LikelihoodPolicyLoss("prob")(torch.zeros(1, 2), answer).metrics["underflow"].item() == 2


def test_errors():
    answer = torch.full((1, 2, 3), -1.0)
    with pytest.raises(InvalidInputError, match="G = 1"):
        LikelihoodPolicyLoss()(torch.zeros(1, 1), answer[:, :1])
    with pytest.raises(InvalidInputError, match="at least 2"):
        JEPOObjective()(torch.zeros(1, 1), answer[:, :1])
    with pytest.raises(InvalidInputError, match="cot_logp has shape"):
        LikelihoodPolicyLoss()(torch.zeros(2, 1), answer)
    with pytest.raises(InvalidInputError, match="cot_mask has shape"):
        LikelihoodPolicyLoss()(torch.zeros(1, 2, 4), answer, cot_mask=torch.ones(1, 2, 3))
    with pytest.raises(InvalidInputError, match="answer_logp must have shape"):
        LikelihoodPolicyLoss()(torch.zeros(1, 2), torch.zeros(1, 2))
    with pytest.raises(InvalidInputError, match="has no token"):
        LikelihoodPolicyLoss()(torch.zeros(1, 2), answer, torch.zeros(1, 2, 3))
    with pytest.raises(UnknownNameError):
        LikelihoodPolicyLoss("loglik")
    with pytest.raises(UnknownNameError):
        LikelihoodPolicyLoss(answer_weight="two")
    with pytest.raises(InvalidInputError, match="clip"):
        likelihood_objective(0.0)


def test_the_trainers_objective_sums_over_tokens():
    logp = torch.tensor([[-1.0, -2.0], [-0.5, -3.0]], requires_grad=True)
    mask = torch.tensor([[1, 1], [1, 0]])
    loss = likelihood_objective()(logp, logp.detach(), torch.tensor([2.0, -1.0]), mask).loss
    loss.backward()
    assert logp.grad.tolist() == [[-1.0, -1.0], [0.5, 0.0]]
