"""The parts that most recipes are made of: weighted sum, centring, leave-one-out, scaling, whitening.

`by` names the rows that share a statistic: ``"group"`` (same prompt), ``"batch"`` (all rows), a column such as
``"task"``, or several keys crossed, ``("group", "stratum")``. On a (N, K) signal every reward has its own statistics.
Statistics are float64; entries that do not apply (NaN) take part in none and come out as 0.

`singleton` says what a row gets that shares its statistic with no other row: ``"zero"``, its value minus itself, or
``"raw"``, as in verl: the mean of such a segment counts as 0 and its deviation as 1, so the value passes uncentred.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polyreward.advantages.normal import By, Singleton, centred, check_arguments, check_keys, divisor_of, standardized
from polyreward.advantages.transform import Transform, applicable
from polyreward.batch import RewardBatch
from polyreward.errors import InvalidInputError, MissingColumnError, nearest
from polyreward.grouped import per_column


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
            object.__setattr__(self, "weights", {str(name): _number(weight) for name, weight in weights.items()})
        elif weights is not None:
            if isinstance(weights, str) or not isinstance(weights, Iterable):
                raise InvalidInputError(f"weights must be a mapping by name or K numbers, got {weights!r}")
            object.__setattr__(self, "weights", tuple(_number(weight) for weight in weights))

    def __call__(self, signal: Tensor, batch: RewardBatch) -> Tensor:
        """(N, K) or (N,) -> (N,)."""
        values, _ = applicable(signal if signal.ndim == 2 else signal.unsqueeze(1), batch)
        wide = values.to(torch.promote_types(values.dtype, torch.float32))
        weights = self._resolve(batch, values.shape[1])
        # Column by column: rows with equal rewards get equal sums to the bit, which a matrix product does not promise.
        terms = [c if w == 1 else c * w for c, w in zip(wide.unbind(1), weights, strict=True)]
        total = terms[0] if terms else wide.new_zeros(len(batch))
        for term in terms[1:]:
            total = total + term
        return total.to(values.dtype)

    def _resolve(self, batch: RewardBatch, width: int) -> tuple[float, ...]:
        weights = self.weights
        if weights is None:
            return (1.0,) * width
        if isinstance(weights, Mapping):
            for name in weights:
                if name not in batch.names:
                    raise MissingColumnError(f"a weight names reward {name!r}{nearest(name, batch.names)}")
            absent = [name for name in batch.names if name not in weights]
            if absent:
                raise InvalidInputError(f"no weight for reward {absent[0]!r}; use 0 to leave it out")
            weights = tuple(weights[name] for name in batch.names)
        if len(weights) != width:
            raise InvalidInputError(f"{len(weights)} weights for a signal of {width} columns; rewards: {batch.names}")
        return tuple(weights)


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
        """(N, K) or (N,) -> the same shape."""
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
        """(N, K) or (N,) -> the same shape."""
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
        """(N, K) or (N,) -> the same shape."""
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
    ignore_single : keys, or None
        Rows alone in their segment of these keys take no part and get 0.
    """

    by: By = "group"
    scale_by: By | None = None
    epsilon: float = 1e-6
    ddof: int = 1
    singleton: Singleton = "zero"
    ignore_single: By | None = None

    def __post_init__(self) -> None:
        check_arguments(self)
        check_keys(self, "ignore_single", optional=True)

    def __call__(self, signal: Tensor, batch: RewardBatch) -> Tensor:
        """(N, K) or (N,) -> the same shape."""
        values, mask = applicable(signal, batch)
        if self.ignore_single is not None:
            apart = batch.segments(self.ignore_single)
            accompanied = per_column(apart.spread(apart.number(mask) > 1), values).expand_as(values)
            mask = accompanied if mask is None else mask & accompanied
        segments = batch.segments(self.by)
        deviations = centred(values, mask, segments, self.singleton)
        if self.scale_by is None or self.scale_by == self.by:
            wide = torch.promote_types(signal.dtype, torch.float32)
            result = standardized(deviations, mask, segments, self.epsilon, self.ddof, self.singleton, wide)
            return result.to(signal.dtype)
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

    Where the variance is exactly 0 the values become 0. A row of weight 0 takes no part and gets 0.

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
        """(N, K) or (N,) -> the same shape."""
        values, mask = applicable(signal, batch)
        segments = batch.segments(self.by)
        weights = None if self.weight is None else _row_weights(batch, self.weight, values)
        if weights is not None and not bool((weights > 0).all()):
            mask = weights > 0 if mask is None else mask & (weights > 0)
        deviations = centred(values, mask, segments)
        if weights is None:
            total, number = segments.sum(deviations.square()), segments.number(mask)
        else:
            weights = weights if mask is None else weights * mask
            number = segments.sum(weights)
            mean = segments.sum(weights * deviations) / torch.where(number > 0, number, 1.0)
            deviations = deviations - segments.spread(mean)
            deviations = deviations if mask is None else deviations * mask
            total = segments.sum(weights * deviations.square())
        number = per_column(number, total)
        varied = (total > 0) & (number > self.ddof)
        variance = torch.where(varied, total, 1.0) / torch.where(varied, number - self.ddof, 1.0)
        divisor = torch.where(varied, (variance + self.epsilon).sqrt(), torch.inf)
        return (deviations / segments.spread(divisor)).to(signal.dtype)


def _number(weight: object) -> float:
    try:
        number = float(weight)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise InvalidInputError(f"a weight must be a finite number, got {weight!r}")
    return number


def _row_weights(batch: RewardBatch, name: str, values: Tensor) -> Tensor:
    column = batch.column(name)
    if not isinstance(column, Tensor) or column.ndim != 1:
        raise InvalidInputError(f"column {name!r} must hold one number a row to weight by")
    weights = column.detach().to(torch.float64)
    usable = torch.isfinite(weights) & (weights >= 0)
    if not bool(usable.all()):
        row = int((~usable).nonzero()[0])
        raise InvalidInputError(f"column {name!r} is {float(weights[row])} in row {row}; a weight is finite and >= 0")
    return weights.unsqueeze(1).expand_as(values) if values.ndim == 2 else weights
