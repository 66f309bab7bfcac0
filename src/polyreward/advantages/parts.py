"""The parts that most recipes are made of: weighted sum, centring, leave-one-out, scaling, whitening.

`by` names the rows that share a statistic: ``"group"`` (same prompt), ``"batch"`` (all rows), a column such as
``"task"``, or several keys crossed, ``("group", "stratum")``. On a (N, K) signal every reward has its own statistics.
Statistics are float64; entries that do not apply (NaN) take part in none and come out as 0.

`singleton` says what a row gets that shares its statistic with no other row: ``"zero"``, its value minus itself, or
``"raw"``, as in verl: the mean of such a segment counts as 0 and its deviation as 1, so the value passes uncentred.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polyreward.advantages.normal import By, Singleton, centred, check_arguments, divisor_of, per_column, standardized
from polyreward.advantages.transform import Transform, applicable
from polyreward.batch import RewardBatch
from polyreward.errors import InvalidInputError, MissingColumnError, nearest


@dataclass(frozen=True)
class WeightedSum(Transform):
    """Reduce (N, K) to (N,): sum of the rewards that apply, each times its weight.

    Parameters
    ----------
    weights : mapping of reward name to weight, or K numbers, or None
        Default 1 for each. A mapping must name every reward of the batch; a reward leaves the sum by weight 0.

    Raises
    ------
    MissingColumnError, InvalidInputError
        The weights name a reward that the batch lacks, or do not cover its K rewards.
    """

    weights: Mapping[str, float] | Sequence[float] | None = None

    def __post_init__(self) -> None:
        weights = self.weights
        if isinstance(weights, Mapping):
            object.__setattr__(self, "weights", {str(name): float(weight) for name, weight in weights.items()})
        elif weights is not None:
            object.__setattr__(self, "weights", tuple(float(weight) for weight in weights))

    def __call__(self, signal: Tensor, batch: RewardBatch) -> Tensor:
        if signal.ndim == 1:
            signal = signal.unsqueeze(1)
        values, _ = applicable(signal, batch)
        weights = self._resolve(batch, signal.shape[1])
        if weights is None:
            return values.squeeze(1) if values.shape[1] == 1 else values.sum(dim=1)
        wide = torch.promote_types(values.dtype, torch.float32)
        return (values.to(wide) @ torch.tensor(weights, dtype=wide, device=values.device)).to(values.dtype)

    def _resolve(self, batch: RewardBatch, width: int) -> list[float] | None:
        if self.weights is None:
            return None
        if isinstance(self.weights, Mapping):
            for name in self.weights:
                if name not in batch.names:
                    raise MissingColumnError(f"a weight names reward {name!r}{nearest(name, batch.names)}")
            absent = [name for name in batch.names if name not in self.weights]
            if absent:
                raise InvalidInputError(f"no weight for reward {absent[0]!r}; use 0 to leave it out")
            return [float(self.weights[name]) for name in batch.names]
        if len(self.weights) != width:
            raise InvalidInputError(f"{len(self.weights)} weights for {width} rewards {batch.names}")
        return [float(weight) for weight in self.weights]


@dataclass(frozen=True)
class Center(Transform):
    """Subtract the mean of the rows that share `by`.

    Parameters
    ----------
    by : keys of the rows that share a mean
    singleton : "zero" or "raw"
        What a row without another one to compare with gets.
    """

    by: By = "group"
    singleton: Singleton = "zero"

    def __post_init__(self) -> None:
        check_arguments(self)

    def __call__(self, signal: Tensor, batch: RewardBatch) -> Tensor:
        values, mask = applicable(signal, batch)
        return centred(values, mask, batch.segments(self.by), self.singleton).to(signal.dtype)


@dataclass(frozen=True)
class LeaveOneOut(Transform):
    """Subtract the mean of the *other* rows that share `by`: ``(r - mean) * n / (n - 1)`` with n rows.

    Parameters
    ----------
    by : keys of the rows that are compared
    singleton : "zero" or "raw"
        What a row without another one to compare with gets.
    """

    by: By = "group"
    singleton: Singleton = "zero"

    def __post_init__(self) -> None:
        check_arguments(self)

    def __call__(self, signal: Tensor, batch: RewardBatch) -> Tensor:
        values, mask = applicable(signal, batch)
        segments = batch.segments(self.by)
        number = segments.number(mask)
        factor = segments.spread(number / (number - 1).clamp(min=1))
        deviation = centred(values, mask, segments, self.singleton)
        return (deviation * (factor.unsqueeze(1) if factor.ndim < deviation.ndim else factor)).to(signal.dtype)


@dataclass(frozen=True)
class Scale(Transform):
    """Divide by ``deviation + epsilon`` of the rows that share `by`; the signal is not centred.

    Parameters
    ----------
    by : keys of the rows that share a deviation
    epsilon : float >= 0
        Added to the deviation. 1e-6 in verl, 1e-4 in TRL, 1e-8 in some releases.
    ddof : 0 or 1
        0: population deviation, 1: sample deviation.

    Where the deviation is exactly 0 the values are divided by 1 instead: after centring they are 0 and stay exactly 0.
    """

    by: By = "group"
    epsilon: float = 1e-6
    ddof: int = 1

    def __post_init__(self) -> None:
        check_arguments(self)

    def __call__(self, signal: Tensor, batch: RewardBatch) -> Tensor:
        values, mask = applicable(signal, batch)
        segments = batch.segments(self.by)
        divisor = divisor_of(segments.deviation(values, mask, self.ddof), self.epsilon)
        return (values / segments.spread(divisor)).to(signal.dtype)


@dataclass(frozen=True)
class Standardize(Transform):
    """Subtract the mean and divide by ``deviation + epsilon``: `Center` and `Scale` in one pass over the rows.

    Parameters
    ----------
    by : keys of the rows that share a mean
    scale_by : keys of the rows that share a deviation, or None for `by`
        The deviation is that of the incoming signal, not of the centred one.
    epsilon : float >= 0
        Added to the deviation. Where the deviation is exactly 0 the divisor is 1.
    ddof : 0 or 1
        0: population deviation, 1: sample deviation.
    singleton : "zero" or "raw"
        What a row without another one to compare with gets.
    """

    by: By = "group"
    scale_by: By | None = None
    epsilon: float = 1e-6
    ddof: int = 1
    singleton: Singleton = "zero"

    def __post_init__(self) -> None:
        check_arguments(self)

    def __call__(self, signal: Tensor, batch: RewardBatch) -> Tensor:
        values, mask = applicable(signal, batch)
        segments = batch.segments(self.by)
        deviations = centred(values, mask, segments, self.singleton)
        if self.scale_by is None or self.scale_by == self.by:
            return standardized(deviations, mask, segments, self.epsilon, self.ddof, self.singleton).to(signal.dtype)
        scale = batch.segments(self.scale_by)
        divisor = divisor_of(scale.deviation(values, mask, self.ddof), self.epsilon)
        return (deviations / scale.spread(divisor)).to(signal.dtype)


@dataclass(frozen=True)
class Whiten(Transform):
    """Subtract a weighted mean and divide by ``sqrt(variance + epsilon)`` of the rows that share `by`.

    With ``weight="length"`` a row counts once for each of its tokens, which is what whitening the (N, T) matrix of
    token advantages does (verl's ``masked_whiten``).

    Parameters
    ----------
    by : keys of the rows that share mean and variance
    weight : name of a numeric column >= 0, or None for weight 1 each
    epsilon : float >= 0
        Added to the variance, inside the root.
    ddof : 0 or 1
        1 multiplies the variance by ``W / (W - 1)``, with W the sum of the weights.

    Where the variance is exactly 0 the values become 0. A row of weight 0 takes no part in the statistics.

    Raises
    ------
    InvalidInputError
        The weights are not numbers, negative or not finite.
    MissingColumnError
        The batch has no such column.
    """

    by: By = "batch"
    weight: str | None = None
    epsilon: float = 1e-8
    ddof: int = 1

    def __post_init__(self) -> None:
        check_arguments(self)

    def __call__(self, signal: Tensor, batch: RewardBatch) -> Tensor:
        values, mask = applicable(signal, batch)
        segments = batch.segments(self.by)
        if self.weight is None:
            deviations = centred(values, mask, segments)
            total, number = segments.sum(deviations.square()), segments.number(mask)
        else:
            weights = _row_weights(batch, self.weight, values.ndim)
            weights = weights if mask is None else weights * mask
            number = segments.sum(weights)
            mean = segments.sum(weights * values) / torch.where(number > 0, per_column(number, values), 1.0)
            deviations = values - segments.spread(mean)
            deviations = deviations if mask is None else deviations * mask
            total = segments.sum(weights * deviations.square())
        number = per_column(number, total)
        variance = torch.where(number > self.ddof, total / torch.where(number > self.ddof, number - self.ddof, 1.0), 0.0)
        divisor = torch.where(variance > 0, (variance + self.epsilon).sqrt(), torch.inf)
        return (deviations / segments.spread(divisor)).to(signal.dtype)


def _row_weights(batch: RewardBatch, name: str, ndim: int) -> Tensor:
    column = batch.column(name)
    if not isinstance(column, Tensor) or column.ndim != 1:
        raise InvalidInputError(f"column {name!r} must hold one number a row to weight by")
    weights = column.to(torch.float64)
    if not bool((torch.isfinite(weights) & (weights >= 0)).all()):
        row = int((~(torch.isfinite(weights) & (weights >= 0))).nonzero()[0])
        raise InvalidInputError(f"column {name!r} is {float(weights[row])} in row {row}; a weight is finite and >= 0")
    return weights.unsqueeze(1) if ndim == 2 else weights
