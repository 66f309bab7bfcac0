"""What the log-probabilities of a reference answer are worth: sums, means, group bounds and leave-one-out baselines.

A chain of thought z is judged by how likely the model makes the reference a* after it. With l_t the log-probability of
the t-th reference token, l their sum and L their number:

    prob  exp(l)          avg-prob  mean_t exp(l_t)      geo-prob  exp(l / L)
    log-prob  l           avg-log-prob  l / L            jepo  log((1/G) sum_i exp(l_i)), one value a group of G chains

Everything is computed from log-probabilities in float32 or wider, and products of probabilities only at the end: below
l of about -103 ``exp(l)`` is 0 in float32, which is counted. Arrays give arrays, tensors give tensors on their device.

Papers: Likelihood-Based Reward Designs for General LLM Reasoning (arXiv 2602.03979), VeriFree (arXiv 2505.21493), RLPR
(arXiv 2506.18254), NOVER (arXiv 2505.16022), JEPO: Beyond Verifiable Rewards (arXiv 2503.19618).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyreward.errors import InvalidInputError, UnknownNameError, nearest
from polyreward.grouped import Segments

PROBABILITY_KINDS = ("prob", "avg-prob", "geo-prob")
KINDS = (*PROBABILITY_KINDS, "log-prob", "avg-log-prob", "jepo")
TOKEN_FLOOR = -100.0
_TOLERANCE = 1e-3


def likelihood_values(
    logp: Any, mask: Any = None, kind: str = "log-prob", *, token_floor: float = TOKEN_FLOOR, failed: Any = None
) -> Any:
    """Value of each chain of thought by the likelihood of its reference, (P, G) in float32 or wider.

    Differentiable in `logp`, for the direct term of the objective.

    Parameters
    ----------
    logp : float (P, G, L)
        Log-probability of each reference token, at most 0.
    mask : bool or 0/1, (P, G, L), or (P, L) where the chains of a prompt share their tokens; default all true
        Tokens that count; what stands elsewhere does not matter.
    kind : "prob", "avg-prob", "geo-prob", "log-prob", "avg-log-prob" or "jepo" (the bound of the group, for each of it)
    token_floor : float < 0
        Lowest log-probability of a token in "log-prob", "avg-log-prob" and "jepo", -100 by default: one impossible
        token (-inf) must not decide everything.
    failed : bool (P, G), optional
        Chains that count as failures, such as truncated ones, whatever their tokens say: probability 0, the floor at
        every token. Theirs is the one kind of row that may have no token.

    Raises
    ------
    UnknownNameError
        No such kind.
    InvalidInputError
        Shapes that do not fit, NaN or a positive log-probability, or a reference without a token; the message names
        prompt and sample.
    """
    if (name := kind.replace("_", "-")) not in KINDS:
        raise UnknownNameError(f"no kind of likelihood reward {kind!r}{nearest(kind, KINDS)}")
    if not (math.isfinite(token_floor) and token_floor < 0):
        raise InvalidInputError(f"token_floor must be a finite number below 0, got {token_floor}")
    tokens, keep, lost = checked_logp(logp, mask, failed)
    number = keep.sum(dim=-1)
    if name in ("log-prob", "avg-log-prob", "jepo"):
        tokens = torch.where(keep, tokens.clamp(min=token_floor), 0.0)
        # A failed chain without tokens is as long as the longest reference of its prompt.
        length = torch.where(number > 0, number, number.amax(dim=1, keepdim=True).clamp(min=1))
        total = torch.where(lost, token_floor * length, tokens.sum(dim=-1))
        if name == "jepo":
            return like(jepo_bound(total).unsqueeze(-1).expand_as(total), logp)
        return like(total / length if name == "avg-log-prob" else total, logp)
    number = number.clamp(min=1)
    if name == "avg-prob":
        values = torch.where(keep, tokens.exp(), 0.0).sum(dim=-1) / number
    else:
        total = tokens.sum(dim=-1)
        values = (total / number if name == "geo-prob" else total).exp()
    return like(torch.where(lost, 0.0, values), logp)


def underflow_count(logp: Any, mask: Any = None, kind: str = "prob", failed: Any = None) -> int:
    """Number of chains whose value is 0 though every token has a probability: ``exp`` of the sum underflowed."""
    if kind.replace("_", "-") not in PROBABILITY_KINDS:
        return 0
    tokens, keep, lost = checked_logp(logp, mask, failed)
    values = likelihood_values(tokens, keep, kind, failed=lost)
    return int(((values == 0) & torch.isfinite(tokens).all(dim=-1) & ~lost).sum())


def perplexity(logp: Any, mask: Any = None, failed: Any = None) -> Any:
    """Perplexity a token of the reference under the mixture of its chains, (P,): ``exp(-(1/L) log mean_i exp(l_i))``.

    L is the mean number of tokens of the prompt's chains. Failed chains count with probability 0; infinite where all
    failed or the reference is impossible.
    """
    tokens, keep, lost = checked_logp(logp, mask, failed)
    total = torch.where(lost, -torch.inf, tokens.sum(dim=-1))
    number = keep.sum(dim=-1).to(total.dtype)
    length = torch.where(lost, 0.0, number).sum(dim=1) / (~lost).sum(dim=1).clamp(min=1)
    return like((-jepo_bound(total) / length.clamp(min=1)).exp(), logp)


def jepo_bound(values: Any) -> Any:
    """Multi-sample evidence bound ``log((1/G) sum_i exp(l_i))`` over the last axis: (..., G) -> (...).

    Never exponentiates a sum of log-probabilities on its own. NaN marks an absent sample and counts in neither sum nor
    G; without any sample the bound is -inf. Between the mean of `values` and their maximum.
    """
    total = wide(values)
    absent = total.isnan()
    number = (~absent).sum(dim=-1)
    bound = total.masked_fill(absent, -torch.inf).logsumexp(dim=-1) - number.clamp(min=1).to(total.dtype).log()
    return like(bound, values)


def jepo_advantages(values: Any) -> Any:
    """What each sample adds to the bound: ``LME(all) - LME(without i)``, (..., G) -> (..., G), no gradient.

    LME is `jepo_bound`. NaN marks an absent sample, which gets 0. Where all others are impossible (-inf) as well as
    where the sample itself is alone with such, values are bounded by the largest float and never NaN.

    Raises
    ------
    InvalidInputError
        Fewer than 2 samples in a group.
    """
    total = wide(values).detach()
    absent = total.isnan()
    _refuse_single((~absent).sum(dim=-1), "jepo_advantages")
    others = total.unsqueeze(-2).expand(*total.shape, total.shape[-1]).clone()
    others.diagonal(dim1=-2, dim2=-1).fill_(torch.nan)
    low = torch.finfo(total.dtype).min
    gain = jepo_bound(total).clamp(min=low).unsqueeze(-1) - jepo_bound(others).clamp(min=low)
    return like(torch.where(absent, 0.0, gain.nan_to_num()), values)


def rloo(values: Any) -> Any:
    """Leave-one-out advantages ``R_i - mean_{j != i} R_j`` over the last axis, no gradient.

    Parameters
    ----------
    values : float (P, G) or (G,)
        Rewards of the G samples of a prompt. NaN: does not apply; it takes part in no mean and gets 0.

    Returns
    -------
    the same shape, in float32 or wider; sums to 0 over each group, exactly 0 where all values of a group are equal

    Raises
    ------
    InvalidInputError
        G < 2, or an infinite value.
    """
    rewards = wide(values).detach()
    if rewards.ndim not in (1, 2):
        raise InvalidInputError(f"rloo needs values (P, G), got shape {tuple(rewards.shape)}")
    if rewards.shape[-1] < 2:
        raise InvalidInputError(
            f"rloo compares the samples of a prompt and needs at least 2 of them, got G = {rewards.shape[-1]}"
        )
    if bool(rewards.isinf().any()):
        place = tuple(rewards.isinf().nonzero()[0].tolist())
        raise InvalidInputError(f"rloo: the value at {place} is infinite; floor impossible tokens first")
    flat, applies = rewards.reshape(-1), ~rewards.isnan().reshape(-1)
    size = rewards.shape[-1]
    codes = torch.arange(flat.numel() // size, device=flat.device).repeat_interleave(size)
    segments = Segments(codes, flat.numel() // size)
    number = segments.number(applies)
    factor = segments.spread(number / (number - 1).clamp(min=1))
    return like((segments.centred(flat, applies) * factor).view_as(rewards).to(rewards.dtype), values)


def checked_logp(logp: Any, mask: Any, failed: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities (P, G, L) with 0 where they do not count, the mask in that shape, and failures (P, G)."""
    tokens = wide(logp)
    if tokens.ndim != 3:
        raise InvalidInputError(f"logp must have shape (P, G, L), got {tuple(tokens.shape)}")
    keep = _mask(mask, tokens)
    lost = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    if failed is not None:
        lost = torch.as_tensor(failed, device=tokens.device).to(torch.bool)
        if lost.shape != tokens.shape[:2]:
            raise InvalidInputError(f"failed has shape {tuple(lost.shape)}, expected {tuple(tokens.shape[:2])}")
    keep_scored = keep & ~lost.unsqueeze(-1)
    _refuse_at(keep_scored & tokens.isnan(), "is NaN")
    _refuse_at(keep_scored & (tokens > _TOLERANCE), "is above 0, so no log-probability (a loss has the opposite sign)")
    empty = ~(keep.any(dim=-1) | lost)
    _refuse_at(empty, "has no token; an empty reference cannot be scored")
    return torch.where(keep_scored, tokens, 0.0), keep, lost


def wide(values: Any) -> Tensor:
    """As a floating tensor of at least float32, on its device, with its gradient."""
    tensor = values if isinstance(values, Tensor) else torch.from_numpy(np.array(values, dtype=_float_of(values)))
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def like(result: Tensor, original: Any) -> Any:
    """A result as the caller gave its input: a tensor for a tensor, else an array."""
    return result if isinstance(original, Tensor) else result.detach().cpu().numpy()


def _float_of(values: Any) -> Any:
    dtype = getattr(values, "dtype", np.dtype(np.float64))
    return dtype if isinstance(dtype, np.dtype) and dtype.kind == "f" and dtype.itemsize >= 4 else np.float64


def _mask(mask: Any, tokens: Tensor) -> Tensor:
    if mask is None:
        return torch.ones_like(tokens, dtype=torch.bool)
    keep = torch.as_tensor(mask, device=tokens.device).to(torch.bool)
    rows, _, length = tokens.shape
    if keep.shape == (rows, length):
        keep = keep.unsqueeze(1)
    if keep.ndim != 3 or any(have not in (1, want) for have, want in zip(keep.shape, tokens.shape, strict=True)):
        raise InvalidInputError(
            f"mask has shape {tuple(keep.shape)}, expected {tuple(tokens.shape)} or {(rows, length)}"
        )
    return keep.expand(tokens.shape)


def _refuse_at(wrong: Tensor, problem: str) -> None:
    if bool(wrong.any()):
        place = wrong.nonzero()[0].tolist()
        token = f", token {place[2]}" if len(place) > 2 else ""
        what = "log-probability" if token else "reference"
        raise InvalidInputError(f"the {what} of prompt {place[0]}, sample {place[1]}{token} {problem}")


def _refuse_single(number: Tensor, where: str) -> None:
    if number.numel() and int(number.min()) < 2:
        raise InvalidInputError(
            f"{where} compares the samples of a prompt and needs at least 2 of them, got {int(number.min())}"
        )
