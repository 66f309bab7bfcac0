"""`RewardHead`: linear layers with activations between them, from hidden states to a number each.

The head of the BaseReward recipe (arXiv 2509.16127), which found two layers with SiLU better than one and more no
better, and of YOJO (arXiv 2604.10966), which begins it small and divides its scores by the root of the width.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from polyreward.errors import InvalidInputError
from polyreward.reward_models.heads import ACTIVATIONS, Items

Activation = Literal["silu", "relu", "tanh", "gelu"]


class RewardHead(nn.Module):
    """``Linear(H, hidden) -> activation -> ... -> Linear(hidden, 1)``.

    Parameters
    ----------
    hidden_size : int
        H, the width of the hidden states.
    num_layers : int
        Linear layers; 1 is the usual linear head, of H + 1 weights.
    activation : "silu", "relu", "tanh" or "gelu"
    hidden_dim : int, optional
        Width between the layers; default H, which the BaseReward paper leaves open.
    init_std : float, optional
        Weights are drawn from N(0, init_std^2) and biases are 0; default torch's own start.
    scale : float > 0
        What the output is multiplied by.

    Raises
    ------
    InvalidInputError
        A size below 1, an unknown activation, hidden states of another width.
    """

    def __init__(
        self,
        hidden_size: int,
        num_layers: int = 2,
        activation: str = "silu",
        hidden_dim: int | None = None,
        init_std: float | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        for name, value in (("hidden_size", hidden_size), ("num_layers", num_layers), ("hidden_dim", hidden_dim or 1)):
            if value < 1:
                raise InvalidInputError(f"{name} of a RewardHead must be at least 1, got {value}")
        if activation not in ACTIVATIONS:
            raise InvalidInputError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        if not (0 < scale < math.inf) or (init_std is not None and not 0 <= init_std < math.inf):
            raise InvalidInputError(f"scale must be above 0 and init_std at least 0, got {scale} and {init_std}")
        self.config: dict[str, Any] = {
            "hidden_size": hidden_size,
            "num_layers": num_layers,
            "activation": activation,
            "hidden_dim": hidden_dim,
            "init_std": init_std,
            "scale": scale,
        }
        inner = hidden_dim or hidden_size
        parts: list[nn.Module] = []
        for layer in range(num_layers - 1):
            parts += [nn.Linear(hidden_size if layer == 0 else inner, inner), ACTIVATIONS[activation]()]
        self.network = nn.Sequential(*parts, nn.Linear(hidden_size if num_layers == 1 else inner, 1))
        self.hidden_size, self.scale = hidden_size, scale
        if init_std is not None:
            for part in self.network:
                if isinstance(part, nn.Linear):
                    nn.init.normal_(part.weight, std=init_std)
                    nn.init.zeros_(part.bias)

    def forward(self, states: Tensor | Items) -> Tensor:
        """Numbers (...) of hidden states (..., H), in float32 or wider; or (R,) of `Items`."""
        states = states.features if isinstance(states, Items) else states
        if states.ndim < 1 or states.shape[-1] != self.hidden_size:
            raise InvalidInputError(
                f"this RewardHead reads hidden states of width {self.hidden_size}, got shape {tuple(states.shape)}"
            )
        weight = next(self.network.parameters())
        scores: Tensor = self.network(states.to(weight.dtype)).squeeze(-1)
        return scores.to(torch.promote_types(scores.dtype, torch.float32)) * self.scale
