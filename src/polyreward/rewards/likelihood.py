"""Likelihood rewards: a chain of thought is worth what it makes the reference answer worth to the model.

`LikelihoodReward` turns the log-probabilities of the reference's tokens (see `reference_logprobs`) into rewards: the
probability (VeriFree), its mean over tokens (RLPR), the log-probability or its mean, the geometric mean, or the group's
evidence bound (JEPO). RLPR's format term and filter of prompts and NOVER's ranks and efficiency are functions beside
it. No verifier is needed, only references.

Papers: Likelihood-Based Reward Designs for General LLM Reasoning (arXiv 2602.03979), which recommends "log-prob";
VeriFree (arXiv 2505.21493), RLPR (arXiv 2506.18254), NOVER (arXiv 2505.16022), JEPO (arXiv 2503.19618).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from polyreward.errors import InvalidInputError, UnknownNameError, nearest
from polyreward.likelihood import (
    KINDS,
    PROBABILITY_KINDS,
    TOKEN_FLOOR,
    jepo_advantages,
    jepo_bound,
    like,
    likelihood_values,
    perplexity,
    rloo,
    underflow_count,
    wide,
)

__all__ = [
    "KINDS",
    "PROBABILITY_KINDS",
    "EMAStdFilter",
    "LikelihoodReward",
    "efficiency_reward",
    "jepo_advantages",
    "jepo_bound",
    "likelihood_values",
    "nover_perplexity",
    "nover_reward",
    "perplexity",
    "rank_reward",
    "rloo",
    "rlpr_reward",
    "underflow_count",
]


@dataclass(frozen=True)
class LikelihoodReward:
    """Reward of chains of thought from the log-probabilities of the reference after them (arXiv 2602.03979).

    Parameters
    ----------
    kind : "log-prob", "avg-log-prob", "prob", "avg-prob", "geo-prob" or "jepo"
        See `polyreward.likelihood`. "jepo" gives every sample the bound of its group; a group of one is "log-prob".
    baseline_no_cot : bool
        Subtract the value of the reference without a chain (RLPR's debiasing): give its log-probabilities at the call.
    clip_min : float, optional
        Lowest value after that; RLPR has 0.
    token_floor : float < 0
        Lowest log-probability of a token in "log-prob", "avg-log-prob" and "jepo".
    shaping : "identity", or "sigmoid" for ``sigmoid(steepness * (2 x - 1))``, one of RLPR's options, applied last
    steepness : float > 0

    Raises
    ------
    UnknownNameError
        No such kind or shaping.
    InvalidInputError
        A value outside its range, or a baseline for "jepo".
    """

    kind: str = "log-prob"
    baseline_no_cot: bool = False
    clip_min: float | None = None
    token_floor: float = TOKEN_FLOOR
    shaping: Literal["identity", "sigmoid"] = "identity"
    steepness: float = 6.0

    def __post_init__(self) -> None:
        kind = str(self.kind).replace("_", "-")
        if kind not in KINDS:
            raise UnknownNameError(f"no kind of likelihood reward {self.kind!r}{nearest(kind, KINDS)}")
        object.__setattr__(self, "kind", kind)
        if self.shaping not in ("identity", "sigmoid"):
            raise UnknownNameError(f"no shaping {self.shaping!r}{nearest(self.shaping, ('identity', 'sigmoid'))}")
        if self.clip_min is not None and not math.isfinite(self.clip_min):
            raise InvalidInputError(f"clip_min must be a finite number or None, got {self.clip_min!r}")
        if not (math.isfinite(self.token_floor) and self.token_floor < 0):
            raise InvalidInputError(f"token_floor must be a finite number below 0, got {self.token_floor!r}")
        if not (math.isfinite(self.steepness) and self.steepness > 0):
            raise InvalidInputError(f"steepness must be a positive number, got {self.steepness!r}")
        if kind == "jepo" and self.baseline_no_cot:
            raise InvalidInputError("'jepo' compares the chains of a group and takes no baseline_no_cot")

    def __call__(
        self, logp: Any, mask: Any = None, *, baseline: Any = None, baseline_mask: Any = None, failed: Any = None
    ) -> Any:
        """Rewards (P, G) in float32 or wider; an array for an array, a tensor for a tensor, with gradient in `logp`.

        Parameters
        ----------
        logp : float (P, G, L)
            Log-probability of each reference token after the prompt and the chain.
        mask : bool (P, G, L) or (P, L)
            Tokens that count, default all.
        baseline, baseline_mask : the same without a chain, (P, G, L) or (P, L); no gradient flows into it
        failed : bool (P, G)
            Chains that earn the lowest value: 0 as probability, `token_floor` at every token.

        Raises
        ------
        InvalidInputError
            Shapes that do not fit, NaN, positive log-probabilities, an empty reference (prompt and sample are named);
            a baseline missing or not asked for.
        """
        if self.baseline_no_cot != (baseline is not None):
            raise InvalidInputError(
                "baseline_no_cot needs the log-probabilities without a chain: pass baseline="
                if self.baseline_no_cot
                else "a baseline was given to a reward without baseline_no_cot"
            )
        values = wide(likelihood_values(logp, mask, self.kind, token_floor=self.token_floor, failed=failed))
        if baseline is not None:
            without = wide(baseline).detach().to(values.device)
            without = without.unsqueeze(1) if without.ndim == 2 else without
            alone = likelihood_values(without, baseline_mask, self.kind, token_floor=self.token_floor)
            if alone.shape not in (values.shape, (values.shape[0], 1)):
                raise InvalidInputError(
                    f"the baseline is of shape {tuple(alone.shape)}, expected {tuple(values.shape)} or one a prompt"
                )
            values = values - alone
        if self.clip_min is not None:
            values = values.clamp(min=self.clip_min)
        if self.shaping == "sigmoid":
            values = torch.sigmoid(self.steepness * (2 * values - 1))
        return like(values, logp)

    def underflow(self, logp: Any, mask: Any = None, failed: Any = None) -> int:
        """Number of chains whose probability is 0 in this precision though no token is impossible."""
        return underflow_count(logp, mask, self.kind, failed)


def rlpr_reward(score: Any, well_formed: Any, format_weight: float = 0.1) -> Any:
    """RLPR's reward ``(1 - w) * score + w * format`` (arXiv 2506.18254): same shape as `score`.

    Parameters
    ----------
    score : float (P, G)
        ``LikelihoodReward("avg-prob", baseline_no_cot=True, clip_min=0.0)``.
    well_formed : bool or 0/1 (P, G)
    format_weight : float in [0, 1]
    """
    if not 0 <= format_weight <= 1:
        raise InvalidInputError(f"format_weight must be in [0, 1], got {format_weight!r}")
    values = wide(score)
    shape = torch.as_tensor(well_formed, device=values.device).to(values.dtype)
    if shape.shape != values.shape:
        raise InvalidInputError(f"well_formed has shape {tuple(shape.shape)}, score has {tuple(values.shape)}")
    return like((1 - format_weight) * values + format_weight * shape, score)


@dataclass
class EMAStdFilter:
    """RLPR's filter: drops prompts whose rewards vary less than usual (arXiv 2506.18254).

    At each step the filter is called once with the rewards of the step's prompts. From `statistics_from` on it keeps
    the mean of their standard deviations: at step `start` the mean of what came before, afterwards a moving average.
    A prompt is dropped where its deviation is below ``beta`` times that average, which never holds the step itself.

    Parameters
    ----------
    beta : float >= 0
        0.5 for Qwen, 0.9 for Llama, 1.0 for Gemma.
    decay : float in [0, 1)
    start : int >= 1
        First step at which prompts are dropped; steps count from 1.
    statistics_from : int >= 1, default `start` - 5, at least 1
        First step that counts.

    Raises
    ------
    InvalidInputError
        A value outside its range; rewards that are not (P, G).
    """

    beta: float = 0.5
    decay: float = 0.99
    start: int = 11
    statistics_from: int | None = None
    step: int = field(default=0, init=False)
    average: float | None = field(default=None, init=False)
    seen: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if not (self.beta >= 0 and 0 <= self.decay < 1):
            raise InvalidInputError(f"EMAStdFilter needs beta >= 0 and decay in [0, 1), got {self.beta}, {self.decay}")
        if self.statistics_from is None:
            self.statistics_from = max(1, self.start - 5)
        if not 1 <= self.statistics_from <= self.start:
            raise InvalidInputError(
                f"EMAStdFilter needs 1 <= statistics_from <= start, got {self.statistics_from}, {self.start}"
            )

    def __call__(self, rewards: Any) -> Any:
        """Which prompts to keep, bool (P,), for rewards (P, G); all of them before `start`. NaN: does not apply."""
        values = wide(rewards).detach().to(torch.float64)
        if values.ndim != 2:
            raise InvalidInputError(f"EMAStdFilter needs rewards (P, G), got shape {tuple(values.shape)}")
        applies = ~values.isnan()
        number = applies.sum(dim=1)
        centred = values - (values.nan_to_num().sum(dim=1) / number.clamp(min=1)).unsqueeze(1)
        deviation = (torch.where(applies, centred, 0.0).square().sum(dim=1) / (number - 1).clamp(min=1)).sqrt()
        self.step += 1
        keep = torch.ones_like(number, dtype=torch.bool)
        if self.step >= self.start and self.average is not None:
            keep = deviation >= self.beta * self.average
        assert self.statistics_from is not None
        if self.step >= self.statistics_from and bool((number > 1).any()):
            self._take(float(deviation[number > 1].mean()))
        return like(keep, rewards)

    def _take(self, deviation: float) -> None:
        self.seen += 1
        if self.average is None:
            self.average = deviation
        elif self.step < self.start:
            self.average += (deviation - self.average) / self.seen
        else:
            self.average = self.decay * self.average + (1 - self.decay) * deviation

    def state_dict(self) -> dict[str, Any]:
        """Step and average, as plain data."""
        return {"step": self.step, "average": self.average, "seen": self.seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        step, seen, average = int(state["step"]), int(state["seen"]), state["average"]
        self.step, self.seen, self.average = step, seen, None if average is None else float(average)


def nover_perplexity(logp: Any, mask: Any = None, reasoning_tokens: Any = 0, failed: Any = None) -> Any:
    """Perplexity of the reference, discounted by the length of the reasoning (NOVER, arXiv 2505.16022): (P, G).

    ``exp(mean_t(-l_t) / max(1, 1 + log10(n)))`` with n reasoning tokens, a number or (P, G). NaN where a chain failed.
    """
    mean = wide(likelihood_values(logp, mask, "avg-log-prob", failed=failed))
    length = torch.as_tensor(reasoning_tokens, device=mean.device).to(mean.dtype)
    if length.ndim and length.shape != mean.shape:
        raise InvalidInputError(f"reasoning_tokens has shape {tuple(length.shape)}, expected {tuple(mean.shape)}")
    values = (-mean.double() / (1 + length.clamp(min=1).log10())).exp()  # 100 nats a token overflow float32
    if failed is not None:
        values = values.masked_fill(torch.as_tensor(failed, device=mean.device).to(torch.bool), torch.nan)
    return like(values, logp)


def rank_reward(perplexity: Any, valid: Any = None) -> Any:
    """NOVER's reasoning reward ``(n - rank) / n`` over the n valid samples of a group, rank 0 the lowest perplexity.

    Parameters
    ----------
    perplexity : float (P, G) or (G,)
        NaN and infinity: not valid.
    valid : bool, same shape, optional

    Returns
    -------
    same shape, 0 where not valid; equal perplexities share the better rank
    """
    values, ok = _ranked(perplexity, valid)
    better = (values.unsqueeze(-2) < values.unsqueeze(-1)) & ok.unsqueeze(-2)
    number = ok.sum(dim=-1, keepdim=True)
    reward = (number - better.sum(dim=-1)).to(values.dtype) / number.clamp(min=1)
    return like(torch.where(ok, reward, 0.0), perplexity)


def efficiency_reward(perplexity: Any, length: Any, valid: Any = None) -> Any:
    """NOVER's efficiency reward: share of the other valid samples that are both longer and higher in perplexity.

    Parameters
    ----------
    perplexity, length : (P, G) or (G,)
        Length of the reasoning. NaN and infinity in the perplexity: not valid.
    valid : bool, same shape, optional

    Returns
    -------
    same shape in [0, 1], 0 where not valid or where no other sample is
    """
    values, ok = _ranked(perplexity, valid)
    size = torch.as_tensor(length, device=values.device).to(values.dtype)
    if size.shape != values.shape:
        raise InvalidInputError(f"length has shape {tuple(size.shape)}, perplexity has {tuple(values.shape)}")
    beaten = (values.unsqueeze(-2) > values.unsqueeze(-1)) & (size.unsqueeze(-2) > size.unsqueeze(-1))
    beaten = beaten & ok.unsqueeze(-2)
    others = (ok.sum(dim=-1, keepdim=True) - 1).clamp(min=1)
    return like(torch.where(ok, beaten.sum(dim=-1).to(values.dtype) / others, 0.0), perplexity)


def nover_reward(perplexity: Any, length: Any, well_formed: Any) -> Any:
    """NOVER's total: format (0 or 1) + reasoning + efficiency, weights 1; only well-formed samples are ranked."""
    ranks = wide(rank_reward(perplexity, well_formed))
    efficiency = wide(efficiency_reward(perplexity, length, well_formed))
    shape = torch.as_tensor(well_formed, device=ranks.device).to(ranks.dtype)
    return like(shape + ranks + efficiency, perplexity)


def _ranked(perplexity: Any, valid: Any) -> tuple[Tensor, Tensor]:
    values = wide(perplexity).detach()
    if values.ndim not in (1, 2):
        raise InvalidInputError(f"perplexity must have shape (P, G) or (G,), got {tuple(values.shape)}")
    ok = torch.isfinite(values)
    if valid is not None:
        given = torch.as_tensor(valid, device=values.device).to(torch.bool)
        if given.shape != values.shape:
            raise InvalidInputError(f"valid has shape {tuple(given.shape)}, perplexity has {tuple(values.shape)}")
        ok = ok & given
    return torch.where(ok, values, 0.0), ok
