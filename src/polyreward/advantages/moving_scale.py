"""Divide centred rewards by a moving deviation of their task (EMA-GRPO).

Dividing by the group's deviation gives groups of little variance a large say; not dividing lets tasks of large variance
dominate. One deviation a task, averaged over updates with decay ``beta``, avoids both:

    m1 <- beta m1 + (1 - beta) mean(R),  m2 <- beta m2 + (1 - beta) mean(R^2),  sigma = sqrt(m2 - m1^2)
    A  =  (R - mean_group(R)) / sigma

over all rewards R of the task in the batch; the first batch of a task sets the moments, and the update comes before the
division. Mean and variance are kept in place of m1 and m2, with the algebraically equal update

    variance <- beta variance + (1 - beta) variance(R) + beta (1 - beta) (mean - mean(R))^2

which does not cancel for narrow rewards around a large mean.

Paper: OneThinker: All-in-one Reasoning Model for Image and Video (arXiv 2512.03043). ``moment="group"`` averages the
deviation inside groups instead, as OpenVLThinkerV2 (arXiv 2604.08539) restates it.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from polyreward.advantages.normal import By, centred, check_keys, check_numbers, standardized
from polyreward.advantages.transform import Transform, applicable
from polyreward.batch import RewardBatch
from polyreward.errors import InvalidInputError
from polyreward.grouped import Segments, hashable, per_column


class TaskMoments:
    """Moving mean and variance of each task, in float64, for one or several rewards (columns).

    Attributes
    ----------
    decay : float in [0, 1]
        beta in the paper; it counts updates of that task, so a rare task adapts more slowly in steps.
    """

    def __init__(self, decay: float = 0.99) -> None:
        if not 0 <= decay <= 1:
            raise InvalidInputError(f"decay must be in [0, 1], got {decay}")
        self.decay = decay
        self._row: dict[Hashable, int] = {}
        self._mean = torch.zeros((0, 1), dtype=torch.float64)
        self._variance = torch.zeros((0, 1), dtype=torch.float64)
        self._updates = torch.zeros((0, 1), dtype=torch.int64)

    @property
    def tasks(self) -> list[Hashable]:
        """Tasks seen so far, in order of first appearance."""
        return list(self._row)

    def update(
        self, tasks: Sequence[Hashable], mean: Tensor, variance: Tensor, present: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Take in the moments of this batch.

        Parameters
        ----------
        tasks : T distinct keys
        mean, variance : float tensors (T, K)
        present : bool tensor (T, K), optional
            Where the batch has such moments; elsewhere the state stays as it is.

        Returns
        -------
        mean, variance : float64 tensors (T, K) on the CPU, updated; 0 where nothing has been seen yet

        Raises
        ------
        InvalidInputError
            K differs from the rewards seen before, or moments are not finite. Nothing is changed then.
        """
        mean, variance = (moment.detach().to("cpu", torch.float64) for moment in (mean, variance))
        present = torch.ones_like(mean, dtype=torch.bool) if present is None else present.cpu()
        width = mean.shape[1]
        if self._row and self._mean.shape[1] != width:
            raise InvalidInputError(f"moving scale of {self._mean.shape[1]} rewards was given {width}")
        if not bool((torch.isfinite(mean) & torch.isfinite(variance))[present].all()):
            raise InvalidInputError("a moving scale was given moments that are not finite")
        new = [task for task in tasks if task not in self._row]
        for task in new:
            self._row[task] = len(self._row)
        self._mean, self._variance, self._updates = (
            torch.cat([known.reshape(-1, width), known.new_zeros(len(new), width)])
            for known in (self._mean, self._variance, self._updates)
        )
        rows = torch.tensor([self._row[task] for task in tasks], dtype=torch.int64)
        keep = torch.where(present, self.decay * (self._updates[rows] > 0).to(torch.float64), 1.0)
        step = torch.where(present, mean - self._mean[rows], 0.0)
        fresh = torch.where(present, variance, 0.0)
        self._variance[rows] = keep * self._variance[rows] + (1 - keep) * fresh + keep * (1 - keep) * step.square()
        self._mean[rows] += (1 - keep) * step
        self._updates[rows] += present.to(torch.int64)
        return self._mean[rows], self._variance[rows]

    def mean(self, task: Hashable) -> float | list[float]:
        """Moving mean of a task; a list of K numbers for several rewards."""
        return _plain(self._mean[self._find(task)])

    def deviation(self, task: Hashable) -> float | list[float]:
        """Moving deviation of a task, without floor or epsilon; a list of K numbers for several rewards."""
        return _plain(self._variance[self._find(task)].sqrt())

    def _find(self, task: Hashable) -> int:
        if task not in self._row:
            raise InvalidInputError(f"task {task!r} has not been seen; seen: {self.tasks}")
        return self._row[task]

    def state_dict(self) -> dict[str, Any]:
        """Everything as lists of plain numbers (JSON keeps float64 exactly)."""
        return {
            "tasks": list(self._row),
            "mean": self._mean.tolist(),
            "variance": self._variance.tolist(),
            "updates": self._updates.tolist(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned, in place of what is known now."""
        missing = {"tasks", "mean", "variance", "updates"} - set(state)
        if missing:
            raise InvalidInputError(f"the state of a moving scale lacks {sorted(missing)}")
        tasks = [hashable(task) for task in state["tasks"]]
        try:
            mean, variance = (torch.tensor(state[name], dtype=torch.float64) for name in ("mean", "variance"))
            updates = torch.tensor(state["updates"], dtype=torch.int64)
        except (TypeError, ValueError) as error:
            raise InvalidInputError(f"the state of a moving scale is not a table of numbers: {error}") from error
        if not mean.shape == variance.shape == updates.shape or mean.shape[:1] != (len(tasks),):
            raise InvalidInputError("the state of a moving scale has lists of different lengths")
        self._row = {task: row for row, task in enumerate(tasks)}
        self._mean, self._variance, self._updates = (
            known.reshape(len(tasks), -1 if tasks else 1) for known in (mean, variance, updates)
        )


@dataclass(frozen=True)
class MovingScale(Transform):
    """Centre by group and divide by the moving deviation of the task. Has memory: see `state_dict`.

    Parameters
    ----------
    by : name of the task column (or ``"batch"``, or several names crossed)
    decay : float in [0, 1]
        beta in the paper. 0: the deviation of this batch. 1: that of the first batch for ever.
    minimum : float >= 0
        Floor of the deviation; 1e-3 in the released code. It caps the advantages of very narrow tasks.
    epsilon : float >= 0
        Added to the deviation; 1e-6 in the released code.
    guard : float > 0, or None
        5.0 in the released code: a group with any ``|advantage|`` above it falls back to its own population deviation
        (plus `epsilon`), that is to GRPO.
    moment : "task" or "group"
        "task": deviation of all rewards of the task. "group": mean over its groups of the deviation inside the group,
        0 for a group of one.
    singleton : "error" or "zero"
        What a group of one row does. "zero": advantage 0, though its reward counts for the task.

    A signal (N,) or (N, K) in (a deviation for each column), the same out. Rewards that do not apply (NaN) take no part
    and get 0, in place of the error that the released code raises for any reward that is not a number. Where the
    deviation is 0 the divisor is 1. A task that the batch lacks keeps its state. Every call with rows updates the
    state, so use one transform for one run. The state is that of this process: in data-parallel training call it on the
    gathered rewards.

    Raises
    ------
    InvalidInputError
        Arguments out of range; a signal that is not finite, a group that spans two tasks, or (``singleton="error"``)
        a group of one. The state is unchanged then.
    """

    by: By = "task"
    decay: float = 0.99
    minimum: float = 0.0
    epsilon: float = 0.0
    guard: float | None = None
    moment: Literal["task", "group"] = "task"
    singleton: Literal["error", "zero"] = "error"
    moments: TaskMoments = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_keys(self, "by")
        check_numbers(self, "decay", "minimum", "epsilon", "guard")
        if not 0 <= self.decay <= 1:
            raise InvalidInputError(f"decay must be in [0, 1], got {self.decay}")
        if not (0 <= self.minimum < float("inf") and 0 <= self.epsilon < float("inf")):
            raise InvalidInputError(f"need minimum >= 0 and epsilon >= 0, got {self.minimum} and {self.epsilon}")
        if self.guard is not None and not self.guard > 0:
            raise InvalidInputError(f"guard must be positive or None, got {self.guard}")
        if self.moment not in ("task", "group"):
            raise InvalidInputError(f"moment must be 'task' or 'group', got {self.moment!r}")
        if self.singleton not in ("error", "zero"):
            raise InvalidInputError(f"singleton must be 'error' or 'zero', got {self.singleton!r}")
        object.__setattr__(self, "moments", TaskMoments(self.decay))

    def __call__(self, signal: Tensor, batch: RewardBatch) -> Tensor:
        """(N, K) or (N,) -> the same shape; updates the state."""
        values, mask = applicable(signal, batch)
        groups, tasks = batch.segments("group"), batch.segments(self.by)
        task_of_group = self._check(groups, tasks)
        if not len(batch):
            return values
        deviations = centred(values, mask, groups)
        deviation = self._update(values, deviations, mask, groups, tasks, task_of_group)
        floored = deviation.clamp(min=self.minimum) + self.epsilon
        divisor = torch.where(floored > 0, floored, 1.0)
        result = deviations / tasks.spread(divisor if values.ndim == 2 else divisor.squeeze(1))
        loud = None if self.guard is None else result.abs() > self.guard
        if loud is not None and bool(loud.any()):
            own = standardized(deviations, mask, groups, self.epsilon, ddof=0)
            result = torch.where(groups.spread(groups.sum(loud) > 0), own, result)
        return result.to(signal.dtype)

    def _check(self, groups: Segments, tasks: Segments) -> Tensor:
        """The task of each group; raises before any state is touched."""
        task_of_group = groups.codes.new_zeros(groups.count).scatter_(0, groups.codes, tasks.codes)
        strangers = groups.spread(task_of_group) != tasks.codes
        if bool(strangers.any()):
            row = int(strangers.nonzero()[0])
            group, names = groups.label(int(groups.codes[row])), [int(tasks.codes[row])]
            names.append(int(task_of_group[groups.codes[row]]))
            raise InvalidInputError(
                f"group {group!r} (row {row}) spans two values of {self.by!r}: "
                f"{tasks.label(names[0])!r} and {tasks.label(names[1])!r}"
            )
        if self.singleton == "error" and bool((groups.sizes == 1).any()):
            group = groups.label(int((groups.sizes == 1).nonzero()[0]))
            raise InvalidInputError(
                f"group {group!r} has one row; a moving scale needs at least 2 (or singleton='zero')"
            )
        return task_of_group

    def _update(
        self,
        values: Tensor,
        deviations: Tensor,
        mask: Tensor | None,
        groups: Segments,
        tasks: Segments,
        task_of_group: Tensor,
    ) -> Tensor:
        """Deviation (tasks.count, K) of every task after the update; 0 for a code without rows."""
        values, deviations = (part if part.ndim == 2 else part.unsqueeze(1) for part in (values, deviations))
        mask = mask if mask is None or mask.ndim == 2 else mask.unsqueeze(1)
        if self.moment == "task":
            first, second = tasks.mean(values, mask), tasks.variance(values, mask)
            number = per_column(tasks.number(mask), first)
        else:
            rows = per_column(groups.number(mask), values)
            owners = Segments(task_of_group, tasks.count)
            present = (rows > 0).expand(groups.count, values.shape[1])
            # The mean over groups is what moves, and its square stands in for a variance.
            first = owners.mean((groups.sum(deviations.square()) / rows.clamp(min=1)).sqrt(), present)
            second, number = torch.zeros_like(first), owners.number(present)
        seen = (number > 0).expand_as(first)
        codes = seen.any(dim=1).nonzero().squeeze(1)
        labels = [hashable(tasks.label(code)) for code in codes.tolist()]
        mean, variance = self.moments.update(labels, first[codes], second[codes], seen[codes])
        result = torch.zeros_like(first)
        result[codes] = (variance.sqrt() if self.moment == "task" else mean).to(result)
        return result.detach()

    def state_dict(self) -> dict[str, Any]:
        """The moments of every task seen; empty before the first call."""
        return self.moments.state_dict() if self.moments.tasks else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned; an empty state forgets every task."""
        if state:
            self.moments.load_state_dict(state)
        else:
            object.__setattr__(self, "moments", TaskMoments(self.decay))


def _plain(row: Tensor) -> float | list[float]:
    return float(row[0]) if row.numel() == 1 else [float(value) for value in row]
