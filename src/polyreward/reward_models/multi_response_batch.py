"""Several responses to one prompt in one token sequence, and where each of them begins and ends (arXiv 2604.10966).

    prompt  y_1 SEP y_2 SEP ... SEP y_N

SEP is one registered token. The end of a response is the token before the next separator, or the last of the sequence;
boundaries are found by searching the separator in the token numbers. The order of the responses is drawn anew for every
training sample, and labels and ranks follow it: later responses see earlier ones, so a fixed order would be learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from polyreward.errors import InvalidInputError

SEPARATOR = "<|resp_sep|>"
PADDING = -1

Sample = tuple[Sequence[int], Sequence[Sequence[int]], Sequence[float] | None]


@dataclass(frozen=True)
class MultiResponseCollator:
    """A batch of samples ``(prompt_ids, [response_ids, ...], ranks)``.

    Responses without a token are dropped with their ranks. A sample of several responses whose ranks are all equal has
    no best one and is skipped and counted; a single response stays (its loss is 0).

    Parameters
    ----------
    sep_token_id : int
        The separator.
    shuffle : bool
        Draw the order of the responses of each sample.
    pad_token_id : int
        Right padding of the sequences.
    max_length : int, optional
        Longest sequence. A cut one would lose responses and their ends.
    too_long : "raise" or "drop"
        What to do with a longer one; dropped ones are counted.
    injection : "raise" or "strip"
        What to do with a prompt or response that contains the separator.
    generator : torch.Generator, optional
        Draws orders, and the label among several best ones; default torch's own.

    Calling it gives a dict of

    * ``input_ids``, ``attention_mask`` int64 (B, T);
    * ``start_indices``, ``end_indices`` int64 (B, R): first and last token of what is in each place, -1 is padding;
    * ``labels`` int64 (B,): place of the best (lowest rank; drawn among equals), -1 without ranks;
    * ``ranks`` float32 (B, R) by place, NaN is padding or unknown;
    * ``permutation`` int64 (B, R): number, in the sample, of the response in each place, -1 is padding;
    * ``kept`` int64 (B,): which samples these are; ``skipped`` and ``dropped`` int64 (): how many had equal ranks
      only, and how many were too long.

    Raises
    ------
    InvalidInputError
        No sample; a sample without responses, or with empty ones only; ranks of another length or not finite; a
        separator in a text; a sequence that is too long; a batch of which no sample is left.
    """

    sep_token_id: int
    shuffle: bool = True
    pad_token_id: int = 0
    max_length: int | None = None
    too_long: Literal["raise", "drop"] = "raise"
    injection: Literal["raise", "strip"] = "raise"
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if self.too_long not in ("raise", "drop") or self.injection not in ("raise", "strip"):
            raise InvalidInputError(
                f"too_long must be 'raise' or 'drop' and injection 'raise' or 'strip', got {self.too_long!r} and "
                f"{self.injection!r}"
            )

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Tokens, places and labels; see the class."""
        if not len(samples):
            raise InvalidInputError("MultiResponseCollator got no samples")
        ready, skipped, dropped = [], 0, 0
        for number, sample in enumerate(samples):
            prompt, responses, ranks, places = self._read(sample, number)
            if ranks is not None and len(ranks) > 1 and (ranks == ranks[0]).all():
                skipped += 1
                continue
            length = len(prompt) + sum(map(len, responses)) + len(responses) - 1
            if self.max_length is not None and length > self.max_length:
                if self.too_long == "raise":
                    raise InvalidInputError(
                        f"sample {number} has {length} tokens, at most {self.max_length} fit; cutting would lose "
                        "responses: shorten the prompt, raise max_length or pass too_long='drop'"
                    )
                dropped += 1
                continue
            order = self._order(len(responses))
            ranks = None if ranks is None else ranks[order]
            ready.append((number, prompt, [responses[i] for i in order], ranks, places[order]))
        if not ready:
            raise InvalidInputError(
                f"none of the {len(samples)} samples is left: in {skipped} all ranks are equal, {dropped} are too long"
            )
        batch = assemble([s[1] for s in ready], [s[2] for s in ready], self.sep_token_id, self.pad_token_id)
        width = batch["end_indices"].shape[1]
        ranked = np.full((len(ready), width), np.nan, np.float32)
        permutation = np.full((len(ready), width), PADDING, np.int64)
        for row, (_, _, responses, ranks, places) in enumerate(ready):
            permutation[row, : len(responses)] = places
            if ranks is not None:
                ranked[row, : len(responses)] = ranks
        return batch | {
            "labels": self._labels(torch.from_numpy(ranked)),
            "ranks": torch.from_numpy(ranked),
            "permutation": torch.from_numpy(permutation),
            "kept": torch.tensor([s[0] for s in ready]),
            "skipped": torch.tensor(skipped),
            "dropped": torch.tensor(dropped),
        }

    def _read(self, sample: Any, number: int) -> tuple[list[int], list[list[int]], np.ndarray | None, np.ndarray]:
        try:
            prompt, given, ranks = sample
        except (TypeError, ValueError) as error:
            raise InvalidInputError(f"sample {number} is no (prompt_ids, response_ids, ranks)") from error
        prompt = self._clean(prompt, f"sample {number}, prompt")
        cleaned = [self._clean(ids, f"sample {number}, response {i}") for i, ids in enumerate(given)]
        places = np.array([i for i, ids in enumerate(cleaned) if ids], np.int64)
        if not len(places):
            raise InvalidInputError(f"sample {number} has {'only empty' if len(cleaned) else 'no'} responses")
        if ranks is None:
            return prompt, [cleaned[i] for i in places], None, places
        values = np.asarray(ranks, np.float32)
        if values.shape != (len(cleaned),) or not np.isfinite(values).all():
            raise InvalidInputError(
                f"sample {number} has ranks {values.tolist()}, expected a finite number for each of its "
                f"{len(cleaned)} responses"
            )
        return prompt, [cleaned[i] for i in places], values[places], places

    def _clean(self, ids: Any, where: str) -> list[int]:
        numbers = np.asarray(ids, np.int64)
        if numbers.ndim != 1:
            raise InvalidInputError(f"{where}: token numbers must be one row, got shape {numbers.shape}")
        hit = numbers == self.sep_token_id
        if hit.any() and self.injection == "raise":
            raise InvalidInputError(
                f"{where}: token {int(hit.argmax())} is the separator ({self.sep_token_id}), which would begin another "
                "response; remove it or pass injection='strip'"
            )
        return [int(token) for token in numbers[~hit]]

    def _order(self, count: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(count)
        return np.asarray(torch.randperm(count, generator=self.generator).numpy())

    def _labels(self, ranks: Tensor) -> Tensor:
        """Place of the lowest rank of each row, drawn among equals; -1 where nothing is ranked."""
        known = torch.nan_to_num(ranks, nan=torch.inf)
        best = (known == known.amin(dim=1, keepdim=True)) & ~torch.isnan(ranks)
        draw = torch.rand(ranks.shape, generator=self.generator)
        return torch.where(best.any(dim=1), torch.where(best, draw, -1.0).argmax(dim=1), PADDING)


def assemble(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[Sequence[int]]],
    sep_token_id: int,
    pad_token_id: int = 0,
) -> dict[str, Tensor]:
    """Sequences of prompts and all their responses, padded on the right, with the places of the responses.

    Parameters
    ----------
    prompts : B lists of token numbers
    responses : B lists of lists of token numbers

    Returns
    -------
    dict of ``input_ids``, ``attention_mask`` (B, T) and ``start_indices``, ``end_indices`` (B, R), all int64
    """
    rows = []
    for prompt, several in zip(prompts, responses, strict=True):
        row = list(prompt)
        for place, ids in enumerate(several):
            row += ([sep_token_id] if place else []) + list(ids)
        rows.append(row)
    lengths = np.array([len(row) for row in rows], np.int64)
    mask = np.arange(lengths.max())[None] < lengths[:, None]
    tokens = np.full(mask.shape, pad_token_id, np.int64)
    tokens[mask] = np.concatenate([np.asarray(row, np.int64) for row in rows])
    numbers, attention = torch.from_numpy(tokens), torch.from_numpy(mask.astype(np.int64))
    start, end = response_boundaries(
        numbers, attention, sep_token_id, [len(prompt) for prompt in prompts], [len(several) for several in responses]
    )
    return {"input_ids": numbers, "attention_mask": attention, "start_indices": start, "end_indices": end}


def response_boundaries(
    input_ids: Tensor,
    attention_mask: Tensor,
    sep_token_id: int,
    prompt_lengths: Sequence[int] | Tensor,
    counts: Sequence[int] | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """First and last token of every response, by the separators after the prompt.

    A response without a token begins and ends at the token before it.

    Parameters
    ----------
    input_ids, attention_mask : int64 (B, T), padded on the right
    prompt_lengths : int (B,)
    counts : int (B,), optional
        How many responses there must be.

    Returns
    -------
    start, end : int64 (B, R)
        R the largest number of responses; -1 where a sequence has fewer.

    Raises
    ------
    InvalidInputError
        A sequence with another number of separators than `counts` says, as after truncation or injection.
    """
    device = input_ids.device
    prompt = torch.as_tensor(prompt_lengths, device=device).long()
    place = torch.arange(input_ids.shape[1], device=device)
    part = attention_mask.bool()
    cut = (input_ids == sep_token_id) & part & (place >= prompt.unsqueeze(1))
    found = cut.sum(dim=1) + 1
    if counts is not None:
        expected = torch.as_tensor(counts, device=device).long()
        wrong = found != expected
        if bool(wrong.any()):
            first = int(wrong.int().argmax())
            raise InvalidInputError(
                f"sequence {first} has {int(found[first]) - 1} separators after its prompt, expected "
                f"{int(expected[first]) - 1}: it was cut, or a response contains the separator"
            )
    width = int(found.max()) if len(found) else 0
    end = torch.full((len(input_ids), width), PADDING, device=device)
    start = end.clone()
    row, at = torch.nonzero(cut).unbind(1)
    slot = (cut.cumsum(dim=1) - 1)[row, at]
    end[row, slot], start[row, slot + 1] = at - 1, at + 1
    every = torch.arange(len(input_ids), device=device)
    end[every, found - 1] = part.sum(dim=1) - 1
    start[:, :1] = prompt.unsqueeze(1)[:, :width]
    return torch.minimum(start, end), end


def strip_separator(text: str, *tokens: str) -> str:
    """A text without the separator (and other control tokens), also where removing one would make another."""
    tokens = tokens or (SEPARATOR,)
    before = None
    while before != text:
        before = text
        for token in tokens:
            text = text.replace(token, "")
    return text


def add_separator(tokenizer: Any, model: Any = None, token: str = SEPARATOR) -> int:
    """Register the separator as one token, give the model a row for it where it lacks one, and return its number."""
    added: Any = token
    try:
        from tokenizers import AddedToken

        added = AddedToken(token, special=True, normalized=False)
    except ImportError:  # a tokenizer that is not of the tokenizers library takes the text
        pass
    tokenizer.add_tokens([added], special_tokens=True)
    number = int(tokenizer.convert_tokens_to_ids(token))
    if model is not None and len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    return number
