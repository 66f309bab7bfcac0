"""Sampling trajectories in which tools answer while the policy writes.

All trajectories of a batch advance together, one token a step, over one key-value cache. A trajectory that has just
completed a tool call receives the tokens of the result in the following steps in place of sampled ones, so that a call
costs no second prefill and trajectories with any number of calls share a batch. Tokens of results are marked 0 in the
mask: they are context, not actions, and take no part in the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polyreward.tasks.tools import ToolBox


@dataclass(frozen=True)
class Trajectories:
    """Sampled completions of N prompts.

    Attributes
    ----------
    completion_ids : N lists of token ids, the end token included where the policy wrote it
    masks : N lists of 0 (written by a tool) and 1 (written by the policy), of the same lengths
    calls : N numbers of answered tool calls
    """

    completion_ids: list[list[int]]
    masks: list[list[int]]
    calls: list[int]


@torch.no_grad()
def sample_trajectories(
    model: Any,
    tokenizer: Any,
    prompt_ids: Sequence[Sequence[int]],
    tools: ToolBox,
    *,
    max_tokens: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Trajectories:
    """Complete the prompts.

    Parameters
    ----------
    model : causal language model with a key-value cache
    prompt_ids : N token lists
    max_tokens : most tokens of a completion, tool results included
    temperature : 0 takes the most likely token
    generator : on the device of the model; default torch's global one
    """
    device = next(model.parameters()).device
    count, width = len(prompt_ids), max(len(ids) for ids in prompt_ids)
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompt_ids], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompt_ids], device=device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    ends = _end_ids(model, tokenizer)
    closing = _closing_ids(tokenizer)
    pending: list[list[int]] = [[] for _ in range(count)]
    written: list[list[int]] = [[] for _ in range(count)]
    masks: list[list[int]] = [[] for _ in range(count)]
    calls, read, alive = [0] * count, [0] * count, set(range(count))
    cache = None
    for _ in range(max_tokens):
        output = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        cache = output.past_key_values
        chosen = _choose(output.logits[:, -1], temperature, generator).tolist()
        for row in sorted(alive):
            given = bool(pending[row])
            token = pending[row].pop(0) if given else chosen[row]
            chosen[row] = token
            written[row].append(token)
            masks[row].append(0 if given else 1)
            if given:
                read[row] = len(written[row])
            elif token in ends:
                alive.discard(row)
            elif token in closing:
                result = tools.respond(tokenizer.decode(written[row][read[row] :]))
                if result is not None:
                    calls[row] += 1
                    pending[row] = tokenizer.encode(result, add_special_tokens=False)
        if not alive:
            break
        ids = torch.tensor([[t if row in alive else pad] for row, t in enumerate(chosen)], device=device)
        mask = torch.cat([mask, mask.new_ones(count, 1)], dim=1)
        positions = positions[:, -1:] + 1
    return Trajectories(written, masks, calls)


def prompt_tokens(tokenizer: Any, prompts: Sequence[Any]) -> list[list[int]]:
    """Token ids of prompts: texts as they are, chat messages through the tokenizer's template."""
    return [
        tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=False)
        if isinstance(prompt, list)
        else tokenizer(prompt, add_special_tokens=True)["input_ids"]
        for prompt in prompts
    ]


def _choose(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    if temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = torch.softmax(logits.float() / temperature, dim=-1)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)


def _end_ids(model: Any, tokenizer: Any) -> set[int]:
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    several = configured if isinstance(configured, list) else [configured]
    return {token for token in (*several, tokenizer.eos_token_id) if token is not None}


def _closing_ids(tokenizer: Any) -> set[int]:
    """Tokens that can complete a call: those whose text ends with ``>``."""
    known = getattr(tokenizer, "_polyreward_closing", None)
    if known is None:
        known = {i for token, i in tokenizer.get_vocab().items() if token.rstrip().endswith(">")}
        tokenizer._polyreward_closing = known
    return known
