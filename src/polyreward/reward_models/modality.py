"""One reward model for prompts of text and one for prompts with images, as one (BaseReward, arXiv 2509.16127).

The paper finds that a pure language model is the better judge of text at equal data, and that data of text help a
multimodal judge: so the multimodal model learns from everything, the text model from what has no images, and each
judges its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyreward.errors import InvalidInputError
from polyreward.preferences import Column, PreferenceData
from polyreward.reward_models.contract import ModelReward, as_reward
from polyreward.storage import write_json


def holds_images(prompts: Column) -> np.ndarray:
    """Which prompts have a part that is no text (image, video or sound), bool (N,)."""
    return np.array([_has_media(prompt) for prompt in prompts], bool)


class ModalityRouter:
    """A reward model that asks one of two, by what the prompt holds.

    Scores of texts and of images are each on their model's own scale; the responses to one prompt are always scored by
    the same model.

    Parameters
    ----------
    text_rm, multimodal_rm : reward models
        For `fit` and `save_pretrained`, models that have them.
    """

    def __init__(self, text_rm: Any, multimodal_rm: Any) -> None:
        self.text_rm, self.multimodal_rm = text_rm, multimodal_rm

    def fit(self, preferences: PreferenceData, **options: Any) -> ModalityRouter:
        """Fit the multimodal model to all comparisons and the text model to those without images; return self.

        Raises
        ------
        InvalidInputError
            There are no comparisons without images.
        """
        texts = ~holds_images(preferences.prompts)
        if not texts.any():
            raise InvalidInputError(f"{preferences.source} has no prompts without images for the text model")
        self.multimodal_rm.fit(preferences, **options)
        self.text_rm.fit(preferences if texts.all() else preferences.select(texts), **options)
        return self

    def score(self, prompts: Column, completions: Column, **columns: Any) -> Tensor:
        """Scores, float (N,); `columns` of length N follow their rows."""
        if len(prompts) != len(completions):
            raise InvalidInputError(f"{len(prompts)} prompts and {len(completions)} completions")
        images = holds_images(prompts)
        scores = torch.full((len(prompts),), torch.nan)
        for model, rows in ((self.text_rm, np.flatnonzero(~images)), (self.multimodal_rm, np.flatnonzero(images))):
            if not len(rows):
                continue
            score = getattr(model, "score", model)
            chosen = {name: _rows(values, rows, len(prompts)) for name, values in columns.items()}
            found = torch.as_tensor(score(_rows(prompts, rows), _rows(completions, rows), **chosen))
            if found.shape != (len(rows),):
                raise InvalidInputError(
                    f"{type(model).__name__} returned shape {tuple(found.shape)} for {len(rows)} completions"
                )
            scores[torch.from_numpy(rows)] = found.detach().cpu().to(scores.dtype)
        return scores

    def as_reward(self, name: str = "reward_model") -> ModelReward:
        """As a reward of TRL's and polyreward's trainers."""
        return as_reward(self, name)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write both models to folders of their own, and ``config.json``."""
        folder = Path(folder)
        self.text_rm.save_pretrained(folder / "text")
        self.multimodal_rm.save_pretrained(folder / "multimodal")
        write_json(folder / "config.json", {"format": 1, "model": "polyreward.reward_models.modality:ModalityRouter"})

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        text: Mapping[str, Any] | None = None,
        multimodal: Mapping[str, Any] | None = None,
    ) -> ModalityRouter:
        """Read both models back; `text` and `multimodal` are options of `load_reward_model` for each."""
        from polyreward.reward_models.parts import load_reward_model
        from polyreward.reward_models.saving import read_config

        folder = Path(folder)
        read_config(folder)
        return cls(
            load_reward_model(folder / "text", **(text or {})),
            load_reward_model(folder / "multimodal", **(multimodal or {})),
        )


def _has_media(prompt: Any) -> bool:
    if isinstance(prompt, str) or not isinstance(prompt, Sequence):
        return False
    return any(
        isinstance(part, Mapping) and part.get("type") not in (None, "text")
        for message in prompt
        if isinstance(message, Mapping) and not isinstance(message.get("content"), str)
        for part in message.get("content") or ()
    )


def _rows(values: Any, rows: np.ndarray, length: int | None = None) -> Any:
    if length is not None and (isinstance(values, str) or not hasattr(values, "__len__") or len(values) != length):
        return values
    return values[rows] if isinstance(values, np.ndarray) else [values[i] for i in rows.tolist()]
