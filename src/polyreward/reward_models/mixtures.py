"""Mixtures of reward heads: one reward for each kind of judge, and weights that say whose reward a prompt calls for.

    P(a > b | x) = sum_k f_k(x) sigma(r_k(x, a) - r_k(x, b))
    loss         = -mean log P(chosen > rejected | x) + alpha mean sum_k f_k(x) log f_k(x)

A single Bradley-Terry reward of a mixed population has an error that no model class removes (`bt_mixture_floor`). A
mixture of the probabilities has not; a mixture of the rewards, ``sigma(sum_k f_k (r_k(a) - r_k(b)))``, is a single
reward again. The second term of the loss, the negative entropy of each prompt's weights, keeps all heads in use.
`polyreward.reward_models.mixture_models` holds the head and likelihood for `PreferenceModel`,
`polyreward.reward_models.context_routing` the second stage, which tunes the weights alone.
"MiCRo: Mixture Modeling and Context-aware Routing for Personalized Preference Learning" (arXiv 2505.24846).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from polyreward.errors import InvalidInputError, UnknownNameError, nearest

SUM_TOLERANCE = 1e-5
"""How far weights may sum from 1; half precision is allowed what it rounds to."""

Pointwise = Literal["reward", "log_sigmoid"]
POINTWISE = ("reward", "log_sigmoid")


@dataclass(frozen=True)
class MixtureBTLoss:
    """Negative log-likelihood of a mixture of Bradley-Terry models, less the entropy of its weights (arXiv 2505.24846).

    Parameters
    ----------
    alpha : float >= 0
        Weight of the negative entropy, of each sample and not of the mean over the batch. The loss may be negative.

    Calling it with margins and router logits gives the loss, a scalar, and its parts ``nll`` and ``neg_entropy``.
    """

    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < math.inf:
            raise InvalidInputError(f"alpha must be a finite number from 0, got {self.alpha}")

    def __call__(self, margins: Tensor, router_logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and parts, in float32 or wider; 0 for an empty batch.

        Parameters
        ----------
        margins : float (B, K)
            ``r_k(chosen) - r_k(rejected)``.
        router_logits : float (B, K), or (K,) for weights that no prompt changes

        Raises
        ------
        InvalidInputError
            Other shapes, no heads, or a value that is NaN or infinite, with its row.
        """
        _require_matrix(margins, "margins")
        if router_logits.shape not in (margins.shape, margins.shape[1:]):
            raise InvalidInputError(
                f"router_logits have shape {tuple(router_logits.shape)}, expected {tuple(margins.shape)} or "
                f"{tuple(margins.shape[1:])} as the margins"
            )
        _require_finite(margins, "margins")
        _require_finite(router_logits, "router_logits")
        log_weights = _wide(router_logits).log_softmax(dim=-1).expand(margins.shape)
        each = mixture_log_probability(log_weights, logsigmoid(_wide(margins)))
        count = max(len(margins), 1)
        parts = {"nll": -each.sum() / count, "neg_entropy": -entropy(log_weights).sum() / count}
        return parts["nll"] + self.alpha * parts["neg_entropy"], parts


class MultiHeadReward(nn.Module):
    """K linear rewards of the same features, (..., d) to (..., K).

    Parameters
    ----------
    d : int
        Width of the features.
    K : int
        Heads. They begin at random: heads that began alike would stay alike.
    bias : bool
        A constant says nothing about preferences.
    """

    def __init__(self, d: int, K: int, bias: bool = False) -> None:
        super().__init__()
        require_components(K)
        self.linear = nn.Linear(d, K, bias=bias)

    def forward(self, features: Tensor) -> Tensor:
        """Rewards (..., K)."""
        rewards: Tensor = self.linear(features)
        return rewards


class ContextRouter(nn.Module):
    """Logits of the mixture weights from the features of the prompt alone, (..., d_prompt) to (..., K).

    Parameters
    ----------
    d_prompt : int
        Width of the features: the state at the last token of the prompt, never of the response.
    K : int
        Heads.
    hidden : int or None
        Units of the hidden layer, with ReLU (the paper gives the width and no activation); None is a linear router, as
        in the code that was released with the paper.
    """

    def __init__(self, d_prompt: int, K: int, hidden: int | None = 128) -> None:
        super().__init__()
        require_components(K)
        self.network: nn.Module = (
            nn.Sequential(nn.Linear(d_prompt, hidden), nn.ReLU(), nn.Linear(hidden, K))
            if hidden
            else nn.Linear(d_prompt, K)
        )

    def forward(self, prompts: Tensor) -> Tensor:
        """Logits (..., K); their softmax is the weights."""
        logits: Tensor = self.network(prompts)
        return logits


def mixture_preference(margins: Any, weights: Any) -> Any:
    """Probability that the first is preferred, ``sum_k weights_k sigma(margins_k)``; above 1/2 is the prediction.

    Parameters
    ----------
    margins : float (B, K) tensor or array
    weights : float (B, K) or (K,)
        Rows sum to 1.

    Returns
    -------
    (B,) in the type, dtype and device of `margins`

    Raises
    ------
    InvalidInputError
        Other shapes, no heads, NaN, or weights that are negative or do not sum to 1, with the row.
    """
    given, array = as_tensor(margins)
    _require_matrix(given, "margins")
    _require_finite(given, "margins")
    share = simplex(weights, given, "weights")
    found = (share * torch.sigmoid(_wide(given))).sum(dim=-1).clamp(0, 1)
    return as_given(found, given, array)


def mixture_score(values: Tensor, log_weights: Tensor, how: Pointwise = "reward") -> Tensor:
    """One number for a response, where one is needed: no such number can order every pair as the mixture does.

    Parameters
    ----------
    values : float (R, K)
        Rewards under each head.
    log_weights : float (R, K)
    how : "reward" or "log_sigmoid"
        ``sum_k f_k r_k``, whose order no constant of a prompt changes, or ``sum_k f_k log sigma(r_k)``, which the
        evaluators that were released with the paper take.

    Returns
    -------
    float (R,)
    """
    if how not in POINTWISE:
        raise UnknownNameError(f"unknown score {how!r}{nearest(str(how), POINTWISE)}")
    return (log_weights.exp() * (values if how == "reward" else logsigmoid(values))).sum(dim=-1)


def bt_mixture_floor(group_probs: Any, weights: Any, rho: float | None = None) -> float:
    """Cross-entropy, in nats, below which no single reward comes on pairs that K groups judge differently.

    ``2 rho K mean_x Var_k[m_k(x)] + H``, with the variance of the population over the groups, all counted alike, and H
    the mean over x of ``sum_k P(k | x) h(m_k(x))``, h the entropy of a coin. The paper prints the single reward inside
    h, where its proof needs the groups' own probabilities.

    Parameters
    ----------
    group_probs : float (G, K) tensor or array
        Probability that each group prefers the first response, in each of G equally frequent situations x (a prompt, or
        a pair of responses to it).
    weights : float (G, K), or (K,)
        ``P(k | x)``; rows sum to 1.
    rho : float, optional
        A lower bound of the weights; default the smallest of them.

    Raises
    ------
    InvalidInputError
        Other shapes, nothing in it, probabilities out of [0, 1], rows that do not sum to 1, or a `rho` above a weight.
    """
    given, _ = as_tensor(group_probs)
    _require_matrix(given, "group_probs")
    if not len(given):
        raise InvalidInputError("group_probs has no rows; the floor is a mean over at least one situation")
    probs = given.detach().double()
    wrong = ~((probs >= 0) & (probs <= 1)).all(dim=1)
    if bool(wrong.any()):
        raise InvalidInputError(f"group_probs of row {int(wrong.int().argmax())} are not probabilities in [0, 1]")
    share = simplex(weights, given, "weights").detach().double().expand(probs.shape)
    smallest = float(share.min())
    bound = smallest if rho is None else rho
    if not 0 <= bound <= smallest + SUM_TOLERANCE:
        raise InvalidInputError(f"rho must be between 0 and the smallest weight, {smallest:g}, got {bound}")
    coin = -torch.xlogy(probs, probs) - torch.xlogy(1 - probs, 1 - probs)
    spread = probs.var(dim=1, correction=0).mean()
    return float(2 * bound * probs.shape[1] * spread + (share * coin).sum(dim=1).mean())


def mixture_log_probability(log_weights: Tensor, log_probabilities: Tensor) -> Tensor:
    """``log sum_k exp(log_weights_k + log_probabilities_k)`` of the last axis."""
    return torch.logsumexp(log_weights + log_probabilities, dim=-1)


def entropy(log_weights: Tensor) -> Tensor:
    """Entropy of the weights on the last axis, in nats, (...,); log-weights may be -inf."""
    return -torch.where(torch.isneginf(log_weights), 0.0, log_weights.exp() * log_weights).sum(dim=-1)


def router_report(log_weights: Tensor) -> dict[str, float]:
    """How the weights are used, to see a collapse: of (B, K) log-weights.

    ``entropy`` is the mean over samples of the entropy of each, ``usage_entropy`` that of the mean weights, both as
    shares of log K: (1, 1) is no specialisation, (0, 1) a head for each sample with all heads in use, (0, 0) one head
    for everything. 1 for a single head, 0 weights for an empty batch.
    """
    if not len(log_weights) or log_weights.shape[-1] == 1:
        return {"entropy": 1.0, "usage_entropy": 1.0}
    most, wide = math.log(log_weights.shape[-1]), log_weights.detach().double()
    usage = torch.logsumexp(wide, dim=0) - math.log(len(wide))
    return {"entropy": float(entropy(wide).mean() / most), "usage_entropy": float(entropy(usage) / most)}


def head_regularizers(weight: Tensor) -> dict[str, Tensor]:
    """Penalties on the directions of K heads, scalars: ``orthogonality``, ``norm`` and ``correlation``.

    Means over pairs of heads of ``|w_i . w_j|`` and of ``|corr(w_i, w_j)|``, and over heads of ``| ||w_i|| - 1 |``; 0
    where there is no pair. The code released with the paper has them with weight 0.

    Parameters
    ----------
    weight : float (K, d)
    """
    size = len(weight)
    rows, columns = torch.triu_indices(size, size, 1, device=weight.device)
    centred = weight - weight.mean(dim=1, keepdim=True)
    unit = centred / centred.norm(dim=1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
    pairs = max(len(rows), 1)
    return {
        "orthogonality": (weight @ weight.T)[rows, columns].abs().sum() / pairs,
        "norm": (weight.norm(dim=1) - 1).abs().mean(),
        "correlation": (unit @ unit.T)[rows, columns].abs().sum() / pairs,
    }


def simplex(weights: Any, like: Tensor, name: str) -> Tensor:
    """Weights as a tensor in float32 or wider on the device of `like`, checked: rows as of `like`, or one for all."""
    share, _ = as_tensor(weights)
    share = share.to(like.device)
    if share.shape not in (like.shape, like.shape[1:]):
        raise InvalidInputError(
            f"{name} have shape {tuple(share.shape)}, expected {tuple(like.shape)} or {tuple(like.shape[1:])}"
        )
    wide = _wide(share)
    total = wide.sum(dim=-1)
    rounds = torch.finfo(share.dtype).eps * share.shape[-1] if share.is_floating_point() else 0.0
    allowed = max(SUM_TOLERANCE, rounds if share.dtype in (torch.float16, torch.bfloat16) else 0.0)
    good = ((total - 1).abs() <= allowed) & (wide >= 0).all(dim=-1)
    if not bool(good.all()):
        row = int((~good).reshape(-1).int().argmax())
        raise InvalidInputError(
            f"{name} of row {row} are negative, NaN, or sum to {float(total.reshape(-1)[row]):g}: expected weights "
            f"from 0 that sum to 1"
        )
    return wide


def require_components(count: int) -> None:
    """Refuse a mixture of fewer than one head."""
    if isinstance(count, bool) or not isinstance(count, int | np.integer) or count < 1:
        raise InvalidInputError(f"a mixture needs at least 1 head, got {count!r}")


def as_tensor(values: Any) -> tuple[Tensor, bool]:
    """As a tensor, and whether it was none."""
    if isinstance(values, Tensor):
        return values, False
    return torch.as_tensor(np.asarray(values)), True


def as_given(found: Tensor, given: Tensor, array: bool) -> Any:
    """A result in the type and dtype of what was given."""
    result = found.to(given.dtype) if given.is_floating_point() else found
    return result.numpy() if array else result


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def _require_matrix(values: Tensor, name: str) -> None:
    if values.ndim != 2 or values.shape[1] < 1:
        raise InvalidInputError(f"{name} must have shape (samples, heads) with a head, got {tuple(values.shape)}")


def _require_finite(values: Tensor, name: str) -> None:
    bad = ~torch.isfinite(values)
    if bool(bad.any()):
        place = bad.nonzero()[0].tolist()
        raise InvalidInputError(f"{name}{place} is {float(values[tuple(place)])}, expected a finite number")
