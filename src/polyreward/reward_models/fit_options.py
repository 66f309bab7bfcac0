"""How a reward model is fitted: `FitOptions`, and what a fit reports on its way: `FitProgress`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from polyreward.errors import InvalidInputError, UnknownNameError, nearest
from polyreward.preferences import PreferenceData


@dataclass(frozen=True)
class FitProgress:
    """Where a fit is: epoch from 1, optimiser steps done and in all, losses so far."""

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    validation: float | None
    seconds: float


@dataclass(frozen=True)
class FitOptions:
    """How to fit.

    Parameters
    ----------
    epochs : int
    batch_size : int
        Comparisons of an optimiser step.
    learning_rate, encoder_learning_rate : float
        Of the head, and of an encoder that learns.
    weight_decay : float
    optimizer : "adamw", or "lbfgs": all data at once, 20 iterations an epoch, for heads that are linear or nearly so
    schedule : "constant" or "cosine"
    warmup : share of the steps over which the rate rises from 0
    clip : largest norm of the gradient, or None
    accumulate : int
        Passes that a batch is divided into, to save memory.
    validation : share of the data, `PreferenceData`, or None
        A share is split off by prompt. Without, all epochs are run and the last weights kept.
    patience : int or None
        Epochs without a better validation loss after which the fit ends; the best weights are kept.
    shuffle_block : int
        Neighbours that stay together when an epoch is shuffled; more read faster from disk.
    seed : int
    device : torch device
    checkpoint : file, optional
        Written after every epoch, and every `checkpoint_steps` steps; a fit that finds it goes on from there, one that
        ends removes it.
    checkpoint_steps : int, optional
    keep_checkpoint : bool
        Leave the checkpoint of a fit that has ended; the next one like it then takes its weights and ends at once.
    accelerator : ``accelerate.Accelerator``, optional
        For several devices, and mixed precision; it then chooses the device.
    progress : function of `FitProgress`, optional
        Called after every optimiser step.
    """

    epochs: int = 10
    batch_size: int = 1024
    learning_rate: float = 1e-3
    encoder_learning_rate: float = 1e-5
    weight_decay: float = 0.01
    optimizer: Literal["adamw", "lbfgs"] = "adamw"
    schedule: Literal["constant", "cosine"] = "constant"
    warmup: float = 0.0
    clip: float | None = 1.0
    accumulate: int = 1
    validation: float | PreferenceData | None = 0.1
    patience: int | None = 3
    shuffle_block: int = 1
    seed: int = 0
    device: str = "cpu"
    checkpoint: str | Path | None = None
    checkpoint_steps: int | None = None
    keep_checkpoint: bool = False
    accelerator: Any = None
    progress: Callable[[FitProgress], None] | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "shuffle_block", "patience", "checkpoint_steps"):
            value = getattr(self, name)
            optional = name in ("patience", "checkpoint_steps")
            if not (value is None and optional) and (not isinstance(value, int) or value < 1):
                raise InvalidInputError(f"{name} must be a whole number of at least 1, got {value!r}")
        for name in ("learning_rate", "encoder_learning_rate", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InvalidInputError(f"{name} must be a finite number from 0, got {getattr(self, name)!r}")
        for name, known in (("optimizer", ("adamw", "lbfgs")), ("schedule", ("constant", "cosine"))):
            if getattr(self, name) not in known:
                raise UnknownNameError(
                    f"unknown {name} {getattr(self, name)!r}{nearest(str(getattr(self, name)), known)}"
                )
        if not 0 <= self.warmup < 1:
            raise InvalidInputError(f"warmup is a share of the steps in [0, 1), got {self.warmup}")

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> FitOptions:
        """From keyword arguments; `UnknownNameError` offers the nearest known one."""
        known = [item.name for item in fields(cls)]
        for name in options:
            if name not in known:
                raise UnknownNameError(f"unknown option of a fit {name!r}{nearest(name, known)}")
        return cls(**options)
