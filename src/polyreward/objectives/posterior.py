"""BRAIn: distil the posterior "y given that y is good" into a policy from weighted samples, with a baseline.

By Bayes' rule the good answers of a prior p are distributed as p(y|x, G=1) = p(y|x) p(G=1|y,x) / p(G=1|x). With the
log-odds of a Bradley-Terry reward this is ``p(y|x) exp(r/beta)`` up to a constant, the optimum of RL with a KL penalty.
From samples y_i of a proposal p', every quantity is normalised among the samples of a prompt:

    alpha_i = softmax_i(log p_i - log p'_i + r_i / beta)     the target
    bhat_i  = softmax_i(log q_i - log p'_i)                  the policy, which is the baseline
    L = KL(alpha || bhat),   grad L = -sum_i (alpha_i - bhat_i) grad log q_i

The baseline makes the gradient exactly 0 on every set of samples once q is the posterior. L is an unbiased estimate of
the self-normalised KL, not of KL(posterior || q). All log-probabilities are sums over tokens, and log p' is that of the
model which generated y. Models may be unnormalised: a constant a prompt changes nothing.

Everything is computed in log space in float64.

Paper: BRAIn: Bayesian Reward-conditioned Amortized Inference for natural language generation from feedback (arXiv
2402.02479).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from polyreward.errors import InvalidInputError, UnknownNameError, nearest
from polyreward.objectives.surrogate import ObjectiveResult

_POSTERIORS = ("bradley_terry", "sigmoid")


@dataclass(frozen=True)
class PosteriorTarget:
    """The target weights alpha of the samples of each prompt (arXiv 2402.02479).

    Parameters
    ----------
    kind : "bradley_terry" or "sigmoid"
        log p(G=1|y,x) is ``r / beta`` up to a constant, or ``log sigmoid((r - b_x) / beta)``.
    beta : float > 0
        Temperature; infinity leaves ``p / p'``, towards 0 the weight goes to the highest reward.
    baseline : float, or float (P,), only for "sigmoid"
        b_x, the reward at which a sample is as likely good as not. Default: the mean reward of the prompt's samples.

    Raises
    ------
    UnknownNameError
        No such kind.
    InvalidInputError
        ``beta <= 0``, or a baseline for "bradley_terry", where it cancels.
    """

    kind: Literal["bradley_terry", "sigmoid"] = "bradley_terry"
    beta: float = 1.0
    baseline: Any = None

    def __post_init__(self) -> None:
        kind = str(self.kind).replace("-", "_")
        if kind not in _POSTERIORS:
            raise UnknownNameError(f"no kind of posterior {self.kind!r}{nearest(kind, _POSTERIORS)}")
        object.__setattr__(self, "kind", kind)
        _check_beta(self.beta)
        if kind == "bradley_terry" and self.baseline is not None:
            raise InvalidInputError("a baseline cancels in the 'bradley_terry' posterior; use kind='sigmoid'")

    def __call__(self, log_prior: Any, log_proposal: Any, reward: Any, mask: Any = None) -> Any:
        """As `weights`."""
        return self.weights(log_prior, log_proposal, reward, mask)

    def log_likelihood(self, reward: Any, mask: Any = None) -> Any:
        """Log of p(G=1|y,x) up to a constant a prompt, (P, n), 0 outside `mask`."""
        values, keep = _inputs({"reward": reward}, mask)
        return _like(self._log_likelihood(values["reward"], keep), reward)

    def _log_likelihood(self, reward: Tensor, keep: Tensor) -> Tensor:
        if self.kind == "bradley_terry":
            return reward / self.beta
        if self.baseline is None:
            centre = torch.where(keep, reward, 0.0).sum(dim=1) / keep.sum(dim=1)
        else:
            centre = torch.as_tensor(self.baseline, dtype=torch.float64, device=reward.device)
            if centre.ndim and centre.shape != reward.shape[:1]:
                raise InvalidInputError(f"baseline has shape {tuple(centre.shape)}, expected ({len(reward)},)")
        centre = centre.unsqueeze(1) if centre.ndim else centre
        return torch.where(keep, torch.nn.functional.logsigmoid((reward - centre) / self.beta), 0.0)

    def weights(self, log_prior: Any, log_proposal: Any, reward: Any, mask: Any = None) -> Any:
        """Weights alpha (P, n): sums to 1 over each prompt, 0 outside `mask`; no gradient. Errors as `brain_loss`."""
        named = {"log_prior": log_prior, "log_proposal": log_proposal, "reward": reward}
        return _like(self._log_weights(*_inputs(named, mask)).exp(), log_prior)

    def _log_weights(self, values: dict[str, Tensor], keep: Tensor) -> Tensor:
        with torch.no_grad():
            scores = values["log_prior"] - values["log_proposal"] + self._log_likelihood(values["reward"], keep)
            return _log_softmax(scores, keep)


@dataclass(frozen=True)
class SelfNormalizedKL:
    """KL(alpha || bhat) between target weights and a policy, both normalised among the samples of a prompt.

    Shared by every objective that matches a reward-weighted distribution: with the weights of `PosteriorTarget` it is
    BRAIn; with ``log_proposal`` the reference policy and ``softmax(r/beta)`` a listwise preference loss; for two
    samples with all weight on the better one it is DPO, ``log(1 + exp(-Delta))``.

    Parameters
    ----------
    reduction : "mean", "sum" or "none", over prompts
    """

    reduction: Literal["mean", "sum", "none"] = "mean"

    def __post_init__(self) -> None:
        if self.reduction not in ("mean", "sum", "none"):
            raise UnknownNameError(f"no reduction {self.reduction!r}{nearest(self.reduction, ('mean', 'sum', 'none'))}")

    def __call__(self, alpha: Any, logq: Any, log_proposal: Any, mask: Any = None) -> ObjectiveResult:
        """Loss and diagnostics.

        Parameters
        ----------
        alpha : float (P, n) >= 0
            Target weights; they are normalised over each prompt and get no gradient.
        logq, log_proposal : float (P, n)
            Log-probabilities of the samples under the policy, with gradient, and under what generated them.
        mask : bool (P, n)

        Returns
        -------
        ObjectiveResult
            ``loss`` (scalar, or (P,) without reduction) and metrics, see `brain_loss`.
        """
        values, keep = _inputs({"alpha": alpha, "logq": logq, "log_proposal": log_proposal}, mask)
        weights = torch.where(keep, values["alpha"].detach(), 0.0)
        wrong = (weights < 0).any(dim=1) | (weights.sum(dim=1) <= 0)
        if bool(wrong.any()):
            raise InvalidInputError(f"prompt {int(wrong.nonzero()[0])}: weights must be >= 0 and not all 0")
        log_alpha = (weights / weights.sum(dim=1, keepdim=True)).log()
        return self._loss(log_alpha, values["logq"] - values["log_proposal"], keep, logq)

    def _loss(self, log_alpha: Tensor, scores: Tensor, keep: Tensor, original: Any) -> ObjectiveResult:
        alpha = log_alpha.exp()
        log_policy = _log_softmax(scores, keep)
        # A weight that underflowed to 0 contributes nothing, whatever its logarithm.
        difference = torch.where(alpha > 0, log_alpha, 0.0) - torch.where(keep, log_policy, 0.0)
        divergence = (alpha * difference).sum(dim=1)
        with torch.no_grad():
            size = 1 / alpha.square().sum(dim=1)
            metrics = {
                "kl": divergence.mean(),
                "effective_sample_size": size.mean(),
                "max_weight": alpha.amax(dim=1).mean(),
                "collapsed": ((size < 2) & (keep.sum(dim=1) > 1)).to(size.dtype).mean(),
                "samples": keep.sum(dim=1).to(size.dtype).mean(),
            }
        loss = divergence
        if self.reduction != "none":
            loss = divergence.mean() if self.reduction == "mean" else divergence.sum()
        dtype = _dtype(original)
        return ObjectiveResult(loss.to(dtype), {name: value.detach().to(dtype) for name, value in metrics.items()})


def brain_weights(log_prior: Any, log_proposal: Any, reward: Any, beta: float = 1.0, mask: Any = None) -> Any:
    """Target weights ``softmax_i(log p_i - log p'_i + r_i / beta)`` of each prompt (arXiv 2402.02479).

    Parameters
    ----------
    log_prior, log_proposal, reward : float (P, n)
        log p and log p' of the samples, summed over tokens, and their rewards.
    beta : float > 0, or infinity
    mask : bool (P, n), default all true
        What stands elsewhere does not matter.

    Returns
    -------
    alpha (P, n), float32 or wider, array for array; sums to 1 over each prompt, 0 outside `mask`, no gradient

    Raises
    ------
    InvalidInputError
        As `brain_loss`.
    """
    return PosteriorTarget("bradley_terry", beta).weights(log_prior, log_proposal, reward, mask)


def brain_loss(
    logq: Any, log_prior: Any, log_proposal: Any, reward: Any, beta: float = 1.0, mask: Any = None
) -> ObjectiveResult:
    """BRAIn's loss KL(alpha || bhat), mean over prompts, and diagnostics (arXiv 2402.02479).

    Parameters
    ----------
    logq : float (P, n)
        log q of the samples under the policy, summed over tokens, with gradient; not averaged over tokens.
    log_prior, log_proposal, reward, beta, mask : as `brain_weights`

    Returns
    -------
    ObjectiveResult
        ``loss`` (scalar tensor) and metrics without gradient, means over prompts: ``kl``, ``effective_sample_size``
        (``1 / sum alpha^2``), ``max_weight``, ``collapsed`` (share of prompts of several samples with effective size
        below 2: raise beta) and ``samples``. A prompt with one sample has loss and gradient 0: nothing compares.

    Raises
    ------
    InvalidInputError
        ``beta <= 0``; no sample, or none inside the mask; a log-probability or reward that is not finite; shapes that
        do not fit. The message names the prompt.
    """
    named = {"log_prior": log_prior, "log_proposal": log_proposal, "reward": reward, "logq": logq}
    values, keep = _inputs(named, mask)
    log_alpha = PosteriorTarget("bradley_terry", beta)._log_weights(values, keep)
    return SelfNormalizedKL()._loss(log_alpha, values["logq"] - values["log_proposal"], keep, logq)


def brain_grad(
    logq: Any,
    log_prior: Any,
    log_proposal: Any,
    reward: Any,
    beta: float = 1.0,
    mask: Any = None,
    *,
    score: Any = None,
    use_baseline: bool = True,
) -> Any:
    """BRAIn's gradient estimate, to ascend: coefficients ``alpha - bhat`` (P, n), or their product with the scores.

    Parameters
    ----------
    score : float (P, n, ...), optional
        grad log q of each sample. With it the result is ``sum_i (alpha_i - bhat_i) score_i``, (P, ...).
    use_baseline : bool
        False leaves ``alpha``: weighted supervised training, the ablation.

    The rest as `brain_loss`.
    """
    values, keep = _inputs({"log_prior": log_prior, "log_proposal": log_proposal, "reward": reward, "logq": logq}, mask)
    coefficients = PosteriorTarget("bradley_terry", beta)._log_weights(values, keep).exp()
    if use_baseline:
        coefficients = coefficients - _log_softmax(values["logq"] - values["log_proposal"], keep).exp().detach()
    return _times_score(coefficients, score, logq)


def dpg_grad(log_target: Any, log_proposal: Any, mask: Any = None, *, log_z: Any = None, score: Any = None) -> Any:
    """Distributional policy gradient, to ascend: coefficients ``w_i / n`` (P, n) with ``w = target / (Z p')``.

    Parameters
    ----------
    log_target : float (P, n)
        log of the unnormalised target, ``log p + r / beta``.
    log_z : float or (P,), optional
        log of its normaliser. Default: the mean of the unnormalised weights, with which the coefficients are BRAIn's
        alpha.
    score : float (P, n, ...), optional
        With it the result is the gradient (P, ...).
    """
    values, keep = _inputs({"log_target": log_target, "log_proposal": log_proposal}, mask)
    return _times_score(_importance(values, keep, log_z), score, log_target)


def gdcpp_grad(
    logq: Any, log_target: Any, log_proposal: Any, mask: Any = None, *, log_z: Any = None, score: Any = None
) -> Any:
    """GDC++'s gradient estimate, to ascend: coefficients ``(w_i - q_i / p'_i) / n``; the rest as `dpg_grad`."""
    values, keep = _inputs({"log_target": log_target, "log_proposal": log_proposal, "logq": logq}, mask)
    weights = _importance(values, keep, log_z)
    ratio = torch.where(keep, (values["logq"] - values["log_proposal"]).detach().exp(), 0.0)
    return _times_score(weights - ratio / keep.sum(dim=1, keepdim=True), score, logq)


def _importance(values: dict[str, Tensor], keep: Tensor, log_z: Any) -> Tensor:
    scores = (values["log_target"] - values["log_proposal"]).detach()
    if log_z is None:
        return _log_softmax(scores, keep).exp()
    normaliser = torch.as_tensor(log_z, dtype=torch.float64, device=scores.device)
    normaliser = normaliser.unsqueeze(1) if normaliser.ndim else normaliser
    weights = (scores - normaliser).exp() / keep.sum(dim=1, keepdim=True)
    return torch.where(keep, weights, 0.0)


def _times_score(coefficients: Tensor, score: Any, original: Any) -> Any:
    if score is None:
        return _like(coefficients, original)
    values = torch.as_tensor(score, device=coefficients.device).to(torch.float64)
    if values.shape[:2] != coefficients.shape:
        raise InvalidInputError(f"score has shape {tuple(values.shape)}, expected {tuple(coefficients.shape)} first")
    shaped = coefficients.view(*coefficients.shape, *[1] * (values.ndim - 2))
    # Rows outside the mask have coefficient 0, but their score may be anything.
    return _like(torch.where(shaped != 0, shaped * values, 0.0).sum(dim=1), original)


def _log_softmax(scores: Tensor, keep: Tensor) -> Tensor:
    """log-softmax over the samples inside the mask, -inf outside."""
    return torch.where(keep, scores, -torch.inf).log_softmax(dim=1)


def _inputs(named: dict[str, Any], mask: Any) -> tuple[dict[str, Tensor], Tensor]:
    """Checked float64 (P, n), 0 outside the mask, and the mask."""
    values = {name: _tensor(value) for name, value in named.items()}
    shape = next(iter(values.values())).shape
    for name, value in values.items():
        if value.ndim != 2 or value.shape != shape:
            raise InvalidInputError(
                f"{name} has shape {tuple(value.shape)}, expected {tuple(shape)}, (prompts, samples)"
            )
    device = next(iter(values.values())).device
    keep = torch.ones(shape, dtype=torch.bool, device=device)
    if mask is not None:
        keep = torch.as_tensor(mask, device=device).to(torch.bool)
        if keep.shape != shape:
            raise InvalidInputError(f"mask has shape {tuple(keep.shape)}, expected {tuple(shape)}")
    empty = ~keep.any(dim=1)
    if bool(empty.any()):
        raise InvalidInputError(f"prompt {int(empty.nonzero()[0])} has no sample")
    for name, value in values.items():
        wrong = keep & ~torch.isfinite(value)
        if bool(wrong.any()):
            prompt, sample = wrong.nonzero()[0].tolist()
            raise InvalidInputError(f"prompt {prompt}, sample {sample}: {name} is {float(value[prompt, sample])}")
    return {name: torch.where(keep, value, 0.0) for name, value in values.items()}, keep


def _check_beta(beta: Any) -> None:
    if not isinstance(beta, int | float | np.number) or math.isnan(beta) or beta <= 0:
        raise InvalidInputError(f"beta must be a positive number, got {beta!r}")


def _tensor(values: Any) -> Tensor:
    tensor = values if isinstance(values, Tensor) else torch.as_tensor(np.asarray(values, dtype=np.float64))
    return tensor.to(torch.float64)


def _dtype(original: Any) -> torch.dtype:
    if isinstance(original, Tensor):
        floating = original.dtype if original.is_floating_point() else torch.float32
        return torch.promote_types(floating, torch.float32)
    return torch.float32 if getattr(original, "dtype", None) == np.float32 else torch.float64


def _like(result: Tensor, original: Any) -> Any:
    result = result.to(_dtype(original))
    return result if isinstance(original, Tensor) else result.detach().cpu().numpy()
