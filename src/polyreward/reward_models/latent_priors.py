"""Priors of a latent user, and the divergence of a posterior from them.

    standard   z ~ N(0, I)
    learned    z ~ N(m, diag exp(l)), m and l trained
    flow       z = f(e), e ~ N(0, I), f a chain of radial flows    (arXiv 1505.05770)

With a flow the encoder's Gaussian is over e, and both posterior and prior go through f: their divergence is that of the
Gaussians, exactly. From variational preference learning (arXiv 2408.10075), whose released code instead subtracts the
log-determinant of f from the loss, and for the learned prior has ``mu^2 - m^2`` in place of ``(mu - m)^2``.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from polyreward.errors import InvalidInputError, UnknownNameError, nearest

PriorName = Literal["standard", "learned", "flow"]
FLOW_LENGTH = 4


def gaussian_kl(
    mean: Tensor,
    log_variance: Tensor,
    prior_mean: Tensor | float = 0.0,
    prior_log_variance: Tensor | float = 0.0,
    *,
    half: bool = True,
) -> Tensor:
    """``KL(N(mean, exp lv) || N(prior))`` in nats, summed over the last axis.

    Parameters
    ----------
    mean, log_variance : float (..., d)
    prior_mean, prior_log_variance : broadcast
    half : bool
        False leaves out the factor 1/2, as the paper's control code does: its weight 1 is a weight of 2.

    Returns
    -------
    float (...,)
        Never negative.
    """
    if mean.shape != log_variance.shape:
        raise InvalidInputError(f"mean has shape {tuple(mean.shape)}, log_variance {tuple(log_variance.shape)}")
    prior_mean, prior_log_variance = (
        torch.as_tensor(v, dtype=mean.dtype, device=mean.device) for v in (prior_mean, prior_log_variance)
    )
    ratio = log_variance - prior_log_variance
    distance = (mean - prior_mean).square() * torch.exp(-prior_log_variance)
    double = (torch.expm1(ratio) - ratio + distance).sum(dim=-1)
    return 0.5 * double if half else double


def reparameterize(mean: Tensor, log_variance: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """``mean + exp(lv / 2) e`` with e ~ N(0, I) from the generator, of the shape of `mean`."""
    noise = torch.randn(mean.shape, dtype=mean.dtype, device=mean.device, generator=generator)
    return mean + torch.exp(0.5 * log_variance) * noise


def on_sphere(latent: Tensor) -> Tensor:
    """Latents rescaled to the norm ``sqrt(d)``; 0 stays 0."""
    return torch.nn.functional.normalize(latent, dim=-1) * latent.shape[-1] ** 0.5


def active_units(means: Tensor, threshold: float = 0.01) -> Tensor:
    """How many latent units say anything: those whose posterior mean varies over the sets by more than `threshold`.

    Parameters
    ----------
    means : float (B, d)
        Of B sets; of fewer than two nothing varies, and the number is 0.
    """
    if means.ndim != 2:
        raise InvalidInputError(f"active_units needs means (sets, latent), got shape {tuple(means.shape)}")
    if len(means) < 2:
        return torch.zeros((), dtype=torch.int64, device=means.device)
    return (means.detach().var(dim=0, unbiased=False) > threshold).sum()


class RadialFlow(nn.Module):
    """One radial flow ``z + b (z - c) / (a + |z - c|)`` with ``a > 0`` and ``b > -a``, which makes it invertible.

    Parameters
    ----------
    d_latent : int
    """

    def __init__(self, d_latent: int) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(())), nn.Parameter(torch.randn(()) * 0.1)
        self.c = nn.Parameter(torch.randn(d_latent))

    def _parts(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        a = torch.exp(self.a)
        away = z - self.c
        return a, softplus(self.b) - a, away, away.norm(dim=-1, keepdim=True)

    def forward(self, z: Tensor) -> Tensor:
        """Latents (..., d) to latents."""
        a, b, away, radius = self._parts(z)
        return z + b * away / (a + radius)

    def log_determinant(self, z: Tensor) -> Tensor:
        """Log of the Jacobian's determinant at z, (...,)."""
        a, b, _, radius = self._parts(z)
        scale = 1 + b / (a + radius)
        stretch = 1 + a * b / (a + radius) ** 2
        return ((z.shape[-1] - 1) * torch.log(scale) + torch.log(stretch)).squeeze(-1)

    def inverse(self, z: Tensor) -> Tensor:
        """What `forward` maps to z."""
        a, b, away, reached = self._parts(z)
        half = 0.5 * (reached - a - b)
        radius = half + torch.sqrt(half.square() + a * reached)
        return self.c + away / (1 + b / (a + radius))


class Prior(nn.Module):
    """Prior of the latent user.

    Parameters
    ----------
    name : "standard", "learned" or "flow"
    d_latent : int
    """

    def __init__(self, name: PriorName, d_latent: int) -> None:
        super().__init__()
        if name not in ("standard", "learned", "flow"):
            raise UnknownNameError(f"unknown prior {name!r}{nearest(str(name), ('standard', 'learned', 'flow'))}")
        learned = name == "learned"
        self.name, self.d_latent = name, d_latent
        self.mean = nn.Parameter(torch.zeros(d_latent), requires_grad=learned)
        self.log_variance = nn.Parameter(torch.zeros(d_latent), requires_grad=learned)
        self.flow = nn.Sequential(*(RadialFlow(d_latent) for _ in range(FLOW_LENGTH))) if name == "flow" else None

    def push(self, latent: Tensor) -> Tensor:
        """From where the posterior is Gaussian to what the decoder reads; the same but for a flow."""
        pushed: Tensor = latent if self.flow is None else self.flow(latent)
        return pushed

    def kl(self, mean: Tensor, log_variance: Tensor, *, half: bool = True) -> Tensor:
        """Divergence of posteriors (..., d) from the prior, (...,)."""
        return gaussian_kl(mean, log_variance, self.mean, self.log_variance, half=half)

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Latents (count, d) as the decoder reads them."""
        shape = (count, self.d_latent)
        return self.push(reparameterize(self.mean.expand(shape), self.log_variance.expand(shape), generator))

    def centre(self) -> Tensor:
        """Mean of the prior, (d,), through the flow where there is one: the population's latent."""
        return self.push(self.mean)
