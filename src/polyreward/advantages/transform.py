"""The contract of an advantage transform, and how transforms combine.

A transform takes a signal and the batch it comes from, and returns a signal: ``transform(signal, batch) -> signal``. A
signal is a float tensor (N, K), one column a reward, or (N,), one number a sample. The first transform of a chain
receives ``batch.rewards``; the last one returns the advantages (N,). Each published recipe is such a chain:

    grpo = chain(WeightedSum(), Center("group"), Scale("group", ddof=1))
    mixture = blend(0.7 * grpo, 0.3 * chain(WeightedSum(), Center("batch")))

Entries that do not apply (NaN in the signal, or NaN in ``batch.rewards``) take part in no statistic and come out as 0,
so no transform returns NaN. A transform never loops over samples or groups in Python, works on the device of the signal
and returns its dtype. Transforms with memory (moving averages) carry it in `state_dict`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polyreward.batch import RewardBatch
from polyreward.errors import InvalidInputError


class Transform:
    """Base of all transforms. Subclasses are frozen dataclasses that define `__call__`."""

    def __call__(self, signal: Tensor, batch: RewardBatch) -> Tensor:
        """Map a signal (N, K) or (N,) to a signal. No NaN comes out."""
        raise TypeError(f"{type(self).__name__} does not define __call__")

    def __mul__(self, factor: float) -> Transform:
        return chain(self, Multiply(float(factor)))

    __rmul__ = __mul__

    def state_dict(self) -> dict[str, Any]:
        """Memory of the transform as plain data; empty for a transform without memory."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        if state:
            raise InvalidInputError(f"{type(self).__name__} has no state, but was given {sorted(state)}")


@dataclass(frozen=True)
class Multiply(Transform):
    """Multiply every entry by `factor`, a finite number."""

    factor: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.factor):
            raise InvalidInputError(f"factor must be a finite number, got {self.factor!r}")

    def __call__(self, signal: Tensor, batch: RewardBatch) -> Tensor:
        """The signal times `factor`, in its shape."""
        values, _ = applicable(signal, batch)
        return values * self.factor


@dataclass(frozen=True)
class Chain(Transform):
    """Apply `parts` one after the other; chains among them are flattened, and no parts pass the signal on."""

    parts: tuple[Transform, ...]

    def __post_init__(self) -> None:
        flat: list[Transform] = []
        for part in _checked(self.parts, "chain"):
            flat.extend(part.parts if isinstance(part, Chain) else (part,))
        object.__setattr__(self, "parts", tuple(flat))

    def __call__(self, signal: Tensor, batch: RewardBatch) -> Tensor:
        """The signal after the last part."""
        if not self.parts:
            return applicable(signal, batch)[0]
        for part in self.parts:
            signal = part(signal, batch)
        return signal

    def state_dict(self) -> dict[str, Any]:
        """Memory of the parts that have one, by their position."""
        return _collect(self.parts)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned; a part without an entry forgets."""
        _distribute(self.parts, state)


@dataclass(frozen=True)
class Blend(Transform):
    """Sum of what each branch makes of the same signal."""

    branches: tuple[Transform, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "branches", _checked(self.branches, "blend"))
        if not self.branches:
            raise InvalidInputError("blend needs at least one transform")

    def __call__(self, signal: Tensor, batch: RewardBatch) -> Tensor:
        """The sum of the branches, all of one shape."""
        first, *others = (branch(signal, batch) for branch in self.branches)
        total = first
        for other in others:
            if other.shape != first.shape:
                shapes = f"{tuple(first.shape)} and {tuple(other.shape)}"
                raise InvalidInputError(f"the branches of a blend returned different shapes: {shapes}")
            total = total + other
        return total

    def state_dict(self) -> dict[str, Any]:
        """Memory of the branches that have one, by their position."""
        return _collect(self.branches)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned; a branch without an entry forgets."""
        _distribute(self.branches, state)


def chain(*parts: Transform) -> Transform:
    """Apply transforms in order; chains inside chains are flattened."""
    return Chain(parts)


def blend(*branches: Transform) -> Transform:
    """Add the results of several transforms of the same signal: ``blend(0.7 * grpo(), 0.3 * rloo())``."""
    return Blend(branches)


def compute_advantages(transform: Transform, batch: RewardBatch) -> Tensor:
    """Run a transform on the rewards of a batch.

    Returns
    -------
    float tensor (N,)
        Finite advantages; 0 for a sample to which no reward applies.

    Raises
    ------
    InvalidInputError
        The transform did not reduce the K rewards to one number a sample, or returned a value that is not finite.
    """
    rewards = batch.rewards
    # parts hand each other the dtype they got: half precision would be rounded between any two of them
    wide = rewards.float() if rewards.dtype in (torch.float16, torch.bfloat16) else rewards
    advantages = transform(wide, batch).to(rewards.dtype)
    if advantages.ndim == 2 and advantages.shape[1] == 1:
        advantages = advantages.squeeze(1)
    if advantages.shape != (len(batch),):
        raise InvalidInputError(
            f"the transform returned shape {tuple(advantages.shape)}, expected ({len(batch)},); "
            "add WeightedSum() to reduce the rewards to one signal"
        )
    if batch.valid is not None:
        advantages = torch.where(batch.valid.any(dim=1), advantages, 0.0)
    if not bool(torch.isfinite(advantages.sum())) and not bool(torch.isfinite(advantages).all()):
        row = int((~torch.isfinite(advantages)).nonzero()[0])
        raise InvalidInputError(f"the transform returned {float(advantages[row])} for row {row}")
    return advantages


def applicable(signal: Tensor, batch: RewardBatch) -> tuple[Tensor, Tensor | None]:
    """Split a signal into values with 0 where it does not apply, and the mask of what applies (None: everything).

    A (N, K) signal follows ``batch.valid``; a signal of another width applies where at least one reward of the sample
    does. NaN in the signal itself does not apply either.

    Raises
    ------
    InvalidInputError
        The signal is not a float tensor of N rows, or holds an infinity.
    """
    if not signal.is_floating_point() or signal.ndim not in (1, 2) or signal.shape[0] != len(batch):
        raise InvalidInputError(
            f"a signal is a float tensor ({len(batch)},) or ({len(batch)}, K), got {signal.dtype} {tuple(signal.shape)}"
        )
    mask = batch.valid
    if mask is not None and signal.shape != mask.shape:
        mask = mask.any(dim=1)
        mask = mask if signal.ndim == 1 else mask.unsqueeze(1).expand_as(signal)
    if not bool(torch.isfinite(signal.sum())):
        infinite = torch.isinf(signal)
        if bool(infinite.any()):
            row = int(infinite.nonzero()[0, 0])
            raise InvalidInputError(f"the signal is {float(signal[row][infinite[row]].reshape(-1)[0])} in row {row}")
        present = ~torch.isnan(signal)
        mask = present if mask is None else mask & present
    if mask is None:
        return signal, None
    return torch.where(mask, signal, 0.0), mask


def _checked(parts: Sequence[Transform], what: str) -> tuple[Transform, ...]:
    for part in parts:
        if not isinstance(part, Transform):
            hint = "; call it first" if callable(part) else ""
            raise InvalidInputError(f"{what} takes transforms, got {getattr(part, '__name__', repr(part))}{hint}")
    return tuple(parts)


def _collect(parts: tuple[Transform, ...]) -> dict[str, Any]:
    states = {str(i): part.state_dict() for i, part in enumerate(parts)}
    return {i: state for i, state in states.items() if state}


def _distribute(parts: tuple[Transform, ...], state: Mapping[str, Any]) -> None:
    unknown = set(state) - {str(i) for i in range(len(parts))}
    if unknown:
        raise InvalidInputError(f"state for parts {sorted(unknown)}, but the chain has {len(parts)} parts")
    before = [part.state_dict() for part in parts]
    try:
        for i, part in enumerate(parts):
            part.load_state_dict(state.get(str(i), {}))
    except InvalidInputError:
        for part, known in zip(parts, before, strict=True):
            part.load_state_dict(known)
        raise
