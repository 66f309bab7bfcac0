import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from polyreward.errors import InvalidInputError, UnknownNameError
from polyreward.reward_models.bias_fitting import (
    BiasFittingTrainer,
    PosthocDebiaser,
    decorrelation_loss,
    fitting_loss,
    length_penalty,
    turn_of,
)
from polyreward.reward_models.length_bias import BiasFitter, correlation_ratio, identity_fitter, pearson


class Reward(nn.Module):
    """Batch norm and dropout, whose buffers and noise must rest in the fitter's turns."""

    def __init__(self, width=4):
        super().__init__()
        self.network = nn.Sequential(
            nn.Linear(width, 8), nn.BatchNorm1d(8), nn.SiLU(), nn.Dropout(0.1), nn.Linear(8, 1)
        )

    def forward(self, inputs):
        return self.network(inputs)


def lengths_of(inputs):
    return inputs[:, 0] * 50 + 100


def batches(count, size=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randn(2, size, 4, generator=generator)) for _ in range(count)]


def trainer(seed=0, **options):
    torch.manual_seed(seed)
    return BiasFittingTrainer(Reward(), BiasFitter(), lengths_of, **options)


def frozen(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def unchanged(module, before):
    return all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_losses_stop_gradients_where_they_should():
    r, f = torch.tensor([1.0, 2, 4, 3], requires_grad=True), torch.tensor([10.0, 20, 30, 40], requires_grad=True)
    loss = fitting_loss(r, f)
    assert float(loss.detach()) == pytest.approx(-0.8)
    loss.backward()
    assert r.grad is None
    assert f.grad.any()
    f.grad = None
    loss = decorrelation_loss(r, f)
    loss.backward()
    assert f.grad is None
    assert r.grad.tolist() == pytest.approx([-0.06, -0.02, -0.14, 0.22], abs=1e-6)
    # also of what correlates negatively, and of a target
    assert float(decorrelation_loss(-r, f).detach()) == pytest.approx(0.8)
    assert float(decorrelation_loss(r, f, 0.3).detach()) == pytest.approx(0.5)
    assert float(decorrelation_loss(r, f, 0.9).detach()) == pytest.approx(0.1)
    assert length_penalty(torch.tensor([1.0, 2.0]), torch.tensor([10, 20]), 0.1).tolist() == [0.0, 0.0]


def test_a_step_of_one_network_leaves_the_other_bit_identical():
    made = trainer(period=1)
    for phase in ("warmup", "fit", "debias", "debias"):
        made.phase = phase
        turn = made.turn
        reward, fitter = frozen(made.reward_model), frozen(made.fitter)
        made.step(*batches(1)[0])
        assert unchanged(made.reward_model, reward) == (turn == "fitter")
        assert unchanged(made.fitter, fitter) == (turn == "reward")
        assert made.reward_model.training
        assert made.fitter.training
    assert made.steps == 4


def test_turns():
    turns = [turn_of("debias", step, 3) for step in range(9)]
    assert turns == ["fitter"] * 3 + ["reward"] * 3 + ["fitter"] * 3
    assert {turn_of("debias", step, None) for step in range(9)} == {"reward"}
    assert turn_of("warmup", 0, 3) == "reward"
    assert turn_of("fit", 5, 3) == "fitter"
    made = trainer(period=2)
    made.phase = "debias"
    found = []
    for pair in batches(6):
        found.append(made.turn)
        made.step(*pair)
    assert found == ["fitter", "fitter", "reward", "reward", "fitter", "fitter"]
    made.phase = "debias"
    assert made.phase_steps == 6
    made.phase = "fit"
    assert made.phase_steps == 0


def test_a_debiasing_step_by_hand():
    made = trainer(weight=2.0, target=0.1, period=None, optimizer=None, weight_decay=0.0)
    made.reward_model.eval()
    made.phase = "debias"
    chosen, rejected = batches(1)[0]
    twin = copy.deepcopy(made.reward_model)
    won, lost = twin(chosen).squeeze(-1), twin(rejected).squeeze(-1)
    scores = torch.cat([won, lost])
    fitted = made.fitter(lengths_of(torch.cat([chosen, rejected])))
    rho = pearson(scores, fitted)
    loss = -nn.functional.logsigmoid(won - lost).mean() + 2 * (rho.abs() - 0.1).abs()
    figures = made.step(chosen, rejected)
    assert figures["loss"] == pytest.approx(float(loss.detach()), abs=1e-6)
    assert figures["correlation"] == pytest.approx(float(rho.detach()), abs=1e-6)
    assert figures["accuracy"] == pytest.approx(float((won > lost).float().mean()))
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-3, weight_decay=0.0)
    loss.backward()
    optimizer.step()
    for mine, theirs in zip(made.reward_model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-7)


def test_an_interrupted_run_goes_on_to_the_same_result():
    data = batches(30)
    straight = trainer(period=2)
    torch.manual_seed(1)
    history = straight.run(data, 8, 6, 16)
    assert len(history) == 30
    for stop in (5, 11, 17):
        first = trainer(period=2)
        torch.manual_seed(1)
        counts = np.clip(stop - np.array([0, 8, 14]), 0, [8, 6, 16])
        with pytest.raises(InvalidInputError, match="batches end after"):
            first.run(data[:stop], 8, 6, 16)
        state, noise = copy.deepcopy(first.state_dict()), torch.get_rng_state()
        assert first.phase_steps == counts[counts > 0][-1]
        second = trainer(seed=5, period=2)
        second.load_state_dict(state)
        torch.set_rng_state(noise)
        second.run(data[stop:], 8, 6, 16)
        assert unchanged(second.reward_model, frozen(straight.reward_model))
        assert unchanged(second.fitter, frozen(straight.fitter))
        assert (second.steps, second.phase, second.phase_steps) == (30, "debias", 16)


def test_state_is_plain_and_of_the_same_parts(tmp_path):
    made = trainer()
    made.step(*batches(1)[0])
    torch.save(made.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    linear = BiasFittingTrainer(Reward(), identity_fitter, lengths_of)
    with pytest.raises(InvalidInputError, match="has a 'fitter'"):
        linear.load_state_dict(state)


class Plain(nn.Module):
    """A reward that is a vector of scores, one a row of the inputs (N, 1)."""

    def __init__(self, scores):
        super().__init__()
        self.scores = nn.Parameter(scores)

    def forward(self, rows):
        return self.scores[rows]


def test_correlation_alone_is_driven_to_zero():
    lengths = torch.linspace(10, 400, 40)
    reward = Plain(lengths / 100 + torch.randn(40, generator=torch.Generator().manual_seed(0)))
    optimizer = torch.optim.SGD(reward.parameters(), lr=1.0)
    for _ in range(400):
        optimizer.zero_grad()
        decorrelation_loss(reward.scores, lengths).backward()
        optimizer.step()
    assert abs(float(pearson(reward.scores.detach(), lengths))) < 0.05
    # what is independent of length stays as it is
    even = torch.tensor([1.0, -1.0, -1.0, 1.0], requires_grad=True)
    decorrelation_loss(even, torch.tensor([1.0, 1.0, 2.0, 2.0])).backward()
    assert not even.grad.any()


def test_bias_fitting_removes_a_bias_that_a_line_cannot_see():
    # twice a hump over length, and quality; the better one of a pair is better in the sum
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2000, 4, generator=generator)

    def hump(x):
        return 3 * torch.exp(-(((lengths_of(x) - 110) / 30) ** 2))

    def pairs(count):
        for _ in range(count):
            rows = torch.randint(2000, (2, 64), generator=generator)
            a, b = features[rows[0]], features[rows[1]]
            first = (a[:, 1] + hump(a) > b[:, 1] + hump(b)).unsqueeze(1)
            yield torch.where(first, a, b), torch.where(first, b, a)

    ratios, quality = {}, {}
    for name, fitter in (("curve", BiasFitter()), ("line", identity_fitter)):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(4, 32), nn.SiLU(), nn.Linear(32, 1))
        made = BiasFittingTrainer(network, fitter, lengths_of, learning_rate=1e-2)
        made.run(pairs(400), 150, 50 if name == "curve" else 0, 200)
        with torch.no_grad():
            scores = network(features).squeeze(1)
        ratios[name] = float(correlation_ratio(scores, lengths_of(features)))
        quality[name] = float(pearson(scores, features[:, 1]))
        assert made.degenerate == 0
    assert ratios["curve"] < 0.5 * ratios["line"]
    assert quality["curve"] > 0.9 > 0.8 > quality["line"]


def test_batches_without_variance_are_counted():
    made = BiasFittingTrainer(Reward(), BiasFitter(), lambda inputs: torch.full((len(inputs),), 0.1))
    for phase in ("fit", "debias"):
        made.phase = phase
        figures = made.step(*batches(1)[0])
        assert figures["correlation"] == 0
        assert math.isfinite(figures["loss"])
    assert made.degenerate == 2
    assert all(torch.isfinite(p).all() for p in made.fitter.parameters())


def test_gathered_statistics():
    # a "gather" that adds what another device has
    generator = torch.Generator().manual_seed(3)
    others = torch.randn(32, generator=generator)
    made = trainer(gather=lambda values: torch.cat([values, others + values.detach().mean()]))
    alone = trainer()
    made.phase = alone.phase = "fit"
    pair = batches(1)[0]
    assert made.step(*pair)["correlation"] != alone.step(*pair)["correlation"]


def test_mappings_and_logits():
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 1)

        def forward(self, features, mask):
            class Output:
                logits = self.linear(features * mask)

            return Output

    made = BiasFittingTrainer(Classifier(), BiasFitter(), lambda inputs: inputs["mask"].sum(1))
    chosen, rejected = ({"features": x, "mask": torch.ones_like(x)} for x in batches(1)[0])
    assert math.isfinite(made.step(chosen, rejected)["loss"])


def test_posthoc():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 600, (3000,), generator=generator).float()
    quality = torch.randn(3000, generator=generator)
    line = quality + 0.01 * lengths
    debiaser = PosthocDebiaser(identity_fitter).fit(line, lengths)
    slope = np.polyfit(lengths.double().numpy(), line.double().numpy(), 1)[0]
    assert debiaser.slope == pytest.approx(slope, rel=1e-6)
    corrected = debiaser(line, lengths)
    assert torch.allclose(corrected, line - slope * lengths, atol=1e-4)
    assert abs(float(pearson(corrected, lengths))) < 1e-3
    assert np.allclose(debiaser(line.numpy(), lengths.numpy()), corrected.numpy(), atol=1e-4)
    assert debiaser(line.double(), lengths).dtype == torch.float64
    # a hump takes a fitter that learns
    hump = quality + 3 * torch.exp(-(((lengths - 250) / 120) ** 2))
    torch.manual_seed(0)
    curve = PosthocDebiaser(BiasFitter()).fit(hump, lengths, steps=200, generator=generator)
    linear = PosthocDebiaser(identity_fitter).fit(hump, lengths)
    left = [float(correlation_ratio(d(hump, lengths), lengths)) for d in (curve, linear)]
    assert left[0] < 0.05 < left[1]
    assert PosthocDebiaser(identity_fitter).fit([1.0, 2.0], [3.0, 3.0]).slope == 0


def test_wrong_use():
    with pytest.raises(InvalidInputError, match="period must be a whole number"):
        trainer(period=0)
    with pytest.raises(InvalidInputError, match="weight must be at least 0"):
        trainer(weight=-1.0)
    with pytest.raises(InvalidInputError, match="target in"):
        trainer(target=1.0)
    made = trainer()
    with pytest.raises(UnknownNameError, match="did you mean 'debias'"):
        made.phase = "debais"
    with pytest.raises(InvalidInputError, match="16 chosen and 3 rejected"):
        made.step(batches(1)[0][0], batches(1)[0][1][:3])
    made.attribute_fn = lambda inputs: inputs
    with pytest.raises(InvalidInputError, match=r"attribute_fn gave shape \(16, 4\) for 16 chosen"):
        made.step(*batches(1)[0])
    made.attribute_fn = lambda inputs: inputs[:, 0] * math.nan
    made.phase = "fit"
    with pytest.raises(InvalidInputError, match="second sample is nan"):
        made.step(*batches(1)[0])
    wide = BiasFittingTrainer(nn.Linear(4, 2), BiasFitter(), lengths_of)
    with pytest.raises(InvalidInputError, match=r"scores of shape \(16, 2\)"):
        wide.step(*batches(1)[0])
    linear = BiasFittingTrainer(Reward(), identity_fitter, lengths_of)
    linear.phase = "debias"
    assert linear.turn == "reward"
    linear.phase = "fit"
    with pytest.raises(InvalidInputError, match="no weights to fit"):
        linear.step(*batches(1)[0])
    with pytest.raises(InvalidInputError, match="has not been fitted"):
        PosthocDebiaser(identity_fitter)([1.0], [2.0])
    with pytest.raises(InvalidInputError, match=r"\(N,\) of both"):
        PosthocDebiaser(identity_fitter).fit([1.0, 2.0], [3.0])
    with pytest.raises(InvalidInputError, match="no weights to fit"):
        PosthocDebiaser(identity_fitter).fit([1.0, 2.0], [3.0, 4.0], steps=1)
