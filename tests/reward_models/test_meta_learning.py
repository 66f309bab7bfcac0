import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted_preferences import planted
from torch import nn

from polyreward.errors import InvalidInputError
from polyreward.preferences import IdenticalResponsesWarning, PreferenceData
from polyreward.reward_models.contrastive import Contrastive, DropoutViewsHead
from polyreward.reward_models.encoders import Features
from polyreward.reward_models.heads import Items, LinearHead, TwoLayerHead
from polyreward.reward_models.likelihoods import BradleyTerry, bradley_terry_loss
from polyreward.reward_models.meta_learning import MetaHead, MetaRMStep, continue_with_shift, difference_score
from polyreward.reward_models.model import PreferenceModel

FIT = {"epochs": 3, "batch_size": 16, "learning_rate": 1e-2, "validation": None}


def test_the_worked_example():
    found = difference_score(torch.tensor([[0.0, 1.0, 3.0]], dtype=torch.float64))
    assert float(found) == pytest.approx(0.569873, abs=1e-6)
    assert float(found) == pytest.approx(2 / 9 * (0.731059 + 0.952574 + 0.880797), abs=1e-6)
    assert float(difference_score(torch.zeros(3))) == pytest.approx(1 / 3)
    assert float(difference_score(torch.tensor([0.0, 1e3, 2e3]))) == pytest.approx(2 / 3)
    assert float(difference_score(torch.zeros(4, 1))) == 0.0


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.floats(-5, 5), st.integers(0, 1000))
def test_difference_equals_plain_python_its_bounds_and_shifts(prompts, count, shift, seed):
    rewards = np.random.default_rng(seed).normal(size=(prompts, count)) * 2
    slow = 0.0
    for row in rewards:
        for i in range(count):
            for j in range(i + 1, count):
                slow += 2 / count**2 / (1 + math.exp(-abs(row[i] - row[j]))) / prompts
    found = float(difference_score(torch.from_numpy(rewards)))
    assert found == pytest.approx(slow, abs=1e-9)
    assert (count - 1) / (2 * count) - 1e-9 <= found <= (count - 1) / count
    assert float(difference_score(torch.from_numpy(rewards + shift))) == pytest.approx(found, abs=1e-9)
    assert float(difference_score(torch.from_numpy(rewards[:, ::-1].copy()))) == pytest.approx(found, abs=1e-9)


def test_equal_rewards_part_only_with_noise():
    same = torch.zeros(1, 3, requires_grad=True)
    difference_score(same).backward()
    assert not same.grad.any()
    other = torch.zeros(1, 3, requires_grad=True)
    difference_score(other, 1e-3, torch.Generator().manual_seed(0)).backward()
    assert other.grad.abs().sum() > 0
    drawn = [float(difference_score(torch.zeros(3), 0.1, torch.Generator().manual_seed(s))) for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_wrong_rewards():
    with pytest.raises(InvalidInputError, match=r"\(prompts, responses\), got \(0, 3\)"):
        difference_score(torch.zeros(0, 3))
    with pytest.raises(InvalidInputError, match=r"got \(1, 2, 3\)"):
        difference_score(torch.zeros(1, 2, 3))
    with pytest.raises(InvalidInputError, match="rewards of prompt 1 are NaN"):
        difference_score(torch.tensor([[0.0, 1.0], [math.nan, 0.0]]))
    assert difference_score(torch.zeros(2, dtype=torch.bfloat16)).dtype == torch.float32


class Slope(nn.Module):
    """``theta * s``."""

    def __init__(self, theta):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta, dtype=torch.float64))

    def forward(self, s):
        return self.theta * s


def test_one_parameter_against_finite_differences():
    theta, eta, alpha = 0.7, 0.9, 0.05
    s = torch.tensor([[0.2, 1.0, -0.5]], dtype=torch.float64)
    chosen, rejected = torch.tensor([1.0], dtype=torch.float64), torch.tensor([0.0], dtype=torch.float64)

    def j(t):
        return float(difference_score(t * s))

    def loss(t):
        return float(bradley_terry_loss(torch.tensor([t], dtype=torch.float64)))

    h = 1e-5
    raised = theta + eta * (j(theta + h) - j(theta - h)) / (2 * h)
    slope = (loss(raised + h) - loss(raised - h)) / (2 * h)
    model = Slope(theta)
    found = MetaRMStep(model, eta, alpha=alpha)((chosen, rejected), s)
    assert float(model.theta.detach()) == pytest.approx(theta - alpha * slope, abs=1e-9)
    assert slope == pytest.approx(-1 / (1 + math.exp(raised)), abs=1e-8)
    assert found == {"loss": pytest.approx(loss(raised), abs=1e-8), "difference": pytest.approx(j(theta))}


def test_without_ascent_it_is_a_plain_step_with_any_optimiser():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0))
    plain = copy.deepcopy(model)
    batch, s = (torch.randn(5, 3), torch.randn(5, 3)), torch.randn(6, 3)

    class Grid(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x)

    step = MetaRMStep(
        model, 0.0, lambda r: difference_score(r.view(2, 3)), torch.optim.Adam(model.parameters(), lr=0.01)
    )
    optimizer = torch.optim.Adam(plain.parameters(), lr=0.01)
    for _ in range(3):
        step(batch, s)
        optimizer.zero_grad()
        bradley_terry_loss(plain(batch[0]) - plain(batch[1])).backward()
        optimizer.step()
    for own, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(own, other, atol=1e-7)


def test_target_and_margin_of_the_batch_and_weights_that_stay():
    model = nn.Sequential(nn.Linear(2, 1), nn.Flatten(0)).double()
    model[0].bias.requires_grad_(False)
    before = model[0].bias.clone()
    batch = (torch.ones(2, 2).double(), torch.zeros(2, 2).double(), torch.tensor([1.0, 0.5]), torch.tensor([0.5, 0.0]))
    step = MetaRMStep(model, 0.0)
    difference = (model(batch[0]) - model(batch[1])).detach()
    assert step(batch, torch.randn(3, 2).double())["loss"] == pytest.approx(
        float(bradley_terry_loss(difference, batch[2].double(), batch[3].double()))
    )
    assert torch.equal(model[0].bias, before)
    with pytest.raises(InvalidInputError, match="eta must be a finite number"):
        MetaRMStep(model, -1.0)


def test_ascent_raises_the_difference():
    torch.manual_seed(1)
    model, s = nn.Sequential(nn.Linear(3, 1), nn.Flatten(0)), torch.randn(4, 3)
    step = MetaRMStep(model, 0.1)
    raised, before = step.ascended(s)
    assert float(difference_score(torch.func.functional_call(model, raised, (s,)))) > float(before)


def drifted(prompts=12, count=4, width=8, seed=3):
    """Features of pairs and, below them, of unlabelled responses from elsewhere."""
    data, encoder, _ = planted(pairs=80, width=width)
    extra = np.random.default_rng(seed).normal(size=(prompts * count, width)).astype(np.float32) + 1
    rows = len(encoder.responses) + np.arange(prompts * count)
    unlabelled = PreferenceData(np.arange(prompts), rows, np.arange(prompts + 1) * count, source="policy")
    return data, Features(np.concatenate([encoder.responses, extra]), name="both"), unlabelled


def test_a_fit_of_the_wrapped_head_takes_the_steps_of_meta_rm():
    data, encoder, unlabelled = drifted()
    start = PreferenceModel(encoder, LinearHead).fit(data, **FIT)
    sgd_like = {"epochs": 1, "batch_size": 80, "weight_decay": 0.0, "clip": None, "validation": None}
    found = continue_with_shift(start, data, unlabelled, eta=0.5, noise=0.0, learning_rate=1e-3, **sgd_like)

    class Plain(nn.Module):
        def __init__(self, head):
            super().__init__()
            self.head = head

        def forward(self, x):
            return self.head(Items(x.reshape(-1, 8), None, None)).view(x.shape[:-1])

    model = Plain(copy.deepcopy(start.head)).train()
    x = torch.from_numpy(encoder.responses)
    pairs = x[:160].view(80, 2, 8)
    second = torch.from_numpy(data.choice)[:, None, None].bool()
    chosen, rejected = (torch.where(second, pairs[:, [i]], pairs[:, [1 - i]]).squeeze(1) for i in (1, 0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    MetaRMStep(model, 0.5, optimizer=optimizer)((chosen, rejected), x[160:].view(12, 4, 8))
    assert torch.allclose(found.head.linear.weight, model.head.linear.weight, atol=1e-6)


def test_without_ascent_a_model_goes_on_as_it_would():
    data, encoder, unlabelled = drifted()
    start = PreferenceModel(encoder, TwoLayerHead).fit(data, **FIT)
    went_on = PreferenceModel(encoder, copy.deepcopy(start.head)).fit(data, **FIT)
    rows = np.arange(30)
    same = continue_with_shift(start, data, unlabelled, eta=0.0, **FIT)
    assert torch.allclose(same.score(rows, rows), went_on.score(rows, rows), atol=1e-6)
    other = continue_with_shift(start, data, unlabelled, eta=1.0, **FIT)
    assert not torch.allclose(other.score(rows, rows), went_on.score(rows, rows), atol=1e-4)
    again = continue_with_shift(start, data, unlabelled, eta=1.0, **FIT)
    assert torch.equal(other.score(rows, rows), again.score(rows, rows))


def test_the_model_that_goes_on_is_a_plain_one_and_the_first_stays(tmp_path):
    data, encoder, unlabelled = drifted()
    start = PreferenceModel(encoder, DropoutViewsHead, Contrastive(BradleyTerry(), beta=0.1)).fit(data, **FIT)
    rows = np.arange(30)
    before = start.score(rows, rows)
    found = continue_with_shift(start, data, unlabelled, prompts_per_step=5, **{**FIT, "validation": 0.2})
    assert torch.equal(start.score(rows, rows), before)
    assert type(found.head) is DropoutViewsHead
    assert len(found.history) == 3
    found.save_pretrained(tmp_path)
    back = PreferenceModel.from_pretrained(tmp_path, encoder=encoder)
    assert torch.equal(back.score(rows, rows), found.score(rows, rows))
    assert not any("inner" in name for name in back.head.state_dict())


class PromptHead(nn.Module):
    """Reads the prompt, has groups, a schedule and a look at the data."""

    uses_prompt = True

    def __init__(self, width):
        super().__init__()
        self.linear, self.seen = nn.Linear(width, 1), []
        self.config = {"width": width}

    def forward(self, items):
        return (self.linear(items.features) * items.prompt[:, :1]).squeeze(-1)

    def prepare(self, table, features):
        self.seen.append(len(table))

    def step(self, share):
        self.seen.append(share)

    def parameter_groups(self):
        return [{"params": list(self.parameters()), "lr": 0.0}]


def test_what_a_head_asks_of_a_fit_it_gets():
    data, encoder, unlabelled = drifted()
    with_prompts = Features(encoder.responses, np.ones((100, 2), np.float32))
    start = PreferenceModel(with_prompts, PromptHead).fit(data, **FIT)
    found = continue_with_shift(start, data, unlabelled, **FIT)
    assert found.head.seen[len(start.head.seen)] == 80
    assert found.head.seen[-1] > 0.9
    assert torch.equal(found.head.linear.weight, start.head.linear.weight)  # its rate of 0
    meta = MetaHead(start.head, lambda s: s.values, torch.zeros(2, 3, 8), torch.ones(2, 2), eta=1, noise=0, batch=2)
    assert meta.uses_prompt


def test_prompts_whose_responses_are_the_same_are_dropped():
    data, encoder, unlabelled = drifted()
    start = PreferenceModel(encoder, LinearHead).fit(data, **FIT)
    rows = unlabelled.responses.copy()
    rows[:4] = rows[0]
    twice = PreferenceData(unlabelled.prompts, rows, unlabelled.offsets)
    with pytest.warns(IdenticalResponsesWarning, match="dropped 1 of 12"):
        continue_with_shift(start, data, twice, **FIT)


def test_wrong_calls():
    data, encoder, unlabelled = drifted()
    model = PreferenceModel(encoder, LinearHead)
    with pytest.raises(InvalidInputError, match="has not been fitted"):
        continue_with_shift(model, data, unlabelled)
    model.fit(data, **FIT)
    with pytest.raises(InvalidInputError, match="LBFGS cannot use"):
        continue_with_shift(model, data, unlabelled, optimizer="lbfgs")
    with pytest.raises(InvalidInputError, match="eta must be"):
        continue_with_shift(model, data, unlabelled, eta=math.inf)
    with pytest.raises(InvalidInputError, match="prompts_per_step"):
        continue_with_shift(model, data, unlabelled, prompts_per_step=0)
    uneven = PreferenceData(np.arange(2), np.arange(5), np.array([0, 2, 5]), source="policy")
    with pytest.raises(InvalidInputError, match=r"policy: expected the same number.*found \[2, 3\]"):
        continue_with_shift(model, data, uneven)
    bad = Features(np.where(np.arange(len(encoder.responses))[:, None] == 165, np.nan, encoder.responses))
    other = PreferenceModel(bad, copy.deepcopy(model.head))
    with pytest.raises(InvalidInputError, match="policy, row 2: the features of a response are NaN"):
        continue_with_shift(other, data, unlabelled)

    class Learns(nn.Module):
        identity, width = "learns", 8

    learning = PreferenceModel(Learns(), copy.deepcopy(model.head))
    with pytest.raises(InvalidInputError, match="take MetaRMStep for others"):
        continue_with_shift(learning, data, unlabelled)
