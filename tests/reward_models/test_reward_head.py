from functools import partial

import numpy as np
import pytest
import torch

from polyreward.errors import InvalidInputError
from polyreward.preferences import PreferenceData
from polyreward.reward_models.encoders import Features
from polyreward.reward_models.heads import Items
from polyreward.reward_models.model import PreferenceModel
from polyreward.reward_models.reward_head import RewardHead


@pytest.mark.parametrize(
    ("layers", "hidden", "weights"), [(1, None, 9), (2, None, 81), (2, 5, 8 * 5 + 5 + 5 + 1), (3, None, 153)]
)
def test_number_of_weights(layers, hidden, weights):
    head = RewardHead(8, layers, hidden_dim=hidden)
    assert sum(p.numel() for p in head.parameters()) == weights
    assert head(torch.zeros(3, 8)).shape == (3,)
    assert head(torch.zeros(2, 5, 8)).shape == (2, 5)


def test_one_reward_by_hand():
    head = RewardHead(2)
    first, _, last = head.network
    with torch.no_grad():
        first.weight.copy_(torch.eye(2))
        first.bias.zero_()
        last.weight.copy_(torch.tensor([[2.0, -1.0]]))
        last.bias.fill_(0.5)
    # SiLU(1) = .731059, SiLU(-1) = -.268941
    hidden = torch.nn.functional.silu(torch.tensor([1.0, -1.0]))
    assert hidden.tolist() == pytest.approx([0.731059, -0.268941], abs=1e-6)
    assert float(head(torch.tensor([1.0, -1.0])).detach()) == pytest.approx(2.231059, abs=1e-6)


@pytest.mark.parametrize("activation", ["silu", "relu", "tanh", "gelu"])
def test_the_head_is_a_plain_loop(activation):
    torch.manual_seed(0)
    head = RewardHead(3, 3, activation, hidden_dim=4, scale=0.5).double()
    states = torch.randn(5, 3, dtype=torch.float64)
    values = states
    for layer in head.network:
        if isinstance(layer, torch.nn.Linear):
            values = torch.stack([layer.weight @ row + layer.bias for row in values])
        else:
            values = getattr(torch.nn.functional, activation)(values)
    assert torch.allclose(head(states), 0.5 * values[:, 0])
    items = Items(states, torch.zeros(5).long(), torch.zeros(5).long())
    assert torch.equal(head(items), head(states))


def test_precision_and_gradient():
    head = RewardHead(4).to(torch.bfloat16)
    assert head(torch.randn(2, 4)).dtype == torch.float32
    assert RewardHead(4).double()(torch.randn(2, 4)).dtype == torch.float64
    states = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(RewardHead(4).double(), (states,))


def test_a_small_start():
    torch.manual_seed(0)
    head = RewardHead(64, hidden_dim=256, init_std=0.01)
    assert abs(float(head.network[0].weight.std()) - 0.01) < 5e-4
    assert not any(layer.bias.any() for layer in head.network if hasattr(layer, "bias"))


@pytest.mark.parametrize(("layers", "accuracy"), [(1, 0.75), (2, 1.0)])
def test_only_a_head_with_a_layer_between_can_prefer_xor(layers, accuracy):
    points = np.array([[0, 0], [0, 1], [1, 0], [1, 1]], np.float32)
    pairs = [(1, 0), (1, 3), (2, 0), (2, 3)]
    data = PreferenceData(np.arange(4), np.array(pairs).reshape(-1), choice=np.zeros(4, int))
    best = 0.0
    for seed in range(3):
        model = PreferenceModel(Features(points), partial(RewardHead, num_layers=layers, hidden_dim=8))
        model.fit(data, epochs=5, optimizer="lbfgs", weight_decay=0.0, validation=None, seed=seed)
        won, lost = (model.score(np.arange(4), [pair[side] for pair in pairs]) for side in (0, 1))
        best = max(best, float((won > lost).float().mean()))
    assert best <= accuracy
    assert layers == 1 or best == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden_size": 0}, "hidden_size of a RewardHead must be at least 1, got 0"),
        ({"hidden_size": 2, "num_layers": 0}, "num_layers"),
        ({"hidden_size": 2, "hidden_dim": -1}, "hidden_dim"),
        ({"hidden_size": 2, "activation": "swish"}, "activation must be one of silu, relu, tanh, gelu, got 'swish'"),
        ({"hidden_size": 2, "scale": 0.0}, "scale must be above 0"),
    ],
)
def test_arguments(arguments, message):
    with pytest.raises(InvalidInputError, match=message):
        RewardHead(**arguments)


def test_states_of_another_width():
    with pytest.raises(InvalidInputError, match=r"reads hidden states of width 4, got shape \(3, 5\)"):
        RewardHead(4)(torch.zeros(3, 5))


def test_the_configuration_makes_the_head_again():
    head = RewardHead(4, 3, "tanh", 6, 0.1, 0.5)
    again = RewardHead(**head.config)
    again.load_state_dict(head.state_dict())
    assert torch.equal(again(torch.ones(1, 4)), head(torch.ones(1, 4)))
