"""The one-pass reward model as encoder, head and likelihood (You Only Judge Once, arXiv 2604.10966).

    encoder = FineTunedMultimodalEncoder(model, processor, together=True, lora={...})
    model = one_pass_model(encoder).fit(without_empty_responses(data))
    model.score([prompt] * 4, responses)      # one forward pass

The same encoder with ``together=False`` is the model that judges one response at a time, with the same head and loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from polyreward.errors import InvalidInputError
from polyreward.preferences import PreferenceData
from polyreward.reward_models.comparisons import Comparisons
from polyreward.reward_models.heads import Items, Scores, run_head
from polyreward.reward_models.model import PreferenceModel
from polyreward.reward_models.multi_response import average_over_orders
from polyreward.reward_models.reward_head import RewardHead


@dataclass(frozen=True)
class BestOfList:
    """Cross-entropy of the best response, ``-log softmax(s)_b``, mean over the comparisons that have an order.

    Only which is best is used. Of several best ones the paper draws one for the label; this takes the mean over them,
    which is the expectation of that draw and has less noise. Responses that were not compared take no part. A
    comparison whose responses all have the same rank says nothing and is left out.

    `loss` gives the figures ``nll``, ``accuracy`` (share of comparisons whose highest score is a best one; equal scores
    share it) and ``skipped`` (comparisons left out).
    """

    needs: ClassVar[Literal["order", "ratings"]] = "order"

    def loss(self, scores: Scores, comparisons: Comparisons) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Loss and figures."""
        values = self.score(scores)
        ranks = comparisons.grid(comparisons.ranks, torch.nan)
        part = ~torch.isnan(ranks)
        lowest = torch.where(part, ranks, torch.inf).amin(dim=1, keepdim=True)
        best = (ranks == lowest) & part
        known = (torch.where(part, ranks, -torch.inf).amax(dim=1, keepdim=True) > lowest).squeeze(1)
        grid = torch.where(part, comparisons.grid(values), -torch.inf)
        # a comparison without any rank would be a softmax over nothing
        grid = torch.where(known.unsqueeze(1), grid, 0.0)
        each = -torch.where(best, grid.log_softmax(dim=1), 0.0).sum(dim=1) / best.sum(dim=1).clamp(min=1)
        count = known.sum().clamp(min=1)
        loss = torch.where(known, each, 0.0).sum() / count
        top = grid == grid.amax(dim=1, keepdim=True)
        right = (top & best).sum(dim=1) / top.sum(dim=1)
        accuracy = torch.where(known, right, 0.0).sum() / count
        return loss, {"nll": loss.detach(), "accuracy": accuracy.detach(), "skipped": (~known).sum()}

    def score(self, scores: Scores) -> Tensor:
        """The score itself."""
        if scores.values.ndim != 1:
            raise InvalidInputError(
                f"BestOfList needs one score a response, the head returned shape {tuple(scores.values.shape)}"
            )
        return scores.values

    def probability(self, first: Scores, second: Scores) -> Tensor:
        """``sigma(d)``, of scores of the same set."""
        return torch.sigmoid(self.score(first) - self.score(second))


def one_pass_model(encoder: Any, hidden_dim: int | None = 1024, likelihood: Any = None) -> PreferenceModel:
    """The paper's reward model on an encoder that reads responses together.

    Parameters
    ----------
    encoder : ``FineTunedMultimodalEncoder(..., together=True)``, or a module with ``width`` and
        ``forward(prompts, responses, comparison)``
    hidden_dim : int or None
        Width of the head's SiLU layer; None is a linear head. Weights from N(0, 0.01^2), output divided by sqrt(width).
    likelihood : default `BestOfList`; ``PlackettLuce()`` learns from the whole ranking, which the paper does not
    """
    head = partial(
        RewardHead,
        num_layers=1 if hidden_dim is None else 2,
        hidden_dim=hidden_dim,
        init_std=0.01,
        scale=1 / math.sqrt(_hidden_size(encoder)),
    )
    return PreferenceModel(encoder, head, BestOfList() if likelihood is None else likelihood)


@torch.no_grad()
def score_group(
    model: PreferenceModel,
    prompt: Any,
    responses: Sequence[Any],
    num_permutations: int = 1,
    generator: torch.Generator | None = None,
    block_size: int | None = None,
) -> Tensor:
    """Scores (N,) of the responses to one prompt, less their mean, each order in one pass; see `average_over_orders`.

    Parameters
    ----------
    model : PreferenceModel
        Fitted; its encoder has ``read(prompts, responses, groups)``, as `FineTunedMultimodalEncoder`.
    prompt, responses : as of its encoder
    num_permutations : int
    generator : torch.Generator, optional
    block_size : int, optional
        Read at most so many together: the first response stands in every block, and scores are differences to its own.
        For sets larger than those of the training. Blocks are an extension of the paper.

    Raises
    ------
    InvalidInputError
        No responses, an encoder that cannot read in a given order, or blocks of fewer than two.
    """
    read = getattr(model.encoder, "read", None)
    if read is None or model.head is None:
        raise InvalidInputError("score_group needs a fitted model whose encoder has read(prompts, responses, groups)")
    if not len(responses):
        raise InvalidInputError("score_group got no responses")
    if block_size is not None and block_size < 2:
        raise InvalidInputError(f"block_size must be at least 2, got {block_size}")
    head = model.head.eval()
    model.encoder.eval()

    def score(order: Sequence[int]) -> Tensor:
        several = [responses[i] for i in order]
        features = read([prompt] * len(several), several, [list(range(len(several)))])
        codes = torch.zeros(len(several), dtype=torch.long, device=features.device)
        scores: Tensor = model.likelihood.score(run_head(head, Items(features, codes - 1, codes)))
        return scores.cpu()

    if block_size is None or len(responses) <= block_size:
        return average_over_orders(score, len(responses), num_permutations, generator)
    found = torch.zeros(len(responses))
    for start in range(1, len(responses), block_size - 1):
        members = [0, *range(start, min(start + block_size - 1, len(responses)))]

        def of_block(order: Sequence[int], members: Sequence[int] = members) -> Tensor:
            return score([members[i] for i in order])

        block = average_over_orders(of_block, len(members), num_permutations, generator)
        found[torch.tensor(members[1:])] = block[1:] - block[0]
    return found - found.mean()


def without_empty_responses(data: PreferenceData) -> PreferenceData:
    """The comparisons without responses of no text, as the paper trains; what is left with one response goes too.

    A choice follows its response; where an empty one was chosen the comparison goes.
    """
    full = np.array([not (isinstance(r, str) and not r.strip()) for r in data.responses], bool)
    owner, offsets = data.owner, np.asarray(data.offsets)
    counts = np.bincount(owner[full], minlength=len(data))
    keep = counts >= 2
    choice = data.choice
    if choice is not None:
        chosen = offsets[:-1] + np.clip(choice, 0, None)
        keep &= (choice < 0) | full[np.minimum(chosen, max(len(full) - 1, 0))]
    kept = np.flatnonzero(full & keep[owner])
    if len(kept) == len(full):
        return data
    if choice is not None:
        before = np.concatenate([[0], np.cumsum(full)])
        moved = before[np.minimum(offsets[:-1] + np.clip(choice, 0, None), len(full))] - before[offsets[:-1]]
        choice = np.where(choice >= 0, moved, choice)[keep]
    rest = data.select(np.flatnonzero(keep))
    responses: Any = (
        data.responses[kept] if isinstance(data.responses, np.ndarray) else [data.responses[i] for i in kept.tolist()]
    )
    return replace(
        rest,
        responses=responses,
        offsets=np.concatenate([[0], np.cumsum(counts[keep])]),
        choice=choice,
        ranks=None if data.ranks is None else data.ranks[kept],
        ratings=None if data.ratings is None else data.ratings[kept],
    )


def _hidden_size(encoder: Any) -> int:
    width = int(encoder.width)
    return width // 2 if getattr(encoder, "resp_repr", "last") == "first_last_concat" else width
