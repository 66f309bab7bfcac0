"""Log-probabilities of reference answers after chains of thought, by a causal language model in few forward passes.

`reference_logprobs` scores G chains for each of P prompts, teacher-forced: log pi(a*_t | p, z, a*_<t). Chains of one
prompt share its computation: the prompt runs once into the model's key-value cache, the cache is expanded over its
chains, and only chain and answer run for each. The last prompt token is held back and runs with every chain, so that an
answer after an empty chain has a position that predicts it.

Rows are padded on the left, with explicit positions, so that answers end together and logits are made for the last
positions alone. Where a model has no such cache (recurrent or compressed states, a window shorter than the text,
gradient checkpointing), every chain is scored with its prompt, which costs more and gives the same numbers. Logits are
cast to float32 before the softmax; the temperature is 1.

Paper: Likelihood-Based Reward Designs for General LLM Reasoning (arXiv 2602.03979).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from polyreward.errors import InvalidInputError

Ids = Sequence[int]
MAX_TOKENS = 16_384
_CACHE_FACTOR = 4


def reference_logprobs(
    model: Any,
    prompt_ids: Any,
    cot_ids: Any,
    answer_ids: Any,
    *,
    prompt_mask: Tensor | None = None,
    cot_mask: Tensor | None = None,
    answer_mask: Tensor | None = None,
    gradient: bool = False,
    share_prefix: bool = True,
    max_tokens: int = MAX_TOKENS,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each reference token after each chain of thought.

    Parameters
    ----------
    model : transformers causal language model, on any device, in any floating dtype
    prompt_ids : P lists of token ids, or integer tensor (P, T) with `prompt_mask`
    cot_ids : P lists of G lists of token ids, or integer tensor (P, G, T) with `cot_mask`; a chain may be empty
    answer_ids : P lists of token ids, or P lists of G lists, or integer tensor (P, T) or (P, G, T) with `answer_mask`
        One reference a prompt, or one a chain where tokens at the boundary depend on the chain.
    prompt_mask, cot_mask, answer_mask : bool or 0/1, shape of the ids, optional
        Padding of tensors, on either side. Without one every id counts.
    gradient : bool
        Keep the graph, for the direct term of an objective. Without it the model is put into evaluation mode meanwhile.
    share_prefix : bool
        Run each distinct prompt once.
    max_tokens : int > 0
        Most tokens of one forward pass, padding included; the expanded cache may hold four times as many.

    Returns
    -------
    logp : float32 (P, G, L) on the model's device, 0 where `mask` is false
    mask : bool (P, G, L)

    Raises
    ------
    InvalidInputError
        An empty prompt with an empty chain, an empty answer, groups of different size, an id outside the vocabulary;
        the message names prompt and sample.
    """
    prompts = [row[0] for row in _nested(prompt_ids, prompt_mask, "prompt_ids", 1)]
    chains = _nested(cot_ids, cot_mask, "cot_ids", 2)
    sizes = {len(row) for row in chains}
    if len(prompts) != len(chains) or len(sizes) > 1:
        raise InvalidInputError(
            f"{len(prompts)} prompts and {len(chains)} groups of chains of sizes {sorted(sizes)}; expected one group "
            "a prompt, all of one size"
        )
    group = sizes.pop() if sizes else 0
    answers = _nested(answer_ids, answer_mask, "answer_ids", 0)
    if len(answers) != len(prompts) or any(len(row) not in (1, group) for row in answers):
        raise InvalidInputError(f"answer_ids must hold one answer a prompt ({len(prompts)}) or one a chain ({group})")
    suffixes, lengths, owners = [], [], []
    for number, (row, own) in enumerate(zip(chains, answers, strict=True)):
        for chain, answer in zip(row, own * group if len(own) == 1 else own, strict=True):
            suffixes.append([*chain, *answer])
            lengths.append(len(answer))
            owners.append(number)
    logp, mask = score_candidates(
        model, prompts, owners, suffixes, lengths, gradient=gradient, share_prefix=share_prefix, max_tokens=max_tokens
    )
    shape = (len(prompts), group, logp.shape[1])
    return logp.view(shape), mask.view(shape)


def score_candidates(
    model: Any,
    prompts: Sequence[Ids],
    owners: Sequence[int],
    suffixes: Sequence[Ids],
    answer_lengths: Sequence[int],
    *,
    gradient: bool = False,
    share_prefix: bool = True,
    max_tokens: int = MAX_TOKENS,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the last tokens of N suffixes, ragged groups included: float32 (N, L) and mask (N, L).

    Parameters
    ----------
    prompts : distinct prefixes, lists of token ids
    owners : index into `prompts` of each suffix, length N
    suffixes : N lists of token ids, chain and answer
    answer_lengths : N integers >= 1, how many of the last tokens of each are the answer

    The rest as in `reference_logprobs`.
    """
    if max_tokens < 1:
        raise InvalidInputError(f"max_tokens must be at least 1, got {max_tokens}")
    device = _device(model)
    count, width = len(suffixes), max(answer_lengths, default=0)
    _check_rows(model, prompts, owners, suffixes, answer_lengths)
    numbers = torch.tensor(answer_lengths, dtype=torch.int64, device=device)
    parts: list[tuple[list[int], Tensor]] = []
    with torch.set_grad_enabled(gradient), _evaluation(model, not gradient):
        by_prompt: dict[int, list[int]] = {}
        for row, owner in enumerate(owners):
            by_prompt.setdefault(owner, []).append(row)
        shared = [p for p, rows in by_prompt.items() if share_prefix and len(rows) > 1 and len(prompts[p]) > 1]
        if shared and not _caches(model):
            shared = []
        alone = [row for p, rows in by_prompt.items() if p not in set(shared) for row in rows]
        for some in _chunks(shared, lambda p: len(prompts[p]), max_tokens):
            prefix = _prefill(model, [prompts[p][:-1] for p in some], device)
            members = [(place, row) for place, p in enumerate(some) for row in by_prompt[p]]
            longest = max(len(suffixes[row]) for _, row in members) + 1
            if prefix is None or not prefix.holds(longest):
                alone += [row for _, row in members]
                continue
            held = _CACHE_FACTOR * max_tokens
            for chunk in _chunks(members, lambda m: len(suffixes[m[1]]) + 1, max_tokens, held, prefix.width):
                rows = [row for _, row in chunk]
                texts = [[prompts[owners[row]][-1], *suffixes[row]] for row in rows]
                own = prefix.take([place for place, _ in chunk])
                parts.append((rows, answer_logprobs(model, *padded(texts, device), numbers[rows], width, prefix=own)))
        for chunk in _chunks(alone, lambda row: len(prompts[owners[row]]) + len(suffixes[row]), max_tokens):
            texts = [[*prompts[owners[row]], *suffixes[row]] for row in chunk]
            parts.append((chunk, answer_logprobs(model, *padded(texts, device), numbers[chunk], width)))
        mask = torch.arange(width, device=device) < numbers.view(-1, 1)
        if not parts:
            return torch.zeros(count, width, device=device), mask
        order = torch.tensor([row for rows, _ in parts for row in rows], device=device)
        return torch.cat([values for _, values in parts])[order.argsort()], mask


def answer_logprobs(
    model: Any, ids: Tensor, mask: Tensor, lengths: Tensor, width: int | None = None, *, prefix: Any = None
) -> Tensor:
    """Log-probabilities of the last tokens of rows padded on the left, with the gradient that the caller allows.

    Parameters
    ----------
    ids, mask : int64 (R, T)
        Text that ends with the answer; at least one token stands before it.
    lengths : int64 (R,)
        Number of answer tokens, at least 1.
    width : int, default the largest of `lengths`

    Returns
    -------
    float32 (R, width), aligned to the left and 0 after the answer
    """
    longest = int(lengths.max())
    width = longest if width is None else width
    outputs = _call(model, ids, mask, prefix, keep=longest + 1)
    logits = outputs.logits[:, -(longest + 1) : -1].float()
    tokens = ids[:, -longest:]
    values = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(dim=-1)
    # From answers that end together to answers that begin together.
    number = lengths.view(-1, 1)
    places = torch.arange(width, device=ids.device).expand(len(ids), width)
    inside = places < number
    source = torch.where(inside, places + longest - number, 0)
    return torch.where(inside, values.gather(1, source), 0.0)


def _call(model: Any, ids: Tensor, mask: Tensor, prefix: Any, *, keep: int, use_cache: bool = False) -> Any:
    """One forward pass of rows padded on the left, after a prefix that ran, if any."""
    accepted = _parameters(model)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    options: dict[str, Any] = {"attention_mask": mask}
    if prefix is not None:
        positions = positions + prefix.mask.sum(dim=1, keepdim=True)
        options = {"attention_mask": torch.cat([prefix.mask, mask], dim=1), "past_key_values": prefix.cache}
    if "position_ids" in accepted:
        options["position_ids"] = positions
    if "logits_to_keep" in accepted:
        options["logits_to_keep"] = keep
    if "use_cache" in accepted:
        options["use_cache"] = use_cache or prefix is not None
    return model(input_ids=ids, **options)


class _Prefix:
    """The cache of prompts that ran, and their padding."""

    def __init__(self, cache: Any, mask: Tensor) -> None:
        self.cache, self.mask, self.width = cache, mask, mask.shape[1]

    def take(self, rows: list[int]) -> _Prefix:
        """A copy that holds one entry for each of `rows`; what runs on it leaves this one as it is."""
        chosen = torch.tensor(rows, device=self.mask.device)
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        if len(self.mask) > 1:
            cache.batch_select_indices(chosen)
        else:  # one prompt: a view, which the first update copies anyway
            for layer in cache.layers:
                if layer.get_seq_length() > 0:
                    layer.keys, layer.values = (
                        kept.expand(len(rows), -1, -1, -1) for kept in (layer.keys, layer.values)
                    )
        return _Prefix(cache, self.mask[chosen])

    def holds(self, tokens: int) -> bool:
        """Whether nothing that so many more tokens may look at lies outside a layer's window."""
        windows = [layer.sliding_window for layer in self.cache.layers if getattr(layer, "is_sliding", False)]
        # Windows count padding between prompt and chain as text.
        return all(self.width + tokens < window for window in windows)


def _prefill(model: Any, prompts: list[Ids], device: torch.device) -> _Prefix | None:
    """Run the prompts into a cache; None where the model's cache is not one of keys and values alone."""
    from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

    ids, mask = padded(prompts, device)
    outputs = _call(model, ids, mask, None, keep=1, use_cache=True)
    cache = getattr(outputs, "past_key_values", None)
    if not isinstance(cache, Cache) or getattr(cache, "offloading", False):
        return None
    plain = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
    return _Prefix(cache, mask) if plain else None


def _caches(model: Any) -> bool:
    """Whether a cache can be shared: not while activations are checkpointed, nor where positions cannot be told.

    Without positions a model may count the padding between prompt and chain (ALiBi by index).
    """
    modern = hasattr(type(model), "is_activation_checkpointing")  # the old name warns where there is a new one
    name = "is_activation_checkpointing" if modern else "is_gradient_checkpointing"
    checkpointing = getattr(model, name, False) and model.training
    return {"past_key_values", "position_ids"} <= _parameters(model) and not checkpointing


def _parameters(model: Any) -> frozenset[str]:
    """Arguments of the model's own forward pass, below data parallelism and adapters."""
    while isinstance(inner := getattr(model, "module", None), torch.nn.Module):
        model = inner
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    return frozenset(inspect.signature(model.forward).parameters)


def _device(model: Any) -> torch.device:
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


@contextmanager
def _evaluation(model: Any, wanted: bool) -> Iterator[None]:
    """Evaluation mode, and every module's own mode back afterwards."""
    modes = [(module, module.training) for module in model.modules()] if wanted else []
    if wanted:
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def padded(rows: Sequence[Ids], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids (R, T) padded on the left with 0, and int64 mask."""
    lengths = torch.tensor([len(row) for row in rows])
    width = int(lengths.max()) if len(rows) else 0
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.arange(width) >= (width - lengths).view(-1, 1)
    ids[mask] = torch.tensor([token for row in rows for token in row], dtype=torch.int64)
    return ids.to(device), mask.to(device, torch.int64)


def _chunks(items: Sequence[Any], size: Any, limit: int, held: int = 0, extra: int = 0) -> Iterator[list[Any]]:
    """Items of similar size, in pieces whose padded size is within the limit; at least one in each."""
    piece: list[Any] = []
    for item in sorted(items, key=size, reverse=True):
        longest = size(piece[0]) if piece else 0
        full = (len(piece) + 1) * longest > limit or (held and (len(piece) + 1) * (longest + extra) > held)
        if piece and full:
            yield piece
            piece = []
        piece.append(item)
    if piece:
        yield piece


def _nested(ids: Any, mask: Any, name: str, depth: int) -> list[list[list[int]]]:
    """P lists of lists of ids; depth 1: one list a prompt, 2: a group a prompt, 0: either."""
    if isinstance(ids, Tensor):
        if ids.ndim not in (2, 3) or (depth and ids.ndim != depth + 1) or ids.is_floating_point():
            raise InvalidInputError(f"{name} has shape {tuple(ids.shape)} and dtype {ids.dtype}, see the documentation")
        keep = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.to(torch.bool)
        if keep.shape != ids.shape:
            raise InvalidInputError(f"the mask of {name} has shape {tuple(keep.shape)}, ids {tuple(ids.shape)}")
        ids, keep = (ids.unsqueeze(1), keep.unsqueeze(1)) if ids.ndim == 2 else (ids, keep)
        pairs = zip(ids.cpu(), keep.cpu(), strict=True)
        return [[row[kept].tolist() for row, kept in zip(*pair, strict=True)] for pair in pairs]
    if mask is not None:
        raise InvalidInputError(f"a mask goes with a tensor; {name} is {type(ids).__name__}")
    return [[_listed(part) for part in row] if _grouped(row, depth) else [_listed(row)] for row in ids]


def _grouped(row: Any, depth: int) -> bool:
    if depth:
        return depth == 2
    return len(row) > 0 and not isinstance(row, Tensor) and hasattr(row[0], "__len__")


def _listed(row: Any) -> list[int]:
    return row.tolist() if hasattr(row, "tolist") else [int(token) for token in row]


def _check_rows(
    model: Any, prompts: Sequence[Ids], owners: Sequence[int], suffixes: Sequence[Ids], lengths: Sequence[int]
) -> None:
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    size = None if embeddings is None else getattr(embeddings, "num_embeddings", None)
    for row, (owner, suffix, length) in enumerate(zip(owners, suffixes, lengths, strict=True)):
        ids = [*prompts[owner], *suffix]
        problem = ""
        if not 1 <= length <= len(suffix):
            problem = "the answer has no token; an empty reference cannot be scored"
        elif len(ids) == length:
            problem = "nothing stands before the answer, so its first token has no prediction"
        elif min(ids) < 0 or (size is not None and max(ids) >= size):
            worst = min(ids) if min(ids) < 0 else max(ids)
            problem = f"token {worst} is outside the vocabulary{'' if size is None else f' of {size}'}"
        if problem:
            sample = sum(other == owner for other in owners[:row])
            raise InvalidInputError(f"prompt {owner}, sample {sample}: {problem}")
