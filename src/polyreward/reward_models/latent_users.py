"""Rewards of a latent user, and the loss that trains them: variational preference learning.

People disagree, and a single reward learns their average. Here someone's few labelled comparisons become a posterior
over a latent user z (`PreferenceSetEncoder`), the reward ``r(s, z)`` is read for that user, and both are trained
together:

    P(a > b | z) = sigma((sum_t r(a_t, z) - sum_t r(b_t, z)) / kappa)
    loss = sum_sets [ sum_i BCE(y_i, P_i) + beta_t KL(q(z | set) || p(z)) ]

Labels fix r only up to a scale, which may differ over z: `PairwiseLatentPreference` gives a bounded reward, the
probability of beating other states (VPL-SPO), and `RewardScaler` the other ways of the paper. "Personalizing
Reinforcement Learning from Human Feedback with Variational Preference Learning" (arXiv 2408.10075).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from polyreward.errors import InvalidInputError
from polyreward.reward_models.kl_annealing import CyclicalAnnealer
from polyreward.reward_models.latent_priors import (
    Prior,
    PriorName,
    active_units,
    gaussian_kl,
    on_sphere,
    reparameterize,
)
from polyreward.reward_models.latent_rewards import LatentReward, PairwiseLatentPreference
from polyreward.reward_models.preference_sets import PreferenceSetEncoder, check_labels

__all__ = [
    "CyclicalAnnealer",
    "LatentReward",
    "PairwiseLatentPreference",
    "Prior",
    "VPLLoss",
    "VariationalPreferences",
    "active_units",
    "gaussian_kl",
    "on_sphere",
    "reparameterize",
]

Schedule = float | CyclicalAnnealer | Callable[[int], float]
Normalize = Literal["never", "always", "training"]


class VPLLoss(nn.Module):
    """The negative evidence bound of labelled sets (arXiv 2408.10075).

    Parameters
    ----------
    beta_schedule : float, `CyclicalAnnealer`, or function of the number of calls of `step` to a weight
        beta in the paper.
    prior : "standard", "learned" or "flow"
    kl_half : bool
        False is twice the divergence, as in the paper's control code.
    d_latent : int, optional
        Needed for a learned prior and for a flow, which have weights.
    reduction : "sum", "mean" or "language"
        Sum over pairs and sets, as in the control code; the same divided by the number of sets, with the same minimum;
        mean over pairs plus the summed divergence, as in the language code. A beta belongs to its reduction.
    """

    def __init__(
        self,
        beta_schedule: Schedule = 1.0,
        prior: PriorName = "standard",
        kl_half: bool = True,
        d_latent: int | None = None,
        reduction: Literal["sum", "mean", "language"] = "sum",
    ) -> None:
        super().__init__()
        if reduction not in ("sum", "mean", "language"):
            raise InvalidInputError(f"reduction must be 'sum', 'mean' or 'language', got {reduction!r}")
        if prior != "standard" and d_latent is None:
            raise InvalidInputError(f"the prior {prior!r} has weights: pass d_latent, the width of the latent")
        self.beta_schedule, self.kl_half, self.reduction, self.steps = beta_schedule, kl_half, reduction, 0
        self.prior = Prior(prior, d_latent or 1)

    @property
    def beta(self) -> float:
        """Weight of the divergence now."""
        schedule = self.beta_schedule
        if isinstance(schedule, CyclicalAnnealer):
            return schedule.value
        return float(schedule(self.steps) if callable(schedule) else schedule)

    def step(self) -> None:
        """Advance the schedule; once an epoch in the paper."""
        self.steps += 1
        if isinstance(self.beta_schedule, CyclicalAnnealer):
            self.beta_schedule.step()

    def get_extra_state(self) -> dict[str, Any]:
        """Steps done, for ``state_dict``."""
        own = self.beta_schedule.state_dict() if isinstance(self.beta_schedule, CyclicalAnnealer) else None
        return {"steps": self.steps, "annealer": own}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.steps = int(state["steps"])
        if state["annealer"] is not None and isinstance(self.beta_schedule, CyclicalAnnealer):
            self.beta_schedule.load_state_dict(state["annealer"])

    def forward(
        self, logits: Tensor, labels: Tensor, mean: Tensor, log_variance: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of B sets.

        Parameters
        ----------
        logits, labels : (B, N)
            Of the target pairs: those of the set, or others of the same person.
        mean, log_variance : float (B, d)
            The posteriors.
        mask : bool (B, N), optional

        Returns
        -------
        loss : scalar
        metrics : mapping
            ``nll`` and ``kl`` under the reduction (kl without its weight), ``accuracy`` over pairs that are no ties,
            ``active_units`` of the posterior means, ``beta``.

        Raises
        ------
        InvalidInputError
            Shapes that do not fit; labels other than 0, 1 and 0.5.
        """
        if logits.shape != labels.shape or logits.ndim != 2 or len(mean) != len(logits):
            raise InvalidInputError(
                f"logits have shape {tuple(logits.shape)}, labels {tuple(labels.shape)}, mean {tuple(mean.shape)}: "
                "expected (sets, pairs) twice and (sets, latent)"
            )
        part = torch.ones_like(logits, dtype=torch.bool) if mask is None else mask.bool()
        check_labels(labels, part)
        target = torch.where(part, labels.to(logits.dtype), 0.5)
        each = binary_cross_entropy_with_logits(torch.where(part, logits, 0.0), target, reduction="none")
        nll = torch.where(part, each, 0.0).sum()
        kl = self.prior.kl(mean, log_variance, half=self.kl_half).sum()
        sets = max(len(logits), 1)
        nll, kl = {
            "sum": (nll, kl), "mean": (nll / sets, kl / sets), "language": (nll / part.sum().clamp(min=1), kl)
        }[self.reduction]  # fmt: skip
        beta = self.beta
        decided = part & (target != 0.5)
        right = ((logits > 0) == (target > 0.5)).float() * (logits != 0) + 0.5 * (logits == 0)
        metrics = {
            "nll": nll.detach(),
            "kl": kl.detach(),
            "accuracy": (right.detach() * decided).sum() / decided.sum().clamp(min=1),
            "active_units": active_units(mean),
            "beta": torch.tensor(beta),
        }
        return nll + beta * kl, metrics


class VariationalPreferences(nn.Module):
    """Encoder, decoder and loss together (arXiv 2408.10075).

    Parameters
    ----------
    encoder : PreferenceSetEncoder
    decoder : LatentReward or PairwiseLatentPreference
    objective : VPLLoss
    normalize : "never", "always" or "training"
        Rescale z to the norm sqrt(d). "training" is the paper's language code, which rescales in training and not in
        use.
    """

    def __init__(
        self,
        encoder: PreferenceSetEncoder,
        decoder: LatentReward | PairwiseLatentPreference,
        objective: VPLLoss,
        normalize: Normalize = "never",
    ) -> None:
        super().__init__()
        check_normalize(normalize)
        if encoder.d_latent != decoder.d_latent:
            raise InvalidInputError(
                f"the encoder's latent has width {encoder.d_latent}, the decoder's {decoder.d_latent}"
            )
        self.encoder, self.decoder, self.objective, self.normalize = encoder, decoder, objective, normalize

    def encode(
        self, first: Tensor, second: Tensor, labels: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Posteriors of B sets, mean and log-variance (B, d)."""
        found: tuple[Tensor, Tensor] = self.encoder(first, second, labels, mask)
        return found

    def latent(self, mean: Tensor, log_variance: Tensor | None = None, generator: Any = None) -> Tensor:
        """What the decoder reads: a draw in training (with a log-variance), else the mean."""
        z = mean if log_variance is None else reparameterize(mean, log_variance, generator)
        z = self.objective.prior.push(z)
        used = self.normalize == "always" or (self.normalize == "training" and log_variance is not None)
        return on_sphere(z) if used else z

    def infer(self, first: Tensor, second: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        """Latents (B, d) of people from their labelled sets; no training."""
        return self.latent(self.encode(first, second, labels, mask)[0])

    def logits(self, first: Tensor, second: Tensor, z: Tensor) -> Tensor:
        """Logits (B, N) that the first is preferred."""
        return self.decoder.logits(first, second, z)

    def sample_prior(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Latents (count, d)."""
        prior = self.objective.prior
        if prior.name == "standard":  # made without a width
            at = next(self.parameters())
            z = torch.randn((count, self.encoder.d_latent), dtype=at.dtype, device=at.device, generator=generator)
        else:
            z = prior.sample(count, generator)
        return on_sphere(z) if self.normalize == "always" else z

    def forward(
        self,
        first: Tensor,
        second: Tensor,
        labels: Tensor,
        mask: Tensor | None = None,
        targets: Sequence[Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of B sets; one z a set, drawn in training and the mean otherwise.

        Parameters
        ----------
        first, second, labels, mask : as of `PreferenceSetEncoder.forward`
        targets : (first, second, labels) of other pairs of the same people, optional
            What is to be predicted; default the sets themselves, as in the paper's control experiments.
        """
        mean, log_variance = self.encode(first, second, labels, mask)
        z = self.latent(mean, log_variance if self.training else None, generator)
        part = mask if targets is None else None
        asked = (first, second, labels) if targets is None else targets
        loss, metrics = self.objective(self.logits(asked[0], asked[1], z), asked[2], mean, log_variance, part)
        return loss, metrics


def check_normalize(normalize: str) -> None:
    """Refuse an unknown way to normalise."""
    if normalize not in ("never", "always", "training"):
        raise InvalidInputError(f"normalize must be 'never', 'always' or 'training', got {normalize!r}")
