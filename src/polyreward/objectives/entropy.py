"""Entropy terms of a policy loss: a bonus, and a hinge that keeps the entropy of each task inside a band.

The hinge of a task with mean token entropy H is ``relu(H - high) + relu(low - H)``: zero inside the band, a pull back
from either side. Without an exact entropy the sampled-token estimate ``-log pi(token)`` stands in, as in the paper.

Papers: OpenVLThinkerV2 (arXiv 2604.08539) for the hinge.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from polyreward.errors import InvalidInputError
from polyreward.grouped import Segments


@dataclass(frozen=True)
class EntropyBonus:
    """Subtract ``weight`` times the mean token entropy from the loss. Needs the exact entropy of each token."""

    weight: float = 0.001

    def __post_init__(self) -> None:
        _check_weight(self.weight)

    def __call__(self, entropy: Tensor, mask: Tensor) -> Tensor:
        """Term of the loss: scalar from entropy (N, T), finite where `mask` (N, T) is true."""
        mask = mask.to(torch.bool)
        return -self.weight * torch.where(mask, entropy, 0.0).sum() / mask.sum().clamp(min=1)


@dataclass(frozen=True)
class EntropyHinge:
    """Keep each task's mean token entropy between `low` and `high`.

    Parameters
    ----------
    low, high : float, 0 <= low <= high, in nats
        H_min and H_max in the paper.
    weight : float >= 0
        lambda in the paper: 0.02, with 0.05 and 0.1 tried.
    by_task : mapping of task to (low, high), or None
        Bands of single tasks; other tasks use `low` and `high`.

    Paper: OpenVLThinkerV2 (arXiv 2604.08539), equation 10. A task without tokens in the batch has no term.
    """

    low: float = 0.2
    high: float = 0.6
    weight: float = 0.02
    by_task: Mapping[str, tuple[float, float]] | None = None

    def __post_init__(self) -> None:
        _check_weight(self.weight)
        if self.by_task is not None:
            object.__setattr__(self, "by_task", {str(task): tuple(band) for task, band in self.by_task.items()})
        for task, band in {"every task": (self.low, self.high), **(self.by_task or {})}.items():
            if len(band) != 2 or not 0 <= band[0] <= band[1]:
                raise InvalidInputError(f"the entropy band of {task} needs (low, high), 0 <= low <= high, got {band}")

    def __call__(self, entropy: Tensor, mask: Tensor, tasks: Segments) -> Tensor:
        """Term of the loss, a scalar: entropy (N, T), finite where `mask` (N, T) is true, and the task of each row."""
        mean, present = task_entropy(entropy, mask, tasks)
        bands = [self._band(tasks.label(code)) for code in range(tasks.count)]
        low, high = mean.new_tensor(bands).reshape(-1, 2).unbind(1)
        excess = (mean - high).relu() + (low - mean).relu()
        return self.weight * (excess * present).sum().to(entropy.dtype)

    def _band(self, task: object) -> tuple[float, float]:
        return (self.by_task or {}).get(str(task), (self.low, self.high))


def task_entropy(entropy: Tensor, mask: Tensor, tasks: Segments) -> tuple[Tensor, Tensor]:
    """Mean entropy over all tokens of each task, float64 (tasks,), and which tasks have tokens, bool (tasks,)."""
    mask = mask.to(torch.bool)
    tokens = tasks.sum(mask.sum(dim=1))
    total = tasks.sum(torch.where(mask, entropy, 0.0).sum(dim=1))
    return total / tokens.clamp(min=1), tokens > 0


def _check_weight(weight: float) -> None:
    if not 0 <= weight < math.inf:
        raise InvalidInputError(f"the weight of an entropy term must be finite and >= 0, got {weight}")
