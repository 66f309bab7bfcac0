"""The best distribution inside a divergence ball around a base: exact for chi-square and for KL.

    chi-square   q = p (1 + sqrt(kappa / Var a) (a - E a)); where that is negative, entries of lowest advantage leave
    KL           q proportional to p exp(a / T) at the temperature T where KL(q || p) = kappa

In the chi-square ball of radius kappa the best mean advantage is ``E a + sqrt(kappa Var a)`` as long as no weight is
cut at 0: what the ball is worth is the spread of the base. That is why the ball measures what a verifier can gain.

Scaling Test-Time Compute Without Verification or RL is Suboptimal, arXiv 2502.12118.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyreward.errors import InvalidInputError
from polyreward.tilting.arrays import Array, broadcast, distribution, like, positive, refuse, tensor

_BISECTIONS, _LOG_RANGE, _NOTHING = 90, 60.0, -1e300


@dataclass(frozen=True)
class Chi2Tilt:
    """`chi2_tilt` with its radius: ``tilt(p, advantage, mask)``.

    Parameters
    ----------
    kappa : float >= 0
        kappa in arXiv 2502.12118; 0.5 is this library's choice.

    Raises
    ------
    InvalidInputError
        A radius that is no number of at least 0.
    """

    kappa: float = 0.5

    def __post_init__(self) -> None:
        check_radius(self.kappa, "Chi2Tilt")

    def __call__(self, p: Array, advantage: Array, mask: Array | None = None) -> Any:
        """Tilted distribution (..., A)."""
        return chi2_tilt(p, advantage, self.kappa, mask)


@dataclass(frozen=True)
class KLTilt:
    """`kl_tilt` with its radius: ``tilt(p, advantage, mask)``.

    Parameters
    ----------
    kappa : float >= 0
        In nats.

    Raises
    ------
    InvalidInputError
        A radius that is no number of at least 0.
    """

    kappa: float = 0.5

    def __post_init__(self) -> None:
        check_radius(self.kappa, "KLTilt")

    def __call__(self, p: Array, advantage: Array, mask: Array | None = None) -> Any:
        """Tilted distribution (..., A)."""
        return kl_tilt(p, advantage, self.kappa, mask)


def chi2_tilt(p: Array, advantage: Array, kappa: float | Array, mask: Array | None = None) -> Any:
    """The exact maximiser of ``E_q[advantage]`` over ``{q >= 0: chi2(q || p) <= kappa}``.

    Chi-square is ``sum (q - p)^2 / p``. Where no weight turns negative the maximum is ``E_p a + sqrt(kappa Var_p a)``;
    beyond, the entries of lowest advantage leave the support one after the other (water-filling), down to the best
    entries alone, which no larger radius improves. For one entry of worth 1 among entries of worth 0 the tilted
    probability is ``min(1, p + sqrt(kappa p (1 - p)))``.

    Parameters
    ----------
    p : (..., A), each row a distribution
    advantage : (..., A), finite, broadcasts with `p`
    kappa : float >= 0, or one a row (...)
        Radius; infinity is allowed.
    mask : bool, broadcasts with `p`

    Returns
    -------
    (..., A) in the dtype of `p`: a distribution over the entries where ``p > 0``. It is `p` itself where kappa is 0 or
    all advantages are equal. Gradients flow into `p`, `advantage` and `kappa`, for the support as it is.

    Raises
    ------
    InvalidInputError
        A row of `p` that is no distribution, an advantage that is not finite, a negative radius, shapes that do not
        broadcast. The message names the index.
    """
    raw, gap, rows, total = ball(p, advantage, kappa, mask, "chi2_tilt")
    base = raw / positive(total)
    with torch.no_grad():
        support = _support(base, gap, rows)
    kept = torch.where(support, base, 0.0)
    inside = positive(kept.sum(-1, keepdim=True))
    mean = (kept * gap).sum(-1, keepdim=True) / inside
    variance = (kept * (gap - mean).square()).sum(-1, keepdim=True) / inside
    # Leaving the rest of the support has its price; the slope on the support has what remains of the radius.
    room = rows * inside - torch.where(support, 0.0, base).sum(-1, keepdim=True)
    spread = (room > 0) & (variance > 0)
    slope = torch.where(spread, torch.where(spread, room / positive(variance), 1.0).sqrt(), 0.0)
    tilted = kept / inside * (1 + slope * (mean - gap)).clamp(min=0)
    return like(torch.where(_still(gap, rows), raw, tilted), p)


def kl_tilt(p: Array, advantage: Array, kappa: float | Array, mask: Array | None = None) -> Any:
    """The exact maximiser of ``E_q[advantage]`` over ``{q: KL(q || p) <= kappa}``, kappa in nats.

    It is ``p exp(a / T)``, normalised, at the temperature where the divergence is `kappa`; the best entries alone, in
    the proportions of `p`, where even these are within the ball (``-log p(best) <= kappa``). The temperature is found
    by bisection. Parameters, result, gradients and errors are those of `chi2_tilt`.
    """
    raw, gap, rows, total = ball(p, advantage, kappa, mask, "kl_tilt")
    base = raw / positive(total)
    present = base > 0
    log_base = torch.where(present, torch.where(present, base, 1.0).log(), _NOTHING)
    best = torch.where(gap == 0, base, 0.0)
    top = positive(best.sum(-1, keepdim=True))
    capped = rows >= -top.log()
    with torch.no_grad():
        low, high = torch.full_like(top, -_LOG_RANGE), torch.full_like(top, _LOG_RANGE)  # log(1 / T)
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            short = _divergence_at(middle.exp(), log_base, gap, present)[0] < rows
            low, high = torch.where(short, middle, low), torch.where(short, high, middle)
        inverse = ((low + high) / 2).exp()
        slope = _divergence_at(inverse, log_base, gap, present)[1]
    # One Newton step without its value: the gradient of 1 / T by the implicit function theorem.
    reached = _divergence_at(inverse, log_base, gap, present)[0]
    step = torch.where(~capped & (slope > 0), (rows - reached) / positive(slope), 0.0)
    tilted = torch.softmax(log_base - (inverse + step - step.detach()) * gap, -1)
    tilted = torch.where(capped, best / top, torch.where(present, tilted, 0.0))
    return like(torch.where(_still(gap, rows), raw, tilted), p)


def chi2_divergence(q: Array, p: Array) -> Any:
    """``sum (q - p)^2 / p`` over the last axis, (...); infinite where q has mass that p has not."""
    return _divergence("chi2_divergence", q, p, lambda tilted, base: (tilted - base).square() / base)


def kl_divergence(q: Array, p: Array) -> Any:
    """``sum q log(q / p)`` over the last axis in nats, (...); infinite where q has mass that p has not."""
    return _divergence("kl_divergence", q, p, lambda tilted, base: torch.special.xlogy(tilted, tilted / base))


def check_radius(kappa: Any, name: str) -> None:
    """`InvalidInputError` for a radius that is no number of at least 0."""
    if isinstance(kappa, bool) or not (isinstance(kappa, int | float | np.number) and kappa >= 0):
        raise InvalidInputError(f"{name}: kappa must be a number of at least 0, got {kappa!r}")


def ball(
    p: Array, advantage: Array, kappa: float | Array, mask: Array | None, name: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The base, the distance below the best in units of the row's range ([0, 1]), the radius and the base's sum."""
    base, worth, valid = broadcast(name, p, advantage, mask)
    base, total = distribution(name, base, valid)
    refuse(valid & ~torch.isfinite(worth), worth, f"{name}: advantage", "a finite number")
    present = base > 0
    worth = torch.where(present, worth, 0.0)
    # Tilts do not change with shift or scale of the advantage, so neither needs a gradient.
    with torch.no_grad():
        best = torch.where(present, worth, -torch.inf).amax(-1, keepdim=True).clamp(min=-torch.finfo(worth.dtype).max)
        scale = torch.where(present, best / 2 - worth / 2, 0.0).amax(-1, keepdim=True)
    gap = (best / 2 - worth / 2) / positive(scale)
    gap = torch.where(present, gap, torch.where(scale > 0, 1.0, 0.0))
    radius = tensor(kappa).to(base.device)
    refuse(~(radius >= 0), radius, f"{name}: kappa", "at least 0")
    try:
        rows = (radius if radius.ndim == 0 else radius[..., None]).expand(total.shape)
    except RuntimeError:
        shapes = f"kappa of shape {tuple(radius.shape)} for rows of shape {tuple(total.shape[:-1])}"
        raise InvalidInputError(f"{name}: {shapes}") from None
    return base, gap, rows, total


def _support(base: Tensor, gap: Tensor, rows: Tensor) -> Tensor:
    """Entries that keep weight in the chi-square ball.

    With water level nu, ``chi2(nu) = E (a - nu)+^2 / (E (a - nu)+)^2 - 1`` grows with nu. An entry keeps weight where
    the level at its own advantage costs more than the radius. The two moments at each entry's level are sums of terms
    that are not negative, so nothing cancels.
    """
    ordered, order = gap.sort(-1)
    mass = base.gather(-1, order).cumsum(-1)
    rise = torch.diff(ordered, prepend=ordered[..., :1], dim=-1)
    before = torch.nn.functional.pad(mass[..., :-1], (1, 0))
    first = (rise * before).cumsum(-1)
    second = (2 * rise * torch.nn.functional.pad(first[..., :-1], (1, 0)) + rise.square() * before).cumsum(-1)
    keeps = (second > (1 + rows) * first.square()) | (ordered == 0)
    return torch.zeros_like(keeps).scatter_(-1, order, keeps)


def _still(gap: Tensor, rows: Tensor) -> Tensor:
    return (rows == 0) | (gap.amax(-1, keepdim=True) == 0)


def _divergence_at(inverse: Tensor, log_base: Tensor, gap: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """KL of ``p exp(-inverse gap)`` from p, and its derivative in `inverse`; both (..., 1)."""
    exponent = log_base - inverse * gap
    total = torch.logsumexp(exponent, -1, keepdim=True)
    tilted = torch.where(present, (exponent - total).exp(), 0.0)
    mean = (tilted * gap).sum(-1, keepdim=True)
    return -inverse * mean - total, inverse * (tilted * (gap - mean).square()).sum(-1, keepdim=True)


def _divergence(name: str, q: Array, p: Array, term: Callable[[Tensor, Tensor], Tensor]) -> Any:
    tilted, base, valid = broadcast(name, q, p, None)
    tilted, base = distribution(name, tilted, valid, "q")[0], distribution(name, base, valid)[0]
    present = base > 0
    terms = torch.where(present, term(tilted, torch.where(present, base, 1.0)), 0.0)
    return like((terms + torch.where(~present & (tilted > 0), torch.inf, 0.0)).sum(-1), q)
