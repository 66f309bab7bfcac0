import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyreward.errors import InvalidInputError, UnknownNameError
from polyreward.reward_models.context_routing import (
    EmptyContextWarning,
    HedgeRouterTrainer,
    hedge_targets,
    routed_accuracy,
)
from polyreward.reward_models.mixtures import ContextRouter, MultiHeadReward, mixture_preference

PRIOR = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
LOSSES = -torch.nn.functional.logsigmoid(torch.tensor([[2.0, 0.0, -1.0]], dtype=torch.float64))


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def test_the_worked_step():
    assert LOSSES[0].tolist() == pytest.approx([0.126928, 0.693147, 1.313262], abs=1e-6)
    found = hedge_targets(PRIOR, LOSSES, 0.5)
    assert found[0].tolist() == pytest.approx([0.812585, 0.157112, 0.030303], abs=1e-6)
    # sigma(margin)^(1 / tau) is the same
    powers = PRIOR * torch.sigmoid(torch.tensor([[2.0, 0.0, -1.0]])) ** 2
    assert torch.allclose(found, powers / powers.sum())
    value = float((found * LOSSES).sum() + 0.5 * (found * (found / PRIOR).log()).sum())
    assert value == pytest.approx(0.369734, abs=1e-6)
    assert value == pytest.approx(-0.5 * math.log(float((PRIOR * (-LOSSES / 0.5).exp()).sum())))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(0, 1000), st.floats(0.05, 20))
def test_targets_equal_plain_python_and_are_the_optimum(experts, seed, tau):
    rng = np.random.default_rng(seed)
    prior, losses = rng.dirichlet(np.ones(experts), 3), rng.exponential(size=(3, experts))
    found = hedge_targets(prior, losses, tau)
    assert isinstance(found, np.ndarray)
    for row in range(3):
        parts = [p * math.exp(-loss / tau) for p, loss in zip(prior[row], losses[row], strict=True)]
        assert found[row] == pytest.approx([part / sum(parts) for part in parts])
        best = -tau * math.log(sum(parts))
        other = rng.dirichlet(np.ones(experts))
        value = other @ losses[row] + tau * sum(w * math.log(w / p) for w, p in zip(other, prior[row], strict=True))
        assert value >= best - 1e-9
    order = rng.permutation(experts)
    assert hedge_targets(prior[:, order], losses[:, order], tau) == pytest.approx(found[:, order])
    assert hedge_targets(prior, losses + 7.0, tau) == pytest.approx(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("tau", [1e-300, 1e-30, 1e-4, 0.3, 1e4, math.inf])
def test_equal_losses_give_the_prior_at_every_temperature(dtype, tau):
    losses = torch.tensor([[900.0] * 3, [0.0] * 3, [0.25] * 3], dtype=dtype)
    prior = torch.tensor([0.5, 0.25, 0.25], dtype=dtype)
    found = hedge_targets(prior, losses, tau)
    assert found.dtype == dtype
    assert torch.allclose(found, prior.expand(3, 3))


def test_limits_of_the_temperature_and_of_the_prior():
    prior = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]])
    losses = torch.tensor([[1.0, 2.0, 0.1], [90.0, 80.0, 100.0]])
    cold = hedge_targets(prior, losses, 1e-4)
    # the third expert of the first row is better, and the prior rules it out
    assert cold.tolist() == [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    assert torch.allclose(hedge_targets(prior, losses, 1e9), prior)
    assert torch.equal(hedge_targets(prior, losses, math.inf), hedge_targets(prior, torch.zeros(2, 3), 1.0))
    assert float(hedge_targets(prior, losses, 3.0)[0, 2]) == 0.0
    # nor is the loss of an expert that is ruled out the measure of the others
    assert hedge_targets(prior[:1], torch.tensor([[3.0, 2.0, 1.0]]), 1e-39)[0].tolist() == [0.0, 1.0, 0.0]
    # losses that rule out: an expert, and everyone, who then stay as they were
    ruled = hedge_targets(prior[1:], torch.tensor([[torch.inf, 1.0, 1.0]]), 0.5)
    assert ruled[0].tolist() == pytest.approx([0.0, 0.375, 0.625])
    assert torch.allclose(hedge_targets(prior, torch.full((2, 3), torch.inf), 0.5), prior)
    assert hedge_targets(torch.ones(4, 1), torch.rand(4, 1), 1e-4).tolist() == [[1.0]] * 4
    assert hedge_targets(torch.zeros(0, 3), torch.zeros(0, 3), 0.1).shape == (0, 3)


def test_wrong_targets():
    for tau in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="tau must be above 0"):
            hedge_targets(PRIOR, LOSSES, tau)
        with pytest.raises(ValueError, match="tau must be above 0"):
            HedgeRouterTrainer(ContextRouter(2, 2), None, tau)
    with pytest.raises(ValueError, match="losses of row 0 are NaN"):
        hedge_targets(PRIOR, LOSSES * float("nan"), 1.0)
    with pytest.raises(ValueError, match=r"prior of row 0 .* sum to 0\.9"):
        hedge_targets(torch.tensor([[0.5, 0.4, 0.0]]), LOSSES, 1.0)
    with pytest.raises(InvalidInputError, match=r"prior have shape \(1, 2\)"):
        hedge_targets(torch.tensor([[0.5, 0.5]]), LOSSES, 1.0)
    with pytest.raises(InvalidInputError, match="with an expert"):
        hedge_targets(torch.zeros(2, 0), torch.zeros(2, 0), 1.0)


def contexts(pairs=60, seed=0, width=5):
    """Two contexts, told by the first feature of the prompt; each is served by one of two opposed heads."""
    generator = torch.Generator().manual_seed(seed)
    heads = MultiHeadReward(width, 2)
    with torch.no_grad():
        heads.linear.weight.copy_(torch.stack([torch.eye(width)[0] * 3, -torch.eye(width)[0] * 3]))
    which = torch.arange(pairs) % 2
    prompts = torch.randn(pairs, 4, generator=generator)
    prompts[:, 0] = 2.0 * which - 1
    gap = torch.rand(pairs, generator=generator) + 0.3
    chosen, rejected = torch.randn(2, pairs, width, generator=generator)
    chosen[:, 0] = rejected[:, 0] + torch.where(which == 0, gap, -gap)
    return heads, prompts, chosen, rejected


def router_of(seed=1):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ContextRouter(4, 2, hidden=16)


@pytest.mark.parametrize("refresh", ["epoch", "batch"])
def test_the_router_learns_the_contexts_and_the_heads_stay(refresh):
    heads, prompts, chosen, rejected = contexts()
    before = heads.linear.weight.clone()
    router = router_of()
    trainer = HedgeRouterTrainer(router, heads, 0.1, epochs=10, batch=8, refresh=refresh, learning_rate=0.02)
    assert trainer.fit(prompts, chosen, rejected) is router
    assert torch.equal(heads.linear.weight, before)
    assert heads.linear.weight.grad is None
    _, prompts, chosen, rejected = contexts(seed=9)
    weights = router(prompts).softmax(-1).detach()
    chance = mixture_preference(heads(chosen).detach() - heads(rejected).detach(), weights)
    assert float((chance > 0.5).float().mean()) > 0.95
    losses = [record["loss"] for record in trainer.history]
    assert losses[-1] < losses[0] / 2
    assert [record["epoch"] for record in trainer.history] == list(range(1, 11))
    assert trainer.history[-1]["bound"] < trainer.history[0]["bound"]


def test_an_epoch_is_cross_entropy_to_targets_frozen_at_its_start():
    heads, prompts, chosen, rejected = contexts(pairs=20)
    router, slow = router_of(), router_of()
    trainer = HedgeRouterTrainer(
        router, heads, 0.3, epochs=2, batch=8, learning_rate=0.05, generator=torch.Generator().manual_seed(4)
    )
    trainer.fit(prompts, chosen, rejected)
    generator, adam = torch.Generator().manual_seed(4), torch.optim.Adam(slow.parameters(), lr=0.05)
    margins = (heads(chosen) - heads(rejected)).detach()
    for _ in range(2):
        prior = slow(prompts).softmax(-1).detach()
        targets = prior * torch.sigmoid(margins) ** (1 / 0.3)
        targets = targets / targets.sum(1, keepdim=True)
        order = torch.randperm(20, generator=generator)
        for start in (0, 8, 16):
            rows = order[start : start + 8]
            loss = torch.nn.functional.cross_entropy(slow(prompts[rows]), targets[rows])
            adam.zero_grad()
            loss.backward()
            adam.step()
    for name, value in slow.state_dict().items():
        assert torch.allclose(router.state_dict()[name], value, atol=1e-5)


def test_targets_of_every_batch_differ_from_targets_of_every_epoch():
    heads, prompts, chosen, rejected = contexts()
    losses = []
    for refresh in ("epoch", "batch"):
        trainer = HedgeRouterTrainer(router_of(), heads, 0.1, epochs=1, batch=8, refresh=refresh, learning_rate=0.02)
        trainer.fit(prompts, chosen, rejected)
        losses.append(trainer.history[0]["loss"])
    assert losses[0] != losses[1]


def test_the_epoch_with_the_best_validation_accuracy_is_kept():
    heads, prompts, chosen, rejected = contexts()
    # validation in which the contexts are the other way round: every epoch makes it worse
    held = contexts(seed=5)[1:]
    worse = (held[0], held[2], held[1])
    states = []
    trainer = HedgeRouterTrainer(router_of(), heads, 0.1, epochs=6, batch=8, learning_rate=0.01)
    router = trainer.fit(prompts, chosen, rejected, worse, on_epoch=lambda t: states.append(t.state_dict()["router"]))
    accuracies = [record["validation_accuracy"] for record in trainer.history]
    best = int(np.argmax(accuracies))
    assert best < 5
    assert all(torch.equal(value, states[best][name]) for name, value in router.state_dict().items())
    # without validation, the last
    plain = HedgeRouterTrainer(router_of(), heads, 0.1, epochs=6, batch=8, learning_rate=0.01)
    last = plain.fit(prompts, chosen, rejected)
    assert all(torch.equal(value, states[-1][name]) for name, value in last.state_dict().items())


def test_accuracy_of_an_even_chance_is_a_half():
    losses = torch.tensor([[0.0, 0.0], [math.log(2), 9.0], [3.0, 0.0], [3.0, 3.0]], dtype=torch.float64)
    weights = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.5, 0.5], [0.5, 0.5]], dtype=torch.float64).log()
    assert routed_accuracy(weights, losses) == (1 + 0.5 + 1 + 0) / 4


class Stopped(Exception):
    pass


@pytest.mark.parametrize("way", ["file", "state", "same trainer"])
def test_an_interrupted_fit_goes_on_to_the_same_router(tmp_path, way):
    heads, prompts, chosen, rejected = contexts()
    held = contexts(seed=3)[1:]

    def make():
        return HedgeRouterTrainer(router_of(), heads, 0.1, epochs=5, batch=16, learning_rate=0.01)

    straight = make()
    straight.fit(prompts, chosen, rejected, held)
    path = tmp_path / "routing.pt" if way == "file" else None

    def stop(trainer):
        if trainer.epoch == 2:
            raise Stopped

    first = make()
    with pytest.raises(Stopped):
        first.fit(prompts, chosen, rejected, held, checkpoint=path, on_epoch=stop)
    state = first.state_dict()
    assert state["targets"].shape == (60, 2)
    second = first if way == "same trainer" else make()
    if way == "state":
        second.load_state_dict(state)
    seen = []
    second.fit(prompts, chosen, rejected, held, checkpoint=path, on_epoch=lambda t: seen.append(t.epoch))
    assert seen == [3, 4, 5]
    assert second.history == straight.history
    for name, value in straight.router.state_dict().items():
        assert torch.equal(second.router.state_dict()[name], value)
    if path is not None:
        assert not path.exists()


def test_checkpoints_of_other_fits_and_damaged_ones_are_refused(tmp_path):
    heads, prompts, chosen, rejected = contexts()
    path = tmp_path / "routing.pt"

    def stop(trainer):
        raise Stopped

    with pytest.raises(Stopped):
        HedgeRouterTrainer(router_of(), heads, 0.1).fit(prompts, chosen, rejected, checkpoint=path, on_epoch=stop)
    with pytest.raises(InvalidInputError, match="other pairs or options"):
        HedgeRouterTrainer(router_of(), heads, 0.2).fit(prompts, chosen, rejected, checkpoint=path)
    path.write_bytes(b"broken")
    with pytest.raises(InvalidInputError, match="not a readable checkpoint"):
        HedgeRouterTrainer(router_of(), heads, 0.1).fit(prompts, chosen, rejected, checkpoint=path)


def test_no_pairs_leave_the_router_with_a_warning():
    heads, prompts, chosen, rejected = contexts()
    router = router_of()
    before = {name: value.clone() for name, value in router.state_dict().items()}
    with pytest.warns(EmptyContextWarning, match="stays as it is"):
        found = HedgeRouterTrainer(router, heads, 0.1).fit(prompts[:0], chosen[:0], rejected[:0])
    assert found is router
    assert all(torch.equal(value, before[name]) for name, value in router.state_dict().items())


def test_a_fit_begins_anew_after_one_that_ended():
    heads, prompts, chosen, rejected = contexts()
    trainer = HedgeRouterTrainer(router_of(), heads, 0.1, epochs=3, batch=16)
    trainer.fit(prompts, chosen, rejected)
    middle = {name: value.clone() for name, value in trainer.router.state_dict().items()}
    trainer.fit(prompts, chosen, rejected)
    assert [record["epoch"] for record in trainer.history] == [1, 2, 3]
    assert any(not torch.equal(value, middle[name]) for name, value in trainer.router.state_dict().items())


def test_wrong_calls():
    heads, prompts, chosen, rejected = contexts()
    trainer = HedgeRouterTrainer(router_of(), heads, 0.1)
    for options in ({"epochs": 0}, {"batch": 1.5}, {"learning_rate": 0.0}):
        with pytest.raises(InvalidInputError, match=next(iter(options))):
            HedgeRouterTrainer(router_of(), heads, 0.1, **options)
    with pytest.raises(UnknownNameError, match="did you mean 'epoch'"):
        HedgeRouterTrainer(router_of(), heads, 0.1, refresh="epochs")
    with pytest.raises(InvalidInputError, match="expected the same"):
        trainer.fit(prompts, chosen, rejected[:5])
    with pytest.raises(InvalidInputError, match=r"prompts have shape \(5, 4\)"):
        trainer.fit(prompts[:5], chosen, rejected)
    with pytest.raises(InvalidInputError, match="prompts of pair 3 are NaN"):
        trainer.fit(torch.where(torch.arange(60)[:, None] == 3, torch.nan, prompts), chosen, rejected)
    with pytest.raises(InvalidInputError, match="losses of pair 0 are NaN"):
        trainer.fit(prompts, chosen * torch.nan, rejected)
    with pytest.raises(InvalidInputError, match="the router has 2 heads, the losses 3"):
        trainer.fit_losses(prompts, torch.zeros(60, 3))
    with pytest.raises(InvalidInputError, match="no heads_frozen"):
        HedgeRouterTrainer(router_of(), None, 0.1).fit(prompts, chosen, rejected)
