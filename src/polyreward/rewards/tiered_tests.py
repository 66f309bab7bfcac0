"""Tests in tiers of difficulty, of which more (or others) count as training goes on (TAROT).

Two dials: a schedule says which tiers are active at training progress f, weights say how much a passed case is worth:

    R = sum of weight[tier] over the passed cases whose tier is active at f

Tiers, schedules and weights are in `polyreward.rewards.tiers`; cases without a tier are "minimal", weight 0 unless told
otherwise. `polyreward.curricula.tier_portfolio` chooses among the curricula by the capability of the model. Rewards of
two curricula, or of two phases, are not comparable: compare held-out shares of problems whose every tier passes.

Paper: TAROT: Test-driven and Capability-adaptive Curriculum Reinforcement Fine-tuning for Code Generation with Large
Language Models (arXiv 2602.15449). The released code zeroes a completion of which one case runs over its time; here it
is one failed case. It filters the list of cases in place; here suites never change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from polyreward.errors import InvalidInputError, MissingColumnError, UnknownNameError, nearest
from polyreward.rewards.contract import Reward, Sample, is_finite
from polyreward.rewards.dead_group_watch import DeadGroupWatch, NoSignalWarning
from polyreward.rewards.execution import Limits, OutputTest, Sandbox, Script, shared_sandbox
from polyreward.rewards.groups import group_key
from polyreward.rewards.tiers import (
    MINIMAL,
    PORTFOLIO,
    TIERS,
    TierSchedule,
    TierWeights,
    UnknownTierError,
    tier_name,
)
from polyreward.rewards.unit_tests import (
    Compare,
    Extract,
    SuiteTest,
    UnitTests,
    check_options,
    code_of,
    without_sandbox,
)

__all__ = [
    "PORTFOLIO", "TIERS", "DeadGroupWatch", "NoSignalWarning", "Runner", "TestCase", "TierSchedule", "TierWeights",
    "TieredResult", "TieredReward", "TieredSuite", "TieredTestsReward", "UnknownTierError", "same_output",
    "sandbox_runner", "sandbox_runs", "succeeded", "tier_name",
]  # fmt: skip

_SUCCESS = ("finished", "passed", "ok", "success")

#: ``runner(code, stdin, timeout) -> (status, stdout)``: status 0, or one of finished, passed, ok, success, says that
#: the program ended by itself with exit status 0. A program over its time is any other status, not an exception.
Runner = Callable[[str, str, float], tuple[Any, str]]


@dataclass(frozen=True)
class TestCase:
    """Input, expected output, and tier of one case; the tier goes through `tier_name`."""

    __test__ = False

    stdin: str
    stdout: str
    tier: str | None = MINIMAL

    def __post_init__(self) -> None:
        if not isinstance(self.stdin, str) or not isinstance(self.stdout, str):
            raise InvalidInputError(f"a test case needs texts as stdin and stdout, got {self.stdin!r}, {self.stdout!r}")
        object.__setattr__(self, "tier", tier_name(self.tier))


@dataclass(frozen=True)
class TieredSuite:
    """The cases of one problem, in order; never changed by running it.

    Raises
    ------
    InvalidInputError
        No case, or something that is none.
    """

    cases: tuple[TestCase, ...]

    def __post_init__(self) -> None:
        cases = tuple(self.cases)
        if not cases or not all(isinstance(case, TestCase) for case in cases):
            raise InvalidInputError(f"a tiered suite needs at least one TestCase, got {self.cases!r}")
        object.__setattr__(self, "cases", cases)

    @property
    def tiers(self) -> frozenset[str]:
        """Tiers that have a case."""
        return frozenset(str(case.tier) for case in self.cases)

    def passed(
        self,
        completion: str,
        runner: Runner | None = None,
        tiers: Iterable[str] | None = None,
        *,
        timeout: float = 5.0,
        compare: Compare = "lines",
        strict: bool = True,
        extract: Extract = "code",
    ) -> np.ndarray:
        """Which cases the program of a completion passes, bool (cases,).

        Cases of other tiers than `tiers` do not run and are False. The other parameters are those of `TieredReward`.
        """
        code = completion if extract == "text" else code_of(completion, which="last" if extract == "code" else "first")
        named = self.tiers if tiers is None else frozenset(map(tier_name, tiers))
        wanted = [case.tier in named for case in self.cases]
        chosen = [case for case, runs in zip(self.cases, wanted, strict=True) if runs]
        results: Iterable[tuple[Any, str]]
        if runner is None:
            results = sandbox_runs([(code, case.stdin) for case in chosen], timeout)
        else:
            results = [runner(code, case.stdin, timeout) for case in chosen]
        passes = [
            succeeded(status) and same_output(case.stdout, printed, compare, strict)
            for case, (status, printed) in zip(chosen, results, strict=True)
        ]
        table = np.zeros(len(self.cases), dtype=bool)
        table[np.flatnonzero(wanted)] = passes
        return table

    def tiers_passed(self, passed: np.ndarray) -> dict[str, bool]:
        """Whether all cases of each tier pass, from which cases do; tiers without a case are left out."""
        found: dict[str, bool] = {}
        for case, value in zip(self.cases, passed, strict=True):
            found[str(case.tier)] = found.get(str(case.tier), True) and bool(value)
        return found


class TieredResult(NamedTuple):
    """Reward of a completion; which of basic, medium, high, edge are active and pass, bool (4,); the active tiers."""

    reward: float
    per_tier: np.ndarray
    active: frozenset[str]


@dataclass(frozen=True)
class TieredReward:
    """Reward of a completion of one problem at training progress f (TAROT, arXiv 2602.15449).

    Parameters
    ----------
    suite : TieredSuite or list of TestCase
    schedule, weights : TierSchedule, TierWeights
    runner : Runner or None
        None runs all cases of a completion at once in the sandbox that the process shares.
    normalise : bool
        Divide by what passing every active case would earn. Not in the paper.
    timeout : float
        Seconds of one case; a case over its time fails, and only that one.
    compare : "lines", "tokens" or "exact"
        Line by line with the white space around each line stripped; or the tokens between white space; or as printed.
    strict : bool
        False: as in the released code, lines beyond those of the shorter output do not count, so that a right first
        line passes. With True both have the same number of lines.
    extract : "code", "first_code" or "text"
        Where the program is: the last or first fenced block of Python ("" if there is none), or the whole completion.
    """

    suite: TieredSuite
    schedule: TierSchedule
    weights: TierWeights
    runner: Runner | None = None
    normalise: bool = False
    timeout: float = 5.0
    compare: Compare = "lines"
    strict: bool = True
    extract: Extract = "code"

    def __post_init__(self) -> None:
        for name, kind in (("suite", TieredSuite), ("schedule", TierSchedule), ("weights", TierWeights)):
            if not isinstance(getattr(self, name), kind):
                object.__setattr__(self, name, kind(getattr(self, name)))  # type: ignore[operator]
        if not is_finite(self.timeout) or self.timeout <= 0:
            raise InvalidInputError(f"timeout must be a number of seconds above 0, got {self.timeout!r}")

    def __call__(self, completion: str, progress: float) -> TieredResult:
        """Reward of `completion` at training progress `progress` >= 0 (the fraction of the epoch in the paper)."""
        active = self.schedule(progress)
        passed = self.suite.passed(
            completion, self.runner, active, timeout=self.timeout, compare=self.compare, strict=self.strict,
            extract=self.extract,
        )  # fmt: skip
        worth = self.weights.of([str(case.tier) for case in self.suite.cases], active)
        reward = float((worth * passed).sum())
        if self.normalise:
            reward = reward / float(worth.sum()) if worth.sum() > 0 else 0.0
        tiers = self.suite.tiers_passed(passed)
        return TieredResult(reward, np.array([tiers.get(tier, False) for tier in TIERS]), active)

    def attainable(self, progress: float) -> float:
        """What a program that passes every case earns at `progress`."""
        worth = self.weights.of([str(case.tier) for case in self.suite.cases], self.schedule(progress))
        return (1.0 if worth.sum() > 0 else 0.0) if self.normalise else float(worth.sum())


def same_output(expected: str, printed: str, compare: Compare = "lines", strict: bool = True) -> bool:
    """Whether what a program printed is what was expected; parameters as in `TieredReward`.

    With "lines", each line is stripped, and lines at the end that hold nothing but white space do not count.
    """
    if strict or compare != "lines":
        return OutputTest(stdout=expected, compare=compare).agrees(printed)
    # The released code strips the whole of what was printed, and not of what was expected.
    pairs = zip(printed.strip().split("\n"), expected.split("\n"), strict=False)
    return all(a.strip() == b.strip() for a, b in pairs)


def succeeded(status: Any) -> bool:
    """Whether a runner's status says that the program ended with exit status 0."""
    if isinstance(status, bool | np.bool_):
        return bool(status)
    return status in _SUCCESS if isinstance(status, str) else status == 0 and status is not None


def sandbox_runs(
    programs: Sequence[tuple[str, str]], timeout: float = 5.0, sandbox: Sandbox | None = None
) -> list[tuple[str, str]]:
    """Run pairs of code and standard input in the sandbox, all in one call; (status, stdout) of each.

    The status is "finished" for exit status 0, "exit N" for another, and else what the sandbox says ("timeout", ...).
    """
    limits = Limits(wall_seconds=timeout)
    results = (sandbox or shared_sandbox()).execute([Script(code, stdin, limits=limits) for code, stdin in programs])
    return [
        (f"exit {r.exit_code}" if r.status == "finished" and r.exit_code != 0 else r.status, r.stdout) for r in results
    ]


def sandbox_runner(code: str, stdin: str, timeout: float) -> tuple[str, str]:
    """The `Runner` that runs in the sandbox; `sandbox_runs` for many at once."""
    return sandbox_runs([(code, stdin)], timeout)[0]


@dataclass(frozen=True)
class TieredTestsReward(Reward):
    """Tier-weighted tests of which the active tiers change with training (TAROT, arXiv 2602.15449).

    Reads the column of tests (forms in `polyreward.rewards.unit_tests`), each with the key ``tier`` or ``label``, and
    the training progress. All active tests of a batch run in one call of the sandbox.

    Parameters
    ----------
    curriculum : name of a curriculum in `PORTFOLIO`
    schedule : TierSchedule or its phases, optional
        In place of the curriculum's.
    weights : TierWeights or mapping of tier to number, optional
        In place of the curriculum's.
    progress : "run" or "epoch"
        "run" is ``step / max_steps`` of the trainer: the limits of `PORTFOLIO` are then shares of the run, as in the
        released recipes of one epoch, and of three (which multiply the limits by 3). "epoch" is the trainer's epoch.
    total_steps : int, optional
        Length of the run where the batch tells a step (column or number ``step``) and no trainer tells it.
    normalise : bool
        Divide by what passing every active test would earn. Not in the paper.
    column, extract, compare, limits, sandbox : as in `polyreward.rewards.unit_tests.UnitTestReward`

    Range [0, sum of the weights of a suite's tests], or [0, 1]. A completion without a program earns 0. Does not apply
    where the tests are None. Warns (`NoSignalWarning`) when over 20 steps more than 95 % of the groups have equal
    rewards below the highest. The total reward of the paper adds 1 for the format.

    Raises
    ------
    InvalidInputError
        Options out of range; at a call, tests that cannot be used or have an unknown tier, named by column and row.
    MissingColumnError
        The active tiers change and the batch does not tell the progress; held-out scores use `UnitTestReward`.
    UnknownNameError
        No such curriculum.
    """

    curriculum: str = "var_asce_normal"
    schedule: TierSchedule | Any = None
    weights: TierWeights | Any = None
    progress: Literal["run", "epoch"] = "run"
    total_steps: int | None = None
    normalise: bool = False
    column: str = "tests"
    extract: Extract = "code"
    compare: Compare = "lines"
    limits: Limits | Any = None
    sandbox: Sandbox | None = field(default=None, compare=False, repr=False)
    _watch: DeadGroupWatch = field(default_factory=DeadGroupWatch, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_options(self)
        if self.curriculum not in PORTFOLIO:
            raise UnknownNameError(
                f"there is no curriculum {self.curriculum!r}{nearest(str(self.curriculum), PORTFOLIO)}"
            )
        if self.progress not in ("run", "epoch"):
            raise InvalidInputError(f"progress must be 'run' or 'epoch', got {self.progress!r}")
        if self.total_steps is not None and (not is_finite(self.total_steps) or self.total_steps < 1):
            raise InvalidInputError(f"total_steps must be at least 1, got {self.total_steps!r}")
        for name, kind, at in (("schedule", TierSchedule, 0), ("weights", TierWeights, 1)):
            given = getattr(self, name)
            part = (
                PORTFOLIO[self.curriculum][at] if given is None else given if isinstance(given, kind) else kind(given)
            )
            object.__setattr__(self, name, part)

    def __getstate__(self) -> dict[str, Any]:
        return without_sandbox(self)

    @property
    def reads(self) -> tuple[str, ...]:
        """The column of tests."""
        return (self.column,)

    def __call__(self, prompts: Sequence[Any] | None, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """One value a completion; every program runs on its active tests in one call of the sandbox."""
        samples = list(self.samples(prompts, completions, columns))
        runner = UnitTests(self.column, self.extract, self.compare, self.limits, sandbox=self.sandbox)
        suites = runner.suites(self, samples)
        tiers = [self._tiers(sample, suite) for sample, suite in zip(samples, suites, strict=True)]
        active = [self.schedule(self._progress(sample, columns)) for sample in samples]
        chosen = [
            tuple(test for test, tier in zip(suite, names, strict=True) if tier in now)
            for suite, names, now in zip(suites, tiers, active, strict=True)
        ]
        values: list[float | None] = [None] * len(completions)
        best: list[float] = []
        for sample, run, names, now in zip(samples, runner.run(samples, chosen), tiers, active, strict=True):
            worth = self.weights.of([name for name in names if name in now], now)
            most = float(worth.sum())
            scale = most if self.normalise and most > 0 else 1.0
            values[sample.row] = float((worth * run.passed).sum()) / scale
            best.append(most / scale)
        if prompts is not None or "group" in columns:
            self._look(samples, [values[sample.row] for sample in samples], best, active)
        return values

    def _tiers(self, sample: Sample, suite: Sequence[SuiteTest]) -> list[str]:
        try:
            return [tier_name(test.tier) for test in suite]
        except UnknownTierError as error:
            raise self.refuse(sample, self.column, str(error)) from None

    def _progress(self, sample: Sample, columns: Mapping[str, Any]) -> float:
        """Training progress of a sample; 0 where the active tiers never change."""
        state = columns.get("trainer_state")
        if self.progress == "epoch":
            epoch = getattr(state, "epoch", None) if state is not None else sample.columns.get("epoch")
            if epoch is not None:
                return float(epoch)
        else:
            total = self.total_steps if self.total_steps is not None else getattr(state, "max_steps", None)
            if sample.step is not None and total:
                return sample.step / total
        if self.schedule.constant:
            return 0.0
        told = "the epoch" if self.progress == "epoch" else "the step and the length of the run"
        raise MissingColumnError(
            f"reward {self.__name__!r} has tiers that change with training, and neither trainer_state nor the batch "
            f"tells {told}; score held-out prompts with the unit tests alone"
        )

    def _look(
        self, samples: Sequence[Sample], values: Sequence[Any], best: Sequence[float], active: Sequence[frozenset[str]]
    ) -> None:
        """Count the groups without signal, save those that are solved."""
        groups: dict[Any, list[tuple[float, float]]] = {}
        for sample, value, most in zip(samples, values, best, strict=True):
            groups.setdefault(group_key(sample), []).append((value, most))
        real = [members for members in groups.values() if len(members) > 1]
        dead = sum(len(set(members)) == 1 and members[0][0] < members[0][1] for members in real)
        if samples:
            about = f" (active: {', '.join(sorted(active[0]))})"
            self._watch.update(dead, len(real), samples[0].step, about)
