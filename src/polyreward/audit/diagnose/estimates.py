"""Figures with intervals: delete-one-block jackknife over groups or steps, and tests of an effect that matters.

Groups are the independent units: rollouts of one prompt share it, and rollouts of one step share the policy. A figure
is a function of sums over such units; its standard error comes from leaving out one block of units at a time, and
intervals and tests use Student's t. A warning needs two things: the figure is beyond the size that matters, and it is
significantly beyond half that size. So a large log does not turn a negligible effect into a warning, a small one does
not turn noise into one, and an effect of ordinary size is found in a log of ordinary size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import stats

FEWEST = 4
"""Degrees of freedom below which nothing is tested."""

Figure = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Estimate:
    """A figure with its standard error and degrees of freedom."""

    value: float
    error: float
    freedom: float

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval; infinite when there are too few groups to tell."""
        if not np.isfinite(self.value) or not np.isfinite(self.error) or self.freedom < 1:
            return float("-inf"), float("inf")
        reach = float(stats.t.ppf(0.975, self.freedom)) * self.error
        return self.value - reach, self.value + reach

    @property
    def testable(self) -> bool:
        """Whether there are enough units for a test."""
        return bool(np.isfinite(self.value) and np.isfinite(self.error) and self.freedom >= FEWEST)

    def above(self, threshold: float, null: float | None = None) -> float:
        """p-value of "at most `null`" (default `threshold`); 1 unless the figure itself is above `threshold`."""
        if not self.testable or self.value <= threshold:
            return 1.0
        null = threshold if null is None else null
        if self.error <= 1e-12 * max(1.0, abs(self.value)):
            return 0.0 if self.value > null else 1.0
        return float(stats.t.sf((self.value - null) / self.error, self.freedom))

    def below(self, threshold: float, null: float | None = None) -> float:
        """p-value of "at least `null`" (default `threshold`); 1 unless the figure itself is below `threshold`."""
        return Estimate(-self.value, self.error, self.freedom).above(-threshold, None if null is None else -null)

    def beyond(self, threshold: float, null: float) -> float:
        """Two-sided: the figure is above `threshold` or below its negative."""
        return min(1.0, 2 * min(self.above(threshold, null), self.below(-threshold, -null)))

    def minus(self, other: float, error: float = 0.0) -> Estimate:
        """The difference to another, independent figure."""
        return Estimate(self.value - other, float(np.hypot(self.error, error)), self.freedom)


def jackknife(statistics: np.ndarray, figure: Figure, block: np.ndarray | None = None) -> Estimate:
    """`figure` of the summed per-unit `statistics`, with its delete-one-block error.

    Parameters
    ----------
    statistics : (units, M)
    figure : function of sums (..., M) -> (...)
    block : int (units,), optional
        Block of each unit; default: each unit is one.

    Returns
    -------
    Estimate
        Degrees of freedom: the blocks that can move the figure, less one.
    """
    if len(statistics) == 0:
        return Estimate(float("nan"), float("nan"), 0)
    if block is None:
        parts = statistics
    else:
        _, block = np.unique(block, return_inverse=True)
        parts = np.stack([np.bincount(block, column) for column in statistics.T], axis=1)
    whole = parts.sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(figure(whole))
        left_out = figure(whole - parts)
    left_out = left_out[np.isfinite(left_out)]
    number = len(left_out)
    if number < 2:
        return Estimate(value, float("nan"), 0)
    error = float(np.sqrt((number - 1) / number * np.sum((left_out - left_out.mean()) ** 2)))
    moving = int(np.count_nonzero(np.any(parts != 0, axis=1)))
    return Estimate(value, error, min(number, moving) - 1)


def ratio(top: int = 0, bottom: int = 1) -> Figure:
    """The figure "sum `top` over sum `bottom`"."""
    return lambda sums: sums[..., top] / sums[..., bottom]
