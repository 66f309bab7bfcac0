"""Policy losses of likelihood rewards: the chain's policy gradient and the reference's own gradient in one surrogate.

The reward R(z) = R(z; theta) of a chain z is a function of the model's log-probabilities of the reference after it, so
the gradient of J = E_z[R(z)] has two terms,

    grad J = E[R(z) grad log pi(z|p)] + E[grad R(z)],

and the surrogate to minimise is ``-mean_i[sg(A_i) log pi(z_i|p) + R_i]`` with leave-one-out advantages A. For
"log-prob" the second term is supervised training on the reference after each chain; without it the algorithm differs.
JEPO maximises the multi-sample bound LME = log((1/G) sum_i exp(l_i)): chain i counts by what it adds to the bound, and
the direct term is ``sum_i softmax(l)_i grad l_i``.

Papers: Likelihood-Based Reward Designs for General LLM Reasoning (arXiv 2602.03979), VeriFree (arXiv 2505.21493), JEPO
(arXiv 2503.19618).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from polyreward.errors import InvalidInputError, UnknownNameError, nearest
from polyreward.likelihood import (
    KINDS,
    TOKEN_FLOOR,
    jepo_advantages,
    jepo_bound,
    likelihood_values,
    perplexity,
    rloo,
    underflow_count,
)
from polyreward.objectives.surrogate import ObjectiveResult, PolicyObjective
from polyreward.objectives.trust_region import FixedClip

AnswerWeight = Literal["gradient", "advantage", "one"]
_WEIGHTS = ("gradient", "advantage", "one")


@dataclass(frozen=True)
class LikelihoodPolicyLoss:
    """Surrogate loss ``-mean_i[sg(A_i) log pi(z_i|p) + R_i]`` of a likelihood reward (arXiv 2602.03979).

    Parameters
    ----------
    kind : "log-prob", "avg-log-prob", "prob", "avg-prob", "geo-prob" or "jepo"
        "jepo" is `JEPOObjective`.
    direct_term : bool
        Whether R_i keeps its gradient. False leaves the policy gradient alone.
    token_floor : float < 0
        Lowest log-probability of a token in the log kinds; no gradient below it.
    answer_weight : "gradient", "advantage" or "one"
        What multiplies the gradient of the reference's log-probability l_i in the direct term: what R_i itself gives
        (for "prob" that is R_i, VeriFree's "reward"), the advantage A_i, or 1. The last two are VeriFree's options.

    Raises
    ------
    UnknownNameError
        No such kind or weight.
    """

    kind: str = "log-prob"
    direct_term: bool = True
    token_floor: float = TOKEN_FLOOR
    answer_weight: AnswerWeight = "gradient"

    def __post_init__(self) -> None:
        kind = str(self.kind).replace("_", "-")
        if kind not in KINDS:
            raise UnknownNameError(f"no kind of likelihood reward {self.kind!r}{nearest(kind, KINDS)}")
        object.__setattr__(self, "kind", kind)
        if self.answer_weight not in _WEIGHTS:
            raise UnknownNameError(f"no answer_weight {self.answer_weight!r}{nearest(self.answer_weight, _WEIGHTS)}")

    def __call__(
        self,
        cot_logp: Tensor,
        answer_logp: Tensor,
        answer_mask: Tensor | None = None,
        *,
        cot_mask: Tensor | None = None,
        failed: Tensor | None = None,
    ) -> ObjectiveResult:
        """Loss of P prompts with G chains each.

        Parameters
        ----------
        cot_logp : float (P, G) or (P, G, T)
            log pi(z_i|p), summed or by token, with gradient.
        answer_logp : float (P, G, L)
            Log-probability of each reference token after the chain, with gradient for the direct term.
        answer_mask : bool (P, G, L) or (P, L), default all true
        cot_mask : bool (P, G, T), with token log-probabilities
        failed : bool (P, G)
            Truncated chains: the lowest reward, and no direct term.

        Returns
        -------
        ObjectiveResult
            Scalar loss and metrics without gradient: ``reward``, ``reward_std`` (mean over prompts of the deviation
            inside a prompt), ``perplexity`` (mean over prompts, of the mixture of the chains), ``underflow`` (chains
            whose probability is 0 in this precision), ``direct_term``, and ``cot_length`` with token
            log-probabilities.

        Raises
        ------
        InvalidInputError
            Fewer than 2 chains a prompt, shapes that do not fit, an empty reference.
        """
        chains, length = _chain_logp(cot_logp, cot_mask, answer_logp)
        total = likelihood_values(answer_logp, answer_mask, "log-prob", token_floor=self.token_floor, failed=failed)
        if self.kind == "jepo":
            advantages, reward = jepo_advantages(total), total
            direct = jepo_bound(total)
            loss = -((advantages * chains).sum(dim=1) + (direct if self.direct_term else direct.detach())).mean()
        else:
            reward = likelihood_values(answer_logp, answer_mask, self.kind, token_floor=self.token_floor, failed=failed)
            advantages = rloo(reward)
            direct = reward
            if self.answer_weight != "gradient":
                direct = advantages * total if self.answer_weight == "advantage" else total
            loss = -(advantages * chains + (direct if self.direct_term else direct.detach())).mean()
        with torch.no_grad():
            metrics = {
                "reward": reward.mean(),
                "reward_std": reward.std(dim=1).mean(),
                "perplexity": perplexity(answer_logp, answer_mask, failed).mean(),
                "underflow": reward.new_tensor(underflow_count(answer_logp, answer_mask, self.kind, failed)),
                "direct_term": direct.mean(),
            } | ({} if length is None else {"cot_length": length})
        return ObjectiveResult(loss, {name: value.detach() for name, value in metrics.items()})


@dataclass(frozen=True)
class JEPOObjective:
    """The multi-sample evidence bound as a loss (JEPO, arXiv 2503.19618).

    Minimises ``-(sum_i sg(LME(all) - LME(without i)) log pi(z_i|p) + LME(all))``, mean over prompts, with LME the
    `jepo_bound` of the log-likelihoods l. In expectation the bound lies between the mean of l and the log marginal
    likelihood of the reference, and grows with G; of one chain it is l.

    Parameters
    ----------
    direct_term : bool
        Whether the bound itself keeps its gradient.
    token_floor : float < 0
    """

    direct_term: bool = True
    token_floor: float = TOKEN_FLOOR

    def __call__(
        self,
        cot_logp: Tensor,
        answer_logp: Tensor,
        answer_mask: Tensor | None = None,
        *,
        cot_mask: Tensor | None = None,
        failed: Tensor | None = None,
    ) -> ObjectiveResult:
        """Loss and metrics, as `LikelihoodPolicyLoss`."""
        loss = LikelihoodPolicyLoss("jepo", self.direct_term, self.token_floor)
        return loss(cot_logp, answer_logp, answer_mask, cot_mask=cot_mask, failed=failed)


def likelihood_objective(clip: float = 0.2) -> PolicyObjective:
    """The chain's term for a trainer: the surrogate summed over tokens, ``sum_t A log pi(z_t)``, mean over chains.

    Of likelihood rewards (arXiv 2602.03979). Beside it the direct term of `ReferenceLikelihood` has the weight that
    the gradient of E[R] gives it. Averages over tokens would shrink the chain's term by its length.
    """
    if not (math.isfinite(clip) and clip > 0):
        raise InvalidInputError(f"clip must be a positive number, got {clip!r}")
    return PolicyObjective(FixedClip(clip, clip), aggregation="fixed-length", length=1)


def _chain_logp(cot_logp: Tensor, cot_mask: Tensor | None, answer_logp: Tensor) -> tuple[Tensor, Tensor | None]:
    """Summed log-probabilities (P, G) of the chains, and their mean length where tokens are given."""
    shape = _shape(answer_logp)
    wide = cot_logp if cot_logp.dtype == torch.float64 else cot_logp.float()
    if wide.ndim == 2 and cot_mask is None and tuple(wide.shape) == shape:
        return wide, None
    if wide.ndim != 3 or tuple(wide.shape[:2]) != shape:
        raise InvalidInputError(
            f"cot_logp has shape {tuple(cot_logp.shape)}, expected {shape} or {shape} with tokens and a cot_mask"
        )
    keep = torch.ones_like(wide, dtype=torch.bool) if cot_mask is None else cot_mask.to(torch.bool)
    if keep.shape != wide.shape:
        raise InvalidInputError(f"cot_mask has shape {tuple(keep.shape)}, cot_logp has {tuple(wide.shape)}")
    return torch.where(keep, wide, 0.0).sum(dim=2), keep.sum(dim=2).to(wide.dtype).mean()


def _shape(answer_logp: Tensor) -> tuple[int, int]:
    """(P, G) of log-probabilities (P, G, L)."""
    if answer_logp.ndim != 3:
        raise InvalidInputError(f"answer_logp must have shape (P, G, L), got {tuple(answer_logp.shape)}")
    return answer_logp.shape[0], answer_logp.shape[1]
