"""All responses to one prompt scored in one forward pass (You Only Judge Once, arXiv 2604.10966).

N responses stand behind one prompt with a separator between them. One causal pass gives the hidden state v_i at the end
of each, and s_i = head(v_i) / sqrt(H). Later responses attend to earlier ones, so a response can be judged against
others, which scoring one by one cannot do. The loss is the cross-entropy of the best,

    L = - log( exp s_b / sum_i exp s_i ),   for N = 2 Bradley-Terry on s_1 - s_2.

Scores of a set are comparable inside that set alone. The first response is judged blind and the last sees all: train
with a fresh order for every sample, and report how often the winner survives another order (`order_consistency`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from polyreward.errors import InvalidInputError, UnknownNameError, nearest
from polyreward.reward_models.likelihoods import plackett_luce_loss, select_best_loss
from polyreward.reward_models.multi_response_batch import (
    PADDING,
    SEPARATOR,
    MultiResponseCollator,
    assemble,
    strip_separator,
)
from polyreward.reward_models.text_encoders import tokenize

__all__ = [
    "CostRatio",
    "MultiResponseCollator",
    "MultiResponseRewardModel",
    "RespRepr",
    "average_over_orders",
    "flops_ratio",
    "order_consistency",
    "plackett_luce_loss",
    "response_vectors",
    "select_best_loss",
]

RespRepr = Literal["last", "first", "first_last_concat", "first_last_add", "first_last_sub", "response_mean"]
_NOT_FOR_BACKBONE = ("labels", "ranks", "permutation", "kept", "skipped", "dropped")


class CostRatio(NamedTuple):
    """Cost of N separate passes over that of one pass: tokens that are computed, and pairs that attend."""

    tokens: float
    attention: float


def flops_ratio(P: int, L: int, N: int) -> CostRatio:
    """How much one pass saves for a prompt of P tokens and N responses of L tokens.

    ``N (P + L) / (P + N L + N - 1)`` tokens and ``N (P + L)^2 / (P + N L + N - 1)^2`` for attention; below 1 the one
    pass is dearer, as it is for attention where responses are as long as the prompt.
    """
    if P < 0 or L < 0 or N < 1 or P + L < 1:
        raise InvalidInputError(f"flops_ratio needs tokens and N of at least 1, got P={P}, L={L}, N={N}")
    together = P + N * L + N - 1
    return CostRatio(N * (P + L) / together, N * (P + L) ** 2 / together**2)


def response_vectors(states: Tensor, start: Tensor, end: Tensor, resp_repr: RespRepr = "last") -> Tensor:
    """One vector for each response.

    Parameters
    ----------
    states : float (B, T, H)
    start, end : int64 (B, R)
        First and last token of each response; -1 is padding.
    resp_repr : "last", "first", "first_last_concat" (first, then last), "first_last_add", "first_last_sub" (last less
        first) or "response_mean"

    Returns
    -------
    (B, R, H), or (B, R, 2H) of "first_last_concat"; 0 at padding

    Raises
    ------
    UnknownNameError, InvalidInputError
        Another `resp_repr`; places that the sequences do not have.
    """
    check_representation(resp_repr)
    if end.ndim != 2 or start.shape != end.shape or len(end) != len(states):
        raise InvalidInputError(
            f"start_indices {tuple(start.shape)} and end_indices {tuple(end.shape)} must be (B, R) for states of shape "
            f"{tuple(states.shape)}"
        )
    length = states.shape[1]
    for name, places in (("start_indices", start), ("end_indices", end)):
        wrong = (places < PADDING) | (places >= length)
        if bool(wrong.any()):
            row = int(wrong.any(dim=1).int().argmax())
            raise InvalidInputError(
                f"{name} of sequence {row} are {places[row].tolist()}, beyond its {length} tokens: it was cut after "
                "the places were found"
            )
    valid = (start >= 0) & (end >= 0)
    if bool((valid & (start > end)).any()):
        raise InvalidInputError("a response ends before it starts: start_indices are above end_indices")

    def at(places: Tensor) -> Tensor:
        # -1 would read the last token
        return states.gather(1, places.clamp(min=0).unsqueeze(-1).expand(-1, -1, states.shape[-1]))

    if resp_repr == "last":
        vectors = at(end)
    elif resp_repr == "first":
        vectors = at(start)
    elif resp_repr == "first_last_concat":
        vectors = torch.cat([at(start), at(end)], dim=-1)
    elif resp_repr == "first_last_add":
        vectors = at(start) + at(end)
    elif resp_repr == "first_last_sub":
        vectors = at(end) - at(start)
    else:
        place = torch.arange(length, device=states.device)
        inside = (place >= start.unsqueeze(-1)) & (place <= end.unsqueeze(-1)) & valid.unsqueeze(-1)
        wide = states.to(torch.promote_types(states.dtype, torch.float32))
        weights = inside.to(wide.dtype) / inside.sum(dim=-1, keepdim=True).clamp(min=1)
        vectors = torch.bmm(weights, wide).to(states.dtype)
    return torch.where(valid.unsqueeze(-1), vectors, 0.0)


def check_representation(name: str) -> None:
    """`UnknownNameError` for what is no `RespRepr`."""
    if name not in get_args(RespRepr):
        raise UnknownNameError(f"unknown resp_repr {name!r}{nearest(str(name), get_args(RespRepr))}")


class MultiResponseRewardModel(nn.Module):
    """A causal model and a head that score all responses of a sequence.

    Parameters
    ----------
    backbone : a model of transformers (also with adapters of peft), or any module
        Called with ``input_ids``, ``attention_mask`` and what else a batch holds, such as ``pixel_values``.
    head : module from (B, R, H) to (B, R) or (B, R, 1)
        `RewardHead(H, hidden_dim=1024, init_std=0.01)` is the paper's; width 2H for "first_last_concat".
    resp_repr : as of `response_vectors`
    scale_dot : bool
        Divide by sqrt(H), H the width of the hidden states.
    sep_token_id : int, optional
        For `score_group`; default that of `SEPARATOR` in the tokenizer.
    tokenizer : tokenizer, optional
        For `score_group` with texts.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        resp_repr: RespRepr = "last",
        scale_dot: bool = True,
        sep_token_id: int | None = None,
        tokenizer: Any = None,
    ) -> None:
        super().__init__()
        check_representation(resp_repr)
        if sep_token_id is None and tokenizer is not None:
            found = tokenizer.convert_tokens_to_ids(SEPARATOR)
            if found is None or found == tokenizer.unk_token_id:
                raise InvalidInputError(f"the tokenizer has no {SEPARATOR}; call add_separator(tokenizer, model) first")
            sep_token_id = int(found)
        self.backbone, self.head = backbone, head
        self.resp_repr, self.scale_dot = resp_repr, scale_dot
        self.sep_token_id, self.tokenizer = sep_token_id, tokenizer

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        end_indices: Tensor | None = None,
        start_indices: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """Scores float (B, R), ``-inf`` at padding, of a batch of `MultiResponseCollator`.

        Raises
        ------
        InvalidInputError
            No ``end_indices`` (or ``start_indices`` where `resp_repr` reads them), or places beyond the sequences.
        """
        if end_indices is None or (start_indices is None and self.resp_repr != "last"):
            missing = "end_indices" if end_indices is None else f"start_indices, which {self.resp_repr!r} reads"
            raise InvalidInputError(f"the batch lacks {missing}; make it with MultiResponseCollator")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        own = {name: value for name, value in inputs.items() if name not in _NOT_FOR_BACKBONE}
        states = hidden_states(self.backbone, input_ids=input_ids, attention_mask=attention_mask, **own)
        start = end_indices if start_indices is None else start_indices
        vectors = response_vectors(states, start, end_indices, self.resp_repr)
        weight = next(self.head.parameters(), None)
        scores: Tensor = self.head(vectors if weight is None else vectors.to(weight.dtype))
        scores = scores.squeeze(-1) if scores.ndim == 3 else scores
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if self.scale_dot:
            scores = scores / math.sqrt(states.shape[-1])
        return scores.masked_fill((end_indices < 0) | (start < 0), -torch.inf)

    @torch.no_grad()
    def score_group(
        self,
        prompt: Any,
        responses: Sequence[Any],
        num_permutations: int = 1,
        generator: torch.Generator | None = None,
        **inputs: Any,
    ) -> Tensor:
        """Scores (N,) of the responses to one prompt, less their mean; see `average_over_orders`.

        Parameters
        ----------
        prompt, responses : token numbers, or texts where the model has a tokenizer
            The separator is taken out of them. An empty response is worth ``-inf``.
        num_permutations : int
            Orders, a forward pass each.
        generator : torch.Generator, optional
        inputs : what else the backbone takes, such as ``pixel_values``
        """
        if self.sep_token_id is None:
            raise InvalidInputError("score_group needs sep_token_id or a tokenizer")
        prompt_ids, *rest = [self._ids(part) for part in (prompt, *responses)]
        full = [i for i, ids in enumerate(rest) if ids]
        if not full:
            raise InvalidInputError(f"none of the {len(rest)} responses has a token")
        device = next(self.parameters()).device

        def score(order: Sequence[int]) -> Tensor:
            assert self.sep_token_id is not None
            batch = assemble([prompt_ids], [[rest[full[i]] for i in order]], self.sep_token_id)
            return self(**{name: value.to(device) for name, value in batch.items()}, **inputs)[0]

        training = self.training
        self.eval()
        try:
            scores = average_over_orders(score, len(full), num_permutations, generator)
        finally:
            self.train(training)
        every = scores.new_full((len(rest),), -torch.inf)
        every[torch.tensor(full, device=every.device)] = scores
        return every

    def _ids(self, part: Any) -> list[int]:
        if isinstance(part, str):
            if self.tokenizer is None:
                raise InvalidInputError("texts need MultiResponseRewardModel(..., tokenizer=...)")
            text = strip_separator(part)
            return tokenize(self.tokenizer, [text], 2**31)[0] if text else []
        return [int(token) for token in part if int(token) != self.sep_token_id]


def average_over_orders(
    score: Callable[[Sequence[int]], Tensor],
    count: int,
    num_permutations: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Scores of a set, less their mean, averaged over orders of the set: takes out what the place adds.

    The first order is the given one and the others are drawn; where as many are asked for as there are, each counts
    once, and the result no longer depends on how the set is given. The paper uses one order.

    Parameters
    ----------
    score : function from an order of ``range(count)`` to the scores (count,) in that order
    count : int
    num_permutations : int
    generator : torch.Generator, optional

    Returns
    -------
    (count,) in the given order
    """
    if num_permutations < 1 or count < 1:
        raise InvalidInputError(
            f"a set needs a response and num_permutations at least 1, got {count}, {num_permutations}"
        )
    orders: list[Sequence[int]] = [range(count)]
    if num_permutations >= math.factorial(count):
        orders = list(itertools.permutations(range(count)))
    else:
        orders += [torch.randperm(count, generator=generator).tolist() for _ in range(num_permutations - 1)]
    total = None
    for order in orders:
        found = score(order)
        centred = torch.empty_like(found)
        centred[torch.tensor(order, device=found.device)] = found - found.mean()
        total = centred if total is None else total + centred
    assert total is not None
    return total / len(orders)


def order_consistency(scores: Tensor, permutation: Tensor, other_scores: Tensor, other_permutation: Tensor) -> Tensor:
    """Whether the winner of each set survives another order, bool (B,).

    Parameters
    ----------
    scores, other_scores : float (B, R) by place
    permutation, other_permutation : int64 (B, R), as of `MultiResponseCollator`
    """
    winners = [
        order.gather(1, found.argmax(dim=1, keepdim=True))
        for found, order in ((scores, permutation), (other_scores, other_permutation))
    ]
    return (winners[0] == winners[1]).squeeze(1)


def hidden_states(backbone: nn.Module, **inputs: Any) -> Tensor:
    """Last hidden states (B, T, H) of a model of transformers, with a language-model head or without, or any module."""
    options: dict[str, Any] = {}
    config = getattr(backbone, "config", None)
    if hasattr(config, "use_cache") or hasattr(getattr(config, "text_config", None), "use_cache"):
        options["use_cache"] = False
    output: Any = getattr(backbone, "get_output_embeddings", None)
    if output is not None and output() is not None:
        options["output_hidden_states"] = True
    found: Any = backbone(**inputs, **options)
    if isinstance(found, Tensor):
        return found
    states: Any = getattr(found, "last_hidden_state", None)
    if states is None:
        several = getattr(found, "hidden_states", None)
        states = several[-1] if several else found[0] if isinstance(found, tuple) else None
    if not isinstance(states, Tensor) or states.ndim != 3:
        raise InvalidInputError(f"{type(backbone).__name__} gives no hidden states (B, T, H)")
    return states
