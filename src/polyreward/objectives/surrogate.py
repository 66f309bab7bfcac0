"""The clipped policy objective: ratio, trust region, aggregation, KL and entropy as parts of one loss.

For a token with ratio rho = pi / pi_old and advantage A the loss is

    -min(rho A, clip(rho, 1 - low, 1 + high) A)

so that a sample stops pulling once its ratio has moved far enough in the direction of its advantage. The bounds are
numbers or one pair a sample. The ratio is that of the token, or of the whole sequence: the geometric mean of its token
ratios (GSPO, arXiv 2507.18071). Papers: PPO (arXiv 1707.06347), GRPO (arXiv 2402.03300).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from polyreward.batch import RewardBatch
from polyreward.errors import InvalidInputError, UnknownNameError, nearest
from polyreward.grouped import Ids, Segments, factorize, whole
from polyreward.objectives.aggregation import AGGREGATIONS, Aggregation, aggregate
from polyreward.objectives.divergence import LOG_RATIO_LIMIT, KLPenalty, kl_estimate
from polyreward.objectives.entropy import EntropyBonus, EntropyHinge, task_entropy
from polyreward.objectives.trust_region import Bound, ElasticTrustRegion, FixedClip

RATIOS = ("token", "sequence")


class ObjectiveResult(NamedTuple):
    """Loss of one call (scalar with gradient) and its metrics (scalars without gradient)."""

    loss: Tensor
    metrics: dict[str, Tensor]


def importance_ratio(logp: Tensor, old_logp: Tensor, mask: Tensor, level: str = "token") -> Tensor:
    """Ratio of new to old probability: (N, T) for level "token", (N, 1) for "sequence".

    Inputs are (N, T) and finite where `mask` is true; elsewhere the ratio is 1. The log-ratio is clamped to +-20 before
    the exponential.

    Raises
    ------
    UnknownNameError
        No such level.
    """
    if level not in RATIOS:
        raise UnknownNameError(f"no ratio {level!r}{nearest(level, RATIOS)}")
    difference = torch.where(mask.to(torch.bool), logp - old_logp, 0.0)
    if level == "sequence":
        difference = difference.sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)
    return difference.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def clipped_surrogate(
    ratio: Tensor, advantages: Tensor, low: Bound, high: Bound, dual_clip: float | None = None
) -> Tensor:
    """Clipped surrogate loss of each token.

    Parameters
    ----------
    ratio : float tensor (N, T) or (N, 1)
    advantages : float tensor that broadcasts with `ratio`
    low, high : float or tensor that broadcasts with `ratio`
        The ratio counts inside ``[1 - low, 1 + high]``. No gradient flows into them.
    dual_clip : float > 1, optional
        Bounds the ratio of samples with negative advantage (arXiv 1912.09729); ``delta`` in TRL, ``clip_ratio_c`` in
        verl.
    """
    low = torch.as_tensor(low, dtype=ratio.dtype, device=ratio.device).detach()
    high = torch.as_tensor(high, dtype=ratio.dtype, device=ratio.device).detach()
    if dual_clip is not None:
        ratio = torch.where(advantages < 0, ratio.clamp(max=dual_clip), ratio)
    # torch.clamp, unlike minimum and maximum, passes the whole gradient at the bound itself.
    clipped = torch.clamp(ratio, 1 - low, 1 + high)
    return -torch.minimum(ratio * advantages, clipped * advantages)


@dataclass(frozen=True)
class PolicyObjective:
    """A policy loss made of parts.

    Parameters
    ----------
    trust_region : FixedClip or ElasticTrustRegion
    ratio : "token" or "sequence"
    aggregation : "sequence-mean", "token-mean" or "fixed-length" (which needs `length`)
    length : int > 0, only with "fixed-length": the constant that replaces the length of a response
    kl : KLPenalty, optional
    dual_clip : float > 1, optional
    entropy : EntropyBonus or EntropyHinge, optional

    Raises
    ------
    UnknownNameError
        An unknown `ratio` or `aggregation`.
    InvalidInputError
        Something that is no part, `length` missing or superfluous, `dual_clip` not above 1.
    """

    trust_region: FixedClip | ElasticTrustRegion = field(default_factory=FixedClip)
    ratio: Literal["token", "sequence"] = "token"
    aggregation: Aggregation = "sequence-mean"
    length: int | None = None
    kl: KLPenalty | None = None
    dual_clip: float | None = None
    entropy: EntropyBonus | EntropyHinge | None = None

    def __post_init__(self) -> None:
        kinds: dict[str, tuple[type, ...]] = {"kl": (KLPenalty,), "entropy": (EntropyBonus, EntropyHinge)}
        for name, known in kinds.items():
            value = getattr(self, name)
            if value is not None and not isinstance(value, known):
                raise InvalidInputError(f"{name} must be a {' or '.join(k.__name__ for k in known)}, got {value!r}")
        if not hasattr(self.trust_region, "bounds"):
            raise InvalidInputError(
                f"trust_region must be a FixedClip or ElasticTrustRegion, got {self.trust_region!r}"
            )
        if self.ratio not in RATIOS:
            raise UnknownNameError(f"no ratio {self.ratio!r}{nearest(self.ratio, RATIOS)}")
        if self.aggregation not in AGGREGATIONS:
            raise UnknownNameError(f"no aggregation {self.aggregation!r}{nearest(self.aggregation, AGGREGATIONS)}")
        if (self.aggregation == "fixed-length") != (self.length is not None):
            raise InvalidInputError(
                f"length goes with 'fixed-length', got aggregation={self.aggregation!r}, length={self.length}"
            )
        if self.length is not None and self.length <= 0:
            raise InvalidInputError(f"length must be positive, got {self.length}")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise InvalidInputError(f"dual_clip must be above 1, got {self.dual_clip}")

    def bounds(self, advantages: Tensor, batch: RewardBatch) -> tuple[Bound, Bound]:
        """Radii ``(low, high)`` of the rollouts of `batch`, each a float or (N,) tensor without gradient.

        Compute them once per rollout batch, shuffle them with the samples, and pass them to every call.
        """
        return self.trust_region.bounds(advantages, batch)

    def __call__(
        self,
        logp: Tensor,
        old_logp: Tensor,
        advantages: Tensor,
        mask: Tensor,
        *,
        reference_logp: Tensor | None = None,
        low: Bound | None = None,
        high: Bound | None = None,
        entropy: Tensor | None = None,
        tasks: Ids | Segments | None = None,
        normaliser: float | Tensor | None = None,
    ) -> ObjectiveResult:
        """Loss and metrics of N sequences of T tokens.

        Parameters
        ----------
        logp, old_logp : float tensors (N, T)
            Log-probabilities of the response tokens now and at rollout time. What stands where `mask` is false, NaN and
            infinities included, touches neither loss nor gradient.
        advantages : float tensor (N,) or (N, T)
        mask : bool, integer or float tensor (N, T), nonzero at response tokens
        reference_logp : float tensor (N, T); required by a KL penalty
        low, high : float, or tensor (N,), (N, 1) or (N, T)
            Radii in place of the trust region's, as `bounds` returns them. Required by an elastic trust region.
        entropy : float tensor (N, T)
            Exact entropy of each token's distribution, with gradient. Required by an entropy bonus; the hinge uses
            ``-logp`` without it.
        tasks : length-N ids or Segments
            Task of each sequence, for the hinge and the entropy metrics; default: one task.
        normaliser : see `aggregate`
            The entropy term then counts by this call's share of the normaliser. The bonus of micro-batches adds up to
            that of all under "token-mean"; the hinge is not additive and is that of each micro-batch.

        Returns
        -------
        ObjectiveResult
            ``loss`` in float32 or wider. Metrics: ``policy_loss``, ``kl`` (with a penalty), ``kl_old`` (k3, from the
            rollout policy), ``ratio/mean|min|max``, ``radius/low|high|mean``, ``clip_fraction`` and the same by
            ``/positive|negative`` advantage and by ``/small|medium|large`` tercile of |advantage| (0 for an empty
            class), and ``entropy``, ``entropy/<task>``.

        Raises
        ------
        InvalidInputError
            Shapes that do not fit, a missing input that a part needs.
        """
        keep, log_now, log_old, weight = _inputs(logp, old_logp, advantages, mask)
        low, high = self._radii(low, high, log_now)
        ratio = importance_ratio(log_now, log_old, keep, self.ratio)
        losses = clipped_surrogate(ratio, weight, low, high, self.dual_clip).expand_as(log_now)
        policy_loss = loss = aggregate(losses, keep, self.aggregation, length=self.length, normaliser=normaliser)
        metrics = {"policy_loss": policy_loss.detach()}
        if self.kl is not None:
            reference = _masked(
                _required(reference_logp, "reference_logp", "a KL penalty"), keep, log_now, "reference_logp"
            )
            divergence = kl_estimate(log_now, reference, self.kl.estimator)
            penalty = aggregate(divergence, keep, self.aggregation, length=self.length, normaliser=normaliser)
            loss = loss + self.kl.weight * penalty
            metrics["kl"] = _mean(divergence, keep)
        if self.entropy is not None or entropy is not None:
            loss = self._with_entropy(loss, log_now, entropy, tasks, keep, normaliser, metrics)
        with torch.no_grad():
            metrics |= _ratio_metrics(ratio.detach(), weight, low, high, keep)
            metrics["kl_old"] = _mean(kl_estimate(log_now, log_old), keep)
        return ObjectiveResult(loss, metrics)

    def _radii(self, low: Bound | None, high: Bound | None, like: Tensor) -> tuple[Tensor, Tensor]:
        if low is None or high is None:
            if not isinstance(self.trust_region, FixedClip):
                raise InvalidInputError(
                    f"{type(self.trust_region).__name__} needs low and high: compute them once per rollout batch with "
                    "objective.bounds(advantages, batch) and pass them with the samples"
                )
            low = self.trust_region.low if low is None else low
            high = self.trust_region.high if high is None else high
        return _radius(low, like, "low"), _radius(high, like, "high")

    def _with_entropy(
        self,
        loss: Tensor,
        logp: Tensor,
        entropy: Tensor | None,
        tasks: Ids | Segments | None,
        keep: Tensor,
        normaliser: float | Tensor | None,
        metrics: dict[str, Tensor],
    ) -> Tensor:
        if isinstance(self.entropy, EntropyBonus):
            _required(entropy, "entropy", "an entropy bonus")
        values = -logp if entropy is None else _masked(entropy, keep, logp, "entropy")
        segments = _segments(tasks, len(logp), logp.device)
        share: float | Tensor = 1.0
        if normaliser is not None:  # this call's part of what the normaliser counts
            share = (keep.sum() if self.aggregation == "token-mean" else len(keep)) / normaliser
        if isinstance(self.entropy, EntropyBonus):
            loss = loss + share * self.entropy(values, keep)
        elif self.entropy is not None:
            loss = loss + share * self.entropy(values, keep, segments)
        metrics["entropy"] = _mean(values, keep)
        if tasks is not None:
            means, present = task_entropy(values.detach(), keep, segments)
            for code in present.nonzero().flatten().tolist():
                metrics[f"entropy/{segments.label(code)}"] = means[code]
        return loss


def _inputs(logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Checked mask, log-probabilities with 0 at masked positions, and advantages (N, 1) or (N, T)."""
    if logp.ndim != 2:
        raise InvalidInputError(f"logp must have shape (N, T), got {tuple(logp.shape)}")
    if mask.shape != logp.shape:
        raise InvalidInputError(f"mask has shape {tuple(mask.shape)}, logp has {tuple(logp.shape)}")
    keep = mask.to(torch.bool)
    now = logp if logp.dtype in (torch.float32, torch.float64) else logp.float()
    now = torch.where(keep, now, 0.0)
    old = _masked(old_logp.detach(), keep, now, "old_logp")
    advantages = advantages.detach().to(now.dtype)
    if advantages.shape == logp.shape:
        return keep, now, old, torch.where(keep, advantages, 0.0)
    if advantages.shape != logp.shape[:1]:
        raise InvalidInputError(
            f"advantages has shape {tuple(advantages.shape)}, expected {tuple(logp.shape[:1])} or {tuple(logp.shape)}"
        )
    return keep, now, old, advantages.unsqueeze(1)


def _masked(values: Tensor, keep: Tensor, like: Tensor, name: str) -> Tensor:
    if values.shape != like.shape:
        raise InvalidInputError(f"{name} has shape {tuple(values.shape)}, logp has {tuple(like.shape)}")
    return torch.where(keep, values.to(like.dtype), 0.0)


def _required(values: Tensor | None, name: str, part: str) -> Tensor:
    if values is None:
        raise InvalidInputError(f"{part} needs {name}")
    return values


def _radius(bound: Bound, like: Tensor, name: str) -> Tensor:
    bound = torch.as_tensor(bound, dtype=like.dtype, device=like.device).detach()
    if bound.ndim == 0:
        return bound
    rows, tokens = like.shape
    if bound.shape not in ((rows,), (rows, 1), (rows, tokens)):
        raise InvalidInputError(
            f"{name} has shape {tuple(bound.shape)}, expected a number, ({rows},) or ({rows}, {tokens})"
        )
    return bound.unsqueeze(1) if bound.ndim == 1 else bound


def _segments(tasks: Ids | Segments | None, rows: int, device: torch.device) -> Segments:
    segments = whole(rows, device) if tasks is None else tasks
    if not isinstance(segments, Segments):
        segments = factorize(segments, name="tasks", device=device)
    if len(segments) != rows:
        raise InvalidInputError(f"tasks has {len(segments)} entries, logp has {rows} rows")
    return segments


def _mean(values: Tensor, keep: Tensor) -> Tensor:
    return (values.detach() * keep).sum() / keep.sum().clamp(min=1)


def _ratio_metrics(ratio: Tensor, advantages: Tensor, low: Tensor, high: Tensor, keep: Tensor) -> dict[str, Tensor]:
    """Figures of the ratio, the radius and the clip; of tokens, or of sequences where the ratio is a sequence's."""
    filled = keep.any(dim=1, keepdim=True)
    shape = torch.broadcast_shapes(ratio.shape, advantages.shape, low.shape, high.shape)
    counted = keep if shape == keep.shape else filled
    clipped = ((ratio < 1 - low) & (advantages < 0)) | ((ratio > 1 + high) & (advantages > 0))
    strength = (advantages.abs() * (keep if advantages.shape == keep.shape else filled)).sum(dim=1, keepdim=True)
    if advantages.shape == keep.shape:
        strength = strength / keep.sum(dim=1, keepdim=True).clamp(min=1)
    tercile = _tercile(strength, filled)
    classes = {
        "": counted,
        "/positive": counted & (advantages > 0),
        "/negative": counted & (advantages < 0),
        "/small": counted & (tercile == 0),
        "/medium": counted & (tercile == 1),
        "/large": counted & (tercile == 2),
    }
    seen = ratio.expand(shape)
    empty = not bool(counted.any())
    radius_low, radius_high = _mean(low.expand(shape), counted), _mean(high.expand(shape), counted)
    return {
        "ratio/mean": _mean(seen, counted),
        "ratio/min": seen.new_ones(()) if empty else torch.where(counted, seen, torch.inf).min(),
        "ratio/max": seen.new_ones(()) if empty else torch.where(counted, seen, -torch.inf).max(),
        "radius/low": radius_low,
        "radius/high": radius_high,
        "radius/mean": (radius_low + radius_high) / 2,
    } | {f"clip_fraction{name}": _mean(clipped.to(ratio.dtype), chosen) for name, chosen in classes.items()}


def _tercile(strength: Tensor, filled: Tensor) -> Tensor:
    """0, 1 or 2 by the thirds of `strength` (N, 1) among the rows that have tokens; equal values share a third."""
    present = strength[filled]
    if present.numel() == 0:
        return torch.zeros_like(strength)
    cuts = present.sort().values[[(present.numel() - 1) // 3, (2 * present.numel() - 1) // 3]]
    return (strength > cuts[0]).to(strength.dtype) + (strength > cuts[1])
