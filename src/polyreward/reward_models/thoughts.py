"""Chains of thought beside responses: how they are given, encoded, and dropped in training.

A response with a given thought is a `Thought`; `with_thoughts` makes them from a column. A `Codec` turns samples and
thoughts into token ids, and `ThoughtEncoder` gives the hidden state of the query token after both as features, so that
the fit that all reward models share trains them.

Paper: Think, then Score: Decoupled Reasoning and Scoring for Video Reward Modeling (DeScore, arXiv 2605.05922).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from polyreward.errors import InvalidInputError, MissingColumnError, nearest
from polyreward.preferences import Column, PreferenceData
from polyreward.reward_models.query_token import PAD, QueryTokenRewardModel, padded
from polyreward.reward_models.rationale_dropout import RationaleDropout
from polyreward.reward_models.texts import plain


class Thought(NamedTuple):
    """A response with the chain of thought to score it after; None scores it without one."""

    response: Any
    thought: Any = None


def with_thoughts(data: PreferenceData, column: str = "thoughts") -> PreferenceData:
    """The same comparisons with each response as a `Thought`, from a column that lists one thought a response.

    Raises
    ------
    MissingColumnError, InvalidInputError
        No such column; an entry that does not list as many thoughts as there are responses, with its row.
    """
    if column not in data.columns:
        raise MissingColumnError(f"{data.source} has no column {column!r}{nearest(column, data.columns)}")
    flat: list[Any] = []
    for index, (entry, size) in enumerate(zip(data.columns[column], data.sizes.tolist(), strict=True)):
        if isinstance(entry, str) or not isinstance(entry, Sequence | np.ndarray) or len(entry) != size:
            raise InvalidInputError(f"{data.where(index)}: {column} must list {size} thoughts, got {entry!r}")
        flat += list(entry)
    responses = [Thought(response, thought) for response, thought in zip(data.responses, flat, strict=True)]
    return replace(data, responses=responses)


class Codec(Protocol):
    """How samples and thoughts become token ids (-1 is padding) and back."""

    def contexts(self, prompts: Sequence[Any], responses: Sequence[Any]) -> Tensor:
        """Ids (N, L) of what is judged."""
        ...

    def thoughts(self, thoughts: Sequence[Any]) -> Tensor:
        """Ids (N, T) of given thoughts; none for None."""
        ...

    def read(self, ids: Tensor) -> list[Any]:
        """What the ids of thoughts say."""
        ...


TEMPLATE = """{prompt}

{response}

Describe how well this answers, aspect by aspect.
"""


@dataclass(frozen=True)
class TextCodec:
    """Texts by a tokenizer of transformers.

    Parameters
    ----------
    tokenizer : tokenizer
    template : str
        What the model reads; ``{prompt}`` and ``{response}`` are filled in, and what is filled in is text.
    chat : bool
        Send it as a message of the user through the tokenizer's chat template.
    """

    tokenizer: Any
    template: str = TEMPLATE
    chat: bool = False

    def contexts(self, prompts: Sequence[Any], responses: Sequence[Any]) -> Tensor:
        """Ids (N, L) of the filled template."""
        texts = [self._filled(p, r, row) for row, (p, r) in enumerate(zip(prompts, responses, strict=True))]
        return padded([self.tokenizer(text, add_special_tokens=not self.chat)["input_ids"] for text in texts])

    def thoughts(self, thoughts: Sequence[Any]) -> Tensor:
        """Ids (N, T); every thought that is given ends with the tokenizer's end of text, where it has one."""
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        return padded(
            [[] if t is None else self.tokenizer(t, add_special_tokens=False)["input_ids"] + end for t in thoughts]
        )

    def read(self, ids: Tensor) -> list[str]:
        """Texts without special tokens."""
        rows = [[token for token in row if token >= 0] for row in ids.tolist()]
        return [str(self.tokenizer.decode(row, skip_special_tokens=True)) for row in rows]

    def _filled(self, prompt: Any, response: Any, row: int) -> str:
        known = {"prompt": plain(prompt, "prompt", row), "response": plain(response, "response", row)}
        parts = self.template.replace("{response}", "{prompt}").split("{prompt}")
        places = sorted(known, key=self.template.find)  # in one pass: what is filled in may hold braces
        text = parts[0] + "".join(known[name] + rest for name, rest in zip(places, parts[1:], strict=True))
        if not self.chat:
            return text
        message = [{"role": "user", "content": text}]
        return str(self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))

    def __post_init__(self) -> None:
        if self.template.count("{prompt}") != 1 or self.template.count("{response}") != 1:
            raise InvalidInputError("the template needs {prompt} and {response}, once each")


class ThoughtEncoder(nn.Module):
    """Hidden states of the query token as features, for the fit that reward models share.

    Parameters
    ----------
    network : QueryTokenRewardModel
    codec : Codec
    dropout : RationaleDropout
        In training only, one draw a comparison.
    """

    identity = "query token after a thought"

    def __init__(self, network: QueryTokenRewardModel, codec: Codec, dropout: RationaleDropout) -> None:
        super().__init__()
        # the head is fitted as the head, so only backbone and query are parts of this module
        self.backbone, self.query = network.backbone, network.query
        self._whole = (network,)
        self.codec, self.dropout = codec, dropout

    @property
    def width(self) -> int:
        """Width d of the features."""
        return int(self._whole[0].head.in_features)

    def forward(self, prompts: Column, responses: Column, comparison: Tensor | None = None) -> Tensor:
        """Features float32 (M, d) with gradient."""
        samples, thoughts = parted(responses)
        device = self.query.device
        cots = self.codec.thoughts([None if t is OWN else t for t in thoughts]).to(device)
        if self.training and comparison is not None and len(comparison):
            if self.dropout.paired:
                keep = self.dropout(int(comparison.max()) + 1, device=device)[comparison]
            else:
                keep = self.dropout((len(cots) + 1) // 2, device=device).flatten()[: len(cots)]
            cots = torch.where(keep.unsqueeze(1), cots, PAD)
        contexts = self.codec.contexts(list(prompts), samples).to(device)
        return self._whole[0].states(contexts, cots).float()

    @torch.no_grad()
    def encode(self, prompts: Column, responses: Column) -> np.ndarray:
        """Features float32 (M, d) as they are now, without dropout."""
        training = self.training
        self.eval()
        try:
            return np.asarray(self(prompts, responses).cpu().numpy(), dtype=np.float32)
        finally:
            self.train(training)


OWN = object()
"""In place of a thought: the model writes its own."""


def parted(responses: Column) -> tuple[list[Any], list[Any]]:
    """Samples and their thoughts."""
    pairs = [(r.response, r.thought) if isinstance(r, Thought) else (r, OWN) for r in responses]
    return [sample for sample, _ in pairs], [thought for _, thought in pairs]
