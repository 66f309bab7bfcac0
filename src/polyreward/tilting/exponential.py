"""Exponential tilting in log space: weights, effective sample size and soft values.

    w proportional to prior exp(r / T),   effective size 1 / sum w^2,   soft value T log E_prior exp(r / T)

The common step of reward-weighted distribution matching, importance resampling, particle methods and soft values over
trees. Everything is computed from the largest exponent, so that no reward or temperature overflows.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from polyreward.errors import InvalidInputError
from polyreward.tilting.arrays import Array, broadcast, like, positive, refuse, tensor


class Tilted(NamedTuple):
    """A tilted distribution.

    Attributes
    ----------
    weights : (..., A), sums to 1 over the axis
    effective_size : (...)
        ``1 / sum(weights^2)``: between 1 (one entry has everything) and A; 0 where nothing has weight.
    log_total : (...)
        Log of the sum before normalisation. Without `log_prior` it is the log of a mean, and temperature times it is
        the soft value; -inf where nothing has weight.
    """

    weights: Any
    effective_size: Any
    log_total: Any


def exponential_tilt(
    rewards: Array,
    temperature: float = 1.0,
    log_prior: Array | None = None,
    mask: Array | None = None,
    *,
    dim: int = -1,
    standardize: bool = False,
) -> Tilted:
    """Weights proportional to ``exp(log_prior + rewards / temperature)`` along `dim`.

    Parameters
    ----------
    rewards : (..., A)
        -inf is allowed and has weight 0.
    temperature : float > 0
    log_prior : (..., A), optional
        Log-probabilities of the entries, or log importance ratios; -inf is allowed. Default: uniform over the entries.
    mask : bool, broadcasts with `rewards`
    standardize : bool
        Tilt by ``(rewards - mean) / deviation`` of the row (population deviation, -inf left out). The tilted law then
        depends on the row's spread; equal rewards leave the prior.

    Raises
    ------
    InvalidInputError
        NaN or +inf in `rewards` or `log_prior`, a temperature that is not positive, shapes that do not broadcast.
    """
    scores, prior = _scores(rewards, log_prior, mask, dim, temperature, "exponential_tilt")
    if standardize:
        scores = _standardized(scores)
    exponent = prior + scores / temperature
    total = _log_sum(exponent)
    weights = torch.where(exponent > -torch.inf, (exponent - _finite(total)[..., None]).exp(), 0.0)
    size = effective_sample_size(weights)
    return Tilted(like(weights.movedim(-1, dim), rewards), like(size, rewards), like(total, rewards))


def effective_sample_size(weights: Array, mask: Array | None = None) -> Any:
    """``(sum w)^2 / sum w^2`` over the last axis, (...), for weights of any scale; 0 where nothing has weight.

    Raises
    ------
    InvalidInputError
        A weight that is negative or not finite.
    """
    values, _, valid = broadcast("effective_sample_size", weights, None, mask)
    values = torch.where(valid, values, 0.0)
    refuse(~((values >= 0) & torch.isfinite(values)), values, "effective_sample_size: weight", "finite and at least 0")
    share = values / positive(values.amax(-1, keepdim=True))
    return like(share.sum(-1).square() / positive(share.square().sum(-1)), weights)


def logmeanexp(
    values: Array,
    temperature: float = 1.0,
    log_weights: Array | None = None,
    mask: Array | None = None,
    *,
    dim: int = -1,
) -> Any:
    """Soft value ``T log(sum w exp(v / T) / sum w)`` along `dim`: the mean as T grows, the maximum as T falls to 0.

    It never exceeds the maximum, unlike ``T logsumexp(v / T)``, which adds ``T log A`` for A entries.

    Parameters
    ----------
    values : (..., A); -inf is allowed
    temperature : float > 0
    log_weights : (..., A), optional
        Log of the weights w, of any scale; -inf is allowed. Default: equal weights.
    mask : bool, broadcasts with `values`

    Returns
    -------
    (...): -inf where nothing has weight. Its gradient in `values` is the tilted distribution.

    Raises
    ------
    InvalidInputError
        As `exponential_tilt`.
    """
    scores, prior = _scores(values, log_weights, mask, dim, temperature, "logmeanexp")
    total = _log_sum(prior + scores / temperature)
    return like(temperature * (total - _finite(_log_sum(prior))), values)


def _scores(
    values: Array, log_prior: Array | None, mask: Array | None, dim: int, temperature: float, name: str
) -> tuple[Tensor, Tensor]:
    """Scores and log-weights with `dim` last, -inf where nothing takes part."""
    if not (isinstance(temperature, int | float | np.number) and 0 < temperature < math.inf):
        raise InvalidInputError(f"{name}: temperature must be a positive number, got {temperature!r}")
    given = (values, log_prior, mask)
    moved = tuple(None if each is None else _last(each, dim, name) for each in given)
    scores, prior, valid = broadcast(name, moved[0], moved[1], moved[2])  # type: ignore[arg-type]
    for what, entries in (("value", scores), ("log-weight", prior)):
        refuse(valid & (entries.isnan() | (entries == torch.inf)), entries, f"{name}: {what}", "a number or -inf")
    if log_prior is None:
        number = valid.sum(-1, keepdim=True).clamp(min=1).to(torch.float64)
        prior = -number.log().expand(scores.shape)
    prior = torch.where(valid, prior, -torch.inf)
    return torch.where(valid & (prior > -torch.inf), scores, -torch.inf), prior


def _last(values: Array, dim: int, name: str) -> Tensor:
    array = tensor(values)
    if array.ndim == 0:
        return array
    if not -array.ndim <= dim < array.ndim:
        raise InvalidInputError(f"{name}: no axis {dim} in shape {tuple(array.shape)}")
    return array.movedim(dim, -1)


def _standardized(scores: Tensor) -> Tensor:
    """Scores in deviations from the mean of their row; 0 where the finite ones are all equal, -inf as it was."""
    finite = torch.isfinite(scores)
    values = torch.where(finite, scores, 0.0)
    number = finite.sum(-1, keepdim=True).clamp(min=1)
    centred = torch.where(finite, values - values.sum(-1, keepdim=True) / number, 0.0)
    variance = centred.square().sum(-1, keepdim=True) / number
    low = torch.where(finite, values, torch.inf).amin(-1, keepdim=True)
    high = torch.where(finite, values, -torch.inf).amax(-1, keepdim=True)
    flat = (high <= low) | (variance <= 0)
    scaled = torch.where(flat, 0.0, centred / torch.where(flat, 1.0, variance).sqrt())
    return torch.where(finite, scaled, scores)


def _log_sum(exponent: Tensor) -> Tensor:
    """Log of the sum of exponentials over the last axis whose gradient is 0, not NaN, where everything is -inf."""
    present = exponent > -torch.inf
    top = _finite(exponent.detach().amax(-1, keepdim=True))
    total = torch.where(present, (torch.where(present, exponent, 0.0) - top).exp(), 0.0).sum(-1)
    return torch.where(total > 0, positive(total).log() + top[..., 0], -torch.inf)


def _finite(values: Tensor) -> Tensor:
    return torch.where(torch.isfinite(values), values, 0.0)
