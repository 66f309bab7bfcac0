"""The contract of a reward model, and how one becomes a reward.

A reward model is fitted to preferences, scores samples, and is saved and loaded like a transformers model. `as_reward`
turns any of them into the reward contract that trainers take.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from polyreward.errors import InvalidInputError


@runtime_checkable
class RewardModel(Protocol):
    """What every reward model offers."""

    def fit(self, preferences: Any, **options: Any) -> RewardModel:
        """Fit to a preference data set and return self."""
        ...

    def score(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Tensor:
        """Scores, float (N,); NaN where the model has no opinion. Higher is better; the scale is the model's own."""
        ...

    def save_pretrained(self, folder: str | Path) -> None:
        """Write weights (safetensors) and configuration to `folder`."""
        ...


@dataclass(frozen=True)
class ModelReward:
    """A reward model under the reward contract, ``reward(prompts, completions, **columns) -> list[float | None]``.

    Parameters
    ----------
    model : RewardModel
    name : str
        Name of the reward in logs.
    """

    model: RewardModel
    name: str = "reward_model"

    @property
    def __name__(self) -> str:
        return self.name

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """Score each sample; None where the model returns NaN.

        Raises
        ------
        InvalidInputError
            The model returned another number of scores than there are samples.
        """
        with torch.no_grad():
            scores = self.model.score(prompts, completions, **columns)
        if scores.shape != (len(completions),):
            raise InvalidInputError(
                f"reward model {self.name!r} returned shape {tuple(scores.shape)} for {len(completions)} samples"
            )
        return [None if value != value else value for value in scores.double().tolist()]


def as_reward(model: RewardModel, name: str = "reward_model") -> ModelReward:
    """Turn a reward model into a reward that TRL's and polyreward's trainers take."""
    return ModelReward(model, name)
