"""Reward models of transformers as they are published: a sequence classifier that reads prompt and response."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyreward.errors import InvalidInputError
from polyreward.preferences import Column
from polyreward.reward_models.text_encoders import batches_by_length, load, pad, tokenize
from polyreward.reward_models.texts import as_messages, joined


@dataclass(frozen=True, eq=False)
class SequenceClassifier:
    """A fitted ``AutoModelForSequenceClassification`` as a reward model.

    Parameters
    ----------
    model : name on the Hugging Face hub, folder, or a loaded model
    tokenizer : tokenizer, optional
        Default: the one that belongs to `model`; must be given with a loaded model.
    max_length : int
        Tokens; what is longer loses its beginning.
    batch_tokens : int
        Tokens of a batch, padding included.
    device, dtype : where and in what the model computes; scores are float32

    A model of one output scores by it; one of several by the softmax probability of the last class. Where the tokenizer
    has a chat template, prompts and responses go through it as user and assistant, texts too.

    Raises
    ------
    InvalidInputError
        At the first use: the model cannot be loaded, or tokenizer and model do not belong together.
    """

    model: Any
    tokenizer: Any = None
    max_length: int = 8192
    batch_tokens: int = 16_384
    device: str = "cpu"
    dtype: str = "float32"

    def fit(self, preferences: Any, **options: Any) -> SequenceClassifier:
        """Not offered: fit a `PreferenceModel` with a `FineTunedEncoder`, or use TRL's RewardTrainer."""
        raise InvalidInputError(
            "SequenceClassifier scores only; fit PreferenceModel(FineTunedEncoder(model), LinearHead) instead"
        )

    @torch.no_grad()
    def score(self, prompts: Column, completions: Column, **columns: Any) -> Tensor:
        """Scores, float32 (N,), on the CPU; columns take no part."""
        model, tokenizer = self._loaded
        if len(prompts) != len(completions):
            raise InvalidInputError(f"{len(prompts)} prompts and {len(completions)} completions")
        pairs = enumerate(zip(prompts, completions, strict=True))
        tokens = tokenize(
            tokenizer, [self._text(prompt, completion, row) for row, (prompt, completion) in pairs], self.max_length
        )
        scores = torch.zeros(len(tokens))
        for rows in batches_by_length([len(ids) for ids in tokens], self.batch_tokens):
            logits = model(**pad([tokens[i] for i in rows], tokenizer, self.device)).logits.float()
            found = logits.squeeze(-1) if logits.shape[-1] == 1 else logits.softmax(-1)[:, -1]
            scores[torch.from_numpy(rows)] = found.cpu()
        return scores

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model and tokenizer as transformers does."""
        for part in self._loaded:
            part.save_pretrained(folder)

    def _text(self, prompt: Any, completion: Any, row: int) -> str:
        if getattr(self._loaded[1], "chat_template", None):
            return joined(as_messages(prompt, "user"), as_messages(completion, "assistant"), row, self._loaded[1])
        return joined(prompt, completion, row)

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        model, tokenizer = load(self.model, self.tokenizer, "AutoModelForSequenceClassification")
        if model.config.pad_token_id is None:  # decoders look for the last token that is no padding
            model.config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        return model.to(self.device, getattr(torch, self.dtype)).eval().requires_grad_(False), tokenizer
