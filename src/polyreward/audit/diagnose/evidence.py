"""The log laid out for the checks: rows sorted by group as NumPy arrays, and estimates with intervals.

Groups are the independent units: rollouts of one prompt share it. Every quantity of a check is therefore a function of
sums over groups, and its standard error is a delete-one-block jackknife over groups (groups are dealt at random, with a
fixed seed, into at most 400 blocks; with fewer groups each is a block). Intervals and tests use Student's t. Tests are
tests of a minimum effect: the null hypothesis is "at most `threshold`", not "zero", so a large log does not turn
a negligible effect into a warning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy import stats
from torch import Tensor

from polyreward.batch import RewardBatch
from polyreward.errors import InvalidInputError, MissingColumnError, nearest
from polyreward.grouped import Segments, factorize

BLOCKS = 400
REFERENCE_WORDS = (
    "held_out",
    "heldout",
    "held-out",
    "verifier",
    "verified",
    "ground_truth",
    "correct",
    "accuracy",
    "exact_match",
    "exact",
    "solved",
    "task_score",
)


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

    def above(self, threshold: float) -> float:
        """p-value of the null hypothesis that the quantity is at most `threshold`."""
        if not np.isfinite(self.value) or not np.isfinite(self.error) or self.freedom < 4:
            return 1.0
        if self.error <= 1e-12 * max(1.0, abs(self.value)):
            return 0.0 if self.value > threshold else 1.0
        return float(stats.t.sf((self.value - threshold) / self.error, self.freedom))

    def below(self, threshold: float) -> float:
        """p-value of the null hypothesis that the quantity is at least `threshold`."""
        return Estimate(-self.value, self.error, self.freedom).above(-threshold)


class Evidence:
    """A log prepared for the checks.

    Attributes
    ----------
    values : float64 (N, K)
        Rewards with the rows sorted by group; 0 where a reward does not apply.
    valid : bool (N, K)
    weights : float64 (K,)
    group : int (N,)
        Dense and ascending.
    groups : int
        Number of groups.
    """

    def __init__(
        self,
        batch: RewardBatch,
        weights: Mapping[str, float] | None = None,
        reference: str | None = None,
        task: str = "task",
        stratum: str | None = None,
    ) -> None:
        if len(batch) == 0:
            raise InvalidInputError("the log has no rows")
        self.batch, self.names = batch, batch.names
        codes = batch.segments("group").codes.cpu().numpy()
        self.order = np.argsort(codes, kind="stable")
        ordered = codes[self.order]
        fresh = np.empty(len(ordered), dtype=bool)
        fresh[0], fresh[1:] = True, ordered[1:] != ordered[:-1]
        self.starts = np.flatnonzero(fresh)
        self.group = np.cumsum(fresh) - 1
        self.groups = len(self.starts)
        self.sizes = np.diff(np.append(self.starts, len(ordered))).astype(np.float64)
        rewards = batch.rewards.detach().cpu().double().numpy()[self.order]
        self.valid = ~np.isnan(rewards)
        self.complete = bool(self.valid.all())
        self.values = rewards if self.complete else np.where(self.valid, rewards, 0.0)
        self.weights = _weights(weights, batch.names)
        self.task_name = task
        stratum = stratum or next((name for name in ("stratum", "tool_calls") if name in batch.columns), "stratum")
        self.stratum_name = stratum
        self.reference = _reference(reference, batch)
        self._columns: dict[str, Any] = {}
        self._reward_ranks: dict[int, np.ndarray] = {}

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Sum over the rows of each group: (N, ...) -> (groups, ...)."""
        if values.dtype == bool:
            values = values.astype(np.float64)
        return np.add.reduceat(values, self.starts, axis=0)

    def center(self, values: np.ndarray, valid: np.ndarray | None = None) -> np.ndarray:
        """Subtract the mean of the valid rows of the group; 0 where not valid."""
        if valid is None or valid.all():
            sizes = self.sizes if values.ndim == 1 else self.sizes[:, None]
            return values - (self.sum(values) / sizes)[self.group]
        mean = self.sum(values * valid) / np.maximum(self.sum(valid), 1)
        return (values - mean[self.group]) * valid

    def column(self, name: str) -> np.ndarray | None:
        """A column in the order of the rows here, or None."""
        if name not in self.batch.columns:
            return None
        if name not in self._columns:
            values = self.batch.columns[name]
            array = values.detach().cpu().numpy() if isinstance(values, Tensor) else values
            self._columns[name] = array[self.order]
        return self._columns[name]

    def numbers(self, name: str) -> np.ndarray | None:
        """A numeric column as float64 (N,), or None if it is absent, not numeric, or holds NaN only."""
        values = self.column(name)
        if values is None or values.dtype.kind not in "iufb" or values.ndim != 1:
            return None
        values = values.astype(np.float64)
        return values if np.isfinite(values).any() else None

    def ids(self, name: str) -> Segments | None:
        """A column as a partition of the rows, or None."""
        values = self.column(name)
        if values is None:
            return None
        if values.dtype.kind == "f" and np.all(np.isfinite(values)) and np.all(values == np.round(values)):
            values = values.astype(np.int64)
        dense = factorize(values, name=f"column {name!r}")
        present, codes = np.unique(dense.codes.numpy(), return_inverse=True)
        import torch

        return Segments(torch.from_numpy(codes), len(present), [dense.label(int(code)) for code in present])

    def reward_ranks(self, k: int) -> np.ndarray:
        """`ranks` of a reward that applies everywhere, computed once."""
        if k not in self._reward_ranks:
            self._reward_ranks[k] = self.ranks(self.values[:, k])
        return self._reward_ranks[k]

    @cached_property
    def centred(self) -> np.ndarray:
        """Rewards times weights, less the mean of their group, (N, K)."""
        return self.center(self.values, None if self.complete else self.valid) * self.weights

    @cached_property
    def total(self) -> np.ndarray:
        """Weighted sum of the rewards less the mean of the group, (N,)."""
        total = self.centred.sum(axis=1)
        return np.where(np.abs(total) < 1e-9 * self.magnitude, 0.0, total)

    @cached_property
    def magnitude(self) -> float:
        """Largest absolute weighted reward, the yardstick for rounding errors."""
        return float(np.abs(self.values * self.weights).sum(axis=1).max()) or 1.0

    @cached_property
    def energy(self) -> np.ndarray:
        """Sum of squares of `total` in each group, (groups,)."""
        return self.sum(self.total**2)

    @cached_property
    def alive(self) -> np.ndarray:
        """Groups whose samples do not all have the same weighted sum, bool (groups,)."""
        return (self.energy > 0) & (self.sizes > 1)

    @cached_property
    def tasks(self) -> tuple[np.ndarray, list[str]] | None:
        """Task of each group (groups,) and the names of the tasks; None without a column of tasks."""
        segments = self.ids(self.task_name)
        if segments is None:
            return None
        return segments.codes.numpy()[self.starts], [str(segments.label(code)) for code in range(segments.count)]

    @cached_property
    def steps(self) -> np.ndarray | None:
        """Step of each group, float64 (groups,); None without a usable column ``step``."""
        values = self.numbers("step")
        return None if values is None or not np.isfinite(values).all() else values[self.starts]

    @cached_property
    def thirds(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Groups of the first and of the last third of the steps, bool (groups,) each; None under six steps."""
        if self.steps is None:
            return None
        distinct = np.unique(self.steps)
        if len(distinct) < 6:
            return None
        third = len(distinct) // 3
        return self.steps <= distinct[third - 1], self.steps >= distinct[-third]

    @cached_property
    def block(self) -> np.ndarray:
        """Block of each group, (groups,), dealt at random with a fixed seed."""
        if self.groups <= BLOCKS:
            return np.arange(self.groups)
        return np.random.default_rng(0).permutation(self.groups) % BLOCKS

    def estimate(
        self, statistics: np.ndarray, figure: Callable[[np.ndarray], np.ndarray], within: np.ndarray | None = None
    ) -> Estimate:
        """`figure` of the summed per-group `statistics`, with its jackknife error.

        Parameters
        ----------
        statistics : (groups, M)
        figure : function of sums (..., M) -> (...)
        within : bool (groups,), optional
            Groups that take part.
        """
        if within is not None:
            statistics = statistics[within]
        block = self.block if within is None else self.block[within]
        if len(statistics) == 0:
            return Estimate(float("nan"), float("nan"), 0)
        if len(statistics) <= BLOCKS:
            parts = statistics
        else:
            parts = np.stack([np.bincount(block, column, BLOCKS) for column in statistics.T], axis=1)
        whole = parts.sum(axis=0)
        with np.errstate(divide="ignore", invalid="ignore"):
            value = float(figure(whole))
            left_out = figure(whole - parts)
        left_out = left_out[np.isfinite(left_out)]
        number = len(left_out)
        if number < 2:
            return Estimate(value, float("nan"), 0)
        error = float(np.sqrt((number - 1) / number * np.sum((left_out - left_out.mean()) ** 2)))
        # the groups that can move the figure decide how far the t distribution may be trusted
        moving = int(np.count_nonzero(np.any(parts != 0, axis=1)))
        return Estimate(value, error, min(number, moving) - 1)

    def ranks(self, values: np.ndarray) -> np.ndarray:
        """Mean ranks inside each group, less their mean, float64 (N,)."""
        order = np.lexsort((values, self.group))
        ordered, at = values[order], self.group[order]
        fresh = np.empty(len(order), dtype=bool)
        fresh[0], fresh[1:] = True, (ordered[1:] != ordered[:-1]) | (at[1:] != at[:-1])
        first = np.flatnonzero(fresh)
        length = np.diff(np.append(first, len(order)))
        mean_rank = np.repeat(first + (length - 1) / 2, length)
        ranks = np.empty(len(order))
        ranks[order] = mean_rank
        return self.center(ranks)


def ratio(top: int = 0, bottom: int = 1) -> Callable[[np.ndarray], np.ndarray]:
    """The figure "sum `top` over sum `bottom`"."""
    return lambda sums: sums[..., top] / sums[..., bottom]


def _weights(weights: Mapping[str, float] | None, names: tuple[str, ...]) -> np.ndarray:
    given = dict(weights or {})
    for name in given:
        if name not in names:
            raise MissingColumnError(f"a weight names reward {name!r}{nearest(name, names)}")
    return np.array([float(given.get(name, 1.0)) for name in names])


def _reference(name: str | None, batch: RewardBatch) -> str | None:
    """The trusted reward: what the caller names, else a reward or column whose name says so."""
    known = [*batch.names, *batch.columns]
    if name is not None:
        if name not in known:
            raise MissingColumnError(f"the reference {name!r} is neither a reward nor a column{nearest(name, known)}")
        return name
    for word in REFERENCE_WORDS:
        for candidate in known:
            if word in candidate.lower():
                return candidate
    return None
