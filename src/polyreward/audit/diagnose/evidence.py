"""The log laid out for the checks: NumPy arrays sorted by group, with group sums, ranks, tasks, steps and strata.

Every figure of a check is a function of sums over groups, so that its error can be had by leaving groups out
(`polyreward.audit.diagnose.estimates`). Large logs deal their groups into 400 blocks, at random with a fixed seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyreward.audit.diagnose.estimates import Estimate, Figure, jackknife
from polyreward.audit.diagnose.reference import find_reference
from polyreward.batch import RewardBatch
from polyreward.errors import InvalidInputError, MissingColumnError, nearest
from polyreward.grouped import Segments, factorize

BLOCKS = 400
FEWEST_STEPS = 6
LENGTHS = ("length", "completion_length", "response_length", "completion_tokens", "response_tokens", "num_tokens")
TEXTS = ("completion", "response", "output", "text")
NO_VALUE = "(none)"
"""Label of rows without a task or stratum."""


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
        codes = _within_steps(batch)
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
        for name in (task if task != "task" else None, stratum):
            if name is not None and name not in batch.columns:
                raise MissingColumnError(f"the log has no column {name!r}{nearest(name, batch.columns)}")
        self.task_name = task
        stratum = stratum or next((name for name in ("stratum", "tool_calls") if name in batch.columns), "stratum")
        self.stratum_name = stratum
        self._columns: dict[str, Any] = {}
        self._reward_ranks: dict[int, np.ndarray] = {}
        self.reference = find_reference(self, reference)

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

    def range(self, values: np.ndarray, valid: np.ndarray) -> np.ndarray:
        """Largest less smallest valid value of each group, (groups,); 0 where there is none."""
        high = np.maximum.reduceat(np.where(valid, values, -np.inf), self.starts)
        low = np.minimum.reduceat(np.where(valid, values, np.inf), self.starts)
        return np.where(high >= low, high, 0.0) - np.where(high >= low, low, 0.0)

    def median(self, values: np.ndarray, valid: np.ndarray) -> np.ndarray:
        """Median of the valid values of each group, (groups,); 0 where there is none."""
        # what does not apply goes to the end of its group
        ordered = values[np.lexsort((np.where(valid, values, np.inf), self.group))]
        count = self.sum(valid).astype(int)
        low, high = (self.starts + np.maximum(k, 0) for k in ((count - 1) // 2, count // 2))
        return np.where(count > 0, (ordered[low] + ordered[np.where(count > 0, high, low)]) / 2, 0.0)

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
        """A numeric column as float64 (N,), NaN where it has no value; None if it is absent or not numeric."""
        values = self.column(name)
        if values is None or values.ndim != 1:
            return None
        if values.dtype.kind == "O" and any(isinstance(value, str) for value in values[:100]):
            return None
        try:
            values = values.astype(np.float64)
        except (TypeError, ValueError):
            return None
        return values if np.isfinite(values).any() else None

    def ids(self, name: str) -> Segments | None:
        """A column as a partition of the rows, those without a value together; None without the column."""
        values = self.column(name)
        if values is None or values.ndim != 1:
            return None
        if values.dtype.kind == "f":
            known = np.isfinite(values)
            if known.all() and np.array_equal(values, np.round(values)):
                values = values.astype(np.int64)
            else:
                values = np.array(
                    [f"{v:g}" if k else NO_VALUE for v, k in zip(values, known, strict=True)], dtype=object
                )
        elif values.dtype.kind == "O":
            values = np.array([NO_VALUE if v is None or v != v else v for v in values.tolist()], dtype=object)
        dense = factorize(values, name=f"column {name!r}")
        present, codes = np.unique(dense.codes.numpy(), return_inverse=True)
        return Segments(torch.from_numpy(codes), len(present), [dense.label(int(code)) for code in present])

    @cached_property
    def length(self) -> tuple[str, np.ndarray] | None:
        """Name and values of the length of the responses: a column, else the number of characters of the text."""
        for name in LENGTHS:
            values = self.numbers(name)
            if values is not None:
                return name, values
        for name in TEXTS:
            texts = self.column(name)
            if texts is not None and texts.dtype.kind == "O" and any(isinstance(t, str) for t in texts[:100]):
                lengths = (len(t) if isinstance(t, str) else np.nan for t in texts.tolist())
                return f"characters of {name!r}", np.fromiter(lengths, np.float64, len(texts))
        return None

    def reward_ranks(self, k: int) -> np.ndarray:
        """`ranks` of a reward that applies everywhere, computed once."""
        if k not in self._reward_ranks:
            self._reward_ranks[k] = self.ranks(self.values[:, k])
        return self._reward_ranks[k]

    @cached_property
    def reference_values(self) -> np.ndarray | None:
        """The trusted reward as float64 (N,), NaN where it does not apply; None without one."""
        if self.reference in self.names:
            k = self.names.index(self.reference)
            return np.where(self.valid[:, k], self.values[:, k], np.nan)
        return None if self.reference is None else self.numbers(self.reference)

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
        if len(distinct) < FEWEST_STEPS:
            return None
        third = len(distinct) // 3
        return self.steps <= distinct[third - 1], self.steps >= distinct[-third]

    @cached_property
    def block(self) -> np.ndarray | None:
        """Block of each group, (groups,), dealt at random with a fixed seed; None: each group is one."""
        if self.groups <= BLOCKS:
            return None
        return np.random.default_rng(0).permutation(self.groups) % BLOCKS

    @cached_property
    def step_block(self) -> np.ndarray:
        """Block of the step of each group, (groups,): the steps, or stretches of them when there are very many."""
        assert self.steps is not None
        distinct, code = np.unique(self.steps, return_inverse=True)
        return code * min(BLOCKS, len(distinct)) // len(distinct)

    def estimate(
        self, statistics: np.ndarray, figure: Figure, within: np.ndarray | None = None, by_step: bool = False
    ) -> Estimate:
        """`jackknife` over blocks of groups (or over steps) of per-group `statistics` (groups, M).

        Parameters
        ----------
        within : bool (groups,), optional
            Groups that take part.
        by_step : bool
            Blocks are steps: for figures about trends, because groups of one step share the policy that made them.
        """
        block = self.step_block if by_step else self.block
        if within is not None:
            statistics, block = statistics[within], None if block is None else block[within]
        return jackknife(statistics, figure, block if by_step or len(statistics) > BLOCKS else None)

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


def _within_steps(batch: RewardBatch) -> np.ndarray:
    """Codes of the groups, (N,); a prompt that is drawn again at another step is another group."""
    codes = batch.segments("group").codes.cpu().numpy()
    step = batch.columns.get("step")
    if not isinstance(step, Tensor) or step.ndim != 1 or bool(torch.isnan(step.double()).any()):
        return codes
    steps = np.unique(step.detach().cpu().numpy(), return_inverse=True)[1]
    return np.unique(codes * (int(steps.max()) + 1) + steps, return_inverse=True)[1]


def _weights(weights: Mapping[str, float] | None, names: tuple[str, ...]) -> np.ndarray:
    given = dict(weights or {})
    for name, weight in given.items():
        if name not in names:
            raise MissingColumnError(f"a weight names reward {name!r}{nearest(name, names)}")
        if not np.isfinite(weight):
            raise InvalidInputError(f"the weight of reward {name!r} is {weight}; expected a finite number")
    return np.array([float(given.get(name, 1.0)) for name in names])
