"""Dense rewards from unit tests, weighted by difficulty and divided by the density of tests as hard (VeRPO).

The pass rate of a suite is ruled by its many easy tests: a rollout that solves a hard test at the price of some easy
ones lies below the mean of its group and is pushed down. VeRPO weights a test by how rarely the group passes it, and
divides by how many tests are about as hard, so that a cluster of k equally hard tests counts about once. With rho_j the
pass rate of test j over all programs (turns) of the group:

    D_j = sum_k exp(-(rho_j - rho_k)^2 / (2 bandwidth^2))        (k runs over all tests, j included, so D_j >= 1)
    w_j = exp(-alpha rho_j) / (D_j + delta)
    R   = sum_j w_j passed_j

The global outcome, 1 where every test passes, joins it: in `polyreward.advantages.turns.FusedAdvantage` for episodes of
several turns, and in `VeRPOReward` for one. The weights belong to one group at one step; rewards of different groups or
steps are not comparable, and a rare pass is worth most: keep tests hidden for evaluation.

Paper: VeRPO: Verifiable Dense Reward Policy Optimization for Code Generation (arXiv 2601.03525).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from polyreward.errors import InvalidInputError
from polyreward.grouped import Ids, Segments, factorize, whole
from polyreward.rewards.contract import Sample, is_finite
from polyreward.rewards.execution import Limits, Sandbox
from polyreward.rewards.groups import GroupReward
from polyreward.rewards.unit_tests import Compare, Extract, SuiteRun, UnitTests, check_options, without_sandbox


@dataclass(frozen=True, eq=False)
class TestSuiteOutcome:
    """What the programs of one group passed; the turns of all trajectories in one table, in any order.

    Parameters
    ----------
    passed : bool (turns, tests)
        0 and 1 are read too.
    traj_index : int (turns,)
        Trajectory of each turn, 0 to N - 1, each with at least one turn.
    turn_index : int (turns,)
        Turns of a trajectory in order; distinct within it.

    Raises
    ------
    InvalidInputError
        Wrong shapes, no test, no turn, entries that are neither true nor false, a trajectory without turns, a turn
        given twice.
    """

    __test__ = False  # no test for pytest to collect

    passed: Any
    traj_index: Any
    turn_index: Any

    def __post_init__(self) -> None:
        table = _table(self.passed)
        index, turn = (torch.as_tensor(values, device=table.device) for values in (self.traj_index, self.turn_index))
        for name, values in (("traj_index", index), ("turn_index", turn)):
            if values.shape != table.shape[:1] or values.is_floating_point():
                raise InvalidInputError(f"{name} must be {table.shape[0]} integers, got shape {tuple(values.shape)}")
        absent = torch.bincount(index.clamp(min=0)) == 0
        if bool((index < 0).any()) or bool(absent.any()):
            raise InvalidInputError(
                f"traj_index must hold every number from 0 to N - 1, got {sorted(set(index.tolist()))}"
            )
        pairs = torch.stack([index.to(torch.int64), turn.to(torch.int64)], 1)
        if len(torch.unique(pairs, dim=0)) < len(pairs):
            raise InvalidInputError("traj_index and turn_index name the same turn of a trajectory twice")

    @property
    def lengths(self) -> Any:
        """Number of turns of each trajectory, int64 (N,)."""
        index = torch.as_tensor(self.traj_index)
        return _like(torch.bincount(index), self.passed)

    @property
    def solved(self) -> Any:
        """Whether the final program of each trajectory passes every test, bool (N,)."""
        table = _table(self.passed)
        index = torch.as_tensor(self.traj_index, device=table.device)
        turn = torch.as_tensor(self.turn_index, device=table.device)
        segments = Segments(index.to(torch.int64), int(index.max()) + 1)
        final = turn == segments.spread(segments.extremes(turn)[1])
        return _like(segments.sum((final & table.all(dim=1)).double()) > 0, self.passed)


@dataclass(frozen=True)
class DensityCalibratedReward:
    """Weights of tests, and rewards of programs by them; no memory between calls (VeRPO, arXiv 2601.03525).

    Parameters
    ----------
    alpha : float >= 0
        How fast the weight falls with the pass rate; 2 in a digest of the paper.
    bandwidth : float >= 0, infinity too
        Width of the Gaussian over pass rates, sigma in the paper, which prints no figure: 0.1 is the resolution of a
        group of ten. 0: only tests of exactly the same pass rate share their weight.
    delta : float >= 0
        Added to the density, which is at least 1.
    density, difficulty : bool
        False leaves that factor out of the weight; without both the reward is the number of tests passed.
    normalise : bool
        Divide the weights by their sum, so that rewards are in [0, 1]. Not in the paper.

    Raises
    ------
    InvalidInputError
        A parameter out of its range.
    """

    alpha: float = 2.0
    bandwidth: float = 0.1
    delta: float = 1e-6
    density: bool = True
    difficulty: bool = True
    normalise: bool = False

    def __post_init__(self) -> None:
        for name in ("alpha", "delta"):
            value = getattr(self, name)
            if not is_finite(value) or value < 0:
                raise InvalidInputError(f"{name} must be a finite number >= 0, got {value!r}")
        if not isinstance(self.bandwidth, int | float | np.number) or not self.bandwidth >= 0:
            raise InvalidInputError(f"bandwidth must be a number >= 0, got {self.bandwidth!r}")

    def fit(self, passed: Any, groups: Ids | None = None, present: Any = None) -> Any:
        """Weight of each test.

        Parameters
        ----------
        passed : bool (turns, tests), array or tensor
            All programs of one problem, or of several with `groups`, suites of different length padded on the right.
        groups : int or str (turns,), optional
            Problem of each row.
        present : bool (turns, tests), optional
            False where a column is padding or a test is to be left out for the row's problem; the same in all rows of
            a group. `passed` does not matter there.

        Returns
        -------
        float64 (tests,), or (groups, tests) with `groups`, in order of the ids' codes; 0 where no test is present.
        Weights are in (0, exp(-alpha rho) / (1 + delta)].

        Raises
        ------
        InvalidInputError
            No turn, no test (also none present in a group), wrong shapes, NaN or entries other than true and false.
        """
        table, segments, here = self._read(passed, groups, present)
        weights = self._weights(table, segments, here)
        return _like(weights[0] if groups is None else weights, passed)

    def score(self, passed: Any, groups: Ids | None = None, present: Any = None) -> Any:
        """Reward of each program under the weights of its group, float64 (turns,); arguments as in `fit`."""
        table, segments, here = self._read(passed, groups, present)
        weights = segments.spread(self._weights(table, segments, here))
        # Term by term in the order of the tests, not a matrix product: equal rows get equal sums to the bit.
        return _like((table * weights).sum(dim=1), passed)

    def _read(self, passed: Any, groups: Ids | None, present: Any) -> tuple[Tensor, Segments, Tensor]:
        table = _table(passed, present)
        rows = table.shape[0]
        segments = (
            whole(rows, table.device) if groups is None else factorize(groups, name="groups", device=table.device)
        )
        if len(segments) != rows:
            raise InvalidInputError(f"groups has {len(segments)} entries, passed has {rows} turns")
        if present is None:
            here = torch.ones(segments.count, table.shape[1], dtype=torch.bool, device=table.device)
        else:
            mask = torch.as_tensor(present, device=table.device).to(torch.bool)
            number = segments.sum(mask.double())
            here = number > 0
            if bool((here & (number < segments.sizes.unsqueeze(1))).any()):
                raise InvalidInputError("present differs between the turns of a group; a test is there for all or none")
        empty = ~here.any(dim=1) & (segments.sizes > 0)
        if bool(empty.any()):
            label = segments.label(int(empty.nonzero()[0]))
            raise InvalidInputError(f"group {label!r} has no test; a reward from unit tests needs at least one")
        return table, segments, here

    def _weights(self, table: Tensor, segments: Segments, here: Tensor) -> Tensor:
        passes = segments.sum(table)  # (groups, tests)
        turns = segments.sizes.clamp(min=1).to(torch.float64).unsqueeze(1)
        weights = torch.exp(-self.alpha * passes / turns) if self.difficulty else torch.ones_like(passes)
        if self.density:
            weights = weights / (self._density(passes, turns, here) + self.delta)
        weights = torch.where(here, weights, 0.0)
        if self.normalise:
            total = weights.sum(dim=1, keepdim=True)
            weights = weights / torch.where(total > 0, total, 1.0)
        return weights

    def _density(self, passes: Tensor, turns: Tensor, here: Tensor) -> Tensor:
        """How many tests of the group are about as hard as each: (groups, tests)."""
        most = int(turns.max())
        if passes.shape[1] <= most + 1:
            near = self._kernel((passes.unsqueeze(2) - passes.unsqueeze(1)) / turns.unsqueeze(2))
            return (near * here.unsqueeze(1)).sum(dim=2)
        # Pass rates take few values, so tests are counted by the number of their passes first.
        levels = torch.arange(most + 1, device=passes.device, dtype=torch.float64)
        at = passes.to(torch.int64)
        count = torch.zeros(len(passes), most + 1, dtype=torch.float64, device=passes.device)
        count.scatter_add_(1, at, here.double())
        near = self._kernel((levels.unsqueeze(1) - levels) / turns.unsqueeze(2))
        return (near * count.unsqueeze(1)).sum(dim=2).gather(1, at)

    def _kernel(self, distance: Tensor) -> Tensor:
        if self.bandwidth == 0:
            return (distance == 0).double()
        return torch.exp(-(distance / self.bandwidth).square() / 2)


def _table(passed: Any, present: Any = None) -> Tensor:
    """What was passed as float64 (turns, tests) of 0 and 1, 0 where a test is not present."""
    try:
        table = torch.as_tensor(passed)
        mask = None if present is None else torch.as_tensor(present, device=table.device).to(torch.bool)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInputError(f"passed must be a table (turns, tests) of true and false: {error}") from error
    if table.ndim != 2:
        raise InvalidInputError(f"passed must have shape (turns, tests), got {tuple(table.shape)}")
    if mask is not None and mask.shape != table.shape:
        raise InvalidInputError(f"present has shape {tuple(mask.shape)}, passed {tuple(table.shape)}")
    for size, thing in zip(table.shape, ("turn", "test"), strict=True):
        if size == 0:
            raise InvalidInputError(f"passed has no {thing} (shape {tuple(table.shape)}); expected at least one")
    wrong = (table != 0) & (table != 1)
    if mask is not None:
        wrong = wrong & mask
    if bool(wrong.any()):
        row, test = (int(place) for place in wrong.nonzero()[0])
        raise InvalidInputError(
            f"passed is {table[row, test].item()} at turn {row}, test {test}; expected true or false"
        )
    table = table.to(torch.float64)
    return table if mask is None else torch.where(mask, table, 0.0)


def _like(values: Tensor, given: Any) -> Any:
    return values if isinstance(given, Tensor) else values.numpy()


@dataclass(frozen=True)
class VeRPOReward(GroupReward):
    """Outcome plus density-calibrated share of the tests that a program passes, in its group (VeRPO, arXiv 2601.03525).

        local_weight * sum_j w_j passed_j + outcome_weight * [every test passes]

    Centring is linear, so with an advantage that only subtracts the mean of the group (preset ``reinforce``, the
    paper's choice) this one reward gives exactly the paper's ``A_traj + beta A_turn`` for single turns.

    Parameters
    ----------
    column, extract, compare, limits, sandbox : as in `polyreward.rewards.unit_tests.UnitTestReward`
    alpha, bandwidth, delta, density, difficulty, normalise : as in `DensityCalibratedReward`
    local_weight : float >= 0
        beta in the paper, which prints no figure: 1. The scale of the local reward depends on how many clusters of
        difficulty a suite has, so the balance with the outcome does too, unless `normalise` is set.
    outcome_weight : float >= 0
        1; 0 gives the local reward alone.
    stopped : "rest" or "test"
        A program that was stopped for its time or memory fails all later tests too, or that test alone.
    repeats : int >= 1
        With 2 or more, every program runs so often and a test on which any program of the group disagrees with itself
        is left out for the group: a test that passes at random looks like a hard one.

    Range [0, local_weight * sum of weights + outcome_weight]. A completion without a program passes no test. Does not
    apply where the tests are None, nor to a group all of whose tests were left out. A group of one warns: its advantage
    is 0.

    Raises
    ------
    InvalidInputError
        Options out of range; at a call, tests that cannot be used or that differ inside a group.
    """

    column: str = "tests"
    extract: Extract = "code"
    alpha: float = 2.0
    bandwidth: float = 0.1
    delta: float = 1e-6
    density: bool = True
    difficulty: bool = True
    normalise: bool = False
    local_weight: float = 1.0
    outcome_weight: float = 1.0
    stopped: Literal["rest", "test"] = "rest"
    repeats: int = 1
    compare: Compare = "lines"
    limits: Limits | Any = None
    sandbox: Sandbox | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_options(self)
        self.calibrated.fit([[1]])  # refuses parameters out of range
        for name in ("local_weight", "outcome_weight"):
            value = getattr(self, name)
            if not is_finite(value) or value < 0:
                raise InvalidInputError(f"{name} must be a finite number >= 0, got {value!r}")
        if self.stopped not in ("rest", "test"):
            raise InvalidInputError(f"stopped must be 'rest' or 'test', got {self.stopped!r}")

    def __getstate__(self) -> dict[str, Any]:
        return without_sandbox(self)

    @property
    def __name__(self) -> str:
        """Name in logs."""
        return "verpo"

    @property
    def reads(self) -> tuple[str, ...]:
        """The column of tests."""
        return (self.column,)

    @property
    def calibrated(self) -> DensityCalibratedReward:
        """The arithmetic with this reward's parameters."""
        return DensityCalibratedReward(
            self.alpha, self.bandwidth, self.delta, self.density, self.difficulty, self.normalise
        )

    def __call__(self, prompts: Sequence[Any] | None, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """Score a batch: all its programs run in one call of the sandbox, then every group is weighted."""
        groups = self.groups(prompts, completions, columns)
        samples = sorted((sample for members in groups for sample in members), key=lambda sample: sample.row)
        runner = UnitTests(self.column, self.extract, self.compare, self.limits, self.repeats, self.sandbox)
        results = runner.run(samples, runner.suites(self, samples))
        runs = {sample.row: run for sample, run in zip(samples, results, strict=True)}
        values: list[float | None] = [None] * len(completions)
        for members in groups:
            found = self._weighted(members, [runs[sample.row] for sample in members])
            for sample, value in zip(members, found, strict=True):
                values[sample.row] = value
        return values

    def _weighted(self, samples: Sequence[Sample], runs: Sequence[SuiteRun]) -> list[float | None]:
        """Rewards of the completions of one prompt, from what their programs passed."""
        for sample, run in zip(samples, runs, strict=True):
            if run.tests != runs[0].tests:
                raise self.refuse(
                    sample, self.column, f"the tests differ from those of row {samples[0].row} of its group"
                )
        passed = np.stack([run.passed for run in runs])
        if self.stopped == "rest":
            passed &= ~np.logical_or.accumulate(np.stack([run.stopped for run in runs]), axis=1)
        passed = passed[:, np.stack([run.stable for run in runs]).all(axis=0)]
        if passed.shape[1] == 0:
            return [None] * len(samples)
        if len(samples) == 1:
            warnings.warn(
                f"reward {self.__name__!r}: a group of one completion has nothing to compare with; its advantage is 0",
                stacklevel=2,
            )
        value = self.local_weight * self.calibrated.score(passed) + self.outcome_weight * passed.all(axis=1)
        return list(value.tolist())
