r"""How a reward depends on length, or on any other number: correlation, its ratio, accuracy by which side has more.

`BiasFitter` is a small network that sees the length alone and learns the curve by which a reward follows it; its
correlation with the reward is what `polyreward.reward_models.bias_fitting` removes.

    rho(a, b) = sum_i (a_i - mean a)(b_i - mean b) / (|a - mean a| |b - mean b| + eps)
    eta^2     = variance of the mean reward of each bin of lengths / variance of the reward

eta is the correlation that the best curve, ``E[r | length]``, can reach. A reward that is uncorrelated with one curve
may still depend on length: watch eta too. "Bias Fitting to Mitigate Length Bias of Reward Model in RLHF" (FiMi-RM,
arXiv 2505.12843).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from polyreward.errors import InvalidInputError


@dataclass(frozen=True)
class LengthEncoding:
    """A number as sines and cosines of many wavelengths (arXiv 2505.12843).

    Calling it with (B,) gives (B, dim): for j = 0, 1, ... the pair ``sin(len / base^(2j/dim))``, ``cos`` of the same,
    in float32 or wider.

    Parameters
    ----------
    dim : int
        Even.
    base : float
        Above 1; the longest wavelength is ``2 pi base^((dim - 2) / dim)``.

    Raises
    ------
    InvalidInputError
        An odd `dim`, or a `base` of 1 or less.
    """

    dim: int = 32
    base: float = 10000

    def __post_init__(self) -> None:
        if self.dim < 2 or self.dim % 2:
            raise InvalidInputError(f"dim must be even and at least 2, for pairs of sine and cosine, got {self.dim}")
        if not 1 < self.base < math.inf:
            raise InvalidInputError(f"base must be a finite number above 1, got {self.base}")

    def __call__(self, lengths: Tensor) -> Tensor:
        """Encodings, (..., dim)."""
        values = lengths if lengths.dtype in (torch.float32, torch.float64) else lengths.float()
        exponents = torch.arange(0, self.dim, 2, device=values.device, dtype=values.dtype) / self.dim
        phases = values.unsqueeze(-1) * self.base**-exponents
        return torch.stack([phases.sin(), phases.cos()], dim=-1).flatten(-2)


class BiasFitter(nn.Module):
    """The curve by which a reward follows a number, ``f(len)``: (B,) to (B,) (arXiv 2505.12843).

    Residual blocks ``h + ReLU(MLP(LayerNorm(h)))`` on the encoding and a linear layer. The MLP has a hidden layer with
    ReLU; its width is our reading, from the paper's count of about 6,400 weights (6,465 here).

    Parameters
    ----------
    encoder : function of (B,) to (B, dim) with ``dim``, default `LengthEncoding`
    blocks, hidden : int
    """

    def __init__(self, encoder: Any = None, blocks: int = 2, hidden: int = 48) -> None:
        super().__init__()
        if blocks < 0 or hidden < 1:
            raise InvalidInputError(f"blocks must be at least 0 and hidden at least 1, got {blocks} and {hidden}")
        self.encoder = LengthEncoding() if encoder is None else encoder
        dim = int(self.encoder.dim)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim), nn.ReLU())
            for _ in range(blocks)
        )
        self.head = nn.Linear(dim, 1)

    def forward(self, lengths: Tensor) -> Tensor:
        """``f``, (B,), in the dtype of the weights."""
        states = self.encoder(lengths).to(self.head.weight.dtype)
        for block in self.blocks:
            states = states + block(states)
        found: Tensor = self.head(states).squeeze(-1)
        return found


def identity_fitter(lengths: Tensor) -> Tensor:
    """``f(len) = len``, in float32 or wider: with it, only what is linear in length is removed."""
    return lengths if lengths.dtype in (torch.float32, torch.float64) else lengths.float()


def pearson(a: Any, b: Any, eps: float = 1e-8) -> Any:
    """Pearson's correlation of two samples of one length.

    Parameters
    ----------
    a, b : float (N,) tensors or arrays
    eps : float
        Added to the denominator; the paper does not give it.

    Returns
    -------
    scalar in [-1, 1], a tensor where `a` or `b` is one, in its dtype, with gradient. Where either does not vary, or N
    is below 2, it is 0 without gradient.

    Raises
    ------
    InvalidInputError
        Shapes that differ; NaN or infinite values.
    """
    first, second, array = _two(a, b, "pearson")
    x, y = first - first.mean(), second - second.mean()
    if not (varies(first) and varies(second)):
        return _out((x * 0).sum() + (y * 0).sum() if len(x) else first.sum() + second.sum(), a, b, array)
    # scaled by their largest, the squares can neither overflow nor vanish
    u, v = x.detach().abs().amax(), y.detach().abs().amax()
    norms = (x / u).square().sum().sqrt() * (y / v).square().sum().sqrt()
    return _out(((x / u) * (y / v)).sum() / (norms + eps / (u * v)), a, b, array)


def varies(values: Tensor) -> bool:
    """Whether there are two different values; rounding of the mean makes a variance of equal ones that is not 0."""
    return len(values) > 1 and bool(values.detach().amax() > values.detach().amin())


def correlation_ratio(r: Any, attr: Any, bins: int = 10) -> Any:
    """Eta squared: the share of a reward's variance that lies between bins of an attribute.

    Parameters
    ----------
    r, attr : float (N,) tensors or arrays
    bins : int
        Of equal numbers of samples, equal attributes always together; each value is its own bin where there are no more
        than `bins` of them. Of unrelated samples, about ``(bins - 1) / N`` is expected.

    Returns
    -------
    scalar in [0, 1], a tensor where `r` or `attr` is one; 0 where the reward does not vary, or there are no samples

    Raises
    ------
    InvalidInputError
        Shapes that differ; NaN or infinite values; no bins.
    """
    if bins < 1:
        raise InvalidInputError(f"bins must be at least 1, got {bins}")
    reward, attribute, array = _two(r, attr, "correlation_ratio")
    if not varies(reward):
        return _out((reward * 0).sum(), r, attr, array)
    place = _bins(attribute.detach(), bins)
    sums = torch.zeros(bins, dtype=reward.dtype, device=reward.device)
    centred = reward - reward.mean()
    count = sums.index_add(0, place, torch.ones_like(reward))
    means = sums.index_add(0, place, centred) / count.clamp(min=1)
    return _out((count * means.square()).sum() / centred.square().sum(), r, attr, array)


class ConfoundSplit(NamedTuple):
    """Accuracies of `confound_split_accuracy`; None where there is no such pair."""

    greater: float | None
    less: float | None
    equal: float | None
    overall: float | None


def confound_split_accuracy(r_w: Any, r_l: Any, attr_w: Any, attr_l: Any) -> ConfoundSplit:
    """Accuracy where the chosen response has more of an attribute than the rejected one, less, as much, and overall.

    Parameters
    ----------
    r_w, r_l : float (N,) tensors or arrays
        Rewards of the chosen and the rejected responses; equal ones count half.
    attr_w, attr_l : (N,)
        Their attributes, such as lengths.

    Raises
    ------
    InvalidInputError
        Shapes that differ; NaN.
    """
    names = ("r_w", "r_l", "attr_w", "attr_l")
    values = [_array(value) for value in (r_w, r_l, attr_w, attr_l)]
    for name, value in zip(names, values, strict=True):
        if value.shape != values[0].shape or value.ndim != 1:
            raise InvalidInputError(
                f"confound_split_accuracy: {name} has shape {value.shape}, r_w {values[0].shape}: expected (pairs,)"
            )
        if np.isnan(value).any():
            raise InvalidInputError(
                f"confound_split_accuracy: {name}[{int(np.isnan(value).argmax())}] is NaN, expected a number"
            )
    won, lost, more, other = values
    right = (won > lost) + 0.5 * (won == lost)
    everything = np.ones(len(right), bool)
    parts = (more > other, more < other, more == other, everything)
    return ConfoundSplit(*(float(right[part].mean()) if part.any() else None for part in parts))


def _bins(attribute: Tensor, bins: int) -> Tensor:
    values, place = attribute.unique(return_inverse=True)
    if len(values) <= bins:
        return place
    ranked = attribute.sort().values
    # the first sample of each bin but the first; equal attributes go with the last bin that they begin
    starts = torch.arange(1, bins, device=attribute.device) * len(ranked) // bins
    return torch.searchsorted(ranked[starts].contiguous(), attribute, right=True)


def _two(a: Any, b: Any, name: str) -> tuple[Tensor, Tensor, bool]:
    array = not isinstance(a, Tensor) and not isinstance(b, Tensor)
    device = next((value.device for value in (a, b) if isinstance(value, Tensor)), "cpu")
    found = []
    for value in (a, b):
        tensor = value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value, dtype=np.float64))
        tensor = tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
        found.append(tensor.to(device))
    first, second = found
    if first.ndim != 1 or first.shape != second.shape:
        raise InvalidInputError(
            f"{name} needs two samples of one length, got shapes {tuple(first.shape)} and {tuple(second.shape)}"
        )
    for which, value in zip(("first", "second"), found, strict=True):
        bad = ~torch.isfinite(value.detach())
        if bool(bad.any()):
            place = int(bad.int().argmax())
            raise InvalidInputError(f"{name}: value {place} of the {which} sample is {float(value.detach()[place])}")
    wide = torch.promote_types(first.dtype, second.dtype)
    return first.to(wide), second.to(wide), array


def _out(value: Tensor, a: Any, b: Any, array: bool) -> Any:
    if array:
        return float(value)
    given = next((v for v in (a, b) if isinstance(v, Tensor) and v.is_floating_point()), None)
    return value if given is None else value.to(given.dtype)


def _array(values: Any) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().double().cpu().numpy()
    return np.asarray(values, dtype=np.float64)
