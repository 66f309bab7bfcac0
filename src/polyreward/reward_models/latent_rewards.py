"""Rewards of a latent user: ``r(s, z)``, and the probability that s beats s', for variational preference learning.

"Personalizing Reinforcement Learning from Human Feedback with Variational Preference Learning" (arXiv 2408.10075).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from polyreward.errors import InvalidInputError
from polyreward.reward_models.preference_sets import SLOPE

CHUNK = 1 << 20
"""Hidden numbers that a comparison with many states holds at once."""


class LatentReward(nn.Module):
    """``r(s, z)``: a network on [s, z] (arXiv 2408.10075).

    Parameters
    ----------
    d_in, d_latent : int
        Widths of an item and of the latent.
    hidden, layers : int
        Hidden layers and their width; 3 of 256 in the paper.
    scale : float > 0
        kappa in the paper: a difference of rewards is divided by it to give a logit.
    """

    def __init__(self, d_in: int, d_latent: int, hidden: int = 256, layers: int = 3, scale: float = 1.0) -> None:
        super().__init__()
        if not scale > 0:
            raise InvalidInputError(f"scale must be above 0, got {scale}")
        self.d_in, self.d_latent, self.scale = d_in, d_latent, scale
        self.network = _network(d_in + d_latent, hidden, layers)

    def reward(self, items: Tensor, z: Tensor) -> Tensor:
        """Rewards of items for users.

        Parameters
        ----------
        items : float (..., d_in)
        z : float (..., d_latent)
            One latent (d_latent,), one for each of the leading rows of the items, or any shape that broadcasts: items
            (R, d) and latents (U, 1, k) give (U, R).

        Returns
        -------
        float (...,)
        """
        _check_width(items, self.d_in, "items")
        return _run(self.network, [items, _aligned(z, items, self.d_latent)])

    def logits(self, first: Tensor, second: Tensor, z: Tensor) -> Tensor:
        """Logit that the first is preferred.

        Parameters
        ----------
        first, second : float (B, N, d_in), or (B, N, T, d_in) for segments of T states, whose rewards are summed
        z : float (B, d_latent), or one that broadcasts

        Returns
        -------
        float (B, N)
        """
        difference = self.reward(first, z) - self.reward(second, z)
        return (difference.sum(dim=-1) if first.ndim == 4 else difference) / self.scale

    def forward(self, items: Tensor, z: Tensor) -> Tensor:
        """As `reward`."""
        return self.reward(items, z)


class PairwiseLatentPreference(nn.Module):
    """``logit P(s beats s' | z)``: a network on [s, s', z], for rewards in (0, 1) (VPL-SPO, arXiv 2408.10075).

    Parameters
    ----------
    d_in, d_latent : int
    hidden, layers : int
    symmetric : bool
        Use ``logit(s, s') - logit(s', s)``; a plain network need not say the opposite of the opposite pair.
    """

    def __init__(self, d_in: int, d_latent: int, hidden: int = 256, layers: int = 3, symmetric: bool = False) -> None:
        super().__init__()
        self.d_in, self.d_latent, self.hidden, self.symmetric = d_in, d_latent, hidden, symmetric
        self.network = _network(2 * d_in + d_latent, hidden, layers)

    def logits(self, first: Tensor, second: Tensor, z: Tensor) -> Tensor:
        """Logit that the first beats the second: items (..., d_in) twice, z (..., d_latent) -> (...,).

        Raises
        ------
        InvalidInputError
            Items of another width or shape; segments of several states have no pairwise logit.
        """
        for name, items in (("first", first), ("second", second)):
            _check_width(items, self.d_in, name)
        z = _aligned(z, first if first.ndim >= second.ndim else second, self.d_latent)
        logits = _run(self.network, [first, second, z])
        return logits - _run(self.network, [second, first, z]) if self.symmetric else logits

    def reward(self, items: Tensor, z: Tensor, comparison_items: Tensor, temperature: float | None = None) -> Tensor:
        """Mean probability of beating the comparison items, for users.

        Parameters
        ----------
        items : float (..., d_in)
        z : as of `LatentReward.reward`
        comparison_items : float (M, d_in)
            1000 states in the paper.
        temperature : float > 0, optional
            Give ``exp(r / temperature)`` in place of r.

        Returns
        -------
        float (...,)
            In (0, 1) without a temperature.
        """
        if comparison_items.ndim != 2 or not len(comparison_items):
            raise InvalidInputError(
                f"comparison_items must be (M, {self.d_in}) with M > 0, got shape {tuple(comparison_items.shape)}"
            )
        if temperature is not None and not temperature > 0:
            raise InvalidInputError(f"temperature must be above 0, got {temperature}")
        z = _aligned(z, items, self.d_latent).unsqueeze(-2)
        rows = torch.broadcast_shapes(items.shape[:-1], z.shape[:-2])
        size = max(CHUNK // max(self.hidden * rows.numel(), 1), 1)
        total = items.new_zeros(rows)
        for some in comparison_items.split(size):
            total = total + torch.sigmoid(self.logits(items.unsqueeze(-2), some, z)).sum(dim=-1)
        mean = total / len(comparison_items)
        return mean if temperature is None else torch.exp(mean / temperature)

    def forward(self, first: Tensor, second: Tensor, z: Tensor) -> Tensor:
        """As `logits`."""
        return self.logits(first, second, z)


def _network(width: int, hidden: int, layers: int) -> nn.Sequential:
    if min(width, hidden, layers) < 1:
        raise InvalidInputError(f"widths and layers must be at least 1, got {width}, {hidden}, {layers}")
    parts: list[nn.Module] = [nn.Linear(width, hidden), nn.LeakyReLU(SLOPE)]
    for _ in range(layers - 1):
        parts += [nn.Linear(hidden, hidden), nn.LeakyReLU(SLOPE)]
    return nn.Sequential(*parts, nn.Linear(hidden, 1))


def _run(network: nn.Sequential, parts: Sequence[Tensor]) -> Tensor:
    """The network on the concatenated parts; its first layer is applied to each before they are broadcast together."""
    first = network[0]
    assert isinstance(first, nn.Linear)
    weights = first.weight.split([part.shape[-1] for part in parts], dim=1)
    hidden: Any = first.bias
    for part, weight in zip(parts, weights, strict=True):
        hidden = hidden + linear(part, weight)
    out: Tensor = network[1:](hidden)
    return out.squeeze(-1)


def _check_width(items: Tensor, width: int, name: str) -> None:
    if items.ndim < 1 or items.shape[-1] != width:
        raise InvalidInputError(f"{name} have shape {tuple(items.shape)}, expected (..., {width})")


def _aligned(z: Tensor, items: Tensor, width: int) -> Tensor:
    """Latents that broadcast with the items; leading rows of both belong together."""
    _check_width(z, width, "latents")
    rows, users = items.shape[:-1], z.shape[:-1]
    if len(users) < len(rows) and users == rows[: len(users)]:
        return z.reshape(*users, *[1] * (len(rows) - len(users)), width)
    try:
        torch.broadcast_shapes(rows, users)
    except RuntimeError:
        raise InvalidInputError(
            f"latents of shape {tuple(z.shape)} do not fit items of shape {tuple(items.shape)}; latents (U, 1, "
            f"{width}) and items (R, d) give every item for every user"
        ) from None
    return z
