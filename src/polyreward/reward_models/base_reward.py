"""The BaseReward recipe: a backbone, a two-layer SiLU head, the pairwise loss and nothing else (arXiv 2509.16127).

    r(x, y) = head(h),  h the last hidden state at the last token,   L = mean -log sigma(r(x, y_w) - r(x, y_l))

`base_reward` is that recipe on an encoder. The other parts are what the paper compares it with or adds to it: heads of
other depths and activations, the zero-coefficient penalty and the length normalisation that it rejects, averages of
several models, and a rule beside the model. Figures: Acc, the share of pairs in the right order, and Acc+, the share of
prompts of which all pairs are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from polyreward.errors import InvalidInputError, UnknownNameError, nearest
from polyreward.reward_models.comparisons import Comparisons
from polyreward.reward_models.likelihoods import BradleyTerry, bradley_terry_loss
from polyreward.reward_models.model import PreferenceModel
from polyreward.reward_models.multi_response import hidden_states
from polyreward.reward_models.reward_head import RewardHead

__all__ = [
    "HybridReward",
    "RewardHead",
    "ScalarRewardModel",
    "ZeroPenalty",
    "base_reward",
    "combine_rewards",
    "grouped_accuracy",
    "length_normalize",
    "mixture_ablation",
    "pair_accuracy",
    "pairwise_loss",
]

Squares = Literal["half", "sum"]
POOLINGS = ("last", "mean", "first")
MODES = ("mean", "weighted", "vote")


def base_reward(
    encoder: Any,
    num_layers: int = 2,
    activation: str = "silu",
    hidden_dim: int | None = None,
    zero_coef: float = 0.0,
) -> PreferenceModel:
    """The recipe as a model that has not been fitted.

    Parameters
    ----------
    encoder : any encoder, such as `MultimodalEncoder` (frozen) or `FineTunedMultimodalEncoder` (the paper's)
    num_layers, activation, hidden_dim : as of `RewardHead`
    zero_coef : float >= 0
        Weight of `ZeroPenalty`.

    The paper fits all weights of a 7B model at a rate of 3e-6 on 2.8M pairs; a head alone needs a far larger rate.
    """
    head = partial(RewardHead, num_layers=num_layers, activation=activation, hidden_dim=hidden_dim)
    return PreferenceModel(encoder, head, BradleyTerry(), (ZeroPenalty(zero_coef),) if zero_coef else ())


class ScalarRewardModel(nn.Module):
    """A backbone of transformers and a head on one pooled hidden state.

    Parameters
    ----------
    backbone : a model of transformers, or any module
        Called with ``input_ids``, ``attention_mask`` and what else is passed on, such as ``pixel_values``.
    head : module from (B, H) to (B,) or (B, 1)
    pooling : "last" token that is no padding, on whichever side that is; "first" such; or "mean" of them
        Both responses of a pair must end alike: with the end-of-turn token, or without.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module, pooling: str = "last") -> None:
        super().__init__()
        if pooling not in POOLINGS:
            raise UnknownNameError(f"unknown pooling {pooling!r}{nearest(str(pooling), POOLINGS)}")
        self.backbone, self.head, self.pooling = backbone, head, pooling

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
        """Rewards (B,), float32 or wider; `InvalidInputError` for a row of padding only."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        part = attention_mask.bool()
        if not bool(part.any(dim=1).all()):
            raise InvalidInputError(f"sequence {int((~part.any(dim=1)).int().argmax())} is padding only")
        states = hidden_states(self.backbone, input_ids=input_ids, attention_mask=attention_mask, **inputs)
        if self.pooling == "mean":
            wide = states.to(torch.promote_types(states.dtype, torch.float32))
            weights = part.unsqueeze(-1).to(wide.dtype)
            pooled = (wide * weights).sum(dim=1) / weights.sum(dim=1)
        else:
            place = torch.arange(part.shape[1], device=part.device)
            if self.pooling == "last":
                at = torch.where(part, place, -1).amax(dim=1)
            else:
                at = torch.where(part, place, part.shape[1]).amin(dim=1)
            pooled = states[torch.arange(len(states), device=states.device), at]
        weight = next(self.head.parameters(), None)
        rewards: Tensor = self.head(pooled if weight is None else pooled.to(weight.dtype))
        rewards = rewards.squeeze(-1) if rewards.ndim == 2 else rewards
        return rewards.to(torch.promote_types(rewards.dtype, torch.float32))


def pairwise_loss(r_w: Tensor, r_l: Tensor, zero_coef: float = 0.0, squares: Squares = "half") -> Tensor:
    """``mean -log sigma(r_w - r_l)``, plus ``zero_coef`` times the mean square of the rewards.

    Parameters
    ----------
    r_w, r_l : float (B,)
        Rewards of the better and the worse response.
    zero_coef : float >= 0
        lambda. 0 is Bradley-Terry bit for bit.
    squares : "half" for ``0.5 (r_w^2 + r_l^2)``, "sum" for ``r_w^2 + r_l^2``
        The paper does not say which; TRL's ``center_rewards_coefficient`` is another term, ``(r_w + r_l)^2``.

    Raises
    ------
    InvalidInputError
        Shapes that differ, no pairs, a negative or infinite `zero_coef`.
    """
    if r_w.shape != r_l.shape or not r_w.numel():
        raise InvalidInputError(
            f"r_w has shape {tuple(r_w.shape)}, r_l {tuple(r_l.shape)}: expected the same, not empty"
        )
    _check_zero(zero_coef, squares)
    work = torch.promote_types(r_w.dtype, torch.float32)
    won, lost = r_w.to(work), r_l.to(work)
    loss = bradley_terry_loss(won - lost)
    if not zero_coef:
        return loss
    return loss + zero_coef * (1.0 if squares == "sum" else 0.5) * (won.square() + lost.square()).mean()


@dataclass(frozen=True)
class ZeroPenalty:
    """The zero-coefficient term of `pairwise_loss` as a penalty of `PreferenceModel`.

    Parameters
    ----------
    zero_coef : float >= 0
    squares : "half" or "sum"
    """

    zero_coef: float = 0.01
    squares: Squares = "half"

    def __post_init__(self) -> None:
        _check_zero(self.zero_coef, self.squares)

    def __call__(self, scores: Tensor, comparisons: Comparisons) -> Tensor:
        """``zero_coef`` times the mean over pairs of their squares."""
        pairs = comparisons.pairs
        each = scores[pairs.first].square() + scores[pairs.second].square()
        return self.zero_coef * (1.0 if self.squares == "sum" else 0.5) * (each * pairs.weight).sum()


def length_normalize(r: Tensor, lengths: Tensor) -> Tensor:
    """``r / log(length)``, for ablation: the paper finds no gain.

    It changes orders where rewards are negative: a longer bad response becomes better.

    Parameters
    ----------
    r : float (...,)
    lengths : (...,), at least 2
        Tokens; log 1 would divide by 0.
    """
    lengths = torch.as_tensor(lengths, device=r.device)
    if lengths.shape != r.shape:
        raise InvalidInputError(f"r has shape {tuple(r.shape)}, lengths {tuple(lengths.shape)}: expected the same")
    wrong = ~(lengths >= 2)
    if bool(wrong.any()):
        first = int(wrong.flatten().int().argmax())
        raise InvalidInputError(
            f"length {first} is {lengths.flatten()[first].item():g}: a reward is divided by its logarithm, which takes "
            "a length of at least 2"
        )
    return r / lengths.to(torch.promote_types(r.dtype, torch.float32)).log().to(r.dtype)


def combine_rewards(
    scores: Any,
    mode: Literal["mean", "weighted", "vote"] = "mean",
    *,
    weights: Any = None,
    reference: Any = None,
    groups: Any = None,
) -> Any:
    """One reward of those of M models.

    Parameters
    ----------
    scores : float (M, B) tensor or array
    mode : "mean", "weighted" or "vote"
        "vote": the share of the other responses to the prompt that a model puts below this one (equal ones count half),
        averaged over the models; of two responses, the share of models that prefer it. A response alone has 0.5.
    weights : (M,), with "weighted"
        At least 0, such as validation accuracies; they are divided by their sum.
    reference : float (M, R), optional
        Scores of the same models on other data than those that are judged: each model then has mean 0 and deviation 1
        on them, without which the one with the largest scale decides. "vote" does not depend on scales.
    groups : (B,), with "vote"
        Which responses belong to one prompt; default all.

    Returns
    -------
    (B,) in the type, dtype and device of `scores`

    Raises
    ------
    InvalidInputError
        Shapes that do not fit, scores that are not finite, negative weights, a model that scores the reference all the
        same.
    UnknownNameError
        Another `mode`.
    """
    if mode not in MODES:
        raise UnknownNameError(f"unknown mode {mode!r}{nearest(str(mode), MODES)}")
    array = not isinstance(scores, Tensor)
    given = torch.as_tensor(np.asarray(scores)) if array else scores
    if given.ndim != 2 or not len(given) or not bool(torch.isfinite(given).all()):
        raise InvalidInputError(f"scores must be finite, of shape (models, samples), got {tuple(given.shape)}")
    work = given if given.dtype in (torch.float32, torch.float64) else given.float()
    if (weights is None) == (mode == "weighted"):
        raise InvalidInputError(f"mode {mode!r} takes {'weights' if mode == 'weighted' else 'no weights'}")
    if reference is not None:
        work = _standardized(work, torch.as_tensor(np.asarray(reference) if array else reference))
    if mode == "vote":
        result = _votes(work, groups).mean(dim=0)
    elif mode == "mean":
        result = work.mean(dim=0)
    else:
        share = torch.as_tensor(weights, dtype=work.dtype, device=work.device)
        if share.shape != (len(work),) or not bool((share >= 0).all()) or not 0 < float(share.sum()) < math.inf:
            raise InvalidInputError(f"weights must be {len(work)} numbers of at least 0, not all 0, got {weights}")
        # a weight of 0 takes no part, whatever that model says
        result = ((share / share.sum()).unsqueeze(1) * work).sum(dim=0)
    result = result.to(given.dtype) if given.is_floating_point() else result
    return result.numpy() if array else result


def pair_accuracy(r_w: Any, r_l: Any) -> float:
    """Acc: share of the pairs whose better response has the higher reward; ties and NaN are wrong.

    Parameters
    ----------
    r_w, r_l : (P,) tensors or arrays
    """
    right = _right(r_w, r_l)
    return float(right.mean())


def grouped_accuracy(r_w: Any, r_l: Any, groups: Any) -> float:
    """Acc+: share of the prompts of which all pairs are in the right order; ties and NaN are wrong.

    Parameters
    ----------
    r_w, r_l : (P,) tensors or arrays
    groups : (P,)
        Prompt of each pair: numbers or texts.
    """
    right = _right(r_w, r_l)
    keys = groups.cpu().numpy() if isinstance(groups, Tensor) else np.asarray(groups)
    if keys.shape != right.shape:
        raise InvalidInputError(f"groups must name the prompt of each of {len(right)} pairs, got shape {keys.shape}")
    code = np.unique(keys, return_inverse=True)[1]
    wrong = np.bincount(code, weights=~right)
    return float((wrong == 0).mean())


def mixture_ablation(
    datasets: Mapping[str, Any], train_fn: Callable[[Any], Any], eval_fn: Callable[[Any], Any]
) -> dict[str, Any]:
    """What each data set teaches alone: the table by which the paper drops sets that do not help.

    Parameters
    ----------
    datasets : mapping of name to data
    train_fn : function from data to a model
    eval_fn : function from a model to a figure, or to several by name

    Returns
    -------
    dict of name to figures, in the order of `datasets`
    """
    if not datasets:
        raise InvalidInputError("mixture_ablation got no data sets")
    return {name: eval_fn(train_fn(data)) for name, data in datasets.items()}


@dataclass(frozen=True)
class HybridReward:
    """A rule where an answer can be checked, and the model beside it.

    1 where the rule says that the answer is right, else ``sigma(model)``: the paper uses both and leaves open how they
    are mixed. Calling it is the reward contract, ``reward(prompts, completions, **columns) -> list[float | None]``.

    Parameters
    ----------
    rule : reward, whose result is True or 1 where the answer is right; None or NaN where it cannot be checked
    model : reward model, or reward
    """

    rule: Callable[..., Sequence[Any]]
    model: Any

    @property
    def __name__(self) -> str:
        return "hybrid_reward"

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """A number in (0, 1] for each sample; None where the model has no opinion and the rule says nothing good."""
        with torch.no_grad():
            scored = getattr(self.model, "score", self.model)(prompts, completions, **columns)
        found = scored.tolist() if isinstance(scored, Tensor) else list(scored)
        checked = list(self.rule(prompts, completions, **columns))
        for name, values in (("rule", checked), ("model", found)):
            if len(values) != len(completions):
                raise InvalidInputError(f"the {name} gave {len(values)} results for {len(completions)} samples")
        return [
            1.0 if right is not None and float(right) == 1.0 else _probability(value)
            for right, value in zip(checked, found, strict=True)
        ]


def _probability(value: float | None) -> float | None:
    if value is None or value != value:
        return None
    return 1 / (1 + math.exp(-value)) if value > -700 else 0.0


def _check_zero(zero_coef: float, squares: str) -> None:
    if not 0 <= zero_coef < math.inf:
        raise InvalidInputError(f"zero_coef must be a finite number of at least 0, got {zero_coef}")
    if squares not in ("half", "sum"):
        raise InvalidInputError(f"squares must be 'half' or 'sum', got {squares!r}")


def _right(r_w: Any, r_l: Any) -> np.ndarray:
    won, lost = (r.detach().cpu().double().numpy() if isinstance(r, Tensor) else np.asarray(r) for r in (r_w, r_l))
    if won.shape != lost.shape or won.ndim != 1 or not len(won):
        raise InvalidInputError(f"r_w has shape {won.shape}, r_l {lost.shape}: expected (pairs,) of each, not empty")
    return np.asarray(won > lost)


def _standardized(scores: Tensor, reference: Tensor) -> Tensor:
    if reference.ndim != 2 or len(reference) != len(scores) or not reference.shape[1]:
        raise InvalidInputError(
            f"reference has shape {tuple(reference.shape)}, expected ({len(scores)}, samples) of the same models"
        )
    wide = reference.to(scores.device).double()
    mean, deviation = wide.mean(dim=1, keepdim=True), wide.std(dim=1, correction=0, keepdim=True)
    flat = wide.amax(dim=1) == wide.amin(dim=1)
    if not bool(torch.isfinite(wide).all()) or bool(flat.any()):
        raise InvalidInputError(
            f"model {int(flat.int().argmax())} scores the reference all the same, or not with finite numbers: it has "
            "no scale; leave it out"
        )
    return ((scores.double() - mean) / deviation).to(scores.dtype)


def _votes(scores: Tensor, groups: Any) -> Tensor:
    """Share of the others of its group below each sample, (M, B), by sorting."""
    count = scores.shape[1]
    keys = np.zeros(count, np.int64) if groups is None else groups
    keys = keys.cpu().numpy() if isinstance(keys, Tensor) else np.asarray(keys)
    if keys.shape != (count,):
        raise InvalidInputError(f"groups must name the prompt of each of {count} samples, got shape {keys.shape}")
    code = torch.from_numpy(np.unique(keys, return_inverse=True)[1].astype(np.int64)).to(scores.device)
    size = torch.bincount(code, minlength=1)[code]
    votes = torch.empty_like(scores)
    for number, row in enumerate(scores):
        level = torch.unique(row, return_inverse=True)[1] + code * count
        ranked = level.sort().values
        first = torch.searchsorted(ranked, code * count)
        below = torch.searchsorted(ranked, level) - first
        equal = torch.searchsorted(ranked, level, right=True) - first - below - 1
        votes[number] = torch.where(size > 1, (below + 0.5 * equal) / (size - 1).clamp(min=1), 0.5).to(votes.dtype)
    return votes
